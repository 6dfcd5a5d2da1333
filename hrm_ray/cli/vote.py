"""Votes over saved outputs of ARC tasks."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hrm_ray.cli.command import add
from hrm_ray.config.validate import Settings, read_words, validated
from hrm_ray.data.containers import is_file
from hrm_ray.errors import UserError
from hrm_ray.jobs.copy import check_lasts


class VoteOptions(Settings):
    """Of ``vote``."""

    data: str
    """Data set, a folder or URI, with identifiers.json and test_puzzles.json."""
    submission: str | None = None
    """The file for the two best answers to every test pair, FILE.json."""


def vote(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from hrm_ray.data.files import check_replaceable
    from hrm_ray.evaluation.held_out import read_held_out
    from hrm_ray.evaluation.pass_at_k import notes, pass_at_k
    from hrm_ray.evaluation.saved_outputs import SavedOutputs, count_votes
    from hrm_ray.evaluation.submission import is_submission, submission, write_submission

    named = [word for word in args.words if "=" in word and not _is_file(word)]
    files = [word for word in args.words if word not in named]
    options = validated(VoteOptions, read_words(named, VoteOptions), args.title)
    out = None if options.submission is None else Path(options.submission)
    if not files:
        raise UserError(
            "vote needs a file of saved outputs, FILE.npz; 'hrm-ray vote --help' shows how it is used"
        )
    if out:
        check_lasts("submission", str(out))
        check_replaceable(out, "submission", "submission", is_submission)
    held_out = read_held_out(options.data)
    outputs = [SavedOutputs(file) for file in files]
    num_rows = sum(saved.num_rows for saved in outputs)
    with tqdm(total=num_rows, unit="row", disable=args.json, delay=1) as bar:
        votes = count_votes(outputs, held_out, bar.update)
    if out:
        write_submission(out, submission(votes, held_out))
    named_metrics = {f"eval/{name}": value for name, value in pass_at_k(votes, held_out).items()}
    if args.json:
        print(json.dumps(named_metrics))
    else:
        for name, value in named_metrics.items():
            print(f"{name:28} {value:.4f}")
    for note in notes(votes, held_out):
        print(f"note: {note}", file=sys.stderr)


def _is_file(word: str) -> bool:
    try:
        return is_file(Path(word))
    except (OSError, ValueError):  # too long: no name of a file
        return False


def register(commands: Any) -> None:
    p = add(
        commands,
        "vote",
        vote,
        "votes and pass@k of ARC tasks, from saved outputs",
        "hrm-ray eval runs/arc data=data/arc save_outputs=[inputs,predictions,puzzle_identifiers,q_halt_logits] "
        "out=outputs.npz\n"
        "hrm-ray vote outputs.npz data=data/arc\n"
        "hrm-ray vote step_1000.npz step_2000.npz data=data/arc submission=submission.json\n"
        "hrm-ray vote outputs.npz data=data/arc --json",
    )
    p.add_argument(
        "words",
        nargs="*",
        metavar="FILE",
        help="saved outputs, FILE.npz; of several checkpoints all vote together; data=DIR [submission=FILE.json]",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
