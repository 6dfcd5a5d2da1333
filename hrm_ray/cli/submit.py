"""Run a command on a cluster."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrm_ray.cli.command import add
from hrm_ray.errors import UserError, shown

if TYPE_CHECKING:
    from hrm_ray.jobs.submit import Jobs


def submit(args: argparse.Namespace) -> int:
    from hrm_ray.jobs.submit import COMMANDS, Jobs, Submission

    if args.follow and args.stop:
        raise UserError("--follow and --stop do not go together; --stop waits for the end by itself")
    if args.stop or args.follow:
        jobs = Jobs(args.address)
        if args.stop:
            jobs.stop(args.stop)
            print(f"job {args.stop} has ended", file=sys.stderr)
            return 0
        return _follow(jobs, args.follow)
    words = args.command_words[1:] if args.command_words[:1] == ["hrm-ray"] else args.command_words
    if not words or words[0] not in COMMANDS:
        raise UserError(
            "give a command behind --, such as: hrm-ray submit -- train experiment=quickstart storage=URI (or "
            f"{', '.join(COMMANDS[1:])})"
        )
    if not args.working_dir.is_dir():
        raise UserError(f"--working-dir {args.working_dir}: no such folder")
    submission = Submission(words, args.working_dir, dict(map(_variable, args.env)), args.pip, args.name)
    jobs = Jobs(args.address)
    name = jobs.submit(submission)
    print(f"job {name} on {jobs.address}", file=sys.stderr)
    if args.detach:
        print(_how_to_go_on(jobs, name), file=sys.stderr)
        return 0
    return _follow(jobs, name)


def _follow(jobs: "Jobs", name: str) -> int:
    try:
        return jobs.follow(name)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; {_how_to_go_on(jobs, name)}", file=sys.stderr)
        return 130


def _how_to_go_on(jobs: "Jobs", name: str) -> str:
    command = f"hrm-ray submit --address {jobs.address}"
    return f"follow it with: {command} --follow {name}, stop it with: {command} --stop {name}"


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--env {shown(text)} is not of the form NAME=VALUE")
    return name, value


def register(commands: Any) -> None:
    p = add(
        commands,
        "submit",
        submit,
        "run a command as a job of a Ray cluster",
        "hrm-ray submit --address http://127.0.0.1:8265 -- train experiment=quickstart data=s3://B/data storage=s3://B/runs\n"
        "hrm-ray submit --detach -- tune sudoku_4x4_lr storage=s3://B/sweeps\n"
        "hrm-ray submit --follow raysubmit_abc123\n"
        "hrm-ray submit --stop raysubmit_abc123",
    )
    p.add_argument(
        "--address", help="of the cluster's dashboard (RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)"
    )
    p.add_argument("--detach", action="store_true", help="return when the job is submitted")
    p.add_argument("--follow", metavar="JOB", help="show what a job prints, until it ends")
    p.add_argument("--stop", metavar="JOB", help="end a job, with a checkpoint; submitted again it continues")
    p.add_argument("--name", metavar="JOB", help="of the new job; else Ray makes one")
    p.add_argument(
        "--working-dir", type=Path, default=Path(), metavar="DIR", help="copied to the cluster (this folder)"
    )
    p.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="for the job; may be repeated"
    )
    p.add_argument("--pip", type=Path, metavar="FILE", help="requirements to install for the job")
    p.add_argument(
        "command_words", nargs="*", metavar="-- COMMAND ...", help="any other command, with its words"
    )
