"""Evaluation equals the published implementation's, step by step."""

import numpy as np
import pytest
import torch

from hrm_ray.models.losses import METRICS, act_loss
from tests.golden_cases import CASES, FOLDER, batch_of, config_of, model_of


@pytest.mark.parametrize("case", CASES)
def test_every_act_step_of_an_evaluation(case):
    model, arch = model_of(case), config_of(case)["arch"]
    model.eval()
    golden = np.load(FOLDER / case / "eval.npz")
    batch = batch_of(golden)
    carry = model.initial_carry(batch)
    with torch.no_grad():
        for i in range(arch["halt_max_steps"]):
            step = model(carry, batch)
            loss, metrics = act_loss(step, arch["loss"]["loss_type"])
            # Steps feed on each other, and CPUs round differently: 2e-6 after the first, up to 2e-5 after the fourth.
            close = 1e-5 if i == 0 else 5e-5
            prediction = step.prediction
            np.testing.assert_allclose(prediction.logits, golden["logits"][i], atol=close, rtol=close)
            np.testing.assert_allclose(prediction.q_halt, golden["q_halt_logits"][i], atol=close)
            np.testing.assert_allclose(prediction.q_continue, golden["q_continue_logits"][i], atol=close)
            np.testing.assert_allclose(loss, golden["loss"][i], rtol=1e-5)
            carry = step.carry
    assert carry.halted.all()
    for name, value in zip(METRICS, metrics, strict=True):
        if f"metric_{name}" in golden:
            np.testing.assert_allclose(value, golden[f"metric_{name}"], rtol=1e-5, atol=1e-5, err_msg=name)
