"""The page of a sweep: one HTML file that needs nothing else, with what was swept over, what is best, and the plots."""

import base64
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from optuna.trial import TrialState

from hrm_ray.config.validate import as_text
from hrm_ray.html import document
from hrm_ray.tuning.estimate import Spent, duration
from hrm_ray.tuning.plots import STATES, Plots, plots, short_names
from hrm_ray.tuning.study import ReadStudy

__all__ = ["page", "plots"]

CAPTIONS = {  # how to read a plot, by the beginning of its name
    "history": "Each dot is the value of a complete trial, in the order in which they began; the line, where there is "
    "one, is the best so far.",
    "rungs": "Each line is the watched metric of one trial while it trained, and ends in a dot where the trial ended; "
    "thin vertical lines, where there are any, are the steps at which the weaker trials are given up.",
    "importances": "How much each key decides whether a trial is among the best tenth (PED-ANOVA); the bars add up to "
    "one.",
    "slice": "Each dot is a trial, over one key at a time and the whole range of that key; darker ones are later, so "
    "where dark dots crowd is where the sampler has searched most.",
    "parallel_coordinate": "Each line is a complete trial, through its value and its keys; darker lines are better.",
    "pareto_front": "Each dot is a complete trial; than those on the Pareto front no other trial is better in one "
    "metric and as good in the rest.",
    "fraction": "How many optimizer steps it took until an evaluation reached stop_at, over the share of the equations "
    "in training: lines are medians over the seeds, small dots single seeds. Where some did not get there, it says how "
    "many; hollow ones above the dashed line are shares of which so many did not that there is no median.",
    "seeds": "Each dot is the value of one seed; the line is their mean, the band its 95 % confidence interval "
    "(Student's t).",
}
STATE_TEXTS = {state.name: text for state, (text, _, _) in STATES.items()}


def page(
    study: ReadStudy, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], pngs: dict[str, bytes]
) -> str:
    """The page as HTML.

    Args:
        summary: what summary.json holds.
        rows: those of trials.csv.
        pngs: what `plots` has made.
    """
    name = _text(study.config.run_name)
    sections = (
        _about(study, summary),
        _means(summary),
        _best(study, summary),
        _repeated(summary),
        _numbers(study, summary),
        _plots(pngs),
        _trials(study, summary, rows),
    )
    body = "\n".join(
        (
            f"<main>\n<h1>{name}</h1>",
            *filter(None, sections),
            "<footer>The same as files: trials.csv, best.yaml and summary.json beside this page.</footer>\n</main>",
        )
    )
    return document(name, body, css=CSS, script=SORT)


def _text(value: Any) -> str:
    return escape(str(value))


def _number(value: Any) -> str:
    """Four digits of a number, in a way that still shows what it is; other values as they are."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return _text(as_text(value))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Of cells that are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _about(study: ReadStudy, summary: Mapping[str, Any]) -> str:
    config = study.config
    if summary.get("finished"):
        state = "Finished"
    elif summary.get("stop_reason"):
        state = f"Stopped ({_text(summary['stop_reason'])}); the same command continues"
    else:
        state = "Not finished yet"
    metrics = " and ".join(f"<b>{_text(name)}</b> ({way})" for name, way in config.metric.items())
    how = f"sampler <b>{_text(config.sampler['name'])}</b>"
    if config.population is not None:
        how += ", population based training"
    elif config.prunes is not None:
        how += f", pruner <b>{_text(config.prunes.get('name', 'successive_halving'))}</b>"
        if config.watched not in config.metric:
            how += f" by {_text(config.watched)}"
    keys = _table(
        ("key", "values"),
        ((f"<code>{_text(key)}</code>", _text(values.describe())) for key, values in config.space.items()),
        "keys",
    )
    return (
        f"<p>{state}. Runs of <code>hrm-ray train {_text(shlex.join(config.train))}</code> over the values below, "
        f"judged by {metrics}; {how}.</p>\n{keys}"
    )


def _means(summary: Mapping[str, Any]) -> str:
    """Of a sweep over seeds, what it is for."""
    cards = [
        f'<div class="card"><span class="big">{found["mean"]:.4g} ± {found["half_width"]:.2g}</span><br>'
        f"{_text(metric)}: mean of {len(found['values'])} seeds and its 95 % confidence interval; standard "
        f"deviation {found['std']:.2g}</div>"
        for metric, found in (summary.get("seeds") or {}).items()
    ]
    return f'<h2>Over the seeds</h2>\n<div class="cards">{"".join(cards)}</div>' if cards else ""


def _best(study: ReadStudy, summary: Mapping[str, Any]) -> str:
    found = summary.get("best") or []
    if not found:
        return "<h2>Best trial</h2>\n<p>No trial is complete yet.</p>"
    title = "Best trial" if len(found) == 1 else f"Pareto front: {len(found)} trials"
    shown = []
    for number, best in enumerate(found):
        values = ", ".join(f"{_text(name)} <b>{_number(value)}</b>" for name, value in best["values"].items())
        params = " ".join(
            f"<code>{_text(key)}={_text(as_text(value))}</code>" for key, value in best["params"].items()
        )
        shown.append(
            f"<details{' open' if number == 0 else ''}><summary>Trial {best['number']}: {values}</summary>"
            f'<p>{params}</p><pre><code class="copy">{_text(best["command"])}</code></pre></details>'
        )
    return f"<h2>{title}</h2>\n" + "\n".join(shown)


def _repeated(summary: Mapping[str, Any]) -> str:
    """The finalists with other seeds."""
    found = summary.get("repeat") or []
    if not found:
        return ""
    rows = [
        (
            str(row["number"]),
            _number(row["value"]),
            _number(row["mean"]) + ("" if row["half_width"] is None else f" ± {row['half_width']:.2g}"),
            str(len(row["values"])),
        )
        for row in found
    ]
    head = ("trial", "in the sweep", "mean over other seeds", "seeds")
    return (
        f"<h2>Finalists with other seeds</h2>\n{_table(head, rows)}\n"
        "<p>Behind ± is half of the 95 % confidence interval of the mean (Student's t).</p>"
    )


def _numbers(study: ReadStudy, summary: Mapping[str, Any]) -> str:
    states = summary.get("states") or {}
    running = states.get(TrialState.RUNNING.name, 0)
    ended = {STATE_TEXTS[name]: count for name, count in states.items() if name != TrialState.RUNNING.name}
    counts = ", ".join(f"{count} {text}" for text, count in ended.items() if count)
    text = (
        f"<h2>Numbers</h2>\n<p>{sum(ended.values())} of {summary.get('num_trials', study.num_trials)} trials have ended"
        f"{': ' if counts else ''}{counts}{f'; {running} running' if running else ''}.</p>"
    )
    spent, planned = summary.get("spent") or {}, summary.get("estimate") or {}
    if planned and "money" not in planned:
        seconds = {key: planned.get(key) or 0 for key in ("cpu_s", "gpu_s", "wall_s")}
        planned = {**planned, "money": Spent(**seconds).money(study.config.price)}
    hours: Callable[[float], str] = lambda seconds: f"{seconds / 3600:.3g} h"  # noqa: E731
    kinds: dict[str, tuple[str, Callable[[float], str]]] = {
        "num_steps": ("optimizer steps", lambda count: f"{count:,.0f}"),
        "wall_s": ("time", duration),
        "cpu_s": ("CPU time", hours),
        "gpu_s": ("GPU time", hours),
        "money": ("money", lambda money: f"{money:.2f}"),
    }
    both = ({**spent, "num_steps": summary.get("num_steps")}, planned)
    rows = [
        (title, *(shown(part[key]) if part.get(key) is not None else "" for part in both))
        for key, (title, shown) in kinds.items()
        if any(part.get(key) for part in both)
    ]
    return f"{text}\n{_table(('', 'spent', 'estimated before'), rows)}" if rows else text


def _plots(pngs: dict[str, bytes]) -> str:
    failed = pngs.failed if isinstance(pngs, Plots) else {}
    lines = [f"<p>Left out: {_text(name)} ({_text(why)}).</p>" for name, why in failed.items()]
    figures = []
    for name, png in pngs.items():
        kind = next((kind for kind in CAPTIONS if name.startswith(kind)), None)
        title = _title(name, kind)
        data = base64.b64encode(png).decode()
        figures.append(
            f'<figure><div class="wide"><img alt="{title}" src="data:image/png;base64,{data}"></div>'
            f"<figcaption><b>{title}.</b> {CAPTIONS[kind] if kind else ''}</figcaption></figure>"
        )
    return "\n".join(["<h2>Plots</h2>", *figures, *lines]) if figures or lines else ""


def _title(name: str, kind: str | None) -> str:
    """ "history_eval_steps": "History, eval steps"."""
    first = kind or name
    rest = name[len(first) :].strip("_").replace("_", " ")
    return _text(first.replace("_", " ").capitalize() + (f", {rest}" if rest else ""))


def _ranked(
    study: ReadStudy, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The best first, then other complete trials, then those without a value by how far they came."""
    metric = study.config.metric
    best = {trial["number"] for trial in summary.get("best") or []}
    states = ["COMPLETE", "RUNNING", "PRUNED", "FAIL"]

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        losses = [(row.get(name) or 0.0) * (1 if way == "minimize" else -1) for name, way in metric.items()]
        return (
            row["number"] not in best,
            states.index(row["state"]),
            losses,
            -(row.get("steps") or 0),
            row["number"],
        )

    return sorted(rows, key=key)


def _trials(study: ReadStudy, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<h2>Trials</h2>\n<p>No trial has started yet.</p>"
    best = {trial["number"] for trial in summary.get("best") or []}
    metrics, keys = list(study.config.metric), list(study.config.space)
    columns = [*metrics, *keys, *(key for key in ("steps", "train_s") if key not in metrics)]
    names = {**short_names(columns), "train_s": "time"}
    right = {column for column in columns if not _is_choice(study, column)}
    head = "".join(
        f'<th{" class=number" if column in right else ""} title="{_text(column)}">{_text(names[column])}</th>'
        for column in columns
    )
    lines = []
    for row in _ranked(study, summary, rows):
        state = STATE_TEXTS.get(row["state"], row["state"])
        cells = "".join(_cell(column, row.get(column), column in right) for column in columns)
        lines.append(
            f"<tr{' class=best' if row['number'] in best else ''}>"
            f'<td data-v="{row["number"]}">{row["number"]}</td><td class="state {_text(state)}">{_text(state)}</td>'
            f'{cells}<td class="reason">{_text(row.get("reason") or "")}</td></tr>'
        )
    body = "\n".join(lines)
    return (
        "<h2>Trials</h2>\n<p>The best first; a click on a title sorts by it.</p>\n"
        f'<div class="wide"><table class="trials"><thead><tr><th>trial</th><th>state</th>{head}<th>reason</th></tr>'
        f"</thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _is_choice(study: ReadStudy, column: str) -> bool:
    return column in study.config.space and study.config.space[column].choice is not None


def _cell(column: str, value: Any, is_number: bool) -> str:
    shown = duration(value) if column == "train_s" and value is not None else _number(value)
    kind = " class=number" if is_number else ""
    if value is None or isinstance(value, (bool, str)):
        return f"<td{kind}>{shown}</td>"
    return f'<td{kind} data-v="{value}" title="{value}">{shown}</td>'


CSS = """
pre { margin: .6rem 0; padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; white-space: pre-wrap; }
pre code { padding: 0; background: none; }
.copy { user-select: all; -webkit-user-select: all; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; }
.card { flex: 1 1 260px; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; color: var(--soft); }
.big { font-size: 1.5rem; color: var(--ink); font-weight: 600; }
details { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; margin: .5rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
.keys td { white-space: normal; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; }
.trials th { cursor: pointer; }
.trials th, .trials td { padding: .3rem .6rem; }
.trials .number { text-align: right; }
.trials .best td { background: var(--best); }
.trials .reason { white-space: normal; min-width: 14rem; color: var(--soft); overflow-wrap: anywhere; }
.complete { color: var(--complete); } .pruned { color: var(--pruned); }
.failed { color: var(--failed); } .running { color: var(--running); }
figure { margin: 1rem 0 1.6rem; }
figure img { display: block; max-width: 100%; height: auto; background: white; border: 1px solid var(--line);
  border-radius: 8px; }
@media (max-width: 600px) { figure img { max-width: none; width: 640px; } }
figcaption { margin-top: .4rem; color: var(--soft); font-size: .9rem; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .875rem; }
"""

SORT = """
for (const table of document.querySelectorAll("table.trials")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((title, column) => title.addEventListener("click", () => {
    const up = title.dataset.up !== "1";
    title.dataset.up = up ? "1" : "0";
    const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    });
    body.append(...rows);
  }));
}
"""
