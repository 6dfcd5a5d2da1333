"""The command that draws the figure of grokking."""

import json
import re

import pytest

from hrm_ray.cli import main
from hrm_ray.grokking.history import FILE


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder, name: str, jump: int, **values) -> str:
    steps = [0, *range(10, 210, 10)]
    lists = {
        "epoch": steps,
        "train_loss": [0.1] * 21,
        "train_acc": [float(step >= 40) for step in steps],
        "test_loss": [None, 0.0, *[2.0] * 19],
        "test_acc": [float(step >= jump) for step in steps],
        "step": steps,
    }
    (folder / name).mkdir()
    (folder / name / FILE).write_text(json.dumps(lists | values))
    return name


def test_runs_beside_each_other_and_what_came_of_them(folder, capsys):
    made = [run(folder, "late", 150), run(folder, "never", 1000, step=None) + f"/{FILE}"]
    assert main(["plot", "grokking", *made, "out=both.svg", "chance=0.01"]) == 0
    late, never, out = capsys.readouterr().out.splitlines()
    assert late == (
        "late: grokked at step 150: validation passed 99 % there, 110 steps after training (step 40), when it was at "
        "0.00 %"
    )
    assert never.startswith(
        "never: memorised only: training passed 99 % at epoch 40, validation stayed at chance"
    )
    assert out == "both.svg"
    svg = (folder / "both.svg").read_text()
    for text in ("late, training: 99 % at step 40", "late, validation: 99 % at step 150", "chance 1.00%"):
        assert text in svg, text
    assert "never, validation: 99 % never" in svg and svg.count("steps or epochs") == 2
    assert len(re.findall(r'<g id="axes_\d+">', svg)) == 4


def test_one_run_as_png(folder):
    assert main(["plot", "grokking", run(folder, "a$b", 40)]) == 0
    assert (folder / "grokking.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_are_called_by_their_paths(folder, capsys):
    for parent in ("one", "two"):
        (folder / parent).mkdir()
        run(folder / parent, "seed-0", 150)
    assert main(["plot", "grokking", "one/seed-0", "two/seed-0", "out=x.pdf"]) == 0
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["one/seed-0", "two/seed-0", "x.pdf"]


CURVES = ("train_acc", "test_acc", "train_loss", "test_loss")


@pytest.mark.parametrize(
    "values",
    [
        {"train_loss": [None] * 21, "test_loss": [None] * 21},
        {"train_loss": [0.0] * 21, "test_loss": [0.0] * 21},
        {"epoch": [0], "step": [0], **{name: [0.5] for name in CURVES}},
        {"epoch": [0], "step": [0], **{name: [1.0] for name in CURVES}},
        {name: [None] * 21 for name in CURVES},
    ],
)
@pytest.mark.filterwarnings("error")
def test_whatever_a_history_lacks_is_not_drawn(folder, values):
    assert main(["plot", "grokking", run(folder, "late", 150, **values)]) == 0
    assert (folder / "grokking.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["late", "out=x.jpg"], "plot: out=x.jpg: end the name of the plot in one of .png, .svg, .pdf"),
        (["late", "out=nowhere/x.png"], "out=nowhere/x.png: there is no folder nowhere"),
        (["late", "out=folder.png"], "out=folder.png is a folder; give a file"),
        (["late", "out=mine.png"], "out=mine.png is there, and no plot; move it away"),
        (["late", "out=/proc/x.png"], "cannot write to /proc/x.png: "),
        (["nowhere"], "nowhere: no such run; give a run folder"),
        (
            ["s3://bucket/runs/x"],
            "s3://bucket/runs/x: plot reads local folders; copy metrics.jsonl and training_",
        ),
        (["out=x.png"], "hrm-ray plot grokking needs a run"),
        (["late", "percent=maybe"], "plot: percent='maybe': give true or false"),
        (["late", "chance=1.5"], "plot: chance=1.5"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, words, said):
    run(folder, "late", 150)
    (folder / "folder.png").mkdir()
    (folder / "mine.png").write_text("mine")
    assert main(["plot", "grokking", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {said}") and printed.err.count("\n") == 1 and not printed.out
