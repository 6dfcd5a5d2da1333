"""What a command refuses to write where Ray deletes it."""

from pathlib import Path

import pytest

from hrm_ray.cli import main
from hrm_ray.errors import UserError
from hrm_ray.jobs.copy import check_lasts
from tests.toy import toy_dataset


@pytest.fixture
def copy(tmp_path: Path, monkeypatch) -> Path:
    """A folder like the one in which a job runs; the current one inside."""
    folder = tmp_path / "session_x/runtime_resources/working_dir_files/_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("train experiment=sudoku_4x4 data={data}", "storage=runs "),
        ("train experiment=sudoku_4x4 data={data} storage={copy}/r", "storage=/"),
        ("tune sudoku_4x4_lr data={data}", "storage=runs "),
        ("data build recipe=sudoku_4x4 out=d", "out=d "),
        ("data import-npy {data} out=d", "out=d "),
        ("import-checkpoint {data} out=c", "out=c "),
        ("export-checkpoint {data} out=c", "out=c "),
        ("eval {data} data={data} save_outputs=logits out=o.npz", "out=o.npz "),
    ],
)
def test_what_would_be_lost_is_refused(words, named, copy, tmp_path, capsys):
    toy_dataset(tmp_path / "data")
    assert main(words.format(data=tmp_path / "data", copy=copy).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith(f"error: {named}") and "lies in the job's own copy of the working directory" in line
    )
    assert [*copy.iterdir()] == []


def test_what_lasts(copy, tmp_path):
    (copy / "link").symlink_to(tmp_path)
    for path in ("s3://b/runs", str(tmp_path / "runs"), "../../../runs", "link/runs"):
        check_lasts("storage", path)
    with pytest.raises(UserError, match="give a URI"):
        check_lasts("storage", "runs")


def test_a_file_of_the_copy_is_read(copy, capsys):
    (copy / "mine.yaml").write_text("lr: x\n")
    assert main(["config", "validate", "mine.yaml"]) == 2
    assert "lr" in capsys.readouterr().err
