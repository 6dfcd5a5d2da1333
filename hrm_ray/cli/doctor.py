"""What this machine and a cluster have, and whether a training or a sweep fits."""

import argparse
import os
from typing import Any

from hrm_ray.cli.command import add
from hrm_ray.cli.train import interrupts_end_the_process


def doctor(args: argparse.Namespace) -> int | None:
    from hrm_ray.doctor import line, report

    address = args.address
    if address is not None and "://" in address:  # of a dashboard, which is asked by a job
        from hrm_ray.jobs.submit import Jobs, Submission

        jobs = Jobs(address)
        return jobs.follow(jobs.submit(Submission(["doctor", *args.words])))
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    is_asked = bool(args.words) or os.environ.get("RAY_ADDRESS") not in (None, "", "local")
    if is_asked:
        from hrm_ray.jobs.fits import cluster_rows, needs_of

        needs = needs_of(args.words)  # a mistake in the words is said first
    print(report())
    if is_asked:
        with interrupts_end_the_process():
            for row in cluster_rows(needs):
                print(line(*row), flush=True)
    return None


def register(commands: Any) -> None:
    p = add(
        commands,
        "doctor",
        doctor,
        "show what this machine and a cluster have, and what will be used",
        "hrm-ray doctor\n"
        "hrm-ray doctor experiment=quickstart scaling.num_workers=4\n"
        "hrm-ray doctor --address HOST:6379 sudoku_4x4_lr\n"
        "hrm-ray doctor --address http://127.0.0.1:8265 experiment=sudoku_extreme scaling.num_workers=8",
    )
    p.add_argument(
        "--address", help="of a cluster (RAY_ADDRESS), or of its dashboard, which is asked by a job"
    )
    p.add_argument(
        "words", nargs="*", metavar="WORD", help="those of train, or a sweep and its words: does it fit?"
    )
