"""The commands: parse words, call the library, print. No logic lives here.

A mistake of the user's ends in one line on standard error and exit code 2, never in a traceback.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, PositiveInt, field_validator, model_validator

from hrm_ray.config.inference import Inference
from hrm_ray.config.validate import Settings, read_words, validated
from hrm_ray.errors import UserError, about_file

if TYPE_CHECKING:
    import numpy as np

    from hrm_ray.api import Solver
    from hrm_ray.data.format import Manifest
    from hrm_ray.data.recipe import Recipe
    from hrm_ray.training.storage import Storage

TRACEBACK = "HRM_RAY_TRACEBACK"  # set it to see where an error came from


# What may follow a command as key=value


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
    """Of what converts one thing into another."""

    out: str


class ImportOptions(OutOptions):
    """Of ``import-checkpoint``; `data` says which task the model was trained on."""

    data: str | None = None


class PromoteOptions(Settings):
    """Of ``tune promote``, beside words of ``train``."""

    seeds: PositiveInt = 3


class SolveOptions(Inference):
    """Of ``solve``; `data` and what follows, in place of puzzles: which examples of a dataset."""

    data: str | None = None
    split: str = "test"
    index: NonNegativeInt = 0
    count: PositiveInt = 1
    batch_size: PositiveInt = 256


class EvalOptions(Inference):
    """Of ``eval``; names in `save_outputs` are those of `hrm_ray.training.evaluate.OUTPUTS`."""

    data: str
    split: str = "test"
    num_examples: PositiveInt | None = None
    batch_size: PositiveInt = 256
    save_outputs: tuple[str, ...] = ()
    out: str | None = None

    @field_validator("save_outputs", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names

    @model_validator(mode="after")
    def _outputs_go_somewhere(self) -> "EvalOptions":
        if bool(self.save_outputs) != (self.out is not None):
            raise ValueError("save_outputs=[NAME,...] and out=FILE.npz go together")
        if self.out is not None and Path(self.out).is_dir():
            raise ValueError(f"out={self.out} is a folder; give a file")
        if self.out is not None and not Path(self.out).parent.is_dir():
            raise ValueError(f"out={self.out}: there is no folder {Path(self.out).parent}")
        return self


def options_of(args: argparse.Namespace) -> Any:
    """The key=value words of a command as an object of its options class. Raises UserError."""
    return validated(args.options, read_words(args.words, args.options), args.title)


def inference_of(options: Inference) -> dict[str, Any]:
    """The part of `options` that says how the model is used."""
    return {key: getattr(options, key) for key in Inference.model_fields}


def build_options(words: Sequence[str]) -> tuple[BuildOptions, "Recipe"]:
    """What the words of ``data build`` mean. Raises UserError."""
    from hrm_ray.data.recipe import Recipe, load_recipe

    values = read_words(words, BuildOptions, Recipe)
    own = {key: values.pop(key) for key in BuildOptions.model_fields if key in values}
    options = validated(BuildOptions, own, "data build")
    return options, load_recipe(options.recipe, values)


# data


def data_build(args: argparse.Namespace) -> None:
    from hrm_ray.data.pipeline import build

    options, recipe = build_options(args.words)
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

    options: OutOptions = options_of(args)
    _print_sizes(options.out, import_npy(args.dir, options.out))


# training and what comes after


@contextmanager
def _interrupts_end_the_process() -> Iterator[None]:
    """Inside, SIGINT ends the process at once, until another handler is set.

    Else it may be lost: a script's background job is started with SIGINT ignored, and where it is not, Python raises
    KeyboardInterrupt in the midst of imports, some of which take any exception for a sign that something is missing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def train(args: argparse.Namespace) -> int:
    with _interrupts_end_the_process():  # nothing has begun yet that would have to be ended well
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    from hrm_ray.config.compose import train_config
    from hrm_ray.training import trainer

    config = train_config(args.words)
    print(trainer.announce(config), file=sys.stderr)
    summary, stopped_by = trainer.train(config)
    run = trainer.run_folder(config)
    if stopped_by is not None:
        print(f"stopped at step {summary['global_step']}; the same command continues", file=sys.stderr)
        return 128 + stopped_by
    if summary["stop_reason"] == "max_time_s" and config.max_time_s:
        step = summary["global_step"]
        print(
            f"max_time_s={config.max_time_s:g} are over at step {step}; the same command continues",
            file=sys.stderr,
        )
    if summary["stop_reason"] == "early_stopping" and config.early_stopping:
        print(
            f"{config.early_stopping} evaluations without a better {config.best_metric}: the run ends early; "
            "early_stopping=null or a larger number continues it",
            file=sys.stderr,
        )
    final = summary["best"] or summary["final"]
    exact = final.get("eval/exact_accuracy")
    print(f"{run}: step {summary['global_step']}, {summary['train_s']:.0f} s of training", end="")
    print(f", exact accuracy {exact:.1%}" if exact is not None else "")
    return 0


def tune(args: argparse.Namespace) -> int:
    verbs = {
        "status": tune_status,
        "stop": tune_stop,
        "set": tune_set,
        "promote": tune_promote,
        "report": tune_report,
    }
    if args.sweep in verbs:
        if not args.words:
            raise UserError(
                f"hrm-ray tune {args.sweep} needs the folder of a sweep, such as runs/quickstart_lr"
            )
        return verbs[args.sweep](args, args.words[0], args.words[1:]) or 0
    with _interrupts_end_the_process():
        return _tune(args)


def _tune(args: argparse.Namespace) -> int:
    from hrm_ray.tuning.config import SETTABLE, load_sweep
    from hrm_ray.tuning.console import ConsoleView, ending
    from hrm_ray.tuning.sweep import new_name, run_sweep

    config = load_sweep(args.sweep, args.words)
    if args.new_name:
        config = new_name(config)
    given = {word.partition("=")[0].partition(".")[0] for word in args.words} & set(SETTABLE)
    result = run_sweep(config, given=given, yes=args.yes, dry_run=args.dry_run, view=ConsoleView())
    if result is None:
        return 0
    if args.json:
        print(json.dumps(result.summary))
    else:
        print("\n".join(ending(result)))
    return 128 + result.stopped_by if result.stopped_by is not None else 0


def _sweep(folder: str) -> "Storage":
    from hrm_ray.training.storage import Storage

    return Storage(folder)


def tune_status(args: argparse.Namespace, folder: str, words: Sequence[str]) -> None:
    from hrm_ray.tuning.console import print_status
    from hrm_ray.tuning.status import status

    study, summary, rows = status(_sweep(folder))
    if args.json:
        print(json.dumps({**summary, "trials": rows}))
    else:
        print_status(study, summary, rows)


def tune_stop(args: argparse.Namespace, folder: str, words: Sequence[str]) -> None:
    from hrm_ray.tuning.status import stop

    if strange := [word for word in words if not word.isdigit()]:
        raise UserError(f"'{strange[0]}' is no number of a trial")
    print(stop(_sweep(folder), [int(word) for word in words]))


def tune_set(args: argparse.Namespace, folder: str, words: Sequence[str]) -> None:
    from hrm_ray.tuning.config import SETTABLE
    from hrm_ray.tuning.status import change

    if not words:
        raise UserError(f"hrm-ray tune set {folder} needs key=value; keys: {', '.join(SETTABLE)}")
    print(json.dumps(change(_sweep(folder), words)))


def tune_promote(args: argparse.Namespace, folder: str, words: Sequence[str]) -> int:
    from hrm_ray.tuning.console import ConsoleView, promoted_lines
    from hrm_ray.tuning.sweep import promote

    own = [word for word in words if word.startswith("seeds=")]
    options = validated(PromoteOptions, read_words(own, PromoteOptions), "tune promote")
    more = [word for word in words if word not in own]
    found = promote(_sweep(folder), more, seeds=options.seeds, view=ConsoleView())
    print(json.dumps(found) if args.json else "\n".join(promoted_lines(found)))
    return 128 + found["stopped_by"] if found["stopped_by"] is not None else 0


def tune_report(args: argparse.Namespace, folder: str, words: Sequence[str]) -> None:
    from hrm_ray.tuning.report import PAGE, write
    from hrm_ray.tuning.status import status

    study, summary, rows = status(_sweep(folder))
    write(_sweep(folder), study, summary, rows)
    print(_sweep(folder) / PAGE)


def _load(checkpoint: str) -> "Solver":
    """The model of a command, whose process may keep its memory."""
    from hrm_ray import memory
    from hrm_ray.api import load

    solver = load(checkpoint)
    if solver.setup.device.type == "cpu":
        memory.keep_memory()
    return solver


def evaluate(args: argparse.Namespace) -> None:
    import numpy as np
    from tqdm import tqdm

    from hrm_ray.data.files import whole_file
    from hrm_ray.data.shards import open_dataset

    options: EvalOptions = options_of(args)
    total = open_dataset(options.data).split(options.split).num_examples
    solver = _load(args.checkpoint)
    bar = tqdm(total=min(total, options.num_examples or total), unit="puzzle", disable=args.json)
    # Opened before the evaluation: where nothing can be written is told at once.
    with bar, whole_file(Path(options.out)) if options.out else nullcontext() as file:
        metrics, arrays = solver.evaluate(
            options.data,
            split=options.split,
            num_examples=options.num_examples,
            batch_size=options.batch_size,
            save_outputs=options.save_outputs,
            on_batch=bar.update,
            **inference_of(options),
        )
        if file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    named = {f"eval/{name}": value for name, value in metrics.items()}
    if args.json:
        print(json.dumps(named))
    else:
        for name, value in named.items():
            print(f"{name:28} {value:.4f}")


def solve(args: argparse.Namespace) -> None:
    solver = _load(args.checkpoint)
    named = [word for word in args.words if "=" in word]
    options = validated(SolveOptions, read_words(named, SolveOptions), args.title)
    puzzles = _read_puzzles(solver, [word for word in args.words if "=" not in word], options)
    solutions = solver.solve(puzzles, batch_size=options.batch_size, **inference_of(options))
    if args.json:
        for s in solutions:
            row = {"puzzle": s.puzzle, "answer": s.answer, "confidence": s.confidence, "steps": s.num_steps}
            print(json.dumps(row | {"valid": s.is_valid}))
        return
    for question, s in zip(puzzles, solutions, strict=True):
        verdict = {True: "valid", False: "NOT valid", None: "cannot be checked"}[s.is_valid]
        print(solver.task.render(s.tokens, question))
        print(f"{verdict}, confidence {s.confidence:.1%}: {s.answer}\n")
    if len(solutions) > 1 and solver.task.checkable:
        print(f"{sum(bool(s.is_valid) for s in solutions)} of {len(solutions)} valid")


def _read_puzzles(solver: "Solver", words: Sequence[str], options: SolveOptions) -> list["np.ndarray"]:
    """The puzzles that are meant: one puzzle, a file of them, or examples of a dataset."""
    if options.data is not None and not words:
        return solver.questions(options.data, split=options.split, index=options.index, count=options.count)
    if len(words) != 1 or options.data is not None:
        raise UserError("give one puzzle (without spaces), one file, or data=DIR")
    word = words[0]
    file = Path(word)
    if len(word) < 255 and file.is_file():
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{file} is no text file; give one with a puzzle on each line") from None
        numbered = [(f"{file}:{n}", line.strip()) for n, line in enumerate(lines, 1)]
        puzzles = [_read_puzzle(solver, t, where) for where, t in numbered if t and not t.startswith("#")]
        if not puzzles:
            raise UserError(f"{file} holds no puzzle")
        return puzzles
    return [_read_puzzle(solver, word, f"'{word}' is no file and no puzzle to solve")]


def _read_puzzle(solver: "Solver", text: str, where: str) -> "np.ndarray":
    question = solver.parse(text, where)
    if solver.task.num_solutions(question) == 2:
        print(f"note: '{text}' has several solutions; any of them counts as valid", file=sys.stderr)
    return question


def import_checkpoint(args: argparse.Namespace) -> None:
    from hrm_ray.data.shards import open_dataset
    from hrm_ray.interop.checkpoint import import_checkpoint

    options: ImportOptions = options_of(args)
    dataset = open_dataset(options.data) if options.data else None
    manifest = import_checkpoint(args.dir, options.out, dataset)
    print(f"{options.out}: {manifest.arch.name}, task {manifest.dataset.task}, step {manifest.global_step}")


def export_checkpoint(args: argparse.Namespace) -> None:
    from hrm_ray.interop.checkpoint import export_checkpoint
    from hrm_ray.training.checkpoint import find

    options: OutOptions = options_of(args)
    export_checkpoint(find(args.checkpoint), options.out)
    print(f"{options.out}: written in the published layout")


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
    parser.set_defaults(run=run, title=parser.prog.partition(" ")[2])
    return parser


def build_parser() -> argparse.ArgumentParser:
    """All commands; each knows an example of its use."""
    parser = argparse.ArgumentParser(
        prog="hrm-ray",
        description="Train and evaluate recursive reasoning models on Ray.",
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
    p.set_defaults(options=ShowOptions)
    p = _add(
        kinds,
        "import-npy",
        data_import_npy,
        "convert a dataset in the published layout",
        "hrm-ray data import-npy data/sudoku-extreme-1k-aug-1000 out=data/sudoku-9x9",
    )
    p.add_argument("dir", help="folder with train/ and test/")
    p.add_argument("words", **key_value, help="out=DIR")
    p.set_defaults(options=OutOptions)

    p = _add(
        commands,
        "train",
        train,
        "train a model under Ray; the same command again resumes",
        "hrm-ray train experiment=quickstart\n"
        "hrm-ray train experiment=quickstart lr=1e-3 run_name=slower\n"
        "hrm-ray train experiment=quickstart arch=trm halting=q_learning run_name=trm\n"
        "hrm-ray train experiment=sudoku_extreme data=data/mine scaling.num_workers=2 max_steps=100\n"
        "hrm-ray train experiment=sudoku_extreme scaling.num_workers=[1,8] max_time_s=14400\n"
        "hrm-ray train experiment=quickstart scaling=local run_name=debug",
    )
    p.add_argument("words", **key_value, help="experiment=NAME and any key of the configuration")
    p = _add(
        commands,
        "tune",
        tune,
        "run a sweep: many trials of one configuration; the same command again continues",
        "hrm-ray tune quickstart_lr\n"
        "hrm-ray tune quickstart_lr --dry-run\n"
        "hrm-ray tune quickstart_lr storage=DIR run_name=s num_trials=6 max_steps=60\n"
        "hrm-ray tune my_sweep.yaml budget.wall_hours=8 max_concurrent=2\n"
        "hrm-ray tune status runs/quickstart_lr --json\n"
        "hrm-ray tune set runs/quickstart_lr num_trials=64\n"
        "hrm-ray tune stop runs/quickstart_lr [TRIAL ...]\n"
        "hrm-ray tune report runs/quickstart_lr\n"
        "hrm-ray tune promote runs/quickstart_lr seeds=3",
    )
    p.add_argument(
        "sweep", metavar="FILE|NAME|status|stop|set|report|promote", help="a YAML, or a name in tune_configs/"
    )
    p.add_argument(
        "words", nargs="*", metavar="key=value", help="keys of the sweep, and words of `train` for all trials"
    )
    p.add_argument("--dry-run", action="store_true", help="print what would be done, and what it would take")
    p.add_argument("--yes", action="store_true", help="begin though the estimate exceeds the budget")
    p.add_argument("--new-name", action="store_true", help="begin another sweep beside one of the same name")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p = _add(
        commands,
        "eval",
        evaluate,
        "measure a checkpoint on a dataset",
        "hrm-ray eval runs/quickstart data=data/sudoku-4x4\n"
        "hrm-ray eval runs/quickstart data=data/sudoku-4x4 halt=learned\n"
        "hrm-ray eval runs/quickstart data=data/sudoku-4x4 halt_max_steps=32 votes=9\n"
        "hrm-ray eval runs/quickstart data=data/sudoku-4x4 save_outputs=[logits,q_halt_logits] out=outputs.npz",
    )
    p.add_argument("checkpoint", help="checkpoint folder, or run folder (then its best)")
    p.add_argument(
        "words",
        **key_value,
        help="data=DIR [split=test] [num_examples=N] [batch_size=N] [halt=max|learned] [halt_max_steps=N] [votes=K] "
        "[save_outputs=[NAME,...] out=FILE.npz]",
    )
    p.set_defaults(options=EvalOptions)
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p = _add(
        commands,
        "solve",
        solve,
        "solve puzzles with a trained model",
        "hrm-ray solve runs/quickstart ...1.2....3.4...\n"
        "hrm-ray solve runs/quickstart puzzles.txt --json\n"
        "hrm-ray solve runs/quickstart puzzles.txt halt=learned votes=9\n"
        "hrm-ray solve runs/quickstart data=data/sudoku-4x4 index=7 count=3",
    )
    p.add_argument("checkpoint", help="checkpoint folder, or run folder (then its best)")
    p.add_argument(
        "words",
        nargs="*",
        metavar="PUZZLE",
        help="a puzzle, a file with one a line, or data=DIR [split=test] [index=0] [count=1]; "
        "[halt=max|learned] [halt_max_steps=N] [votes=K] [batch_size=N]",
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
    p.set_defaults(options=ImportOptions)
    p = _add(
        commands,
        "export-checkpoint",
        export_checkpoint,
        "write a checkpoint in the published layout",
        "hrm-ray export-checkpoint runs/quickstart out=published",
    )
    p.add_argument("checkpoint", help="checkpoint folder, or run folder (then its best)")
    p.add_argument("words", **key_value, help="out=DIR")
    p.set_defaults(options=OutOptions)
    _add(commands, "doctor", doctor, "show what this machine has and what will be used", "hrm-ray doctor")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        mistake = error if isinstance(error, UserError) else about_file(error)
        if mistake is None or os.environ.get(TRACEBACK):
            raise
        print(f"error: {mistake}", file=sys.stderr)
        return mistake.exit_code


if __name__ == "__main__":
    sys.exit(main())
