"""Population based training: what members become, what they take over, and a whole sweep on a real Ray."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from random import Random

import optuna
import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import FOLDER, Checkpoint, finished, step_name
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.tuning import lineage, population
from hrm_ray.tuning.config import sweep_config
from hrm_ray.tuning.explore import changeable, mutated
from hrm_ray.tuning.lineage import drop_unknown, stage, take_over
from hrm_ray.tuning.points import Points
from hrm_ray.tuning.space import Range, as_text, suggest
from hrm_ray.tuning.status import opened
from hrm_ray.tuning.study import trial_name
from hrm_ray.tuning.sweep import run_sweep, sweep_folder
from hrm_ray.tuning.view import View
from hrm_ray.world import World
from tests.toy import toy_config, toy_dataset
from tests.tuning.toy_sweep import toy_sweep

# Points near others


@st.composite
def ranges(draw) -> Range:
    kind = draw(st.sampled_from(["uniform", "log", "int", "log_int", "choice", "stepped", "int_stepped"]))
    if kind == "choice":
        values = st.one_of(st.booleans(), st.integers(-9, 9), st.text("abc", min_size=1), st.none())
        return Range(choice=tuple(draw(st.lists(values, min_size=1, max_size=5, unique_by=as_text))))
    if kind in ("int", "log_int", "int_stepped"):
        low = draw(st.integers(1 if kind == "log_int" else -50, 50))
        ends = (low, low + draw(st.integers(0, 100)))
        more = {"step": draw(st.integers(1, 30))} if kind == "int_stepped" else {}
        return Range.model_validate({kind.removesuffix("_stepped"): ends, **more})
    low = draw(st.floats(1e-9, 10) if kind == "log" else st.floats(-10, 10))
    ends = (low, low + draw(st.floats(0, 10)))
    if kind == "stepped":
        ends = (round(low, 2), round(ends[1], 2))
        return Range(uniform=ends, step=draw(st.sampled_from([0.01, 0.1, 0.3, 2.0])))
    return Range.model_validate({kind: ends})


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from("abcde"), ranges(), min_size=1), st.integers(0, 2**30), st.data())
def test_a_point_near_another_is_one_of_the_space(space, seed, data):
    choices = [key for key, values in space.items() if values.choice]
    if choices and len(space) > 1:  # one key hangs on another
        parent = data.draw(st.sampled_from(choices))
        child = data.draw(st.sampled_from([key for key in space if key != parent]))
        wanted = data.draw(st.sampled_from(space[parent].choice))
        space[child] = space[child].model_copy(update={"when": {parent: (wanted,)}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    point = suggest(study.ask(), space)
    keys = data.draw(st.sets(st.sampled_from(list(space))))
    resample, random = data.draw(st.sampled_from([0.0, 0.25, 1.0])), Random(seed)
    for _ in range(5):
        new = mutated(point, space, keys, resample, random)
        for key, values in space.items():
            assert (key in new) == values.holds({k: v for k, v in new.items() if k != key})
            if key in new:
                assert values.distribution._contains(values.distribution.to_internal_repr(new[key]))
                assert type(new[key]) in (type(point.get(key, new[key])), *map(type, values.choice or ()))
                assert key in keys or key not in point or as_text(new[key]) == as_text(point[key])
        assert json.loads(json.dumps(new)) == new  # as the study keeps it
        point = new


@pytest.mark.parametrize(
    ("values", "old", "near"),
    [
        ({"log": [1e-4, 1e-2]}, 1e-3, {1e-3 * 0.8, 1e-3 * 1.2}),
        ({"log": [1e-4, 1e-2]}, 1e-2, {8e-3}),
        ({"log": [1e-4, 1e-2]}, 9e-3, {1e-2, 9e-3 * 0.8}),
        ({"uniform": [0, 2]}, 1.0, {0.8, 1.2}),
        ({"uniform": [0, 2]}, 0.0, {0.2}),
        ({"uniform": [0, 2], "step": 0.5}, 1.0, {0.5, 1.5}),
        ({"int": [1, 9]}, 5, {4, 6}),
        ({"int": [0, 100], "step": 5}, 50, {40, 60}),
        ({"log_int": [8, 512]}, 100, {80, 120}),
        ({"log_int": [1, 8]}, 1, {2}),
        ({"choice": ["a", "b", "c"]}, "b", {"a", "c"}),
        ({"choice": ["a"]}, "a", {"a"}),
    ],
)
def test_a_value_moves_to_one_beside_it(values, old, near):
    space = {"key": Range.model_validate(values)}
    found = {mutated({"key": old}, space, ["key"], 0, Random(seed))["key"] for seed in range(40)}
    assert sorted(found) == (sorted(near) if isinstance(old, str) else pytest.approx(sorted(near)))
    assert {type(value) for value in found} == {type(old)}


def test_resampled_values_come_from_the_whole_range():
    space = {"lr": Range(log=(1e-6, 1.0)), "n": Range(int=(0, 3))}
    drawn = [mutated({"lr": 1e-3, "n": 1}, space, ["lr", "n"], 1, Random(seed)) for seed in range(400)]
    assert 150 < sum(point["lr"] < 1e-3 for point in drawn) < 250
    assert all(70 < count < 130 for count in Counter(point["n"] for point in drawn).values())


def population_of(folder: Path, space: dict, **values) -> Points:
    more = {"population": {"interval": 10}, "pruner": None, **values}
    return Points(toy_sweep(folder, space=space, **more))


def test_only_what_a_run_may_change_when_it_goes_on_is_changed(tmp_path):
    toy_dataset(tmp_path / "other", seed=1)
    lasting = {
        "arch.hidden_size": [32, 64],
        "seed": {"int": [0, 9]},
        "ema": [True, False],
        "data_path": [str(tmp_path / "data"), str(tmp_path / "other")],
        "halting": ["act", "q_learning"],
    }
    changing = {
        "lr": {"log": [1e-4, 1e-2]},
        "weight_decay": {"uniform": [0, 1]},
        "q_temperature_anneal_ratio": {"uniform": [0.1, 1], "when": {"halting": "q_learning"}},
        "log_interval": {"int": [1, 9]},
    }
    space = {**lasting, **changing}
    points = population_of(tmp_path, space)
    words = tuple(word for word in points.config.train if word.partition("=")[0] not in (*space, "data"))
    points = Points(points.config.model_copy(update={"train": words}))
    assert changeable(points, 40) == list(changing)
    points = population_of(tmp_path, {"arch.L_cycles": [1, 2], "seed": [0, 1]})
    with pytest.raises(
        UserError, match=r"population: a run cannot change arch\.L_cycles, seed when it continues; add"
    ):
        changeable(points, 40)
    points = population_of(tmp_path, {"lr": {"log": [1e-4, 1e-2]}}, population={"interval": 40})
    with pytest.raises(UserError, match="population: interval=40 is not shorter than a run of 40 steps"):
        changeable(points, 40)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_trials": 1}, "at least 2"),
        ({"max_concurrent": 2}, "max_concurrent: not needed with population"),
        ({"metric": "num_params"}, "known at the end"),
    ],
)
def test_what_does_not_suit_a_population_is_refused(values, message):
    sweep = {
        "train": "experiment=sudoku_4x4",
        "space": {"lr": {"log": [1e-4, 1e-2]}},
        "population": {"interval": 9},
    }
    with pytest.raises(UserError, match=message):
        sweep_config({**sweep, **values})


# Copies of checkpoints


def toy_run(folder: Path, name: str, **values) -> TrainConfig:
    more = {"eval_interval_steps": 5, "keep_last": 9, **values}
    return TrainConfig.model_validate(toy_config(folder / "data", folder / "runs", run_name=name, **more))


def trained(config: TrainConfig) -> Storage:
    run = Storage(config.storage) / str(config.run_name)
    TrainingLoop(config, run, World(), Hooks()).train()
    return run


def steps_of(run: Storage) -> list[int]:
    return [checkpoint.manifest.global_step for checkpoint in finished(run)]


def reports_of(run: Storage) -> list[dict]:
    return [json.loads(line) for line in (run.read("metrics.jsonl") or b"").splitlines()]


def files_of(run: Storage, step: int) -> dict:
    return {n: i.sha256 for n, i in Checkpoint(run / FOLDER / step_name(step)).manifest.files.items()}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> Path:
    """Runs `good`, at step 10, and `bad`, at step 15, and what becomes of `good` with another lr: `alone`."""
    folder = tmp_path_factory.mktemp("runs")
    toy_dataset(folder / "data")
    trained(toy_run(folder, "good", lr=1e-3, max_steps=10))
    trained(toy_run(folder, "bad", lr=1e-6, max_steps=15))
    shutil.copytree(folder / "runs" / "good", folder / "runs" / "alone")
    trained(toy_run(folder, "alone", lr=2e-3, max_steps=20))
    return folder


@pytest.fixture
def runs(two_runs, tmp_path) -> tuple[Path, Storage, Storage]:
    """The folder, `good` and `bad`, to be changed."""
    shutil.copytree(two_runs, tmp_path / "copy")
    folder = tmp_path / "copy"
    return folder, Storage(folder / "runs" / "good"), Storage(folder / "runs" / "bad")


def test_a_run_goes_on_from_a_copy_as_the_other_would_have(runs):
    folder, good, bad = runs
    copy = stage(good, 10, bad, 1)
    assert copy is not None and copy.manifest.global_step == 10
    assert steps_of(bad) == [5, 10, 15]  # nothing has changed for the loop
    take_over(bad, 1, wait_s=1)
    assert steps_of(bad) == [5, 10] and files_of(bad, 10) == files_of(good, 10)
    assert max(report["global_step"] for report in reports_of(bad)) == 10
    assert not (bad / lineage.TAKEN).exists()
    take_over(bad, 1, wait_s=1)  # once only
    assert steps_of(bad) == [5, 10]
    trained(toy_run(folder, "bad", lr=2e-3, max_steps=20))
    alone = Storage(folder / "runs" / "alone")
    assert files_of(bad, 20) == files_of(alone, 20) != files_of(good, 10)
    lrs = {report["global_step"]: report["train/lr"] for report in reports_of(bad) if "train/lr" in report}
    assert lrs[10] < 1e-6 < 1e-4 < lrs[15]
    assert [r for r in reports_of(bad) if r["global_step"] > 10 and "train/loss" in r] != []


def test_the_checkpoint_after_the_wanted_one_is_taken_where_that_is_gone(runs):
    _, good, bad = runs
    assert stage(bad, 8, good, 1).manifest.global_step == 15
    assert stage(bad, 5, good, 1).manifest.global_step == 5
    assert stage(good, 11, bad, 1) is None
    file = good.local_path / FOLDER / step_name(10) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert stage(good, 10, bad, 1) is None


def test_what_is_not_whole_or_not_known_is_not_taken(runs):
    _, good, bad = runs
    stage(good, 10, bad, 1)
    take_over(bad, 0, wait_s=1)  # the study does not know of it
    assert steps_of(bad) == [5, 10, 15]
    drop_unknown(bad, 0)
    take_over(bad, 1, wait_s=1)
    assert steps_of(bad) == [5, 10, 15]
    stage(good, 10, bad, 1)
    file = bad.local_path / lineage.TAKEN / "0001" / "optimizer.safetensors"
    file.write_bytes(b"?" + file.read_bytes()[1:])
    take_over(bad, 1, wait_s=1)
    assert steps_of(bad) == [5, 10, 15] and not (bad / lineage.TAKEN).exists()
    assert "damaged_copy" in bad.read("events.jsonl").decode()


class Killed(BaseException):
    pass


def test_killed_anywhere_a_copy_is_taken_whole_or_not_at_all(runs, tmp_path, monkeypatch):
    """A process is killed before each of the changes that it makes to files, and the next one goes on."""
    folder, good, _ = runs
    left = [10**9]

    def counted(change):
        def method(self, *args):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return change(self, *args)

        return method

    for name in ("write", "delete_if_empty", "delete_file", "append"):
        monkeypatch.setattr(Storage, name, counted(getattr(Storage, name)))
    number = 0
    while True:
        bad = Storage(tmp_path / f"bad-{number}")
        shutil.copytree(folder / "runs" / "bad", bad.local_path)
        known = False  # to the study
        left[0] = number
        try:
            stage(good, 10, bad, 1)
            known = True
            take_over(bad, 1, wait_s=1)
            break
        except Killed:
            left[0] = 10**9
        if not known:
            drop_unknown(bad, 0)
            take_over(bad, 0, wait_s=1)
            assert steps_of(bad) == [5, 10, 15] and files_of(bad, 10) != files_of(good, 10)
        else:
            take_over(bad, 1, wait_s=1)
            assert steps_of(bad) == [5, 10] and files_of(bad, 10) == files_of(good, 10)
            assert max(report["global_step"] for report in reports_of(bad)) == 10
            assert not (bad / lineage.TAKEN).exists()
        number += 1
    assert number > 12


# A whole sweep


class Interrupts(View):
    """As somebody who stops a sweep when a member has been replaced."""

    def __init__(self) -> None:
        self.did = False

    def show(self, study, live, spent):
        if not self.did and any(trial.copy and trial.started for trial in live):
            self.did = True
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def killed(monkeypatch) -> list[int]:
    """The idle workers that are killed when the population is looked at for the first time in a command."""
    pids = []

    class Evolves(population.Evolves):
        def _look(self, trials):
            if not pids:
                for process in psutil.Process().children(recursive=True):
                    if process.is_running() and process.name().startswith("ray::Trial"):
                        pids.append(process.pid)
                        process.kill()
            super()._look(trials)

    monkeypatch.setattr(population, "Evolves", Evolves)
    return pids


@pytest.mark.ray
@pytest.mark.long
def test_bad_members_go_on_as_copies_of_good_ones(tmp_path, ray_cluster, killed):
    config = toy_sweep(
        tmp_path,
        space={"lr": {"log": [1e-9, 1e-2]}, "weight_decay": {"uniform": [0, 1]}},
        metric="train/lm_loss",
        train={"max_steps": 24, "epochs": 30, "eval_interval_steps": 24, "log_interval": 4},
        try_first=[{"lr": lr} for lr in (1e-9, 1e-2, 8e-3, 6e-3)],
        population={"interval": 8, "resample": 0.0},
        pruner=None,
        num_trials=4,
    )
    view, folder = Interrupts(), sweep_folder(config)
    first = run_sweep(config, view=view)
    assert view.did and first.stopped_by == signal.SIGTERM and first.summary["states"]["RUNNING"] == 4
    before = {t.number: lineage.history(t) for t in opened(folder).trials()}
    assert [move["step"] for move in before[0]] == [8] and before[0][0]["from_trial"] != 0

    assert killed

    result = run_sweep(config)
    assert result.summary["states"] == {"COMPLETE": 4, "PRUNED": 0, "FAIL": 0, "RUNNING": 0}
    study = opened(folder)
    moved = 0
    for trial in study.trials():
        moves, run = lineage.history(trial), folder / trial_name(trial.number)
        assert moves[: len(before[trial.number])] == before[trial.number]
        moved += len(moves)
        assert sorted(study.seen(trial)) == [4, 8, 12, 16, 20, 24]
        points = [{"step": 0, "from_step": 0, "point": trial.params}, *moves]
        for report in reports_of(run):
            if "train/lr" in report:
                step = report["global_step"]
                point = next(move["point"] for move in reversed(points) if move["from_step"] < step)
                assert report["train/lr"] == pytest.approx(point["lr"] * min(1, step / 4))
        (row,) = [row for row in result.trials if row["number"] == trial.number]
        assert row["lr"] == points[-1]["point"]["lr"] and row["steps"] == 24
        assert json.loads(row["history"]) == moves
        assert f"lr={as_text(row['lr'])} " in row["words"]
        assert (run / FOLDER / step_name(24)).exists() and not (run / lineage.TAKEN).exists()
    assert moved == 2
    for step in (8, 16):  # the worst goes on from the best, whatever came between
        scores = {trial.number: study.seen(trial)[step] for trial in study.trials()}
        moves = {t.number: m for t in study.trials() for m in lineage.history(t) if m["step"] == step}
        assert list(moves) == [max(scores, key=scores.get)]
        assert [move["from_trial"] for move in moves.values()] == [min(scores, key=scores.get)]
    best = yaml.safe_load(folder.read("best.yaml"))
    assert best.get("history", []) == lineage.history(study.trials()[best["number"]])
    # The copy learns as its source did, with a learning rate near the other's.
    (move,) = before[0]
    assert move["point"]["lr"] > 1e-3
