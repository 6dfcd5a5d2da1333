"""The commands: parse words, call the library, print. No logic lives here.

A mistake of the user's ends in one line on standard error and exit code 2, never in a traceback.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hrm_ray.config.validate import nearest
from hrm_ray.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from hrm_ray.api import Solver

TRACEBACK = "HRM_RAY_TRACEBACK"  # set it to see where an error came from


class Options(dict[str, Any]):
    """``key=value`` words of a command that takes a fixed set of them; values are read as YAML."""

    def __init__(self, words: Sequence[str], known: Sequence[str], required: Sequence[str] = ()):
        super().__init__()
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                raise UserError(f"'{word}' is not of the form key=value; known keys: {', '.join(known)}")
            if key not in known:
                raise UserError(f"unknown key '{key}'; {nearest(key, known)}")
            self[key] = _yaml_value(key, value)
        for key in required:
            if key not in self:
                raise UserError(f"'{key}' is not given; add {key}=VALUE")


def _yaml_value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}={text}: not a value; quote it if it holds special characters") from None


# data


def data_build(args: argparse.Namespace) -> None:
    from hrm_ray.data.pipeline import build
    from hrm_ray.data.recipe import Recipe, load_recipe

    options = Options(args.words, ["recipe", "out", "overwrite", *Recipe.model_fields], ["recipe", "out"])
    name, out, overwrite = options.pop("recipe"), options.pop("out"), options.pop("overwrite", False)
    manifest = build(load_recipe(str(name), options), str(out), overwrite=bool(overwrite))
    sizes = ", ".join(f"{split} {info.num_examples:,}" for split, info in manifest.splits.items())
    print(f"{out}: {sizes} examples")


def data_info(args: argparse.Namespace) -> None:
    from hrm_ray.data.inspect import describe

    print(describe(args.dir))


def data_verify(args: argparse.Namespace) -> int:
    from hrm_ray.data.shards import verify

    problems = verify(args.dir)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{args.dir}: every byte is as it was built")
    return 2 if problems else 0


def data_show(args: argparse.Namespace) -> None:
    from hrm_ray.data.inspect import show

    options = Options(args.words, ["split", "index"])
    print(show(args.dir, options.get("split", "train"), options.get("index", 0)))


def data_import_npy(args: argparse.Namespace) -> None:
    from hrm_ray.interop.dataset import import_npy

    options = Options(args.words, ["out"], ["out"])
    manifest = import_npy(args.dir, options["out"])
    sizes = ", ".join(f"{split} {info.num_examples:,}" for split, info in manifest.splits.items())
    print(f"{options['out']}: {sizes} examples")


# training and what comes after


def train(args: argparse.Namespace) -> int:
    from hrm_ray.config.compose import train_config
    from hrm_ray.training import trainer

    config = train_config(args.words)
    print(trainer.announce(config), file=sys.stderr)
    summary, stopped_by = trainer.train(config)
    run = trainer.run_folder(config)
    if stopped_by is not None:
        print(f"stopped at step {summary['global_step']}; the same command continues", file=sys.stderr)
        return 128 + stopped_by
    final = summary["best"] or summary["final"]
    exact = final.get("eval/exact_accuracy")
    print(f"{run}: step {summary['global_step']}, {summary['train_s']:.0f} s of training", end="")
    print(f", exact accuracy {exact:.1%}" if exact is not None else "")
    return 0


def evaluate(args: argparse.Namespace) -> None:
    import numpy as np
    from tqdm import tqdm

    from hrm_ray.api import load
    from hrm_ray.data.shards import open_dataset

    options = Options(
        args.words, ["data", "split", "num_examples", "batch_size", "save_outputs", "out"], ["data"]
    )
    data, split = str(options["data"]), options.get("split", "test")
    outputs = options.get("save_outputs") or []
    if bool(outputs) != ("out" in options):
        raise UserError("save_outputs=[NAME,...] and out=FILE.npz go together")
    total = open_dataset(data).split(split).num_examples
    solver = load(args.checkpoint)
    with tqdm(total=min(total, options.get("num_examples", total)), unit="puzzle", disable=args.json) as bar:
        metrics, arrays = solver.evaluate(
            data,
            split=split,
            num_examples=options.get("num_examples"),
            batch_size=options.get("batch_size", 256),
            save_outputs=[outputs] if isinstance(outputs, str) else outputs,
            on_batch=bar.update,
        )
    if outputs:
        np.savez(options["out"], **arrays)  # type: ignore[arg-type]
    named = {f"eval/{name}": value for name, value in metrics.items()}
    if args.json:
        print(json.dumps(named))
    else:
        for name, value in named.items():
            print(f"{name:24} {value:.4f}")


def solve(args: argparse.Namespace) -> None:
    from hrm_ray.api import load

    solver = load(args.checkpoint)
    puzzles = _read_puzzles(solver, args.words)
    solutions = solver.solve(puzzles)
    if args.json:
        for s in solutions:
            row = {"puzzle": s.puzzle, "answer": s.answer, "confidence": s.confidence, "valid": s.is_valid}
            print(json.dumps(row))
        return
    for question, s in zip(puzzles, solutions, strict=True):
        verdict = {True: "valid", False: "NOT valid", None: "cannot be checked"}[s.is_valid]
        print(solver.task.render(s.tokens, question))
        print(f"{verdict}, confidence {s.confidence:.1%}: {s.answer}\n")
    if len(solutions) > 1 and solver.task.checkable:
        print(f"{sum(bool(s.is_valid) for s in solutions)} of {len(solutions)} valid")


def _read_puzzles(solver: "Solver", words: Sequence[str]) -> list["np.ndarray"]:
    """The puzzles that the words of `solve` mean: one puzzle, a file of them, or examples of a dataset."""
    if not words or "=" in words[0]:
        options = Options(words, ["data", "split", "index", "count"], ["data"])
        return solver.questions(**options)
    if len(words) > 1:
        raise UserError("give one puzzle (without spaces), one file, or data=DIR")
    word = words[0]
    file = Path(word)
    if len(word) < 255 and file.is_file():
        lines = [(f"{file}:{n}", line.strip()) for n, line in enumerate(file.read_text().splitlines(), 1)]
        puzzles = [solver.parse(line, where) for where, line in lines if line and not line.startswith("#")]
        if not puzzles:
            raise UserError(f"{file} holds no puzzle")
        return puzzles
    return [solver.parse(word, f"'{word}' is no file and no puzzle")]


def import_checkpoint(args: argparse.Namespace) -> None:
    from hrm_ray.data.shards import open_dataset
    from hrm_ray.interop.checkpoint import import_checkpoint

    options = Options(args.words, ["out", "data"], ["out"])
    dataset = open_dataset(options["data"]) if "data" in options else None
    manifest = import_checkpoint(args.dir, options["out"], dataset)
    print(
        f"{options['out']}: {manifest.arch.name}, task {manifest.dataset.task}, step {manifest.global_step}"
    )


def export_checkpoint(args: argparse.Namespace) -> None:
    from hrm_ray.interop.checkpoint import export_checkpoint
    from hrm_ray.training.checkpoint import find

    options = Options(args.words, ["out"], ["out"])
    export_checkpoint(find(args.checkpoint), options["out"])
    print(f"{options['out']}: written in the published layout")


def doctor(args: argparse.Namespace) -> None:
    from hrm_ray.doctor import report

    print(report())


# The parser

Command = Callable[[argparse.Namespace], int | None]


def _add(commands: Any, name: str, run: Command, help: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def build_parser() -> argparse.ArgumentParser:
    """All commands; each knows an example of its use."""
    parser = argparse.ArgumentParser(
        prog="hrm-ray",
        description="Train and tune recursive reasoning models on Ray.",
        epilog="Start with: make quickstart. `hrm-ray COMMAND --help` shows examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    key_value: dict[str, Any] = {"nargs": "*", "metavar": "key=value"}

    data = commands.add_parser("data", help="build, check and show datasets")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    p = _add(
        kinds,
        "build",
        data_build,
        "turn a source of puzzles into Arrow shards",
        "hrm-ray data build recipe=sudoku_4x4 out=data/sudoku-4x4\n"
        "hrm-ray data build recipe=sudoku_9x9 source=puzzles.csv out=data/mine subsample_size=500 on_bad=skip\n"
        "hrm-ray data build recipe=sudoku_9x9 source=sapientinc/sudoku-extreme out=data/sudoku-9x9",
    )
    p.add_argument("words", **key_value, help="recipe=NAME out=DIR [source=PATH] and any key of the recipe")
    p = _add(
        kinds, "info", data_info, "print counts and schema of a dataset", "hrm-ray data info data/sudoku-4x4"
    )
    p.add_argument("dir", help="dataset folder or URI")
    p = _add(
        kinds, "verify", data_verify, "check every byte of a dataset", "hrm-ray data verify data/sudoku-4x4"
    )
    p.add_argument("dir", help="dataset folder or URI")
    p = _add(
        kinds, "show", data_show, "render one example", "hrm-ray data show data/sudoku-4x4 split=test index=7"
    )
    p.add_argument("dir", help="dataset folder or URI")
    p.add_argument("words", **key_value, help="split=train index=0")
    p = _add(
        kinds,
        "import-npy",
        data_import_npy,
        "convert a dataset in the published layout",
        "hrm-ray data import-npy data/sudoku-extreme-1k-aug-1000 out=data/sudoku-9x9",
    )
    p.add_argument("dir", help="folder with train/ and test/")
    p.add_argument("words", **key_value, help="out=DIR")

    p = _add(
        commands,
        "train",
        train,
        "train a model under Ray; the same command again resumes",
        "hrm-ray train experiment=quickstart\n"
        "hrm-ray train experiment=quickstart lr=1e-3 run_name=slower\n"
        "hrm-ray train experiment=sudoku_extreme data=data/mine scaling.num_workers=2 max_steps=100\n"
        "hrm-ray train experiment=quickstart scaling=local run_name=debug",
    )
    p.add_argument("words", **key_value, help="experiment=NAME and any key of the configuration")
    p = _add(
        commands,
        "eval",
        evaluate,
        "measure a checkpoint on a dataset",
        "hrm-ray eval runs/quickstart data=data/sudoku-4x4\n"
        "hrm-ray eval runs/quickstart data=data/sudoku-4x4 save_outputs=[logits,q_halt_logits] out=outputs.npz",
    )
    p.add_argument("checkpoint", help="checkpoint folder, or run folder (then its best)")
    p.add_argument(
        "words",
        **key_value,
        help="data=DIR [split=test] [num_examples=N] [save_outputs=[NAME,...] out=FILE.npz]",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p = _add(
        commands,
        "solve",
        solve,
        "solve puzzles with a trained model",
        "hrm-ray solve runs/quickstart ...1.2....3.4...\n"
        "hrm-ray solve runs/quickstart puzzles.txt --json\n"
        "hrm-ray solve runs/quickstart data=data/sudoku-4x4 index=7 count=3",
    )
    p.add_argument("checkpoint", help="checkpoint folder, or run folder (then its best)")
    p.add_argument(
        "words",
        nargs="*",
        metavar="PUZZLE",
        help="a puzzle, a file with one a line, or data=DIR [split=test] [index=0]",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object a puzzle")
    p = _add(
        commands,
        "import-checkpoint",
        import_checkpoint,
        "convert a checkpoint from the published layout",
        "hrm-ray import-checkpoint HRM-checkpoint-sudoku-extreme out=checkpoints/published",
    )
    p.add_argument("dir", help="folder with all_config.yaml and the weights")
    p.add_argument("words", **key_value, help="out=DIR [data=DIR]")
    p = _add(
        commands,
        "export-checkpoint",
        export_checkpoint,
        "write a checkpoint in the published layout",
        "hrm-ray export-checkpoint runs/quickstart out=published",
    )
    p.add_argument("checkpoint", help="checkpoint folder, or run folder (then its best)")
    p.add_argument("words", **key_value, help="out=DIR")
    _add(commands, "doctor", doctor, "show what this machine has and what will be used", "hrm-ray doctor")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except UserError as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
