import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.keyed_random import stream
from hrm_ray.data.tasks.base import get_task
from hrm_ray.data.tasks.sudoku import BLANK, BOX_SHAPES, kernels
from hrm_ray.data.tasks.tokens import Tokens
from hrm_ray.errors import UserError
from tests.data import reference

SIZES = sorted(BOX_SHAPES)
CLUES = {4: 6, 6: 15, 9: 30}
seeds = st.integers(0, 2**63 - 1)


def puzzles(size, count=20, seed=0):
    return get_task("sudoku", size=size).generate(seed, 0, count, CLUES[size], 100)


def draw(size, seed):
    """A random symmetry: (source, digits)."""
    source = np.empty(size * size, np.int64)
    digits = np.empty(size + 2, np.uint8)
    kernels.draw_symmetry(np.array([stream(seed, 0, 0)], np.uint64), *BOX_SHAPES[size], source, digits)
    return source, digits


@pytest.mark.parametrize("size", SIZES)
def test_generated_puzzles_have_one_solution_and_the_wished_clues(size):
    questions, answers = puzzles(size)
    for question, answer in zip(questions, answers, strict=True):
        assert (question != BLANK).sum() == CLUES[size]
        assert reference.solutions(reference.to_grid(question, size)) == [reference.to_grid(answer, size)]


@pytest.mark.parametrize("size", SIZES)
def test_generated_puzzle_depends_on_its_number_alone(size):
    task = get_task("sudoku", size=size)
    questions, answers = task.generate(7, 0, 12, CLUES[size], 100)
    for first, count in ((0, 5), (5, 7), (11, 1)):
        part = task.generate(7, first, count, CLUES[size], 100)
        assert (part[0] == questions[first : first + count]).all()
        assert (part[1] == answers[first : first + count]).all()
    assert (task.generate(8, 0, 12, CLUES[size], 100)[0] != questions).any()


def test_generator_gives_up_on_impossible_numbers_of_clues():
    questions, _ = get_task("sudoku", size=9).generate(0, 0, 1, 17, 3)
    assert not questions.any()


@pytest.mark.parametrize("size", SIZES)
def test_solver_counts_solutions_as_brute_force_does(size):
    """Puzzles with clues taken away (several solutions), kept, and added wrongly (none)."""
    task = get_task("sudoku", size=size)
    questions, answers = puzzles(size, 30, seed=3)
    rng = np.random.default_rng(0)
    boards = questions.copy()
    for i, board in enumerate(boards):
        if i % 3 == 0:
            board[rng.choice(np.flatnonzero(board != BLANK), 2, replace=False)] = BLANK
        if i % 3 == 1:
            cell = rng.choice(np.flatnonzero(board == BLANK))
            board[cell] = 2 + (answers[i, cell] - 2 + 1) % size
    contradicting = task.contradicts(boards)
    solved, num_solutions, num_guesses = task.solve(boards)
    for i in range(len(boards)):
        grid = reference.to_grid(boards[i], size)
        expected = [] if contradicting[i] else reference.solutions(grid)
        assert num_solutions[i] == len(expected)
        if expected:
            assert reference.to_grid(solved[i], size) in expected or num_solutions[i] == 2
            assert reference.is_valid(reference.to_grid(solved[i], size))
        else:
            assert not solved[i].any()
    assert {0, 1, 2} == set(num_solutions)
    assert (num_guesses >= 0).all()


def test_solver_counts_all_288_boards_of_4x4():
    """Breaking off at the second solution must not lose any: count boards by fixing more and more cells."""
    task = get_task("sudoku", size=4)
    count, frontier = 0, [np.ones(16, np.uint8)]
    while frontier:
        _, num_solutions, _ = task.solve(np.array(frontier))
        deeper = []
        for board, n in zip(frontier, num_solutions, strict=True):
            if n == 1:
                count += 1
            elif n == 2:
                cell = int(np.flatnonzero(board == BLANK)[0])
                for digit in range(2, 6):
                    deeper.append(board.copy())
                    deeper[-1][cell] = digit
        frontier = deeper
    assert count == 288


@pytest.mark.parametrize("size", SIZES)
def test_guesses_rate_difficulty(size):
    task = get_task("sudoku", size=size)
    _, answers = puzzles(size)
    assert (task.solve(answers)[2] == 0).all()
    assert task.solve(np.full((1, size * size), BLANK, np.uint8))[2] > 0


@pytest.mark.parametrize("size", SIZES)
@given(seed=seeds)
@settings(max_examples=50, deadline=None)
def test_symmetry_keeps_validity_and_fits_question_to_answer(size, seed):
    task = get_task("sudoku", size=size)
    questions, answers = puzzles(size, 3)
    new_questions, new_answers = task.augment(questions, answers, np.array([5, 6, 7]), 4, seed)
    assert task.is_solution(new_questions, new_answers).all()
    assert reference.is_valid(reference.to_grid(new_answers[-1], size))
    for i in range(3):  # originals first, clue counts kept
        rows = slice(i * 5, i * 5 + 5)
        assert (new_questions[i * 5] == questions[i]).all() and (new_answers[i * 5] == answers[i]).all()
        assert ((new_questions[rows] == BLANK).sum(axis=1) == (questions[i] == BLANK).sum()).all()
    _, num_solutions, _ = task.solve(new_questions)
    assert (num_solutions == 1).all()


@pytest.mark.parametrize("size", SIZES)
@given(first=seeds, second=seeds)
@settings(max_examples=50, deadline=None)
def test_symmetries_form_a_group(size, first, second):
    """Inverses and compositions of symmetries are of the same kind: they too map units onto units."""
    cells_of_unit, _ = get_task("sudoku", size=size)._geometry
    unit_sets = {frozenset(cells.tolist()) for cells in cells_of_unit}
    boards = puzzles(size, 2)[1]
    source, digits = draw(size, first)
    other_source, other_digits = draw(size, second)
    assert sorted(source) == list(range(size * size)) and sorted(digits) == list(range(size + 2))
    assert (digits[:2] == [0, 1]).all()
    for mapping in (source, np.argsort(source), source[other_source]):
        assert {frozenset(mapping[list(unit)].tolist()) for unit in unit_sets} == unit_sets
    there = digits[boards[:, source]]
    back = np.argsort(digits)[there[:, np.argsort(source)]]
    assert (back == boards).all()
    composed = other_digits[there[:, other_source]]
    assert (composed == other_digits[digits][boards[:, source[other_source]]]).all()


@pytest.mark.parametrize(("size", "expected"), [(4, 8 * 8 * 2), (6, (6 * 8) * (2 * 36))])
def test_every_cell_symmetry_is_drawn(size, expected):
    """4x4: 8 row orders x 8 column orders x 2; 6x6: 3! 2!^3 row orders x 2! 3!^2 column orders, no transposition."""
    drawn = {draw(size, seed)[0].tobytes() for seed in range(60_000 if size == 6 else 4_000)}
    assert len(drawn) == expected


def test_transposition_only_where_boxes_are_square():
    def transposed(size, seed):
        rows = draw(size, seed)[0].reshape(size, size) // size
        return (rows[0] != rows[0, 0]).any()

    assert {transposed(4, seed) for seed in range(40)} == {True, False}
    assert {transposed(9, seed) for seed in range(40)} == {True, False}
    assert {transposed(6, seed) for seed in range(40)} == {False}


def test_augmentation_depends_on_seed_group_and_copy_alone():
    task = get_task("sudoku", size=9)
    questions, answers = puzzles(9, 6)
    groups = np.arange(6)
    whole = task.augment(questions, answers, groups, 3, 1)
    for part in (slice(0, 2), slice(2, 6)):
        some = task.augment(questions[part], answers[part], groups[part], 3, 1)
        rows = slice(part.start * 4, part.stop * 4)
        assert (some[0] == whole[0][rows]).all() and (some[1] == whole[1][rows]).all()
    fewer = task.augment(questions, answers, groups, 1, 1)
    assert (fewer[0].reshape(6, 2, 81) == whole[0].reshape(6, 4, 81)[:, :2]).all()
    other = task.augment(questions, answers, groups, 3, 2)
    assert (other[0].reshape(6, 4, 81)[:, 1:] != whole[0].reshape(6, 4, 81)[:, 1:]).any(axis=2).all()


@pytest.mark.parametrize("size", SIZES)
def test_is_solution_agrees_with_the_reference(size):
    task = get_task("sudoku", size=size)
    questions, answers = puzzles(size)
    assert task.is_solution(questions, answers.astype(np.int64)).all()
    rng = np.random.default_rng(1)
    for _ in range(50):
        wrong = answers.copy()
        cells = rng.integers(0, size * size, len(wrong))
        wrong[np.arange(len(wrong)), cells] = rng.integers(0, size + 2, len(wrong))
        expected = [
            reference.is_valid(reference.to_grid(a, size)) and all((q == BLANK) | (q == a))
            for q, a in zip(questions, wrong, strict=True)
        ]
        assert task.is_solution(questions, wrong).tolist() == expected
    assert not task.is_solution(
        np.roll(questions, 1, axis=0), answers
    ).any()  # valid, but of another question
    assert not task.is_solution(questions, np.full_like(answers, -100, dtype=np.int64)).any()


@pytest.mark.parametrize("size", SIZES)
def test_text_round_trip(size):
    task = get_task("sudoku", size=size)
    for question in puzzles(size)[0]:
        text = task.to_text(question)
        assert (task.parse(text) == question).all()
        assert (task.parse(text.replace(".", "0")) == question).all()
        assert (task.encode(np.frombuffer(text.encode(), np.uint8)[None]) == question).all()


def test_parse_names_the_problem():
    task = get_task("sudoku", size=4)
    for text, message in {
        "12..34..": "8 characters; a 4x4 Sudoku has 16",
        "1" * 17: "17 characters; a 4x4 Sudoku has 16",
        "1234......5.....": "impossible digit '5' in row 3, column 3; allowed: 1-4, and . or 0 for a blank",
        "x..............é": "impossible digit 'x' in row 1, column 1; allowed: 1-4, and . or 0 for a blank",
        "...............☃": "impossible digit '☃' in row 4, column 4; allowed: 1-4, and . or 0 for a blank",
    }.items():
        with pytest.raises(UserError) as error:
            task.parse(text)
        assert str(error.value) == message


def test_problem_in_words():
    task = get_task("sudoku", size=4)
    good = "1234341221434321"
    assert task.problem("1...............", good) is None
    assert task.problem("1...............") is None
    assert "clues contradict: 1 twice in row 1" in task.problem("1..1............")
    assert "clues contradict: 2 twice in box 1" in task.problem("2....2..........")
    assert "clue in row 1, column 1 differs" in task.problem("2...............", good)
    assert "is not complete" in task.problem("1...............", good[:-1] + ".")
    assert "no solution: 1 twice in row 4" in task.problem("1...............", good[:-2] + "11"[:1] + "1")
    assert "answer '12'" in task.problem("1...............", "12")


def test_render():
    task = get_task("sudoku", size=4)
    question, answer = task.parse("1...34..21434321"), task.parse("1234341221434321")
    assert task.render(question) == "\n".join(
        [
            "+-----+-----+",
            "| 1 . | . . |",
            "| 3 4 | . . |",
            "+-----+-----+",
            "| 2 1 | 4 3 |",
            "| 4 3 | 2 1 |",
            "+-----+-----+",
        ]
    )
    assert "| 1  2' | 3' 4' |" in task.render(answer, question)
    wrong = np.where(question == 2, 3, answer)  # a clue of 1 answered with 2
    assert "| 2! 2' | 3' 4' |" in task.render(wrong, question)
    assert len({len(line) for line in get_task("sudoku", size=6).render(np.ones(36)).splitlines()}) == 1


def test_registry():
    with pytest.raises(UserError, match=r"unknown task 'sudok'; did you mean 'sudoku'\?"):
        get_task("sudok")
    with pytest.raises(UserError, match="sudoku has no size 5; choose 4, 6 or 9"):
        get_task("sudoku", size=5)
    with pytest.raises(UserError, match="options"):
        get_task("sudoku", width=5)


def test_tokens_task():
    task = get_task("tokens", vocab_size=12, seq_len=4)
    assert isinstance(task, Tokens)
    assert task.to_text(task.parse("0, 1 11 2")) == "0 1 11 2"
    assert task.render(task.parse("0 1 11 2")) == " 0  1\n11  2"
    with pytest.raises(UserError, match=r"token '12' at position 2; allowed: 0..11"):
        task.parse("1 12 1 1")
    with pytest.raises(UserError, match="3 tokens; 4 are needed"):
        task.parse("1 1 1")


def test_reading_and_showing_need_neither_numba_nor_ray():
    code = (
        "import sys; from hrm_ray.data import shards, inspect; from hrm_ray.data.tasks.base import get_task;"
        "t = get_task('sudoku', size=4); q = t.parse('1'+15*'.'); t.render(q); t.is_solution(q[None], q[None]);"
        "assert not {'numba', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
