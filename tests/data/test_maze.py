"""Mazes: the published arrays, rules against a plain reference, the generator."""

from collections import deque
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.builder import builder_of
from hrm_ray.data.dihedral import turned
from hrm_ray.data.pipeline import build
from hrm_ray.data.puzzle_files import PuzzleFile
from hrm_ray.data.recipe import load_recipe
from hrm_ray.data.shards import open_dataset
from hrm_ray.data.tasks.base import get_task
from hrm_ray.data.tasks.maze import FREE, GOAL, PATH, START, WALL
from hrm_ray.data.tasks.maze.builder import MazeRecipe
from hrm_ray.data.verify import verify
from hrm_ray.errors import UserError

GOLDEN = Path("tests/golden/maze")
SMALL = get_task("maze", size=4)
QUESTION = "S  # # # # #   G"
GENERATED = {"source": "generator", "num_train": 3, "num_test": 1}
ANSWER = "S  #o# #o# #oooG"


def distances(maze, size):
    """Steps from the start to every cell that is no wall, by a plain search."""
    start = int(np.flatnonzero(maze == START)[0])
    found, queue = {start: 0}, deque([start])
    while queue:
        cell = queue.popleft()
        row, col = divmod(cell, size)
        for r, c in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)):
            other = r * size + c
            if 0 <= r < size and 0 <= c < size and maze[other] != WALL and other not in found:
                found[other] = found[cell] + 1
                queue.append(other)
    return found


@pytest.mark.parametrize("aug", [False, True])
def test_the_arrays_are_the_published_ones(tmp_path, aug):
    build(MazeRecipe(source=str(GOLDEN), aug=aug), tmp_path / "data", show_progress=False)
    assert verify(tmp_path / "data") == []
    dataset = open_dataset(tmp_path / "data")
    golden = np.load(GOLDEN / f"trm_aug{int(aug)}.npz")
    for name, split in dataset.splits.items():
        rows = split.rows(np.arange(split.num_examples))
        for column in ("inputs", "labels"):
            np.testing.assert_array_equal(rows[column], golden[f"{name}_{column}"])
        np.testing.assert_array_equal(split.puzzle_starts, golden[f"{name}_puzzle_indices"])
        np.testing.assert_array_equal(split.group_starts, golden[f"{name}_group_indices"])
        assert not rows["puzzle_identifiers"].any()
    manifest = dataset.manifest
    assert (manifest.vocab_size, manifest.seq_len, manifest.num_puzzle_identifiers) == (6, 900, 1)


def test_text_is_read_back_and_shown():
    tokens = SMALL.parse(QUESTION)
    assert SMALL.to_text(tokens) == QUESTION.replace(" ", ".")
    np.testing.assert_array_equal(SMALL.parse(QUESTION.replace(" ", ".")), tokens)
    np.testing.assert_array_equal(SMALL.parse("S  #\n # #\n # #\n   G\n"), tokens)
    picture = SMALL.render(SMALL.parse(ANSWER), tokens).splitlines()
    assert picture[1] == "|S     ██|" and picture[4] == "|• • • G |" and len(picture) == 6
    wrong = SMALL.parse(ANSWER)
    wrong[3] = FREE
    assert "!" in SMALL.render(wrong, tokens)


@pytest.mark.parametrize(
    "change, is_solution, is_shortest",
    [
        ({}, True, True),
        ({4: FREE}, False, False),  # a hole
        ({1: PATH, 2: PATH}, True, False),  # a branch that leads nowhere
        ({3: FREE}, False, False),  # a wall is gone
        ({0: PATH}, False, False),  # the start is gone
        ({15: PATH}, False, False),  # and the goal
        ({7: 0}, False, False),
    ],
)
def test_an_answer_is_checked(change, is_solution, is_shortest):
    question, answer = SMALL.parse(QUESTION), SMALL.parse(ANSWER)
    for cell, token in change.items():
        answer[cell] = token
    assert SMALL.is_solution(question[None], answer[None]).tolist() == [is_solution]
    assert SMALL.is_shortest(question[None], answer[None]).tolist() == [is_shortest]
    assert SMALL.is_solution(question[None], answer[None].astype(np.int64) + 256).tolist() == [False]


def test_a_path_past_the_goal_is_none():
    task = get_task("maze", size=3)
    question, answer = task.parse("S G######"), task.parse("SoG######")
    assert task.is_solution(question[None], answer[None]).all()
    question, answer = task.parse("S G #    "), task.parse("SoG #o   ")
    assert not task.is_solution(question[None], answer[None]).any()


@pytest.mark.parametrize(
    "text, problem",
    [
        (QUESTION[:-1], "15 characters; a 4x4 maze has 16"),
        (QUESTION.replace("S", " "), "no start"),
        (QUESTION.replace("G", "S"), "2 start"),
        (QUESTION.replace("G", " "), "no goal"),
        ("S###############"[:-1] + "G", "no way from start to goal"),
        (ANSWER, "has a path"),
        (QUESTION.replace("S", "X"), "impossible character 'X' in row 1, column 1"),
    ],
)
def test_what_is_wrong_with_a_question_is_said(text, problem):
    assert problem in SMALL.problem(text)


def test_what_is_wrong_with_an_answer_is_said():
    assert SMALL.problem(QUESTION, ANSWER) is None
    assert "does not connect" in SMALL.problem(QUESTION, ANSWER.replace("o", " "))
    assert "row 1, column 4 is not as in the question" in SMALL.problem(QUESTION, ANSWER.replace("#", " "))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 12), st.booleans())
def test_generated_mazes_have_a_shortest_path_of_the_wanted_length(seed, size, unique):
    task = get_task("maze", size=size)
    options = {"walls": (0.1, 0.4), "unique": unique, "path": (2, size), "max_tries": 1000}
    questions, answers = task.generate(seed, 0, 5, **options)
    np.testing.assert_array_equal(task.generate(seed, 3, 1, **options)[0][0], questions[3])
    assert task.accepts(questions).all()
    assert task.is_solution(questions, answers).all() and task.is_shortest(questions, answers).all()
    for question, answer in zip(questions, answers, strict=True):
        steps = distances(question, size)[int(np.flatnonzero(question == GOAL)[0])]
        assert 2 <= steps <= size and (answer == PATH).sum() == steps - 1
        if unique:
            assert task.num_solutions(question) == 1
    # A turned maze is a maze, and its turned answer the answer.
    for symmetry in task.symmetries(8):
        inputs, labels = symmetry.tokens[questions[:, symmetry.cells]], answers[:, symmetry.cells]
        assert task.is_shortest(inputs, labels).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 12))
def test_the_ways_of_a_perfect_maze_are_a_tree(seed, size):
    """So one path only leads from start to goal, and the answer is that. No cell could be added to the tree."""
    task = get_task("maze", size=size)
    options = {"walls": "perfect", "unique": True, "path": (1, size), "max_tries": 1000}
    questions, answers = task.generate(seed, 0, 5, **options)
    np.testing.assert_array_equal(task.generate(seed, 3, 1, **options)[0][0], questions[3])
    assert task.accepts(questions).all() and task.is_shortest(questions, answers).all()
    for question, answer in zip(questions, answers, strict=True):
        is_free = np.pad((question != WALL).reshape(size, size), 1)
        ways = (is_free[:, 1:] & is_free[:, :-1]).sum() + (is_free[1:] & is_free[:-1]).sum()
        assert ways == is_free.sum() - 1  # and connected: a tree
        found = distances(question, size)
        assert len(found) == is_free.sum()
        steps = found[int(np.flatnonzero(question == GOAL)[0])]
        assert 1 <= steps <= size and (answer == PATH).sum() == steps - 1
        beside = is_free[:-2, 1:-1] + is_free[2:, 1:-1].astype(int) + is_free[1:-1, :-2] + is_free[1:-1, 2:]
        assert (beside[~is_free[1:-1, 1:-1]] != 1).all()


def test_the_copies_of_a_maze_are_its_eight_positions(tmp_path):
    builder = builder_of(MazeRecipe(source=made(tmp_path, (QUESTION, ANSWER)), num_test=0, aug=True))
    questions, answers = SMALL.parse(QUESTION)[None], SMALL.parse(ANSWER)[None]
    inputs, labels = builder.augmenter()(questions, answers, np.arange(1))
    for symmetry in range(8):
        expected = turned(questions[0].reshape(4, 4), symmetry).ravel()
        np.testing.assert_array_equal(inputs[symmetry], expected)
    assert SMALL.is_shortest(inputs, labels).all()


@pytest.mark.parametrize(("name", "size"), [("maze_small", 8), ("maze_unique", 6)])
def test_the_generator_of_a_recipe(tmp_path, name, size):
    recipe = load_recipe(name, {"num_train": 30, "num_test": 5})
    manifest = build(recipe, tmp_path / "data", show_progress=False)
    assert verify(tmp_path / "data") == []
    assert {n: (i.num_groups, i.num_examples) for n, i in manifest.splits.items()} == {
        "train": (30, 240),
        "test": (5, 5),
    }
    assert manifest.task_options == {"size": size}


def made(tmp_path, *rows):
    (tmp_path / "mazes.csv").write_text(
        "\n".join(["question,answer", *(",".join(row) for row in rows)]) + "\n"
    )
    return str(tmp_path / "mazes.csv")


@pytest.mark.parametrize(
    "rows, problem",
    [
        (
            [(QUESTION, ANSWER), ("S G######", "SoG######")],
            "line 3: question: 9 characters; a 4x4 maze has 16",
        ),
        ([(QUESTION.replace("S", " "), ANSWER)], "line 2: question: it has no start (S)"),
        ([(QUESTION, ANSWER.replace("o", " "))], "line 2: answer: the path does not connect start and goal"),
        ([(QUESTION, "")], "line 2: it has no answer"),
        ([(QUESTION[:-1], ANSWER)], "its first maze has 15 characters, which is no square"),
    ],
)
def test_bad_mazes_are_one_line(tmp_path, rows, problem):
    with pytest.raises(UserError) as caught:
        build(MazeRecipe(source=made(tmp_path, *rows), num_test=0), tmp_path / "data", show_progress=False)
    assert problem in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "values, problem",
    [
        (GENERATED, "'size' is not given"),
        (
            {**GENERATED, "size": 5, "max_path": 3},
            "min_path=5 is above max_path=3",
        ),
        ({**GENERATED, "size": 5, "walls": [0.5, 0.2]}, "give [LEAST,GREATEST]"),
        ({"source": "x.csv", "walls": "prefect"}, "walls"),
        ({**GENERATED, "size": 1}, "size=1"),
        ({"source": "x.csv", "num_clues": 3}, "unknown key 'num_clues'"),
    ],
)
def test_recipes_that_do_not_fit(values, problem):
    with pytest.raises(UserError) as caught:
        load_recipe(
            "maze_small", {**dict.fromkeys(("num_train", "num_test", "size", "source"), None), **values}
        )
    assert problem in str(caught.value)


def test_a_maze_over_several_lines_is_read(tmp_path):
    rows = [QUESTION[i : i + 4] for i in range(0, 16, 4)], [ANSWER[i : i + 4] for i in range(0, 16, 4)]
    question, answer = ("\n".join(part) for part in rows)
    (tmp_path / "mazes.csv").write_text(f'question,answer\n"{question}","{answer}"\n{QUESTION},{ANSWER}\n')
    recipe = MazeRecipe(source=str(tmp_path / "mazes.csv"), size=4, num_test=0)
    build(recipe, tmp_path / "data", show_progress=False)
    split = open_dataset(tmp_path / "data").split("train")
    labels = split.rows(np.arange(2))["labels"]
    np.testing.assert_array_equal(labels[0], labels[1])


def test_drawings_in_a_text_file_are_read(tmp_path):
    drawing = "\n".join(QUESTION[i : i + 4] for i in range(0, 16, 4))
    (tmp_path / "mazes.txt").write_text(f"{drawing}\n\n{QUESTION}\n")
    texts = [text for _, text in PuzzleFile(tmp_path / "mazes.txt", SMALL).questions()]
    assert [SMALL.parse(text).tolist() for text in texts] == 2 * [SMALL.parse(QUESTION).tolist()]


@pytest.mark.parametrize(
    "values, problem",
    [
        ({"size": 4, "min_path": 16}, "no 4x4 maze with a path of 16 to 16 steps found in 20000 tries"),
        ({"size": 4, "min_path": 12, "walls": "perfect"}, "in 20000 tries; lower min_path"),
        ({"size": 2, "num_train": 500}, "found only"),
    ],
)
def test_mazes_that_there_are_not_are_one_line(tmp_path, values, problem):
    with pytest.raises(UserError) as caught:
        build(
            MazeRecipe(**GENERATED | {"source": "generator"} | values), tmp_path / "data", show_progress=False
        )
    assert problem in str(caught.value) and not (tmp_path / "data").exists()
