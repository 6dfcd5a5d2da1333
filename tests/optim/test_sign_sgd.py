"""Sparse sign-SGD against a loop over rows."""

import pytest
import torch

from hrm_ray.optim.sign_sgd import sparse_sign_sgd


def test_against_a_loop_over_rows():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 3, generator=generator)
    identifiers = torch.tensor([4, 1, 4, 0, 4])
    gradients = torch.randn(5, 3, generator=generator)
    gradients[3] = 0  # a row whose gradient vanishes only decays
    expected = table.clone()
    for row in {0, 1, 4}:
        summed = sum(g for i, g in zip(identifiers.tolist(), gradients, strict=True) if i == row)
        expected[row] = expected[row] * (1 - 0.1 * 0.5) - 0.1 * summed.sign()
    sparse_sign_sgd(table, identifiers, gradients, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(table, expected)


def test_a_gradient_that_is_not_finite_stays_in_its_row():
    table, gradients = torch.zeros(3, 2), torch.ones(3, 2)
    gradients[1, 0] = torch.inf
    sparse_sign_sgd(table, torch.tensor([2, 1, 0]), gradients, lr=0.1, weight_decay=0.0)
    torch.testing.assert_close(table, torch.full((3, 2), -0.1))


def test_nothing_is_looked_up():
    table = torch.ones(3, 2)
    sparse_sign_sgd(table, torch.zeros(0, dtype=torch.int32), torch.zeros(0, 2), lr=0.1, weight_decay=0.5)
    assert torch.equal(table, torch.ones(3, 2))


@pytest.mark.parametrize("shapes", [((2,), (3, 2)), ((3,), (3, 1)), ((3, 1), (3, 2))])
def test_shapes_that_do_not_belong_together(shapes):
    identifiers, gradients = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"have the shapes \[3, 2\], "):
        sparse_sign_sgd(torch.zeros(3, 2), identifiers.int(), gradients, lr=0.1, weight_decay=0.5)
