"""`hrm-ray vote`: what it prints and writes, and what it says of files that are not what they should be."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hrm_ray.cli import main
from hrm_ray.data.tasks.arc import place
from hrm_ray.evaluation import saved_outputs
from tests.evaluation.test_votes import GOLDEN, published

QUESTION, ANSWER, OTHER = (np.array(rows) for rows in ([[1, 2]], [[3], [4]], [[5]]))


def arrays(num_rows: int = 3) -> dict[str, np.ndarray]:
    """Saved outputs: of three rows two give the solution, without an augmentation."""
    answers = [ANSWER, OTHER, ANSWER] * num_rows
    return {
        "inputs": np.stack([place(QUESTION)] * num_rows),
        "preds": np.stack([place(answer) for answer in answers[:num_rows]]),
        "puzzle_identifiers": np.ones(num_rows, np.int32),
        "q_halt_logits": np.zeros(num_rows, np.float32),
    }


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with `outputs.npz` and the two files of a data set in `data`; the working directory."""
    monkeypatch.chdir(tmp_path)
    data = Path("data")
    data.mkdir()
    pairs = [{"input": QUESTION.tolist(), "output": ANSWER.tolist()}]
    (data / "identifiers.json").write_text(json.dumps(["<blank>", "a"]))
    (data / "test_puzzles.json").write_text(json.dumps({"a": {"train": [], "test": pairs}}))
    np.savez("outputs.npz", **arrays())
    return tmp_path


def said(capsys, *words: str) -> str:
    """The one line on standard error of a command that is refused."""
    assert main(["vote", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_published_outputs_give_the_published_numbers(tmp_path, capsys):
    file = tmp_path / "submission.json"
    words = [str(GOLDEN / "pass1.npz"), str(GOLDEN / "pass2.npz"), f"data={GOLDEN}", f"submission={file}"]
    for _ in range(2):  # an earlier submission is replaced
        assert main(["vote", *words, "--json"]) == 0
        out, err = capsys.readouterr()
        found, expected = json.loads(out), published()["metrics"]["two_passes_aggregated"]
        assert {
            key.replace("ARC", "eval"): value for key, value in expected.items() if "@" in key
        }.items() <= found.items()
        assert 0 < found["eval/row_accuracy"] < 1 and "eval/hrm_pass@1000" in found and err == ""
        assert json.loads(file.read_text()) == published()["submissions"]["two_passes_aggregated"]
        assert list(tmp_path.iterdir()) == [file]


def test_people_read_lines_and_what_they_must_know(capsys):
    assert main(["vote", str(GOLDEN / "pass1.npz"), f"data={GOLDEN}"]) == 0
    out, err = capsys.readouterr()
    lines = dict(line.split() for line in out.splitlines())
    assert (lines["eval/pass@2"], lines["eval/hrm_pass@2"]) == ("0.4762", "0.1429") and len(lines) == 13
    assert "note: 1 of 21 test pairs have no prediction; a submission holds [[0]] in their places\n" in err


@pytest.mark.parametrize("at_once", [1, 2, 3, 1000])
def test_a_file_is_read_in_parts(here, capsys, monkeypatch, at_once):
    monkeypatch.setattr(saved_outputs, "_AT_ONCE", at_once)
    assert main(["vote", "outputs.npz", "data=data", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["eval/pass@1"] == found["eval/hrm_pass@1"] == 1 and found["eval/row_accuracy"] == 2 / 3


@pytest.mark.parametrize(
    "change",
    [
        {"preds": None, "predictions": arrays()["preds"].astype(np.int64)},
        {"inputs": arrays()["inputs"].astype(np.int32), "q_halt_logits": np.zeros(3)},
        {"logits": np.zeros((3, 2)), "labels": np.zeros(1)},
    ],
    ids=["of-eval", "other-types", "more-arrays"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_others_save_is_understood(here, capsys, change, save):
    save("outputs.npz", **{key: value for key, value in {**arrays(), **change}.items() if value is not None})
    assert main(["vote", "outputs.npz", "data=data", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/pass@1"] == 1


def test_a_data_set_may_be_a_uri(here, capsys):
    assert main(["vote", "outputs.npz", f"data=file://{here}/data", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/pass@1"] == 1
    assert "has no identifiers.json" in said(capsys, "outputs.npz", f"data=file://{here}")


def test_a_file_may_be_called_like_an_option(here, capsys):
    shutil.copy("outputs.npz", "data=1.npz")
    assert main(["vote", "data=1.npz", "data=data", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/pass@1"] == 1


@pytest.mark.parametrize("output", [[[0]], None])
def test_without_solutions_a_submission_is_written(here, capsys, output):
    pair = {"input": QUESTION.tolist()} | ({} if output is None else {"output": output})
    Path("data/test_puzzles.json").write_text(json.dumps({"a": {"train": [], "test": [pair]}}))
    assert main(["vote", "outputs.npz", "data=data", "submission=s.json", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {}
    assert err == "note: the data set has no solutions of its test tasks: no pass@k\n"
    attempts = {"attempt_1": [[3], [4]], "attempt_2": [[5]]}
    assert json.loads(Path("s.json").read_text()) == {"a": [attempts]}


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in arrays().items() if key != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            without("preds"),
            "outputs.npz has no array 'preds', only: inputs, puzzle_identifiers, q_halt_logits",
        ),
        (without("q_halt_logits"), "has no array 'q_halt_logits'"),
        ({}, "has no array 'inputs', only: nothing"),
        (
            arrays() | {"preds": np.zeros((3, 81), np.uint8)},
            r"preds is of shape [3, 81]; [rows, 900] is needed",
        ),
        (arrays() | {"inputs": np.zeros(3, np.uint8)}, "inputs is of shape [3]; [rows, 900] is needed"),
        (
            arrays() | {"q_halt_logits": np.zeros((3, 1))},
            "q_halt_logits is of shape [3, 1]; [rows] is needed",
        ),
        (arrays() | {"inputs": np.zeros((3, 900))}, "inputs is of type float64; whole numbers are needed"),
        (arrays() | {"q_halt_logits": np.zeros(3, int)}, "of type int64; floating-point numbers are needed"),
        (arrays() | {"preds": np.array([object()] * 3)}, "preds is of type object"),
        (arrays() | {"preds": np.asfortranarray(arrays()["preds"])}, "preds lies column by column"),
        (
            arrays() | {"preds": arrays(4)["preds"]},
            "different lengths: inputs 3, preds 4, puzzle_identifiers 3",
        ),
        ({key: value[:0] for key, value in arrays().items()}, "outputs.npz holds no rows"),
        (
            arrays() | {"puzzle_identifiers": np.array([1, 2, 1])},
            "outputs.npz: puzzle identifier 2, but identifiers.json names 0..1: identifiers of another build",
        ),
        (arrays() | {"puzzle_identifiers": np.array([1, -1, 1])}, "puzzle identifier -1"),
        (arrays() | {"q_halt_logits": np.array([0, 0, np.nan])}, "q_halt_logits of row 2 is not a number"),
        (arrays() | {"inputs": arrays()["preds"]}, "0 of its 3 inputs are of test pairs of the data set"),
        (arrays() | {"puzzle_identifiers": np.zeros(3, int)}, "0 of its 3 inputs are of test pairs"),
    ],
)
def test_outputs_that_cannot_be_counted(here, capsys, content, message):
    np.savez("outputs.npz", **content)
    assert message in said(capsys, "outputs.npz", "data=data", "submission=s.json")
    assert not Path("s.json").exists()


def test_files_that_are_no_outputs(here, capsys):
    assert "there is no file none.npz; make one with: hrm-ray eval" in said(capsys, "none.npz", "data=data")
    assert "there is no file data;" in said(capsys, "data", "data=data")
    Path("text.npz").write_text("no zip")
    assert "text.npz is no .npz file" in said(capsys, "text.npz", "data=data")
    np.save("one.npy", np.zeros(3))
    assert "one.npy is no .npz file" in said(capsys, "one.npy", "data=data")
    assert "vote needs a file of saved outputs" in said(capsys, "data=data")
    assert "'data' is not given" in said(capsys, "outputs.npz")
    assert "did you mean 'submission'?" in said(capsys, "outputs.npz", "data=data", "submision=s.json")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_is_one_line_or_changes_nothing(here, capsys, save):
    save("outputs.npz", **arrays(20))
    content = Path("outputs.npz").read_bytes()
    assert main(["vote", "outputs.npz", "data=data", "--json"]) == 0
    whole = capsys.readouterr().out
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        changed = bytearray(content)
        changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        Path("outputs.npz").write_bytes(changed[: rng.choice([len(changed), rng.integers(len(changed))])])
        code = main(["vote", "outputs.npz", "data=data", "--json"])
        out, err = capsys.readouterr()
        assert (code, out) in ((0, whole), (2, ""))
        assert code == 0 or (err.startswith("error: ") and err.count("\n") == 1)
        refused += code == 2
    assert refused > 30


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("identifiers.json", None, "data has no identifiers.json: no ARC data set with test tasks"),
        ("identifiers.json", "[", "data: identifiers.json is damaged: "),
        ("identifiers.json", "[" * 100_000, "data: identifiers.json is damaged: "),
        ("identifiers.json", "{}", "data: identifiers.json is no list of names"),
        ("identifiers.json", "[1]", "data: identifiers.json is no list of names"),
        ("identifiers.json", '["<blank>", "a|||b"]', "'a|||b' names no augmentation"),
        ("test_puzzles.json", None, "data has no test_puzzles.json: no ARC data set with test tasks"),
        ("test_puzzles.json", "\xff", "data: test_puzzles.json is damaged: "),
        ("test_puzzles.json", "[]", "data: test_puzzles.json holds no tasks"),
        ("test_puzzles.json", "{}", "data: test_puzzles.json holds no tasks"),
        ("test_puzzles.json", '{"a": {"test": []}}', "test_puzzles.json, task a has no test pairs"),
        ("test_puzzles.json", '{"a": []}', "test_puzzles.json, task a has no test pairs"),
        ("test_puzzles.json", '{"a": {"test": [{}]}}', "task a, test pair 0: a grid is a list of rows"),
        (
            "test_puzzles.json",
            '{"a": {"test": [{"input": [[1]], "output": [[10]]}]}}',
            "task a, test pair 0: colour '10' in row 1, column 1; allowed: 0..9",
        ),
    ],
)
def test_a_data_set_that_is_none(here, capsys, name, content, message):
    if content is None:
        (Path("data") / name).unlink()
    else:
        (Path("data") / name).write_bytes(content.encode("latin-1"))
    assert message in said(capsys, "outputs.npz", "data=data")


def test_what_a_submission_may_replace(here, capsys):
    words = ["outputs.npz", "data=data"]
    for content in ("", "text", "[]", '{"a": 1}', '{"a": [{}]}', '{"lr": 1}'):
        Path("mine.json").write_text(content)
        assert "mine.json is there, and no submission; move it away" in said(
            capsys, *words, "submission=mine.json"
        )
        assert Path("mine.json").read_text() == content
    assert "data is a folder; give a file" in said(capsys, *words, "submission=data")
    assert "there is no folder none" in said(capsys, *words, "submission=none/s.json")
    assert "/dev/null is there, and no submission" in said(capsys, *words, "submission=/dev/null")
    assert "/proc/self/mem is there, and no submission" in said(capsys, *words, "submission=/proc/self/mem")
    Path("link.json").symlink_to("nowhere")
    assert "link.json is there, and no submission" in said(capsys, *words, "submission=link.json")
    assert "cannot write to /proc/s.json" in said(capsys, *words, "submission=/proc/s.json")


def test_outputs_of_another_build_are_refused(here, capsys):
    """Numbers that exist, but mean other copies: few of the inputs are then those of test pairs."""
    mixed = arrays(5)
    mixed["inputs"][1:4] = place(OTHER)
    np.savez("outputs.npz", **mixed)
    assert "2 of its 5 inputs are of test pairs of the data set: they are of another build" in said(
        capsys, "outputs.npz", "data=data"
    )
    mixed["puzzle_identifiers"][1:4] = 0  # padding, which is no puzzle
    np.savez("outputs.npz", **mixed)
    assert main(["vote", "outputs.npz", "data=data", "--json"]) == 0
