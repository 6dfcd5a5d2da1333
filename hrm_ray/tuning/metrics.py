"""What a trial can be judged by, and which way is better."""

from collections.abc import Sequence

from hrm_ray.config.compose import train_config
from hrm_ray.config.validate import nearest
from hrm_ray.data.shards import open_dataset
from hrm_ray.errors import UserError
from hrm_ray.evaluation.scores import Direction, directions

# Of the training between two reports, and of a run as a whole.
_OF_RUNS: dict[str, Direction] = {
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


def is_of_evaluations(metric: str) -> bool:
    """Whether the task of the data set says if it is reported."""
    return str(metric).startswith("eval/")


def direction_of(metric: str, train: Sequence[str] = ()) -> Direction:
    """Which way `metric` is better.

    Args:
        train: words of ``hrm-ray train``; a metric that no task here has may be of the task of their data set.

    Raises:
        UserError: a sweep cannot be judged by it.
    """
    known = {**directions(), **_OF_RUNS}
    reason = ""
    if metric not in known and is_of_evaluations(metric):
        try:
            known |= directions(open_dataset(train_config(train).data_path).task.name)
        except UserError as error:
            reason = f" (the data set could not be asked: {error})"
    if metric not in known:
        raise UserError(f"a sweep cannot be judged by metric '{metric}'; {nearest(metric, known)}{reason}")
    return known[metric]
