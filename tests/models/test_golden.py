"""The published implementation's numbers (tests/golden, float32, one CPU thread) from our code."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hrm_ray.config.schema import HRMConfig
from hrm_ray.models.act import ACT, Batch
from hrm_ray.models.hrm import HRM
from hrm_ray.models.losses import METRICS, act_loss
from hrm_ray.optim.adam_atan2 import AdamATan2
from hrm_ray.optim.schedules import warmup_cosine
from hrm_ray.optim.sign_sgd import sparse_sign_sgd

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["hrm_base", "hrm_wide_puzzle_emb", "hrm_no_puzzle_emb", "hrm_learned_softmax"]
PREFIX = "_orig_mod.model.inner."


def load(case: str) -> tuple[ACT, dict]:
    config = yaml.safe_load((GOLDEN / case / "all_config.yaml").read_text())
    arch = HRMConfig(
        **{k: v for k, v in config["arch"].items() if k not in ("name", "loss", "forward_dtype")},
        loss={"loss_type": config["arch"]["loss"]["loss_type"]},
    )
    weights = torch.load(GOLDEN / case / "checkpoint", weights_only=True)
    inner = HRM(arch, vocab_size=6, seq_len=16, num_puzzle_identifiers=5)
    inner.load_state_dict({k.removeprefix(PREFIX): v for k, v in weights.items()})
    return ACT(inner, arch.halt_max_steps), config


def batch_of(arrays, *index) -> Batch:
    return Batch(
        torch.from_numpy(arrays["inputs"][index]),
        torch.from_numpy(arrays["labels"][index]).long(),
        torch.from_numpy(arrays["puzzle_identifiers"][index]),
    )


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_every_act_step_of_an_evaluation(case):
    model, config = load(case)
    model.eval()
    golden = np.load(GOLDEN / case / "eval.npz")
    batch = batch_of(golden)
    carry = model.initial_carry(batch)
    with torch.no_grad():
        for i in range(config["arch"]["halt_max_steps"]):
            step = model(carry, batch)
            loss, metrics = act_loss(step, config["arch"]["loss"]["loss_type"])
            np.testing.assert_allclose(step.prediction.logits, golden["logits"][i], atol=1e-5, rtol=1e-5)
            np.testing.assert_allclose(step.prediction.q_halt, golden["q_halt_logits"][i], atol=1e-5)
            np.testing.assert_allclose(step.prediction.q_continue, golden["q_continue_logits"][i], atol=1e-5)
            np.testing.assert_allclose(loss, golden["loss"][i], rtol=1e-5)
            carry = step.carry
    assert carry.halted.all()
    for name, value in zip(METRICS, metrics, strict=True):
        if f"metric_{name}" in golden:
            np.testing.assert_allclose(value, golden[f"metric_{name}"], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_twelve_training_steps(case):
    model, config = load(case)
    model.train()
    golden = np.load(GOLDEN / case / "train.npz")
    num_steps, batch_size = golden["halted"].shape
    optimizer = AdamATan2(
        model.parameters(), weight_decay=config["weight_decay"], betas=(config["beta1"], config["beta2"])
    )
    carry = model.initial_carry(batch_of(golden, 0))
    no_exploration = torch.zeros(batch_size, dtype=torch.int32)
    for i in range(num_steps):
        share = warmup_cosine(
            i + 1, num_steps, warmup_steps=config["lr_warmup_steps"], min_ratio=config["lr_min_ratio"]
        )
        np.testing.assert_allclose(config["lr"] * share, golden["lr"][i], rtol=1e-6)
        step = model(carry, batch_of(golden, i), no_exploration)
        loss, metrics = act_loss(step, config["arch"]["loss"]["loss_type"])
        carry = step.carry
        np.testing.assert_array_equal(carry.halted, golden["halted"][i])
        np.testing.assert_allclose(loss.detach(), golden["loss"][i], rtol=1e-4)
        for name, value in zip(METRICS, metrics, strict=True):
            np.testing.assert_allclose(value, golden[f"metric_{name}"][i], rtol=1e-4, atol=1e-4, err_msg=name)

        (loss / batch_size).backward()
        optimizer.param_groups[0]["lr"] = config["lr"] * share
        optimizer.step()
        optimizer.zero_grad()
        if config["arch"]["puzzle_emb_ndim"]:
            sparse_sign_sgd(
                model.inner.puzzle_emb.weights,
                *model.inner.puzzle_emb.take_gradients(),
                lr=config["puzzle_emb_lr"] * share,
                weight_decay=config["puzzle_emb_weight_decay"],
            )
    final = model.inner.state_dict()
    names = [name for name in golden if name.startswith("final/")]
    assert len(names) == len(final)
    for name in names:
        ours = final[name.removeprefix("final/model.inner.")]
        np.testing.assert_allclose(ours, golden[name], atol=1e-4, rtol=1e-4, err_msg=name)
