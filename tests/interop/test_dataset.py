import json
import os
import re
import tempfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.shards import open_dataset
from hrm_ray.data.tasks.base import get_task
from hrm_ray.data.verify import verify
from hrm_ray.errors import UserError
from hrm_ray.interop.dataset import import_npy

ABOUT = {
    "pad_id": 0,
    "ignore_label_id": 0,
    "blank_identifier_id": 0,
    "vocab_size": 12,
    "seq_len": 6,
    "num_puzzle_identifiers": 4,
    "total_groups": 0,
    "mean_puzzle_examples": 0.0,
}


def write_set(folder, name, rng, examples_per_puzzle, puzzles_per_group, **about):
    """A set of the published layout with random tokens; returns its arrays."""
    about = {**ABOUT, **about}
    n = sum(examples_per_puzzle)
    arrays = {
        "inputs": rng.integers(0, about["vocab_size"], (n, about["seq_len"]), dtype=np.uint8),
        "labels": rng.integers(0, about["vocab_size"], (n, about["seq_len"]), dtype=np.uint8),
        "puzzle_identifiers": rng.integers(0, 4, len(examples_per_puzzle), dtype=np.int32),
        "puzzle_indices": np.cumsum([0, *examples_per_puzzle]).astype(np.int32),
        "group_indices": np.cumsum([0, *puzzles_per_group]).astype(np.int32),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for field, array in arrays.items():
        np.save(folder / f"{name}__{field}.npy", array)
    file = folder / "dataset.json"
    sets = json.loads(file.read_text())["sets"] if file.is_file() else []
    file.write_text(json.dumps({**about, "sets": [*sets, name]}))
    return arrays


@pytest.fixture
def published(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "published"
    arrays = {
        "all": write_set(root / "train", "all", rng, [1, 3, 2, 5], [2, 1, 1]),
        "more": write_set(root / "train", "more", rng, [2, 2], [2]),
        "test": write_set(root / "test", "all", rng, [1, 1], [1, 1]),
    }
    (root / "identifiers.json").write_text('["<blank>", "a", "b", "c"]')
    return root, arrays


def test_import_keeps_groups_puzzles_and_identifiers(published, tmp_path):
    root, arrays = published
    manifest = import_npy(root, tmp_path / "data")
    assert verify(tmp_path / "data") == []
    assert (manifest.task, manifest.vocab_size, manifest.num_puzzle_identifiers) == ("tokens", 12, 4)
    split = open_dataset(tmp_path / "data").split("train")
    assert split.puzzle_starts.tolist() == [0, 1, 4, 6, 11, 13, 15]
    assert split.group_starts.tolist() == [0, 2, 3, 4, 6]
    rows = split.rows(np.arange(15))
    first, more = arrays["all"], arrays["more"]
    for field in ("inputs", "labels"):
        assert (rows[field] == np.concatenate([first[field], more[field]])).all()
    identifiers = np.concatenate([first["puzzle_identifiers"], more["puzzle_identifiers"]])
    assert (rows["puzzle_identifiers"] == np.repeat(identifiers, np.diff(split.puzzle_starts))).all()
    assert (tmp_path / "data" / "identifiers.json").read_bytes() == (root / "identifiers.json").read_bytes()


def test_sudoku_is_recognised(tmp_path):
    questions, answers = get_task("sudoku", size=4).generate(0, 0, 5, 7, 100)
    root = tmp_path / "published"
    write_set(root / "train", "all", np.random.default_rng(0), [1] * 5, [1] * 5, vocab_size=6, seq_len=16)
    np.save(root / "train" / "all__inputs.npy", questions)
    np.save(root / "train" / "all__labels.npy", answers)
    manifest = import_npy(root, tmp_path / "data")
    assert (manifest.task, manifest.task_options) == ("sudoku", {"size": 4})
    np.save(root / "train" / "all__labels.npy", np.roll(answers, 1, axis=1))
    assert import_npy(root, tmp_path / "other").task == "tokens"


def test_mazes_are_recognised(tmp_path):
    options = {"walls": (0.2, 0.4), "unique": True, "path": (3, 9), "max_tries": 1000}
    questions, answers = get_task("maze", size=4).generate(0, 0, 5, **options)
    root = tmp_path / "published"
    write_set(root / "train", "all", np.random.default_rng(0), [1] * 5, [1] * 5, vocab_size=6, seq_len=16)
    np.save(root / "train" / "all__inputs.npy", questions)
    np.save(root / "train" / "all__labels.npy", answers)
    manifest = import_npy(root, tmp_path / "data")
    assert (manifest.task, manifest.task_options) == ("maze", {"size": 4})
    np.save(root / "train" / "all__inputs.npy", answers)  # with paths in it already
    assert import_npy(root, tmp_path / "other").task == "tokens"


def test_arc_is_named(tmp_path):
    root = tmp_path / "published"
    about = {"vocab_size": 12, "seq_len": 900}
    write_set(root / "train", "all", np.random.default_rng(0), [2, 2], [1, 1], **about)
    beside = {"identifiers.json": '["<blank>", "a", "a|||t1|||0123456789", "b"]', "test_puzzles.json": "{}"}
    for name, content in beside.items():
        (root / name).write_text(content)
    manifest = import_npy(root, tmp_path / "data", task="arc")
    assert verify(tmp_path / "data") == []
    assert (manifest.task, manifest.num_puzzle_identifiers) == ("arc", 4)
    for name, content in beside.items():
        assert (tmp_path / "data" / name).read_text() == content
    assert import_npy(root, tmp_path / "other").task == "tokens"
    assert import_npy(root, tmp_path / "named", task="tokens").task == "tokens"


@pytest.mark.parametrize(
    "task, said",
    [
        ("arc", r"task=arc: \S+ holds no such puzzles \(12 tokens, 6 cells\); leave task= out"),
        ("sudoku", "task=sudoku: "),
        ("arcs", "unknown task 'arcs'; did you mean 'arc'?"),
    ],
)
def test_puzzles_of_another_task(published, tmp_path, task, said):
    assert re.search(said, refusal(published[0], tmp_path / "data", task=task))


def refusal(root, out, **options):
    """What importing says; nothing is left behind."""
    with pytest.raises(UserError) as error:
        import_npy(root, out, **options)
    assert len(str(error.value).splitlines()) == 1
    assert not list(out.parent.glob(out.name + "*"))
    return str(error.value)


def as_other(change):
    """Replace an array by what `change` makes of it."""
    return lambda file: np.save(file, change(np.load(file)))


def set_entry(index, value, dtype=None):
    def change(array):
        array = array.astype(dtype or array.dtype)
        array[index] = value
        return array

    return as_other(change)


def replace_by(make):
    """Put something else in the file's place."""

    def change(file):
        file.unlink()
        make(file)

    return change


def claim(shape, size):
    """A header that speaks of `shape`, and a file of `size` bytes, all holes."""

    def change(file):
        with file.open("wb") as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            out.truncate(out.tell() + size)

    return change


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
STRUCTURED = np.zeros(4, [("a", np.int32), ("b", np.int32)])
RISE = "must rise from 0 to 11 without empty entries"
MISTAKES = {
    "too few labels": ("labels", as_other(lambda a: a[1:]), r"has shape \(10, 6\), not \(11, 6\)"),
    "an empty puzzle": ("puzzle_indices", set_entry(2, 1), RISE),
    "unsigned and falling": ("puzzle_indices", set_entry([1, 2], [4, 1], np.uint32), RISE),
    "unsigned and huge": ("puzzle_indices", set_entry(2, 2**64 - 4, np.uint64), RISE),
    "negative": ("puzzle_indices", set_entry(1, -3), RISE),
    "does not begin at 0": ("puzzle_indices", set_entry(0, 1), RISE),
    "does not end at the last": ("puzzle_indices", set_entry(-1, 10), RISE),
    "one entry short": ("puzzle_indices", as_other(lambda a: a[1:]), "must have one more"),
    "no entries": ("group_indices", as_other(lambda a: a[:0]), "must rise from 0 to 4"),
    "falling groups": ("group_indices", set_entry([1, 2], [3, 1], np.uint8), "must rise from 0 to 4"),
    "not a number": ("puzzle_indices", set_entry(1, np.nan, float), "holds float64, not whole numbers"),
    "a token of 0.7": ("inputs", as_other(lambda a: a + 0.7), "holds float64, not whole numbers"),
    "truth values": ("labels", as_other(lambda a: a > 3), "holds bool, not whole numbers"),
    "complex": ("inputs", as_other(lambda a: a + 1j), "holds complex128"),
    "text": ("inputs", as_other(lambda a: a.astype(str)), "holds <U3"),
    "structured": ("puzzle_identifiers", as_other(lambda a: STRUCTURED), "not whole numbers"),
    "objects": ("inputs", lambda f: np.save(f, np.array([None])), "cannot be read as an array of numbers"),
    "token above 255": ("inputs", as_other(lambda a: a.astype(int) + 300), r"row 0 has \d+, outside 0..11"),
    "token out of the vocabulary": (
        "labels",
        set_entry((7, 2), 12),
        r"all__labels.npy: row 7 has 12, outside",
    ),
    "token that wraps": ("inputs", set_entry((3, 0), 256, np.int64), "row 3 has 256, outside 0..11"),
    "negative token": ("labels", set_entry((0, 0), -100, np.int8), "row 0 has -100, outside 0..11"),
    "identifier that wraps": ("puzzle_identifiers", set_entry(2, 2**33, np.int64), "row 2 has 8589934592"),
    "identifier too many": ("puzzle_identifiers", set_entry(3, 4), "row 3 has 4, outside 0..3"),
    "negative identifier": ("puzzle_identifiers", set_entry(0, -1), "row 0 has -1"),
    "2-D indices": ("group_indices", as_other(lambda a: a[:, None]), r"shape \(4, 1\); it must have 1 axis"),
    "flat tokens": ("inputs", as_other(np.ravel), r"shape \(66,\); it must have 2 axes"),
    "a number": ("inputs", as_other(lambda a: np.array(5)), r"has shape \(\); it must have 2 axes"),
    "no examples": ("inputs", as_other(lambda a: a[:0]), "has shape"),
    "zero width": ("inputs", as_other(lambda a: a[:, :0]), r"has shape \(11, 0\), not \(11, 6\)"),
    "an empty file": ("inputs", lambda f: f.write_bytes(b""), "is empty"),
    "cut off": ("labels", lambda f: f.write_bytes(f.read_bytes()[:150]), "cannot be read"),
    "longer than it says": ("labels", lambda f: f.write_bytes(f.read_bytes() + b"x"), "its header says"),
    "no array": ("labels", lambda f: f.write_text("1,2,3"), "cannot be read"),
    "an archive": ("labels", lambda f: np.savez(f.open("wb"), a=np.zeros(3)), "cannot be read"),
    "a pointer": ("inputs", lambda f: f.write_bytes(LFS), "Git LFS pointer.*git lfs pull"),
    "missing": ("labels", lambda f: f.unlink(), "is missing"),
    "a pipe": ("puzzle_indices", replace_by(os.mkfifo), "is a device or pipe"),
    "a folder": ("puzzle_indices", replace_by(lambda f: f.mkdir()), "is a folder"),
    "a dangling link": ("inputs", replace_by(lambda f: f.symlink_to("nowhere")), "is missing"),
    "a terabyte of holes": ("inputs", claim((11, 6), 10**12), "its header says"),
    "a claim of terabytes": ("inputs", claim((10**11, 6), 6 * 10**11), "all__labels.npy has shape"),
    "a claim beyond the file": ("inputs", claim((10**11, 6), 66), "cannot be read"),
    "identifiers without end": ("puzzle_identifiers", claim((10**12,), 10**12), "it must have one more"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_not_right_is_refused(published, tmp_path, mistake):
    root, _ = published
    array, change, said = MISTAKES[mistake]
    change(root / "train" / f"all__{array}.npy")
    assert re.search(said, refusal(root, tmp_path / "data"))


ABOUTS = {
    "no JSON": ("{", "is damaged: not the JSON"),
    "a list": ("[]", "is damaged: not the JSON"),
    "null": ("null", "is damaged: not the JSON"),
    "deep": ("[" * 100_000, "is damaged: not the JSON"),
    "a number of many digits": ('{"vocab_size": ' + "9" * 5000 + "}", "is damaged: not the JSON"),
    "no sets": ({"sets": None}, "'sets' must list the names"),
    "an empty list of sets": ({"sets": []}, "'sets' must list the names"),
    "a text of sets": ({"sets": "all"}, "'sets' must list the names"),
    "a number as set": ({"sets": [1]}, "'sets' must list the names"),
    "a set twice": ({"sets": ["all", "all"]}, "each set once"),
    "a set elsewhere": ({"sets": ["../train/all"]}, "by its plain name"),
    "a set that is not there": ({"sets": ["al"]}, "al__inputs.npy is missing"),
    "a set with a zero in its name": ({"sets": ["a\0"]}, "by its plain name"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size=0"),
    "a vocabulary of true": ({"vocab_size": True}, "vocab_size=true"),
    "a fraction": ({"vocab_size": 12.5}, "vocab_size=12.5"),
    "a large vocabulary": ({"vocab_size": 257}, "at most 256 are"),
    "a huge vocabulary": ({"vocab_size": 10**30}, "vocab_size="),
    "no width": ({"seq_len": 0}, "seq_len=0"),
    "another width": ({"seq_len": 7}, r"shape \(11, 6\), not \(11, 7\)"),
    "a negative pad": ({"pad_id": -1}, "pad_id=-1"),
    "a pad of null": ({"pad_id": None}, "pad_id=null"),
    "not a number": ({"ignore_label_id": float("nan")}, "ignore_label_id=nan"),
    "no identifiers": ({"num_puzzle_identifiers": 0}, "num_puzzle_identifiers=0"),
    "a blank beyond": ({"blank_identifier_id": 4}, "must be below"),
    "other data than in test": ({"ignore_label_id": None}, "describe different data"),
}


@pytest.mark.parametrize("about", ABOUTS)
def test_dataset_json_of_any_content(published, tmp_path, about):
    file = published[0] / "train" / "dataset.json"
    change, said = ABOUTS[about]
    file.write_text(
        change if isinstance(change, str) else json.dumps({**json.loads(file.read_text()), **change})
    )
    assert re.search(said, refusal(published[0], tmp_path / "data"))


@pytest.mark.parametrize("name", ["train/dataset.json", "identifiers.json"])
def test_pipes_and_holes_beside_the_arrays(published, tmp_path, name):
    file = published[0] / name
    file.write_bytes(b"")
    os.truncate(file, 10**12)
    assert "is larger than" in refusal(published[0], tmp_path / "data")
    replace_by(os.mkfifo)(file)
    assert "is a device or pipe" in refusal(published[0], tmp_path / "data")


@pytest.mark.parametrize("change", [lambda f: f.unlink(), replace_by(lambda f: f.symlink_to("nowhere"))])
def test_a_split_without_its_file_is_not_left_out(published, tmp_path, change):
    change(published[0] / "train" / "dataset.json")
    assert "train/dataset.json is missing" in refusal(published[0], tmp_path / "data")


def test_other_files_beside_them_are_not_read(published, tmp_path):
    os.mkfifo(published[0] / "train" / "notes.json")
    os.mkfifo(published[0] / "train" / "old__inputs.npy")
    import_npy(published[0], tmp_path / "data")


def test_too_small_a_disk_is_said_before_copying(published, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=300))
    assert "needs 0.0 GB" in refusal(published[0], tmp_path / "data")


def test_a_set_without_examples(published, tmp_path):
    write_set(published[0] / "test", "none", np.random.default_rng(0), [], [])
    assert "none__inputs.npy holds no examples" in refusal(published[0], tmp_path / "data")


def test_other_folders_are_told_apart(published, tmp_path):
    root, _ = published
    assert "no such folder" in refusal(tmp_path / "nowhere", tmp_path / "data")
    assert f"hrm-ray data import-npy {root} out=DIR" in refusal(root / "train", tmp_path / "data")
    (tmp_path / "empty").mkdir()
    assert "not the published layout" in refusal(tmp_path / "empty", tmp_path / "data")
    import_npy(root, tmp_path / "ours")
    assert "is a data set of hrm_ray already" in refusal(tmp_path / "ours", tmp_path / "data")


def plainly(root):
    """The rows of every split, read one by one as the layout says: inputs, labels, identifier, puzzle, group."""
    splits = {}
    for split in ("train", "test"):
        rows, puzzle, group = [], -1, -1
        for name in json.loads((root / split / "dataset.json").read_text())["sets"]:
            files = {f: np.load(root / split / f"{name}__{f}.npy").tolist() for f in FIELDS}
            for first_puzzle, end_puzzle in pairwise(files["group_indices"]):
                group += 1
                for p in range(first_puzzle, end_puzzle):
                    puzzle += 1
                    for row in range(files["puzzle_indices"][p], files["puzzle_indices"][p + 1]):
                        tokens = files["inputs"][row], files["labels"][row]
                        rows.append((*tokens, files["puzzle_identifiers"][p], puzzle, group))
        splits[split] = rows
    return splits


FIELDS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")


def imported(path):
    splits = {}
    for name, split in open_dataset(path).splits.items():
        rows = split.rows(np.arange(split.num_examples))
        puzzles = np.repeat(np.arange(split.num_puzzles), np.diff(split.puzzle_starts))
        groups = np.repeat(np.arange(split.num_groups), np.diff(split.puzzle_starts[split.group_starts]))
        columns = [rows["inputs"], rows["labels"], rows["puzzle_identifiers"], puzzles, groups]
        splits[name] = list(zip(*(column.tolist() for column in columns), strict=True))
    return splits


def damage(draw, file):
    """Change `file` in one of many ways."""
    kinds = ["bits", "cut", "append"] + (["entry", "type"] if file.suffix == ".npy" else ["value"])
    kind = draw(st.sampled_from(kinds))
    content = bytearray(file.read_bytes())
    if kind == "bits":
        for position in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[position] ^= draw(st.integers(1, 255))
    elif kind == "cut":
        del content[draw(st.integers(0, len(content) - 1)) :]
    elif kind == "append":
        content += draw(st.binary(min_size=1, max_size=9))
    if kind in ("bits", "cut", "append"):
        file.write_bytes(content)
    elif kind == "value":
        about = json.loads(content)
        about[draw(st.sampled_from(sorted(about)))] = draw(ANYTHING)
        file.write_text(json.dumps(about))
    else:
        array = np.load(file)
        types = ["i1", "u1", ">i2", "<u4", "<i8", "<u8", "<f4", "?", "<U2"]
        array = array.astype(draw(st.sampled_from(types)), order=draw(st.sampled_from("CF")))
        if kind == "entry" and array.dtype.kind in "iu":
            limits = np.iinfo(array.dtype)
            numbers = st.integers(-3, 15) | st.sampled_from([limits.min, limits.max])
            array.flat[draw(st.integers(0, array.size - 1))] = np.clip(draw(numbers), limits.min, limits.max)
        np.save(file, array)


SCALARS = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=3)
ANYTHING = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_one_damage_is_refused_or_leaves_what_is_there(data):
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder, "published"), Path(folder, "data")
        rng = np.random.default_rng(0)
        write_set(root / "train", "all", rng, [1, 2, 1], [2, 1])
        write_set(root / "test", "all", rng, [1, 1], [1, 1])
        files = sorted(file for file in root.rglob("*") if file.is_file())
        damage(data.draw, data.draw(st.sampled_from(files)))
        try:
            import_npy(root, out)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            assert not list(Path(folder).glob("data*"))
        else:
            assert imported(out) == plainly(root)
            about = json.loads((root / "train" / "dataset.json").read_text())
            manifest = open_dataset(out).manifest
            assert {key: about[key] for key in ABOUT if hasattr(manifest, key)} == {
                key: getattr(manifest, key) for key in ABOUT if hasattr(manifest, key)
            }
