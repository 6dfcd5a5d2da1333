"""The plots of a sweep, as PNG files: Optuna's own where it has one, made readable, and two of hrm_ray.

Pyplot is global: inside `_off_screen` it draws with Agg in a style for these plots, outside it is as it was before.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeAlias

import optuna
from optuna.trial import FrozenTrial, TrialState

from hrm_ray.config.validate import as_text
from hrm_ray.errors import first_line
from hrm_ray.figures import COLOURS, DPI, GRID, INK, STYLE
from hrm_ray.tuning.fractions import Reached, over_fraction
from hrm_ray.tuning.space import Range, as_category
from hrm_ray.tuning.statistics import confidence
from hrm_ray.tuning.study import ReadStudy

# Of matplotlib, which is loaded where it is used.
Figure: TypeAlias = Any
Axes: TypeAlias = Any
Axis: TypeAlias = Any

SLICES_IN_A_ROW = 4
NUM_FOR_IMPORTANCES = 8  # complete trials; of fewer, the best tenth is one or two
FAR_APART = 50  # values whose ratio is larger stand on a logarithmic axis
BEST, RUNG = "#111111", "#aaaaaa"
MARKERS = "osD^vP*X"
STATES: dict[TrialState, tuple[str, str, Any]] = {  # how a learning curve looks, by the state of its trial
    TrialState.COMPLETE: ("complete", "#2f78b7", "-"),
    TrialState.PRUNED: ("pruned", "#e08a1e", "-"),
    TrialState.FAIL: ("failed", "#c9302c", "--"),
    TrialState.RUNNING: ("running", "#2a9d5c", ":"),
}
SIZE = {"figure.figsize": (8.0, 4.2)}

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
    """All plots that can say something of a sweep; one that fails is left out."""
    found = Plots()
    if find_spec("matplotlib") is None:
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


def _wanted(study: ReadStudy) -> Iterator[tuple[str, Callable[[], Figure]]]:
    metrics = list(study.config.metric)
    complete = [t for t in study.trials(TrialState.COMPLETE) if all(map(math.isfinite, t.values))]
    params = sorted({key for trial in complete for key in trial.params})
    several = len(metrics) > 1
    if lines := over_fraction(study):
        yield "fraction", lambda: _fraction(lines)
    if study.is_over_seeds:
        if len(complete) > 1:
            yield "seeds", lambda: _seeds(study, complete)
    elif len(complete) > 1:
        if several and len(metrics) < 4:
            yield "pareto_front", lambda: _pareto_front(study)
        yield from _of_each(study, "history", _history)
        if len(complete) >= NUM_FOR_IMPORTANCES and len(params) > 1:
            yield from _of_each(study, "importances", _importances)
        if len(params) > 1:
            yield "parallel_coordinate", lambda: _parallel_coordinate(study, params)
    if complete and len(complete) + len(study.trials(TrialState.PRUNED)) > 1 and not study.is_over_seeds:
        yield from _of_each(study, "slice", _slice)
    if not several and len({step for trial in study.trials() for step in trial.intermediate_values}) > 1:
        yield "rungs", lambda: _rungs(study)


def _of_each(
    study: ReadStudy, name: str, draw: Callable[[ReadStudy, int], Figure]
) -> Iterator[tuple[str, Callable[[], Figure]]]:
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
    with warnings.catch_warnings(), pyplot.rc_context(STYLE | SIZE), pyplot.ioff():
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
                pyplot._backend_mod = None


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.12)
    return file.getvalue()


def _dress(figure: Figure) -> None:
    """The look of all plots, on top of that of Optuna's; titles stand on the page."""
    figure.suptitle("")
    for axes in figure.axes:
        for place in ("left", "center", "right"):
            axes.set_title("", loc=place)
        axes.set_facecolor("white")
        axes.tick_params(colors=INK, labelsize=9)
        axes.xaxis.label.set(color=INK, size=10)
        axes.yaxis.label.set(color=INK, size=10)
        for side, spine in axes.spines.items():
            spine.set(color="#888888", visible=spine.get_visible() and side not in ("top", "right"))


def _grid(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.grid(False, which="minor")


def _target(study: ReadStudy, index: int) -> Target | None:
    """The value of one of several metrics; None: the only one."""
    return None if len(study.config.metric) == 1 else lambda trial: trial.values[index]


def _metric_names(study: ReadStudy) -> list[str]:
    return list(short_names(study.config.metric).values())


def _scale_losses(axes: Axes, metric: str, values: Iterable[float]) -> None:
    """A logarithmic axis for losses that are far apart, as where one has exploded."""
    finite = [value for value in values if math.isfinite(value)]
    is_far = bool(finite) and min(finite) > 0 and max(finite) > FAR_APART * min(finite)
    if metric.endswith("loss") and is_far:
        axes.set_yscale("log")
        _tick_log(axes.yaxis)


def _tick_log(axis: Axis) -> None:
    """Ticks at plain numbers; few enough to have room, also on an axis of less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 2.2 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 4.0, 7.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=8) if decades > 0.35 else MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _values(study: ReadStudy, index: int) -> tuple[str, list[float]]:
    metric = list(study.config.metric)[index]
    return metric, [trial.values[index] for trial in study.trials(TrialState.COMPLETE)]


def _history(study: ReadStudy, index: int) -> Figure:
    from optuna.visualization import matplotlib as visual

    name = _metric_names(study)[index]
    axes: Axes = visual.plot_optimization_history(study.study, target=_target(study, index), target_name=name)
    figure = axes.get_figure()
    _dress(figure)
    _grid(axes)
    _scale_losses(axes, *_values(study, index))
    axes.set_xlabel("trial")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.collections[0].set_label("complete trial")
    best = [line for line in axes.lines if line.get_label() == "Best Value"]
    for line in best:
        line.set(color=BEST, alpha=1, linewidth=1.5, drawstyle="steps-post", label="best so far")
    if axes.get_legend() is not None:
        axes.get_legend().remove()
    if best:
        _legend_above(axes)
    return figure


def _legend_above(axes: Axes, **options: Any) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False, fontsize=9, labelcolor=INK, **options
    )


def _importances(study: ReadStudy, index: int) -> Figure:
    from optuna.visualization import matplotlib as visual

    axes: Axes = visual.plot_param_importances(
        study.study,
        evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
        target=_loss(study, index),
        target_name=_metric_names(study)[index],
    )
    figure = axes.get_figure()
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


def _slice(study: ReadStudy, index: int) -> Figure:
    from optuna.visualization import matplotlib as visual

    name = _metric_names(study)[index]
    found: Any = visual.plot_slice(study.study, target=_target(study, index), target_name=name)
    every = list(found.flat) if hasattr(found, "flat") else [found]
    figure = every[0].get_figure()
    columns = _in_rows(figure, every)
    _dress(figure)
    _scale_losses(every[0], *_values(study, index))
    names = short_names(study.config.space)
    for number, axes in enumerate(every):
        key = axes.get_xlabel()
        for points in axes.collections:
            points.set(
                cmap="viridis_r", edgecolor="#555555", linewidth=0.5, clim=(0, len(study.trials()) - 1)
            )
        _add_pruned(study, axes, key)
        _grid(axes)
        _span(axes, study.config.space[key])
        is_first = number % columns == 0
        axes.tick_params(labelleft=is_first, labelbottom=True)
        axes.set(xlabel=names[key], ylabel=name if is_first else "")
    handles, labels = every[0].get_legend_handles_labels()
    if "pruned, at its last value" in labels:
        figure.legend(handles[-1:], labels[-1:], loc="outside upper left", frameon=False, fontsize=9)
    return figure


def _in_rows(figure: Figure, every: list[Axes]) -> int:
    """Optuna puts all slices into one row. Returns the number of columns."""
    from matplotlib.ticker import MaxNLocator

    rows = math.ceil(len(every) / SLICES_IN_A_ROW)
    columns = math.ceil(len(every) / rows)
    figure.set_layout_engine("constrained")
    figure.set_size_inches((8, 4.2) if len(every) == 1 else (max(8, 2.6 * columns), 0.4 + 2.9 * rows))
    grid = figure.add_gridspec(rows, columns)
    for number, axes in enumerate(every):
        axes.set_subplotspec(grid[number // columns, number % columns])
    for axes in [axes for axes in figure.axes if axes not in every]:
        axes.remove()
    colorbar = figure.colorbar(every[-1].collections[0], ax=every, pad=0.02, aspect=40, label="trial")
    colorbar.locator = MaxNLocator(integer=True)
    return columns


def _add_pruned(study: ReadStudy, axes: Axes, key: str) -> None:
    """Where the best are few, as under successive halving, those that were given up say most of a key."""
    if list(study.config.metric) != [study.config.watched]:
        return
    is_choice = study.config.space[key].choice is not None
    x, y = [], []
    for trial in study.trials(TrialState.PRUNED):
        curve = _finite(study.seen(trial))
        if key in trial.params and curve:
            x.append(repr(trial.params[key]) if is_choice else trial.params[key])
            y.append(curve[max(curve)])
    _, color, _ = STATES[TrialState.PRUNED]
    if x:
        label = "pruned, at its last value"
        axes.scatter(x, y, s=18, facecolors="none", edgecolors=color, linewidths=1, zorder=0.5, label=label)


def _span(axes: Axes, values: Range) -> None:
    """The whole range of a key, with ticks that can be read."""
    if values.choice is not None:
        ticks = axes.get_xticks()
        known = {repr(as_category(value)): as_text(value) for value in values.choice}
        texts = _cut([known[label.get_text()] for label in axes.get_xticklabels()], 18)
        slant = 0 if sum(map(len, texts)) <= 20 else 25 if len(texts) <= 5 else 90
        axes.set_xticks(ticks, texts, rotation=slant, ha="right" if slant == 25 else "center")
        axes.set_xlim(-0.4, len(texts) - 0.6)
        return
    low, high = values.distribution.low, values.distribution.high  # type: ignore[attr-defined]
    if values.kind.startswith("log"):
        margin = (high / low) ** 0.05
        axes.set_xlim(low / margin, high * margin)
        _tick_log(axes.xaxis)
    else:
        margin = 0.05 * (high - low) or 0.5
        axes.set_xlim(low - margin, high + margin)
        axes.xaxis.get_major_locator().set_params(nbins=5, integer=values.kind == "int")


def _cut(texts: Sequence[str], most: int) -> list[str]:
    """Values in at most so many characters; of paths without the folders, if their last parts tell them apart."""
    last = [text.rpartition("/")[2] for text in texts]
    if all(last) and len(set(last)) == len(set(texts)):
        texts = last
    return [text if len(text) <= most else text[: most - 1] + "…" for text in texts]


def _parallel_coordinate(study: ReadStudy, params: list[str]) -> Figure:
    from optuna.visualization import matplotlib as visual

    metrics = _metric_names(study)
    axes: Axes = visual.plot_parallel_coordinate(study.study, target_name=metrics[0])
    figure = axes.get_figure()
    colorbar = figure.axes[1]
    _dress(figure)
    axes.collections[0].set(cmap=_best_is_dark(study), alpha=0.8, linewidth=1.4)
    names = [*metrics, *(short_names(study.config.space)[key] for key in params)]
    axes.set_xticks(axes.get_xticks(), names, rotation=-20, ha="left", rotation_mode="anchor")
    figure.set_size_inches(max(8.0, 1.4 * len(names) + 1.5), 4.4)
    if len(metrics) > 1:
        colorbar.set_ylabel("Pareto rank (0: the front)")
    spaces = [None] * (len(metrics) - 1) + [study.config.space[key] for key in params]
    for other, values in zip(figure.axes[2:], spaces, strict=True):
        _tick_parallel(other, values)
    for other in figure.axes:
        other.grid(False)
        if other is not colorbar:
            _halo(other)
    return figure


def _best_is_dark(study: ReadStudy) -> str:
    """A color map; of several metrics the colour is the rank, which is best when small."""
    smaller_is_better = len(study.config.metric) > 1 or "minimize" in study.config.metric.values()
    return "viridis" if smaller_is_better else "viridis_r"


def _tick_parallel(axes: Axes, values: Range | None) -> None:
    """Ticks of one key; None: of a metric."""
    axes.spines["right"].set_visible(True)
    if axes.get_yscale() == "log":
        _tick_log(axes.yaxis)
        return
    ticks = list(zip(axes.get_yticks(), [label.get_text() for label in axes.get_yticklabels()], strict=True))
    missing = [(tick, "none") for tick, text in ticks if text == "None"]  # the key's condition does not hold
    if values is None:
        return
    if values.kind == "int":
        low, high = axes.get_ylim()
        begin = values.distribution.low if missing else math.ceil(low)  # type: ignore[attr-defined]
        every = max(1, math.ceil((high - begin) / 8))
        ticks = [*missing, *((tick, str(tick)) for tick in range(begin, math.floor(high) + 1, every))]
    elif values.choice is not None or missing:
        known = {str(as_category(value)): as_text(value) for value in values.choice or ()}
        shown = [(tick, known.get(text, text)) for tick, text in ticks if text != "None"]
        texts = _cut([text for _, text in shown], 14)
        ticks = [(tick, text) for (tick, _), text in zip(shown, texts, strict=True)] + missing
    else:
        return
    axes.set_yticks([tick for tick, _ in ticks], [text for _, text in ticks])


def _halo(axes: Axes) -> None:
    """Labels that stand among lines."""
    from matplotlib.patheffects import withStroke

    for label in axes.get_yticklabels():
        label.set_path_effects([withStroke(linewidth=3, foreground="white")])


def _pareto_front(study: ReadStudy) -> Figure:
    from optuna.visualization import matplotlib as visual

    axes: Axes = visual.plot_pareto_front(study.study, target_names=_metric_names(study))
    figure = axes.get_figure()
    figure.set_size_inches(8, 4.6)
    _dress(figure)
    if len(study.config.metric) == 2:
        _grid(axes)
    for points in axes.collections:
        is_best = points.get_label() == "Best Trial"
        color = BEST if is_best else "#8fb8da"
        points.set(label="Pareto front" if is_best else "other", facecolor=color, edgecolor=color)
    _legend_above(axes)
    return figure


def _rungs(study: ReadStudy) -> Figure:
    """Learning curves of the watched metric, one line a trial."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(layout="constrained")
    trials = study.trials()
    has_best = bool(study.trials(TrialState.COMPLETE)) and not study.is_over_seeds
    best = study.study.best_trial.number if has_best else None
    curves = {trial.number: _finite(study.seen(trial)) for trial in trials}
    last_step = max((step for curve in curves.values() for step in curve), default=0)
    for step in study.rungs:
        if step < last_step:
            axes.axvline(step, color=RUNG, linewidth=0.8, zorder=0)
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
    seen = [value for curve in curves.values() for value in curve.values()]
    _scale_losses(axes, study.config.watched, seen)
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

    shown = []
    if best is not None:
        shown.append(Line2D([], [], color=BEST, linewidth=2.4, label=f"best: trial {best}"))
    for state, (text, color, line) in STATES.items():
        numbers = {trial.number for trial in study.trials(state) if curves[trial.number]}
        other = "other " if best in numbers else ""
        if numbers - {best}:
            count = len(numbers - {best})
            shown.append(Line2D([], [], color=color, linestyle=line, label=f"{count} {other}{text}"))
    if study.rungs:
        shown.append(Line2D([], [], color=RUNG, linewidth=0.8, label="rungs"))
    return shown


def _seeds(study: ReadStudy, complete: list[FrozenTrial]) -> Figure:
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


def _fraction(lines: Mapping[str, Mapping[float, Reached]]) -> Figure:
    """Median steps over the share of equations in training, one line an operator; see `over_fraction`."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axes = pyplot.subplots(layout="constrained")
    most = max(max(found.steps, default=0) for line in lines.values() for found in line.values())
    missed = 2.0 * most  # where those stand that have no median
    for number, (op, line) in enumerate(lines.items()):
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
        }
        shift = 0.003 * (
            number - (len(lines) - 1) / 2
        )  # so that those of several operators can be told apart
        for share, found in line.items():
            x = share + shift
            axes.plot([x] * len(found.steps), found.steps, **style, linestyle="", markersize=3.5, alpha=0.4)
            if found.median is None:
                axes.plot(x, missed, **style, markersize=7, fillstyle="none")
            if found.num_missed:
                where = (x, found.median or missed)
                text = f"{found.num_missed} of {found.num_seeds} not"
                offset = (6, 4 + 10 * (number if found.median is None else 0))
                axes.annotate(
                    text, where, offset, textcoords="offset points", fontsize=8, color=style["color"]
                )
        known = [(share + shift, found.median) for share, found in line.items() if found.median is not None]
        axes.plot(
            [x for x, _ in known], [y for _, y in known], **style, markersize=7, linewidth=1.6, label=op
        )
    axes.set_yscale("log")
    if any(found.median is None for line in lines.values() for found in line.values()):
        axes.axhline(missed / 1.35, color=RUNG, linewidth=0.8, linestyle="--")
        axes.set_ylim(top=missed * 2.2)
        axes.text(0.01, missed / 1.3, "no median", transform=axes.get_yaxis_transform(), fontsize=8)
    _tick_log(axes.yaxis)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda steps, _: f"{steps:,.0f}" if steps <= most else ""))
    _dress(figure)
    _grid(axes)
    axes.set_xticks(sorted({share for line in lines.values() for share in line}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.set(xlabel="share of the equations in training", ylabel="optimizer steps, median")
    axes.margins(x=0.12)
    _legend_above(axes)
    return figure
