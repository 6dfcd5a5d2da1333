"""The published implementation's numbers (tests/golden/, float32, one CPU thread) and how to load them."""

from pathlib import Path

import torch
import yaml

from hrm_ray.config.schema import HRMConfig
from hrm_ray.models.act import ACT, Batch
from hrm_ray.models.hrm import HRM

FOLDER = Path(__file__).parent / "golden"
CASES = ["hrm_base", "hrm_wide_puzzle_emb", "hrm_no_puzzle_emb", "hrm_learned_softmax"]
VOCAB_SIZE, SEQ_LEN, NUM_IDENTIFIERS = 6, 16, 5


def config_of(case: str) -> dict:
    return yaml.safe_load((FOLDER / case / "all_config.yaml").read_text())


def arch_of(case: str) -> HRMConfig:
    arch = config_of(case)["arch"]
    values = {k: v for k, v in arch.items() if k not in ("name", "loss", "forward_dtype")}
    return HRMConfig(**values, loss={"loss_type": arch["loss"]["loss_type"]})


def load_weights(case: str, inner: HRM) -> None:
    weights = torch.load(FOLDER / case / "checkpoint", weights_only=True)
    inner.load_state_dict({k.removeprefix("_orig_mod.model.inner."): v for k, v in weights.items()})


def model_of(case: str) -> ACT:
    arch = arch_of(case)
    inner = HRM(arch, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, num_puzzle_identifiers=NUM_IDENTIFIERS)
    load_weights(case, inner)
    return ACT(inner, arch.halt_max_steps)


def batch_of(arrays, *index) -> Batch:
    return Batch(
        torch.from_numpy(arrays["inputs"][index]),
        torch.from_numpy(arrays["labels"][index]).long(),
        torch.from_numpy(arrays["puzzle_identifiers"][index]),
    )
