"""Draw the curves of runs: exact accuracy and loss over training seconds.

python -m benchmarks.plot_run runs/quickstart [RUN ...] out=docs/quickstart.png
"""

import argparse
import json
from itertools import accumulate
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def draw(runs: list[Path], out: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for run in runs:
        records = read(run)
        train = [r for r in records if "train/loss" in r]
        steps = [r["global_step"] for r in train]
        lengths = [b - a for a, b in zip([0, *steps], steps, strict=False)]
        pairs = zip(train, lengths, strict=True)
        seconds = dict(zip(steps, accumulate(r["time/step_s"] * n for r, n in pairs), strict=True))
        left.plot([seconds[s] for s in steps], [r["train/lm_loss"] for r in train], label=run.name)
        shown = [
            (seconds[r["global_step"]], r["train/exact_accuracy"])
            for r in train
            if "train/exact_accuracy" in r
        ]
        line = right.plot(*zip(*shown, strict=True), alpha=0.4, label=f"{run.name}, training")[0]
        tests = [
            (seconds[r["global_step"]], r["eval/exact_accuracy"])
            for r in records
            if "eval/exact_accuracy" in r
        ]
        right.plot(*zip(*tests, strict=True), "o-", color=line.get_color(), label=f"{run.name}, held out")
        right.annotate(
            f"{tests[-1][1]:.1%}", tests[-1], textcoords="offset points", xytext=(-6, -14), ha="right"
        )
    left.set(xlabel="seconds of training", ylabel="loss of a cell", yscale="log")
    right.set(xlabel="seconds of training", ylabel="puzzles exactly right", ylim=(0, 1.03))
    right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    right.legend(loc="lower right", frameon=False)
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="RUN", help="run folders, and out=FILE.png")
    words = parser.parse_args().words
    outs = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    draw([Path(word) for word in words if not word.startswith("out=")], Path(outs[0] if outs else "run.png"))


if __name__ == "__main__":
    main()
