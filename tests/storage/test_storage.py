"""Files of a run: whole or not there, on any filesystem."""

import resource
import signal
from contextlib import contextmanager

import pytest

from hrm_ray.errors import UserError
from hrm_ray.storage.storage import Storage, is_full


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_write_read_list_delete(tmp_path, scheme):
    run = Storage(f"{scheme}{tmp_path}/a/run")
    assert not run.exists() and run.folders() == [] and run.read("x") is None
    run.write("one/x", b"1")
    run.write("one/x", b"2")
    (run / "two").write("y", b"3")
    assert run.read("one/x") == b"2" and (run / "one").read("x") == b"2"
    assert run.folders() == ["one", "two"]
    (run / "one").delete_file("x")
    (run / "one").delete_if_empty()
    assert run.folders() == ["two"]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["y"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    run = Storage(tmp_path)
    run.write("x", b"old")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run.write("x", b"new")
    assert run.read("x") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_options_of_a_uri_stay_at_its_end():
    run = Storage("s3://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http") / "name"
    assert str(run) == "s3://bucket/runs/name?endpoint_override=127.0.0.1:9&scheme=http"
    assert run._root == "bucket/runs/name" and run.local_path is None


def test_an_unknown_scheme_is_named():
    with pytest.raises(UserError, match="storage sftp://host/runs"):
        Storage("sftp://host/runs")


@pytest.mark.parametrize("name", ["what?x", "a#b", "50%", "%3F", "a b", "é&=c", "?"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_any_name_of_a_folder_is_that_folder(tmp_path, name, scheme):
    """Only a URI has options behind a question mark; a name in one is quoted."""
    run = Storage(f"{scheme}{tmp_path}") / name / "run"
    run.write("x", b"1")
    assert run.local_path == tmp_path / name / "run" and (tmp_path / name / "run" / "x").exists()
    assert Storage(str(run)).read("x") == b"1"  # as a worker is told where it is
    assert run.parent.name == name and str(run.parent.parent) == f"{scheme}{tmp_path}"


def test_a_local_path_with_a_question_mark(tmp_path, monkeypatch):
    (tmp_path / "a?b").mkdir()
    monkeypatch.chdir(tmp_path / "a?b")
    (Storage("runs") / "x").write("f", b"1")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == [
        "a?b",
        "a?b/runs",
        "a?b/runs/x",
        "a?b/runs/x/f",
    ]


@contextmanager
def small_files():
    """Inside, no file of this process may have more than 100 bytes, as on a disk that is full then.

    No fixture: pytest writes its dots, to a file perhaps, before those end.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("how", ["write", "append"])
def test_a_full_disk_names_the_file_and_leaves_no_part_of_a_whole_one(tmp_path, how):
    run, content = Storage(tmp_path), "x" * 101
    with small_files(), pytest.raises(OSError, match="File too large") as info:
        run.write("config.yaml", content.encode()) if how == "write" else run.append("config.yaml", content)
    assert info.value.filename == str(tmp_path / "config.yaml") and is_full(info.value)
    assert [p.name for p in tmp_path.iterdir()] == ([] if how == "write" else ["config.yaml"])
