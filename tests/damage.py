"""A folder of files with a manifest, damaged in one of many ways: for tests that no damage goes unnoticed."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from hrm_ray.errors import UserError

MANIFEST = "manifest.json"


def assert_every_damage_is_refused(folder: Path, use: Callable[[], object], seeds: range) -> None:
    """`use()` works on the whole folder, and raises a UserError of one line on each damaged one."""
    use()
    unnoticed = []
    for seed in seeds:
        with damaged(folder, seed) as what:
            try:
                use()
                unnoticed.append(f"seed {seed}, {what}: used")
            except UserError as error:
                if len(str(error).splitlines()) != 1 or not str(error).strip():
                    unnoticed.append(f"seed {seed}, {what}: not one line: {error}")
            except Exception as error:
                unnoticed.append(f"seed {seed}, {what}: {error!r}")
    assert not unnoticed, f"{len(unnoticed)} of {len(seeds)}:\n" + "\n".join(unnoticed[:20])
    use()


@contextmanager
def damaged(folder: Path, seed: int) -> Iterator[str]:
    """Inside, one thing is wrong with `folder`; gives what. The kinds take turns, all else is drawn by `seed`."""
    before = _contents(folder)
    kinds = [*OF_FILES, *OF_MANIFEST]
    kind = kinds[seed % len(kinds)]
    rng = Random(seed)
    try:
        while _contents(folder) == before:  # two files may be equal, a value may be drawn again
            subject = kind(folder, rng)
        yield f"{kind.__name__} {subject}"
    finally:
        for file, content in before.items():
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _any_file(folder: Path, rng: Random) -> tuple[Path, bytes]:
    """The manifest more often than any other: its bytes mean more."""
    files = list(_contents(folder))
    file = folder / MANIFEST if rng.random() < 0.3 else rng.choice(files)
    return file, file.read_bytes()


# Of any file


def flip_a_bit(folder: Path, rng: Random) -> str:
    file, content = _any_file(folder, rng)
    changed = bytearray(content)
    position = rng.randrange(len(content))
    changed[position] ^= 1 << rng.randrange(8)
    file.write_bytes(changed)
    return f"of byte {position} of {file.name}"


def flip_bits(folder: Path, rng: Random) -> str:
    file, content = _any_file(folder, rng)
    changed = bytearray(content)
    for _ in range(rng.randint(2, 50)):
        changed[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    file.write_bytes(changed)
    return f"all over {file.name}"


def clear_a_block(folder: Path, rng: Random) -> str:
    file, content = _any_file(folder, rng)
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.randint(1, 4096))
    file.write_bytes(content[:start] + bytes(stop - start) + content[stop:])
    return f"{start}..{stop} of {file.name}"


def truncate(folder: Path, rng: Random) -> str:
    file, content = _any_file(folder, rng)
    length = rng.choice([len(content) - 1, len(content) // 2, rng.randrange(len(content))])
    file.write_bytes(content[:length])
    return f"{file.name} to {length} of {len(content)} bytes"


def extend(folder: Path, rng: Random) -> str:
    file, content = _any_file(folder, rng)
    more = rng.choice([b"\0", b"\n", b" ", b"}", rng.randbytes(100), content])
    file.write_bytes(content + more)
    return f"{file.name} by {len(more)} bytes"


def empty(folder: Path, rng: Random) -> str:
    file, _ = _any_file(folder, rng)
    file.write_bytes(b"")
    return file.name


def remove(folder: Path, rng: Random) -> str:
    file, _ = _any_file(folder, rng)
    file.unlink()
    return file.name


def swap(folder: Path, rng: Random) -> str:
    contents = _contents(folder)
    first, second = rng.sample(list(contents), 2)
    first.write_bytes(contents[second])
    second.write_bytes(contents[first])
    return f"{first.name} and {second.name}"


def replace_by_another(folder: Path, rng: Random) -> str:
    contents = _contents(folder)
    first, second = rng.sample(list(contents), 2)
    first.write_bytes(contents[second])
    return f"{first.name} by {second.name}"


# Of the manifest, as an editor or a careless program would


def _edit(folder: Path, rng: Random, change: Callable[[Any, Any], str]) -> str:
    """`change(container, key)` changes one entry anywhere in the manifest, its digest included."""
    values = json.loads((folder / MANIFEST).read_bytes())
    container, key = rng.choice(list(_entries(values)))
    said = change(container, key)
    (folder / MANIFEST).write_text(json.dumps(values, indent=2) + "\n")
    return said


def _entries(values: Any) -> Iterator[tuple[Any, Any]]:
    keys = values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    for key in list(keys):
        yield values, key
        yield from _entries(values[key])


def change_a_value(folder: Path, rng: Random) -> str:
    """By a value of the same type."""

    def change(container: Any, key: Any) -> str:
        value = container[key]
        if isinstance(value, bool) or value is None:
            container[key] = not value
        elif isinstance(value, int | float):
            container[key] = value + rng.choice([-1, 1, -value - 1, 1000])
        elif isinstance(value, str):
            container[key] = value[::-1] + "x"
        elif isinstance(value, dict):
            container[key] = {**value, "more": 1}
        else:
            container[key] = [*value, *value[:1], 1]
        return f"{key}: {value!r:.30} -> {container[key]!r:.30}"

    return _edit(folder, rng, change)


def change_a_type(folder: Path, rng: Random) -> str:
    def change(container: Any, key: Any) -> str:
        others = [None, True, 0, -1.5, "", "1", [], [[]], {}, {"a": {}}]
        container[key] = rng.choice([o for o in others if type(o) is not type(container[key])])
        return f"{key} -> {container[key]!r}"

    return _edit(folder, rng, change)


def remove_a_field(folder: Path, rng: Random) -> str:
    def change(container: Any, key: Any) -> str:
        del container[key]
        return str(key)

    return _edit(folder, rng, change)


def rename_a_field(folder: Path, rng: Random) -> str:
    def change(container: Any, key: Any) -> str:
        if isinstance(container, dict):
            container[f"{key}_"] = container.pop(key)
        return str(key)

    return _edit(folder, rng, change)


def write_a_huge_number(folder: Path, rng: Random) -> str:
    numbers = ["1e400", "-1e400", "NaN", "Infinity", "9" * 30, "-" + "9" * 300, "9" * 5000, "1e-400"]

    def change(container: Any, key: Any) -> str:
        container[key] = "NUMBER"
        return str(key)

    key = _edit(folder, rng, change)
    file, number = folder / MANIFEST, rng.choice(numbers)
    file.write_text(file.read_text().replace('"NUMBER"', number))
    return f"{key} -> {number:.10}"


def write_another_version(folder: Path, rng: Random) -> str:
    values = json.loads((folder / MANIFEST).read_bytes())
    versions = [0, -1, 2, 3, 10**30, 1.5, "1", "2", "", None, True, [], {}]
    values["format_version"] = rng.choice([v for v in versions if v is not values["format_version"]])
    (folder / MANIFEST).write_text(json.dumps(values, indent=2) + "\n")
    return repr(values["format_version"])


def write_nonsense(folder: Path, rng: Random) -> str:
    nonsense = [b"null", b"[]", b"{}", b'""', b"1", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}"]
    nonsense += [b'{"format_version": 1}', b'{"digest": "x"}', b'{"format_version": 1, "digest": null}']
    nonsense += [rng.randbytes(rng.randint(1, 1000)), b"\xef\xbb\xbf" + (folder / MANIFEST).read_bytes()]
    content = rng.choice(nonsense)
    (folder / MANIFEST).write_bytes(content)
    return f"{content[:30]!r}"


def reformat(folder: Path, rng: Random) -> str:
    """The same values in other bytes, which this project never writes."""
    values = json.loads((folder / MANIFEST).read_bytes())
    style = rng.choice([{"indent": 4}, {"indent": None}, {"indent": 2, "sort_keys": True}])
    (folder / MANIFEST).write_text(json.dumps(values, **style))
    return str(style)


OF_FILES = (
    *(flip_a_bit, flip_a_bit, flip_bits, clear_a_block, truncate, extend, empty, remove, swap),
    replace_by_another,
)
OF_MANIFEST = (
    *(change_a_value, change_a_type, remove_a_field, rename_a_field, write_a_huge_number),
    *(write_another_version, write_nonsense, reformat),
)
