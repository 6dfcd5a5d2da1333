"""Colours on a terminal, and nowhere else."""

import re

import numpy as np
import pytest

from hrm_ray.cli import main, streams
from hrm_ray.data.drawing import COLOURS, _terminal_colour, beside, draw
from hrm_ray.data.tasks.arc import Arc, place
from hrm_ray.data.tasks.base import get_task
from hrm_ray.data.tasks.maze import FREE, Maze
from tests.interop.test_dataset import write_set

MAZE = Maze(4)
QUESTION, ANSWER = "S  # # # # #   G", "S  #o# #o# #oooG"


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_cells_of_arc_are_square_and_padding_is_left_out():
    lines = draw(Arc(), place(np.array([[0, 7], [3, 1]]), 5, 9), in_colour=True).splitlines()
    assert [plain(line) for line in lines] == ["0 7 + ", "3 1 + ", "+ + . "]
    assert lines[0].startswith("\x1b[38;5;231;48;5;16m0 \x1b[0m") and lines[2] == "+ + . "
    assert len(draw(Arc(), np.zeros(900, np.uint8), in_colour=True).splitlines()) == 30


def test_the_ten_colours_stay_apart_on_a_terminal():
    assert len({_terminal_colour(colour) for colour in COLOURS}) == 10


def test_a_maze_shows_where_its_answer_cannot_be_one():
    question, answer = MAZE.parse(QUESTION), MAZE.parse(ANSWER)
    assert plain(draw(MAZE, answer, question, in_colour=True)).splitlines()[3] == "• • • G "
    answer[3] = FREE  # a wall is gone
    assert plain(draw(MAZE, answer, question, in_colour=True)).splitlines()[0] == "S     ! "
    assert "!" not in plain(draw(MAZE, answer, in_colour=True))


def test_marks_of_a_sudoku_are_coloured():
    task = get_task("sudoku", size=4)
    question = task.parse("1...|.2..|..3.|...4".replace("|", ""))
    answer = question.copy()
    answer[0], answer[1] = 3, 4
    text = draw(task, answer, question, in_colour=True)
    assert plain(text) == task.render(answer, question)
    assert "\x1b[1;38;5;203m2!\x1b[0m" in text and "\x1b[1;38;5;41m3'\x1b[0m" in text


@pytest.mark.parametrize(
    "task", [Arc(), MAZE, get_task("sudoku", size=4), get_task("tokens", vocab_size=12, seq_len=40)]
)
def test_without_colours_it_is_what_the_task_renders(task):
    tokens = np.arange(task.seq_len).astype(np.uint8) % task.vocab_size
    assert draw(task, tokens) == task.render(tokens)
    assert all(len(cell) == 2 for cell in map(task.cell, range(256)))  # also of what a model must not answer


def test_drawings_side_by_side_line_up():
    assert plain(beside("\x1b[1mab\x1b[0m\nabcd", "x\ny\nz")).splitlines() == [
        "ab     x",
        "abcd   y",
        "       z",
    ]


@pytest.mark.parametrize(
    ("variables", "is_terminal", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"TERM": "dumb"}, True, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
    ],
)
def test_when_there_are_colours(monkeypatch, variables, is_terminal, expected):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    assert streams.in_colour() is expected


def test_a_pipe_gets_plain_text(tmp_path, monkeypatch, capsys):
    write_set(tmp_path / "train", "all", np.random.default_rng(0), [1], [1], seq_len=900)  # drawn as ARC
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert main(["data", "show", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["data", "show", str(tmp_path)]) == 0
    coloured = capsys.readouterr().out
    assert "\x1b[38;5;" in coloured and plain(coloured).splitlines()[-1] == text.splitlines()[-1]
