"""The published implementation's numbers (tests/golden/, float32, one CPU thread) and how to load them."""

from pathlib import Path

import torch
import yaml

from hrm_ray.config.arch import ArchConfig, arch_class
from hrm_ray.machine import resolve
from hrm_ray.models.act import ACT, Batch
from hrm_ray.models.recursive import RecursiveModel
from hrm_ray.models.registry import build_model
from hrm_ray.training.checkpoint import DatasetInfo

FOLDER = Path(__file__).parent / "golden"
CASES = ["hrm_base", "hrm_wide_puzzle_emb", "hrm_no_puzzle_emb", "hrm_learned_softmax"]
CASES += ["trm_base", "trm_mlp_t"]
VOCAB_SIZE, SEQ_LEN, NUM_IDENTIFIERS = 6, 16, 5


def config_of(case: str) -> dict:
    return yaml.safe_load((FOLDER / case / "all_config.yaml").read_text())


def arch_of(case: str) -> ArchConfig:
    kind = arch_class("trm" if case.startswith("trm") else "hrm_v1")
    arch = config_of(case)["arch"]
    values = {k: v for k, v in arch.items() if k in kind.model_fields and k not in ("name", "loss")}
    return kind(**values, loss={"loss_type": arch["loss"]["loss_type"]})


def load_weights(case: str, inner: RecursiveModel) -> None:
    weights = torch.load(FOLDER / case / "checkpoint", weights_only=True)
    inner.load_state_dict({k.removeprefix("_orig_mod.model.inner."): v for k, v in weights.items()})


def model_of(case: str, **keys: float) -> ACT:
    """The published model, with other keys of its architecture where given."""
    info = DatasetInfo(
        task="tokens",
        task_options={},
        vocab_size=VOCAB_SIZE,
        seq_len=SEQ_LEN,
        num_puzzle_identifiers=NUM_IDENTIFIERS,
    )
    setup = resolve(device="cpu", forward_dtype="float32", attention="sdpa")
    model = build_model(arch_of(case).model_copy(update=keys), info, setup)
    load_weights(case, model.inner)
    return model


def batch_of(arrays, *index) -> Batch:
    return Batch(
        torch.from_numpy(arrays["inputs"][index]),
        torch.from_numpy(arrays["labels"][index]).long(),
        torch.from_numpy(arrays["puzzle_identifiers"][index]),
    )
