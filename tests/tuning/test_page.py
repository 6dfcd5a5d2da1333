"""The page of a sweep and its plots, from small real studies."""

import math
import random
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib
import optuna.visualization.matplotlib as visual
import pytest
from matplotlib import pyplot

from hrm_ray.errors import UserError
from hrm_ray.storage.storage import Storage
from hrm_ray.tuning import report
from hrm_ray.tuning.config import sweep_config
from hrm_ray.tuning.console import ending
from hrm_ray.tuning.estimate import Spent
from hrm_ray.tuning.fractions import Reached, over_fraction
from hrm_ray.tuning.page import page
from hrm_ray.tuning.plots import Plots, _cut, plots, short_names
from hrm_ray.tuning.study import SweepStudy
from hrm_ray.tuning.sweep import SweepResult

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = "<script>alert('&')</script>"
SPACE = {
    "lr": {"log": [1e-4, 1e-2]},
    "arch": ["hrm", "trm", None],
    "arch.H_cycles": {"int": [1, 4], "when": {"arch": ["hrm", "trm"]}},
    "arch.hidden_size": {"log_int": [32, 512]},
    "arch.mlp_t": [True, False, "$x_{<b>"],
}
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module", autouse=True)
def coarse():
    """Fewer pixels, sooner drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hrm_ray.tuning.plots.DPI", 30)
        yield


def begun(folder, **values) -> SweepStudy:
    plain = {"train": "experiment=sudoku_4x4", "space": SPACE, "pruner": None, **values}
    return SweepStudy(Storage(str(folder)), sweep_config(plain, name="mini"), first_step=10, last_step=90)


def run(study, number, *, quality=1.0, last=90):
    """Learn for a while."""
    for step in range(10, last + 1, 10):
        study.report(number, step, quality * (1 - math.exp(-step / 40)))
    study.note(number, "outcome", {"global_step": last, "train_s": last / 7, "num_params": 100})


def fill(study, count, *, leave_running=False):
    """Trials of all states."""
    draw = random.Random(0)
    for index in range(count):
        number, _ = study.next_trial()
        if leave_running and index == count - 1:
            return run(study, number, last=40)
        if index % 7 == 5:
            study.fail(number, HOSTILE)
        elif index % 7 == 3:
            run(study, number, quality=draw.random(), last=30)
            study.prune(number, "pruned at step 30")
        else:
            run(study, number, quality=draw.random())
            study.complete(number, [draw.random() for _ in study.config.metric])


def page_of(study, pngs=None, **changes) -> str:
    folder = Storage("runs/mini")
    rows = report.table(study)
    summary = report.summarise(folder, study, rows, Spent(3600.0, 0.0, 1800.0))
    return page(study, {**summary, **changes}, rows, plots(study) if pngs is None else pngs)


class Checker(HTMLParser):
    """Elements are closed in order, and nothing is fetched."""

    def __init__(self, html):
        super().__init__()
        self.open, self.counts, self.text = [], {}, []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        assert tag not in ("link", "iframe", "object", "base")
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action"):
                assert value.startswith("data:image/png;base64,"), value[:80]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    study = begun(tmp_path_factory.mktemp("single"), num_trials=16, pruner="successive_halving")
    fill(study, 16, leave_running=True)
    return study, plots(study)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    study = begun(tmp_path_factory.mktemp("tiny"), num_trials=3, space={"lr": SPACE["lr"]})
    fill(study, 3)
    return study


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    metric = ["eval/exact_accuracy", "eval/steps"]
    study = begun(tmp_path_factory.mktemp("several"), num_trials=16, metric=metric)
    fill(study, 16)
    return study, plots(study)


def test_plots_of_one_metric(single):
    _, pngs = single
    assert set(pngs) == {"history", "importances", "parallel_coordinate", "slice", "rungs"}
    assert all(png.startswith(PNG) for png in pngs.values())
    assert pngs.failed == {}


def test_steps_over_the_share_of_the_equations(tmp_path, monkeypatch):
    """Of a sweep over data sets of equations: medians over seeds, and how many did not get there."""

    def opened(path):
        if path == "gone":
            raise UserError("there is no data set gone")
        op, fraction = path.split()
        return SimpleNamespace(manifest=SimpleNamespace(recipe={"op": op, "train_fraction": float(fraction)}))

    monkeypatch.setattr("hrm_ray.tuning.fractions.open_dataset", opened)
    took = {
        "- 0.5": [300, 100, 250],
        "- 0.3": [900, None, 800],
        "- 0.2": [None, 950, None],
        "/ 0.5": [400],
        "gone": [1],
    }
    space = {"data_path": list(took), "seed": [0, 1, 2]}
    study = begun(tmp_path, num_trials=40, space=space, sampler={"name": "grid"})
    assert over_fraction(study) == {}
    for _ in range(15):
        number, point = study.next_trial()
        steps = dict(enumerate(took[point["data_path"]])).get(point["seed"], "fails")
        if steps == "fails":
            study.fail(number, "lost")
            continue
        reason = None if steps is None else "stop_at"
        study.note(number, "outcome", {"global_step": steps or 1000, "stop_reason": reason})
        study.complete(number, [0.5 if steps is None else 0.99])
    found = over_fraction(study)
    assert found == {
        "-": {0.2: Reached([950], 2), 0.3: Reached([800, 900], 1), 0.5: Reached([100, 250, 300], 0)},
        "/": {0.5: Reached([400], 0)},
    }
    assert [group.median for group in found["-"].values()] == [None, 900, 250]
    pngs = plots(study)
    assert pngs["fraction"].startswith(PNG) and pngs.failed == {}
    assert "medians over the seeds" in page_of(study, pngs)


def test_without_equations_there_is_no_such_plot(single, tmp_path, monkeypatch):
    assert over_fraction(single[0]) == {}
    study = begun(tmp_path, num_trials=2, space={"data": ["a", "b"]})
    opened = SimpleNamespace(manifest=SimpleNamespace(recipe={}))
    monkeypatch.setattr("hrm_ray.tuning.fractions.open_dataset", lambda path: opened)
    fill(study, 2)
    assert over_fraction(study) == {}


def of_equations(monkeypatch, **recipes):
    """Data sets with these recipes, beside an operator and a share."""
    monkeypatch.setattr(
        "hrm_ray.tuning.fractions.open_dataset",
        lambda name: SimpleNamespace(
            manifest=SimpleNamespace(recipe={"op": "+", "train_fraction": 0.5, **recipes[name]})
        ),
    )


def ended(study, reason: str | None, value: float, words: list[str] | None = None):
    """Runs the next trial."""
    number, _ = study.next_trial()
    if words is not None:
        study.note(number, "words", words)
    study.note(number, "outcome", {"global_step": 100 + number, "stop_reason": reason})
    study.complete(number, [value])


def test_equations_that_differ_have_lines_of_their_own(tmp_path, monkeypatch):
    of_equations(
        monkeypatch,
        a={"p": 97, "noise": 0},
        b={"p": 97, "noise": 100},
        c={"p": 113, "noise": 0},
        d={"op": "s5", "p": None, "noise": 0},
    )
    space = {"data": ["a", "b", "c", "d"]}
    study = begun(tmp_path, num_trials=4, space=space, sampler={"name": "grid"})
    for _ in range(4):
        ended(study, "stop_at", 0.99)
    found = over_fraction(study)
    assert list(found) == ["+ p=113 noise=0", "+ p=97 noise=0", "+ p=97 noise=100", "s5"]
    assert all(line[0.5].num_seeds == 1 for line in found.values())


def test_variants_of_the_optimizer_have_lines_of_their_own(tmp_path, monkeypatch):
    of_equations(monkeypatch, a={}, b={"train_fraction": 0.3})
    space = {"data": ["a", "b"], "optimizer": ["adam", "adamw"], "weight_decay": [0.0, 1.0], "seed": [0, 1]}
    study = begun(tmp_path, num_trials=16, space=space, sampler={"name": "grid"})
    for _ in range(16):
        ended(study, "stop_at", 0.99)
    found = over_fraction(study)
    assert list(found) == [
        f"+ optimizer={name} weight_decay={decay}" for name in ("adam", "adamw") for decay in ("0.0", "1.0")
    ]
    assert all(line[share].num_seeds == 2 for line in found.values() for share in (0.3, 0.5))


def test_over_values_that_cannot_be_listed_there_is_no_such_plot(tmp_path, monkeypatch):
    of_equations(monkeypatch, a={})
    study = begun(tmp_path, num_trials=2, space={"data_path": ["a"], "lr": SPACE["lr"]})
    for _ in range(2):
        ended(study, "stop_at", 0.99)
    assert over_fraction(study) == {}


def test_who_gets_there_in_the_last_step_is_there(tmp_path, monkeypatch):
    of_equations(monkeypatch, a={})
    study = begun(tmp_path, num_trials=5, space={"data": ["a"], "seed": list(range(5))}, sampler="grid")
    words = ["experiment=grokking_quick"]
    ended(study, None, 0.99, words)  # as much as stop_at
    ended(study, None, 0.98, words)
    ended(study, "early_stopping", 0.99, [*words, "stop_at=0.995"])
    ended(study, None, 0.99, [*words, "stop_at=null"])
    ended(study, None, 0.99)
    assert over_fraction(study) == {"+": {0.5: Reached([100], 4)}}


def test_plots_of_several_metrics(several):
    _, pngs = several
    per_metric = {
        f"{name}_eval_{metric}"
        for name in ("history", "importances", "slice")
        for metric in ("exact_accuracy", "steps")
    }
    assert set(pngs) == {"pareto_front", "parallel_coordinate", *per_metric}
    assert all(png.startswith(PNG) for png in pngs.values())
    assert pngs.failed == {}


def test_pyplot_is_as_before(tiny):
    figure = pyplot.figure()

    def state():
        plain = matplotlib.rcParams.copy()
        return plain, plain["backend"], pyplot.get_fignums(), pyplot.isinteractive()

    before = state()
    plots(tiny)
    assert state() == before
    pyplot.close(figure)


def test_page_of_one_metric(single):
    study, pngs = single
    html = page_of(study, pngs)
    seen = Checker(html)
    assert seen.counts["img"] == len(pngs)
    assert seen.counts["script"] == 1  # that which sorts
    text = "".join(seen.text)
    best = report.front(study)[0]
    assert f"Trial {best.number}: eval/exact_accuracy" in text
    assert f"lr={best.params['lr']!r}" in text
    assert f"run_name=mini-{best.number:04d}" in text
    assert "0.0001 .. 0.01, log" in text
    assert "1 running" in text
    assert text.count("pruned at step 30") == 2
    assert HOSTILE in text and HOSTILE not in html
    first = html.index('<table class="trials">')
    rows = html[first:].split("<tr")[2:]
    assert rows[0].startswith(" class=best") and f'data-v="{best.number}"' in rows[0]
    assert len(rows) == 16


def test_page_of_several_metrics(several):
    study, pngs = several
    seen = Checker(page_of(study, pngs))
    front = report.front(study)
    assert f"Pareto front: {len(front)} trials" in "".join(seen.text)
    assert seen.counts["details"] == len(front)


@pytest.mark.parametrize(("count", "num_metrics"), [(0, 1), (1, 1), (1, 2), (2, 2)])
def test_few_trials(tmp_path, count, num_metrics):
    metric = ["train/lm_loss", "eval/steps"][:num_metrics]
    study = begun(tmp_path, num_trials=4, metric=metric, space={"lr": SPACE["lr"]})
    fill(study, count)
    pngs = plots(study)
    assert pngs.failed == {}
    assert ("rungs" in pngs) == (count > 0 and num_metrics == 1)
    assert any(name.startswith("history") for name in pngs) == (count > 1)
    Checker(page_of(study, pngs))


def test_one_key_has_no_coordinates(tiny):
    pngs = plots(tiny)
    assert set(pngs) == {"history", "slice", "rungs"}
    assert pngs.failed == {}


def test_values_all_alike_or_infinite(tmp_path):
    study = begun(
        tmp_path, num_trials=10, metric="train/lm_loss", space={"lr": SPACE["lr"], "arch": ["a", "b"]}
    )
    for index in range(10):
        number, _ = study.next_trial()
        study.report(number, 10, math.nan)
        study.report(number, 20, 1e9 if index else 1.0)
        study.complete(number, [math.inf if index == 9 else 0.5])
    pngs = plots(study)
    assert pngs.failed == {}
    Checker(page_of(study, pngs))


def test_watched_metric_of_the_other_direction(tmp_path, monkeypatch):
    """The study keeps its sign turned; the plot does not."""
    pruner = {"name": "successive_halving", "metric": "train/lm_loss"}
    study = begun(tmp_path, num_trials=2, pruner=pruner, space={"lr": SPACE["lr"]})
    for _ in range(2):
        number, _ = study.next_trial()
        study.report(number, 10, 3.0)
        study.report(number, 90, 2.0)
        study.complete(number, [0.5])
    limits = []
    savefig = matplotlib.figure.Figure.savefig

    def look(figure, *args, **options):
        limits.append((figure.axes[0].get_ylabel(), figure.axes[0].get_ylim()))
        return savefig(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", look)
    plots(study)
    (low, high) = dict(limits)["lm_loss"]
    assert 1.8 < low < 2 < 3 < high < 3.2


def test_over_seeds(tmp_path):
    study = begun(tmp_path, num_trials=4, space={"seed": [0, 1, 2, 3]})
    for value in (0.5, 0.6, 0.7, 0.8):
        number, _ = study.next_trial()
        run(study, number)
        study.complete(number, [value])
    pngs = plots(study)
    assert set(pngs) == {"seeds", "rungs"}
    seen = Checker(page_of(study, pngs))
    assert "0.65 ± 0.21" in "".join(seen.text)
    rows = report.table(study)
    summary = report.summarise(Storage("runs/mini"), study, rows, Spent())
    lines = "\n".join(ending(SweepResult(Storage("runs/mini"), summary, rows, None)))
    assert "0.65 ± 0.21 (95 % interval of the mean, 4 runs), standard deviation 0.13" in lines


def test_plot_that_fails_is_left_out(tiny, monkeypatch):
    def broken(*_, **__):
        pyplot.figure()
        raise RuntimeError(f"no such {HOSTILE}\nsecond line")

    monkeypatch.setattr(visual, "plot_slice", broken)
    found = plots(tiny)
    assert set(found) == {"history", "rungs"}
    assert pyplot.get_fignums() == []
    html = page_of(tiny, found)
    text = "".join(Checker(html).text)
    assert f"Left out: slice (RuntimeError: no such {HOSTILE})." in text
    assert HOSTILE not in html


def test_without_matplotlib(single, monkeypatch):
    study, _ = single
    monkeypatch.setattr("hrm_ray.tuning.plots.find_spec", lambda name: None)
    found = plots(study)
    assert found == {}
    assert "matplotlib is not installed" in page_of(study, found)


def test_without_what_was_spent(single):
    study, _ = single
    Checker(page_of(study, Plots(), spent=None, estimate=None))
    summary = {"states": {}, "best": []}
    text = "".join(Checker(page(study, summary, [], {})).text)
    assert "No trial has started yet" in text


def test_estimate_and_repeats(single):
    study, _ = single
    estimate = {"step_s": 0.1, "eval_s": 1.0, "start_s": 2.0, "cpu_s": 7200.0, "gpu_s": 0.0, "wall_s": 3600.0}
    repeat = [
        {
            "number": 3,
            "value": 0.9,
            "curse": 0.1,
            "values": [0.8, 0.82],
            "mean": 0.81,
            "std": 0.01,
            "half_width": 0.13,
        },
        {
            "number": 2,
            "value": 0.8,
            "curse": 0.1,
            "values": [0.7],
            "mean": 0.7,
            "std": None,
            "half_width": None,
        },
    ]
    html = page_of(study, Plots(), estimate=estimate | {"num_steps": 12345}, repeat=repeat)
    text = "".join(Checker(html).text)
    assert "12,345" in text and "60 min" in text and "0.81 ± 0.13" in text
    assert "GPU time" not in text


def test_short_names():
    names = ["eval/steps", "train/steps", "arch.H_cycles", "lr"]
    assert list(short_names(names).values()) == ["eval/steps", "train/steps", "H_cycles", "lr"]


def test_values_that_are_paths_are_told_apart_by_their_last_parts():
    assert _cut(["data/a-0.3", "data/b"], 18) == ["a-0.3", "b"]
    assert _cut(["one/data", "two/data"], 5) == ["one/…", "two/…"]
    assert _cut(["+", "/"], 18) == ["+", "/"]
