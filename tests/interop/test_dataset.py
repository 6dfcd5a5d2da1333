import json

import numpy as np
import pytest

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


def test_mistakes_are_named(published, tmp_path):
    root, arrays = published

    def message(field, array, name="train/all"):
        file = root / f"{name}__{field}.npy"
        before = file.read_bytes()
        np.save(file, array)
        with pytest.raises(UserError) as error:
            import_npy(root, tmp_path / "data")
        file.write_bytes(before)
        assert not (tmp_path / "data").exists() and "\n" not in str(error.value)
        return str(error.value)

    good = arrays["all"]
    assert "all__labels.npy has shape (10, 6), not (11, 6)" in message("labels", good["labels"][1:])
    assert "must rise from 0 to 11 without empty entries" in message(
        "puzzle_indices", np.array([0, 1, 1, 6, 11])
    )
    assert "differ in puzzles" in message("puzzle_indices", np.array([0, 1, 11]))
    assert "tokens outside 0..255" in message("inputs", good["inputs"].astype(np.int32) + 300)
    assert "outside the vocabulary of 12" in message("inputs", good["inputs"] + 12)
    (root / "train" / "more__labels.npy").unlink()
    with pytest.raises(UserError, match=r"more__labels\.npy cannot be read"):
        import_npy(root, tmp_path / "data")
    (root / "train" / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        import_npy(root, tmp_path / "data")
    with pytest.raises(UserError, match="not the published layout"):
        import_npy(tmp_path, tmp_path / "data")
