"""The plots of a sweep, as PNG files: Optuna's own where it has one, made readable, and two of hrm_ray.

Pyplot is global: inside `_off_screen` it draws with Agg in a style for these plots, outside it is as it was before.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hrm_ray.errors import first_line
from hrm_ray.tuning.space import as_text
from hrm_ray.tuning.statistics import confidence
from hrm_ray.tuning.study import ReadStudy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
SLICES_IN_A_ROW = 4
NUM_FOR_IMPORTANCES = 8  # complete trials; of fewer, the best tenth is one or two
FAR_APART = 50  # values whose ratio is larger stand on a logarithmic axis
INK, GRID = "#222222", "#dddddd"
BEST = "#111111"
STATES = {  # how a learning curve looks, by the state of its trial
    TrialState.COMPLETE: ("complete", "#2f78b7", "-"),
    TrialState.PRUNED: ("pruned", "#e08a1e", "-"),
    TrialState.FAIL: ("failed", "#c9302c", "--"),
    TrialState.RUNNING: ("running", "#2a9d5c", ":"),
}
STYLE = {
    "figure.facecolor": "white",
    "figure.figsize": (8.0, 4.2),
    "font.family": "sans-serif",
    "font.size": 10.0,
    "savefig.facecolor": "white",
}

Target = Callable[[FrozenTrial], float]


class Plots(dict[str, bytes]):
    """PNG files by name.

    Attributes:
        failed: why others are missing, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[str, str] = {}


def plots(study: ReadStudy) -> Plots:
    """All plots that can say something of a sweep; one that fails is left out. Never raises."""
    found = Plots()
    try:
        import matplotlib.pyplot
    except ImportError:
        found.failed["plots"] = "matplotlib is not installed; pip install matplotlib"
        return found
    for name, draw in _wanted(study):
        try:
            with _off_screen():
                found[name] = _png(draw())
        except Exception as error:  # of any kind: a plot is worth no sweep
            found.failed[name] = f"{type(error).__name__}: {first_line(error)}"
    return found


def short_names(names: Iterable[str]) -> dict[str, str]:
    """What stands behind the last "/" or "." of a key, where that is no other's too."""
    short = {name: name.replace("/", ".").rpartition(".")[2] for name in names}
    last = list(short.values())
    return {name: text if last.count(text) == 1 else name for name, text in short.items()}


def is_over_seeds(study: ReadStudy) -> bool:
    """Whether trials differ in nothing but the seed."""
    return list(study.config.space) == ["seed"]


def _wanted(study: ReadStudy) -> Iterator[tuple[str, Callable[[], "Figure"]]]:
    metrics = list(study.config.metric)
    complete = [t for t in study.trials(TrialState.COMPLETE) if all(map(math.isfinite, t.values))]
    params = sorted({key for trial in complete for key in trial.params})
    several = len(metrics) > 1
    if is_over_seeds(study):
        if len(complete) > 1:
            yield "seeds", lambda: _seeds(study, complete)
    elif len(complete) > 1:
        if several and len(metrics) < 4:
            yield "pareto_front", lambda: _pareto_front(study)
        yield from _of_each(study, "history", _history)
        if len(complete) >= NUM_FOR_IMPORTANCES and len(params) > 1:
            yield from _of_each(study, "importances", _importances)
        yield from _of_each(study, "slice", _slice)
        if len(params) > 1:
            yield "parallel_coordinate", lambda: _parallel_coordinate(study)
    if not several and len({step for trial in study.trials() for step in trial.intermediate_values}) > 1:
        yield "rungs", lambda: _rungs(study)


def _of_each(
    study: ReadStudy, name: str, draw: Callable[[ReadStudy, int], "Figure"]
) -> Iterator[tuple[str, Callable[[], "Figure"]]]:
    """A plot, of several metrics one for each."""
    metrics = list(study.config.metric)
    for index, metric in enumerate(metrics):
        full = name if len(metrics) == 1 else f"{name}_{metric.replace('/', '_')}"
        yield full, lambda index=index: draw(study, index)  # type: ignore[misc]


@contextmanager
def _off_screen() -> Iterator[None]:
    """Inside, pyplot draws for files; figures that are left open there are closed."""
    import matplotlib
    from matplotlib import pyplot

    backend = matplotlib.rcParams.copy()["backend"]  # of a copy, as it may still be open which it will be
    is_chosen = isinstance(backend, str)
    others = set(pyplot.get_fignums())
    with warnings.catch_warnings(), pyplot.rc_context(STYLE), pyplot.ioff():
        warnings.simplefilter("ignore")
        pyplot.switch_backend("agg")
        try:
            yield
        finally:
            for number in set(pyplot.get_fignums()) - others:
                pyplot.close(number)
            if is_chosen:
                pyplot.switch_backend(backend)
            else:
                matplotlib.rcParams["backend"] = backend
                pyplot._backend_mod = None  # type: ignore[attr-defined]


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.12)
    return file.getvalue()


def _figure_of(axes: "Axes") -> "Figure":
    figure = axes.get_figure(root=True) if axes is not None else None
    assert figure is not None
    return figure


def _dress(figure: "Figure") -> None:
    """The look of all plots, on top of that of Optuna's; titles stand on the page."""
    figure.suptitle("")
    for axes in figure.axes:
        axes.set_title("")
        axes.set_facecolor("white")
        axes.tick_params(colors=INK, labelsize=9)
        axes.xaxis.label.set(color=INK, size=10)
        axes.yaxis.label.set(color=INK, size=10)
        for side, spine in axes.spines.items():
            spine.set(color="#888888", visible=spine.get_visible() and side not in ("top", "right"))


def _grid(axes: "Axes") -> None:
    axes.set_axisbelow(True)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.grid(False, which="minor")


def _target(study: ReadStudy, index: int) -> Target | None:
    """The value of one of several metrics; None: the only one."""
    return None if len(study.config.metric) == 1 else lambda trial: trial.values[index]


def _metric_names(study: ReadStudy) -> list[str]:
    return list(short_names(study.config.metric).values())


def _scale_far_apart(axis: Any, values: Iterable[float]) -> None:
    """A logarithmic axis for losses of which one has exploded."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > FAR_APART * min(finite):
        axis.set_yscale("log")


def _all_values(study: ReadStudy, index: int) -> list[float]:
    return [trial.values[index] for trial in study.trials(TrialState.COMPLETE)]


def _history(study: ReadStudy, index: int) -> "Figure":
    from optuna.visualization import matplotlib as visual

    name = _metric_names(study)[index]
    axes = visual.plot_optimization_history(study.study, target=_target(study, index), target_name=name)
    figure = _figure_of(axes)
    _dress(figure)
    _grid(axes)
    _scale_far_apart(axes, _all_values(study, index))
    axes.set_xlabel("trial")
    axes.xaxis.get_major_locator().set_params(integer=True)
    best = [line for line in axes.lines if line.get_label() == "Best Value"]
    for line in best:
        line.set(color=BEST, alpha=1, linewidth=1.5, drawstyle="steps-post", label="best so far")
    if axes.get_legend() is not None:
        axes.get_legend().remove()
    if best:
        _legend_above(axes)
    return figure


def _legend_above(axes: "Axes", **options: Any) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=9, labelcolor=INK, **options
    )


def _importances(study: ReadStudy, index: int) -> "Figure":
    from optuna.visualization import matplotlib as visual

    axes = visual.plot_param_importances(
        study.study,
        evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
        target=_loss(study, index),
        target_name=_metric_names(study)[index],
    )
    figure = _figure_of(axes)
    _dress(figure)
    names = short_names(study.config.space)
    ticks = axes.get_yticks()
    axes.set_yticks(ticks, [names[label.get_text()] for label in axes.get_yticklabels()])
    figure.set_size_inches(8, 0.9 + 0.4 * len(ticks))
    axes.margins(y=0.02)
    axes.grid(False)
    axes.set(xlabel="importance", ylabel="")
    axes.get_legend().remove()
    return figure


def _loss(study: ReadStudy, index: int) -> Target | None:
    """PED-ANOVA takes small values of a target for good ones."""
    if len(study.config.metric) == 1:
        return None
    sign = 1 if list(study.config.metric.values())[index] == "minimize" else -1
    return lambda trial: sign * trial.values[index]


def _slice(study: ReadStudy, index: int) -> "Figure":
    from optuna.visualization import matplotlib as visual

    found = visual.plot_slice(
        study.study, target=_target(study, index), target_name=_metric_names(study)[index]
    )
    every = list(found.flat) if hasattr(found, "flat") else [found]
    figure = _figure_of(every[0])
    figure.set_layout_engine("constrained")
    colorbar = next(axes for axes in figure.axes if axes not in every)
    _dress(figure)
    _in_rows(figure, every, colorbar)
    _scale_far_apart(every[0], _all_values(study, index))
    names = short_names(study.config.space)
    for number, axes in enumerate(every):
        key = axes.get_xlabel()
        _grid(axes)
        axes.set_xlabel(names[key])
        is_first = number % SLICES_IN_A_ROW == 0
        axes.tick_params(labelleft=is_first, labelbottom=True)
        axes.set_ylabel(_metric_names(study)[index] if is_first else "")
        for points in axes.collections:
            points.set(cmap="viridis_r", edgecolor="white", linewidth=0.5)
        if study.config.space[key].choice is not None:
            _label_choices(axes)
    return figure


def _in_rows(figure: "Figure", every: list["Axes"], colorbar: "Axes") -> None:
    """Optuna puts all slices into one row."""
    columns = min(len(every), SLICES_IN_A_ROW)
    rows = math.ceil(len(every) / SLICES_IN_A_ROW)
    figure.set_size_inches(8 if len(every) < 4 else 11, 3.6 if rows == 1 else 2.9 * rows)
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[1.0] * columns + [0.05])
    for number, axes in enumerate(every):
        axes.set_subplotspec(grid[number // columns, number % columns])
    colorbar.set_subplotspec(grid[:, columns])
    colorbar.set_box_aspect(None)
    colorbar.set_ylabel("trial (later is darker)")


def _label_choices(axes: "Axes") -> None:
    """The choices without quotes, aslant where they are long."""
    ticks = axes.get_xticks()
    texts = [_cut(label.get_text().strip("'\"")) for label in axes.get_xticklabels()]
    is_long = sum(map(len, texts)) > 16
    axes.set_xticks(ticks, texts, rotation=30 if is_long else 0, ha="right" if is_long else "center")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -0.4), max(high, len(ticks) - 0.6))


def _cut(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _parallel_coordinate(study: ReadStudy) -> "Figure":
    from optuna.visualization import matplotlib as visual

    metrics = list(study.config.metric)
    target_name = _metric_names(study)[0]
    axes = visual.plot_parallel_coordinate(study.study, target_name=target_name)
    figure = _figure_of(axes)
    _dress(figure)
    lines = axes.collections[0]
    lines.set(cmap="viridis_r" if _smaller_is_better(study) else "viridis", alpha=0.75, linewidth=1.4)
    names = {**short_names(study.config.space), **short_names(metrics)}
    ticks = axes.get_xticks()
    labels = [names.get(label.get_text(), label.get_text()) for label in axes.get_xticklabels()]
    axes.set_xticks(ticks, labels, rotation=-25, ha="left", rotation_mode="anchor")
    figure.set_size_inches(max(8.0, 1.5 * len(labels) + 1.5), 4.6)
    for other in figure.axes:
        other.grid(False)
        for side in ("left", "right"):
            other.spines[side].set_visible(True)
        texts = [_cut(label.get_text().strip("'\""), 12) for label in other.get_yticklabels()]
        if other not in (axes, figure.axes[1]) and not _are_numbers(texts):
            other.set_yticks(other.get_yticks(), texts)
    return figure


def _smaller_is_better(study: ReadStudy) -> bool:
    """Of several metrics the colour is the rank, which is best when small."""
    return len(study.config.metric) > 1 or "minimize" in study.config.metric.values()


def _are_numbers(texts: list[str]) -> bool:
    return all(text == "" or text[0] in "0123456789-−$" for text in texts)


def _pareto_front(study: ReadStudy) -> "Figure":
    from optuna.visualization import matplotlib as visual

    axes = visual.plot_pareto_front(study.study, target_names=_metric_names(study))
    figure = _figure_of(axes)
    figure.set_size_inches(8, 4.6)
    _dress(figure)
    if len(study.config.metric) == 2:
        _grid(axes)
    for points in axes.collections:
        is_best = points.get_label() == "Best Trial"
        points.set(label="none is better in all" if is_best else "others", alpha=1)
        points.set_facecolor(BEST if is_best else "#8fb8da")
    _legend_above(axes)
    return figure


def _rungs(study: ReadStudy) -> "Figure":
    """Learning curves of the watched metric, one line a trial."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(layout="constrained")
    trials = study.trials()
    best = study.study.best_trial.number if study.trials(TrialState.COMPLETE) else None
    curves = {trial.number: _finite(study.seen(trial)) for trial in trials}
    last_step = max((step for curve in curves.values() for step in curve), default=0)
    for step in study.rungs:
        if step < last_step:
            axes.axvline(step, color="#aaaaaa", linewidth=0.8, zorder=0)
    for trial in trials:
        curve = curves[trial.number]
        if not curve:
            continue
        _, color, line = STATES[trial.state]
        steps = sorted(curve)
        values = [curve[step] for step in steps]
        width, order = 1.1, 2
        if trial.number == best:
            color, line, width, order = BEST, "-", 2.4, 4
        axes.plot(steps, values, color=color, linestyle=line, linewidth=width, alpha=0.85, zorder=order)
        axes.plot(steps[-1], values[-1], "o", color=color, markersize=3.5, zorder=order)
    _scale_far_apart(axes, [value for curve in curves.values() for value in curve.values()])
    _dress(figure)
    _grid(axes)
    axes.grid(False, axis="x")
    axes.set(xlabel="optimizer step", ylabel=short_names([study.config.watched])[study.config.watched])
    axes.set_xlim(left=0)
    _legend_above(axes, handles=_curve_legend(study, best, curves))
    return figure


def _finite(curve: Mapping[int, float]) -> dict[int, float]:
    return {step: value for step, value in curve.items() if math.isfinite(value)}


def _curve_legend(study: ReadStudy, best: int | None, curves: Mapping[int, Mapping[int, float]]) -> list[Any]:
    from matplotlib.lines import Line2D

    shown = [] if best is None else [Line2D([], [], color=BEST, linewidth=2.4, label=f"best: trial {best}")]
    for state, (text, color, line) in STATES.items():
        count = sum(bool(curves[trial.number]) for trial in study.trials(state))
        if count:
            shown.append(Line2D([], [], color=color, linestyle=line, label=f"{count} {text}"))
    return shown


def _seeds(study: ReadStudy, complete: list[FrozenTrial]) -> "Figure":
    """The value of every seed, and the mean of all with its 95 % confidence interval."""
    from matplotlib import pyplot

    names = _metric_names(study)
    figure, every = pyplot.subplots(1, len(names), squeeze=False, layout="constrained")
    ordered = sorted(complete, key=lambda trial: trial.params["seed"])
    for index, (name, axes) in enumerate(zip(names, every.flat, strict=True)):
        values = [trial.values[index] for trial in ordered]
        mean, _, half_width = confidence(values)
        axes.axhspan(mean - half_width, mean + half_width, color="#2f78b7", alpha=0.18, linewidth=0)
        axes.axhline(mean, color="#2f78b7", linewidth=1.6, label=f"{mean:.4g} ± {half_width:.2g}")
        axes.plot(range(len(values)), values, "o", color=BEST, markersize=6)
        few = ordered if len(ordered) <= 16 else []
        axes.set_xticks(range(len(few)), [as_text(trial.params["seed"]) for trial in few])
        axes.set(xlabel="seed", ylabel=name, xlim=(-0.6, len(values) - 0.4))
        _grid(axes)
        axes.grid(False, axis="x")
        _legend_above(axes)
    _dress(figure)
    return figure
