"""`hrm-ray tune` and its verbs, and the same as a library."""

import json

import pytest
import yaml

import hrm_ray
from hrm_ray.cli import main
from hrm_ray.errors import UserError
from hrm_ray.tuning.config import plain
from tests.tuning.toy_sweep import toy_sweep, words


@pytest.fixture
def sweep(tmp_path, ray_cluster):
    """The file of a sweep of two trials, and the folder in which it will lie."""
    config = toy_sweep(tmp_path, num_trials=2, train={"max_steps": 10, "epochs": 5}, pruner=None)
    file = tmp_path / "toy.yaml"
    file.write_text(
        yaml.safe_dump({**{k: v for k, v in plain(config).items() if v is not None}, "pruner": "none"})
    )
    return str(file), str(tmp_path / "sweeps" / "toy")


@pytest.mark.ray
def test_the_life_of_a_sweep(sweep, capsys, ray_cluster):
    file, folder = sweep
    assert main(["tune", file]) == 0
    told = capsys.readouterr()
    assert "takes   about" in told.err and "trial 1 complete: accuracy" in told.err
    assert "2 of 2 trials: 2 complete" in told.out and "hrm-ray train data=" in told.out

    assert main(["tune", "status", folder]) == 0
    assert "toy (not running): 2 of 2 trials: 2 complete" in capsys.readouterr().out
    assert main(["tune", "status", folder, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (
        status["finished"] and not status["is_running"] and [t["number"] for t in status["trials"]] == [0, 1]
    )

    assert main(["tune", "set", folder, "num_trials=3", "budget.wall_hours=1"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"]["wall_hours"] == 1
    assert main(["tune", file, "--json"]) == 0  # holds for the next command
    assert json.loads(capsys.readouterr().out)["states"]["COMPLETE"] == 3
    assert main(["tune", file, "num_trials=4", "--json"]) == 0  # what more trials take is said again
    told = capsys.readouterr()
    assert "takes   about" in told.err and json.loads(told.out)["estimate"]["num_trials"] == 4

    assert main(["tune", "stop", folder]) == 0
    assert "nothing is at work on" in capsys.readouterr().out
    assert main(["tune", "stop", folder, "1"]) == 2
    assert "trial 1 of" in (err := capsys.readouterr().err) and "is not running; running: none" in err
    assert main(["tune", "report", folder]) == 0
    page = capsys.readouterr().out.strip()
    assert page == f"{folder}/index.html" and "<html" in open(page).read()  # noqa: SIM115, PTH123

    assert main(["tune", "promote", folder, "seeds=2", "max_steps=12", "--json"]) == 0
    promoted = json.loads(capsys.readouterr().out)
    assert len(promoted["values"]) == 2 and promoted["runs"][0].startswith(f"{folder}/promoted-000")
    assert hrm_ray.load(promoted["runs"][1]).checkpoint.manifest.config["seed"] == 1

    assert main(["tune", file, "num_trials=1", "max_steps=5", "--new-name"]) == 0
    assert "toy-2: 1 of 1 trials" in capsys.readouterr().out
    assert main(["tune", file, "--dry-run"]) == 0
    assert main(["tune", file, "max_steps=5"]) == 2
    assert "is a sweep with train = " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sudoku_4x4"], "unknown sweep 'sudoku_4x4'; did you mean 'sudoku_4x4_lr'?"),
        (["sudoku_4x4_lr", "num_trials=none"], "num_trials=none: "),
        (["sudoku_4x4_lr", "lrr=1"], "unknown key 'lrr'"),
        (["status"], "hrm-ray tune status needs the folder of a sweep"),
        (["status", "/nowhere"], "/nowhere is not a sweep (it has no sweep.yaml)"),
        (["stop", "/nowhere", "one"], "'one' is no number of a trial"),
        (["stop", "/nowhere", "²"], "'²' is no number of a trial"),
        (["set", "/nowhere"], "needs key=value; keys: num_trials, max_concurrent, budget"),
        (["promote", "/nowhere", "seeds=0"], "seeds=0: "),
        (["report", "/nowhere"], "/nowhere is not a sweep"),
        (["stop", "/nowhere", "--dry-run"], "hrm-ray tune stop does not know --dry-run; leave it out"),
        (["status", "/nowhere", "/else"], "takes the folder of one sweep; leave out '/else'"),
    ],
)
def test_a_mistake_is_one_line(command, message, capsys):
    assert main(["tune", *command]) == 2
    told = capsys.readouterr()
    assert (
        message in told.err and told.err.startswith("error: ") and told.err.count("\n") == 1 and not told.out
    )


def test_storage_that_cannot_be_written_is_one_line(tmp_path, capsys):
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in plain(toy_sweep(tmp_path)).items() if v is not None}))
    assert main(["tune", str(file), "storage=/dev/null/sweeps"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: cannot write to /dev/null/sweeps/toy: ") and told.count("\n") == 1


@pytest.mark.ray
def test_the_library_trains_and_tunes(tmp_path, ray_cluster):
    config = toy_sweep(tmp_path)
    trained = hrm_ray.train(
        words(tmp_path / "data"), scaling="local", storage=tmp_path / "runs", max_steps=5, lr=1e-3
    )
    assert trained.summary["global_step"] == 5 and trained.folder.name == "train"
    result = hrm_ray.tune(
        {"train": list(config.train), "space": {"lr": [1e-3]}, "metric": "eval/accuracy"},
        num_trials=1,
        storage=tmp_path / "sweeps",
        run_name="mine",
        **{"max_steps": 5, "pruner": "none"},
    )
    assert result.folder.name == "mine" and result.best["params"] == {"lr": 1e-3}
    assert result.trials[0]["steps"] == 5 and result.stopped_by is None
    with pytest.raises(UserError, match="give words with a name"):
        hrm_ray.tune(config, num_trials=3)
    with pytest.raises(UserError, match="unknown key 'max_step'; did you mean 'max_steps'"):
        hrm_ray.train("experiment=sudoku_4x4", max_step=3)
