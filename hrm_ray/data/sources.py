"""Where raw puzzles come from: the published CSV layout, plain text, a Hugging Face dataset.

A source has a train part and perhaps a test part, each one file. Files are read in chunks, in bounded memory,
and every row passes the checks that need no search (shape, digits, clues, answer); whether a question has one
solution is for the pipeline. A row that fails is a `BadRows` matter: stop, or skip, count and list.
"""

import csv
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from hrm_ray.data.tasks.sudoku import Sudoku
from hrm_ray.errors import UserError
from hrm_ray.published import dataset_hint

PARTS = ("train", "test")
KINDS = (".csv", ".txt")  # a folder's train and test files, in order of preference

_LINES_PER_CHUNK = 65_536
_CSV_BLOCK_BYTES = 1 << 22
_MAX_LISTED = 20


@dataclass(frozen=True)
class Rows:
    """Puzzles of one source part, in file order.

    Attributes:
        questions: uint8[n, S] tokens.
        answers: uint8[n, S] tokens, zeros where the source gives none.
        ratings: int64[n], -1 where the source gives none.
        numbers: int64[n], the row's number in its file (see `BadRows`).
    """

    questions: np.ndarray
    answers: np.ndarray
    ratings: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: np.ndarray) -> "Rows":
        """The rows of a mask or of row indices."""
        return Rows(*(getattr(self, f.name)[rows] for f in fields(self)))

    @staticmethod
    def concat(chunks: list["Rows"], seq_len: int) -> "Rows":
        """All chunks as one; `seq_len` shapes the result when there are none."""
        none = np.empty((0, seq_len), np.uint8)
        chunks = chunks or [Rows(none, none, np.empty(0, np.int64), np.empty(0, np.int64))]
        return Rows(*(np.concatenate([getattr(c, f.name) for c in chunks]) for f in fields(Rows)))


@dataclass
class BadRows:
    """What to do about rows that cannot be used: raise at the first (`skip=False`), or count and list them."""

    skip: bool
    count: int = 0
    _listed: list[tuple[Path, int, str]] = field(default_factory=list)

    @property
    def wants_reasons(self) -> bool:
        """Whether another reason would still be listed; if not, `add` may be given any."""
        return len(self._listed) < _MAX_LISTED

    def add(self, file: Path, number: int, reason: str) -> None:
        """Row `number` of `file` is bad: for CSV the data row, from 0; for text the line, from 1.

        Raises:
            UserError: unless rows are to be skipped.
        """
        if not self.skip:
            self.add_line(file, _lines(file, {number})[number], reason)
        self.count += 1
        if self.wants_reasons:
            self._listed.append((file, number, reason))

    def add_line(self, file: Path, line: int, reason: str) -> None:
        """A line of `file`, from 1, is no row at all. Raises as `add` does."""
        if not self.skip:
            raise UserError(f"{file}, line {line}: {reason}; mend it, or pass on_bad=skip to leave it out")
        self.count += 1
        if self.wants_reasons:
            self._listed.append((file, -line, reason))  # negative: a line already, no row number

    def listed(self) -> list[str]:
        """The first bad rows, one line each."""
        lines = {
            file: _lines(file, {n for f, n, _ in self._listed if f == file}) for file, _, _ in self._listed
        }
        return [f"{file.name}, line {lines[file][number]}: {reason}" for file, number, reason in self._listed]


def _lines(file: Path, numbers: set[int]) -> dict[int, int]:
    """The line in `file` of each row number. Scans the file: counting lines always would cost every good build."""
    lines = {number: abs(number) for number in numbers if number < 0 or file.suffix != ".csv"}
    wanted = numbers - set(lines)
    if wanted:
        full_rows = (line for line, _, num_missing in _csv_rows(file) if num_missing == 0)
        for number, line in enumerate(islice(full_rows, max(wanted) + 1)):
            if number in wanted:
                lines[number] = line
    return lines


def _csv_rows(file: Path) -> Iterator[tuple[int, list[str], int]]:
    """(line, fields, how many fields it lacks) of every row under the header; blank lines are none."""
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as text:
        reader = csv.reader(text)
        width = len(next(reader))
        yield from ((reader.line_num, row, width - len(row)) for row in reader if row)


@dataclass(frozen=True)
class Source:
    """The files of a source; `parts` has "train" and perhaps "test"."""

    parts: dict[str, Path]

    def digest(self) -> str:
        """SHA-256, hex, of what the files hold."""
        total = hashlib.sha256()
        for part, file in self.parts.items():
            with file.open("rb") as content:
                total.update(
                    f"{part}{file.suffix}:{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode()
                )
        return total.hexdigest()

    def read(self, part: str, task: Sudoku, bad: BadRows, *, ratings: bool) -> Iterator[Rows]:
        """The good rows of a part, chunk by chunk.

        Args:
            ratings: the rows must have the file's rating.

        Raises:
            UserError: an empty file, a missing column, a file that is no CSV, a bad row (see BadRows).
        """
        file = self.parts[part]
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty")
        read = _read_csv if file.suffix == ".csv" else _read_text
        empty = True
        for chunk in read(file, task, bad, ratings):
            empty = False
            yield chunk
        if empty and not bad.count:
            raise UserError(f"{file} holds no puzzles")


def open_source(source: str) -> Source:
    """Find what `source` names: a file, a folder with train (and test) files, or a Hugging Face dataset id.

    Raises:
        UserError: it is none of these, or cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return Source({"train": path})
    if path.is_dir():
        if hint := dataset_hint(path):
            raise UserError(f"source={hint}")
        return _folder(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and path.suffix not in KINDS:
        return _folder(_download(source))
    raise UserError(f"source={source}: no such file or folder, and no Hugging Face dataset id (owner/name)")


def _folder(folder: Path) -> Source:
    parts = {}
    for part in PARTS:
        there = [folder / f"{part}{kind}" for kind in KINDS if (folder / f"{part}{kind}").is_file()]
        if there:
            parts[part] = there[0]
    if "train" not in parts:
        raise UserError(f"source={folder}: the folder has no train.csv or train.txt")
    return Source(parts)


def _download(repo_id: str) -> Path:
    import huggingface_hub  # a second to import

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, repo_type="dataset", allow_patterns=["*.csv"]))
    except Exception as error:  # the hub, its HTTP client and the network raise some twenty unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"source={repo_id}: no such file or folder here, and not to be had as a dataset from Hugging Face "
            f"({type(error).__name__}: {reason}); check the path, or the id and the network"
        ) from None


def _read_csv(file: Path, task: Sudoku, bad: BadRows, ratings: bool) -> Iterator[Rows]:
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as text:
        header = next(csv.reader(text), [])
    columns = ["question", *(name for name in ("answer", "rating") if name in header)]
    if "question" not in header:
        raise UserError(
            f"{file} has no column 'question' (it has: {', '.join(header)}); "
            "its first line must name the columns question, answer and, if given, source and rating"
        )
    if ratings and "rating" not in header:
        raise UserError(
            f"{file} has no column 'rating', which min_difficulty needs; pass rate=true to compute it"
        )

    num_ragged = 0

    def on_ragged(_: pa.csv.InvalidRow) -> str:
        nonlocal num_ragged
        num_ragged += 1
        return "skip" if bad.skip else "error"

    next_number = 0
    try:
        batches = pa.csv.open_csv(
            file,
            read_options=pa.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES),
            parse_options=pa.csv.ParseOptions(invalid_row_handler=on_ragged),
            convert_options=pa.csv.ConvertOptions(
                column_types={name: pa.string() for name in columns}, include_columns=columns
            ),
        )
        for batch in batches:
            if batch.num_rows:
                yield _checked(
                    file, task, bad, ratings, batch, np.arange(next_number, next_number + len(batch))
                )
            next_number += batch.num_rows
    except pa.ArrowException as error:
        if not num_ragged:
            raise UserError(f"{file} is no readable CSV: {str(error).splitlines()[0]}") from None
    if num_ragged:
        for line, row, num_missing in _csv_rows(file):
            if num_missing:
                reason = f"{len(row)} columns instead of {len(row) + num_missing} ('{','.join(row)[:100]}')"
                bad.add_line(file, line, reason)


def _read_text(file: Path, task: Sudoku, bad: BadRows, ratings: bool) -> Iterator[Rows]:
    if ratings:
        raise UserError(
            f"{file} gives no ratings, which min_difficulty needs; pass rate=true to compute them"
        )
    with file.open(encoding="utf-8", errors="replace") as text:
        puzzles = ((n, line.partition("#")[0].strip()) for n, line in enumerate(text, start=1))
        puzzles = ((n, line) for n, line in puzzles if line)
        while chunk := list(islice(puzzles, _LINES_PER_CHUNK)):
            numbers, lines = zip(*chunk, strict=True)
            yield _checked(file, task, bad, False, pa.record_batch({"question": lines}), np.array(numbers))


def _checked(
    file: Path, task: Sudoku, bad: BadRows, ratings: bool, batch: pa.RecordBatch, numbers: np.ndarray
) -> Rows:
    """Tokens of the rows that pass every check that needs no search; the others go to `bad`."""
    n = batch.num_rows
    question_text = pc.utf8_trim_whitespace(batch["question"])
    questions, good = _encode(question_text, task)
    good &= ~task.contradicts(questions)
    answers = np.zeros_like(questions)
    answer_text = pa.nulls(n, pa.string())
    if "answer" in batch.schema.names:
        answer_text = pc.utf8_trim_whitespace(batch["answer"])
        answers, complete = _encode(answer_text, task)
        missing = pc.equal(pc.fill_null(answer_text, ""), "").to_numpy(zero_copy_only=False)
        good &= missing | (complete & task.is_solution(questions, answers))
    values = np.full(n, -1, np.int64)
    if ratings:
        rating_text = pc.utf8_trim_whitespace(pc.fill_null(batch["rating"], ""))
        rated = pc.match_substring_regex(rating_text, r"^\d{1,18}$").to_numpy(zero_copy_only=False)
        values[rated] = pc.cast(rating_text.filter(pa.array(rated)), pa.int64()).to_numpy()
        good &= rated
    for i in np.flatnonzero(~good):
        reason = ""
        if bad.wants_reasons:
            problem = task.problem(question_text[i].as_py() or "", answer_text[i].as_py())
            reason = problem or f"rating '{rating_text[i]}' is no whole number"
        bad.add(file, int(numbers[i]), reason)
    return Rows(questions, answers, values, numbers).take(good)


def _encode(column: pa.Array, task: Sudoku) -> tuple[np.ndarray, np.ndarray]:
    """Tokens uint8[n, S] of a string column, and bool[n]: right length and no impossible character.

    A row of wrong length is all zeros.
    """
    length = pc.fill_null(pc.binary_length(column), -1).to_numpy(zero_copy_only=False)
    fits = length == task.seq_len
    texts = column.filter(pa.array(fits))
    ends = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    tokens = np.zeros((len(column), task.seq_len), np.uint8)
    if len(texts):
        codes = np.frombuffer(texts.buffers()[2], np.uint8)[ends[0] : ends[-1]]
        tokens[fits] = task.encode(codes.reshape(-1, task.seq_len))
    return tokens, (tokens != 0).all(axis=1)
