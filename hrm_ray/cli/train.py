"""Train a model."""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hrm_ray.cli.command import KEY_VALUE, add
from hrm_ray.jobs.copy import check_lasts


@contextmanager
def interrupts_end_the_process() -> Iterator[None]:
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
    with interrupts_end_the_process():  # nothing has started yet that must be stopped cleanly
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    from hrm_ray.config.compose import train_config
    from hrm_ray.training import launch

    config = train_config(args.words, by_hand=True)
    check_lasts("storage", config.storage)
    run_at_hand = launch.Launch(config)
    print(run_at_hand.announce(), file=sys.stderr)
    summary, stopped_by = run_at_hand.train()
    if stopped_by is not None:
        print(f"stopped at step {summary['global_step']}; the same command continues", file=sys.stderr)
        return 128 + stopped_by
    if summary["stop_reason"] == "max_time_s" and config.max_time_s:
        step = summary["global_step"]
        print(
            f"the time limit max_time_s={config.max_time_s:g} is reached at step {step}; the same command continues",
            file=sys.stderr,
        )
    if summary["stop_reason"] == "early_stopping" and config.early_stopping:
        print(
            f"{config.early_stopping} evaluations without a better {config.best_metric}: the run ends early; "
            "early_stopping=null or a larger number continues it",
            file=sys.stderr,
        )
    if summary["stop_reason"] == "stop_at" and config.stop_at:
        print(
            f"{config.best_metric} is at least stop_at={config.stop_at:g} at step {summary['global_step']}: the run "
            "ends; stop_at=null continues it",
            file=sys.stderr,
        )
    final = summary["best"] or summary["final"]
    exact = final.get("eval/exact_accuracy")
    print(f"{run_at_hand.run}: step {summary['global_step']}, {summary['train_s']:.0f} s of training", end="")
    print(f", exact accuracy {exact:.1%}" if exact is not None else "")
    for text in summary.get("conclusions", ()):
        print(text)
    return 0


def register(commands: Any) -> None:
    p = add(
        commands,
        "train",
        train,
        "train a model under Ray; the same command again resumes",
        "hrm-ray train experiment=quickstart\n"
        "hrm-ray train experiment=quickstart lr=1e-3 run_name=slower\n"
        "hrm-ray train experiment=quickstart arch.hidden_size=64 run_name=narrow\n"
        "hrm-ray train experiment=sudoku_extreme data=data/mine scaling.num_workers=2 max_steps=100\n"
        "hrm-ray train experiment=sudoku_extreme scaling.num_workers=[1,8] max_time_s=14400\n"
        "hrm-ray train experiment=quickstart scaling=local run_name=debug",
    )
    p.add_argument("words", **KEY_VALUE, help="experiment=NAME and any key of the configuration")
