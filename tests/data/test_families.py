"""Families of puzzles are found by name; code outside the package only if the user has named it."""

import sys

import pytest

from hrm_ray.data.tasks import base
from hrm_ray.data.tasks.base import get_task, import_family, task_class, trust
from hrm_ray.errors import UserError


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
