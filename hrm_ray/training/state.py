"""Everything a run is at one moment, and how it is saved and restored.

What always holds: `snapshot` then `restore` on the same number of workers continues bit for bit; on another number,
the slots of all workers are joined and divided again, so the global batches go on unchanged. There are no
random states to save: every draw is a function of (seed, global step).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim

from hrm_ray import machine
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data import format as data_format
from hrm_ray.data.format import IDENTIFIERS
from hrm_ray.data.shards import Dataset
from hrm_ray.errors import UserError
from hrm_ray.halting.base import Learner
from hrm_ray.machine import Setup
from hrm_ray.models.act import ACT, Batch, Carry
from hrm_ray.models.recursive import State
from hrm_ray.models.registry import build_model
from hrm_ray.models.winner import along
from hrm_ray.training.checkpoint import (
    EMA_FILE,
    MODEL_FILE,
    Checkpoint,
    DatasetInfo,
    Manifest,
    Tensors,
    carry_name,
)
from hrm_ray.training.saver import Snapshot
from hrm_ray.training.shadow import Shadow
from hrm_ray.world import World

REPLAY = "replay."  # before the names of a learner's tensors by slot, which lie beside the carry's
TARGET_FILE = "target.safetensors"  # a learner's other tensors
STEP = "step"  # the optimizer's count of steps, which stays on the CPU
PER_PUZZLE = {"puzzle_emb.weights"}  # tensors whose size follows from the data set


@dataclass
class TrainState:
    """The parts; `averages` maps parameter names to their moving averages, empty without EMA.

    `touched` bool [N] marks the rows of the puzzle embedding that have moved since the last `take_touched`, and
    `shadow` is what snapshots have of it; None if there is no such embedding.
    """

    model: ACT
    optimizer: optim.Optimizer
    averages: Tensors
    carry: Carry | None  # None: of a new run, until `begin`
    global_step: int
    train_s: float  # seconds trained so far, over all attempts
    learner: Learner | None = None  # if the way of halting has one, from `begin` on
    skipped_steps: frozenset[int] = frozenset()  # steps that are left out, after a loss that was not finite
    num_rollbacks: int = 0
    touched: Tensor | None = None
    shadow: Shadow | None = None

    @classmethod
    def initial(cls, config: TrainConfig, dataset: Dataset, setup: Setup) -> "TrainState":
        """A new run; the weights are a function of (config, seed)."""
        torch.manual_seed(config.seed)
        model = build_model(config.arch, dataset_info(dataset), setup, config.halting)
        optimizer = config.optimizer.build(dict(model.named_parameters()), config, setup.optimizer_backend)
        averages = {n: p.detach().clone() for n, p in model.inner.named_parameters()} if config.ema else {}
        touched, shadow = None, None
        if config.arch.puzzle_emb_ndim:
            table = model.inner.puzzle_emb.weights
            touched = torch.zeros(len(table), dtype=torch.bool, device=table.device)
            shadow = Shadow(table)
        return cls(model, optimizer, averages, None, 0, 0.0, touched=touched, shadow=shadow)

    def take_touched(self) -> list[Tensor]:
        """The weights, of the puzzle embedding only the rows that have moved since the last call: with a million
        puzzles, all of them would be gigabytes."""
        weights = dict(self.model.inner.state_dict())
        if self.touched is not None and self.shadow is not None:
            (name,) = PER_PUZZLE
            weights[name] = weights[name][self.touched]
            self.shadow.stale |= self.touched
            self.touched.zero_()
        return list(weights.values())

    def begin(self, batch: Batch, num_paths: int) -> None:
        """Make the carry of the first step, whose puzzles are `batch`."""
        carry = self.model.initial_carry(batch)
        self.carry = along(carry, num_paths) if num_paths > 1 else carry
        self.learner = self.model.halting.learner(self.model.inner.q_head, len(batch.inputs))

    @torch.no_grad()
    def update_averages(self, rate: float) -> None:
        """Move the averages towards the weights; early steps count more, so that the start is forgotten."""
        if self.averages:
            rate = min(rate, (self.global_step + 1) / (self.global_step + 10))
            parameters = [p.detach() for p in self.model.inner.parameters()]
            torch._foreach_lerp_(list(self.averages.values()), parameters, 1 - rate)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, if the run keeps them."""
        parameters = dict(self.model.inner.named_parameters())
        own = {name: parameters[name].detach().clone() for name in self.averages}
        _assign(parameters, self.averages)
        try:
            yield
        finally:
            _assign(parameters, own)

    def snapshot(
        self, config: TrainConfig, dataset: Dataset, world: World, *, sums: Tensor, unreported_steps: int
    ) -> Snapshot:
        """A copy of the whole state, to be written as a checkpoint; the one before must have been.

        Args:
            sums: float64 [len(METRICS)], of this worker's metrics since the last report.
            unreported_steps: how many steps they are of.
        """
        assert self.carry is not None, "nothing to save before the first step"
        carry = _flatten_carry(self.carry) | {"sums": sums[None]}
        if self.learner is not None:
            carry |= {REPLAY + name: tensor for name, tensor in self.learner.by_slot().items()}
        files = {carry_name(world.rank, world.size): _copied(carry)}
        if world.is_first:
            files[MODEL_FILE] = self._copied_weights()
            files["optimizer.safetensors"] = _copied(self._optimizer_tensors())
            if self.averages:
                files[EMA_FILE] = _copied(self.averages)
            if self.learner is not None:
                files[TARGET_FILE] = _copied(self.learner.shared())
        manifest = Manifest(
            global_step=self.global_step,
            world_size=world.size,
            arch=config.arch,
            dataset=dataset_info(dataset),
            config=config.model_dump(mode="json"),
            train_s=self.train_s,
            unreported_steps=unreported_steps,
            skipped_steps=sorted(self.skipped_steps),
            num_rollbacks=self.num_rollbacks,
            files={},
        )
        return Snapshot(manifest, files)

    def _copied_weights(self) -> Tensors:
        """Of the puzzle embedding, only the rows that have moved since the last time are copied."""
        weights = dict(self.model.inner.state_dict())
        if self.touched is None or self.shadow is None:
            return _copied(weights)
        (name,) = PER_PUZZLE
        self.shadow.stale |= self.touched
        table = self.shadow.follow(weights.pop(name))
        return _copied(weights) | {name: table}

    def moments(self) -> list[Tensor]:
        """All that the optimizer remembers of the weights, but for how many steps it has taken."""
        states = self.optimizer.state.values()
        return [value for state in states for key, value in state.items() if key != STEP]

    def _optimizer_tensors(self) -> Tensors:
        return {
            f"{name}.{key}": value
            for name, parameter in self.model.inner.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }

    def restore(self, checkpoint: Checkpoint, world: World) -> Tensor:
        """Continue from `checkpoint`, which must fit (see `resume.check_fits`).

        Returns:
            this worker's share of the sums of metrics not yet reported.
        """
        device = next(self.model.parameters()).device
        self._load(checkpoint.tensors(MODEL_FILE))
        moments = checkpoint.tensors("optimizer.safetensors")
        for name, parameter in self.model.inner.named_parameters():
            # Nothing, if every step so far was left out.
            own = {
                key.rpartition(".")[2]: value
                for key, value in moments.items()
                if key.rpartition(".")[0] == name
            }
            state = {key: value if key == STEP else value.to(device) for key, value in own.items()}
            self.optimizer.state[parameter].update(state)
        if self.averages:
            averages = checkpoint.tensors(EMA_FILE)
            self.averages = {name: averages[name].to(device) for name in self.averages}
        share = _redistribute_carries(checkpoint, world)
        self.carry = _unflatten_carry(share, device, self.model.inner.dtype)
        self.learner = self.model.halting.learner(self.model.inner.q_head, len(self.carry.steps))
        if self.learner is not None:
            by_slot = {n.removeprefix(REPLAY): t for n, t in share.items() if n.startswith(REPLAY)}
            self.learner.restore(by_slot, checkpoint.tensors(TARGET_FILE))
        manifest = checkpoint.manifest
        self.global_step, self.train_s = manifest.global_step, manifest.train_s
        self.skipped_steps, self.num_rollbacks = frozenset(manifest.skipped_steps), manifest.num_rollbacks
        return share["sums"].sum(0)

    def _load(self, weights: Tensors) -> None:
        self.model.inner.load_state_dict(weights)
        if self.shadow is not None:
            self.shadow.stale.fill_(True)

    def load_weights(self, weights: Tensors) -> list[str]:
        """Take `weights` (of any checkpoint) as the start of a new run.

        Returns:
            the names of those left as they were: puzzle embeddings of another data set.

        Raises:
            UserError: they are of another architecture; names one that differs.
        """
        own = self.model.inner.state_dict()
        left = [
            name
            for name in PER_PUZZLE & own.keys() & weights.keys()
            if own[name].shape != weights[name].shape
        ]
        for name in sorted((own.keys() | weights.keys()) - set(left)):
            there, here = (tuple(t[name].shape) if name in t else "none" for t in (weights, own))
            if there != here:
                raise UserError(
                    f"weights do not fit: {name} is {there} there and {here} here; use the same arch"
                )
        self._load(weights | {name: own[name] for name in left})
        if self.averages:
            self.averages = {n: p.detach().clone() for n, p in self.model.inner.named_parameters()}
        return left


def check_weights_fit(checkpoint: Checkpoint, config: TrainConfig, dataset: Dataset) -> None:
    """Raise UserError if a new run of `config` cannot start from the weights of `checkpoint`."""
    there, here = checkpoint.manifest.dataset.seq_len, dataset.manifest.seq_len
    try:
        TrainState.initial(config, dataset, machine.resolve(device="cpu")).load_weights(checkpoint.weights())
    except UserError as error:
        if there == here:
            raise
        raise UserError(
            f"{checkpoint.folder} was trained on sequences of {there} tokens, this data set has {here}; arch.mlp_t and "
            "learned positions are bound to one length"
        ) from error


def identifiers_of(manifest: data_format.Manifest) -> str | None:
    """SHA-256 of the names of a data set's puzzle identifiers; None if they have none."""
    return next((file.sha256 for file in manifest.extra_files if file.file == IDENTIFIERS), None)


def dataset_info(dataset: Dataset) -> DatasetInfo:
    """What a checkpoint remembers of `dataset`."""
    manifest = dataset.manifest
    return DatasetInfo(
        task=manifest.task,
        task_options=manifest.task_options,
        vocab_size=manifest.vocab_size,
        seq_len=manifest.seq_len,
        num_puzzle_identifiers=manifest.num_puzzle_identifiers,
        fingerprint=dataset.fingerprint,
        identifiers=identifiers_of(manifest),
    )


@torch.no_grad()
def _assign(parameters: dict[str, nn.Parameter], values: Tensors) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def _flatten_carry(carry: Carry) -> Tensors:
    return {
        "z_H": carry.state.z_H,
        "z_L": carry.state.z_L,
        "steps": carry.steps,
        "halted": carry.halted,
        "inputs": carry.batch.inputs,
        "labels": carry.batch.labels,
        "puzzle_identifiers": carry.batch.puzzle_identifiers,
    }


def _unflatten_carry(tensors: Tensors, device: torch.device, dtype: torch.dtype) -> Carry:
    t = {name: tensor.to(device) for name, tensor in tensors.items() if not name.startswith(REPLAY)}
    return Carry(
        State(t["z_H"].to(dtype), t["z_L"].to(dtype)),  # a run may go on in another precision
        t["steps"],
        t["halted"],
        Batch(t["inputs"], t["labels"], t["puzzle_identifiers"]),
    )


def _redistribute_carries(checkpoint: Checkpoint, world: World) -> Tensors:
    """This worker's share of the carries: the rows of all saved workers joined, and divided again."""
    saved = checkpoint.manifest.world_size
    if saved == world.size:
        return checkpoint.tensors(carry_name(world.rank, saved))
    parts = [checkpoint.tensors(carry_name(rank, saved)) for rank in range(saved)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: tensor[world.slots(len(tensor))] for name, tensor in whole.items()}


def _copied(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
