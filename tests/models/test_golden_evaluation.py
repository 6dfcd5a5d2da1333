"""Evaluation equals the published implementation's, step by step."""

import numpy as np
import pytest
import torch

from hrm_ray.models.losses import METRICS, act_loss
from tests.golden_cases import CASES, FOLDER, arch_of, batch_of, model_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_every_act_step_of_an_evaluation(case, dtype):
    """In float64 all steps: the published float32 numbers are themselves up to 2.2e-5 off what exact arithmetic gives
    after four steps that feed on each other. In float32, where CPUs round differently, only the first."""
    model, loss_type = model_of(case), arch_of(case).loss.loss_type
    model.to(dtype).eval()
    model.inner.dtype = dtype
    golden = np.load(FOLDER / case / "eval.npz")
    batch = batch_of(golden)
    carry = model.initial_carry(batch)
    with torch.no_grad():
        for i in range(len(golden["loss"])):
            step = model(carry, batch)
            loss, metrics = act_loss(step, loss_type)
            if i == 0 or dtype == torch.float64:
                close = 1e-5 if i == 0 else 2.5e-5
                prediction = step.prediction
                np.testing.assert_allclose(prediction.logits, golden["logits"][i], atol=close)
                np.testing.assert_allclose(prediction.q_halt, golden["q_halt_logits"][i], atol=close)
                np.testing.assert_allclose(prediction.q_continue, golden["q_continue_logits"][i], atol=close)
            np.testing.assert_allclose(loss, golden["loss"][i], rtol=1e-5)
            carry = step.carry
    assert carry.halted.all()
    for name, value in zip(METRICS, metrics, strict=True):
        if f"metric_{name}" in golden:
            np.testing.assert_allclose(value, golden[f"metric_{name}"], rtol=1e-5, atol=1e-5, err_msg=name)
