"""What a training has to do, counted from its configuration and its model; nothing here is of a machine."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hrm_ray.config.arch import ArchConfig
from hrm_ray.config.halting import HaltingConfig
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.recipe import RowRecipe, load_recipe, recipe_names
from hrm_ray.data.shards import open_dataset
from hrm_ray.data.tasks.base import Task
from hrm_ray.errors import UserError
from hrm_ray.halting.base import Moment
from hrm_ray.machine import Setup
from hrm_ray.models.act import Batch
from hrm_ray.models.registry import DataShape, build_model
from hrm_ray.models.winner import along
from hrm_ray.training.plan import Plan
from hrm_ray.training.step import LossModule, slot_keys

FLOAT32 = 4  # bytes; of weights, gradients and moments
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes of gradients that DDP reduces at once
OTHER_MESSAGES = (
    2  # all-reduces of a step beside gradients: which parameters were used, and what the workers agree on
)
SUDOKU_EXTREME_TEST = 422_786  # puzzles in the test file of sapientinc/sudoku-extreme


@dataclass(frozen=True)
class Puzzles:
    """What must be known of a data set.

    Attributes:
        source: where this comes from, for people.
        examples_per_epoch: one puzzle of every group, on average.
        num_test: 0 if there is no test split.
        task: None if it does not matter.
    """

    source: str
    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int
    examples_per_epoch: float
    num_test: int
    task: Task | None = field(default=None, compare=False)

    def coordinates(self) -> np.ndarray | None:
        """Where the cells lie, see `Task.coordinates`."""
        return self.task.coordinates() if self.task else None

    def answer_cells(self) -> int | None:
        """The last so many cells have all labels."""
        return self.task.answer_cells if self.task else None


def puzzles_of(data_path: str) -> Puzzles:
    """Of the data set at `data_path`; if it is not there, of the recipe of its name (data/sudoku-9x9: sudoku_9x9).

    Raises:
        UserError: neither is there, or the data set is damaged.
    """
    recipe = Path(data_path).name.replace("-", "_")
    is_uri = "://" in data_path
    if not is_uri and not Path(data_path).exists() and recipe in recipe_names():
        return _of_recipe(recipe)
    dataset = open_dataset(data_path)
    manifest, train, test = dataset.manifest, dataset.split("train"), dataset.splits.get("test")
    return Puzzles(
        f"data set {data_path}",
        manifest.vocab_size,
        manifest.seq_len,
        manifest.num_puzzle_identifiers,
        train.num_groups * train.info.mean_puzzle_examples,
        test.num_examples if test else 0,
        dataset.task,
    )


def _of_recipe(name: str) -> Puzzles:
    recipe = load_recipe(name, {"source": "sapientinc/sudoku-extreme"} if "9x9" in name else {})
    task = recipe.make_task()
    num_train = (recipe.num_train or recipe.subsample_size) if isinstance(recipe, RowRecipe) else None
    if task is None or num_train is None:
        raise UserError(f"recipe {name} does not say how many puzzles it gives; build its data set first")
    assert isinstance(recipe, RowRecipe)
    num_test = SUDOKU_EXTREME_TEST if recipe.num_test is None else recipe.num_test
    return Puzzles(f"recipe {name}", task.vocab_size, task.seq_len, 1, num_train, num_test, task)


@dataclass(frozen=True)
class Pass:
    """Products of one ACT step of one batch: operations a puzzle, and how many products are launched."""

    flops: float
    products: int


class _Products(TorchDispatchMode):
    """Counts what is multiplied inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
            self.products += 1
        return out


@dataclass(frozen=True)
class Model:
    """A model, counted: what a puzzle costs in an ACT step of training and of evaluation."""

    num_params: int
    training: Pass
    evaluation: Pass

    @classmethod
    def of(
        cls, arch: ArchConfig, data: DataShape, halting: HaltingConfig | None = None, num_paths: int = 1
    ) -> "Model":
        """Take a step of each kind on torch's meta device, which computes shapes only."""
        setup = Setup(torch.device("meta"), torch.float32, "matmul", "reference")
        model = build_model(arch, data, setup, halting)
        B = 2  # not one, of which a product may become another operation
        with torch.device("meta"):
            tokens = torch.zeros(B, data.seq_len, dtype=torch.int64)
            ids = torch.zeros(B, dtype=torch.int32)
        batch = Batch(tokens.int(), tokens, ids)
        moment = Moment(0, 1, 1, 1, num_slots=B, slots=slice(B), device=setup.device)
        control = model.halting.control(moment)._replace(keys=slot_keys(moment))
        carry = model.initial_carry(batch)
        with _Products() as trained:
            losses = LossModule(model, arch.loss, num_paths)
            losses(along(carry, num_paths) if num_paths > 1 else carry, batch, control, None)[0].backward()
        with torch.no_grad(), _Products() as evaluated:
            model.eval()(carry, batch)
        return cls(
            sum(p.numel() for p in model.parameters()),
            Pass(trained.flops / B, trained.products),
            Pass(evaluated.flops / B, evaluated.products),
        )


@dataclass(frozen=True)
class Work:
    """A whole training: what is computed, sent and saved, whatever does it."""

    config: TrainConfig
    puzzles: Puzzles
    model: Model
    last_step: int
    num_evaluations: int

    @classmethod
    def of(cls, config: TrainConfig, puzzles: Puzzles) -> "Work":
        """Raises UserError: a duration is longer than the run."""
        info = SimpleNamespace(mean_puzzle_examples=puzzles.examples_per_epoch)
        split: Any = SimpleNamespace(num_groups=1, info=info)
        plan = Plan.of(config, split)
        return cls(
            config,
            puzzles,
            Model.of(config.arch, puzzles, config.halting, config.paths.train),
            plan.last_step,
            plan.num_evaluations(plan.last_step - 1) + 1 if puzzles.num_test else 0,
        )

    def num_steps(self, batch_size: int) -> int:
        """Optimizer steps of as many puzzles, `batch_size` of them in each."""
        return max(1, self.last_step * self.config.global_batch_size // batch_size)

    @property
    def num_evaluated(self) -> int:
        """Puzzles of an evaluation; with `eval_train` also one of every group in training."""
        splits = [self.puzzles.num_test]
        if self.config.eval_train:
            splits.append(math.ceil(self.puzzles.examples_per_epoch))
        return sum(min(num, self.config.num_eval_examples or num) for num in splits)

    @property
    def gradient_bytes(self) -> int:
        """Of all weights, which the workers add up in every step."""
        return FLOAT32 * self.model.num_params

    def embedding_bytes(self, batch_size: int) -> int:
        """Of the puzzle embedding: a row and its number for each puzzle, which every worker gets in every step."""
        ndim = self.config.arch.puzzle_emb_ndim
        return FLOAT32 * (ndim + 1) * batch_size * self.config.supervision_steps if ndim else 0

    @property
    def num_messages(self) -> int:
        """All-reduces of a step; the rows of the puzzle embedding and their numbers, gathered, count as one."""
        buckets = 1 + math.ceil(max(0, self.gradient_bytes - FIRST_BUCKET) / BUCKET)
        return buckets + OTHER_MESSAGES + bool(self.config.arch.puzzle_emb_ndim)

    def checkpoint_bytes(self, local_batch_size: int) -> int:
        """What the first worker writes: weights, two moments, their average if kept, the hidden states of its slots."""
        arch = self.config.arch
        hidden = (1 + self.config.paths.train) * arch.num_tokens(self.puzzles.seq_len) * arch.hidden_size
        copies = 3 + self.config.ema
        return FLOAT32 * (copies * self.model.num_params + hidden * local_batch_size)
