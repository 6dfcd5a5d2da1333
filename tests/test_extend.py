"""What docs/extend.md shows works as it stands: a model of one module and one YAML, and token arrays of one's own."""

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
    """A copy of the package with the two files of the page in it, and data."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(Path(hrm_ray.__file__).parent, folder / "hrm_ray")
    for kind, file in (("python", "models/gated.py"), ("yaml", "config/arch/gated.yaml")):
        assert f"`hrm_ray/{file}`" in PAGE
        (folder / "hrm_ray" / file).write_text(code_in("## A model", kind))
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


def test_token_arrays_of_ones_own_become_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(code_in("### Token arrays", "python"), {})
    assert main(["data", "import-npy", "reverse-npy", "out=data/reverse"]) == 0
    assert capsys.readouterr().out == "data/reverse: train 5,000, test 200 examples\n"
    dataset = open_dataset("data/reverse")
    assert dataset.manifest.task == "tokens"
    rows = dataset.split("test").rows(np.arange(200))
    np.testing.assert_array_equal(rows["inputs"][:, ::-1], rows["labels"])
