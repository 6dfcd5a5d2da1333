"""What is done about a step whose loss or weights are not finite: stop, or go back and leave its batches out."""

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import NonFiniteLoss
from hrm_ray.training.meter import LossDiverged


def check_allowed(config: TrainConfig, problem: LossDiverged, num_rollbacks: int, lr: float) -> None:
    """Raise NonFiniteLoss if the run is to stop instead, or was rolled back too often.

    Args:
        num_rollbacks: so far.
        lr: at the step of `problem`.
    """
    if config.on_nonfinite == "rollback" and num_rollbacks < config.max_rollbacks:
        return
    hint = ", or leave out such batches with on_nonfinite=rollback"
    raise NonFiniteLoss(
        f"{problem.what}{f', after {num_rollbacks} rollbacks' if num_rollbacks else ''} "
        f"(lr {lr:.3g}); lower lr or lengthen lr_warmup_steps"
        f"{hint if config.on_nonfinite == 'stop' else ''}; the same command continues from the last "
        "checkpoint, run_name=NAME starts a new run"
    )


def steps_left_out(problem: LossDiverged, restored_step: int, num_tries: int) -> range:
    """The steps whose batches are left out after going back to `restored_step`.

    The batch that shows the problem and the one whose update may have caused it; twice as many for each of `num_tries`
    from that step that did not help.
    """
    first = max(restored_step, problem.step - 2 ** (1 + num_tries)) + 1
    return range(first, problem.step + 1)
