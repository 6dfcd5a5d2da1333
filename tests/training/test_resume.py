"""A run that was stopped and continued is the undisturbed run, bit for bit."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from hrm_ray import machine, memory
from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import RunFailed, UserError
from hrm_ray.halting.q_learning import QLearningConfig
from hrm_ray.manifest import seal
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import finished, newest_whole
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.launch import Launch, _changes
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.world import World
from tests.toy import ARCH, DECODER, EQR, TRM, toy_config, toy_dataset


def run(config: dict, hooks: Hooks | None = None) -> TrainingLoop:
    parsed = TrainConfig(**config)
    trainer = TrainingLoop(parsed, run_folder(parsed), World(), hooks or Hooks())
    trainer.train()
    return trainer


def records(trainer: TrainingLoop) -> list[dict]:
    lines = (trainer.run.local_path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def assert_same_state(a: TrainingLoop, b: TrainingLoop) -> None:
    last_a, last_b = finished(a.run)[-1], finished(b.run)[-1]
    assert last_a.manifest.global_step == last_b.manifest.global_step
    # Equal bytes of every file: weights, moments, averages, carry.
    assert last_a.manifest.files == last_b.manifest.files


@pytest.fixture
def config(tmp_path):
    toy_dataset(tmp_path / "data", num_identifiers=5, puzzles_per_group=3, is_rated=True)
    return toy_config(tmp_path / "data", tmp_path / "runs", ema=True)


def test_a_run_on_a_cpu_keeps_freed_memory_and_no_other(config, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "keep_memory", lambda: asked.append(True))
    run({**config, "max_steps": 1})
    assert asked == [True]
    begin = Mock(side_effect=UserError("there is no such device"))
    elsewhere = replace(machine.resolve(), device=torch.device("cuda"))
    monkeypatch.setattr(machine, "resolve", lambda **_: elsewhere)
    monkeypatch.setattr(TrainingLoop, "_begin", begin)
    with pytest.raises(UserError, match="no such device"):
        run({**config, "run_name": "elsewhere"})
    assert asked == [True]


# The loop asks whether to stop after every step, and before every batch of the evaluations after steps 8, 16, 20.
@pytest.mark.parametrize(
    ("asked", "step", "evaluated"),
    [
        (1, 1, False),
        (7, 7, False),
        (8, 8, False),
        (9, 8, False),
        (11, 8, False),
        (18, 9, True),
        (40, 20, True),
    ],
)
def test_continued_equals_undisturbed(config, asked, step, evaluated):
    undisturbed = run({**config, "run_name": "whole"})
    asks = iter(range(1, 100))
    first = run({**config, "run_name": "parts"}, Hooks(stop=lambda: "asked" if next(asks) == asked else None))
    assert first.state.global_step == step
    assert any("eval/accuracy" in r for r in records(first)) == evaluated
    assert not json.loads((first.run.local_path / "summary.json").read_text())["finished"]
    second = run({**config, "run_name": "parts"})
    assert_same_state(undisturbed, second)
    assert json.loads((second.run.local_path / "summary.json").read_text())["finished"]
    assert records(undisturbed) == records(second)  # sums not yet reported are part of the checkpoint


LEARNED = {"halting": {"name": "q_learning", "replay_max_age": 6}}


@pytest.mark.parametrize(
    "change",
    [
        LEARNED,
        {**LEARNED, "supervision_steps": 2, "weight_decay_end": 0.01},
        {"arch": TRM},
        {"arch": {**TRM, "mlp_t": True, "pos_encodings": "none", "no_ACT_continue": False}},
        {"arch": {"name": "transformer", "hidden_size": 32, "num_heads": 2, "num_layers": 1}},
        {"halting": {"name": "fixed"}},
        {"arch": TRM | {"H_cycles": 2, "L_cycles": 2}, "curriculum": {"depth": [[0.2, 1, 1], [0.5, 1, 2]]}},
        {
            "arch": ARCH | {"loss": {"label_smoothing": 0.2}},
            "curriculum": {"filled": [0.7, 0.6], "rating": [0.2, 0.8]},
            "supervision_steps": 2,
            "supervised": "last",
        },
        {"arch": ARCH | EQR, "supervision_steps": 2},
        {"arch": TRM | EQR, "micro_batch_size": 3},
        {"arch": ARCH | EQR, "paths": {"train": 3}},
        {"arch": ARCH | {"pos_encodings": "grid"}},
        {"arch": DECODER, "weight_noise": 0.01},
    ],
    ids=[
        *("q_learning", "supervision_steps", "trm", "trm_mlp", "transformer", "fixed", "depth"),
        *("easy", "eqr_hrm", "eqr_trm", "paths", "grid", "decoder"),
    ],
)
def test_every_kind_of_run_continues(config, change):
    config |= change
    undisturbed = run({**config, "run_name": "whole", "log_interval": 1})
    run({**config, "run_name": "parts", "max_steps": 7, "log_interval": 1})
    second = run({**config, "run_name": "parts", "log_interval": 1})
    assert_same_state(undisturbed, second)
    # All but the evaluation at the end of the first part, which the whole run has no reason for.
    trained, continued = ([r for r in records(t) if "train/loss" in r] for t in (undisturbed, second))
    assert trained == continued and len(trained) == undisturbed.state.global_step
    assert trained[-1]["train/loss"] < trained[0]["train/loss"]


def test_annealed_values_go_on_in_the_middle_of_a_long_run(config):
    """10,000 steps, stopped and resumed at 5,000; what lies long before and after is left out."""

    class FromTheMiddle(TrainingLoop):
        def _begin(self):
            super()._begin()
            self.state.global_step = max(self.state.global_step, 4_990)

    def train(name: str, max_steps: int) -> TrainingLoop:
        parsed = TrainConfig(**{**config, "run_name": name, "max_steps": max_steps})
        trainer = FromTheMiddle(parsed, run_folder(parsed), World(), Hooks())
        trainer.train()
        return trainer

    config |= {"epochs": 10_000 // 8, "eval_interval": None, "log_interval": 1, "weight_decay_end": 0.01}
    config["halting"] = {"name": "q_learning", "expansion_anneal_ratio": 0.9, "epsilon_anneal_ratio": 0.9}
    whole = train("whole", 5_010)
    train("parts", 5_000)
    parts = train("parts", 5_010)
    assert whole.plan.total_steps == 10_000
    assert_same_state(whole, parts)
    assert records(whole)[:20] == [r for r in records(parts) if "train/loss" in r]
    annealed = ["expansion_penalty", "q_temperature", "epsilon", "weight_decay", "lr"]
    for before, after in pairwise(records(whole)[:20]):
        assert all(before[f"train/{key}"] > after[f"train/{key}"] for key in annealed)


def test_how_often_a_model_is_called_changes_nothing(config):
    """No schedule, draw or memory counts calls: a run whose model is called between the steps is the same run."""

    class Called(TrainingLoop):
        def _step(self, step):
            super()._step(step)
            state, batch = self.state, self.stepper.batch(step)
            control = self.stepper.control(step, step)
            for _ in range(step % 3):
                with torch.no_grad():
                    self.stepper.module(state.carry, batch, control, None)

    config |= LEARNED
    quiet = run({**config, "run_name": "quiet"})
    parsed = TrainConfig(**{**config, "run_name": "called"})
    called = Called(parsed, run_folder(parsed), World(), Hooks())
    called.train()
    assert_same_state(quiet, called)
    assert records(quiet) == records(called)


def test_what_was_learned_about_halting_is_not_mixed_up(config):
    run({**config, **LEARNED, "max_steps": 2})
    with pytest.raises(UserError, match=r"halting\.name=q_learning, not act"):
        run(config)
    with pytest.raises(UserError, match=r"halting\.replay_max_age=6, not 7"):
        run({**config, "halting": {**LEARNED["halting"], "replay_max_age": 7}})


def test_another_family_is_not_continued(config):
    run({**config, "max_steps": 2})
    with pytest.raises(UserError, match="arch=hrm_v1, not trm"):
        run({**config, "arch": TRM})


def test_work_lost_after_the_last_checkpoint_is_reported_once(config):
    """A crash between checkpoints: the reports after the last one are cut off, then made again."""

    class Crash(Exception):
        pass

    def crash_at_13(progress):
        if progress.step == 13:
            raise Crash

    with pytest.raises(Crash):
        run({**config, "run_name": "crashed"}, Hooks(progress=crash_at_13))
    resumed = run({**config, "run_name": "crashed"})
    undisturbed = run({**config, "run_name": "whole"})
    assert_same_state(undisturbed, resumed)
    assert records(undisturbed) == records(resumed)


def test_a_finished_run_is_left_as_it_is(config):
    before = run(config)
    metrics = (before.run.local_path / "metrics.jsonl").read_bytes()
    after = run(config)
    assert after.state.global_step == 20
    assert (after.run.local_path / "metrics.jsonl").read_bytes() == metrics
    assert_same_state(before, after)


def test_longer_run_goes_on(config):
    run({**config, "max_steps": 8})
    longer = run({**config, "max_steps": 16})
    whole = run({**config, "max_steps": 16, "run_name": "whole"})
    assert_same_state(longer, whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed=0, not 1"),
        ({"global_batch_size": 16}, "global_batch_size=8, not 16"),
        ({"arch": {**ARCH, "H_cycles": 3}}, "arch.H_cycles=2, not 3"),
        (
            {"arch": {**ARCH, "loss": {"label_smoothing": 0.2}}},
            r"arch\.loss\.label_smoothing=0\.0, not 0\.2",
        ),
        ({"arch": {**ARCH, "noise": 0.1}}, "arch.noise=0.0, not 0.1"),
    ],
)
def test_another_run_is_not_continued(config, change, said):
    run({**config, "max_steps": 2})
    with pytest.raises(UserError, match=said):
        run({**config, **change})


def test_another_number_of_paths_is_not_continued(config):
    config["arch"] = TRM | EQR
    run({**config, "max_steps": 2})
    with pytest.raises(UserError, match=r"paths\.train=1, not 2"):
        run({**config, "paths": {"train": 2}})


def test_another_dataset_is_not_continued(config, tmp_path):
    run({**config, "max_steps": 2})
    toy_dataset(tmp_path / "other", seed=1, num_identifiers=5)
    with pytest.raises(UserError, match="data set"):
        run({**config, "data_path": str(tmp_path / "other")})


def damage(trainer: TrainingLoop, name: str) -> None:
    file = trainer.run.local_path / "checkpoints" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def events(trainer: TrainingLoop, event: str) -> list[str]:
    lines = (trainer.run.local_path / "events.jsonl").read_text().splitlines()
    return [entry["message"] for entry in map(json.loads, lines) if entry["event"] == event]


@pytest.mark.parametrize(
    "part", ["optimizer.safetensors", "carry-00000-of-00001.safetensors", "manifest.json"]
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(config, part):
    damaged = run({**config, "run_name": "damaged", "max_steps": 16})
    damage(damaged, f"step-00000016/{part}")
    said = []
    again = run({**config, "run_name": "damaged"}, Hooks(event=lambda entry: said.append(entry["message"])))
    assert part in said[0] and "damaged" in said[0] and "passed over" in said[0]
    assert events(again, "started") == ["starts on 1 worker(s)", "continues from step 8 on 1 worker(s)"]
    assert_same_state(again, run({**config, "run_name": "whole"}))


def test_a_run_without_a_whole_checkpoint_is_not_started_over(config):
    trainer = run({**config, "max_steps": 8})
    damage(trainer, "step-00000008/model.safetensors")
    before = sorted(p for p in trainer.run.local_path.rglob("*") if p.is_file())
    with pytest.raises(
        UserError, match=r"every checkpoint is damaged or gone \(.*model\.safetensors.*run_name="
    ) as told:
        run(config)
    assert "\n" not in str(told.value)
    (trainer.run.local_path / "checkpoints/step-00000008/manifest.json").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged or gone"):
        run(config)
    after = sorted(p for p in trainer.run.local_path.rglob("*") if p.is_file())
    assert set(after) == set(before) - {trainer.run.local_path / "checkpoints/step-00000008/manifest.json"}


def test_a_first_checkpoint_that_was_cut_short_does_not_count(config):
    """As after a kill while it was written: no manifest, and nothing says that there ever was one."""
    folder = run_folder(TrainConfig(**config)).local_path / "checkpoints/step-00000008"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")
    again = run({**config, "max_steps": 8})
    assert [c.manifest.global_step for c in finished(again.run)] == [8]
    assert newest_whole(again.run, pytest.fail) is not None


def test_keeps_the_newest_and_the_best(config):
    trainer = run(
        {**config, "keep_last": 1, "keep_best": 2, "best_metric": "eval/accuracy", "checkpoint_interval": 3}
    )
    values = {r["global_step"]: r["eval/accuracy"] for r in records(trainer) if "eval/accuracy" in r}
    best_steps = sorted(values, key=lambda step: (values[step], step))[-2:]
    steps = [c.manifest.global_step for c in finished(trainer.run)]
    assert steps == sorted({*best_steps, 20})
    assert json.loads((trainer.run.local_path / "summary.json").read_text())["best"]["eval/accuracy"] == max(
        values.values()
    )


def test_a_damaged_checkpoint_displaces_no_whole_one(config):
    """It counts as newest by its step; one saved at an earlier step, after going back, is the newest whole one."""
    config = {**config, "keep_last": 1}
    first = run(config, stopped_at(21))  # after steps 1..8, the 9 batches of an evaluation, steps 9..12
    weights = first.run.local_path / "checkpoints/step-00000012/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    again = run(config, stopped_at(1))
    assert [c.manifest.global_step for c in finished(again.run)] == [8, 9]


def stopped_at(ask: int) -> Hooks:
    """Asks to stop when the loop asks that often."""
    asks = iter(range(1, 100))
    return Hooks(stop=lambda: "asked" if next(asks) == ask else None)


def test_a_loss_that_is_not_finite_ends_the_run(config):
    with pytest.raises(RunFailed, match=r"not finite at step \d+ on rank 0 \(lr 1e\+30\)"):
        run({**config, "lr": 1e30, "lr_warmup_steps": 0, "lr_min_ratio": 1.0})
    assert finished(Storage(run_folder(TrainConfig(**config)).local_path)) == []


def test_averages_are_evaluated_and_saved(config):
    trainer = run({**config, "ema_rate": 0.5})
    weights = finished(trainer.run)[-1]
    averaged, own = weights.weights(), weights.tensors("model.safetensors")
    assert any(not torch.equal(averaged[name], own[name]) for name in own)
    name = "lm_head.weight"
    np.testing.assert_array_equal(averaged[name], trainer.state.averages[name])
    np.testing.assert_array_equal(own[name], trainer.state.model.inner.lm_head.weight.detach())


def test_a_run_may_go_on_in_another_precision(config):
    run({**config, "max_steps": 6})
    assert run({**config, "forward_dtype": "bfloat16"}).state.global_step == 20


def test_only_one_process_trains_a_run(config):
    first = TrainConfig(**config)
    holder = TrainingLoop(first, run_folder(first), World(), Hooks())
    with pytest.raises(UserError, match="another process is training"):
        run_folder(first).lock(wait_s=0)
    holder.train()
    run_folder(first).lock(wait_s=0).close()


def test_what_changes_is_said(config):
    run({**config, "max_steps": 2})
    said = Launch(TrainConfig(**{**config, "lr": 5e-4})).announce()
    assert "continues after step 2" in said and "lr 0.001 -> 0.0005" in said


def test_keys_of_halting_that_older_runs_had_are_no_change(config):
    """Every way had those of q_learning then."""
    parsed = TrainConfig(**config)
    older = QLearningConfig().model_dump() | {"name": "act"}
    manifest = SimpleNamespace(config=parsed.model_dump(mode="json") | {"halting": older})
    assert _changes(SimpleNamespace(folder="run", manifest=manifest), parsed) == ""


def test_a_run_from_before_states_had_keys_goes_on(config):
    """The configuration of its model had none of `StateConfig` then."""
    whole = run({**config, "run_name": "whole"})
    parts = run({**config, "run_name": "parts", "max_steps": 8})
    saved = finished(parts.run)[-1]
    content = saved.manifest.model_dump(mode="json")
    for arch in (content["arch"], content["config"]["arch"]):
        for key in EQR:
            del arch[key]
    saved.folder.write("manifest.json", seal(content))
    assert finished(parts.run)[-1].manifest.arch == saved.manifest.arch
    assert "arch" not in Launch(TrainConfig(**{**config, "run_name": "parts"})).announce()
    assert_same_state(run({**config, "run_name": "parts"}), whole)


def test_weights_that_are_not_finite_are_never_saved(config):
    parsed = TrainConfig(**config)
    trainer = TrainingLoop(parsed, run_folder(parsed), World(), Hooks())
    with torch.no_grad():
        trainer.state.model.inner.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(RunFailed, match="not finite"):
        trainer.train()
    assert finished(trainer.run) == []
