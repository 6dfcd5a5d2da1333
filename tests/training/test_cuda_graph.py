"""Recorded steps: the same as others, bit for bit; and what cannot be recorded, or not truly, is done without.

Without a GPU, what a CUDA graph keeps is emulated (see `recorder`); the streams and memory of a GPU are not.
"""

import itertools
import json
import math
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from hrm_ray import machine
from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError
from hrm_ray.models import layers
from hrm_ray.models.losses import METRICS
from hrm_ray.training import cuda_graph
from hrm_ray.training.checkpoint import finished
from hrm_ray.training.cuda_graph import GraphMemory, Recordings
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.training.meter import LossDiverged, Meter
from hrm_ray.training.step import Outcome, Stepper
from hrm_ray.world import World
from tests.toy import DECODER, EQR, TRM, toy_config, toy_dataset
from tests.training import recorder

cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
Q_LEARNING = {"name": "q_learning", "dqn_warmup_ratio": 0.2}
CHANGES = {
    "hrm": {"ema": True},
    "micro-batches": {"micro_batch_size": 3},  # of eight slots: 3, 3, 2
    "q_learning": {"arch": TRM, "halting": Q_LEARNING, "micro_batch_size": 5},
    "supervision": {"supervision_steps": 2, "forward_dtype": "bfloat16"},
    "last": {
        "arch": TRM,
        "halting": Q_LEARNING,
        "supervision_steps": 2,
        "supervised": "last",
        "micro_batch_size": 5,
    },
    "decoder": {"arch": DECODER, "weight_noise": 0.01},
    "eqr": {"arch": TRM | EQR, "paths": {"train": 2}, "micro_batch_size": 5},
}


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=cuda_only)])
def device(request, monkeypatch):
    """A GPU, or a CPU that is taken for one where steps are recorded."""
    if request.param == "emulated":
        monkeypatch.setattr(cuda_graph, "capture", recorder.capture)
        monkeypatch.setattr(layers, "_fused", lambda: None)  # as on a GPU
        resolve = machine.resolve
        monkeypatch.setattr(machine, "resolve", lambda cuda_graphs, **given: resolve(**given))
        return "cpu"
    return "cuda"


def trainer_of(folder, device, **values) -> TrainingLoop:
    values = {"compile": False} | values
    parsed = TrainConfig(**toy_config(folder / "data", folder / "runs", device=device, **values))
    return TrainingLoop(parsed, run_folder(parsed), World(), Hooks())


def events(trainer: TrainingLoop) -> dict[str, str]:
    lines = (trainer.run.local_path / "events.jsonl").read_text().splitlines()
    return {entry["event"]: entry["message"] for entry in map(json.loads, lines)}


def assert_ends_alike(device, run, other) -> None:
    """The same bits in the last checkpoint; a GPU's kernels may add up in any order."""
    ours, others = finished(run)[-1], finished(other)[-1]
    assert ours.manifest.global_step == others.manifest.global_step > 10
    assert ours.manifest.files.keys() == others.manifest.files.keys()
    for name in ours.manifest.files:
        tensors = others.tensors(name)
        for key, tensor in ours.tensors(name).items():
            near = torch.equal if device == "cpu" else partial(torch.allclose, rtol=1e-2, atol=1e-3)
            assert near(tensor, tensors[key]), f"{name} {key}"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_recorded_run_is_the_run(tmp_path, device, change):
    toy_dataset(tmp_path / "data", num_identifiers=5)
    runs = []
    for cuda_graphs in (False, True):
        trainer = trainer_of(tmp_path, device, run_name=str(cuda_graphs), cuda_graphs=cuda_graphs, **change)
        trainer.train()
        runs.append(trainer.run)
        assert ("recorded" in events(trainer)) == trainer.setup.cuda_graphs == cuda_graphs
    assert_ends_alike(device, *runs)


@cuda_only
def test_a_compiled_and_recorded_run_is_the_compiled_run(tmp_path):
    """And with more tokens a step than torch adds up in one pass in the embedding's gradient."""
    toy_dataset(tmp_path / "data", num_identifiers=5, num_train=512)
    runs = []
    for cuda_graphs in (False, True):
        values = {"run_name": str(cuda_graphs), "cuda_graphs": cuda_graphs, "compile": True}
        trainer = trainer_of(tmp_path, "cuda", global_batch_size=256, epochs=8, **values)
        trainer.train()
        runs.append(trainer.run)
        assert ("recorded" in events(trainer)) == cuda_graphs
    assert_ends_alike("cuda", *runs)


def test_a_recorded_run_goes_on_as_it_was(tmp_path, device):
    """Stopped and continued, and rolled back with steps left out; recorded again, nothing of the old is kept."""
    toy_dataset(tmp_path / "data", num_identifiers=5)
    values = {"checkpoint_interval": 5, "on_nonfinite": "rollback", "ema": True}
    whole = trainer_of(tmp_path, device, run_name="eager", **values)
    spoil(whole, at=13)
    whole.train()
    recorded = {"run_name": "recorded", "cuda_graphs": True, **values}
    trainer_of(tmp_path, device, **(recorded | {"max_steps": 8})).train()
    parts = trainer_of(tmp_path, device, **recorded)
    spoil(parts, at=13)
    old, begin, alive = weakref.ref(parts.state.model), parts._begin, []

    def begin_anew():
        alive.append(old())
        begin()

    parts._begin = begin_anew
    parts.train()
    assert alive == [None]
    assert parts.setup.cuda_graphs and parts.state.num_rollbacks == 1
    assert parts.state.skipped_steps == whole.state.skipped_steps != frozenset()
    assert_ends_alike(device, whole.run, parts.run)


def spoil(trainer: TrainingLoop, at: int) -> None:
    """Make the loss of step `at` infinite, once."""
    add, left = trainer._meter.add, [True]

    def add_infinity(outcome, step):
        if step == at and left:
            left.clear()
            outcome = replace(outcome, loss=outcome.loss * math.inf)
        add(outcome, step)

    trainer._meter.add = add_infinity


def test_steps_are_replayed(tmp_path, device):
    """Not run as usual, in silence: once recorded, Python sees no step any more."""
    toy_dataset(tmp_path / "data", num_identifiers=5)
    trainer = trainer_of(tmp_path, device, **CHANGES["q_learning"])
    trainer.stepper.record()
    seen = []
    trainer.state.model.register_forward_pre_hook(lambda module, args: seen.append(args))
    for step in range(1, trainer.plan.last_step + 1):  # into the warm-up and out of it
        trainer._step(step)
    assert seen == []
    trainer._close()


def test_recording_takes_no_step_and_leaves_nothing_behind(tmp_path, device):
    toy_dataset(tmp_path / "data", num_identifiers=5)
    trainer = trainer_of(tmp_path, device)
    before = {name: tensor.clone() for name, tensor in trainer.state.model.state_dict().items()}
    trainer.stepper.record()
    model = trainer.state.model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not parameter.grad.any() for parameter in model.parameters())
    assert model.inner.puzzle_emb._looked_up == []
    assert trainer.state.carry.halted.all()
    trainer._close()


def reads_a_value(learn):
    def reading(self, *args):
        learned = learn(self, *args)
        return learned._replace(loss=learned.loss * float(learned.loss.item() != 0))

    return reading


def counts_in_python(learn):
    counter = itertools.count(1)

    def counting(self, *args):
        learned = learn(self, *args)
        return learned._replace(loss=learned.loss * next(counter))

    return counting


@pytest.mark.parametrize(
    ("change", "said"),
    [(reads_a_value, "synchronizing"), (counts_in_python, "replayed, a step of 8 puzzles differs")],
)
def test_what_cannot_be_recorded_costs_one_warning(tmp_path, device, monkeypatch, change, said):
    toy_dataset(tmp_path / "data", num_identifiers=5)
    monkeypatch.setattr(Stepper, "_learn", change(Stepper._learn))
    trainer = trainer_of(tmp_path, device, cuda_graphs=True, max_steps=3)
    trainer.train()
    assert said in events(trainer)["not_recorded"]
    assert not trainer.setup.cuda_graphs
    assert trainer.state.global_step == 3
    assert all(parameter.grad is None for parameter in trainer.state.model.parameters())


@pytest.mark.parametrize("place", [*range(10), "all"])
def test_a_replay_of_old_arguments_is_refused(tmp_path, device, monkeypatch, place):
    """Any one of what a slot keeps and is offered (hidden states, steps, halted, two puzzles), or all of it."""
    toy_dataset(tmp_path / "data", num_identifiers=5)
    record, alive = Recordings.record, []

    def record_and_forget(self, function, *args):
        is_new = record(self, function, *args)
        for kind, (replay, places, results) in self._programs.items():
            alive.append(places)  # else a GPU's memory there may come to hold anything, such as what is right
            kept = [t.clone() if place in (i, "all") else t for i, t in enumerate(places)]
            self._programs[kind] = replay, kept, results
        return is_new

    monkeypatch.setattr(Recordings, "record", record_and_forget)
    trainer = trainer_of(tmp_path, device)
    with pytest.raises(RuntimeError, match="replayed, a step of 8 puzzles differs"):
        trainer.stepper.record()
    trainer._close()


def test_counting_waits_for_nothing():
    """What is summed between two reports; the steps themselves could not be recorded if they waited."""
    outcome = Outcome(torch.tensor(3.0), torch.ones(len(METRICS)), 8, 0.0)
    meter = Meter(torch.device("cpu"), slots_per_step=8, max_loss=1.0)
    with recorder.Recorder() as operations:
        meter.add(outcome, 5)
        meter.add(replace(outcome, loss=outcome.loss * math.inf), 6)
    assert operations.calls
    with pytest.raises(LossDiverged, match="step 6"):
        meter.check(World())


def test_a_weight_without_gradient_is_refused(tmp_path, device):
    """Eager, the optimizer leaves it alone; zeros as its gradient would let it decay."""
    toy_dataset(tmp_path / "data", num_identifiers=5)
    trainer = trainer_of(tmp_path, device)
    trainer.state.model.inner.unused = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match=r"inner\.unused has no gradient"):
        trainer.stepper.record()
    assert all(parameter.grad is None for parameter in trainer.state.model.inner.L_level.parameters())
    trainer._close()


class NoGpu:
    """Stands in for `torch.cuda`, and notes what is done; a recording in which something fails ends as torch's do."""

    def __init__(self):
        self.done, self.mode = [], "default"

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.done.append(name) or self

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode
        self.done.append(mode)

    @contextmanager
    def stream(self, stream):
        try:
            yield
        finally:
            self.done.append("left the stream")

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        try:
            yield
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture") from None


@pytest.mark.parametrize(("fails_at", "waits_for_gpu"), [(None, False), (2, True), (4, True)])
def test_a_failed_recording_says_why_and_leaves_nothing(monkeypatch, fails_at, waits_for_gpu):
    """At a call before the recording (the second) or in it (the fourth); on a GPU: the test before."""
    calls = itertools.count(1)
    gpu = NoGpu()
    monkeypatch.setattr(cuda_graph.torch, "cuda", gpu)

    def function():
        if next(calls) == fails_at:
            raise ValueError("what was wrong")
        return "results"

    if fails_at is None:
        replay, results = cuda_graph.capture(function, GraphMemory())
        assert results == "results" and callable(replay)
    else:
        with pytest.raises(ValueError, match="what was wrong"):
            cuda_graph.capture(function, GraphMemory())
    assert next(calls) == (fails_at or 4) + 1
    assert ("synchronize" in gpu.done) == waits_for_gpu
    assert "left the stream" in gpu.done
    assert gpu.mode == "default" and "error" in gpu.done


def test_only_what_is_alike_is_replayed(device):
    """Another shape, dtype, number or structure is another call; each is recorded once."""
    calls = []

    def function(x, number, pair):
        calls.append(x.shape)
        return x * number + (0 if pair is None else pair[0])

    recordings = Recordings()
    assert not recordings
    x = torch.arange(3.0, device=device)
    assert recordings.record(function, x, 2.0, None) and recordings.record(function, x, 3.0, (x, None))
    calls.clear()
    assert not recordings.record(function, x + 1, 2.0, None)
    first, second = recordings.replay(x + 1, 2.0, None), recordings.replay(x + 2, 2.0, None)
    third = recordings.replay(x, 3.0, (x + 1, None))
    assert calls == []
    assert torch.equal(first, (x + 1) * 2)  # also after later replays
    assert torch.equal(second, (x + 2) * 2)
    assert torch.equal(third, x * 3 + x + 1)
    for args in ((x, 4.0, None), (x, 2, None), (x[:2], 2.0, None), (x.double(), 2.0, None), (x, 2.0, (x, 1))):
        assert recordings.replay(*args) is None
    with pytest.raises(RuntimeError, match="several devices"):
        recordings.record(function, x, 1.0, (x.to("meta"), None))


def test_graphs_are_for_a_gpu_and_one_worker():
    with pytest.raises(UserError, match="cuda_graphs=true needs a GPU"):
        machine.resolve(device="cpu", cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs=true is for one worker"):
        TrainConfig(data_path="d", cuda_graphs=True, scaling={"num_workers": 2})
