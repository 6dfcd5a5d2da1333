"""The dataset format: a folder of Arrow IPC files and the manifest that makes them valid.

    DIR/manifest.json            what the data is, and rows, bytes and SHA-256 of every shard; written last
    DIR/SPLIT/shard-NNNNN.arrow  one record batch; inputs, labels: fixed_size_list<uint8>[seq_len],
                                 puzzle_identifier, puzzle, group: int32
                                 and in some data sets rating: int64, how hard the puzzle is

An example is a row. A puzzle is a run of rows with the same `puzzle`, a group a run of puzzles with the same
`group`; both count up from 0 through the split, and a shard begins and ends with whole groups. So `puzzle_starts`
and `group_starts` are the published layout's puzzle_indices and group_indices.

What always holds: a folder with a manifest is complete (`writer` renames the finished folder into place), equal data
and recipe give equal bytes, the manifest's included, and no changed byte goes unnoticed: the manifest carries its own
digest and those of all files. Nothing here, nor in what reads, writes, fetches and verifies it, imports Ray.
"""

import hashlib
import re
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import field_validator

from hrm_ray.config.validate import Settings, validated
from hrm_ray.errors import UserError
from hrm_ray.manifest import canonical, seal, unseal

FORMAT_VERSION = 1
IDENTIFIERS, TEST_PUZZLES = (
    "identifiers.json",
    "test_puzzles.json",
)  # names of puzzle identifiers; the tasks tested
UNFINISHED = "unfinished"  # a file that marks the folder of a build
# All that a build writes; of a file that is being written, the name that it has until then.
OUR_FILES = re.compile(
    r"((manifest|identifiers|test_puzzles)\.json|[^/]+/shard-[0-9]{5,}\.arrow)((\.[0-9a-f]{8})?\.tmp)?|"
    + UNFINISHED
)
IDS = ("puzzle_identifier", "puzzle", "group")
RATING = "rating"


class File(Settings):
    """A file of the dataset; `file` is relative to its folder."""

    file: str
    bytes: int
    sha256: str

    @field_validator("file")
    @classmethod
    def _lies_inside(cls, file: str) -> str:
        """A manifest from elsewhere must not make us write into other folders."""
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ValueError(f"file {file} lies outside the dataset's folder")
        return file


class Shard(File):
    """One file of a split."""

    rows: int


class SplitInfo(Settings):
    """Counts of a split, as in the published layout, and its files in order."""

    num_examples: int
    num_puzzles: int
    num_groups: int
    mean_puzzle_examples: float
    shards: tuple[Shard, ...]


class Manifest(Settings):
    """What `manifest.json` says.

    `recipe` is the whole recipe the data was built with (empty for imported data), `source_digest` the SHA-256 of
    what it was built from, `report` what the builder counted on the way (rows skipped, duplicates dropped, ...),
    `extra_files` what lies beside the splits (`IDENTIFIERS`, `TEST_PUZZLES`).
    """

    format_version: int = FORMAT_VERSION
    task: str
    task_options: dict[str, Any]
    vocab_size: int
    seq_len: int
    pad_id: int
    ignore_label_id: int | None
    blank_identifier_id: int
    num_puzzle_identifiers: int
    seed: int | None
    recipe: dict[str, Any]
    source_digest: str
    report: dict[str, Any]
    extra_files: tuple[File, ...] = ()
    splits: dict[str, SplitInfo]

    @property
    def files(self) -> list[File]:
        """All files but the manifest."""
        return [*self.extra_files, *(shard for info in self.splits.values() for shard in info.shards)]

    @property
    def fingerprint(self) -> str:
        """SHA-256, hex, of what training sees: the data and its meaning, not where it came from."""
        about = self.model_dump(exclude={"recipe", "source_digest", "report", "seed", "extra_files"})
        return hashlib.sha256(canonical(about)).hexdigest()

    def render(self) -> bytes:
        """The bytes of manifest.json."""
        return seal(self.model_dump(mode="json"))


def parse_manifest(content: bytes, where: str, mend: str) -> Manifest:
    """The manifest in `content`, which is from `where`. Raises UserError, with what to do about it (`mend`)."""
    values = unseal(content, where, newest_format=FORMAT_VERSION, mend=mend)
    if "splits" not in values:
        raise UserError(f"{where} is not of a dataset; give a dataset folder")
    return validated(Manifest, values, where)


def schema(seq_len: int, *, is_rated: bool = False) -> pa.Schema:
    """The columns of a shard."""
    tokens = pa.list_(pa.field("item", pa.uint8(), nullable=False), seq_len)
    return pa.schema(
        [pa.field(name, tokens, nullable=False) for name in ("inputs", "labels")]
        + [pa.field(name, pa.int32(), nullable=False) for name in IDS]
        + [pa.field(RATING, pa.int64(), nullable=False)] * is_rated
    )


def to_tokens(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A fixed_size_list<uint8> column as uint8[n, seq_len], without copying if it is one chunk."""
    if isinstance(column, pa.ChunkedArray):  # combine_chunks would copy one chunk too
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    # flatten() respects the offset of a slice; .values does not.
    return column.flatten().to_numpy(zero_copy_only=True).reshape(-1, column.type.list_size)


def from_tokens(tokens: np.ndarray) -> pa.FixedSizeListArray:
    """uint8[n, seq_len] as a fixed_size_list<uint8> column; shares the memory if it is contiguous."""
    seq_len = tokens.shape[1]
    flat = pa.array(np.ascontiguousarray(tokens).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=schema(seq_len).field("inputs").type)
