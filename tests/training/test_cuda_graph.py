"""Recorded steps: the same as others, bit for bit; and what cannot be recorded, or not truly, is done without.

Without a GPU, what a CUDA graph keeps is emulated (see `recorder`); the streams and memory of a GPU are not.
"""

import itertools
import json

import pytest
import torch

from hrm_ray import machine
from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError
from hrm_ray.training import cuda_graph
from hrm_ray.training.checkpoint import finished
from hrm_ray.training.cuda_graph import Recorded
from hrm_ray.training.loop import Hooks, Trainer
from hrm_ray.training.trainer import run_folder
from hrm_ray.training.world import World
from tests.toy import TRM, toy_config, toy_dataset
from tests.training import recorder

cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
Q_LEARNING = {"name": "q_learning", "dqn_warmup_ratio": 0.2}
CHANGES = {
    "hrm": {"ema": True},
    "micro-batches": {"micro_batch_size": 3},  # of eight slots: 3, 3, 2
    "q_learning": {"arch": TRM, "halting": Q_LEARNING, "micro_batch_size": 5},
    "supervision": {"supervision_steps": 2, "forward_dtype": "bfloat16"},
}


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=cuda_only)])
def device(request, monkeypatch):
    """A GPU, or a CPU that is taken for one where steps are recorded."""
    if request.param == "emulated":
        monkeypatch.setattr(cuda_graph, "capture", recorder.capture)
        resolve = machine.resolve
        monkeypatch.setattr(machine, "resolve", lambda cuda_graphs, **given: resolve(**given))
        return "cpu"
    return "cuda"


def trainer_of(folder, device, **values) -> Trainer:
    values = toy_config(folder / "data", folder / "runs", device=device, compile=False, **values)
    parsed = TrainConfig(**values)
    return Trainer(parsed, run_folder(parsed), World(), Hooks())


def events(trainer: Trainer) -> dict[str, str]:
    lines = (trainer.run.local_path / "events.jsonl").read_text().splitlines()
    return {entry["event"]: entry["message"] for entry in map(json.loads, lines)}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_recorded_run_is_the_run(tmp_path, device, change):
    toy_dataset(tmp_path / "data", num_identifiers=5)
    runs = {}
    for cuda_graphs in (False, True):
        trainer = trainer_of(tmp_path, device, run_name=str(cuda_graphs), cuda_graphs=cuda_graphs, **change)
        trainer.train()
        runs[cuda_graphs] = finished(trainer.run)[-1]
        assert ("recorded" in events(trainer)) == trainer.setup.cuda_graphs == cuda_graphs
    eager, recorded = runs[False], runs[True]
    assert eager.manifest.global_step == recorded.manifest.global_step > 10
    assert eager.manifest.files.keys() == recorded.manifest.files.keys()
    for name in eager.manifest.files:
        others = recorded.tensors(name)
        for key, tensor in eager.tensors(name).items():
            # A GPU's kernels may add up in any order.
            close = (
                torch.equal if device == "cpu" else lambda a, b: torch.allclose(a, b, rtol=1e-2, atol=1e-3)
            )
            assert close(tensor, others[key]), f"{name} {key}"


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


def reads_a_value(self, *args):
    sums = learn(self, *args)
    return sums._replace(loss=sums.loss * float(sums.loss.item() != 0))


def counts_in_python(self, *args):
    sums = learn(self, *args)
    return sums._replace(loss=sums.loss * next(counter))


learn = None  # the stepper's own, see the test
counter = itertools.count(1)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (reads_a_value, "not permitted when stream is capturing"),
        (counts_in_python, "replayed, a step of 8 puzzles differs"),
    ],
)
def test_what_cannot_be_recorded_costs_one_warning(tmp_path, device, monkeypatch, broken, said):
    from hrm_ray.training.step import Stepper

    monkeypatch.setitem(globals(), "learn", Stepper._learn)
    toy_dataset(tmp_path / "data", num_identifiers=5)
    monkeypatch.setattr(Stepper, "_learn", broken)
    trainer = trainer_of(tmp_path, device, cuda_graphs=True, max_steps=3)
    trainer.train()
    assert said in events(trainer)["not_recorded"]
    assert not trainer.setup.cuda_graphs
    assert all(parameter.grad is None for parameter in trainer.state.model.parameters())


def test_only_what_is_alike_is_replayed(device):
    """Another shape, dtype, number or structure is another call; each of those recorded is replayed."""
    calls = []

    def function(x, number, pair):
        calls.append(x.shape)
        return x * number + (0 if pair is None else pair[0])

    recorded = Recorded(function)
    x = torch.arange(3.0, device=device)
    recorded.record(x, 2.0, None)
    recorded.record(x, 3.0, (x, None))
    calls.clear()
    first, second = recorded(x + 1, 2.0, None), recorded(x + 2, 2.0, None)
    third = recorded(x, 3.0, (x + 1, None))
    assert calls == []
    assert torch.equal(first, (x + 1) * 2)  # also after later replays
    assert torch.equal(second, (x + 2) * 2)
    assert torch.equal(third, x * 3 + x + 1)
    for args in ((x, 4.0, None), (x[:2], 2.0, None), (x.double(), 2.0, None), (x, 2.0, (x, None))):
        calls.clear()
        assert torch.equal(recorded(*args), function(*args))
        assert len(calls) == 2


def test_graphs_are_for_a_gpu_and_one_worker():
    with pytest.raises(UserError, match="cuda_graphs=true needs a GPU"):
        machine.resolve(device="cpu", cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs=true is for one worker"):
        TrainConfig(data_path="d", cuda_graphs=True, scaling={"num_workers": 2})
