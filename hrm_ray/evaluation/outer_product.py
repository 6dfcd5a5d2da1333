"""The largest eigenvalues of the outer product of the gradients, mean_i g_i g_i^T: how a model's sensitivity is spread.

g_i is the gradient of the loss of example i by all weights (the puzzle embedding apart), so the matrix has as many rows
as there are weights and is never made. Over n examples, those of its eigenvalues that are not 0 are also those of the
n x n matrix g_i . g_j / n, which takes n backward passes: exact, and no iteration that has to converge.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hrm_ray import memory
from hrm_ray.draws import Purpose, words
from hrm_ray.models.act import ACT, IGNORE, Batch
from hrm_ray.models.losses import cross_entropy


def sample(num_examples: int, count: int, seed: int) -> np.ndarray:
    """int64 [count], or [num_examples] if these are fewer: the examples whose gradients are taken, in order; the same
    ones of a seed always."""
    order = words(seed, Purpose.SAMPLE, 0, num_examples).argsort(kind="stable")
    return np.sort(order[:count])


def eigenvalues(
    model: ACT, batch: Batch, count: int, *, on_gradient: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Of the model as it is in evaluations, in its first ACT step, where the loss of an example is its mean over cells.

    Args:
        batch: n examples; all gradients are kept at the same time, n times the memory of the weights.
        count: of eigenvalues, the largest first; at most n are not 0.
        on_gradient: called after each example's.

    Returns:
        `eigenvalue_1`, ..., and `trace`, the sum of all.

    Raises:
        OutOfMemory: there is no room for all gradients.
    """
    n = len(batch.inputs)
    with memory.needed_for(
        f"the gradients of {n} puzzles", f"gop_examples={max(1, n // 2)} takes half of them"
    ):
        matrix = gram(model, batch, on_gradient)
    values = torch.linalg.eigvalsh(matrix).flip(0)[:count].clamp(min=0).tolist()
    named = {f"eigenvalue_{number}": value for number, value in enumerate(values, 1)}
    return named | {"trace": matrix.trace().item()}


def gram(model: ACT, batch: Batch, on_gradient: Callable[[], object] = lambda: None) -> Tensor:
    """g_i . g_j / n, float64 [n, n]; `on_gradient` is called after each g_i."""
    n = len(batch.inputs)
    gradients = []
    for i in range(n):
        gradients.append(_gradient(model, batch.rows(slice(i, i + 1))))
        on_gradient()
    matrix = torch.zeros(n, n, dtype=torch.float64, device=batch.inputs.device)
    for parts in zip(*gradients, strict=True):  # a tensor of weights at a time, for the memory of float64
        rows = torch.stack(parts).flatten(1).double()
        matrix += rows @ rows.T
    return matrix / n


def _gradient(model: ACT, batch: Batch) -> tuple[Tensor, ...]:
    """Of the loss of one example by the weights that it depends on."""
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            prediction = model(model.initial_carry(batch), batch).prediction
            losses = cross_entropy(prediction.logits, batch.labels, model.inner.config.loss.loss_type)
            loss = losses.sum() / (batch.labels != IGNORE).sum().clamp(min=1)
            weights = [p for p in model.inner.parameters() if p.requires_grad]
            return torch.autograd.grad(loss, weights, materialize_grads=True)
    finally:
        model.train(was_training)
