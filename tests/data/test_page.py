"""The page of a data set: what lies in it, what it is made from, and that a real browser draws it."""

import json
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from hrm_ray.api import load
from hrm_ray.cli import main
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data import page as page_module
from hrm_ray.data.page import choose, page
from hrm_ray.data.pipeline import build
from hrm_ray.data.shards import open_dataset
from hrm_ray.data.tasks.arc import place
from hrm_ray.data.tasks.arc.builder import ArcRecipe
from hrm_ray.data.tasks.modular.builder import ModularRecipe
from hrm_ray.errors import UserError
from hrm_ray.interop.dataset import import_npy
from hrm_ray.interop.look import open_any
from hrm_ray.training import launch
from tests.data.test_maze import ANSWER, QUESTION, SMALL
from tests.interop.test_dataset import ABOUT, write_set
from tests.toy import DECODER, toy_config, toy_dataset

HOSTILE = "</script><script>document.title='harm'</script><!-- \ud800"
BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")), None)


class Page(HTMLParser):
    """The elements of a page, and what lies in its scripts."""

    def __init__(self, html):
        super().__init__()
        self.open, self.scripts, self.tags = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        for name, _ in attrs:
            assert name not in ("src", "href") and not name.startswith("on")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.open.remove(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def content(html) -> dict:
    parsed = Page(html)
    assert len(parsed.scripts) == 2 and not {"link", "img", "iframe"} & set(parsed.tags)
    return json.loads(parsed.scripts[0])


def read(data, grid) -> np.ndarray:
    width, cells = grid
    return np.array([data["alphabet"].index(cell) for cell in cells]).reshape(-1, width)


def made(dataset, split="train", steps=None, *, count=200, copies=8, num_steps=0) -> dict:
    choice = choose(dataset, split, count=count, copies=copies, num_steps=num_steps)
    return content(page(dataset, split, choice, steps, "a run"))


@pytest.fixture
def arc(tmp_path):
    """A published data set of ARC: two tasks, the first with two puzzles; grids lie anywhere in the frame."""
    arrays = write_set(
        tmp_path / "arc" / "train",
        "all",
        np.random.default_rng(0),
        [2, 1, 1],
        [2, 1],
        seq_len=900,
        num_puzzle_identifiers=4,
    )
    grids = [np.array(rows) for rows in ([[0, 7], [3, 1]], [[9]], [[1, 2, 3]], [[5], [6]])]
    for name in ("inputs", "labels"):
        arrays[name][:] = [place(grid, row=number, col=2 * number) for number, grid in enumerate(grids)]
        np.save(tmp_path / "arc" / "train" / f"all__{name}.npy", arrays[name])
    np.save(tmp_path / "arc" / "train" / "all__puzzle_identifiers.npy", np.array([1, 2, 3], np.int32))
    (tmp_path / "arc" / "identifiers.json").write_text(
        json.dumps(["<blank>", "a", "a|||t1|||0213456789", HOSTILE])
    )
    return tmp_path / "arc"


def test_grids_lie_in_it_without_padding_and_in_their_colours(arc):
    data = made(open_any(arc))
    first, second = data["groups"]
    assert [puzzle["name"] for puzzle in first["puzzles"]] == ["a", "a|||t1|||0213456789"]
    assert [len(puzzle["examples"]) for puzzle in first["puzzles"]] == [2, 1]
    grid = read(data, first["puzzles"][0]["examples"][0]["question"])
    assert grid.tolist() == [[2, 9, 1], [5, 3, 1], [1, 1, 0]]
    assert data["cells"][2:4] == [["0", "#000000"], ["1", "#0074d9"]] and data["cells"][1] == ["+", None]
    assert second["puzzles"][0]["identifier"] == 3 and not data["checkable"]


def test_names_of_files_are_text(arc):
    html = page(open_any(arc), "train", choose(open_any(arc), "train", count=9, copies=9, num_steps=0))
    name = content(html)["groups"][1]["puzzles"][0]["name"]
    assert name == HOSTILE.replace("\ud800", "?")
    assert html.count("</script>") == 2


def test_damaged_names_are_refused(arc):
    for damage in ("[1]", "{}", "["):
        (arc / "identifiers.json").write_text(damage)
        with pytest.raises(UserError, match="is no list of names"):
            made(open_any(arc))


def test_the_published_layout_is_shown_as_its_import_is(tmp_path):
    rng = np.random.default_rng(0)
    write_set(tmp_path / "a" / "train", "all", rng, [1, 3, 2], [2, 1])
    write_set(tmp_path / "a" / "train", "more", rng, [2, 2], [1, 1])
    write_set(tmp_path / "a" / "test", "all", rng, [1], [1])
    import_npy(tmp_path / "a", tmp_path / "b")
    for split in ("train", "test"):
        assert made(open_any(tmp_path / "a"), split) == made(open_dataset(tmp_path / "b"), split)


def test_a_published_maze_is_recognised(tmp_path):
    arrays = write_set(
        tmp_path / "train", "all", np.random.default_rng(0), [1], [1], seq_len=16, vocab_size=6
    )
    for name, text in (("inputs", QUESTION), ("labels", ANSWER)):
        np.save(tmp_path / "train" / f"all__{name}.npy", SMALL.parse(text)[None].astype(arrays[name].dtype))
    assert (open_any(tmp_path).task.name, open_any(tmp_path).manifest.task) == ("maze", "maze")


@pytest.fixture(scope="module")
def arc_run(tmp_path_factory):
    """A build of ARC, the same in the published layout, and a run on the build."""
    folder = tmp_path_factory.mktemp("arc")
    recipe = ArcRecipe(
        source="tests/golden/arc/source",
        subsets=("tiny", "tinyeval"),
        test_subset="tinyeval",
        num_aug=1,
        draws="published",
    )
    build(recipe, folder / "data", show_progress=False)
    dataset = open_dataset(folder / "data")
    for split in dataset.splits.values():
        save_published(folder / "published", dataset, split)
    shutil.copy(folder / "data/identifiers.json", folder / "published")
    config = toy_config(folder / "data", folder, run_name="run", max_steps=1, num_eval_examples=1)
    launch.train(TrainConfig(**config), show_progress=False)
    return folder


def save_published(folder, dataset, split):
    """A split in the published layout."""
    (folder / split.name).mkdir(parents=True)
    about = {
        key: getattr(dataset.manifest, key)
        for key in ABOUT.keys() & type(dataset.manifest).model_fields.keys()
    }
    (folder / split.name / "dataset.json").write_text(json.dumps({**ABOUT, **about, "sets": ["all"]}))
    rows = split.rows(np.arange(split.num_examples))
    rows["puzzle_identifiers"] = rows["puzzle_identifiers"][split.puzzle_starts[:-1]]
    rows |= {"puzzle_indices": split.puzzle_starts, "group_indices": split.group_starts}
    for name, array in rows.items():
        np.save(folder / split.name / f"all__{name}.npy", array)


def test_a_model_of_arc_answers_the_published_arrays_as_those_that_it_was_trained_on(arc_run, capsys):
    pages = []
    for name in ("data", "published"):
        out = arc_run / f"{name}.html"
        words = [f"out={out}", f"run={arc_run / 'run'}", "split=test", "count=2", "copies=2"]
        assert main(["data", "show", str(arc_run / name), *words]) == 0, capsys.readouterr().err
        pages.append(content(out.read_text()))
    assert pages[0] == pages[1] and pages[0]["num_steps"] > 0


def test_a_model_is_not_asked_about_the_published_arrays_of_another_build(arc_run, tmp_path, capsys):
    shutil.copytree(arc_run / "published", tmp_path / "other")
    names = json.loads((tmp_path / "other/identifiers.json").read_text())
    (tmp_path / "other/identifiers.json").write_text(json.dumps([names[0], *reversed(names[1:])]))
    words = [f"out={tmp_path / 'page.html'}", f"run={arc_run / 'run'}"]
    assert main(["data", "show", str(tmp_path / "other"), *words]) == 2
    error = capsys.readouterr().err
    assert "other is another build than the one" in error and error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_groups_are_evenly_spread_and_copies_the_first(tmp_path):
    dataset = toy_dataset(tmp_path / "data", num_train=40, puzzles_per_group=5, rows_per_shard=50)
    data = made(dataset, count=4, copies=2)
    assert [group["group"] for group in data["groups"]] == [0, 10, 20, 30]
    assert [[p["puzzle"] for p in group["puzzles"]] for group in data["groups"][:2]] == [[0, 1], [50, 51]]
    assert data["groups"][0]["num_puzzles"] == 5
    assert data["about"] == (
        "Split train: 4 of 40 groups, evenly spread; of each group at most 2 of up to 5 puzzles."
    )
    rows = dataset.split("train").rows(np.array([51]))
    example = data["groups"][1]["puzzles"][1]["examples"][0]
    assert example["example"] == 51
    assert read(data, example["question"]).reshape(-1).tolist() == rows["inputs"][0].tolist()


@pytest.mark.parametrize(
    ("room", "num_groups", "copies"), [(10**6, 8, 4), (8 * 2 * 64, 8, 2), (3 * 64, 3, 1), (1, 1, 1)]
)
def test_a_page_keeps_its_size(tmp_path, monkeypatch, room, num_groups, copies):
    monkeypatch.setattr(page_module, "MAX_CELLS", room)  # an example takes 16 (1 + 1 + 2)
    dataset = toy_dataset(tmp_path / "data", num_train=8, puzzles_per_group=4)
    dataset.manifest.__dict__["pad_id"] = 99  # so that nothing is left out
    choice = choose(dataset, "train", count=200, copies=8, num_steps=2)
    assert (len(choice.groups), max(map(len, choice.groups.values()))) == (num_groups, copies)


def test_a_models_answers_at_every_step(tmp_path):
    write_set(tmp_path / "train", "all", np.random.default_rng(0), [1], [1], seq_len=16, vocab_size=6)
    for name, text in (("inputs", QUESTION), ("labels", ANSWER)):
        np.save(tmp_path / "train" / f"all__{name}.npy", SMALL.parse(text)[None].astype(np.uint8))
    steps = SimpleNamespace(
        tokens=np.stack([SMALL.parse(QUESTION), SMALL.parse(ANSWER)])[None],
        confidence=np.array([[0.25, 0.98765]], np.float32),
        halts=np.array([[False, True]]),
    )
    data = made(open_any(tmp_path), "train", steps, num_steps=2)
    example = data["groups"][0]["puzzles"][0]["examples"][0]
    assert example["valid"] == [False, True] and example["halts"] == 1 and data["num_steps"] == 2
    assert example["confidence"] == [0.25, 0.988] and example["steps"][1] == example["answer"][1]
    assert "Answered by a run, in 2 ACT steps." in data["about"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set of three puzzle identifiers, and a run on it."""
    folder = tmp_path_factory.mktemp("trained")
    toy_dataset(folder / "data", num_identifiers=3, num_test=4)
    config = toy_config(folder / "data", folder, run_name="run", max_steps=4)
    launch.train(TrainConfig(**config), show_progress=False)
    return folder


def test_the_last_step_is_what_eval_saves(trained):
    solver = load(trained / "run")
    rows = open_dataset(trained / "data").split("test").rows(np.arange(4))
    steps = solver.every_step(rows["inputs"], rows["puzzle_identifiers"], batch_size=3)
    assert steps.tokens.shape == (4, 4, 16) and steps.halts.shape == (4, 4)
    _, saved = solver.evaluate(trained / "data", save_outputs=["predictions", "q_halt_logits"])
    assert (steps.tokens[:, -1] == saved["predictions"]).all()
    np.testing.assert_allclose(steps.confidence[:, -1], 1 / (1 + np.exp(-saved["q_halt_logits"])), atol=1e-5)
    others = solver.every_step(rows["inputs"], (rows["puzzle_identifiers"] + 1) % 3)
    assert not np.array_equal(others.confidence, steps.confidence)


@pytest.mark.parametrize("predict_end", [False, True])
def test_an_equation_and_its_answer_stand_in_line_and_no_q_head_stops(tmp_path, predict_end, capsys):
    """The token of number 0 ends an equation, and is no padding."""
    build(ModularRecipe(p=5, predict_end=predict_end), tmp_path / "data", show_progress=False)
    config = toy_config(tmp_path / "data", tmp_path, run_name="run", max_steps=1, arch=DECODER)
    launch.train(TrainConfig(**config), show_progress=False)
    words = [f"out={tmp_path / 'page.html'}", f"run={tmp_path / 'run'}"]
    assert main(["data", "show", str(tmp_path / "data"), *words]) == 0, capsys.readouterr().err
    data = content((tmp_path / "page.html").read_text())
    rows = open_dataset(tmp_path / "data").split("train").rows(np.arange(len(data["groups"])))
    for group, question, label in zip(data["groups"], rows["inputs"], rows["labels"], strict=True):
        (example,) = group["puzzles"][0]["examples"]
        assert read(data, example["question"]).tolist() == [question.tolist()]
        assert read(data, example["answer"]).tolist() == [label.tolist()]
        assert example["halts"] is None


def test_the_command_makes_and_replaces_it(trained, tmp_path, capsys):
    out = tmp_path / "page.html"
    words = ["data", "show", str(trained / "data"), "split=test", f"out={out}", f"run={trained / 'run'}"]
    for count in (2, 3):
        assert main([*words, f"count={count}"]) == 0
        assert capsys.readouterr().out == f"{out}: {count} groups, {count} examples\n"
        assert len(content(out.read_text())["groups"]) == count
    assert content(out.read_text())["groups"][0]["puzzles"][0]["examples"][0].keys() >= {
        "steps",
        "confidence",
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("out={tmp}", "is a folder; give a file"),
        ("out={tmp}/other.html", "is there, and no page of a data set; move it away"),
        ("out={tmp}/nowhere/page.html", "there is no folder {tmp}/nowhere"),
        ("out={tmp}/new.html split=nope", "has no split 'nope'; it has: train, test"),
        ("out={tmp}/new.html run={tmp}/nowhere", "no such folder; give a checkpoint or a run folder"),
        (
            "out={tmp}/new.html run={trained}/run",
            "the model was trained with 6; give a data set of that kind",
        ),
        ("out={tmp}/new.html index=3", "index= is for one example"),
        ("run={trained}/run", "run= is for a page; give out=FILE.html"),
        ("out={tmp}/new.html count=0", "count=0: input should be greater than 0"),
    ],
)
def test_mistakes_are_told_in_one_line(trained, tmp_path, capsys, words, said):
    toy_dataset(tmp_path / "data", num_identifiers=3, vocab_size=7)
    (tmp_path / "other.html").write_text("<!doctype html><title>mine</title>")
    places = {"tmp": tmp_path, "trained": trained}
    assert main(["data", "show", str(tmp_path / "data"), *words.format(**places).split()]) == 2
    error = capsys.readouterr().err
    assert said.format(**places) in error and error.count("\n") == 1
    assert not (tmp_path / "new.html").exists() and not list(tmp_path.glob("*.tmp"))


def drawn(html, tmp_path, extra="") -> str:
    """The page as a browser has built it, after the JavaScript `extra`."""
    file = tmp_path / "page.html"
    file.write_text(html.replace("</body>", f"<script>{extra}</script></body>"))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_draws_it(arc, tmp_path):
    dataset = open_any(arc)
    choice = choose(dataset, "train", count=9, copies=9, num_steps=2)
    answers = np.stack([choice.rows["labels"]] * 2, axis=1)
    answers[0, 1, 0] = 9  # one cell of the first group is wrong in the end
    n = len(answers)
    steps = SimpleNamespace(tokens=answers, confidence=np.full((n, 2), 0.5), halts=np.zeros((n, 2), bool))
    html = page(dataset, "train", choice, steps, "a <b>run</b>")
    plain = drawn(html, tmp_path)
    assert plain.count("<canvas") == 2 * 3 and "wrong, 7 of 8 cells right, confidence 50.0&nbsp;%" in plain
    assert "1 of 2</span>" in plain and "a &lt;b&gt;run&lt;/b&gt;" in plain and "<title>harm" not in plain
    press = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: KEY, bubbles: true}));"
    pressed = drawn(html, tmp_path, "".join(press.replace("KEY", repr(key)) for key in ("f", ",")))
    assert "1 of 1</span>" in pressed and "ACT step 1 of 2" in pressed and "right, 8 of 8" in pressed


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_cells_without_a_label_stay_empty(tmp_path):
    """In the label and in the answer: of an equation only the result is asked for."""
    build(ModularRecipe(p=5), tmp_path / "data", show_progress=False)
    dataset = open_any(tmp_path / "data")
    choice = choose(dataset, "train", count=1, copies=1, num_steps=1)
    question, label = choice.rows["inputs"][0], choice.rows["labels"][0]
    steps = SimpleNamespace(
        tokens=np.full((1, 1, len(label)), label[-1]),
        confidence=np.ones((1, 1)),
        halts=np.zeros((1, 1), bool),
    )
    note = (
        "const texts = []; CanvasRenderingContext2D.prototype.fillText = text => texts.push(text); render();"
    )
    write = "document.title = texts.filter(text => text).join(' ');"
    html = drawn(page(dataset, "train", choice, steps, "run"), tmp_path, note + write)
    symbols = [dataset.task.cell(token).symbol for token in (*question, label[-1], label[-1])]
    assert f"<title>{escape(' '.join(symbols))}</title>" in html
