"""What a trial can be judged by, and which way is better."""

from hrm_ray.config.validate import nearest
from hrm_ray.errors import UserError
from hrm_ray.evaluation.scores import Direction, directions

# Of evaluations, of the training between two reports, and of a run as a whole.
DIRECTIONS: dict[str, Direction] = {
    **directions(),
    "train/accuracy": "maximize",
    "train/exact_accuracy": "maximize",
    "train/q_halt_accuracy": "maximize",
    "train/steps": "minimize",
    "train/loss": "minimize",
    "train/lm_loss": "minimize",
    "train/q_halt_loss": "minimize",
    "train/q_continue_loss": "minimize",
    "train_s": "minimize",
    "num_params": "minimize",
}
AT_THE_END = ("train_s", "num_params")  # known of a whole run only


def direction_of(metric: str) -> Direction:
    """Which way `metric` is better. Raises UserError if no run reports it."""
    if metric not in DIRECTIONS:
        raise UserError(f"metric '{metric}' is never reported; {nearest(metric, DIRECTIONS)}")
    return DIRECTIONS[metric]
