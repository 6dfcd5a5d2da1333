import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs as pafs

from hrm_ray.data import fetch, files, shards
from hrm_ray.data import format as data_format
from hrm_ray.data import rows as rows_module
from hrm_ray.data import writer as writer_module
from hrm_ray.data.files import HashingFile
from hrm_ray.data.format import Manifest
from hrm_ray.data.shards import open_dataset
from hrm_ray.data.tasks.base import Symmetry
from hrm_ray.data.tasks.tokens import Tokens
from hrm_ray.data.verify import verify
from hrm_ray.data.writer import DatasetWriter, balanced_cuts
from hrm_ray.errors import UserError

VOCAB_SIZE, SEQ_LEN = 7, 5


def write(out, splits, *, rows_per_shard=4, batch=3, overwrite=False, num_identifiers=9):
    """Write splits: name -> list of groups, a group a list of puzzles, a puzzle (identifier, inputs, labels)."""
    task = Tokens(VOCAB_SIZE, SEQ_LEN)
    with DatasetWriter(out, overwrite=overwrite) as writer:
        infos = {}
        for name, groups in splits.items():
            rows = [
                (x, y, identifier, p, g)
                for p, (g, identifier, inputs, labels) in enumerate(
                    (g, *puzzle) for g, group in enumerate(groups) for puzzle in group
                )
                for x, y in zip(inputs, labels, strict=True)
            ]
            sizes = np.array([sum(len(inputs) for _, inputs, _ in group) for group in groups])
            split = writer.split(name, task, balanced_cuts(sizes, rows_per_shard))
            for start in range(0, len(rows), batch):
                x, y, identifier, p, g = map(np.array, zip(*rows[start : start + batch], strict=True))
                split.add(x, y, identifier.astype(np.int32), p, g)
            infos[name] = split.finish()
        manifest = Manifest(
            task=task.name,
            task_options=task.options,
            vocab_size=VOCAB_SIZE,
            seq_len=SEQ_LEN,
            pad_id=0,
            ignore_label_id=0,
            blank_identifier_id=0,
            num_puzzle_identifiers=num_identifiers,
            seed=0,
            recipe={"source": "here"},
            source_digest="",
            report={},
            splits=infos,
        )
        writer.finish(manifest)
    return open_dataset(out)


def random_groups(rng, num_groups, max_puzzles=3, max_examples=4):
    groups = []
    for _ in range(num_groups):
        group = []
        for _ in range(rng.integers(1, max_puzzles + 1)):
            shape = (rng.integers(1, max_examples + 1), SEQ_LEN)
            inputs, labels = (rng.integers(0, VOCAB_SIZE, shape, dtype=np.uint8) for _ in range(2))
            group.append((int(rng.integers(0, 9)), inputs, labels))
        groups.append(group)
    return groups


@pytest.fixture
def small(tmp_path):
    rng = np.random.default_rng(0)
    return write(tmp_path / "small", {"train": random_groups(rng, 6), "test": random_groups(rng, 2)})


@given(seed=st.integers(0, 1000), num_groups=st.integers(1, 12), rows_per_shard=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_any_dataset_reads_back(tmp_path_factory, seed, num_groups, rows_per_shard):
    out = tmp_path_factory.mktemp("any") / "data"
    rng = np.random.default_rng(seed)
    groups = random_groups(rng, num_groups)
    dataset = write(out, {"train": groups}, rows_per_shard=rows_per_shard, batch=int(rng.integers(1, 9)))
    assert verify(out) == []
    split = dataset.split("train")

    puzzles = [puzzle for group in groups for puzzle in group]
    inputs = np.concatenate([puzzle[1] for puzzle in puzzles])
    labels = np.concatenate([puzzle[2] for puzzle in puzzles])
    identifiers = np.repeat([puzzle[0] for puzzle in puzzles], [len(puzzle[1]) for puzzle in puzzles])
    assert (split.num_groups, split.num_puzzles, split.num_examples) == (
        num_groups,
        len(puzzles),
        len(inputs),
    )
    assert split.info.mean_puzzle_examples == len(inputs) / len(puzzles)
    assert split.puzzle_starts.tolist() == np.cumsum([0, *(len(puzzle[1]) for puzzle in puzzles)]).tolist()
    assert split.group_starts.tolist() == np.cumsum([0, *map(len, groups)]).tolist()
    assert split.puzzle_starts.dtype == split.group_starts.dtype == np.int64

    for ids in (np.arange(len(inputs)), rng.integers(0, len(inputs), 20), np.empty(0, np.int64)):
        rows = split.rows(ids)
        assert rows["inputs"].dtype == rows["labels"].dtype == np.uint8
        assert rows["puzzle_identifiers"].dtype == np.int32
        assert (rows["inputs"] == inputs[ids]).all() and (rows["labels"] == labels[ids]).all()
        assert (rows["puzzle_identifiers"] == identifiers[ids]).all()


def test_ids_outside_are_refused(small):
    for ids in ([-1], [small.split("test").num_examples]):
        with pytest.raises(IndexError):
            small.split("test").rows(np.array(ids))


def test_shards_are_plain_arrow(small):
    """Any Arrow library reads them: no extension types, one batch a file."""
    split = small.manifest.splits["train"]
    assert len(split.shards) > 2
    for shard in split.shards:
        with pa.memory_map(str(Path(small.path) / shard.file)) as source:
            reader = pa.ipc.open_file(source)
            assert reader.num_record_batches == 1
            assert [str(field.type).split("[")[0] for field in reader.schema][:2] == [
                "fixed_size_list<item: uint8 not null>"
            ] * 2
            assert reader.schema.names == ["inputs", "labels", "puzzle_identifier", "puzzle", "group"]
            assert reader.schema.metadata is None


def test_same_bytes_whatever_the_batches(tmp_path):
    groups = random_groups(np.random.default_rng(1), 8)
    for name, batch in (("a", 1), ("b", 1000)):
        write(tmp_path / name, {"train": groups}, batch=batch)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_dropped_rows_close_up(tmp_path):
    """Rows, whole puzzles and whole groups may be missing from what `add` gets; the files count without gaps."""
    with DatasetWriter(tmp_path / "data") as writer:
        split = writer.split("train", Tokens(VOCAB_SIZE, SEQ_LEN), np.array([0, 2, 4, 6]))
        tokens = np.ones((3, SEQ_LEN), np.uint8)
        split.add(tokens, tokens, np.zeros(3, np.int32), np.array([1, 4, 9]), np.array([0, 1, 5]))
        info = split.finish()
        columns = [shards.read_batch(writer.root / shard.file, SEQ_LEN) for shard in info.shards]
    assert [batch["puzzle"].to_pylist() for batch in columns] == [[0, 1], [2]]
    assert [batch["group"].to_pylist() for batch in columns] == [[0, 1], [2]]
    assert (info.num_examples, info.num_puzzles, info.num_groups) == (3, 3, 3)


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=50), rows_per_shard=st.integers(1, 60))
def test_balanced_cuts(sizes, rows_per_shard):
    cuts = balanced_cuts(np.array(sizes), rows_per_shard)
    assert cuts[0] == 0 and cuts[-1] == len(sizes) and (np.diff(cuts) > 0).all()
    for start, stop in pairwise(cuts):
        assert sum(sizes[start:stop]) < rows_per_shard + 2 * max(sizes)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_verify_finds_any_flipped_bit(tmp_path_factory, data):
    out = flipped_dataset(tmp_path_factory)
    files = sorted(file for file in out.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files))
    before = file.read_bytes()
    position = data.draw(st.integers(0, len(before) - 1))
    bit = data.draw(st.integers(0, 7))
    damaged = bytearray(before)
    damaged[position] ^= 1 << bit
    try:
        file.write_bytes(damaged)
        assert any(file.name in problem for problem in verify(out))
    finally:
        file.write_bytes(before)
    assert verify(out) == []


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_verify_finds_any_truncation(tmp_path_factory, data):
    out = flipped_dataset(tmp_path_factory)
    file = data.draw(st.sampled_from(sorted(out.rglob("*.arrow"))))
    before = file.read_bytes()
    try:
        file.write_bytes(before[: data.draw(st.integers(0, len(before) - 1))])
        assert any(file.name in problem for problem in verify(out))
        with pytest.raises(UserError, match=r"is damaged: .* bytes, not"):
            open_dataset(out)
    finally:
        file.write_bytes(before)


_FLIPPED = []


def flipped_dataset(tmp_path_factory):
    """One dataset for all examples of a property; each repairs what it damaged."""
    if not _FLIPPED:
        _FLIPPED.append(tmp_path_factory.mktemp("flipped") / "data")
        write(_FLIPPED[0], {"train": random_groups(np.random.default_rng(0), 4)})
    return _FLIPPED[0]


def test_verify_finds_missing_and_extra_files_and_rows(small, tmp_path):
    root = Path(small.path)

    def problems(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root, copy)
        change(copy)
        return verify(copy)

    first, second = (shard.file for shard in small.manifest.splits["train"].shards[:2])
    assert problems(lambda copy: None) == []
    assert f"{first} is missing" in problems(lambda copy: (copy / first).unlink())
    assert problems(lambda copy: (copy / "train/notes.txt").write_text("")) == [
        "train/notes.txt: not in the manifest"
    ]
    swapped = problems(lambda copy: (copy / first).write_bytes((copy / second).read_bytes()))
    assert any(first in problem for problem in swapped)

    def with_rows(copy, change):
        batch = shards.read_batch(copy / first, SEQ_LEN)
        table = change(pa.Table.from_batches([batch]))
        rewrite(copy / first, table.combine_chunks().to_batches()[0])
        reseal(copy)

    fewer = problems(lambda copy: with_rows(copy, lambda table: table.slice(0, len(table) - 1)))
    more = problems(lambda copy: with_rows(copy, lambda table: pa.concat_tables([table, table.slice(0, 1)])))
    assert any(f"{first}: " in p and "rows, where the manifest says" in p for p in fewer)
    assert any(f"{first}: " in p and "rows, where the manifest says" in p for p in more)


def rewrite(file, batch):
    """Not in place: the batch may lie in the file, mapped."""
    with pa.OSFile(f"{file}.new", "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    Path(f"{file}.new").replace(file)


def reseal(root):
    """Make sizes and hashes fit again: what is left to find is the content."""
    manifest = shards.read_manifest(root)
    values = manifest.model_dump()
    for info in values["splits"].values():
        for shard in info["shards"]:
            file = root / shard["file"]
            shard.update(bytes=file.stat().st_size, sha256=files.sha256(file))
    (root / "manifest.json").write_bytes(Manifest(**values).render())


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("inputs", VOCAB_SIZE, "row 1: inputs has token 7, outside the vocabulary of 7"),
        ("labels", 255, "row 1: labels has token 255, outside the vocabulary of 7"),
        ("puzzle_identifier", 9, "a puzzle identifier is outside 0..8"),
        ("puzzle", 40, "puzzle does not count up by ones"),
        ("group", 40, "group does not count up by ones"),
    ],
)
def test_verify_checks_content(small, column, value, message):
    root, name = Path(small.path), small.manifest.splits["train"].shards[0].file
    batch = shards.read_batch(root / name, SEQ_LEN)
    if column in ("inputs", "labels"):
        tokens = data_format.to_tokens(batch[column]).copy()
        tokens[1, 2] = value
        changed = data_format.from_tokens(tokens)
    else:
        values = batch[column].to_numpy().copy()
        values[1] = value
        changed = pa.array(values)
    index = batch.schema.get_field_index(column)
    batch = batch.set_column(index, batch.schema.field(column), changed)
    rewrite(root / name, batch)
    reseal(root)
    assert f"{name}: {message}" in verify(root)


def test_open_says_what_is_wrong(small, tmp_path):
    root = Path(small.path)
    shard = small.manifest.splits["train"].shards[0]

    def error(path=root):
        with pytest.raises(UserError) as raised:
            open_dataset(path)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "no dataset folder" in error(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no manifest.json: no dataset, or its build did not finish" in error(tmp_path / "empty")
    with pytest.raises(UserError, match=r"has no split 'tset'; it has: train, test"):
        small.split("tset")

    content = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(content.replace('"format_version": 1', '"format_version": 2'))
    assert "has format 2, this hrm_ray reads up to 1; upgrade hrm_ray" in error()
    (root / "manifest.json").write_text(content[:-100])
    assert "is damaged: no JSON object" in error()
    (root / "manifest.json").write_text(content)

    data = (root / shard.file).read_bytes()
    (root / shard.file).write_bytes(data[:-1])
    assert f"{shard.file} is damaged: {shard.bytes - 1} bytes, not {shard.bytes}" in error()
    (root / shard.file).unlink()
    assert f"{shard.file} is missing" in error()
    (root / shard.file).write_bytes(b"\0" * shard.bytes)  # right size, wrong content: found when read
    with pytest.raises(UserError, match="is damaged: no valid Arrow file"):
        open_dataset(root).split("train").rows(np.array([0]))


def test_fingerprint_is_of_the_data(tmp_path):
    groups = random_groups(np.random.default_rng(0), 3)
    dataset = write(tmp_path / "a", {"train": groups})
    values = dataset.manifest.model_dump()
    assert Manifest(**{**values, "recipe": {}, "seed": 5}).fingerprint == dataset.fingerprint
    assert Manifest(**{**values, "ignore_label_id": None}).fingerprint != dataset.fingerprint
    groups[0][0][1][0, 0] ^= 1
    assert write(tmp_path / "b", {"train": groups}).fingerprint != dataset.fingerprint


def test_dataset_pickles_as_its_path(small):
    copy = pickle.loads(pickle.dumps(small))
    assert copy.fingerprint == small.fingerprint
    assert (
        copy.split("train").rows(np.array([1]))["inputs"]
        == small.split("train").rows(np.array([1]))["inputs"]
    ).all()


def test_writer_leaves_nothing_behind_on_error(tmp_path):
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "data") as writer:
        writer.split("train", Tokens(VOCAB_SIZE, SEQ_LEN), np.array([0, 1]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["write", "close"])
def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch, method):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    tokens = np.ones((2, SEQ_LEN), np.uint8)
    monkeypatch.setattr(files.HashingFile, method, full)
    with pytest.raises(UserError, match=f"{tmp_path}/data.*: No space left on device; .* another out"):
        write(tmp_path / "data", {"train": [[(1, tokens, tokens)]]})
    assert list(tmp_path.iterdir()) == []


@given(
    sizes=st.lists(st.sampled_from([0, 1, 100, 4095, 4096, 10_000, (1 << 20) + 3]), max_size=6),
    is_direct=st.booleans(),
    change=st.sampled_from(["none", "a bit", "shorter", "longer"]),
)
@settings(max_examples=40, deadline=None)
def test_a_file_holds_what_is_written_and_any_change_is_seen(tmp_path_factory, sizes, is_direct, change):
    path = tmp_path_factory.mktemp("file") / "file"
    parts = [np.random.default_rng(size).bytes(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        if not is_direct:
            patch.setattr(files, "_DIRECT", 0)
        file = files.HashingFile(path)
        for part in parts:
            file.write(part)
        file.close()
        content = b"".join(parts)
        assert path.read_bytes() == content and file.size == len(content)
        assert file.hexdigest() == hashlib.sha256(content).hexdigest()
        changed = bytearray(content)
        if change == "longer":
            changed += b"x"
        elif change == "shorter":
            del changed[-1:]
        elif change == "a bit" and changed:
            changed[len(changed) // 2] ^= 1
        path.write_bytes(changed)
        read = files.ComparingFile(path)
        for part in parts:
            read.write(part)
        read.close()
    assert read.is_same == (changed == content)


def test_a_file_system_that_must_have_its_page_cache(tmp_path, monkeypatch):
    """It says so when a file is opened, or when it is written."""
    write_there, open_there = os.write, os.open

    def refuses(is_direct):
        if is_direct:
            raise OSError(errno.EINVAL, "Invalid argument")

    def write_cached(fd, data):
        refuses(fcntl.fcntl(fd, fcntl.F_GETFL) & files._DIRECT)
        return write_there(fd, data)

    def open_cached(path, flags, mode=0o777):
        refuses(flags & files._DIRECT)
        return open_there(path, flags, mode)

    for name, call in (("write", write_cached), ("open", open_cached)):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, name, call)
            file = files.HashingFile(tmp_path / name)
            file.write(b"abc")
            file.close()
        assert (tmp_path / name).read_bytes() == b"abc"


def test_a_shard_that_does_not_read_back_is_told(tmp_path, monkeypatch):
    close = files.HashingFile.close

    def damaging(self):
        close(self)
        for file in tmp_path.rglob("*.arrow"):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)

    monkeypatch.setattr(files.HashingFile, "close", damaging)
    tokens = np.ones((2, SEQ_LEN), np.uint8)
    with pytest.raises(UserError, match=r"train/shard-00000.arrow does not read back as it was written"):
        write(tmp_path / "data", {"train": [[(1, tokens, tokens)]]})
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_not_of_the_task_are_not_written(tmp_path):
    tokens = np.ones((3, SEQ_LEN), np.uint8)
    wrong = tokens.copy()
    wrong[2, 1] = VOCAB_SIZE
    with pytest.raises(
        UserError, match=r"shard-00000.arrow would be wrong, row 2: labels has token 7, outside"
    ):
        write(tmp_path / "data", {"train": [[(1, tokens, wrong)]]}, batch=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_threads", [1, 3])
def test_same_bytes_whatever_the_threads(tmp_path, monkeypatch, num_threads):
    groups = random_groups(np.random.default_rng(2), 20)
    write(tmp_path / "a", {"train": groups})
    monkeypatch.setattr(writer_module, "_NUM_THREADS", num_threads)
    write(tmp_path / "b", {"train": groups})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_writer_clears_what_a_killed_build_left(tmp_path):
    (tmp_path / "data.building" / "train").mkdir(parents=True)
    (tmp_path / "data.building" / "train" / "shard-00000.arrow").write_text("half")
    groups = random_groups(np.random.default_rng(0), 2)
    write(tmp_path / "data", {"train": groups})
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_one_writer_at_a_time(tmp_path):
    with (
        DatasetWriter(tmp_path / "data"),
        pytest.raises(UserError, match="another process is building"),
        DatasetWriter(tmp_path / "data"),
    ):
        pass


def test_what_may_be_replaced(small, tmp_path):
    groups = random_groups(np.random.default_rng(5), 2)
    with pytest.raises(
        UserError, match="already holds another dataset; give another out=, or overwrite=true"
    ):
        write(small.path, {"train": groups})
    assert write(small.path, {"train": groups}, overwrite=True).fingerprint != small.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["small"]

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is a folder with other things in it"):
        write(tmp_path / "home", {"train": groups}, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        write(tmp_path / "home" / "thesis.tex", {"train": groups}, overwrite=True)
    with pytest.raises(UserError, match="written in a local folder"):
        DatasetWriter("s3://bucket/data")


# Remote


@pytest.fixture
def remote(small, tmp_path, monkeypatch):
    """`small` behind a filesystem that is not local, and what was read from it."""
    monkeypatch.setenv("HRM_RAY_CACHE", str(tmp_path / "cache"))
    opened = tmp_path / "opened.txt"

    class Counting(pafs.FileSystemHandler):  # only what reading needs
        def open_input_stream(self, path):
            with opened.open("a") as log:
                log.write(f"{path}\n")
            return pa.OSFile(str(tmp_path / path))

    methods = set(pafs.FileSystemHandler.__abstractmethods__) - {"open_input_stream"}
    handler = type("Handler", (Counting,), {name: lambda self, *args: None for name in methods})()
    monkeypatch.setattr(
        fetch, "filesystem_of", lambda uri, what: (pafs.PyFileSystem(handler), uri.split("://")[1])
    )
    return opened


def test_remote_dataset_is_cached_once(small, remote, tmp_path):
    dataset = open_dataset("mem://small")
    assert dataset.fingerprint == small.fingerprint
    assert dataset.root.is_relative_to(tmp_path / "cache")
    assert verify("mem://small") == []
    open_dataset("mem://small")
    reads = remote.read_text().splitlines()
    assert all(reads.count(f"small/{entry.file}") == 1 for entry in small.manifest.files)


def test_processes_race_for_the_cache(small, remote, tmp_path):
    (tmp_path / "cache" / "datasets").mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        prints = pool.map(_fingerprint, ["mem://small"] * 8)
    assert set(prints) == {small.fingerprint}
    reads = remote.read_text().splitlines()
    assert all(reads.count(f"small/{entry.file}") == 1 for entry in small.manifest.files)


def _fingerprint(uri):
    return open_dataset(uri).fingerprint


def test_damaged_remote_is_refused(small, remote, tmp_path):
    shard = Path(small.path) / small.manifest.splits["train"].shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(
        UserError, match=r"mem://small: .* is damaged: its SHA-256 is not the manifest's; copy"
    ):
        open_dataset("mem://small")
    assert not [path for path in (tmp_path / "cache" / "datasets").iterdir() if path.suffix == ""]
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        open_dataset("mem://elsewhere")


def entries(tmp_path) -> set[str]:
    """Fingerprints of the datasets in the cache."""
    folders = [path for path in (tmp_path / "cache/datasets").iterdir() if path.is_dir()]
    return {open_dataset(folder).fingerprint for folder in folders}


def test_the_cache_is_bounded_and_the_longest_unused_goes(small, remote, tmp_path, monkeypatch):
    others = [
        write(tmp_path / name, {"train": random_groups(np.random.default_rng(i), 3)})
        for i, name in enumerate("ab")
    ]
    monkeypatch.setattr(fetch, "_used", {})
    small_root = open_dataset("mem://small").root
    first = open_dataset("mem://a").root
    os.utime(fetch._use_of(small_root), (1, 1))  # used long ago
    total = sum(entry.bytes for set_ in (small, *others) for entry in set_.manifest.files)
    monkeypatch.setenv("HRM_RAY_CACHE_GB", str((total - 1) / 1e9))
    with pytest.raises(UserError, match=r"would take .* GB, more than HRM_RAY_CACHE_GB=.*; raise it"):
        open_dataset("mem://b")  # this process uses the two others
    fetch._used.clear()  # as if it had ended
    opened = open_dataset("mem://b").root
    assert entries(tmp_path) == {other.fingerprint for other in others}
    assert first.is_dir() and opened.is_dir() and not small_root.exists()
    assert open_dataset("mem://b").root == opened


def test_a_cache_without_a_sensible_bound(small, remote, monkeypatch):
    for wrong in ("much", "-1", "0", "nan"):
        monkeypatch.setenv("HRM_RAY_CACHE_GB", wrong)
        with pytest.raises(UserError, match=f"HRM_RAY_CACHE_GB={wrong} is no number of GB above 0"):
            open_dataset("mem://small")


def test_file_uri_is_read_in_place(small):
    assert open_dataset(f"file://{small.path}").root == Path(small.path)


def test_unknown_scheme():
    with pytest.raises(UserError, match="cannot read dataset nowhere://x"):
        open_dataset("nowhere://x")


def test_manifest_is_json(small):
    values = json.loads((Path(small.path) / "manifest.json").read_text())
    assert values["splits"]["train"]["num_groups"] == 6


def test_parts_that_are_not_put_in_their_place_are_an_error(tmp_path):
    """As where pyarrow copied a column before writing it: what is read back would be the same wrong bytes."""
    batch = pa.record_batch([pa.array([1, 2], pa.int32())], names=["a"])
    with pytest.raises(UserError, match="copies columns before it writes them"):
        writer_module._put(batch, {1: [np.zeros(1, np.uint8)]}, HashingFile(tmp_path / "shard.arrow"))


FOUR = np.arange(4)


@pytest.mark.parametrize(
    "symmetry, problem",
    [
        (Symmetry(np.array([0, 1, 2, 4]), FOUR), r"a symmetry's cells are no permutation of 0\.\.3"),
        (Symmetry(np.arange(3), FOUR), r"a symmetry's cells are no permutation of 0\.\.3"),
        (Symmetry(FOUR, np.array([0, 1, 1, 3])), r"a symmetry's tokens are no permutation of 0\.\.3"),
        (Symmetry(FOUR, np.arange(3)), r"a puzzle has the token 3, the task has 0\.\.2"),
    ],
)
def test_what_is_no_symmetry_is_refused(symmetry, problem):
    """Compiled code would read what lies beside it."""
    tokens = np.array([[0, 1, 2, 3]], np.uint8)
    with pytest.raises(UserError, match=problem):
        rows_module._copy([symmetry], tokens, tokens, np.zeros(1, np.int64))
