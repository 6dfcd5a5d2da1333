"""Compiled models: when they are, that a run goes on bit for bit, and that a compiler that fails costs nothing.

That compiled models compute the published numbers is shown in test_golden_training.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from hrm_ray import machine
from hrm_ray.config.compose import train_config
from hrm_ray.config.schema import TrainConfig
from hrm_ray.models.act import Batch
from hrm_ray.models.compiled import STANCE, reason
from hrm_ray.models.inference import Thinker
from hrm_ray.models.layers import ReasoningModule
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import finished
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.world import World
from tests.toy import DECODER, EQR, TRM, toy_config, toy_dataset

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LONG = {"num_params": 27_000_000, "num_tokens": 20e6 * 81}
SHORT = {"num_params": 445_000, "num_tokens": 120_000 * 16}  # the quickstart's


def trainer_of(folder, **values) -> TrainingLoop:
    parsed = TrainConfig(**toy_config(folder / "data", folder / "runs", **values))
    return TrainingLoop(parsed, run_folder(parsed), World(), Hooks())


def events(trainer: TrainingLoop) -> dict[str, str]:
    lines = (trainer.run.local_path / "events.jsonl").read_text().splitlines()
    return {entry["event"]: entry["message"] for entry in map(json.loads, lines)}


def files(run: Storage) -> dict:
    return finished(run)[-1].manifest.files


@pytest.mark.parametrize(
    ("wanted", "device", "run", "has_compiler", "expected"),
    [
        ("auto", CPU, LONG, True, True),
        ("auto", CPU, SHORT, True, False),
        ("auto", CPU, LONG, False, False),
        ("auto", GPU, SHORT, True, True),
        ("auto", GPU, LONG, False, False),
        (True, CPU, SHORT, False, True),  # wanted: then it is tried, and said if it fails
        (False, GPU, LONG, True, False),
    ],
)
def test_when_models_are_compiled(monkeypatch, wanted, device, run, has_compiler, expected):
    monkeypatch.setattr(machine, "compiler", lambda device: "c++" if has_compiler else None)
    assert machine.compiles(wanted, device, **run) == expected


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ((), "1", False),
        ((), "0", "auto"),
        ((), "", "auto"),
        (("compile=auto",), "1", False),
        (("compile=true",), "1", True),
    ],
)
def test_the_published_switch_is_honoured(monkeypatch, words, environment, expected):
    monkeypatch.setenv("DISABLE_COMPILE", environment)
    assert train_config(["experiment=sudoku_4x4", *words]).compile == expected


def test_a_compiled_run_goes_on_bit_for_bit(tmp_path):
    toy_dataset(tmp_path / "data", num_identifiers=5)
    values = {"compile": True, "arch": TRM, "ema": True, "forward_dtype": "bfloat16"}
    whole = trainer_of(tmp_path, run_name="whole", **values)
    whole.train()
    trainer_of(tmp_path, run_name="parts", **{**values, "max_steps": 11}).train()
    parts = trainer_of(tmp_path, run_name="parts", **values)
    parts.train()
    assert "compiled" in events(parts)
    assert parts.setup.describe("").endswith("compiled")
    assert files(parts.run) == files(whole.run)


def test_compiling_takes_no_step_and_leaves_nothing_behind(tmp_path):
    """The same weights, no gradients, no rows of the puzzle embedding waiting for theirs; and it is done."""
    toy_dataset(tmp_path / "data", num_identifiers=5)
    trainer = trainer_of(tmp_path)
    model = trainer.state.model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.stepper.compile()
    assert trainer.state.carry.halted.all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.inner.puzzle_emb._looked_up == []
    compiled = [m for m in model.modules() if isinstance(m, ReasoningModule)]
    assert compiled
    assert all(module._compiled_call_impl is not None for module in compiled)
    # Batches of other sizes compile nothing more.
    num_programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.eval()
    with torch.compiler.set_stance(STANCE):
        for size in (3, 5):
            assert len(Thinker(model).think(batch_of(size)).last.q_halt) == size
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_programs
    trainer._close()


def batch_of(size: int) -> Batch:
    tokens = torch.ones(size, 16, dtype=torch.int64)
    return Batch(tokens.int(), tokens, torch.zeros(size, dtype=torch.int32))


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_size": 3, "forward_dtype": "bfloat16"},  # of eight slots: 3, 3, 2
        {"arch": DECODER | {"dropout": 0.0}},
        {
            "arch": TRM | {"H_cycles": 1},  # so that no part of a supervised step is without gradient
            "halting": {"name": "q_learning", "dqn_warmup_ratio": 0.2},
            "supervision_steps": 2,
            "supervised": "last",
        },
        {
            "arch": TRM | EQR,
            "paths": {"train": 2},
            "halting": {"name": "q_learning", "dqn_warmup_ratio": 0.2},
        },
    ],
    ids=["hrm", "decoder", "trm", "paths"],
)
def test_steps_and_evaluations_run_what_was_compiled(tmp_path, change):
    """Else they would run eagerly in silence: here, what has no program is an error."""
    toy_dataset(tmp_path / "data", num_identifiers=5)
    trainer = trainer_of(tmp_path, **change)
    model = trainer.state.model.train()
    trainer.stepper.compile()
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 6):
            trainer._step(step)
        model.eval()
        with trainer.state.averaged_weights():
            Thinker(model).think(batch_of(change.get("micro_batch_size", 8)))
        with pytest.raises(RuntimeError, match="recompile"):  # so it would be seen
            Thinker(model).think(batch_of(7))
    trainer._close()


@pytest.mark.parametrize("found", ["", "/tmp", "/no/such/compiler"])
def test_a_compiler_that_cannot_be_started_is_none(found):
    with torch._inductor.config.patch({"cpp.cxx": (found,)}):
        assert machine.compiler(CPU) is None
        assert not machine.compiles("auto", CPU, **LONG)


def test_a_compiler_that_fails_costs_one_warning(tmp_path):
    """As a user sees it: a compiler that answers but does not compile, and nothing compiled before."""
    toy_dataset(tmp_path / "data")
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\necho no room >&2; exit 1\n')
    broken.chmod(0o755)
    runs = {}
    for compile in ("true", "false"):
        words = [f"data={tmp_path}/data", f"storage={tmp_path}/runs", f"run_name={compile}", "scaling=local"]
        words += ["arch.hidden_size=32", "arch.num_heads=2", "arch.H_layers=1", "arch.L_layers=1"]
        words += ["arch.puzzle_emb_ndim=0", "arch.halt_max_steps=4", "global_batch_size=8", "epochs=3"]
        words += ["eval_interval=1", "lr_warmup_steps=4", "max_steps=9", f"compile={compile}"]
        runs[compile] = subprocess.run(
            [sys.executable, "-m", "hrm_ray.cli", "train", *words],
            env=os.environ | {"CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert runs[compile].returncode == 0, runs[compile].stderr
    said = [line for line in runs["true"].stderr.splitlines() if "without compiling" in line]
    assert len(said) == 1
    assert "no room" in said[0]  # what the compiler said
    assert "Traceback" not in runs["true"].stderr
    storage = Storage(str(tmp_path / "runs"))
    assert files(storage / "true") == files(storage / "false")


def test_the_reason_is_what_the_compiler_said_first():
    assert reason(
        RuntimeError("C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\nno room\nnone at all")
    ) == ("C++ compile error: no room")
    assert reason(RuntimeError("C++ compile error\nOutput:\n")) == "C++ compile error"
    assert reason(ValueError()) == "ValueError"
