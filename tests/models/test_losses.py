"""The loss in float32 against float64, and padding."""

import pytest
import torch

from hrm_ray.models.act import IGNORE, Batch, Carry, Step
from hrm_ray.models.losses import METRICS, act_loss, cross_entropy
from hrm_ray.models.recursive import Prediction, State


def stablemax64(logits, labels):
    """Cross entropy over stablemax from its definition, in float64."""
    x = logits.double()
    s = torch.where(x < 0, 1 / (1 - x.clamp(max=0)), x + 1)
    log_p = torch.log(s / s.sum(-1, keepdim=True))
    picked = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == IGNORE, 0.0, -picked)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("vocab_size", [6, 11, 12])
def test_stablemax_in_float32_agrees_with_float64(scale, vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(64, 81, vocab_size, generator=generator) * scale
    labels = torch.randint(0, vocab_size, (64, 81), generator=generator)
    labels[torch.rand(64, 81, generator=generator) < 0.1] = IGNORE

    single = logits.clone().requires_grad_()
    loss = cross_entropy(single, labels, "stablemax_cross_entropy")
    loss.sum().backward()
    double = logits.double().requires_grad_()
    expected = stablemax64(double, labels)
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["softmax_cross_entropy", "stablemax_cross_entropy"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.9])
def test_a_share_of_the_target_lies_on_all_tokens(loss_type, share):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(64, 81, 11, generator=generator)
    labels = torch.randint(0, 11, (64, 81), generator=generator)
    labels[:, ::8] = IGNORE
    single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = cross_entropy(single, labels, loss_type, share)
    loss.sum().backward()
    scores = double
    if loss_type == "stablemax_cross_entropy":
        scores = torch.where(double < 0, -(1 - double.clamp(max=0)).log(), (1 + double.clamp(min=0)).log())
    target = torch.full((64, 81, 11), share / 11, dtype=torch.float64)
    target += (1 - share) * torch.nn.functional.one_hot(labels.clamp(min=0), 11)
    expected = torch.where(labels == IGNORE, 0.0, -(target * scores.log_softmax(-1)).sum(-1))
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-5, atol=1e-6)
    assert not torch.equal(loss, cross_entropy(logits, labels, loss_type))


def test_stablemax_gradient_at_zero_is_that_of_x_plus_one():
    logits = torch.zeros(1, 4, requires_grad=True)
    cross_entropy(logits, torch.tensor([2]), "stablemax_cross_entropy").sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.25, 0.25, -0.75, 0.25]]))


@pytest.mark.parametrize("loss_type", ["softmax_cross_entropy", "stablemax_cross_entropy"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_padding_rows_count_nowhere(loss_type, smoothing):
    generator = torch.Generator().manual_seed(0)

    def step(rows):
        labels = torch.randint(1, 6, (4, 16), generator=generator.manual_seed(1))
        labels[2:] = IGNORE
        logits = torch.randn(4, 16, 6, generator=generator.manual_seed(2))
        q = torch.randn(4, generator=generator.manual_seed(3))
        batch = Batch(labels[rows], labels[rows], torch.zeros(len(rows), dtype=torch.int32))
        steps, halted = torch.ones(len(rows), dtype=torch.int32), torch.ones(len(rows), dtype=torch.bool)
        nothing = torch.empty(0)
        carry = Carry(State(nothing, nothing), steps, halted, batch)
        return Step(carry, Prediction(logits[rows], q[rows], q[rows]), torch.full((len(rows),), 0.5))

    loss, metrics, _ = act_loss(step(torch.tensor([0, 1, 2, 3])), loss_type, smoothing)
    loss_without, metrics_without, _ = act_loss(step(torch.tensor([0, 1])), loss_type, smoothing)
    torch.testing.assert_close(loss, loss_without)
    torch.testing.assert_close(metrics, metrics_without)
    assert metrics[METRICS.index("count")] == 2
