"""The figure of grokking: accuracy and loss of runs over their steps, on a linear and on a logarithmic axis.

Of one run, training and validation have a colour each, as in Power et al.; of several, each run has its own, and
training is dashed. Vertical lines are the steps at which an accuracy passes 99 %, a dotted horizontal one is chance
level.
"""

import io
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from hrm_ray.figures import COLOURS, DPI, GRID, INK, STYLE
from hrm_ray.grokking.read import Run
from hrm_ray.grokking.verdict import LEVELS

TRAIN, TEST = "#c9302c", "#2a9d5c"


class _Curve(NamedTuple):
    """One split of one run, and how it is drawn."""

    run: Run
    split: str
    colour: str
    line: str

    @property
    def jump(self) -> float | None:
        """Where its accuracy passes 99 %."""
        row = self.run.history.first(f"{self.split}_acc", LEVELS[0] / 100)
        return None if row is None else float(self.run.history.steps[row])

    @property
    def label(self) -> str:
        what = {"train": "training", "test": "validation"}[self.split]
        jump = "never" if self.jump is None else f"at {self.run.history.clock} {self.jump:,.0f}"
        return f"{self.run.name}, {what}: 99 % {jump}"


def draw(runs: Sequence[Run], kind: str) -> bytes:
    """The figure as a file.

    Args:
        runs: at least one.
        kind: "png", "svg" or "pdf".
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        axes = figure.subplots(2, 2, sharex="col", sharey="row")
        curves = list(_curves(runs))
        for row, what in enumerate(("acc", "loss")):
            for panel, scale in zip(axes[row], ("linear", "log"), strict=True):
                _draw(panel, curves, what, is_log=scale == "log")
        _label(axes, runs)
        columns = 2 if len(runs) == 1 else min(len(runs), 3)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=DPI)
        return file.getvalue()


def _curves(runs: Sequence[Run]) -> Iterator[_Curve]:
    if len(runs) == 1:
        yield _Curve(runs[0], "train", TRAIN, "-")
        yield _Curve(runs[0], "test", TEST, "-")
        return
    for run, colour in zip(runs, cycle(COLOURS), strict=False):
        yield _Curve(run, "train", colour, "--")
        yield _Curve(run, "test", colour, "-")


def _draw(panel: Any, curves: Sequence[_Curve], what: str, *, is_log: bool) -> None:
    """One panel; an axis is logarithmic only where something positive is drawn, and nothing else is then."""
    losses = [curve.run.history[f"{curve.split}_loss"] for curve in curves]
    is_log_loss = what == "loss" and any((np.isfinite(loss) & (loss > 0)).any() for loss in losses)
    is_empty = True
    for curve in curves:
        history = curve.run.history
        values = history[f"{curve.split}_{what}"]
        shown = np.isfinite(values)
        if is_log:
            shown &= history.steps > 0
        if is_log_loss:
            shown &= values > 0
        is_empty &= not shown.any()
        style = {"color": curve.colour, "linestyle": curve.line, "linewidth": 1.5}
        marker = "o" if shown.sum() == 1 else None  # which a line would not show
        panel.plot(history.steps[shown], values[shown], label=curve.label, marker=marker, **style)
        if curve.jump is not None and (curve.jump > 0 or not is_log):
            panel.axvline(curve.jump, color=curve.colour, linestyle=curve.line, linewidth=0.8, alpha=0.7)
    if what == "acc":
        for chance in {curve.run.source.chance for curve in curves} - {None}:
            panel.axhline(chance, color=INK, linestyle=":", linewidth=1)
        panel.set_ylim(-0.03, 1.03)
    else:
        if is_log_loss:
            panel.set_yscale("log")
        _plain(panel.yaxis)
    if not is_log:
        panel.set_xlim(left=0)
    elif not is_empty:
        panel.set_xscale("log")
    _plain(panel.xaxis)
    panel.set_axisbelow(True)
    panel.grid(True, color=GRID, linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=9, colors=INK)


def _plain(axis: Any) -> None:
    """Ticks at plain numbers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _label(axes: Any, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import PercentFormatter

    clocks = {run.history.clock for run in runs}
    clock = (
        {"step": "optimizer steps", "epoch": "epochs"}[clocks.pop()]
        if len(clocks) == 1
        else "steps or epochs"
    )
    axes[1][0].set_xlabel(clock)
    axes[1][1].set_xlabel(f"{clock}, logarithmic")
    axes[0][0].set_ylabel("accuracy")
    axes[1][0].set_ylabel("loss")
    axes[0][0].yaxis.set_major_formatter(PercentFormatter(1.0))
    for chance in {run.source.chance for run in runs if run.source.chance is not None}:
        axes[0][0].annotate(
            f"chance {chance:.2%}",
            (1, chance),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=INK,
        )
