"""Families of puzzles are found by name; code outside the package only if the user has named it."""

import sys

import pytest

from hrm_ray.data.tasks import base
from hrm_ray.data.tasks.base import get_task, import_family, task_class, trust
from hrm_ray.errors import UserError


def coordinates(name, **options):
    return get_task(name, **options).coordinates()


def test_boxes_of_sudoku_lie_in_the_grid():
    for size, box_rows, box_cols in ((4, 2, 2), (6, 2, 3), (9, 3, 3)):
        expected = []
        for row in range(size):
            for column in range(size):
                expected.append([row, column, size // box_cols * (row // box_rows) + column // box_cols])
        assert coordinates("sudoku", size=size).tolist() == expected
    assert coordinates("sudoku", size=6)[:12, 2].tolist() == 2 * [0, 0, 0, 1, 1, 1]


def test_cells_lie_in_rows_where_that_is_known():
    grid = coordinates("grid", alphabet="ab", height=3, width=5)
    assert grid.tolist() == [[row, column] for row in range(3) for column in range(5)]
    assert coordinates("maze", size=3).tolist() == [[i // 3, i % 3] for i in range(9)]
    assert coordinates("arc").max(axis=0).tolist() == [29, 29]
    assert coordinates("tokens", vocab_size=6, seq_len=16)[5].tolist() == [
        1,
        1,
    ]  # a square is taken for a grid
    assert coordinates("tokens", vocab_size=6, seq_len=10) is None


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of a package of the user's; returns how."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "_named_here", set())
    monkeypatch.delenv(base.TRUSTED, raising=False)

    def write(name: str, code: str) -> None:
        file = tmp_path / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in ("mine", "broken")]:
        del sys.modules[name]


def test_foreign_code_runs_only_if_it_is_trusted(package, tmp_path, monkeypatch):
    package("mine.task", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=r"task 'mine\.task' is Python code; .* set HRM_RAY_TASKS=mine"):
        get_task("mine.task")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv(base.TRUSTED, "others,mine")
    assert import_family("mine.task") and (tmp_path / "ran").exists()
    monkeypatch.delenv(base.TRUSTED)
    trust("mine.task")
    assert import_family("mine.task")
    with pytest.raises(UserError, match=r"its module has no class of Task with name = 'mine\.task'"):
        task_class("mine.task")


@pytest.mark.parametrize(
    "files, problem",
    [
        ({}, "is no module that Python finds"),
        ({"broken.__init__": ""}, "is no module that Python finds"),
        ({"broken.__init__": "1 / 0", "broken.task": ""}, "cannot be imported: ZeroDivisionError"),
        ({"broken.task": "import no_such_package"}, "cannot be imported: ModuleNotFoundError"),
        ({"broken.task": "def"}, "cannot be imported: SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(package, files, problem):
    for name, code in files.items():
        package(name, code)
    trust("broken.task")
    with pytest.raises(UserError) as caught:
        import_family("broken.task")
    assert problem in str(caught.value)
