"""The published checkpoint layout, both ways."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

import hrm_ray
from hrm_ray.cli import main
from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError
from hrm_ray.interop.checkpoint import export_checkpoint, import_checkpoint
from hrm_ray.interop.config import LOSS_NAME
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import Checkpoint, find
from hrm_ray.training.launch import train
from tests.golden_cases import batch_of
from tests.toy import EQR, TRM, toy_config, toy_dataset

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
EMBEDDING = "_orig_mod.model.inner.embed_tokens.embedding_weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w, c: w.pop(KEY), "has no tensor lm_head.weight"),
        (lambda w, c: w.update({KEY: torch.zeros(2, 2)}), r"lm_head.weight has shape \[2, 2\]"),
        (lambda w, c: w.update({KEY + "2": torch.zeros(2)}), "has a tensor lm_head.weight2"),
        (
            lambda w, c: w.update({"other": torch.zeros(2)}),
            "has a tensor other, which all_config.yaml does not",
        ),
        (
            lambda w, c: w.update({"model.inner.lm_head.weight": torch.zeros(2)}),
            "has the tensor lm_head.weight twice",
        ),
        (lambda w, c: w.update({KEY: torch.zeros(6, 32).int()}), "no plain tensor of floating-point numbers"),
        (lambda w, c: w.update({KEY: torch.zeros(6, 32).to_sparse()}), "no plain tensor .*sparse"),
        (lambda w, c: w.update({KEY: torch.zeros(6, 32, device="meta")}), "no plain tensor .*on meta"),
        (
            lambda w, c: w.update({EMBEDDING: torch.tensor(1.0)}),
            r"embed_tokens.embedding_weight has shape \[\]",
        ),
        (
            lambda w, c: w.update({EMBEDDING: torch.zeros(0, 32)}),
            r"embed_tokens.embedding_weight has shape \[0, 32\]",
        ),
        (lambda w, c: [w.pop(k) for k in list(w)], "holds no state dict of an HRM or TRM"),
        (lambda w, c: c["arch"].update(name="x@Y"), "arch.name='x@Y' cannot be imported"),
        (lambda w, c: c["arch"].update(num_heads=3), "not a multiple of arch.num_heads"),
        (lambda w, c: c.pop("arch"), "has no 'arch'"),
        (lambda w, c: c["arch"].pop("H_cycles"), "arch.H_cycles is not given"),
        (lambda w, c: c["arch"].update(name=["x"]), "cannot be imported"),
        (
            lambda w, c: c["arch"].update(H_layers=10**4),
            "has 2 H layers, all_config.yaml asks for 10000",
        ),
        (lambda w, c: c["arch"].update(hidden_size=2**40), "hidden_size=1099511627776: input should be less"),
        (lambda w, c: c["arch"].update(expansion=1e300), r"expansion=1e\+300: input should be less"),
        (lambda w, c: c["arch"].update(expansion=1e-300), "impossible model"),
        (lambda w, c: c["arch"].update({"a\nb": "c\nd"}), "arch.a b=c d may change"),
        (lambda w, c: c["arch"].update(forward_dtype="int4"), "arch.forward_dtype='int4' is unknown"),
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


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("inside", [RunsCode(), np.float64(0.5), Path("x")])
def test_what_is_no_tensor_is_refused_without_advice_to_load_it(tmp_path, capsys, inside, legacy):
    folder = published(tmp_path)
    weights, _ = read(folder)
    content = {"model": weights, "best": inside}
    torch.save(content, folder / "checkpoint", _use_new_zipfile_serialization=not legacy)
    said = refused(folder)
    assert "holds more than tensors (" in said and "torch.save(model.state_dict(), FILE)" in said
    assert "weights_only" not in said and "\x1b" not in said
    assert capsys.readouterr() == ("", "")


def refused(source, out=None, **arguments) -> str:
    """What importing says, in one line; nothing is left behind."""
    out = out or Path(source).parent / "ours"
    with pytest.raises(UserError) as error:
        import_checkpoint(source, out, **arguments)
    assert len(str(error.value).splitlines()) == 1
    assert not list(out.parent.glob(out.name + "*"))
    return str(error.value)


@pytest.mark.parametrize("end", [0, 3, 10, 1000, 10_000, 50_000, -1])
def test_cut_off_weights_are_named(tmp_path, end):
    folder = published(tmp_path)
    content = (folder / "checkpoint").read_bytes()
    (folder / "checkpoint").write_bytes(content[:end])
    assert "published/checkpoint" in refused(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not a file of tensors", "cannot be read as plain tensors"),
        (b"PK\x03\x04broken", "cannot be read as plain tensors"),
        (b"\x80\x02}q\x00.", "cannot be read as plain tensors"),
        (b"\xff" * 8 + b'{"a": 1}', "cannot be read as plain tensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS pointer.*git lfs pull"),
    ],
)
def test_other_contents_are_named(tmp_path, content, said):
    folder = published(tmp_path)
    (folder / "checkpoint").write_bytes(content)
    assert re.search(said, refused(folder))


def test_a_flipped_bit_is_seen(tmp_path):
    folder = published(tmp_path)
    content = bytearray((folder / "checkpoint").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "checkpoint").write_bytes(content)
    assert "is not as it was written" in refused(folder)


def q_halt(checkpoint: Path) -> np.ndarray:
    """Of the golden puzzles, after the last step."""
    model = hrm_ray.load(checkpoint, device="cpu", forward_dtype="float32").model
    golden = np.load(GOLDEN / "hrm_base" / "eval.npz")
    batch = batch_of(golden)
    carry = model.initial_carry(batch)
    with torch.no_grad():
        for _ in golden["loss"]:
            step = model(carry, batch)
            carry = step.carry
    return step.prediction.q_halt.numpy()


def computes_the_golden_numbers(checkpoint: Path) -> bool:
    expected = np.load(GOLDEN / "hrm_base" / "eval.npz")["q_halt_logits"][-1]
    return np.allclose(q_halt(checkpoint), expected, atol=2e-4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("data") / "data", num_identifiers=5)


# Configuration


def with_arch(folder: Path, **keys) -> Path:
    edit(folder, lambda _, config: config["arch"].update(keys))
    return folder


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        ({"rope_theta": 100.0}, [-1.44988, 1.11474, 2.33755]),
        ({"rms_norm_eps": 0.1}, [-3.81215, -1.65863, 3.84389]),
        ({"rope_theta": 10_000, "rms_norm_eps": "1e-5", "causal": False}, [-3.94415, -1.68299, 4.13084]),
        ({"mlp_t": False, "batch_size": 7, "forward_dtype": "bfloat16"}, [-3.94415, -1.68299, 4.13084]),
        ({"halt_exploration_prob": 0.9, "puzzle_emb_dropout": 0.1}, [-3.94415, -1.68299, 4.13084]),
        ({"name": "recursive_reasoning.hrm@HierarchicalReasoningModel_ACTV1"}, [-3.94415, -1.68299, 4.13084]),
    ],
)
def test_keys_that_change_the_numbers_are_honoured(tmp_path, dataset, keys, numbers):
    """With the public HRM's numbers for these keys."""
    import_checkpoint(with_arch(published(tmp_path), **keys), tmp_path / "ours", dataset)
    np.testing.assert_allclose(q_halt(tmp_path / "ours")[:3], numbers, atol=2e-4)


@pytest.mark.parametrize(
    "keys",
    [
        {"use_spiral": True},
        {"use_spiral": False},
        {"causal": True},
        {"mlp_t": True},
        {"halt_max_steps_eval": 64},
        {"num_experts": {"a": [1]}},
        {"init_std": 0.02},
        {"rope_theta": 0},
        {"rope_theta": "x"},
        {"rms_norm_eps": -1},
        {"pos_encodings": "sine"},
        {"pos_encodings": "grid"},
        {"hidden_size": None},
    ],
)
def test_keys_that_cannot_be_honoured_are_refused(tmp_path, keys):
    said = refused(with_arch(published(tmp_path), **keys))
    assert re.search(rf"all_config.yaml: arch[.:] ?{next(iter(keys))}=", said)


@pytest.mark.parametrize(
    "loss", [None, "losses@ACTLossHead", [1], {}, {"loss_type": "focal"}, {"loss_type": {}}]
)
def test_the_loss_does_not_matter(tmp_path, dataset, loss):
    import_checkpoint(with_arch(published(tmp_path), loss=loss), tmp_path / "ours", dataset)
    assert computes_the_golden_numbers(tmp_path / "ours")


def test_a_missing_loss_and_embedding_have_the_published_defaults(tmp_path):
    shutil.copytree(GOLDEN / "hrm_no_puzzle_emb", tmp_path / "published")
    edit(
        tmp_path / "published", lambda _, config: [config["arch"].pop(k) for k in ("loss", "puzzle_emb_ndim")]
    )
    assert import_checkpoint(tmp_path / "published", tmp_path / "ours").arch.puzzle_emb_ndim == 0


CONFIGS = [b"arch: [", b"\xff\xfe\x00", b"arch: 1", b"- 1", b"arch: {a: " + b"1" * 5000 + b"}", b"[" * 5000]
CONFIGS += [
    b"!!python/object:os.system {}",
    b"arch: {1: {2: 3}}",
    b"&a [*a]",
    b"arch: &a {b: *a}",
    b"x: 2025-99-99",
]


@pytest.mark.parametrize("content", CONFIGS)
def test_configurations_of_any_content(tmp_path, content):
    folder = published(tmp_path)
    (folder / "all_config.yaml").write_bytes(content)
    assert "all_config.yaml" in refused(folder)


def test_values_that_json_does_not_have(tmp_path, dataset):
    folder = published(tmp_path)
    config = folder / "all_config.yaml"
    config.write_text(
        config.read_text() + "day: 2025-10-10\nbytes: !!binary aGk=\n1: 2\nnan: .nan\nset: !!set {a}\n"
    )
    import_checkpoint(folder, tmp_path / "ours", dataset)
    export_checkpoint(find(str(tmp_path / "ours")), tmp_path / "theirs")
    assert read(tmp_path / "theirs")[1]["day"] == "2025-10-10"


# Weights


PREFIXES = [
    "module.",
    "module._orig_mod.model.inner.",
    "_orig_mod.module.model.inner.",
    "inner.",
    "",
    "model.inner.",
]
PREFIXES += ["model._orig_mod.inner.", "_orig_mod._orig_mod.", "model.module.inner._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers(tmp_path, dataset, prefix):
    folder = published(tmp_path)
    weights, _ = read(folder)
    bare = {name.removeprefix("_orig_mod.model.inner."): tensor for name, tensor in weights.items()}
    torch.save({prefix + name: tensor for name, tensor in bare.items()}, folder / "checkpoint")
    import_checkpoint(folder, tmp_path / "ours", dataset)
    assert computes_the_golden_numbers(tmp_path / "ours")
    export_checkpoint(find(str(tmp_path / "ours")), tmp_path / "theirs")
    assert all(
        name.startswith(("_orig_mod.model.inner.", "model.inner.")) for name in read(tmp_path / "theirs")[0]
    )


def test_modules_that_were_compiled_one_by_one(tmp_path, dataset):
    folder = published(tmp_path)
    weights, _ = read(folder)
    torch.save(
        {k.replace("_level.", "_level._orig_mod."): t for k, t in weights.items()}, folder / "checkpoint"
    )
    import_checkpoint(folder, tmp_path / "ours", dataset)
    assert computes_the_golden_numbers(tmp_path / "ours")


STATES = {
    "a training state": (lambda w, _: {"model_state_dict": w, "optimizer_state_dicts": [], "step": 10}, 10),
    "TRM's": (lambda w, _: {"model": w, "optimizers": [{"state": {0: w}}], "step": 7}, 7),
    "Lightning's": (lambda w, _: {"state_dict": w, "global_step": 3, "epoch": 1}, 3),
    "nested": (lambda w, _: {"state": {"net": w}, "step": torch.tensor(5)}, 5),
    "flat": (lambda w, _: {**w, "epoch": 4, "args": {"lr": 1.0}}, 0),
    "half precision": (lambda w, _: {"model": {k: t.double() for k, t in w.items()}, "step": True}, 0),
    "tied": (lambda w, _: {"model": {k: torch.stack([t, t])[1] for k, t in w.items()}}, 0),
    "averages": (lambda w, o: {"model": o, "ema_helper": w, "step": 6}, 6),
    "averages inside": (lambda w, o: {"model": o, "ema": {"shadow": w, "mu": 0.999}}, 0),
    "torch's averages": (lambda w, o: {"model": o, "swa": {"n_averaged": torch.tensor(3)} | module(w)}, 0),
    "averages alone": (lambda w, _: {"ema_state_dict": w}, 0),
}


def module(weights: dict) -> dict:
    return {f"module.{name}": tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("state", STATES)
def test_state_dicts_inside_training_states(tmp_path, dataset, state):
    folder = published(tmp_path)
    weights, _ = read(folder)
    make, step = STATES[state]
    torch.save(make(weights, {name: tensor + 1 for name, tensor in weights.items()}), folder / "checkpoint")
    assert import_checkpoint(folder, tmp_path / "ours", dataset).global_step == step
    assert computes_the_golden_numbers(tmp_path / "ours")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda w: {"student": w, "teacher": w}, "several state dicts \\(student, teacher\\)"),
        (lambda w: {"optimizer": {"state": {}}, "step": 3}, "it holds: optimizer, step"),
        (lambda w: [w], "holds no state dict, but a list"),
        (lambda w: {}, "it holds: nothing"),
        (lambda w: {1: torch.zeros(2), "a": {2: torch.zeros(2)}}, "it holds: 1, a"),
    ],
)
def test_states_without_the_weights(tmp_path, make, said):
    folder = published(tmp_path)
    torch.save(make(read(folder)[0]), folder / "checkpoint")
    assert re.search(said, refused(folder))


# Files


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *(("model.pt", 0), ("checkpoint.pt", 0), ("pytorch_model.bin", 0), ("weights", 0), ("last.ckpt", 0)),
        *(("step_10.pt", 10), ("step_32550_sudoku_extreme", 32550), ("hrm-step=00042.pth", 42)),
        *(("model.safetensors", 0), ("step_9.safetensors", 9)),
    ],
)
def test_any_file_name(tmp_path, dataset, name, step):
    folder = published(tmp_path)
    file = folder / name
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(read(folder)[0], file)
        (folder / "checkpoint").unlink()
    else:
        (folder / "checkpoint").rename(file)
    for beside in (
        "hrm_act_v1.py",
        "README.md",
        ".gitattributes",
        "optimizer.pt",
        "step_99_all_preds.0",
        "LICENSE",
    ):
        (folder / beside).write_text("x")
    for number, source in enumerate((folder, file)):
        manifest = import_checkpoint(source, tmp_path / f"ours-{number}", dataset)
        assert manifest.global_step == step
        assert computes_the_golden_numbers(tmp_path / f"ours-{number}")


def test_the_file_that_is_given_is_taken(tmp_path):
    folder = published(tmp_path)
    (folder / "checkpoint").rename(folder / "step_10")
    (folder / "step_20").write_bytes(b"another")
    assert import_checkpoint(folder / "step_10", tmp_path / "ours").global_step == 10
    assert "published/step_20" in refused(folder, tmp_path / "newest")


def test_a_folder_for_each_step(tmp_path):
    folder = published(tmp_path)
    (folder / "final_step_45").mkdir()
    (folder / "checkpoint").rename(folder / "final_step_45" / "model.pt")
    assert import_checkpoint(folder / "final_step_45" / "model.pt", tmp_path / "a").global_step == 45
    assert import_checkpoint(folder / "final_step_45", tmp_path / "b").global_step == 45


def test_what_is_missing_or_unclear_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.model_info", None)  # never asked
    folder = published(tmp_path)
    shutil.copy(folder / "checkpoint", folder / "a.pt")
    (folder / "checkpoint").rename(folder / "b.pt")
    assert re.search(r"several files of weights; give one: \S+/a.pt or \S+/b.pt", refused(folder))
    (folder / "a.pt").unlink()
    (folder / "b.pt").unlink()
    assert "no file of weights (it has: all_config.yaml, eval.npz, train.npz)" in refused(folder)
    assert f"{tmp_path} has no all_config.yaml, but folders with one; give {folder}" in refused(tmp_path)
    os.mkfifo(folder / "pipe.pt")
    assert "is a device or pipe" in refused(folder / "pipe.pt")
    assert "no such file or folder" in refused("published/step_9", tmp_path / "ours")
    for nowhere in ("nowhere", "x" * 5000, "a/" + "x" * 5000, "a\0b"):
        assert "no such file or folder" in refused(nowhere, tmp_path / "ours")
    (folder / "all_config.yaml").rename(tmp_path / "moved")
    (folder / "model.pt").write_bytes(b"x")
    assert "put the configuration of its training beside the weights" in refused(folder / "model.pt")


def test_ours_and_existing_folders_are_told_apart(tmp_path):
    folder = published(tmp_path)
    import_checkpoint(folder, tmp_path / "ours")
    assert "already" in refused(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(UserError, match="exists; choose another out="):
        import_checkpoint(folder, tmp_path / "ours")
    with pytest.raises(UserError, match=r"published layout: hrm-ray import-checkpoint \S+published out=DIR"):
        find(str(folder))
    with pytest.raises(UserError, match=r"hrm-ray import-checkpoint \S+published/checkpoint out=DIR"):
        find(str(folder / "checkpoint"))
    with pytest.raises(UserError, match=r"no such folder; .* hrm-ray import-checkpoint owner/model out=DIR"):
        find("owner/model")


# Hugging Face


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The client's two functions, over folders of this machine; gives what was fetched."""
    monkeypatch.chdir(tmp_path)
    repositories = {"owner/model": tmp_path / "model", "owner/many": tmp_path / "many"}
    shutil.copytree(GOLDEN / "hrm_base", tmp_path / "model")
    for task in ("arc_v1", "arc_v2"):
        shutil.copytree(GOLDEN / "hrm_base", tmp_path / "many" / task)
        (tmp_path / "many" / task / "checkpoint").rename(tmp_path / "many" / task / "step_518071")
    fetched = []

    def model_info(repo_id, *, revision=None, timeout=None):
        if repo_id not in repositories:
            raise RuntimeError(f"404 Client Error\nRepository Not Found for {repo_id}")
        root = repositories[repo_id]
        names = [str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()]
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=name) for name in names], sha=f"commit of {revision}"
        )

    def hf_hub_download(repo_id, filename, *, revision=None):
        fetched.append((repo_id, filename, revision))
        return str(repositories[repo_id] / filename)

    for stub in (model_info, hf_hub_download):
        like = create_autospec(getattr(huggingface_hub, stub.__name__), side_effect=stub)
        monkeypatch.setattr(huggingface_hub, stub.__name__, like)
    return fetched


@pytest.mark.parametrize(
    ("source", "revision", "file", "step"),
    [
        ("owner/model", None, "checkpoint", 0),
        ("https://huggingface.co/owner/model", None, "checkpoint", 0),
        ("https://huggingface.co/owner/model/tree/main", "main", "checkpoint", 0),
        ("owner/many/arc_v1", None, "arc_v1/step_518071", 518071),
        ("owner/many/arc_v2/step_518071", None, "arc_v2/step_518071", 518071),
        ("https://huggingface.co/owner/many/blob/v2/arc_v1/step_518071", "v2", "arc_v1/step_518071", 518071),
    ],
)
def test_ids_of_hugging_face_are_fetched(tmp_path, hub, dataset, source, revision, file, step):
    assert import_checkpoint(source, tmp_path / "ours", dataset).global_step == step
    config = str(Path(file).with_name("all_config.yaml"))
    assert [name for _, name, _ in hub] == [config, file]
    assert {asked for _, _, asked in hub} == {f"commit of {revision}"}
    assert computes_the_golden_numbers(tmp_path / "ours")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "owner/nothing",
            "owner/nothing: no such file or folder here, and no model that Hugging Face gives us .*404 Client",
        ),
        ("owner/many", "owner/many has no all_config.yaml, .*give owner/many/arc_v1 or owner/many/arc_v2"),
        ("owner/model/step_9", "owner/model has no step_9; it has: "),
        ("model/checkpint", "no such file or folder, and no Hugging Face id"),
        ("s3://bucket/model", "no such file or folder, and no Hugging Face id"),
    ],
)
def test_what_hugging_face_does_not_have(tmp_path, hub, source, said):
    assert re.search(said, refused(source, tmp_path / "ours"))
    assert not hub


# Writing


@contextmanager
def largest_file(size: int):
    """Inside, writing beyond `size` bytes of a file fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 50_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, dataset, size):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "exp.tmp").mkdir()  # of the user
    import_checkpoint(published(tmp_path), tmp_path / "ours", dataset)
    with largest_file(size):
        with pytest.raises(UserError, match=r"cannot write to \S+disk/imp: File too large"):
            import_checkpoint(tmp_path / "published", tmp_path / "disk" / "imp", dataset)
        with pytest.raises(UserError, match=r"cannot write to \S+disk/exp: File too large"):
            export_checkpoint(find(str(tmp_path / "ours")), tmp_path / "disk" / "exp")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["exp.tmp"]


def test_a_killed_import_leaves_its_place_free(tmp_path, dataset):
    source, ours = published(tmp_path), tmp_path / "ours"
    killed = (
        "import os, signal; from hrm_ray.interop import checkpoint\n"
        "checkpoint.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"checkpoint.import_checkpoint({str(source)!r}, {str(ours)!r})"
    )
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -signal.SIGKILL
    import_checkpoint(source, ours, dataset)


def test_outputs_of_eval_on_a_full_disk(tmp_path, dataset, capsys):
    import_checkpoint(published(tmp_path), tmp_path / "ours", dataset)
    words = ["eval", str(tmp_path / "ours"), f"data={dataset.path}", "num_examples=4", "save_outputs=logits"]
    with largest_file(500):
        assert main([*words, f"out={tmp_path / 'o.npz'}", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"cannot write to {tmp_path / 'o.npz'}: File too large" in err
    assert not list(tmp_path.glob("o.npz*"))


# What the public TRM reads as its configuration, without a default; other keys have one.
REQUIRED_BY_TRM = {
    *(
        "global_batch_size",
        "epochs",
        "lr",
        "lr_min_ratio",
        "lr_warmup_steps",
        "weight_decay",
        "beta1",
        "beta2",
    ),
    *("puzzle_emb_lr", "puzzle_emb_weight_decay", "arch", "data_paths"),
}
ARCH_REQUIRED_BY_TRM = {
    *(
        "name",
        "loss",
        "H_cycles",
        "L_cycles",
        "H_layers",
        "L_layers",
        "hidden_size",
        "expansion",
        "num_heads",
    ),
    *("pos_encodings", "halt_max_steps", "halt_exploration_prob"),
}


@pytest.mark.parametrize("puzzle_emb_ndim", [0, 16, 40])
@pytest.mark.parametrize("puzzle_emb_len", [0, 2, 3])
def test_exported_trm_is_what_trm_reads(tmp_path, dataset, puzzle_emb_ndim, puzzle_emb_len):
    sizes = {
        "hidden_size": 16,
        "num_heads": 2,
        "L_layers": 1,
        "halt_max_steps": 2,
        "L_cycles": 1,
        "H_cycles": 1,
    }
    if 0 < 16 * puzzle_emb_len < puzzle_emb_ndim:
        return  # refused: it does not fit
    arch = {"name": "trm", **sizes, "pos_encodings": "learned"}
    arch |= {"puzzle_emb_ndim": puzzle_emb_ndim, "puzzle_emb_len": puzzle_emb_len}
    arch |= {"loss": {"label_smoothing": 0.1}}  # which its loss head does not know
    values = toy_config(dataset.path, tmp_path, arch=arch, max_steps=1, ema=True, compile=False)
    train(TrainConfig(**values), show_progress=False)
    export_checkpoint(find(str(tmp_path / "toy")), tmp_path / "theirs")
    weights, config = read(tmp_path / "theirs")
    assert config.keys() >= REQUIRED_BY_TRM and config["arch"].keys() >= ARCH_REQUIRED_BY_TRM
    assert config["arch"]["loss"] == {"name": LOSS_NAME, "loss_type": "stablemax_cross_entropy"}
    assert (
        config["data_paths"] == [str(dataset.path)] and config["ema"] is True and config["ema_rate"] == 0.999
    )
    # There the puzzle's tokens are as many as this key says, and if it is 0, as many as the embedding fills.
    theirs = config["arch"]["puzzle_emb_len"] or -(-config["arch"]["puzzle_emb_ndim"] // 16)
    assert len(weights["_orig_mod.model.inner.embed_pos.embedding_weight"]) == 16 + theirs
    manifest = import_checkpoint(tmp_path / "theirs", tmp_path / "back", dataset)
    assert manifest.arch.num_puzzle_tokens == theirs


@pytest.mark.parametrize(
    ("key", "value", "is_exported"), [("init_std", 1, False), ("damping", 0.9, False), ("noise", 0.1, True)]
)
def test_what_public_code_cannot_do_is_not_exported(tmp_path, dataset, key, value, is_exported):
    """Damping and random starts are of use, too; noise is of training alone."""
    values = toy_config(dataset.path, tmp_path, arch=TRM | {key: value}, max_steps=1, compile=False)
    train(TrainConfig(**values), show_progress=False)
    checkpoint = find(str(tmp_path / "toy"))
    if is_exported:
        export_checkpoint(checkpoint, tmp_path / "theirs")
        assert not read(tmp_path / "theirs")[1]["arch"].keys() & EQR.keys()
        return
    with pytest.raises(UserError, match=rf"arch\.{key}={value} has no published layout"):
        export_checkpoint(checkpoint, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_a_newer_format_is_refused(tmp_path):
    import_checkpoint(GOLDEN / "hrm_base", tmp_path / "ours")
    manifest = tmp_path / "ours" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UserError, match="has format 2, this hrm_ray reads up to 1; upgrade hrm_ray"):
        Checkpoint(Storage(tmp_path / "ours"))
