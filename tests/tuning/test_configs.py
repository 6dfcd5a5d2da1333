"""The sweeps that ship: each is what its file says, and every key of a sweep is checked before it starts."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hrm_ray.config.compose import train_config
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
from hrm_ray.errors import UserError
from hrm_ray.tuning.config import load_sweep, sweep_config, sweep_folders, sweep_names
from hrm_ray.tuning.outline import Outline
from hrm_ray.tuning.points import Points, checked, value_of
from hrm_ray.tuning.study import grid_of, num_trials_of
from tests.own_task import Own
from tests.toy import toy_dataset

SHIPPED = ("architectures", "grokking", "lr_wd_anneal", "maze_unique", "multi_objective", "pbt", "seeds")
SHIPPED += ("sudoku_4x4_lr",)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Small ones of the data sets that the sweeps name."""
    folder = tmp_path_factory.mktemp("data")
    found = {}
    for size in (4, 6):
        toy_dataset(folder / str(size), num_train=12_000, num_test=300, vocab_size=size + 1, seq_len=size**2)
        found[f"data/sudoku-{size}x{size}"] = folder / str(size)
    found["data/maze-unique"] = folder / "maze"
    toy_dataset(found["data/maze-unique"], num_train=10_000, num_test=300, seq_len=36)
    build(load_recipe("modular", {"op": "-"}), folder / "modular", show_progress=False)
    for operator, share in itertools.product(("minus", "divide", "plus"), (0.3, 0.4, 0.5, 0.6)):
        found[f"data/modular/{operator}-{share}"] = folder / "modular"
    return found


def test_these_are_all():
    assert sweep_names() == list(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_sweep_that_ships_can_start(name, data, monkeypatch):
    """All points that are tried compose, and the pruner has rungs to look at."""
    config = load_sweep(name)
    assert config.run_name == name
    monkeypatch.setattr(Points, "_dataset", lambda self, path: _opened(data[path]))
    outline = Outline.of(config)
    assert not outline.refused
    if config.prunes:
        assert len(outline.rungs) > 1 or config.prunes["name"] != "successive_halving"
        assert outline.first_step < outline.last_step
    text = (sweep_folders()[0] / f"{name}.yaml").read_text()
    assert text.startswith("# ") and f"#   hrm-ray tune {name}" in text


def _opened(folder: Path):
    from hrm_ray.data.shards import open_dataset

    return open_dataset(folder)


def test_the_shortest_sweep_is_a_few_lines(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: experiment=sudoku_4x4\nspace:\n  lr: {log: [1e-4, 1e-2]}\n")
    config = load_sweep(str(file))
    assert (config.run_name, config.metric) == ("mine", {"eval/exact_accuracy": "maximize"})
    assert (config.sampler["name"], config.prunes["name"], num_trials_of(config)) == (
        "tpe",
        "successive_halving",
        20,
    )


def test_words_change_the_sweep_or_all_its_trials():
    words = [
        "storage=DIR",
        "run_name=s",
        "num_trials=6",
        "max_steps=60",
        "sampler.seed=3",
        "budget.cpu_hours=2",
    ]
    config = load_sweep("sudoku_4x4_lr", [*words, "space.weight_decay={uniform: [0, 1]}", "epochs=3"])
    assert (config.storage, config.run_name, config.num_trials) == ("DIR", "s", 6)
    assert config.sampler == {"name": "tpe", "seed": 3} and config.budget.cpu_hours == 2
    assert config.train[-2:] == ("num_eval_examples=256", "max_steps=60") and "epochs=3" in config.train
    assert "epochs=4" not in config.train  # said again, it holds
    assert list(config.space) == ["lr", "weight_decay"]
    assert load_sweep("sudoku_4x4_lr", ["pruner=median"]).pruner == {"name": "median"}
    assert load_sweep("sudoku_4x4_lr", ["pruner=none"]).pruner is None


def test_a_grid_has_as_many_trials_as_points():
    config = load_sweep("seeds")
    assert grid_of(config) == {"seed": list(range(8))} and num_trials_of(config) == 8
    assert num_trials_of(load_sweep("seeds", ["num_trials=3"])) == 3
    assert num_trials_of(load_sweep("seeds", ["num_trials=30"])) == 8


BASE = {"train": "experiment=sudoku_4x4", "space": {"lr": {"log": [1e-4, 1e-2]}}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"metric": "eval/exact"},
            "a sweep cannot be judged by metric 'eval/exact'; did you mean 'eval/exact_accuracy'",
        ),
        ({"metric": {"eval/accuracy": "up"}}, "metric.eval/accuracy='up': "),
        ({"metric": []}, "metric: is empty"),
        (
            {"metric": ["eval/accuracy", "eval/steps"], "pruner": "median"},
            "pruner: median works with one metric only",
        ),
        ({"metric": ["eval/accuracy", "eval/steps"], "repeat": {}}, "repeat: is for one metric"),
        (
            {"pruner": {"name": "median", "metric": "train_s"}},
            "metric train_s is known at the end of a run only",
        ),
        ({"pruner": {"name": "median", "metric": "x"}}, "pruner: a sweep cannot be judged by metric 'x'"),
        ({"num_trial": 3}, "unknown key 'num_trial'; did you mean 'num_trials'"),
        ({"num_trials": 0}, "num_trials=0: input should be greater than 0"),
        ({"num_trials": "many"}, "num_trials='many'"),
        ({"resources": {"cpu": 1}}, "unknown key 'resources.cpu'; did you mean 'resources.cpus'"),
        (
            {"resources": {"num_workers": 2, "gpus": 0.5}},
            "several workers have a whole GPU each, or none; give 0 or 1",
        ),
        ({"budget": {"hours": 1}}, "unknown key 'budget.hours'"),
        ({"run_name": "a/b"}, "run_name=a/b must be a plain folder name"),
        ({"study": "postgresql://me:secret@host/db"}, "keep the password out of the address"),
        ({"keep": "best"}, "keep"),
        ({"train": None}, "train"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_line(values, message):
    with pytest.raises(UserError, match=message) as info:
        sweep_config({**BASE, **values})
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: [", "is no valid YAML"),
        ("- a\n- b\n", "is not a sweep: it needs 'train:' and 'space:'"),
        ("lr: 3\n", "is not a sweep: it needs 'train:' and 'space:'"),
        ("", "is not a sweep"),
        ("space: {lr: [1, 2]}\n", "'train' is not given"),
    ],
)
def test_a_file_that_is_no_sweep(tmp_path, content, message):
    file = tmp_path / "s.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        load_sweep(str(file))


def test_a_sweep_that_is_not_there():
    with pytest.raises(UserError, match="unknown sweep 'sudoku_4x4'; did you mean 'sudoku_4x4_lr'"):
        load_sweep("sudoku_4x4")
    with pytest.raises(UserError, match=r"sweep file no\.yaml does not exist"):
        load_sweep("no.yaml")


@pytest.mark.parametrize(
    ("train", "space", "message"),
    [
        ("experiment=sudoku_4x4", {"irr": [1]}, "space: unknown key 'irr'"),
        (
            "experiment=sudoku_4x4",
            {"arch.H_cycle": [1]},
            "unknown key 'arch.H_cycle'; did you mean 'arch.H_cycles'",
        ),
        ("experiment=sudoku_4x4 weight_decy=1", {"lr": [1]}, "train: unknown key 'weight_decy'"),
        ("experiment=sudoku_4x4 lr=1", {"lr": [1]}, "lr is among the words of train: and in the space"),
        (
            "experiment=sudoku_4x4 scaling=local",
            {"lr": [1]},
            "scaling is set by the sweep; give resources.num_workers",
        ),
        ("experiment=sudoku_4x4 run_name=a", {"lr": [1]}, "run_name is set by the sweep"),
        ("experiment=sudoku_4x4", {"storage": ["a", "b"]}, "storage is set by the sweep"),
        (
            "experiment=sudoku_4x4",
            {"lr": [-1, 0]},
            "every point of the space is refused, the first since: .*lr=-1",
        ),
        ("experiment=sudoku_4x4", {"H": [1]}, "unknown key 'H'"),
        ("experiment=quickstar", {"lr": [1]}, "every point .*unknown experiment 'quickstar'"),
        (
            "experiment=sudoku_4x4",
            {"q_temperature_anneal_ratio": [0.5]},
            "every point .* has no effect with halting=act; it is of halting=q_learning",
        ),
        (
            "experiment=sudoku_4x4 arch.num_heads=5",
            {"arch.hidden_size": [64, 128]},
            "every point .*is not a multiple of arch.num_heads=5",
        ),
        (
            "experiment=sudoku_4x4 curriculum.filled=[0.7,0.5]",
            {"lr": [1]},
            "every point .*: an answer of task tokens is not its question with cells filled in",
        ),
    ],
)
def test_points_are_checked_against_the_configuration_before_anything_starts(
    train, space, message, data, monkeypatch
):
    monkeypatch.setattr(Points, "_dataset", lambda self, path: _opened(data[path]))
    with pytest.raises(UserError, match=message):
        checked(Points(sweep_config({"train": train, "space": space})))


def test_a_model_that_does_not_fit_the_puzzles_is_a_point_that_is_refused(tmp_path):
    toy_dataset(tmp_path / "data", num_train=400, seq_len=10)
    train = f"experiment=sudoku_4x4 data={tmp_path / 'data'} lr_warmup_ratio=0.1"
    config = sweep_config({"train": train, "space": {"arch.pos_encodings": ["learned", "grid"]}})
    for point, run in checked(Points(config)):
        is_grid = point["arch.pos_encodings"] == "grid"
        assert isinstance(run, str) == is_grid
        assert not is_grid or "nothing says how the 10 cells of these puzzles lie in rows" in run


def test_a_metric_that_nobody_reports_is_said_before_anything_starts(tmp_path):
    build(load_recipe("sudoku_4x4", {"num_train": 20, "num_test": 0, "num_aug": 0}), str(tmp_path / "d"))
    train = f"experiment=sudoku_4x4 data={tmp_path / 'd'} lr_warmup_ratio=0.1"
    with pytest.raises(UserError, match=r"eval/exact_accuracy is never reported: .* has no test part"):
        checked(Points(sweep_config({**BASE, "train": train})))
    found = checked(Points(sweep_config({**BASE, "train": train, "metric": "train/lm_loss"})))
    assert all(isinstance(run, TrainConfig) for _, run in found)


OWN = """
import sys
from hrm_ray.errors import UserError
from hrm_ray.tuning.config import sweep_config
from hrm_ray.tuning.points import Points, checked
values = {"train": f"experiment=sudoku_4x4 data={sys.argv[1]} lr_warmup_ratio=0.1", "space": {"lr": [1e-3, 1e-2]}}
for more in ({"metric": "eval/last_wrong"}, {"metric": {"eval/last_right": "auto"}},
             {"pruner": {"name": "median", "metric": "eval/last_wrong"}}, {"metric": "eval/last_wrnog"},
             {"metric": {"eval/last_wrnog": "min"}}, {"metric": "eval/answered"}):
    try:
        config = sweep_config({**values, **more})
        checked(Points(config))
        print(config.metric, config.watched_direction, Points(config)._best_metric)
    except UserError as error:
        print(error)
"""


def test_a_metric_may_be_of_a_task_of_ones_own(tmp_path, monkeypatch):
    """In a process of its own, which has not imported the task."""
    monkeypatch.setenv("HRM_RAY_TASKS", "tests")
    toy_dataset(tmp_path / "data", num_train=400, kind=Own)
    data = str(tmp_path / "data")

    def said(**environment: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", OWN, data],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    alone, another, watched, misspelt, told, not_in_training = said()
    assert alone == "{'eval/last_wrong': 'minimize'} minimize None"
    assert another == "{'eval/last_right': 'maximize'} maximize eval/last_right"
    assert watched == "{'eval/exact_accuracy': 'maximize'} minimize eval/exact_accuracy"
    assert "a sweep cannot be judged by metric 'eval/last_wrnog'; did you mean 'eval/last_wrong'?" in misspelt
    assert "metric eval/last_wrnog is not reported for task tests.own_task; did you mean" in told
    assert "metric eval/answered is not reported for task tests.own_task" in not_in_training
    untrusted = said(HRM_RAY_TASKS="")[0]
    assert (
        "a sweep cannot be judged by metric 'eval/last_wrong'" in untrusted
        and "set HRM_RAY_TASKS=tests" in untrusted
    )


def test_the_value_of_a_trial_is_that_of_its_best_checkpoint():
    summary = {
        "best": {"eval/accuracy": 0.9},
        "final": {"eval/accuracy": 0.8, "train/loss": 1.5},
        "num_params": 7,
    }
    found = [value_of(summary, name) for name in ("eval/accuracy", "train/loss", "num_params", "eval/steps")]
    assert found == [0.9, 1.5, 7, None]
    assert value_of({"best": {}, "final": {}}, "eval/accuracy") is None


def test_words_of_a_trial_can_be_typed():
    """Also where a key of its point has no effect beside another."""
    config = sweep_config({"train": "data=d", "space": {"ema": [True, False], "ema_rate": [0.9, 0.99]}})
    for ema in (True, False):
        words = Points(config).words({"ema": ema, "ema_rate": 0.99})
        assert ("ema_rate=0.99" in words) == ema
        train_config(words, by_hand=True)


def test_words_of_a_trial_name_everything_that_its_run_depends_on():
    config = sweep_config({**BASE, "resources": {"cpus": 2}})
    assert Points(config).words({"lr": 0.003}) == [
        "experiment=sudoku_4x4",
        "lr=0.003",
        "best_metric=eval/exact_accuracy",
        "scaling.num_workers=1",
        "scaling.cpus_per_worker=2",
        "scaling.use_gpu=false",
    ]
    assert yaml.safe_load("a: 1") == {"a": 1}
