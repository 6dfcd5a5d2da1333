"""Does choosing pay? TPE with pruning against random search without, by the steps that all their trials train.

    python -m benchmarks.search data=data/sudoku-4x4 out=docs/search.png

A small TRM with an MLP on 4x4 Sudoku; what counts is its loss in the end. For each of three seeds both search the same
space (lr, weight decay, warm-up, halting's exploration) with as many optimizer steps in all: random search with
`trials` whole trials, TPE with as many more as its pruned ones leave steps for. The result is the share of random
search's steps in which TPE with pruning reaches what random search has found in the end. Steps, not seconds: so other
load on the machine changes nothing.
"""

import math
import statistics
import tempfile
from itertools import accumulate
from pathlib import Path

from optuna.trial import TrialState

from benchmarks import front
from hrm_ray.errors import UserError
from hrm_ray.tuning.config import SweepConfig, sweep_config
from hrm_ray.tuning.status import opened
from hrm_ray.tuning.study import ENDED, OUTCOME
from hrm_ray.tuning.sweep import run_sweep, sweep_folder

SEEDS = (0, 1, 2)
KINDS = {
    "random": {"sampler": "random", "pruner": None},
    "tpe": {"sampler": "tpe", "pruner": {"name": "successive_halving", "reduction_factor": 3}},
}


def sweep_of(data: str, folder: str, kind: str, seed: int, trials: int, steps: int) -> SweepConfig:
    train = (
        f"experiment=sudoku_4x4 data={data} arch=trm_mlp arch.hidden_size=64 arch.num_heads=2 arch.L_layers=1 "
        f"global_batch_size=32 epochs=1 max_steps={steps} log_interval={steps // 9} eval_interval=null "
        "num_eval_examples=1 tensorboard=false keep_last=1"
    )
    space = {
        "lr": {"log": [1e-4, 3e-2]},
        "weight_decay": {"log": [1e-2, 10]},
        "lr_warmup_ratio": {"uniform": [0.01, 0.5]},
        "arch.halt_exploration_prob": {"uniform": [0, 1]},
    }
    values = KINDS[kind]
    return sweep_config(
        {
            "train": train,
            "space": space,
            "metric": "train/lm_loss",
            "num_trials": trials,
            "storage": folder,
            "run_name": f"{kind}-{seed}",
            "keep": 1,
            **values,
            "sampler": {"name": values["sampler"], "seed": seed},
        }
    )


def curve_of(config: SweepConfig) -> tuple[list[int], list[float]]:
    """Run, or extend, a sweep.

    Returns:
        steps of all its trials, one after another, and the best value of those that are complete.
    """
    run_sweep(config)
    trials = sorted(opened(sweep_folder(config)).trials(*ENDED), key=lambda trial: trial.datetime_complete)
    steps = list(accumulate(trial.user_attrs[OUTCOME]["global_step"] for trial in trials))
    values = (trial.values[0] if trial.state == TrialState.COMPLETE else math.inf for trial in trials)
    best = list(accumulate(values, min))
    return steps, best


def measure(data: str, out: str, trials: int, steps: int) -> dict:
    if steps < 18:
        raise UserError(f"steps={steps}: at least 18, for two evaluations")
    curves: dict[str, list[tuple[list[int], list[float]]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for kind in KINDS:
                found, num_trials = curve_of(sweep_of(data, folder, kind, seed, trials, steps)), trials
                while found[0][-1] < trials * steps:
                    num_trials += trials // 2
                    found = curve_of(sweep_of(data, folder, kind, seed, num_trials, steps))
                curves[kind].append(found)
    shares = []
    for random, tpe in zip(curves["random"], curves["tpe"], strict=True):
        target, total = random[1][-1], random[0][-1]
        reached = next((step for step, best in zip(*tpe, strict=True) if best <= target), None)
        shares.append(None if reached is None else round(reached / total, 3))
    _plot(curves, Path(out))
    known = [share for share in shares if share is not None]
    return {
        "benchmark": "search",
        "share_of_steps": shares,
        "median": statistics.median(known) if len(known) == len(shares) else None,
        "random": [{"steps": s[-1], "best": round(b[-1], 4)} for s, b in curves["random"]],
        "tpe": [{"steps": s[-1], "best": round(b[-1], 4)} for s, b in curves["tpe"]],
        "trials": trials,
        "steps": steps,
        "plot": out,
    }


def _plot(curves: dict[str, list[tuple[list[int], list[float]]]], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for kind, color, label in (
        ("random", "tab:gray", "random search, no pruning"),
        ("tpe", "tab:blue", "TPE with successive halving"),
    ):
        for seed, (steps, best) in enumerate(curves[kind]):
            axes.step(
                steps,
                best,
                where="post",
                color=color,
                linestyle=("-", "--", ":")[seed],
                label=f"{label}, seed {seed}",
            )
    axes.set(xlabel="optimizer steps of all trials", ylabel="lowest train/lm_loss at the end of a trial")
    axes.set_yscale("log")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=130)


def tell(result: dict) -> str:
    lines = ["seed  random: best, steps    TPE: best, steps    share of the steps to reach random's best"]
    for seed, share in enumerate(result["share_of_steps"]):
        random, tpe = result["random"][seed], result["tpe"][seed]
        lines.append(
            f"{seed:4}  {random['best']:12.4f} {random['steps']:7}  {tpe['best']:10.4f} {tpe['steps']:7}    "
            f"{'never' if share is None else share}"
        )
    return "\n".join(lines)


def main() -> None:
    front.run(__doc__, measure, tell, {"data": str, "out": "search.png", "trials": 20, "steps": 135})


if __name__ == "__main__":
    main()
