"""Build, check and show datasets."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, NonNegativeInt, model_validator

from hrm_ray.cli.command import KEY_VALUE, add, options_of
from hrm_ray.cli.evaluate import load_solver
from hrm_ray.cli.streams import in_colour
from hrm_ray.config.validate import PositiveInt, Settings, read_words, split_word, validated
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
    """Of ``data show``: one example, or a page with `out`."""

    split: str = "train"
    """Part of the data set."""
    index: NonNegativeInt = 0
    """The example to print."""
    out: str | None = None
    """The page, FILE.html, in place of one example."""
    count: PositiveInt = 200
    """Groups on the page, evenly spread."""
    copies: PositiveInt = 8
    """Puzzles of a group on the page, at most."""
    run: str | None = None
    """A checkpoint or run folder, whose answers the page shows."""
    batch_size: int = Field(default=64, gt=0, le=10**6)
    """Puzzles that it answers at once."""

    @model_validator(mode="after")
    def _keys_are_of_one_kind(self) -> "ShowOptions":
        kinds = {"index"} if self.out else {"count", "copies", "run", "batch_size"}
        if wrong := sorted(kinds & self.model_fields_set):
            key = wrong[0]
            raise ValueError(
                f"{key}= is for one example; leave it out, or leave out= out"
                if self.out
                else f"{key}= is for a page; give out=FILE.html"
            )
        return self


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
    from hrm_ray.interop.look import open_any

    options: ShowOptions = options_of(args)
    if options.out is None:
        print(show(open_any(args.dir), options.split, options.index, in_colour=in_colour()))
    else:
        _write_page(args.dir, Path(options.out), options)


def _write_page(folder: str, out: Path, options: ShowOptions) -> None:
    from tqdm import tqdm

    from hrm_ray.data.files import check_replaceable, whole_file, writing
    from hrm_ray.data.page import choose, is_page, page
    from hrm_ray.interop.look import open_any

    check_lasts("out", str(out))
    check_replaceable(out, "out", "page of a data set", is_page)
    solver = None if options.run is None else load_solver(options.run)
    dataset = open_any(folder, solver.task.name if solver else None)
    dataset.split(options.split)
    if solver:
        solver.check(dataset)
    # Opened before the model thinks, so that a path that cannot be written is reported at once.
    with writing(out), whole_file(out) as file:
        choice = choose(
            dataset,
            options.split,
            count=options.count,
            copies=options.copies,
            num_steps=solver.model.halt_max_steps if solver else 0,
        )
        steps = None
        if solver:
            questions, identifiers = choice.rows["inputs"], choice.rows["puzzle_identifiers"]
            with tqdm(total=len(questions), unit="puzzle", delay=1) as bar:
                steps = solver.every_step(
                    questions, identifiers, batch_size=options.batch_size, on_batch=bar.update
                )
        run = f"{options.run} ({Path(str(solver.checkpoint.folder)).name})" if solver else ""
        file.write(page(dataset, options.split, choice, steps, run).encode())
    print(f"{out}: {len(choice.groups):,} groups, {len(choice.rows['inputs']):,} examples")


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
        "hrm-ray data build recipe=sudoku_easy out=data/sudoku-easy\n"
        "hrm-ray data build recipe=sudoku_9x9 source=puzzles.csv out=data/mine subsample_size=500 on_bad=skip\n"
        "hrm-ray data build recipe=sudoku_9x9 source=sapientinc/sudoku-extreme out=data/sudoku-9x9\n"
        "hrm-ray data build recipe=modular op=- p=97 train_fraction=0.5 out=data/minus",
    )
    p.add_argument("words", **KEY_VALUE, help="recipe=NAME out=DIR [source=PATH] and any key of the recipe")
    p = add(
        kinds, "info", data_info, "print counts and schema of a dataset", "hrm-ray data info data/sudoku-easy"
    )
    p.add_argument("dir", help="dataset folder or URI")
    p = add(
        kinds, "verify", data_verify, "check every byte of a dataset", "hrm-ray data verify data/sudoku-easy"
    )
    p.add_argument("dir", help="dataset folder or URI")
    p = add(
        kinds,
        "show",
        data_show,
        "draw one example, or make a page to browse in",
        "hrm-ray data show data/sudoku-easy split=test index=7\n"
        "hrm-ray data show data/sudoku-easy out=page.html\n"
        "hrm-ray data show data/sudoku-easy split=test out=page.html run=runs/quickstart",
    )
    p.add_argument("dir", help="dataset folder or URI, or a folder in the published layout")
    p.add_argument(
        "words",
        **KEY_VALUE,
        help="split=train index=0, or out=FILE.html [count=200] [copies=8] [run=RUN] [batch_size=64]",
    )
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
