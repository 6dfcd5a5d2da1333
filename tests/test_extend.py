"""What docs/extend.md shows works as it stands: a model of one module and one YAML, a task, token arrays."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hrm_ray
from hrm_ray.cli import main
from hrm_ray.data.shards import open_dataset
from tests.toy import toy_dataset

PAGE = (Path(__file__).parents[1] / "docs" / "extend.md").read_text()


def code_in(heading: str, kind: str) -> str:
    """The one block of code of a kind under a heading of the page."""
    level = heading.partition(" ")[0]
    section = re.split(rf"\n#{{1,{len(level)}}} ", PAGE.partition(f"{heading}\n")[2])[0]
    (code,) = re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)
    return code


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the package with the models' and the way of halting's files of the page in it, and data."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(Path(hrm_ray.__file__).parent, folder / "hrm_ray")
    for heading, module, values in (
        ("## A model", "models/gated.py", "config/arch/gated.yaml"),
        ("## A way of halting", "halting/sure.py", "config/halting/sure.yaml"),
    ):
        for kind, file in (("python", module), ("yaml", values)):
            assert f"`hrm_ray/{file}`" in PAGE
            (folder / "hrm_ray" / file).write_text(code_in(heading, kind))
    toy_dataset(folder / "data")
    return folder


def command(tree: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hrm_ray.cli", *words],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )


ARCH = {"hidden_size": 32, "num_heads": 2, "num_layers": 1, "puzzle_emb_ndim": 0, "halt_max_steps": 4}
RUN = {
    "data": "data",
    "global_batch_size": 8,
    "epochs": 3,
    "lr_warmup_steps": 4,
    "lr": 1e-3,
    "scaling": "local",
}
WORDS = ["train", "arch=gated", "tensorboard=false", *(f"arch.{key}={value}" for key, value in ARCH.items())]
WORDS += [f"{key}={value}" for key, value in RUN.items()]


@pytest.mark.parametrize(("halting", "dtype"), [("act", "float32"), ("q_learning", "bfloat16")])
def test_it_trains_resumes_and_is_evaluated(tree, halting, dtype):
    words = [*WORDS, f"halting={halting}", f"run_name={halting}", f"forward_dtype={dtype}"]
    for more in (["max_steps=9"], []):
        done = command(tree, *words, *more)
        assert done.returncode == 0, done.stderr
    records = [
        json.loads(line) for line in (tree / "runs" / halting / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [r["train/loss"] for r in records if "train/loss" in r]
    assert losses[-1] < losses[0]
    assert records[-1]["global_step"] == 24
    assert "cycles: 4" in (tree / "runs" / halting / "config.yaml").read_text()
    evaluated = command(tree, "eval", f"runs/{halting}", "data=data", "halt=learned", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert 1 <= json.loads(evaluated.stdout)["eval/steps"] <= 4


def test_a_way_of_halting_is_one_module_and_one_yaml(tree):
    words = [*WORDS, "halting=sure", "run_name=sure", "max_steps=4"]
    assert command(tree, *words, "halting.threshold=0.001").returncode == 0
    evaluated = command(tree, "eval", "runs/sure", "data=data", "halt=learned", "--json")
    assert json.loads(evaluated.stdout)["eval/steps"] == 1, evaluated.stderr
    done = command(tree, *WORDS, "halting.threshold=0.5")
    assert "halting.threshold has no effect with halting=act; it is of halting=sure" in done.stderr
    done = command(tree, *words, "halting.threshold=1")
    assert done.returncode == 2 and "halting.threshold=1" in done.stderr


def test_its_keys_are_checked_as_all_others(tree):
    done = command(tree, *WORDS, "arch.cycels=3")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown key 'arch.cycels'; did you mean 'arch.cycles'?"


def test_a_run_whose_architecture_is_gone_says_so(tree):
    done = command(tree, *WORDS, "run_name=orphan", "max_steps=1")
    assert done.returncode == 0, done.stderr
    for file in ("models/gated.py", "config/arch/gated.yaml"):
        (tree / "hrm_ray" / file).rename(tree / Path(file).name)
    try:
        others = [word for word in WORDS if not word.startswith("arch")]
        for words in (["eval", "runs/orphan", "data=data"], [*others, "run_name=orphan"]):
            done = command(tree, *words)
            assert done.returncode == 2
            assert done.stderr.startswith("error: arch.name=gated is unknown; ")
    finally:
        for file in ("models/gated.py", "config/arch/gated.yaml"):
            (tree / Path(file).name).rename(tree / "hrm_ray" / file)


TASK = "### A task in one file"


@pytest.fixture(scope="module")
def latin(tmp_path_factory) -> Path:
    """A folder with the task of the page and its data set."""
    folder = tmp_path_factory.mktemp("latin")
    (folder / "my_puzzles").mkdir()
    (folder / "my_puzzles" / "latin.py").write_text(code_in(TASK, "python"))
    (folder / "latin.yaml").write_text(code_in(TASK, "yaml"))
    done = run_in(
        folder, "data", "build", "recipe=latin.yaml", "num_train=60", "num_test=20", "out=data/latin"
    )
    assert done.returncode == 0, done.stderr
    return folder


def run_in(folder: Path, *words: str, trusts: bool = True) -> subprocess.CompletedProcess:
    """A command where the package is that of the tests, and the task is found by PYTHONPATH."""
    paths = f"{folder}{os.pathsep}{Path(hrm_ray.__file__).parents[1]}"
    return subprocess.run(
        [sys.executable, "-m", "hrm_ray.cli", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths} | ({"HRM_RAY_TASKS": "my_puzzles"} if trusts else {}),
        capture_output=True,
        text=True,
    )


@pytest.mark.ray
def test_a_task_of_ones_own_is_built_and_verified(latin):
    assert len([line for line in code_in(TASK, "python").splitlines() if line]) <= 75
    dataset = json.loads((latin / "data" / "latin" / "manifest.json").read_text())
    assert (dataset["task"], dataset["task_options"]) == ("my_puzzles.latin", {"size": 4})
    info = dataset["splits"]["train"]
    assert (info["num_groups"], dataset["splits"]["test"]["num_examples"]) == (60, 20)
    assert 60 < info["num_examples"] <= 120
    done = run_in(latin, "data", "verify", "data/latin")  # is_solution, of every row
    assert done.returncode == 0, done.stderr
    done = run_in(latin, "data", "info", "data/latin", trusts=False)
    assert done.returncode == 2 and "set HRM_RAY_TASKS=my_puzzles" in done.stderr, done.stderr


@pytest.mark.ray
def test_a_task_of_ones_own_trains_is_evaluated_and_solves(latin):
    small = [word for word in WORDS if not word.startswith(("arch=", "data="))]
    small = [word.replace("arch.num_layers=1", "arch.H_layers=1") for word in small]
    done = run_in(latin, *small, "data=data/latin", "run_name=latin", "max_steps=2")
    assert done.returncode == 0, done.stderr
    evaluated = run_in(latin, "eval", "runs/latin", "data=data/latin", "votes=4", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert 0 <= json.loads(evaluated.stdout)["eval/accuracy"] <= 1
    solved = run_in(latin, "solve", "runs/latin", "12..34..21..43..", "votes=4", "--json")
    assert solved.returncode == 0, solved.stderr
    solution = json.loads(solved.stdout)
    assert solution["puzzle"] == "12..34..21..43.." and solution["valid"] in (True, False)
    refused = run_in(latin, "solve", "runs/latin", "12..34..21..43..", "votes=5")
    assert (refused.returncode, refused.stderr) == (2, "error: votes=5: only 4 ways to shift the symbols\n")


@pytest.mark.ray
def test_a_task_of_ones_own_reads_files(latin):
    rows = ["question,answer", "1...,1221", ".2..,1221", "...2,2112"]
    words = ["data", "build", "recipe=latin.yaml", "source=puzzles.csv", "size=2", "num_train=null"]
    for wrong, said in (
        ("1...,2112", "answer: it does not solve the question"),
        ("1..x,1221", "question: a square is 4 characters of .12"),
        ("....,", "it has no answer"),
    ):
        (latin / "puzzles.csv").write_text("\n".join([*rows, wrong]) + "\n")
        done = run_in(latin, *words, "num_test=0", "out=data/files")
        assert done.returncode == 2 and f"puzzles.csv, line 5: {said}; mend it" in done.stderr, done.stderr
    (latin / "puzzles.csv").write_text("\n".join(rows) + "\n")
    done = run_in(latin, *words, "num_test=1", "out=data/files")
    assert (done.returncode, done.stdout) == (0, "data/files: train 4, test 1 examples\n"), done.stderr


def test_token_arrays_of_ones_own_become_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(code_in("### Token arrays", "python"), {})
    assert main(["data", "import-npy", "reverse-npy", "out=data/reverse"]) == 0
    assert capsys.readouterr().out == "data/reverse: train 5,000, test 200 examples\n"
    dataset = open_dataset("data/reverse")
    assert dataset.manifest.task == "tokens"
    rows = dataset.split("test").rows(np.arange(200))
    np.testing.assert_array_equal(rows["inputs"][:, ::-1], rows["labels"])
