"""Solve puzzles."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, PositiveInt, model_validator

from hrm_ray.cli.command import add
from hrm_ray.cli.evaluate import USE, load_solver
from hrm_ray.cli.streams import in_colour
from hrm_ray.config.inference import Inference
from hrm_ray.config.validate import read_words, validated
from hrm_ray.data.containers import is_file
from hrm_ray.data.drawing import draw
from hrm_ray.data.puzzle_files import PuzzleFile
from hrm_ray.errors import UserError, shown

if TYPE_CHECKING:
    from hrm_ray.api import Puzzle, Solver

_KEY_VALUE = re.compile(r"[A-Za-z_][\w.]*=")  # not a puzzle with = for its blanks


class SolveOptions(Inference):
    """Of ``solve``; `data` and what follows, in place of puzzles: which examples of a dataset."""

    data: str | None = None
    split: str = "test"
    index: NonNegativeInt = 0
    count: PositiveInt = 1
    batch_size: PositiveInt = 256

    @model_validator(mode="after")
    def _examples_are_of_a_data_set(self) -> "SolveOptions":
        if self.data is None:
            for key in ("split", "index", "count"):
                if key in self.model_fields_set:
                    raise ValueError(f"{key}= is for data=DIR; leave it out")
        return self


def solve(args: argparse.Namespace) -> None:
    solver = load_solver(args.checkpoint)
    named = [word for word in args.words if _KEY_VALUE.match(word) and not _is_file(word)]
    options = validated(SolveOptions, read_words(named, SolveOptions), args.title)
    puzzles = _read_puzzles(solver, [word for word in args.words if word not in named], options)
    use = options.model_dump(include=set(Inference.model_fields))
    solutions = solver.solve(puzzles, batch_size=options.batch_size, **use)
    if args.json:
        for s in solutions:
            row = {"puzzle": s.puzzle, "answer": s.answer, "confidence": s.confidence, "steps": s.num_steps}
            print(json.dumps(row | {"valid": s.is_valid}))
        return
    for puzzle, s in zip(puzzles, solutions, strict=True):
        verdict = {True: "valid", False: "NOT valid", None: "cannot be checked"}[s.is_valid]
        if s.tokens is None:
            print(f"none of {options.num_tries} tries is valid, so no answer is given: {s.puzzle}\n")
            continue
        print(draw(solver.task, s.tokens, puzzle.tokens, in_colour=in_colour()))
        print(f"{verdict}, confidence {s.confidence:.1%}: {s.answer}\n")
    if len(solutions) > 1 and solver.task.checkable:
        print(f"{sum(bool(s.is_valid) for s in solutions)} of {len(solutions)} valid")


def _read_puzzles(solver: "Solver", words: Sequence[str], options: SolveOptions) -> list["Puzzle"]:
    """The puzzles that are meant: one puzzle, a file of them, or examples of a dataset. A file's name is the file."""
    if options.data is not None and not words:
        return solver.questions(options.data, split=options.split, index=options.index, count=options.count)
    if len(words) != 1 or options.data is not None:
        raise UserError("give one puzzle (in quotes, if it has spaces), one file, or data=DIR")
    word = words[0]
    if not _is_file(word):
        return [_read_puzzle(solver, word, f"'{shown(word)}' is no file and no puzzle to solve")]
    file = PuzzleFile(Path(word), solver.task)
    puzzles = [_read_puzzle(solver, text, f"{file.path}:{place}") for place, text in file.questions()]
    if not puzzles:
        raise UserError(f"{file.path} holds no puzzle")
    return puzzles


def _is_file(word: str) -> bool:
    try:
        return is_file(Path(word))
    except (OSError, ValueError):  # too long, or a NUL: no name of a file
        return False


def _read_puzzle(solver: "Solver", text: str, where: str) -> "Puzzle":
    from hrm_ray.api import Puzzle

    question = solver.parse(text, where)
    if solver.task.num_solutions(question) == 2:
        puzzle = solver.task.to_text(question)
        print(f"note: '{puzzle}' has several solutions; any of them counts as valid", file=sys.stderr)
    return Puzzle(question, solver.task.blank_identifier_id)


PUZZLE = (
    "21784...5.....1.2........8...6.152..374....5.1.2793.6.5.9.64..76...7..4...35.861."  # one of its data
)


def register(commands: Any) -> None:
    p = add(
        commands,
        "solve",
        solve,
        "solve puzzles with a trained model",
        f"hrm-ray solve runs/quickstart {PUZZLE}\n"
        "hrm-ray solve runs/quickstart puzzles.txt --json\n"
        "hrm-ray solve runs/quickstart puzzles.txt halt=learned votes=9\n"
        "hrm-ray solve runs/quickstart puzzles.txt paths=8 noise=0.5 select=valid\n"
        "hrm-ray solve runs/quickstart data=data/sudoku-easy index=7 count=3",
    )
    p.add_argument("checkpoint", help="checkpoint folder, or run folder (then its best)")
    p.add_argument(
        "words",
        nargs="*",
        metavar="PUZZLE",
        help="a puzzle, a file of puzzles, or data=DIR [split=test] [index=0] [count=1]; "
        f"{USE} [batch_size=N]",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object a puzzle")
