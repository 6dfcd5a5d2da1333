"""Two workers do what one does on the same global batch: gloo processes, no Ray."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hrm_ray import machine
from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError
from hrm_ray.training.checkpoint import finished
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.world import World
from tests.toy import ARCH, DECODER, EQR, TRM, toy_config, toy_dataset
from tests.training.processes import start


def _worker(rank: int, size: int, meeting_point: str, config: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    parsed = TrainConfig(**config)
    trainer = TrainingLoop(parsed, run_folder(parsed), World(rank, size, rank), Hooks())
    reductions = []
    trainer.stepper.module.register_forward_pre_hook(
        lambda module, args: reductions.append(size > 1 and module.require_backward_grad_sync)
    )
    num_before = trainer.state.global_step
    trainer.train()
    if size > 1:  # one for every optimizer step, however many backward passes it has
        assert sum(reductions) == trainer.state.global_step - num_before
    dist.barrier()
    dist.destroy_process_group()
    # Past the interpreter's own end, where gloo's threads sometimes abort the process though all is written.
    os._exit(0)


def _worker_without_compiler(rank: int, size: int, meeting_point: str, config: dict) -> None:
    """The second worker's machine has none."""
    if rank == 1:
        torch._inductor.config.cpp.cxx = ("/no/such/compiler",)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{config['storage']}-cache"  # in which nothing is compiled
    _worker(rank, size, meeting_point, config)


def _worker_by_speed(
    rank: int, size: int, meeting_point: str, config: dict, fast: list[int], dtype: torch.dtype
) -> None:
    """Only the machines of the ranks `fast` are fast at bfloat16."""
    machine.cpu_has_fast_bfloat16 = lambda: rank in fast
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    parsed = TrainConfig(**config)
    trainer = TrainingLoop(parsed, run_folder(parsed), World(rank, size, rank), Hooks())
    assert trainer.setup.dtype == dtype
    dist.barrier()
    os._exit(0)


def _refused_worker(rank: int, size: int, meeting_point: str, config: dict) -> None:
    """Writes down the mistake that was reported to it."""
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    parsed = TrainConfig(**config)
    try:
        TrainingLoop(parsed, run_folder(parsed), World(rank, size, rank), Hooks())
    except UserError as error:
        Path(f"{config['storage']}-{rank}.txt").write_text(str(error))
    os._exit(0)


def run(size: int, config: dict):
    """The last checkpoint of a run of `size` processes."""
    start(_worker, size, config)
    return finished(run_folder(TrainConfig(**config)))[-1]


@pytest.fixture
def config(tmp_path: Path) -> dict:
    # 59 groups: the last batch of the run is partial (59 * 3 = 22 * 8 + 1).
    toy_dataset(tmp_path / "data", num_train=59, num_test=21, num_identifiers=5, is_rated=True)
    values = toy_config(tmp_path / "data", tmp_path / "runs", drop_last=False, ema=True)
    return {**values, "max_steps": None, "eval_interval": 2}


FAMILY = [
    {},
    {"halting": {"name": "q_learning", "dqn_warmup_ratio": 0.3, "replay_max_age": 6}},
    {"supervision_steps": 3, "arch": {**TRM, "no_ACT_continue": False}},
    {
        "arch": TRM | {"H_cycles": 2, "pos_encodings": "grid", "loss": {"label_smoothing": 0.2}},
        "curriculum": {"depth": [[0.4, 1, 1]], "filled": [0.7, 0.8], "rating": [0.2, 0.7]},
        "supervision_steps": 3,
        "supervised": "last",
    },
    {"arch": ARCH | EQR},
    # With seed 0 two paths seem so nearly alike that the rounding of another batch chooses the winner.
    {"arch": TRM | EQR, "paths": {"train": 2}, "seed": 1},
    {"arch": DECODER, "weight_noise": 0.01},
]


@pytest.mark.parametrize(
    ("change", "micro_batch_size"),  # of the four slots of each of two workers
    list(zip(FAMILY, (None, 3, 3, 3, 3, 3, 3), strict=True)),
    ids=["act", "q_learning", "supervision_steps", "curriculum", "eqr", "paths", "decoder"],
)
def test_two_workers_equal_one(config, change, micro_batch_size):
    config |= change
    one = run(1, {**config, "run_name": "one"})
    two = run(2, {**config, "run_name": "two", "micro_batch_size": micro_batch_size})
    num_steps = 8 if "supervision_steps" in change else 23
    assert one.manifest.global_step == two.manifest.global_step == num_steps
    for name, tensor in one.tensors("model.safetensors").items():
        np.testing.assert_allclose(two.tensors("model.safetensors")[name], tensor, rtol=1e-4, atol=2e-5)
    # Weights alone would not show a wrong scale of the gradients: AdamATan2 does not feel it. Its moments do.
    for name, tensor in one.tensors("optimizer.safetensors").items():
        other = two.tensors("optimizer.safetensors")[name]
        np.testing.assert_allclose(
            other, tensor, rtol=1e-2, atol=1e-3 * float(tensor.abs().max()), err_msg=name
        )
    if "arch" not in change or change["arch"].get("puzzle_emb_ndim"):
        assert one.tensors("model.safetensors")["puzzle_emb.weights"].abs().max() > 0
    for name, value in one.manifest.metrics.items():
        np.testing.assert_allclose(two.manifest.metrics[name], value, rtol=1e-6)
    # The carries of the two, in line, are the carry of the one.
    halves = [two.tensors(f"carry-0000{rank}-of-00002.safetensors") for rank in range(2)]
    whole = one.tensors("carry-00000-of-00001.safetensors")
    exact = {"steps", "halted", "inputs", "labels", "puzzle_identifiers"}
    exact |= {name for name in whole if name.startswith("replay.") and name != "replay.states"}
    for name in exact:
        assert torch.equal(torch.cat([half[name] for half in halves]), whole[name]), name


@pytest.mark.parametrize(("fast", "dtype"), [([0], torch.float32), ([0, 1], torch.bfloat16)])
def test_workers_on_unlike_machines_take_the_same_dtype(config, fast, dtype):
    start(_worker_by_speed, 2, config | {"forward_dtype": "auto"}, fast, dtype)


@pytest.mark.parametrize(
    "size", [2, 3]
)  # from three on the order of a sum may change; 8 slots are dealt 3, 3, 2
def test_workers_continue_bit_for_bit(config, size):
    config["halting"] = {"name": "q_learning", "dqn_warmup_ratio": 0.1}
    whole = run(size, {**config, "run_name": "whole"})
    run(size, {**config, "run_name": "parts", "max_steps": 9})
    parts = run(size, {**config, "run_name": "parts"})
    assert parts.manifest.files == whole.manifest.files


@pytest.mark.parametrize(("before", "halting"), [(2, "act"), (3, "q_learning")])
def test_another_number_of_workers_goes_on_with_the_same_batches(config, before, halting):
    config["halting"] = {"name": halting} | ({"replay_max_age": 6} if halting == "q_learning" else {})
    run(before, {**config, "run_name": "fewer", "max_steps": 9})
    fewer = run(1, {**config, "run_name": "fewer"})
    whole = run(1, {**config, "run_name": "whole"})
    for name, tensor in whole.tensors("model.safetensors").items():
        np.testing.assert_allclose(fewer.tensors("model.safetensors")[name], tensor, rtol=1e-4, atol=2e-5)
    a, b = (c.tensors("carry-00000-of-00001.safetensors") for c in (fewer, whole))
    assert a.keys() == b.keys() and (
        halting == "act" or torch.equal(a["replay.written"], b["replay.written"])
    )
    for name in ("inputs", "steps", "halted", *(n for n in a if n in ("replay.halted", "replay.exact"))):
        assert torch.equal(a[name], b[name]), name


def test_all_workers_compile_or_none(config):
    """Else a run would not go on bit for bit when the failure has passed."""
    config["max_steps"] = 5
    eager = run(2, {**config, "run_name": "eager", "compile": False})
    start(_worker_without_compiler, 2, {**config, "run_name": "mixed", "compile": True})
    folder = run_folder(TrainConfig(**{**config, "run_name": "mixed"}))
    assert finished(folder)[-1].manifest.files == eager.manifest.files
    events = [json.loads(line) for line in (folder.local_path / "events.jsonl").read_text().splitlines()]
    said = [e["message"] for e in events if e["event"] in ("compiled", "not_compiled")]
    assert len(said) == 1
    assert "without compiling" in said[0] and "rank 1" in said[0]


def test_workers_refuse_damaged_data_together(config, tmp_path):
    """The first worker of the node alone reads the files; both are told."""
    file = tmp_path / "data/test/shard-00000.arrow"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    start(_refused_worker, 2, config)
    first, second = ((tmp_path / f"runs-{rank}.txt").read_text() for rank in range(2))
    assert first == second and first.startswith(f"{file} is damaged")
