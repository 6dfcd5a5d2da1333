"""Run a sweep, and what may be asked of one."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from hrm_ray.cli.command import add
from hrm_ray.cli.train import interrupts_end_the_process
from hrm_ray.config.validate import Settings, read_words, validated
from hrm_ray.errors import UserError
from hrm_ray.jobs.copy import check_lasts

if TYPE_CHECKING:
    from hrm_ray.storage.storage import Storage


class PromoteOptions(Settings):
    """Of ``tune promote``, beside words of ``train``."""

    seeds: PositiveInt = 3


def tune(args: argparse.Namespace) -> int:
    if args.sweep not in VERBS:
        with interrupts_end_the_process():
            return _tune(args)
    run, flags, takes_words = VERBS[args.sweep]
    command = f"hrm-ray tune {args.sweep}"
    if not args.words:
        raise UserError(f"{command} needs the folder of a sweep, such as runs/sudoku_4x4_lr")
    if strange := [flag for flag in FLAGS if getattr(args, flag) and flag not in flags]:
        raise UserError(f"{command} does not know --{strange[0].replace('_', '-')}; leave it out")
    folder, *words = args.words
    if words and not takes_words:
        raise UserError(f"{command} takes the folder of one sweep; leave out '{words[0]}'")
    return run(args, folder, words) or 0


def _tune(args: argparse.Namespace) -> int:
    from hrm_ray.tuning.config import SETTABLE, load_sweep
    from hrm_ray.tuning.console import ConsoleView, ending
    from hrm_ray.tuning.sweep import new_name, run_sweep

    config = load_sweep(args.sweep, args.words)
    check_lasts("storage", config.storage)
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
    from hrm_ray.storage.storage import Storage

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

    if strange := [word for word in words if not word.isdecimal()]:
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


# What may be asked of a sweep: the function, the flags that it knows, and whether words may follow the folder.
VERBS: dict[str, tuple[Any, tuple[str, ...], bool]] = {
    "status": (tune_status, ("json",), False),
    "stop": (tune_stop, (), True),
    "set": (tune_set, (), True),
    "report": (tune_report, (), False),
    "promote": (tune_promote, ("json",), True),
}
FLAGS = ("dry_run", "yes", "new_name", "json")


def register(commands: Any) -> None:
    p = add(
        commands,
        "tune",
        tune,
        "run a sweep: many trials of one configuration; the same command again continues",
        "hrm-ray tune sudoku_4x4_lr\n"
        "hrm-ray tune sudoku_4x4_lr --dry-run\n"
        "hrm-ray tune sudoku_4x4_lr storage=DIR run_name=s num_trials=6 max_steps=60\n"
        "hrm-ray tune my_sweep.yaml budget.wall_hours=8 max_concurrent=2\n"
        "hrm-ray tune status runs/sudoku_4x4_lr --json\n"
        "hrm-ray tune set runs/sudoku_4x4_lr num_trials=64\n"
        "hrm-ray tune stop runs/sudoku_4x4_lr [TRIAL ...]\n"
        "hrm-ray tune report runs/sudoku_4x4_lr\n"
        "hrm-ray tune promote runs/sudoku_4x4_lr seeds=3",
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
