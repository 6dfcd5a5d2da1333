"""Measure a checkpoint."""

import argparse
import json
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from hrm_ray.cli.command import KEY_VALUE, add, options_of
from hrm_ray.config.inference import Inference
from hrm_ray.config.validate import PositiveInt
from hrm_ray.errors import UserError
from hrm_ray.jobs.copy import check_lasts

if TYPE_CHECKING:
    from hrm_ray.api import Solver


class EvalOptions(Inference):
    """Of ``eval``; names in `save_outputs` are those of `hrm_ray.evaluation.evaluate.OUTPUTS`."""

    data: str
    """Data set, a folder or URI."""
    split: str = "test"
    """Part of the data set."""
    num_examples: PositiveInt | None = None
    """Only the first so many; null: all."""
    batch_size: int = Field(default=256, gt=0, le=10**6)
    """Puzzles at once."""
    ablate: Literal["puzzle_id"] | None = None
    """puzzle_id: the model is not told which puzzle it sees; what is then lost, it knew by heart."""
    save_outputs: tuple[str, ...] = ()
    """What of the model's answers to save."""
    out: str | None = None
    """The file for them, FILE.npz."""

    @field_validator("save_outputs", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names

    @model_validator(mode="after")
    def _outputs_go_somewhere(self) -> "EvalOptions":
        if bool(self.save_outputs) != (self.out is not None):
            raise ValueError("save_outputs=[NAME,...] and out=FILE.npz go together")
        return self


def inference_of(options: Inference) -> dict[str, Any]:
    """The part of `options` that says how the model is used."""
    return {key: getattr(options, key) for key in Inference.model_fields}


def load_solver(checkpoint: str) -> "Solver":
    """The model of a command, whose process may keep its memory."""
    from hrm_ray import memory
    from hrm_ray.api import load

    solver = load(checkpoint.removeprefix("checkpoint="))  # the published word for it
    if solver.setup.device.type == "cpu":
        memory.keep_memory()
    return solver


def evaluate(args: argparse.Namespace) -> None:
    import numpy as np
    from tqdm import tqdm

    from hrm_ray.data.files import check_replaceable, whole_file, writing
    from hrm_ray.data.shards import open_dataset

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
        check_replaceable(out, "out", "file of arrays", zipfile.is_zipfile)
    total = open_dataset(options.data).split(options.split).num_examples
    solver = load_solver(args.checkpoint)
    bar = tqdm(total=min(total, options.num_examples or total), unit="puzzle", disable=args.json)
    # Opened before the evaluation, so that a path that cannot be written is reported at once.
    with bar, writing(out) if out else nullcontext(), whole_file(out) if out else nullcontext() as file:
        metrics, arrays = solver.evaluate(
            options.data,
            split=options.split,
            num_examples=options.num_examples,
            batch_size=options.batch_size,
            hides_identifiers=options.ablate == "puzzle_id",
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


def register(commands: Any) -> None:
    p = add(
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
        **KEY_VALUE,
        help="data=DIR [split=test] [num_examples=N] [batch_size=N] [halt=max|learned] [halt_max_steps=N] [votes=K] "
        "[ablate=puzzle_id] [save_outputs=[NAME,...] out=FILE.npz]",
    )
    p.set_defaults(options=EvalOptions)
    p.add_argument("--json", action="store_true", help="print one JSON object")
