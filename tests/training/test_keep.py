"""Nothing of a user's is deleted: a run goes on beside whatever lies in its folder, and leaves it as it was."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.cli import main
from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError
from hrm_ray.manifest import MANIFEST
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import (
    FOLDER,
    SAVED,
    DatasetInfo,
    Manifest,
    best,
    discard,
    discard_all,
    find,
    finished,
    make_place,
    newest_whole,
    prune,
    step_name,
    step_of,
    write_manifest,
    write_tensors,
)
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.logging import check_places, last_summary, reports
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.training.resume import set_aside, weights_source
from hrm_ray.world import World
from tests.toy import ARCH, toy_config, toy_dataset

SMALL = {**ARCH, "hidden_size": 16, "puzzle_emb_ndim": 16, "halt_max_steps": 2}
DEFAULTS = TrainConfig(data_path="")


def saved(run: Storage, step: int, name: str | None = None, **metrics: float) -> Path:
    """A checkpoint of one tensor, as a run writes it; `name` if its folder has another name."""
    folder = run / FOLDER / (name or step_name(step))
    entry = write_tensors(folder, "model.safetensors", {"w": torch.tensor([step])})
    task = DatasetInfo(task="tokens", task_options={}, vocab_size=6, seq_len=16, num_puzzle_identifiers=1)
    named = {f"eval/{key}": value for key, value in metrics.items()}
    manifest = Manifest(
        global_step=step, arch=DEFAULTS.arch, dataset=task, config={}, metrics=named, files=dict([entry])
    )
    write_manifest(folder, manifest)
    run.write(f"{FOLDER}/{SAVED}", b"")
    assert folder.local_path is not None
    return folder.local_path


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: the bytes of files, where links point, None for folders."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def steps_of(run: Storage) -> list[int]:
    return [checkpoint.step for checkpoint in finished(run)]


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """A run with checkpoints of steps 2 and 4."""
    run = Storage(tmp_path / "run")
    saved(run, 2)
    saved(run, 4)
    return run


@pytest.fixture
def place(run: Storage) -> Path:
    """Its checkpoints."""
    assert run.local_path is not None
    return run.local_path / FOLDER


# Which folders are the run's


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000009", 9),
        ("step-123456789", 123456789),
        ("step-000000009", None),
        ("step-9", None),
        ("step-00000009-copy", None),
        ("step-00000009 (1)", None),
        ("Step-00000009", None),
        ("step-0000000٩", None),
        ("zz", None),
    ],
)
def test_a_folder_is_named_after_its_step(name, step):
    assert step_of(name) == step


def test_a_copy_is_neither_newest_nor_best_and_stays(run, place):
    saved(run, 4, "zz-my-copy", exact_accuracy=0.9)
    saved(run, 4, "step-00000009", exact_accuracy=0.9)
    (place / "notes").mkdir()
    (place / "notes" / "n.txt").write_text("hi")
    before = contents(place)
    said = []
    newest = newest_whole(run, lambda event, what: said.append((event, what)))
    assert newest is not None and newest.name == "step-00000004"
    assert best(finished(run)).name == find(str(run)).name == "step-00000004"
    copies = [what for event, what in said if event == "copy_left_alone"]
    assert len(copies) == len(said) == 2
    assert "step-00000009 is a copy of step 4" in copies[0] and "zz-my-copy is a copy of step 4" in copies[1]
    prune(run, 4, keep_last=1, keep_best=1)
    after = contents(place)
    assert {name for name in before if name not in after} == {
        "step-00000002",
        f"step-00000002/{MANIFEST}",
        "step-00000002/model.safetensors",
    }
    assert all(before[name] == after[name] for name in after)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    run = Storage(tmp_path / "run")
    for step in (100_000_000, 99_999_999, 3):
        saved(run, step)
    assert steps_of(run) == [3, 99_999_999, 100_000_000]
    assert newest_whole(run, pytest.fail).step == 100_000_000
    prune(run, 100_000_000, keep_last=2, keep_best=1)
    assert steps_of(run) == [99_999_999, 100_000_000]


def test_where_only_a_copy_is_left_it_is_named(run, place):
    (place / "step-00000004").rename(place / "backup")
    shutil.rmtree(place / "step-00000002")
    with pytest.raises(UserError, match=r"all are gone.*; rename backup to step-00000004 to go on from that"):
        newest_whole(run, lambda event, what: None)


def test_a_manifest_of_something_else_does_not_stop_a_run(run, place, tmp_path):
    toy_dataset(tmp_path / "data", num_train=4, num_test=2)
    for name in ("data", "step-00000009"):
        shutil.copytree(tmp_path / "data", place / name)
    (place / "web").mkdir()
    (place / "web" / MANIFEST).write_text('{"format_version": 99}')
    before = contents(place)
    assert steps_of(run) == [2, 4]
    prune(run, 4, keep_last=9, keep_best=1)
    assert contents(place) == before


def test_what_cannot_be_read_is_passed_over(run, place, monkeypatch):
    """Root may read everything, so it is the storage that refuses."""
    read = Storage.read

    def refuses(folder, name):
        if folder.name == "step-00000004":
            raise PermissionError(13, "Permission denied", f"{folder}/{name}")
        return read(folder, name)

    monkeypatch.setattr(Storage, "read", refuses)
    said = []
    assert newest_whole(run, lambda event, what: said.append(what)).step == 2
    assert len(said) == 1 and "cannot be read (Permission denied); it is passed over" in said[0]
    prune(run, 2, keep_last=1, keep_best=1)
    assert (place / "step-00000004" / MANIFEST).exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_a_manifest_that_is_no_file_is_damage(run, place, kind):
    manifest = place / "step-00000004" / MANIFEST
    manifest.unlink()
    make = {
        "folder": manifest.mkdir,
        "pipe": lambda: os.mkfifo(manifest),
        "dangling link": lambda: manifest.symlink_to("nowhere"),
    }
    make[kind]()
    before = sorted(contents_without_pipes(place))
    said = []
    assert newest_whole(run, lambda event, what: said.append(event)).step == 2
    assert said == ["damaged_checkpoint"]
    prune(run, 2, keep_last=1, keep_best=1)
    assert sorted(contents_without_pipes(place)) == before


def contents_without_pipes(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


# What is deleted


def test_what_a_user_put_into_a_checkpoint_stays(run, place):
    old = place / "step-00000002"
    (old / "NOTES.txt").write_text("mine")
    (old / "plots").mkdir()
    (old / "model.safetensors.bak").write_text("mine")
    (old / "link").symlink_to("NOTES.txt")
    discard(run / FOLDER, old.name)
    assert contents(old) == {
        "NOTES.txt": b"mine",
        "plots": None,
        "model.safetensors.bak": b"mine",
        "link": "NOTES.txt",
    }
    assert steps_of(run) == [4]
    saved(run, 2)  # beside it
    assert steps_of(run) == [2, 4] and (old / "NOTES.txt").read_text() == "mine"


def test_a_link_to_a_checkpoint_is_read_and_not_followed_to_delete(run, place, tmp_path):
    (place / "step-00000002").rename(tmp_path / "elsewhere")
    (place / "step-00000002").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    assert steps_of(run) == [2, 4]
    prune(run, 4, keep_last=1, keep_best=1)
    discard_all(run)
    assert contents(tmp_path / "elsewhere") == before and (place / "step-00000002").is_symlink()
    assert not (place / "step-00000004").exists()


@pytest.mark.parametrize(
    ("files", "is_ours"),
    [
        (["model.safetensors", "carry-00000-of-00002.safetensors"], True),
        (["optimizer.safetensors.0123abcd.tmp"], True),
        (["model.safetensors", "README.md"], False),
        (["model.safetensors", "more/model.safetensors"], False),
        (["model.bin"], False),
        (["model.safetensors", "carry-1-of-2.safetensors"], False),
    ],
)
def test_without_a_manifest_a_folder_is_ours_if_nothing_else_is_in_it(run, place, files, is_ours):
    for file in files:
        (place / "step-00000006" / file).parent.mkdir(parents=True, exist_ok=True)
        (place / "step-00000006" / file).write_text("half")
    before = contents(place)
    prune(run, 4, keep_last=9, keep_best=1)
    assert (place / "step-00000006").exists() != is_ours
    assert is_ours or contents(place) == before


def test_a_later_one_is_deleted_only_if_it_is_damaged(run, place):
    saved(run, 8)
    file = saved(run, 6) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    prune(run, 4, keep_last=9, keep_best=1)
    assert steps_of(run) == [2, 4, 8]


def test_a_checkpoint_whose_manifest_was_changed_is_kept(run, place):
    manifest = place / "step-00000004" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"train_s": 0.0', '"train_s": 1.0'))
    before = contents(place / "step-00000004")
    prune(run, 2, keep_last=1, keep_best=1)
    assert contents(place / "step-00000004") == before


def copy_of_another_step(run: Storage, place: Path) -> None:
    saved(run, 4, "step-00000006")


def changed_manifest(run: Storage, place: Path) -> None:
    (saved(run, 6) / MANIFEST).write_text("{}")


def file_of_that_name(run: Storage, place: Path) -> None:
    (place / "step-00000006").write_text("mine")


def dangling_link(run: Storage, place: Path) -> None:
    (place / "step-00000006").symlink_to("/nowhere")


def folder_with_weights_and_more(run: Storage, place: Path) -> None:
    (place / "step-00000006").mkdir()
    for name in ("model.safetensors", "README"):
        (place / "step-00000006" / name).write_text("mine")


@pytest.mark.parametrize(
    "put",
    [
        copy_of_another_step,
        changed_manifest,
        file_of_that_name,
        dangling_link,
        folder_with_weights_and_more,
    ],
)
def test_what_is_in_the_way_of_a_checkpoint_is_kept_under_another_name(run, place, put):
    put(run, place)
    (place / "step-00000006-aside-1").write_text("taken")
    before = contents(place)
    said = make_place(run / FOLDER, "step-00000006")
    assert said is not None and said.endswith("it is kept as step-00000006-aside-2")
    moved = {
        name.replace("step-00000006-aside-2", "step-00000006"): it for name, it in contents(place).items()
    }
    assert moved == before
    assert make_place(run / FOLDER, "step-00000006") is None
    saved(run, 6)
    assert steps_of(run) == [2, 4, 6]


def test_all_checkpoints_of_a_trial_are_deleted_and_nothing_else(run, place):
    saved(run, 4, "backup")
    (place / "notes.txt").write_text("mine")
    discard_all(run)
    assert sorted(path.name for path in place.iterdir()) == ["backup", "notes.txt"]
    shutil.rmtree(place / "backup")
    (place / "notes.txt").unlink()
    saved(run, 1)
    discard_all(run)
    assert not place.exists()


NAMES = st.one_of(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.from_regex(
        r"(step-0000000[0-9]|saved|zz|[Ss]tep-[0-9]+)( copy|-aside-1|\.tmp|~|\.bak)", fullmatch=True
    ),
    st.from_regex(r"step-0000000[5-9]", fullmatch=True),
).filter(lambda name: name not in (".", "..", SAVED) and len(name.encode()) < 200)
FILE_NAMES = st.one_of(
    NAMES,
    st.sampled_from(
        ["model.safetensors.bak", "model.safetensors.tmp", "carry-0.safetensors", "Manifest.json"]
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    beside=st.dictionaries(
        NAMES, st.dictionaries(FILE_NAMES, st.binary(max_size=9), min_size=1, max_size=3), max_size=4
    ),
    inside=st.dictionaries(FILE_NAMES, st.binary(max_size=9), max_size=3),
    keep_last=st.integers(1, 3),
)
def test_whatever_lies_there_is_there_afterwards(tmp_path_factory, beside, inside, keep_last):
    run = Storage(tmp_path_factory.mktemp("run"))
    place = run.local_path / FOLDER
    for step in (1, 2, 3):
        saved(run, step)
    foreign: dict[Path, bytes] = {}
    for name, files in beside.items():
        foreign |= {place / name / file: content for file, content in files.items()}
    foreign |= {place / step_name(2) / file: content for file, content in inside.items()}
    for path, content in foreign.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    prune(run, 3, keep_last=keep_last, keep_best=1)
    assert steps_of(run) == [1, 2, 3][-keep_last:]
    discard_all(run)
    assert steps_of(run) == []
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == foreign


# Whole runs


@pytest.fixture
def config(tmp_path: Path) -> dict:
    toy_dataset(tmp_path / "data", num_train=32, num_test=8, num_identifiers=5)
    return toy_config(tmp_path / "data", tmp_path / "runs", arch=SMALL, checkpoint_interval=2, keep_last=2)


def trained(config: dict, max_steps: int, **values) -> TrainingLoop:
    parsed = TrainConfig(**{**config, "max_steps": max_steps, **values})
    trainer = TrainingLoop(parsed, run_folder(parsed), World(), Hooks())
    trainer.train()
    return trainer


def assert_same_end(a: TrainingLoop, b: TrainingLoop) -> None:
    last_a, last_b = finished(a.run)[-1].manifest, finished(b.run)[-1].manifest
    assert last_a.global_step == last_b.global_step and last_a.files == last_b.files


def junk(folder: Path, random: Random) -> dict[Path, bytes]:
    """Files and folders of a user's, put anywhere into a run."""
    names = [
        "notes",
        "zz",
        "step-7",
        "step-00000005 copy",
        ".hidden",
        "a b",
        "ü",
        "saved.bak",
        "x.tmp",
        "lock2",
    ]
    names += ["metrics.jsonl.bak", "config.yaml~", "trial-notes", "step-00000004-old", "summary (1).json"]
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    made = {}
    for _ in range(12):
        path = random.choice(places) / random.choice(names)
        if random.random() < 0.5:
            path = path / random.choice([*names, MANIFEST, "model.safetensors"])
        if not path.exists() and not any(parent.is_file() for parent in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(random.randbytes(random.randrange(50)))
            made[path] = path.read_bytes()
    return made


def test_a_run_goes_on_amid_junk_and_leaves_it(config):
    """As if undisturbed, bit for bit; copies of checkpoints among it."""
    whole = trained(config, 12, run_name="whole")
    random, foreign = Random(0), {}
    for max_steps in (4, 6, 8, 12):
        disturbed = trained(config, max_steps, run_name="disturbed")
        folder = disturbed.run.local_path
        assert all(path.read_bytes() == content for path, content in foreign.items())
        newest = folder / FOLDER / step_name(max_steps)
        for name in (f"zz-{max_steps}", f"step-{max_steps + 5:08d}"):  # the second is no step that is saved
            if max_steps + 5 < 12:
                shutil.copytree(newest, folder / FOLDER / name)
                copied = (path for path in (folder / FOLDER / name).rglob("*") if path.is_file())
                foreign |= {path: path.read_bytes() for path in copied}
        foreign |= junk(folder, random)
    assert len(foreign) > 40
    assert_same_end(whole, disturbed)
    assert steps_of(disturbed.run) == steps_of(whole.run)


def test_the_published_case(config, tmp_path, capsys):
    """A copy that sorts last and notes beside the checkpoints, over the command line."""
    words = [f"data={tmp_path}/data", f"storage={tmp_path}/runs", "run_name=o", "scaling=local", "device=cpu"]
    words += ["global_batch_size=8", "epochs=9", "eval_interval=3", "lr_warmup_steps=0", "compile=false"]
    words += [f"arch.{key}={value}" for key, value in SMALL.items()]
    words += ["tensorboard=false", "checkpoint_interval=2"]
    assert main(["train", *words, "max_steps=4"]) == 0
    place = tmp_path / "runs" / "o" / FOLDER
    shutil.copytree(place / "step-00000002", place / "zz-my-copy")
    (place / "notes").mkdir()
    (place / "notes" / "n.txt").write_text("hi\n")
    before = contents(place / "zz-my-copy")
    capsys.readouterr()
    assert main(["train", *words, "max_steps=8"]) == 0
    assert "continues after step 4" in capsys.readouterr().err
    assert contents(place / "zz-my-copy") == before
    assert (place / "notes" / "n.txt").read_text() == "hi\n"
    assert (place / "step-00000008").exists()


def test_a_copy_is_moved_aside_when_the_run_gets_to_its_step(config):
    whole = trained(config, 8, run_name="whole")
    first = trained(config, 4, run_name="parts")
    place = first.run.local_path / FOLDER
    shutil.copytree(place / "step-00000004", place / "step-00000006")
    before = contents(place / "step-00000006")
    again = trained(config, 8, run_name="parts")
    assert contents(place / "step-00000006-aside-1") == before
    assert_same_end(whole, again)
    events = [json.loads(line)["event"] for line in again.run.read("events.jsonl").splitlines()]
    assert "copy_left_alone" in events and "set_aside" in events


# Records


@pytest.fixture
def begun(config) -> tuple[dict, Path]:
    """The configuration of a run that was stopped at step 4, and its folder."""
    return config, trained(config, 4).run.local_path


LINE = '{"global_step": 1, "epoch": 0.1, "train/loss": %s}\n'
NONSENSE = [
    "# a remark\n",
    "\n",
    "null\n",
    "[1, 2]\n",
    '{"global_step": "2", "train/loss": 1.0}\n',
    '{"global_step": null}\n',
    '{"global_step": true}\n',
    '{"train/loss": 1.0}\n',
    LINE % '"low"',
    LINE % "[]",
    "[" * 100_000 + "\n",
    LINE % ("9" * 5000),
    "\udcff\x00\n",
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=range(len(NONSENSE)))
def test_lines_that_are_no_reports_are_left_out_and_the_file_is_kept(begun, nonsense):
    config, folder = begun
    file = folder / "metrics.jsonl"
    sound = file.read_text()
    changed = (nonsense + sound).encode(errors="surrogateescape")
    file.write_bytes(changed)
    again = trained(config, 8)
    assert (folder / "metrics.jsonl.before-1").read_bytes() == changed
    assert file.read_text().startswith(sound) and again.state.global_step == 8
    events = [json.loads(line) for line in again.run.read("events.jsonl").splitlines()]
    (said,) = (event["message"] for event in events if event["event"] == "changed_file")
    assert "metrics.jsonl has lines that are no reports" in said and "metrics.jsonl.before-1" in said


def test_a_last_line_that_was_cut_short_is_no_change(begun):
    config, folder = begun
    file = folder / "metrics.jsonl"
    sound = file.read_text()
    file.write_text(sound + '{"global_step": 5, "ep')
    trained(config, 8)
    assert file.read_text().startswith(sound) and not [*folder.glob("*.before-*")]


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "events.jsonl"])
@pytest.mark.parametrize(
    "content", [b"", b"# mine\n", b"{", b"[1]\n", b"\xff\xfe\x00", b"{}\n", b"[" * 50_000]
)
def test_a_changed_file_is_no_reason_to_stop(begun, name, content):
    config, folder = begun
    (folder / name).write_bytes(content)
    assert trained(config, 6).state.global_step == 6
    kept = [path.read_bytes() for path in folder.glob(f"{name}.before-*")]
    if name == "events.jsonl":
        assert (folder / name).read_bytes().startswith(content)
    else:
        assert content in (*kept, b"{}\n", b"[1]\n")  # the last may be ours as well


@pytest.mark.parametrize(
    "summary",
    [
        '{"finished": true}',
        '{"finished": true, "global_step": "8"}',
        '{"finished": 1, "global_step": 8, "best": {}, "final": {}, "train_s": 1, "stop_reason": null}',
        '{"finished": true, "global_step": 8, "best": [], "final": {}, "train_s": 1, "stop_reason": null}',
        '{"finished": true, "global_step": 8, "best": {"a": "b"}, "final": {}, "train_s": 1, "stop_reason": null}',
        '{"finished": true, "global_step": 8, "best": {}, "final": {}, "train_s": null, "stop_reason": null}',
        "[]",
        "NaN",
        "9" * 5000,
    ],
)
def test_a_summary_that_does_not_read_as_ours_counts_as_none(tmp_path, summary):
    (tmp_path / "summary.json").write_text(summary)
    assert last_summary(Storage(tmp_path)) == {}


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "mine.txt").write_text("mine")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_link(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


def make_file(path: Path) -> None:
    path.write_text("mine")


FILES = ["config.yaml", "metrics.jsonl", "events.jsonl", "summary.json", "lock"]
ODD: list[tuple[str, Callable[[Path], None]]] = [
    *((name, make) for name in FILES for make in (make_folder, make_pipe, make_link)),
    *((name, make) for name in (FOLDER, "tensorboard") for make in (make_file, make_pipe, make_link)),
]


@pytest.mark.parametrize(("name", "make"), ODD, ids=lambda it: it if isinstance(it, str) else it.__name__)
def test_what_has_the_name_of_one_of_our_files_is_named_before_anything_is_written(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"{tmp_path}/{name} is .*; move it away, or choose another") as told:
        check_places(Storage(tmp_path))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_a_run_does_not_begin_over_the_files_of_something_else(config, tmp_path, name):
    folder = tmp_path / "runs" / "toy"
    folder.mkdir(parents=True)
    (folder / name).write_text("theme: minimal # of a web site\n")
    with pytest.raises(UserError, match=f"toy/{name} is not of a run; choose another run_name="):
        trained(config, 2)
    assert contents(folder) == {name: b"theme: minimal # of a web site\n"}


def test_files_without_permission_are_named(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: no permission to read and write it"):
        check_places(Storage(tmp_path))


def test_a_link_in_place_of_a_file_stays_and_is_followed(begun, tmp_path):
    config, folder = begun
    (folder / "metrics.jsonl").rename(tmp_path / "elsewhere.jsonl")
    (folder / "metrics.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    again = trained(config, 8)
    assert (folder / "metrics.jsonl").is_symlink()
    assert max(report["global_step"] for _, report in reports(again.run)) == 8


def test_a_checkpoint_of_another_run_is_left_alone(begun, tmp_path):
    """Under the name that the next checkpoint of the run would have."""
    config, folder = begun
    other = trained({**config, "storage": str(tmp_path / "other"), "run_name": "other"}, 7)
    theirs = other.run.local_path / FOLDER / step_name(7)
    copied = Path(shutil.copytree(theirs, folder / FOLDER / step_name(7)))
    before = contents(copied)
    again = trained(config, 6)
    assert contents(copied) == before
    assert [checkpoint.step for checkpoint in finished(again.run)][-1] == 6
    lines = (folder / "events.jsonl").read_text()
    assert f"{copied} is of another run; it is left alone" in lines
    trained(config, 7)  # what is in our place is renamed
    assert contents(copied.with_name(f"{copied.name}-aside-1")) == before


def test_a_run_whose_identity_is_lost_goes_on(begun):
    config, folder = begun
    newest = finished(Storage(folder))[-1]
    (folder / FOLDER / SAVED).unlink()
    again = trained(config, newest.step + 1)
    assert [c.manifest.run_id for c in finished(again.run)] == [newest.manifest.run_id] * len(
        finished(again.run)
    )


def test_weights_that_somebody_has_put_there_stay(begun):
    """In a folder that is named as those of the run are, but that no manifest names."""
    config, folder = begun
    mine = folder / FOLDER / step_name(99)
    mine.mkdir()
    shutil.copy(next(folder.glob(f"{FOLDER}/*/model.safetensors")), mine)
    before = contents(mine)
    trained(config, 8)
    assert contents(mine) == before


def test_saved_may_be_a_folder(begun):
    config, folder = begun
    (folder / FOLDER / SAVED).unlink()
    make_folder(folder / FOLDER / SAVED)
    assert trained(config, 8).state.global_step == 8
    assert (folder / FOLDER / SAVED / "mine.txt").read_text() == "mine"


def test_what_a_user_wrote_into_our_lock_stays(begun):
    config, folder = begun
    (folder / "lock").write_text("do not touch")
    trained(config, 6)
    assert (folder / "lock").read_text() == "do not touch"


def test_only_our_own_leftovers_are_swept(tmp_path):
    names = [
        "notes.tmp",
        "config.yaml.tmp",
        "config.yaml.0123abcd.tmp",
        "mine.0123abcd.tmp",
        "config.yaml.XYZ.tmp",
    ]
    for name in names:
        (tmp_path / name).write_text("")
    Storage(tmp_path).sweep(["config.yaml"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({*names} - {"config.yaml.0123abcd.tmp"})


# Runs that are set aside


def test_a_run_is_set_aside_beside_folders_of_that_kind(tmp_path):
    run = Storage(tmp_path / "toy")
    saved(run, 4)
    for name in ("toy-before-2", "toy-before-²", "toy-before-x", "toy-before-12-old"):
        make_folder(tmp_path / name)
    make_file(tmp_path / "toy-before-7")
    before = contents(tmp_path)
    assert set_aside(run).name == "toy-before-8"
    assert weights_source(run).folder.name == "step-00000004"
    after = contents(tmp_path)
    assert {name: it for name, it in after.items() if not name.startswith("toy-before-8")} == {
        name: it for name, it in before.items() if name.split("/")[0] != "toy"
    }
