"""Build, check and show datasets."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt

from hrm_ray.cli.command import KEY_VALUE, add, options_of
from hrm_ray.config.validate import Settings, read_words, split_word, validated
from hrm_ray.errors import UserError
from hrm_ray.jobs.copy import check_lasts

if TYPE_CHECKING:
    from hrm_ray.data.format import Manifest
    from hrm_ray.data.recipe import Recipe


class BuildOptions(Settings):
    """Of ``data build``, beside the keys of the recipe."""

    recipe: str
    out: str
    overwrite: bool = False


class ShowOptions(Settings):
    """Of ``data show``."""

    split: str = "train"
    index: NonNegativeInt = 0


class OutOptions(Settings):
    """Options of commands that convert one format into another."""

    out: str


class ImportOptions(OutOptions):
    """Of ``data import-npy``; `task` names the puzzle family where it is not recognised."""

    task: str | None = None


def build_options(words: Sequence[str]) -> tuple[BuildOptions, "Recipe"]:
    """What the words of ``data build`` mean. Raises UserError."""
    from hrm_ray.data.recipe import load_recipe, recipe_class, recipe_class_of, recipe_names

    named = dict(map(split_word, words))
    if "recipe" not in named:
        raise UserError(f"data build: 'recipe' is not given; add recipe=NAME ({', '.join(recipe_names())})")
    kind = recipe_class(named["task"]) if "task" in named else recipe_class_of(named["recipe"])
    values = read_words(words, BuildOptions, kind)
    own = {key: values.pop(key) for key in BuildOptions.model_fields if key in values}
    options = validated(BuildOptions, own, "data build")
    return options, load_recipe(options.recipe, values)


def data_build(args: argparse.Namespace) -> None:
    from hrm_ray.data.pipeline import build

    options, recipe = build_options(args.words)
    check_lasts("out", options.out)
    _print_sizes(options.out, build(recipe, options.out, overwrite=options.overwrite))


def _print_sizes(out: str, manifest: "Manifest") -> None:
    sizes = ", ".join(f"{split} {info.num_examples:,}" for split, info in manifest.splits.items())
    print(f"{out}: {sizes} examples")


def data_info(args: argparse.Namespace) -> None:
    from hrm_ray.data.inspect import describe

    print(describe(args.dir))


def data_verify(args: argparse.Namespace) -> int:
    from hrm_ray.data.verify import verify

    problems = verify(args.dir)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{args.dir}: every byte is as it was built")
    return 2 if problems else 0


def data_show(args: argparse.Namespace) -> None:
    from hrm_ray.data.inspect import show

    options: ShowOptions = options_of(args)
    print(show(args.dir, options.split, options.index))


def data_import_npy(args: argparse.Namespace) -> None:
    from hrm_ray.interop.dataset import import_npy

    options: ImportOptions = options_of(args)
    check_lasts("out", options.out)
    _print_sizes(options.out, import_npy(args.dir, options.out, task=options.task))


def register(commands: Any) -> None:
    data = commands.add_parser("data", help="build, check and show datasets")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    p = add(
        kinds,
        "build",
        data_build,
        "turn a source of puzzles into Arrow shards",
        "hrm-ray data build recipe=sudoku_4x4 out=data/sudoku-4x4\n"
        "hrm-ray data build recipe=sudoku_9x9 source=puzzles.csv out=data/mine subsample_size=500 on_bad=skip\n"
        "hrm-ray data build recipe=sudoku_9x9 source=sapientinc/sudoku-extreme out=data/sudoku-9x9",
    )
    p.add_argument("words", **KEY_VALUE, help="recipe=NAME out=DIR [source=PATH] and any key of the recipe")
    p = add(
        kinds, "info", data_info, "print counts and schema of a dataset", "hrm-ray data info data/sudoku-4x4"
    )
    p.add_argument("dir", help="dataset folder or URI")
    p = add(
        kinds, "verify", data_verify, "check every byte of a dataset", "hrm-ray data verify data/sudoku-4x4"
    )
    p.add_argument("dir", help="dataset folder or URI")
    p = add(
        kinds, "show", data_show, "render one example", "hrm-ray data show data/sudoku-4x4 split=test index=7"
    )
    p.add_argument("dir", help="dataset folder or URI")
    p.add_argument("words", **KEY_VALUE, help="split=train index=0")
    p.set_defaults(options=ShowOptions)
    p = add(
        kinds,
        "import-npy",
        data_import_npy,
        "convert a dataset in the published layout",
        "hrm-ray data import-npy data/sudoku-extreme-1k-aug-1000 out=data/sudoku-9x9\n"
        "hrm-ray data import-npy data/arc1concept-aug-1000 out=data/arc-1 task=arc",
    )
    p.add_argument("dir", help="folder with train/ and test/")
    p.add_argument("words", **KEY_VALUE, help="out=DIR [task=NAME]")
    p.set_defaults(options=ImportOptions)
