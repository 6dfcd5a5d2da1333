"""The published checkpoint layout, both ways."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import hrm_ray
from hrm_ray.errors import UserError
from hrm_ray.interop.checkpoint import export_checkpoint, import_checkpoint
from hrm_ray.training.checkpoint import Checkpoint, find
from hrm_ray.training.storage import Storage
from tests.toy import toy_dataset

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    "hrm_base",
    "hrm_wide_puzzle_emb",
    "hrm_no_puzzle_emb",
    "hrm_learned_softmax",
    "trm_base",
    "trm_mlp_t",
]


def read(folder: Path) -> tuple[dict, dict]:
    weights = torch.load(folder / "checkpoint", weights_only=True)
    return weights, yaml.safe_load((folder / "all_config.yaml").read_text())


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_identical(case, tmp_path):
    dataset = toy_dataset(tmp_path / "data", num_identifiers=5)
    import_checkpoint(GOLDEN / case, tmp_path / "ours", dataset)
    export_checkpoint(find(str(tmp_path / "ours")), tmp_path / "theirs")
    weights, config = read(tmp_path / "theirs")
    expected_weights, expected_config = read(GOLDEN / case)
    assert config == expected_config
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert torch.equal(weights[name], tensor), name


def test_imported_model_computes_what_the_published_one_did(tmp_path):
    golden = np.load(GOLDEN / "hrm_no_puzzle_emb" / "eval.npz")
    dataset = toy_dataset(tmp_path / "data")
    import_checkpoint(GOLDEN / "hrm_no_puzzle_emb", tmp_path / "ours", dataset)
    solver = hrm_ray.load(tmp_path / "ours", device="cpu", forward_dtype="float32")
    solutions = solver.solve(list(golden["inputs"]))
    predictions = golden["logits"][-1].argmax(-1)
    np.testing.assert_array_equal([s.tokens for s in solutions], predictions)
    expected = 1 / (1 + np.exp(-golden["q_halt_logits"][-1]))
    np.testing.assert_allclose([s.confidence for s in solutions], expected, rtol=1e-4)


def published(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "hrm_base", tmp_path / "published")
    return tmp_path / "published"


def test_newest_step_is_taken(tmp_path):
    folder = published(tmp_path)
    shutil.copy(folder / "checkpoint", folder / "step_9")
    (folder / "checkpoint").rename(folder / "step_10")
    assert import_checkpoint(folder, tmp_path / "ours").global_step == 10


def edit(folder: Path, change) -> None:
    weights, config = read(folder)
    change(weights, config)
    torch.save(weights, folder / "checkpoint")
    (folder / "all_config.yaml").write_text(yaml.safe_dump(config))


KEY = "_orig_mod.model.inner.lm_head.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w, c: w.pop(KEY), "has no tensor lm_head.weight"),
        (lambda w, c: w.update({KEY: torch.zeros(2, 2)}), r"lm_head.weight has shape \[2, 2\]"),
        (lambda w, c: w.update({KEY + "2": torch.zeros(2)}), "has a tensor lm_head.weight2"),
        (lambda w, c: w.update({"other": torch.zeros(2)}), "its keys begin neither"),
        (lambda w, c: c["arch"].update(name="x@Y"), "arch.name=x@Y cannot be imported"),
        (lambda w, c: c["arch"].update(num_heads=3), "not a multiple of arch.num_heads"),
        (lambda w, c: c.pop("arch"), "has no 'arch'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, said):
    folder = published(tmp_path)
    edit(folder, change)
    with pytest.raises(UserError, match=said):
        import_checkpoint(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class RunsCode:
    def __reduce__(self):
        return print, ("pwned",)


def test_nothing_is_executed(tmp_path, capsys):
    folder = published(tmp_path)
    torch.save({KEY: RunsCode()}, folder / "checkpoint")
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        import_checkpoint(folder, tmp_path / "ours")
    assert "pwned" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", b"PK\x03\x04broken"])
def test_damaged_weights_are_named(tmp_path, content):
    folder = published(tmp_path)
    (folder / "checkpoint").write_bytes(content)
    with pytest.raises(UserError, match="published/checkpoint"):
        import_checkpoint(folder, tmp_path / "ours")


def test_a_newer_format_is_refused(tmp_path):
    import_checkpoint(GOLDEN / "hrm_base", tmp_path / "ours")
    manifest = tmp_path / "ours" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UserError, match="has format 2, this hrm_ray reads up to 1; upgrade hrm_ray"):
        Checkpoint(Storage(tmp_path / "ours"))
