"""The ACT loss and its metrics, summed over the slots of one worker.

Sums, not means: the caller divides by the *global* batch size, so that any number of workers gives the same
gradient. Padding rows (no labelled cell) count nowhere.

Source: Wang et al. 2025, arXiv:2506.21734, equations for the sequence-to-sequence and Q losses; stablemax from
Prieto et al. 2025, arXiv:2501.04697; label smoothing from Szegedy et al. 2016, arXiv:1512.00567 (in recursive models:
"Speed is Confidence", arXiv:2601.19085, which takes 0.2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_ray.config.arch import LossType
from hrm_ray.models.act import IGNORE, Step

# Sums over slots, in the order of the vector that is reduced over workers. The first group is over the slots
# that halted at this step, the second over all; under Q-learning `q_continue_loss` is the loss of what is replayed.
METRICS = (
    "count",
    "accuracy",
    "exact_accuracy",
    "q_halt_accuracy",
    "steps",
    "lm_loss",
    "q_halt_loss",
    "q_continue_loss",
)
Q_LOSS_WEIGHT = 0.5  # of each Q loss, beside the loss of the answers


def log_stablemax_scores(logits: Tensor) -> Tensor:
    """log s(x), s(x) = x + 1 for x >= 0 and 1 / (1 - x) below; softmax of it is stablemax.

    In float32 this form loses nothing: no subtraction of near numbers, and the gradient at 0 is that of x + 1
    (clamp passes it there, relu does not).
    """
    return logits.clamp(min=0).log1p() - F.relu(-logits).log1p()


def cross_entropy(
    logits: Tensor, labels: Tensor, loss_type: LossType, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of every cell, 0 where the label is -100.

    Args:
        logits: [..., A, V] float32, of the last A of C cells.
        labels: [..., C] int64.
        loss_type: over stablemax or over softmax.
        label_smoothing: share of the target that lies evenly on all V tokens, also on those that no label is.

    Returns:
        [..., A] float32.
    """
    labels = labels[..., -logits.shape[-2] :]
    if loss_type == "stablemax_cross_entropy":
        logits = log_stablemax_scores(logits)
    flat = F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORE,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return flat.view(labels.shape)


@torch.no_grad()
def count_right(tokens_BC: Tensor, labels_BC: Tensor) -> tuple[Tensor, Tensor]:
    """How many labelled cells of each puzzle are right, and how many there are; int64 [B] each.

    Args:
        tokens_BC: may be those of the last cells only, where no other has a label.
    """
    labels_BC = labels_BC[:, -tokens_BC.shape[1] :]
    labelled = labels_BC != IGNORE
    return ((tokens_BC == labels_BC) & labelled).sum(-1), labelled.sum(-1)


def act_loss(
    step: Step, loss_type: LossType, label_smoothing: float = 0.0, *, has_q_head: bool = True
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Loss of one ACT step, its metrics, and what of it is right.

    Args:
        has_q_head: whether there are losses of Q values.

    Returns:
        the loss (scalar, summed over slots), the metrics (float32 vector in the order of `METRICS`, summed;
        accuracies and steps over the slots that halted at this step; `lm_loss` with its label smoothing), and
        `count_right`.
    """
    labels, prediction = step.carry.batch.labels, step.prediction
    num_right, num_labelled = count_right(prediction.logits.argmax(-1), labels)
    is_puzzle = num_labelled > 0
    cell_weight = 1 / num_labelled.clamp(min=1)

    lm_losses = cross_entropy(prediction.logits, labels, loss_type, label_smoothing).sum(-1) * cell_weight
    with torch.no_grad():
        exact = num_right == num_labelled
        halted = (step.carry.halted & is_puzzle).float()
    q_halt_losses = is_puzzle * F.binary_cross_entropy_with_logits(
        prediction.q_halt, exact.float(), reduction="none"
    )
    loss = lm_losses.sum()
    if has_q_head:
        loss = loss + Q_LOSS_WEIGHT * q_halt_losses.sum()
    q_continue_loss = torch.zeros_like(loss)
    if step.target_q_continue is not None:
        q_continue_losses = F.binary_cross_entropy_with_logits(
            prediction.q_continue, step.target_q_continue, reduction="none"
        )
        q_continue_loss = (is_puzzle * q_continue_losses).sum()
        loss = loss + Q_LOSS_WEIGHT * q_continue_loss

    with torch.no_grad():
        metrics = torch.stack(
            (
                halted.sum(),
                (halted * num_right * cell_weight).sum(),
                (halted * exact).sum(),
                (halted * ((prediction.q_halt >= 0) == exact)).sum(),
                (halted * step.carry.steps).sum(),
                lm_losses.sum(),
                q_halt_losses.sum(),
                q_continue_loss,
            )
        )
    return loss, metrics, (num_right, num_labelled)
