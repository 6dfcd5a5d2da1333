"""Faults that are not crashes: losses that are not finite, full disks, hangs, workers that disagree; planned ends."""

import json
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import RunFailed, UserError
from hrm_ray.training import launch, saver, watchdog
from hrm_ray.training.agreement import WorkersDisagree, bit_sum, odd_ones_out
from hrm_ray.training.checkpoint import finished
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.training.plan import why_ends_early
from hrm_ray.world import World
from tests.toy import ARCH, toy_config, toy_dataset
from tests.training.processes import start


@pytest.fixture
def config(tmp_path: Path) -> dict:
    toy_dataset(tmp_path / "data", num_identifiers=5)
    return toy_config(tmp_path / "data", tmp_path / "runs")


class PoisonedTrainer(TrainingLoop):
    """The weights become NaN in the update of step 11, whenever it is computed."""

    poisoned_step = 11

    def _step(self, step):
        super()._step(step)
        if step == self.poisoned_step and step not in self.state.skipped_steps:
            with torch.no_grad():
                self.state.model.inner.lm_head.weight[0, 0] = float("nan")


def run(config: dict, kind: type[TrainingLoop] = TrainingLoop, **hooks) -> TrainingLoop:
    parsed = TrainConfig(**config)
    made = kind(parsed, launch.run_folder(parsed), World(), Hooks(**hooks))
    made.train()
    return made


def records(made: TrainingLoop) -> list[dict]:
    return [json.loads(line) for line in (made.run.local_path / "metrics.jsonl").read_text().splitlines()]


def events(made: TrainingLoop) -> list[dict]:
    return [json.loads(line) for line in (made.run.local_path / "events.jsonl").read_text().splitlines()]


# Losses that are not finite


def test_a_rollback_leaves_out_the_batches_and_counts_them(config):
    config |= {"on_nonfinite": "rollback", "checkpoint_interval": 3}
    made = run(config, PoisonedTrainer)
    (entry,) = [e for e in events(made) if e["event"] == "rolled_back"]
    assert "not finite at step 12 on rank 0; back to step 9" in entry["message"]
    summary = json.loads((made.run.local_path / "summary.json").read_text())
    assert summary["finished"] and summary["num_rollbacks"] == 1
    manifest = finished(made.run)[-1].manifest
    assert manifest.global_step == 20 and manifest.skipped_steps == [11, 12] and manifest.num_rollbacks == 1
    steps = [r["global_step"] for r in records(made)]
    assert steps == sorted(steps) and steps[-1] == 20


@pytest.mark.parametrize("compile", [False, True])
def test_a_run_rolled_back_continues_bit_for_bit(config, compile):
    """The skipped steps are part of the checkpoint; a crash between rollback and checkpoint finds them again."""
    config |= {"on_nonfinite": "rollback", "checkpoint_interval": 3, "compile": compile}
    whole = run({**config, "run_name": "whole"}, PoisonedTrainer)
    run({**config, "run_name": "parts", "max_steps": 14}, PoisonedTrainer)
    parts = run({**config, "run_name": "parts"}, PoisonedTrainer)
    assert finished(parts.run)[-1].manifest.files == finished(whole.run)[-1].manifest.files
    assert finished(parts.run)[-1].manifest.skipped_steps == [11, 12]
    # Compiled again after the rollback, without a second message.
    assert whole.setup.compile == compile
    assert [e["event"] for e in events(whole)].count("compiled") == compile


def test_a_rollback_before_the_first_checkpoint_begins_anew(config):
    made = run(
        {**config, "on_nonfinite": "rollback", "eval_interval": None, "log_interval": 1}, PoisonedTrainer
    )
    assert finished(made.run)[-1].manifest.skipped_steps == [11, 12]
    reports = [r for r in records(made) if "train/lr" in r]
    assert [r["global_step"] for r in reports] == list(range(1, 21))
    assert [r["global_step"] for r in reports if "train/loss" not in r] == [11, 12]


def test_a_first_step_that_is_left_out_can_be_saved(config):
    class PoisonedFirst(PoisonedTrainer):
        poisoned_step = 1

    config |= {"on_nonfinite": "rollback", "checkpoint_interval": 1}
    run({**config, "max_steps": 1}, PoisonedFirst)
    made = run(config, PoisonedFirst)
    assert made.state.global_step == 20 and finished(made.run)[-1].manifest.skipped_steps == [1]


def test_rollbacks_are_not_endless(config):
    hopeless = {**config, "lr": 1e30, "lr_warmup_steps": 0, "on_nonfinite": "rollback", "max_rollbacks": 2}
    with pytest.raises(RunFailed, match="after 2 rollbacks"):
        run(hopeless)


def test_an_exploding_loss_counts_as_not_finite(config):
    with pytest.raises(RunFailed, match="not finite at step 1 on rank 0"):
        run({**config, "max_loss": 0.5})


def test_an_infinite_moment_is_never_saved(config):
    """An infinite gradient leaves the weights finite for a step, and the moments infinite for good."""

    class InfiniteMoment(TrainingLoop):
        def _step(self, step):
            super()._step(step)
            if step == 5 and step not in self.state.skipped_steps:
                self.state.moments()[0].view(-1)[0] = float("inf")

    config |= {"on_nonfinite": "rollback", "checkpoint_interval": 1}
    made = run(config, InfiniteMoment)
    assert finished(made.run)[-1].manifest.skipped_steps == [5]
    assert all(e["global_step"] == 4 for e in events(made) if e["event"] == "rolled_back")


def test_a_rollback_that_did_not_help_leaves_out_more(config):
    """The cause lies four steps before what shows it."""

    class LateEffect(TrainingLoop):
        poisoned = False

        def _step(self, step):
            super()._step(step)
            if step == 8 and step not in self.state.skipped_steps:
                self.poisoned = True
            if step == 12 and self.poisoned:
                self.poisoned = False
                with torch.no_grad():
                    self.state.model.inner.lm_head.weight[0, 0] = float("nan")

    made = run({**config, "on_nonfinite": "rollback", "eval_interval": None, "log_interval": 1}, LateEffect)
    manifest = finished(made.run)[-1].manifest
    assert manifest.num_rollbacks == 3 and manifest.global_step == 20
    assert 8 in manifest.skipped_steps and manifest.skipped_steps[0] > 4


def test_a_failed_run_says_so_in_its_events(config):
    with pytest.raises(RunFailed):
        run({**config, "max_loss": 0.5})
    lines = (Path(config["storage"]) / "toy" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["started", "failed"]


# Ends that are not failures


def test_early_stopping_ends_the_run_and_more_patience_continues_it(config):
    config |= {"eval_interval": 1, "epochs": 10, "max_steps": 60, "lr": 1e-12, "puzzle_emb_lr": 0.0}
    made = run({**config, "early_stopping": 2})
    evaluated = [r["global_step"] for r in records(made) if "eval/accuracy" in r]
    assert len(evaluated) == 3 and made.state.global_step == evaluated[-1] < 60
    summary = json.loads((made.run.local_path / "summary.json").read_text())
    assert summary["finished"] and summary["stop_reason"] == "early_stopping"
    again = run({**config, "early_stopping": 2})
    assert again.state.global_step == evaluated[-1]
    assert run({**config, "early_stopping": None}).state.global_step == 60


@pytest.mark.parametrize(
    ("values", "patience", "stops"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.5], 1, True),
        ([0.5, 0.6], 1, False),
        ([0.9, 0.1, 0.2], 2, True),
        ([0.9, 0.1, 0.2], 3, False),
        ([0.1, 0.1], None, False),
    ],
)
def test_patience(values, patience, stops):
    config = TrainConfig(data_path="", early_stopping=patience)
    assert why_ends_early(values, config) == ("early_stopping" if stops else None)


def test_a_value_that_is_reached_ends_the_run_with_a_checkpoint(config):
    """Also between the checkpoints, of which there is none at every evaluation."""
    config |= {"eval_interval_steps": 3, "eval_spacing": 0.5, "checkpoint_interval": 8, "lr": 1e-12}
    whole = run({**config, "run_name": "whole"})
    assert [r["global_step"] for r in records(whole) if "eval/accuracy" in r] == [3, 6, 9, 13, 19, 20]
    assert [(c.step, bool(c.manifest.metrics)) for c in finished(whole.run)] == [(16, False), (20, True)]
    value = next(r["eval/accuracy"] for r in records(whole) if "eval/accuracy" in r) / 2
    config |= {"best_metric": "eval/accuracy"}
    made = run({**config, "stop_at": value})
    summary = json.loads((made.run.local_path / "summary.json").read_text())
    assert summary["finished"] and summary["stop_reason"] == "stop_at" and summary["global_step"] == 3
    (checkpoint,) = finished(made.run)
    assert checkpoint.step == 3 and checkpoint.manifest.metrics["eval/accuracy"] >= value
    assert run({**config, "stop_at": value}).state.global_step == 3  # the same command has nothing to do
    again = run({**config, "stop_at": 1.0})
    assert again.state.global_step == 20
    assert finished(again.run)[-1].manifest.files == finished(whole.run)[-1].manifest.files


def test_rare_evaluations_go_on_as_they_were_after_a_stop(config):
    config |= {"eval_interval_steps": 2, "eval_spacing": 0.3}
    whole = run({**config, "run_name": "whole"})
    asked = iter([None] * 8 + ["now"])  # in the evaluation after step 4, of which there is no checkpoint
    assert run(config, stop=lambda: next(asked, None)).state.global_step == 4
    again = run(config)
    told, expected = ([r for r in records(made) if "eval/accuracy" in r] for made in (again, whole))
    assert told == expected and len(told) == 8


def test_time_that_is_up_stops_with_a_checkpoint(config, capsys):
    config |= {"epochs": 100_000, "max_steps": None, "eval_interval": None, "max_time_s": 1.0}
    summary, signal = launch.train(TrainConfig(**config), show_progress=False)
    assert signal is None and summary["stop_reason"] == "max_time_s" and not summary["finished"]
    (checkpoint,) = finished(launch.run_folder(TrainConfig(**config)))
    assert checkpoint.manifest.global_step == summary["global_step"] > 0


def test_a_checkpoint_that_is_asked_for_changes_nothing(config):
    asked = iter([False] * 6 + [True] + [False] * 100)
    saved = run({**config, "run_name": "saved", "eval_interval": None}, save=lambda: next(asked))
    whole = run({**config, "run_name": "whole", "eval_interval": None})
    assert [c.manifest.global_step for c in finished(saved.run)] == [7, 20]
    assert finished(saved.run)[-1].manifest.files == finished(whole.run)[-1].manifest.files


# Disks


def test_no_room_on_the_disk_is_said_before_writing(config, monkeypatch):
    made = run({**config, "max_steps": 8})
    monkeypatch.setattr(saver, "SPARE_BYTES", 2**70)
    with pytest.raises(RunFailed, match=r"GB free, a checkpoint needs .* make room, and the same command"):
        run(config)
    assert [c.manifest.global_step for c in finished(made.run)] == [8]
    assert sorted((made.run / "checkpoints").folders()) == ["step-00000008"]


def test_a_write_that_fails_leaves_the_checkpoint_before(config):
    """A real failing write: the kernel's limit on the size of files, in a process of its own."""
    made = run({**config, "max_steps": 8})
    largest = max(info.bytes for info in finished(made.run)[-1].manifest.files.values())
    program = f"""
        import json, resource, sys
        from hrm_ray.config.schema import TrainConfig
        from hrm_ray.training import launch
        resource.setrlimit(resource.RLIMIT_FSIZE, ({largest} - 1, resource.RLIM_INFINITY))
        launch.train(TrainConfig(**json.loads(sys.argv[1])), show_progress=False)
    """
    words = [sys.executable, "-c", textwrap.dedent(program), json.dumps(config)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "RunFailed" in done.stderr and "cannot be written" in done.stderr
    assert [c.manifest.global_step for c in finished(made.run)] == [8]
    assert sorted((made.run / "checkpoints").folders()) == ["step-00000008"]
    assert run(config).state.global_step == 20


# Hangs


@pytest.mark.parametrize(("beats", "ended"), [(False, False), (True, True)])
def test_a_process_is_watched_from_its_first_beat(monkeypatch, beats, ended):
    """Also one that stood still before it, as a slow import makes it look: then it may go on to take its time."""
    clock = iter(range(0, 1000, 3))  # three seconds from look to look, and one of two is allowed
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    dog = watchdog.Watchdog(None)
    looks = iter([False] * 20)
    dog._closed = SimpleNamespace(wait=lambda seconds: next(looks, True))
    if beats:
        dog.beat()
    with pytest.raises(SystemExit) if ended else nullcontext():
        dog._watch(2.0)


def test_a_process_that_hangs_is_ended_and_says_where(config):
    program = """
        import json, sys, threading
        from hrm_ray.config.schema import TrainConfig
        from hrm_ray.training import launch
        from hrm_ray.training.hooks import Hooks
        from hrm_ray.training.loop import TrainingLoop
        from hrm_ray.world import World
        def hang(progress):
            if progress.step == 5:
                threading.Event().wait()
        config = TrainConfig(**json.loads(sys.argv[1]))
        TrainingLoop(config, launch.run_folder(config), World(), Hooks(progress=hang)).train()
    """
    config |= {"watchdog_s": 0.5, "checkpoint_interval": 2, "run_name": "hung"}
    words = [sys.executable, "-c", textwrap.dedent(program), json.dumps(config)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "no progress for 0.5 s (watchdog_s)" in done.stderr and "in hang" in done.stderr
    config |= {"watchdog_s": None}  # which would end the tests, on a machine that stands still for a while
    whole = run({**config, "run_name": "whole"})
    again = run(config)
    # The checkpoint of step 4 may still have been in the writing.
    assert [e["global_step"] for e in events(again) if e["event"] == "started"] in ([0, 2], [0, 4])
    assert finished(again.run)[-1].manifest.files == finished(whole.run)[-1].manifest.files


# Workers that disagree


def _disagreeing_worker(rank: int, size: int, meeting_point: str, config: dict, told: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    parsed = TrainConfig(**config)
    made = TrainingLoop(parsed, launch.run_folder(parsed), World(rank, size, rank), Hooks())

    step = made._step

    def flip(number: int) -> None:
        step(number)
        if number == 7 and rank == 1:  # one bit, as a fault of memory would
            with torch.no_grad():
                made.state.model.inner.lm_head.weight.view(torch.int32)[3, 5] ^= 1

    made._step = flip
    try:
        made.train()
    except WorkersDisagree as error:
        (told / str(rank)).write_text(str(error))
    dist.barrier()
    os._exit(0)


def test_a_worker_whose_weights_differ_is_named_and_nothing_of_it_is_saved(config, tmp_path):
    config |= {"checksum_interval": 4, "checkpoint_interval": 3, "eval_interval": None}
    start(_disagreeing_worker, 3, config, tmp_path)
    said = {(tmp_path / str(rank)).read_text() for rank in range(3)}
    assert said == {"the weights of ranks 1 differ from the others' after step 8"}
    assert [c.manifest.global_step for c in finished(launch.run_folder(TrainConfig(**config)))] == [3, 6]


def test_odd_ones_out():
    assert odd_ones_out([5, 5, 7]) == "ranks 2"
    assert odd_ones_out([5, 7]) == "ranks 0, 1"
    assert odd_ones_out([1, 2, 3]) == "ranks 0, 1, 2"


def test_a_checksum_sees_every_bit_and_the_order_of_tensors():
    a, b = torch.randn(40), torch.randn(40)
    flipped = a.clone()
    flipped.view(torch.int32)[17] ^= 1 << 30
    assert bit_sum([a, b]) == bit_sum([a.clone(), b.clone()])
    assert len({bit_sum([a, b]), bit_sum([b, a]), bit_sum([flipped, b])}) == 3
    assert bit_sum([a.bfloat16()]) != bit_sum([b.bfloat16()])


# Weights only


def test_resume_weights_starts_anew_from_the_weights_of_a_run_that_does_not_fit(config, tmp_path):
    first = run({**config, "max_steps": 8})
    toy_dataset(tmp_path / "other", seed=1, num_identifiers=7)
    other = config | {"data_path": str(tmp_path / "other")}
    with pytest.raises(UserError, match=r"data set=\w+, not \w+;.* resume=weights"):
        launch.train(TrainConfig(**other), show_progress=False)
    values = TrainConfig(**{**other, "resume": "weights", "max_steps": 12})
    summary, _ = launch.train(values, show_progress=False)
    assert summary["global_step"] == 12
    aside = first.run.parent / "toy-before-1"
    assert [c.manifest.global_step for c in finished(aside)] == [8]
    entries = (first.run.local_path / "events.jsonl").read_text()
    assert "new run from the weights of" in entries and "(newly initialised: puzzle_emb.weights)" in entries
    # The same command continues; it does not start over a second time.
    summary, _ = launch.train(values.model_copy(update={"max_steps": 16}), show_progress=False)
    assert summary["global_step"] == 16 and finished(aside)


def test_resume_weights_takes_the_weights(config):
    first = run({**config, "max_steps": 8})
    parsed = TrainConfig(**{**config, "seed": 5, "resume": "weights"})
    launch.set_aside(first.run)
    made = TrainingLoop(parsed, launch.run_folder(parsed), World(), Hooks())
    for name, tensor in first.state.model.inner.state_dict().items():
        assert torch.equal(made.state.model.inner.state_dict()[name], tensor)
    assert made.state.global_step == 0


def test_resume_weights_of_another_architecture_names_a_shape(config):
    run({**config, "max_steps": 2})
    wider = {**config, "arch": {**ARCH, "hidden_size": 64, "puzzle_emb_ndim": 64}, "resume": "weights"}
    with pytest.raises(UserError, match=r"weights do not fit: .* is \(.*\) there and \(.*\) here"):
        launch.train(TrainConfig(**wider), show_progress=False)
    run(config)  # the run is still there


def test_resume_weights_without_any_is_said(config):
    with pytest.raises(UserError, match="has no checkpoint to take weights from"):
        launch.train(TrainConfig(**{**config, "resume": "weights"}), show_progress=False)
