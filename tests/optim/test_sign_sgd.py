"""Sparse sign-SGD against a loop over rows."""

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
