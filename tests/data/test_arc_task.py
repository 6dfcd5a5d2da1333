"""ARC's grids become tokens and back as in the published code."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.tasks.arc import (
    Arc,
    Plan,
    as_grid,
    crop,
    crop_shapes,
    format_name,
    format_names,
    place,
    read_name,
)
from hrm_ray.data.tasks.base import get_task
from hrm_ray.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden/arc/evaluator"


def grids(most: int = 30) -> st.SearchStrategy[np.ndarray]:
    """Grids of all shapes up to most x most; their colours come from a seed, for large ones to be drawn quickly."""

    def draw(height: int, width: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 10, (height, width), dtype=np.uint8)

    return st.builds(draw, st.integers(1, most), st.integers(1, most), st.integers(0, 2**32))


def plans() -> st.SearchStrategy[Plan]:
    rest = st.permutations(range(1, 10)).map(lambda colours: (0, *colours))
    return st.builds(Plan, st.integers(0, 7), rest)


def sha256(grid: np.ndarray) -> str:
    """As the golden files have it: of height, width and cells, a byte each."""
    return hashlib.sha256(bytes(grid.shape) + grid.tobytes()).hexdigest()


def test_crops_are_the_published_ones():
    golden = np.load(GOLDEN / "crop_cases.npz")
    assert len(golden["grids"]) == 82
    np.testing.assert_array_equal(crop_shapes(golden["grids"]), golden["shapes"])
    assert [sha256(crop(tokens)) for tokens in golden["grids"]] == golden["sha256"].tolist()
    assert [sha256(crop(tokens)) for tokens in golden["grids"].astype(np.int64)] == golden["sha256"].tolist()


@given(grid=grids())
@settings(max_examples=200, deadline=None)
def test_a_placed_grid_is_cropped_whole_and_reads_as_its_text(grid):
    tokens = place(grid)
    assert crop(tokens).tolist() == grid.tolist() and crop(tokens).dtype == np.uint8
    assert Arc().parse(Arc().to_text(tokens)).tolist() == tokens.tolist()
    assert Arc().parse(str(grid.tolist())).tolist() == tokens.tolist()


def test_the_layout_of_tokens():
    frame = place(np.array([[0, 9], [5, 1]]), 1, 2).reshape(30, 30)
    assert frame[:5, :6].tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 2, 11, 1, 0],
        [0, 0, 7, 3, 1, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert frame.sum() == 2 + 11 + 7 + 3 + 4
    corner = place(np.zeros((2, 30), np.uint8), 28, 0).reshape(30, 30)
    assert (corner[28:] == 2).all() and not corner[:28].any()


@pytest.mark.parametrize(("row", "col"), [(-1, 0), (0, -1), (29, 0), (0, 28)])
def test_what_does_not_fit_is_refused(row, col):
    with pytest.raises(ValueError, match="do not fit"):
        place(np.zeros((2, 3), np.uint8), row, col)


def test_a_picture_shows_all_that_is_there():
    task = get_task("arc")
    assert task.render(task.parse("07/31")).splitlines() == ["0 7 +", "3 1 +", "+ + ."]
    assert task.render(place(np.array([[4]]), 0, 1)).splitlines() == [". 4 +", ". + ."]
    assert task.render(np.zeros(900, np.uint8)) == "."
    assert task.to_text(np.zeros(900, np.uint8)) == ""
    assert not task.checkable and (task.vocab_size, task.seq_len, task.pad_id) == (12, 900, 0)


@pytest.mark.parametrize("text", ["[[0,1],[2,3]]", "01/23", "01\n23\n", " 0 1 / 2 3 "])
def test_every_way_to_write_a_grid(text):
    assert crop(Arc().parse(text)).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "without cells"),
        ("[]", "without cells"),
        ("[[]]", "without cells"),
        ("12/3", "row 2 has 1 cells, row 1 has 2"),
        ("1/", "row 2 has 0 cells"),
        ("1" * 31, "1x31 cells; at most 30x30"),
        ("/".join("1" * 31), "31x1 cells"),
        ("1a", "colour 'a' in row 1, column 2; allowed: 0..9"),
        ("1²", "colour '²'"),
        ("[[1, 10]]", "colour '10' in row 1, column 2"),
        ("[[1], [-1]]", "colour '-1' in row 2, column 1"),
        ("[[1.0]]", "colour '1.0'"),
        ("[[true]]", "colour 'True'"),
        ("[[[1]]]", r"colour '\[1\]'"),
        ("[1, 2]", "list of rows"),
        ("[[1, 2]", "is no grid"),
        ("[" * 5000, "is no grid"),
    ],
)
def test_a_wrong_grid_is_one_line(text, said):
    with pytest.raises(UserError, match=said) as error:
        Arc().parse(text)
    assert len(str(error.value).splitlines()) == 1


@given(plan=plans())
@settings(max_examples=200, deadline=None)
def test_an_augmentation_keeps_its_name(plan):
    assert read_name(format_name("some_id", plan)) == ("some_id", plan)
    hrm = f"some_id_t{plan.symmetry}_{''.join(map(str, plan.colours))}"
    assert read_name(hrm) == ("some_id", plan)


@pytest.mark.parametrize("name", ["a", "a_b", "a_t1", "a_t8_0123456789", "a_t1_0123456788", "_t0_", ""])
def test_other_names_are_of_tasks_as_they_are(name):
    assert read_name(name) == (name, None) and format_name(name, None) == name


@pytest.mark.parametrize("separator", ["|||", "_"])
def test_the_names_of_many_plans(separator):
    plans = [Plan(0, tuple(range(10))), Plan(7, (0, *range(9, 0, -1))), Plan(3, (0, 2, 1, *range(3, 10)))]
    names = format_names(
        "some_id", np.array([[plan.symmetry, *plan.colours] for plan in plans], np.uint8), separator
    )
    assert [read_name(name) for name in names] == [
        ("some_id", None),
        *(("some_id", plan) for plan in plans[1:]),
    ]


@pytest.mark.parametrize(
    "name", ["a|||t8|||0123456789", "a|||t0", "a|||t0|||012345678", "a|||t0|||0123456788"]
)
def test_a_strange_augmentation_is_refused(name):
    with pytest.raises(UserError, match="names no augmentation"):
        read_name(name)


def test_what_is_no_list_is_no_grid():
    for value in (None, 1, "12", {"a": 1}, [1], [[1], 2]):
        with pytest.raises(UserError, match="list of rows"):
            as_grid(value)
