"""Grids of one's own: what is read from the data, symmetries by declaration, frames, and reasoning-gym's puzzles."""

import importlib
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hrm_ray
from hrm_ray.data.builder import builder_of
from hrm_ray.data.dihedral import turned
from hrm_ray.data.pipeline import build
from hrm_ray.data.puzzle_files import PuzzleFile
from hrm_ray.data.recipe import load_recipe
from hrm_ray.data.shards import open_dataset
from hrm_ray.data.tasks.base import get_task
from hrm_ray.data.tasks.grid import Grid
from hrm_ray.data.tasks.grid import reasoning_gym as adapter
from hrm_ray.data.tasks.grid.builder import GridRecipe
from hrm_ray.data.verify import verify
from hrm_ray.errors import UserError

# Swap the halves: a question and its answer.
ROWS = [("ab c", " cab"), ("ccab", "abcc"), ("b bb", "bbb "), ("aaab", "abaa")]


def table(tmp_path, rows=ROWS, name="train.csv"):
    quoted = [",".join(f'"{text}"' for text in row) for row in rows]
    (tmp_path / name).write_text("\n".join(["question,answer", *quoted]) + "\n")
    return str(tmp_path / name)


def built(tmp_path, source, **values):
    build(GridRecipe(source=source, **{"num_test": 0, **values}), tmp_path / "data", show_progress=False)
    assert verify(tmp_path / "data") == []
    return open_dataset(tmp_path / "data")


def rows_of(dataset, split="train"):
    return dataset.split(split).rows(np.arange(dataset.split(split).num_examples))


def refused(tmp_path, source, **values):
    """What a build says; nothing is left behind."""
    with pytest.raises(UserError) as caught:
        built(tmp_path, source, **values)
    assert not (tmp_path / "data").exists()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_alphabet_and_shape_are_read_from_the_data(tmp_path):
    dataset = built(tmp_path, table(tmp_path))
    manifest, task = dataset.manifest, dataset.task
    assert (manifest.task, manifest.vocab_size, manifest.seq_len) == ("grid", 5, 4)
    assert (task.alphabet, task.height, task.width) == (" abc", 2, 2)
    assert rows_of(dataset)["inputs"].tolist() == [[2, 3, 1, 4], [4, 4, 2, 3], [3, 1, 3, 3], [2, 2, 2, 3]]
    for (question, answer), inputs, labels in zip(ROWS, *list(rows_of(dataset).values())[:2], strict=True):
        assert (task.to_text(inputs), task.to_text(labels)) == (question, answer)


@pytest.mark.parametrize(
    "text, values, shape",
    [
        ("abcabc", {}, (1, 6)),
        ("abcabc", {"width": 3}, (2, 3)),
        ("abcabc", {"height": 3}, (3, 2)),
        ("abca", {"height": 1}, (1, 4)),
        ("abc/abc", {}, (2, 3)),
        ("ab\nca\nbc", {}, (3, 2)),
        ("ab|ca", {"separator": "|"}, (2, 2)),
        ("ab/ca", {"separator": None}, (1, 5)),
    ],
)
def test_shapes(tmp_path, text, values, shape):
    task = built(tmp_path, table(tmp_path, [(text, text)]), **values).task
    assert (task.height, task.width) == shape
    np.testing.assert_array_equal(task.parse(task.to_text(task.parse(text))), task.parse(text))


def test_any_255_characters(tmp_path):
    chars = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 254)) + "😀"
    dataset = built(tmp_path, table(tmp_path, [(chars, chars[::-1])]))
    assert dataset.manifest.vocab_size == 256
    assert rows_of(dataset)["inputs"].max() == 255
    assert dataset.task.to_text(rows_of(dataset)["labels"][0]) == chars[::-1]
    said = refused(tmp_path / "more", table(tmp_path, [(chars + "x", chars + "x")]))
    assert "256 different characters; a grid has at most 255" in said


def test_a_given_alphabet_keeps_its_order(tmp_path):
    assert built(tmp_path, table(tmp_path), alphabet="cba ").task.parse("abc ").tolist() == [3, 2, 1, 4]


def test_lines_that_lost_their_spaces():
    task = Grid(" ab", 2, 3)
    np.testing.assert_array_equal(task.parse("a\nb a\n"), task.parse("a  b a"))


def test_ignored_characters_carry_no_loss(tmp_path):
    dataset = built(tmp_path, table(tmp_path, [("a..b", "ab.."), ("..ab", "..ba")]), ignore=".")
    assert dataset.manifest.ignore_label_id == 0
    assert rows_of(dataset)["inputs"].all()
    assert rows_of(dataset)["labels"].tolist() == [[2, 3, 0, 0], [0, 0, 3, 2]]


# Symmetries


def images(task, text):
    return {task.to_text(s.tokens[task.parse(text)[s.cells]]) for s in task.symmetries(task.num_symmetries)}


@pytest.mark.parametrize(
    "symmetries, turns",
    [
        (["rotations"], range(4)),
        (["mirrors"], (0, 2, 4, 5)),
        (["transpose"], (0, 6)),
        (["mirrors", "transpose"], range(8)),
    ],
)
def test_turns(symmetries, turns):
    task = Grid("abcdefghi", 3, 3, symmetries=symmetries)
    grid = np.array(list("abcdefghi")).reshape(3, 3)
    assert images(task, "abcdefghi") == {"".join(turned(grid, turn).ravel()) for turn in turns}


def test_relabelling():
    task = Grid(".123xy", 1, 6, symmetries=["relabel:123", "relabel:xy"])
    assert task.num_symmetries == 12
    expected = {f".{p}{q}" for p in ("123", "132", "213", "231", "312", "321") for q in ("xy", "yx")}
    assert images(task, ".123xy") == expected
    first = task.symmetries(5)
    assert (first[0].tokens == np.arange(7)).all()
    for one, same in zip(first, task.symmetries(12)[:5], strict=True):
        np.testing.assert_array_equal(one.tokens, same.tokens)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**62), st.integers(1, 20), st.booleans())
def test_copies_are_keyed_and_symmetric(seed, num_aug, relabels):
    task = Grid("01234", 2, 2, symmetries=["rotations", *["relabel:123"] * relabels])
    questions = np.random.default_rng(seed).integers(1, 6, (3, 4), dtype=np.uint8)
    answers = questions[:, ::-1].copy()
    groups = np.array([4, 7, 9])
    inputs, labels = task.augment(questions, answers, groups, num_aug, seed)
    np.testing.assert_array_equal(inputs[:: 1 + num_aug], questions)
    some = task.augment(questions[1:2], answers[1:2], groups[1:2], num_aug, seed)
    np.testing.assert_array_equal(some[0], inputs[1 + num_aug : 2 + 2 * num_aug])
    fewer = task.augment(questions[:1], answers[:1], groups[:1], 1, seed)
    np.testing.assert_array_equal(fewer[1], labels[:2])
    pairs = {
        (s.tokens[q[s.cells]].tobytes(), s.tokens[a[s.cells]].tobytes())
        for s in task.symmetries(task.num_symmetries)
        for q, a in zip(questions, answers, strict=True)
    }
    made = zip(inputs.astype(np.int64), labels.astype(np.int64), strict=True)
    assert all((q.tobytes(), a.tobytes()) in pairs for q, a in made)


def test_no_turn_repeats_before_all_were_dealt_out(tmp_path):
    rows = [("abcdefghi", "abcdefghi"), ("ihgfedcba", "ihgfedcba")]
    dataset = built(tmp_path, table(tmp_path, rows), symmetries=["mirrors", "transpose"], num_aug=7)
    texts = [dataset.task.to_text(row) for row in rows_of(dataset)["inputs"]]
    for group, (question, _) in enumerate(rows):
        of_group = texts[8 * group : 8 * group + 8]
        assert of_group[0] == question and set(of_group) == images(dataset.task, question)


def test_the_copies_depend_on_the_seed(tmp_path):
    source = table(tmp_path)
    options = {"symmetries": ["relabel:abc"], "num_aug": 5}
    one, other = (
        rows_of(built(tmp_path / str(seed), source, seed=seed, **options))["inputs"] for seed in (0, 1)
    )
    assert len(one) == len(other) == 24 and (one != other).any()
    np.testing.assert_array_equal(one[::6], other[::6])


def test_the_recipe_of_the_page(tmp_path, monkeypatch):
    section = (
        (Path(__file__).parents[2] / "docs" / "data.md").read_text().partition("## Grids of your own\n")[2]
    )
    monkeypatch.chdir(tmp_path)
    for kind, file in (("yaml", "my_grids.yaml"), ("csv", "puzzles.csv")):
        assert f"`{file}`" in section
        Path(file).write_text(section.partition(f"```{kind}\n")[2].partition("```")[0])
    manifest = build(load_recipe("my_grids.yaml"), tmp_path / "data", show_progress=False)
    assert manifest.task_options["alphabet"] == ".1234" and verify(tmp_path / "data") == []
    assert 30 < manifest.splits["train"].num_examples <= 42 and manifest.splits["test"].num_examples == 1


# Several shapes

SHAPES = [("ab/cd", "a"), ("abc", "a/b/c"), ("a/b", "abab/abab")]


def test_grids_of_several_shapes_lie_in_a_frame(tmp_path):
    dataset = built(tmp_path, table(tmp_path, SHAPES), shapes="differ", symmetries=["relabel:abcd"])
    task, rows = dataset.task, rows_of(dataset)
    assert (task.height, task.width, task.vocab_size) == (3, 4, 6)
    assert rows["inputs"][0].reshape(3, 4).tolist() == [[2, 3, 1, 0], [4, 5, 1, 0], [1, 1, 0, 0]]
    assert rows["labels"][2].reshape(3, 4).tolist() == [[2, 3, 2, 3], [2, 3, 2, 3], [1, 1, 1, 1]]
    for (question, answer), inputs, labels in zip(SHAPES, rows["inputs"], rows["labels"], strict=True):
        assert (task.to_text(inputs), task.to_text(labels)) == (question, answer)
        np.testing.assert_array_equal(task.parse(question), inputs)
    assert task.render(rows["inputs"][0]) == "a b\nc d"
    renamed = task.symmetries(24)[5]
    assert (renamed.tokens[:2] == [0, 1]).all() and (renamed.cells == np.arange(12)).all()


def test_the_frame_may_be_given(tmp_path):
    task = built(tmp_path, table(tmp_path, SHAPES), shapes="differ", max_height=5, max_width=4).task
    assert (task.height, task.width) == (5, 4)
    said = refused(tmp_path / "small", table(tmp_path, SHAPES), shapes="differ", max_width=3)
    assert "line 4: answer: 2x4 cells; at most 3x3 fit" in said


def test_a_file_of_framed_grids_is_read_back(tmp_path):
    task = Grid("abcd", 3, 4, shapes="differ")
    (tmp_path / "puzzles.txt").write_text("ab/cd\na/b\n\nab\ncd\nab\n")
    found = [text for _, text in PuzzleFile(tmp_path / "puzzles.txt", task).questions()]
    assert [task.to_text(task.parse(text)) for text in found] == ["ab/cd", "a/b", "ab/cd/ab"]


def test_an_answer_is_marked_where_it_is_not_the_question():
    task = Grid("ab", 2, 2)
    assert task.render(task.parse("abba"), task.parse("aaba")) == "a b'\nb a "
    assert task.to_text(np.array([1, 0, 2, 1])) == "a?ba"


# Mistakes


@pytest.mark.parametrize(
    "rows, values, problem",
    [
        ([*ROWS, ("abcabcabc", "abcabcabc")], {}, "line 6: question: 9 cells; the other grids have 2x2"),
        ([*ROWS, ("ab/cc/ab", "ab")], {}, "line 6: question: 3x2 cells; the other grids have 2x2"),
        ([*ROWS, ("abcc", "ab")], {}, "line 6: answer: 2 cells"),
        ([*ROWS, ("ab/c", "abcc")], {}, "line 6: question: row 2 has 1 cells, row 1 has 2"),
        ([*ROWS, ("abcc", "")], {}, "line 6: it has no answer"),
        ([*ROWS, ("", "abcc")], {}, "line 6: question: a grid without cells"),
        (ROWS, {"width": 3}, "width=3: the first grid has 4 cells, which make no whole rows"),
        (ROWS, {"alphabet": "ab"}, "line 2: question: ' ' in row 2, column 1 is not in the alphabet 'ab'"),
        ([("a/", "b/")], {}, "holds no grids; if / is a cell, give separator=null"),
        (ROWS, {"symmetries": ["relabel:ax"]}, "symmetries=relabel:ax: 'x' is in no training puzzle"),
        ([*ROWS, ("xbcxbc", "x")], {"symmetries": ["relabel:ax"]}, "line 6: question: 6 cells"),
        (ROWS, {"symmetries": ["relabel:a"]}, "name two or more characters"),
        (ROWS, {"symmetries": ["relabel:ab", "relabel:bc"]}, "'b' is named before, or ignored"),
        (
            ROWS,
            {"symmetries": ["turns"]},
            "'turns' is none; known: rotations, mirrors, transpose, relabel:CHARS",
        ),
        (
            ROWS,
            {"symmetries": ["rotations"], "height": 1},
            "needs square grids, these have 1 rows of 4 cells; mirr",
        ),
        (
            ROWS,
            {"symmetries": ["rotations"], "shapes": "differ"},
            "symmetries=rotations needs grids of one shape",
        ),
        (ROWS, {"symmetries": ["mirrors"], "num_aug": 4}, "num_aug=4: a grid has only 3 other copies"),
        (ROWS, {"ignore": "a", "shapes": "differ"}, "ignore= needs grids of one shape"),
        (ROWS, {"separator": None, "shapes": "differ"}, "shapes=differ needs a separator"),
    ],
)
def test_mistakes_are_one_line(tmp_path, rows, values, problem):
    assert problem in refused(tmp_path, table(tmp_path, rows), **values)


@pytest.mark.parametrize(
    "values, problem",
    [
        ({"num_aug": 3}, "num_aug=3 needs symmetries="),
        ({"max_width": 3}, "'max_width' does nothing with shapes=equal"),
        ({"width": 3, "shapes": "differ"}, "'width' does nothing with shapes=differ"),
        ({"options": {"n": 3}}, "'options' is for source=reasoning_gym:NAME only"),
        ({"source": "reasoning_gym:sudoku"}, "'num_train' is not given; source=reasoning_gym:sudoku needs"),
    ],
)
def test_recipes_that_do_not_fit(tmp_path, values, problem):
    (tmp_path / "mine.yaml").write_text("task: grid\nsource: puzzles.csv\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "mine.yaml"), values)
    assert problem in str(caught.value)


def test_a_test_character_that_training_never_has(tmp_path):
    table(tmp_path, [("abcz", "abcc")], "test.csv")
    table(tmp_path)
    said = refused(tmp_path, str(tmp_path), num_test=None)
    assert "test.csv, line 2: question: 'z' in row 2, column 2 is not in the alphabet ' abc'" in said
    dataset = built(tmp_path, str(tmp_path), num_test=None, on_bad="skip")
    assert dataset.manifest.report["bad_rows_skipped"] == 1 and "test" not in dataset.splits


def test_votes_need_symmetries():
    with pytest.raises(UserError) as caught:
        Grid("ab", 2, 2).symmetries(3)
    assert str(caught.value) == (
        "votes=3: no symmetry is declared for these puzzles; use votes=1, or build the data with symmetries="
    )
    with pytest.raises(UserError, match="votes=5: these puzzles have only 4 symmetric copies"):
        Grid("ab", 2, 2, symmetries=["mirrors"]).symmetries(5)


def test_the_manifest_makes_the_same_task(tmp_path):
    source = table(tmp_path, [("abcd", "dcba")])
    task = built(tmp_path, source, symmetries=["rotations", "relabel:ab"], ignore="c").task
    again = get_task("grid", **task.options)
    assert again.options == task.options and again.num_symmetries == 8
    column = pa.array(["abcd", "ab/cd", "ab", None])
    tokens, good = again.parse_all(column, are_answers=True)
    assert tokens[:2].tolist() == [[1, 2, 0, 4]] * 2 and good.tolist() == [True, True, False, False]


# reasoning-gym

FAKE = """
from random import Random

class Made:
    def __init__(self, seed, n=2):
        self.seed, self.n = seed, n

    def __getitem__(self, number):
        random = Random(self.seed + number)
        grid = [[random.randint(0, 12) for _ in range(self.n)] for _ in range(self.n)]
        return {"question": "", "answer": "", "metadata": {"matrix": grid, "solution": grid[::-1]}}

def create_dataset(name, seed, size, **options):
    assert name == "binary_matrix" and size > 10**9
    return Made(seed, **options)
"""


class Here:
    """Workers that are this process."""

    show_progress = False

    def map(self, function, blocks, *, total, label, on_ray=True):
        return map(function, blocks)

    def share(self, value):
        return partial(lambda shared: shared, value)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package of the same interface. Its files are for Ray's workers, too."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "reasoning_gym.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    adapter._dataset.cache_clear()
    yield
    adapter._dataset.cache_clear()
    sys.modules.pop("reasoning_gym", None)


def gym_parts(**values):
    recipe = {"source": "reasoning_gym:binary_matrix", "num_train": 40, "num_test": 10, **values}
    builder = builder_of(GridRecipe(**recipe))
    parts = {
        part.name: np.concatenate([np.concatenate([e.inputs, e.labels], axis=1) for e in part.blocks])
        for part in builder.parts(Here())
    }
    return builder.task, parts


def test_puzzles_of_reasoning_gym(fake):
    task, parts = gym_parts()
    assert (task.alphabet, task.height, task.width) == ("0123456789ABC", 2, 2)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 40, "test": 10}
    rows = np.concatenate(list(parts.values()))
    np.testing.assert_array_equal(rows[:, :4].reshape(-1, 2, 2)[:, ::-1], rows[:, 4:].reshape(-1, 2, 2))
    assert len(np.unique(rows[:, :4], axis=0)) == 50
    np.testing.assert_array_equal(gym_parts(num_train=60)[1]["test"], parts["test"])
    assert not {row.tobytes() for row in gym_parts(seed=1)[1]["train"]} & {
        row.tobytes() for row in parts["train"]
    }
    assert gym_parts(options={"n": 3}, symmetries=["rotations"], num_aug=3)[1]["train"].shape == (160, 18)


@pytest.mark.ray
def test_puzzles_of_reasoning_gym_on_ray(fake, tmp_path):
    """In a process of its own, whose Ray begins with the fixture's environment; this one may have another by now."""
    recipe = "task: grid\nsource: reasoning_gym:binary_matrix\nnum_train: 40\nnum_test: 10\n"
    (tmp_path / "gym.yaml").write_text(recipe)
    paths = f"{os.environ['PYTHONPATH']}{os.pathsep}{Path(hrm_ray.__file__).parents[1]}"
    words = ["data", "build", f"recipe={tmp_path / 'gym.yaml'}", f"out={tmp_path / 'data'}"]
    done = subprocess.run(
        [sys.executable, "-m", "hrm_ray.cli", *words],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(tmp_path / "data")
    np.testing.assert_array_equal(rows_of(dataset, "test")["inputs"], gym_parts()[1]["test"][:, :4])


@pytest.mark.parametrize(
    "values, problem",
    [
        (
            {"source": "reasoning_gym:countdown"},
            "is no puzzle of reasoning-gym that is a grid; known: binary_matrix",
        ),
        ({"source": "reasoning_gym:n_queen"}, "is a grid; did you mean 'n_queens'?"),
        ({"options": {"m": 3}}, 'binary_matrix, options={"m": 3}: '),
        ({"options": {"n": 1}, "num_train": 20}, "found only 13 different puzzles, 30 are wanted"),
    ],
)
def test_puzzles_that_reasoning_gym_does_not_have(fake, values, problem):
    with pytest.raises(UserError) as caught:
        gym_parts(**values)
    assert problem in str(caught.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    adapter._dataset.cache_clear()
    with pytest.raises(
        UserError, match=r"needs the package reasoning-gym .*pip install 'hrm-ray\[reasoning-gym\]'"
    ):
        gym_parts()


@pytest.mark.parametrize("name", sorted(set(adapter.PUZZLES) - {"futoshiki"}))
def test_the_real_package(name):
    try:
        importlib.import_module("reasoning_gym")
    except ImportError:
        pytest.skip("reasoning-gym is not installed")
    adapter._dataset.cache_clear()
    task, parts = gym_parts(source=f"reasoning_gym:{name}", num_train=6, num_test=2, shapes="differ")
    assert {len(rows) for rows in parts.values()} == {2, 6}
    halves = parts["train"].reshape(6, 2, task.seq_len)
    texts = [[task.to_text(half) for half in row] for row in halves]
    assert all(len(question) == len(answer) for question, answer in texts)
    assert any(question != answer for question, answer in texts)
    assert all(one != other for one, other in pairwise(texts))
