"""Evaluation equals the published implementation's, step by step."""

import numpy as np
import pytest
import torch

from hrm_ray.models.losses import METRICS, act_loss
from tests.golden_cases import CASES, FOLDER, arch_of, batch_of, model_of


def run(case, dtype, **keys):
    """Every ACT step of the published puzzles."""
    model = model_of(case, **keys)
    model.to(dtype).eval()
    model.inner.dtype = dtype
    golden = np.load(FOLDER / case / "eval.npz")
    batch = batch_of(golden)
    carry, steps = model.initial_carry(batch), []
    with torch.no_grad():
        for _ in golden["loss"]:
            steps.append(model(carry, batch))
            carry = steps[-1].carry
    assert carry.halted.all()
    return golden, steps


def outputs(step):
    """Logits [8, 16, 6] and Q values [8, 2] in one array."""
    logits, q_halt, q_continue = step.prediction
    return torch.cat([logits.flatten(1), q_halt[:, None], q_continue[:, None]], 1).double().numpy()


@pytest.mark.parametrize("case", CASES)
def test_outputs_of_every_act_step(case):
    """In float64, since CPUs round float32 differently. The published numbers are float32, and steps feed on each
    other: HRM's are up to 2.2e-5 off what exact arithmetic gives. TRM recurs deeper, so that rounding grows from step
    to step (with `mlp_t` to 0.1 after four): there the distance may be three times that of our own float32 numbers."""
    golden, exact = run(case, torch.float64)
    _, rounded = run(case, torch.float32)
    for i, step in enumerate(exact):
        published = np.concatenate(
            [
                golden["logits"][i].reshape(8, -1),
                golden["q_halt_logits"][i][:, None],
                golden["q_continue_logits"][i][:, None],
            ],
            axis=1,
        )
        own_rounding = np.abs(outputs(rounded[i]) - outputs(step)).max()
        close = max(2.5e-5, 3 * own_rounding) if case.startswith("trm") else 2.5e-5
        np.testing.assert_allclose(outputs(step), published, rtol=0, atol=close)


@pytest.mark.parametrize("case", [case for case in CASES if case != "trm_mlp_t"])
def test_first_step_and_metrics_in_float32(case):
    golden, steps = run(case, torch.float32)
    np.testing.assert_allclose(steps[0].prediction.logits, golden["logits"][0], atol=1e-5)
    np.testing.assert_allclose(steps[0].prediction.q_halt, golden["q_halt_logits"][0], atol=1e-5)
    np.testing.assert_allclose(steps[0].prediction.q_continue, golden["q_continue_logits"][0], atol=1e-5)
    for i, step in enumerate(steps):
        loss, metrics, _ = act_loss(step, arch_of(case).loss.loss_type)
        np.testing.assert_allclose(loss, golden["loss"][i], rtol=1e-5)
    for name, value in zip(METRICS, metrics, strict=True):
        if f"metric_{name}" in golden:
            np.testing.assert_allclose(value, golden[f"metric_{name}"], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("key", "value", "q_halt"),
    [
        ("rope_theta", 10_000.0, [-3.94415, -1.68299, 4.13084]),
        ("rope_theta", 100.0, [-1.44988, 1.11474, 2.33755]),
        ("rms_norm_eps", 0.1, [-3.81215, -1.65863, 3.84389]),
    ],
)
def test_other_positions_and_norms_are_the_published_code_s(key, value, q_halt):
    """Its q_halt of three puzzles after four steps, with the weights of `hrm_base`."""
    _, steps = run("hrm_base", torch.float32, **{key: value})
    np.testing.assert_allclose(steps[-1].prediction.q_halt[:3], q_halt, atol=2e-4)
