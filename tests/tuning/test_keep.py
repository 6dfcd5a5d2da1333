"""A sweep deletes nothing of a user's, and says in one line what it cannot read."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from hrm_ray.errors import UserError
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import FOLDER
from hrm_ray.training.logging import is_dumped, keep_changed
from hrm_ray.tuning import lineage, report, sweep
from hrm_ray.tuning.lineage import drop_unknown, stage, take_over
from hrm_ray.tuning.points import Points
from hrm_ray.tuning.status import _step_of, opened
from hrm_ray.tuning.study import LOG, SweepStudy, trial_name
from hrm_ray.tuning.sweep import CONFIG_FILE, SweepBook, promote, sweep_folder
from hrm_ray.tuning.view import View
from tests.training.test_keep import contents, make_folder, make_link, make_pipe, saved, steps_of
from tests.tuning.toy_sweep import toy_sweep


class Listens(View):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def book(tmp_path: Path) -> SweepBook:
    """Of a sweep that has begun, with no Ray."""
    config = toy_sweep(tmp_path, keep=1)
    folder = sweep_folder(config)
    study = SweepStudy(folder, config, first_step=5, last_step=40)
    folder.write(CONFIG_FILE, yaml.safe_dump(sweep.plain(config), sort_keys=False).encode())
    return SweepBook(study, Points(config, 0), folder, Listens())


def test_a_new_trial_does_not_go_on_from_what_somebody_has_put_there(book):
    copy = book.folder / trial_name(0)
    saved(copy, 5)
    before = contents(copy.local_path)
    assert book.next().number == 0
    assert "trial-0000-before-1" in book.view.said[0] and not copy.exists()
    assert contents(book.folder.local_path / "trial-0000-before-1") == before


def test_a_trial_that_goes_on_is_not_set_aside(book):
    book.next()
    saved(book.folder / trial_name(0), 5)
    again = SweepStudy(book.folder, book.config, first_step=5, last_step=40)
    following = SweepBook(again, book.points, book.folder, Listens())
    assert following.next().number == 0
    assert steps_of(book.folder / trial_name(0)) == [5] and following.view.said == []


def test_only_checkpoints_of_trials_are_cleared(book):
    """The best trial's are kept, and the folders that are named like those of trials."""
    for number, value in ((0, 0.1), (1, 0.9), (2, 0.5)):
        assert book.next().number == number
        saved(book.folder / trial_name(number), 5)
        book.study.complete(number, [value])
    for name in ("trial-notes", "trial-0002-copy", "trial-00002", "trial-2"):
        shutil.copytree(book.folder.local_path / trial_name(2), book.folder.local_path / name)
    mine = book.folder.local_path / trial_name(2) / FOLDER / "mine.txt"
    mine.write_text("mine")
    saved(book.folder / trial_name(2), 5, "backup")
    book.clear(wait_s=1)
    steps = {name: steps_of(book.folder / name) for name in book.folder.folders()}
    gone = {trial_name(0), trial_name(2)}
    assert {name for name in steps if not steps[name]} == gone and len(steps) == 7
    assert sorted(path.name for path in mine.parent.iterdir()) == ["backup", "mine.txt"]


@pytest.mark.parametrize("name", ["trial-notes", "trial-0007-copy", "notes"])
def test_a_sweep_may_begin_beside_folders_of_other_names(tmp_path, name):
    make_folder(tmp_path / name)
    sweep._check_empty(Storage(tmp_path))


@pytest.mark.parametrize("name", ["trial-0003", "index.html", "trials.csv", "summary.json", "sweep.yaml"])
def test_a_sweep_does_not_begin_over_what_is_not_its_own(tmp_path, name):
    make_folder(tmp_path / name)
    with pytest.raises(UserError, match="choose another run_name="):
        sweep._check_empty(Storage(tmp_path))


@pytest.mark.parametrize("name", [*sweep.FILES, report.PLOTS])
@pytest.mark.parametrize("make", [make_folder, make_pipe, make_link])
def test_what_has_the_name_of_one_of_its_files_is_named_before_it_begins(tmp_path, name, make):
    make(tmp_path / name)
    if name == report.PLOTS and make is make_folder:
        return
    with (
        pytest.raises(UserError, match=f"{tmp_path}/{name} is .*; move it away, or choose another run_name="),
        sweep._held(Storage(tmp_path)),
    ):
        pass


def test_a_folder_that_was_there_is_not_removed(tmp_path):
    with sweep._held(Storage(tmp_path / "new")):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "lock").write_text("mine")
    with sweep._held(Storage(tmp_path / "old")):
        pass
    assert (tmp_path / "old" / "lock").read_text() == "mine"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[",
        b"- 1\n",
        b"just text\n",
        b"\xff\xfe",
        b"? [1]\n: 2\n",
        b"a: &a [*a]\n",
        b"1: 2\n",
        b"train: 5\n",
    ],
)
@pytest.mark.parametrize("name", [CONFIG_FILE, report.BEST])
def test_a_changed_yaml_is_one_line(book, name, content):
    book.folder.write(name, content)
    with pytest.raises(UserError) as told:
        opened(book.folder) if name == CONFIG_FILE else promote(book.folder, [])
    assert len(str(told.value).splitlines()) == 1 and name in str(told.value)


def test_what_somebody_has_changed_is_kept(book):
    content = book.folder.read(CONFIG_FILE)
    assert keep_changed(book.folder, CONFIG_FILE, is_dumped) is None
    book.folder.write(CONFIG_FILE, b"# a remark\n" + content)
    for number in (1, 2):
        assert keep_changed(book.folder, CONFIG_FILE, is_dumped) == f"{CONFIG_FILE}.before-{number}"
    assert book.folder.read(f"{CONFIG_FILE}.before-1") == b"# a remark\n" + content


def test_our_own_files_are_not_taken_for_changed(book):
    book.next()
    book.study.complete(0, [0.5])
    rows = report.write_table(book.folder, book.study)
    assert is_dumped(book.folder.read(report.BEST))
    table = book.folder.read(report.TABLE)
    assert rows and report.is_table(book.study, table) and report.is_table(book.study, b"")
    for changed in (
        table.replace(b"\n", b"\r\n"),
        table.replace(b",", b";"),
        b"my," + table,
        b"\xff",
        table + b"x\n",
    ):
        assert not report.is_table(book.study, changed)


@pytest.mark.parametrize(
    "line", ["null", "[]", '{"global_step": "x"}', '{"global_step": [1]}', "[" * 50_000, "9" * 5000]
)
def test_a_line_that_is_no_report_tells_no_step(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"global_step": 3}}\n{line}\n')
    assert _step_of(Storage(tmp_path)) == 3


# Copies of checkpoints


def test_copies_of_members_leave_alone_what_is_not_theirs(tmp_path):
    good, bad = Storage(tmp_path / "good"), Storage(tmp_path / "bad")
    for step in (5, 10):
        saved(good, step)
        saved(bad, step)
    saved(bad, 15)
    saved(good, 5, "zz-copy")
    saved(bad, 5, "zz-copy")
    for name in ("notes", "zz", "0002-copy"):
        make_folder(tmp_path / "bad" / lineage.TAKEN / name)
    mine = contents(tmp_path / "bad" / lineage.TAKEN) | contents(tmp_path / "bad" / FOLDER / "zz-copy")
    assert stage(good, 8, bad, 1).step == 10
    assert stage(good, 11, bad, 2) is None  # the copy is no later one
    drop_unknown(bad, 0)
    assert (tmp_path / "bad" / lineage.TAKEN / "notes").exists()
    stage(good, 10, bad, 1)
    take_over(bad, 1, wait_s=1)
    assert steps_of(bad) == [5, 10]
    left = contents(tmp_path / "bad" / lineage.TAKEN) | contents(tmp_path / "bad" / FOLDER / "zz-copy")
    assert left == mine


def test_what_is_in_the_way_of_a_copy_is_kept(tmp_path):
    good, bad = Storage(tmp_path / "good"), Storage(tmp_path / "bad")
    saved(good, 10)
    saved(bad, 5)
    saved(bad, 5, "step-00000010")
    before = contents(tmp_path / "bad" / FOLDER / "step-00000010")
    stage(good, 10, bad, 1)
    take_over(bad, 1, wait_s=1)
    assert steps_of(bad) == [5, 10]
    assert contents(tmp_path / "bad" / FOLDER / "step-00000010-aside-1") == before
    events = [json.loads(line)["event"] for line in bad.read("events.jsonl").splitlines()]
    assert events == ["set_aside", "taken_over"]


def test_a_study_that_is_no_file_is_named(tmp_path):
    make_folder(tmp_path / LOG)
    with pytest.raises((UserError, OSError), match=LOG):
        SweepStudy(Storage(tmp_path), toy_sweep(tmp_path), first_step=5, last_step=40)
