"""Measure a checkpoint."""

import argparse
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hrm_ray.cli.command import KEY_VALUE, add, options_of
from hrm_ray.cli.plot_file import check_kind, is_plot
from hrm_ray.config.inference import MOST_PATHS, Use
from hrm_ray.config.validate import PositiveInt
from hrm_ray.errors import UserError
from hrm_ray.jobs.copy import check_lasts

if TYPE_CHECKING:
    from hrm_ray.api import Solver
    from hrm_ray.evaluation.survey import Row


USE = (  # words of `eval` and `solve`
    "[halt=max|learned] [halt_threshold=P] [halt_max_steps=N] [votes=K] "
    "[paths=K noise=S init_std=S select=vote|q|residual|first_halt|valid seed=N]"
)


class EvalOptions(Use):
    """Of ``eval``; names in `save_outputs` are those of `hrm_ray.evaluation.evaluate.OUTPUTS`."""

    data: str
    """Data set, a folder or URI."""
    paths: tuple[Annotated[int, Field(gt=0, le=MOST_PATHS)], ...] = (1,)
    """Times that each copy is thought about, with noise of its own; of several numbers, a table."""
    depths: tuple[Annotated[int, Field(gt=0, le=10**6)], ...] = ()
    """Numbers of ACT steps; for a table."""
    split: str = "test"
    """Part of the data set."""
    num_examples: PositiveInt | None = None
    """Only the first so many; null: all."""
    batch_size: int = Field(default=256, gt=0, le=10**6)
    """Puzzles, or tries at them, at once."""
    ablate: Literal["puzzle_id"] | None = None
    """puzzle_id: the model is not told which puzzle it sees; what is then lost, it knew by heart."""
    save_outputs: tuple[str, ...] = ()
    """What of the model's answers to save."""
    out: str | None = None
    """The file for them, FILE.npz; or for the plot of a table, FILE.png, .svg or .pdf."""
    submission: str | None = None
    """Of ARC, the file for the two best answers to every test pair, FILE.json."""

    @field_validator("save_outputs", "paths", "depths", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, values: Any) -> Any:
        return [values] if isinstance(values, (str, int)) and not isinstance(values, bool) else values

    @field_validator("paths", "depths", mode="after")
    @classmethod
    def _in_order(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(numbers)))

    @property
    def is_table(self) -> bool:
        return bool(self.depths) or len(self.paths) > 1

    @property
    def inference(self) -> dict[str, Any]:
        """How the model is used."""
        return self.model_dump(include=set(Use.model_fields)) | {"paths": self.paths[-1]}

    @model_validator(mode="after")
    def _table_stands_alone(self) -> "EvalOptions":
        if not self.paths:
            raise ValueError("paths=[] is empty; give one number of paths or more")
        if self.is_table and (self.save_outputs or self.submission or self.ablate):
            raise ValueError(
                "save_outputs=, submission= and ablate= are not for a table of depths= or several paths="
            )
        if self.depths and self.halt_max_steps is not None:
            raise ValueError("depths= says how many ACT steps are taken; leave out halt_max_steps=")
        return self

    @model_validator(mode="after")
    def _outputs_go_somewhere(self) -> "EvalOptions":
        if self.is_table:
            if self.out is not None:
                check_kind(self.out)
        elif bool(self.save_outputs) != (self.out is not None):
            raise ValueError("save_outputs=[NAME,...] and out=FILE.npz go together")
        return self


def load_solver(checkpoint: str) -> "Solver":
    """The model of a command, whose process may keep its memory."""
    from hrm_ray import memory
    from hrm_ray.api import load

    solver = load(checkpoint.removeprefix("checkpoint="))  # the published word for it
    if solver.setup.device.type == "cpu":
        memory.keep_memory()
    return solver


@contextmanager
def _opened(file: Path | None, key: str) -> Iterator[IO[bytes] | None]:
    """A file to be written at the end; opened now, so that a path that cannot be written is reported at once."""
    from hrm_ray.data.files import whole_file, writing

    if file is None:
        yield None
    else:
        with writing(file, f"pick another {key}"), whole_file(file) as opened:
            yield opened


def evaluate(args: argparse.Namespace) -> None:
    import numpy as np
    from tqdm import tqdm

    from hrm_ray.data.files import check_replaceable
    from hrm_ray.data.shards import open_dataset
    from hrm_ray.evaluation.pass_at_k import notes
    from hrm_ray.evaluation.scores import Score
    from hrm_ray.evaluation.scores.arc import PassAtK
    from hrm_ray.evaluation.submission import is_submission, submission
    from hrm_ray.evaluation.survey import as_text

    if args.checkpoint.partition("=")[0] in EvalOptions.model_fields:  # the words are in another order
        checkpoints = [word for word in args.words if word.startswith("checkpoint=")]
        if not checkpoints:
            raise UserError(f"eval needs a checkpoint before {args.checkpoint}; give the folder of a run")
        args.words = [args.checkpoint, *(word for word in args.words if word not in checkpoints)]
        args.checkpoint = checkpoints[0]
    options: EvalOptions = options_of(args)
    out = Path(options.out) if options.out else None
    if out:
        check_lasts("out", str(out))
        what, is_one = ("plot", is_plot) if options.is_table else ("file of arrays", zipfile.is_zipfile)
        check_replaceable(out, "out", what, is_one)
    dataset = open_dataset(options.data)
    submitted = Path(options.submission) if options.submission else None
    if submitted:
        check_lasts("submission", str(submitted))
        check_replaceable(submitted, "submission", "submission", is_submission)
        if options.split != "test" or dataset.task.name != "arc" or not PassAtK.reported(dataset):
            raise UserError(
                "submission= is for the test split of an ARC data set that has test tasks; leave it out"
            )
    total = dataset.split(options.split).num_examples
    solver = load_solver(args.checkpoint)
    bar = tqdm(total=min(total, options.num_examples or total), unit="puzzle", disable=args.json)
    scores: list[Score] = []
    with bar, _opened(out, "out") as file, _opened(submitted, "submission") as submission_file:
        if options.is_table:
            rows = _table(solver, options, bar.update, file)
            bar.close()
            print(json.dumps({"table": rows}) if args.json else as_text(rows))
            return
        metrics, arrays = solver.evaluate(
            options.data,
            split=options.split,
            num_examples=options.num_examples,
            batch_size=options.batch_size,
            hides_identifiers=options.ablate == "puzzle_id",
            save_outputs=options.save_outputs,
            on_batch=bar.update,
            on_scores=scores.extend,
            **options.inference,
        )
        if file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        said: list[str] = []
        for score in scores:
            if submission_file and isinstance(score, PassAtK) and score.held_out:
                submission_file.write(json.dumps(submission(score.votes, score.held_out)).encode())
                said = notes(score.votes, score.held_out)
    named = {f"eval/{name}": value for name, value in metrics.items()}
    if args.json:
        print(json.dumps(named))
    else:
        for name, value in named.items():
            print(f"{name:28} {value:.4f}")
    for note in said:
        print(f"note: {note}", file=sys.stderr)


def _table(
    solver: "Solver", options: EvalOptions, on_batch: Callable[[int], object], file: IO[bytes] | None
) -> "list[Row]":
    """Measured at all depths and numbers of paths, and drawn into `file` if there is one."""
    from hrm_ray.evaluation.survey import draw
    from hrm_ray.figures import DPI

    rows = solver.survey(
        options.data,
        depths=options.depths,
        split=options.split,
        num_examples=options.num_examples,
        batch_size=options.batch_size,
        on_batch=on_batch,
        **options.inference | {"paths": options.paths},
    )
    if file:
        kind = Path(str(options.out)).suffix[1:]
        draw(rows, options.select, solver.model.halt_max_steps).savefig(file, format=kind, dpi=DPI)
    return rows


def register(commands: Any) -> None:
    p = add(
        commands,
        "eval",
        evaluate,
        "measure a checkpoint on a dataset",
        "hrm-ray eval runs/quickstart data=data/sudoku-easy\n"
        "hrm-ray eval runs/quickstart data=data/sudoku-easy halt=learned halt_threshold=0.9\n"
        "hrm-ray eval runs/quickstart data=data/sudoku-easy halt_max_steps=32 votes=9\n"
        "hrm-ray eval runs/quickstart data=data/sudoku-easy paths=16 noise=0.3 select=q\n"
        "hrm-ray eval runs/quickstart data=data/sudoku-easy noise=0.3 depths=[1,2,4,8,16] paths=[1,4,16] out=plot.png\n"
        "hrm-ray eval runs/quickstart data=data/sudoku-easy save_outputs=[logits,q_halt_logits] out=outputs.npz\n"
        "hrm-ray eval runs/arc data=data/arc submission=submission.json",
    )
    p.add_argument("checkpoint", help="checkpoint folder, or run folder (then its best)")
    p.add_argument(
        "words",
        **KEY_VALUE,
        help=f"data=DIR [split=test] [num_examples=N] [batch_size=N] {USE} [depths=[N,...] paths=[K,...] out=FILE.png] "
        "[ablate=puzzle_id] [save_outputs=[NAME,...] out=FILE.npz] [submission=FILE.json]",
    )
    p.set_defaults(options=EvalOptions)
    p.add_argument("--json", action="store_true", help="print one JSON object")
