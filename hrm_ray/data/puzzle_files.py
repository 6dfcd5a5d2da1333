"""The rows of a puzzle file, whatever its layout: a table (CSV, JSON, Parquet), one puzzle a line, grids.

Files are read in chunks, in bounded memory (except JSON that is one value, and encodings other than UTF-8). A CSV file
with a header, as the published ones are, goes through Arrow's reader, which is some ten times as fast as going through
its lines.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv

from hrm_ray.data.containers import HEAD_BYTES, encoding_of, open_text, open_unpacked, open_utf8, reading
from hrm_ray.data.layout import Cells, Columns, Found, choose_columns, find_puzzles
from hrm_ray.data.tasks.base import Task
from hrm_ray.errors import UserError, first_line, shown

_ROWS_PER_CHUNK = 65_536
_CSV_BLOCK_BYTES = 1 << 22
_ROWS_LOOKED_AT = 100
_LONGEST_LINE = 1 << 20
_SEPARATORS = ",;\t|"
_TABLES = ".csv", ".tsv"  # files that surely are some


@dataclass(frozen=True)
class Chunk:
    """Rows of a file as they are written, unchecked.

    Attributes:
        questions, answers, ratings: string columns; None where the file has none.
        numbers: int64[n], of the rows (see `sources.Rows`).
        misfits: places of the file that are no row, and what is wrong there.
    """

    questions: pa.Array
    answers: pa.Array | None
    ratings: pa.Array | None
    numbers: np.ndarray
    misfits: Sequence[tuple[int, str]] = ()


class _Table(Protocol):
    """A file of named columns."""

    @property
    def names(self) -> list[str]:
        """Of the columns."""

    @property
    def rows(self) -> list[list[str | None]]:
        """The first ones, as text."""

    @property
    def unit(self) -> str:
        """What a place is: "line" or "entry"."""

    def chunks(self, columns: Columns, skips: bool) -> Iterator[Chunk]:
        """The rows; `skips`: go on behind a misfit."""

    def places(self, numbers: set[int]) -> dict[int, int]:
        """The places of rows, by their numbers."""


class PuzzleFile:
    """A file of puzzles of a task.

    Args:
        path: the file; it may lead into a zip file.
        task: says how its puzzles are written.

    Raises:
        UserError: it is empty, damaged, no text and no other kind that is known, or has no column that surely holds
            the puzzles.
    """

    def __init__(self, path: Path, task: Task):
        self.path, self.task = path, task
        with reading(path):
            with open_unpacked(path) as stream:
                self._head = stream.read(HEAD_BYTES)
            if not self._head:
                raise UserError(f"{path} is empty")
            self._encoding = "" if self._head.startswith(_Parquet.MAGIC) else encoding_of(path, self._head)
            table = self._find_table()
            self._columns = self._choose(table) if table else None
            self._table = table if self._columns else None
            self._misread = table if isinstance(table, _Csv) and not self._columns else None

    @property
    def unit(self) -> str:
        """What a place is: "line" or "entry"."""
        return self._table.unit if self._table else "line"

    @property
    def has_ratings(self) -> bool:
        """Whether its puzzles have ratings."""
        return self._columns is not None and self._columns.rating is not None

    def chunks(self, *, skips: bool) -> Iterator[Chunk]:
        """The rows.

        Args:
            skips: go on behind a misfit; else nothing need follow the first.

        Raises:
            UserError: it is damaged.
        """
        with reading(self.path):
            if self._table and self._columns:
                yield from self._table.chunks(self._columns, skips)
            else:
                yield from self._text_chunks()

    def places(self, numbers: set[int]) -> dict[int, int]:
        """Where in the file rows are, by their numbers: the line or entry, from 1."""
        return (
            self._table.places(numbers) if self._table and numbers else {number: number for number in numbers}
        )

    def questions(self) -> Iterator[tuple[int, str]]:
        """Place and text of every puzzle. Raises UserError where there is something else."""
        for chunk in self.chunks(skips=False):
            for place, problem in chunk.misfits:
                raise UserError(f"{self.path}:{place}: {problem}")
            places = self.places(set(chunk.numbers.tolist()))
            for number, text in zip(chunk.numbers.tolist(), chunk.questions.to_pylist(), strict=True):
                yield places[number], text or ""

    # Tables

    def _find_table(self) -> _Table | None:
        if not self._encoding:
            return _Parquet(self.path)
        head = self._head.decode(self._encoding, errors="replace").removeprefix("\ufeff")
        table: _Table | None = None
        if head.lstrip().startswith(("{", "[")):
            table = _json_table(self.path, self._encoding, head, self.reads)
        return table or _csv_table(self.path, self._encoding, self._first_lines(head), self.reads)

    def _first_lines(self, head: str) -> list[str]:
        lines = io.StringIO(head, newline=None).readlines()
        return (
            lines[:-1] if len(self._head) == HEAD_BYTES and len(lines) > 1 else lines
        )  # the last is cut somewhere

    def _choose(self, table: _Table) -> Columns | None:
        columns = choose_columns(str(self.path), table.names, table.rows, self.reads, self._is_complete)
        if columns is None and table.names and not self._may_be_text(table):
            names = ", ".join(shown(name, 40) for name in table.names[:20])
            raise UserError(
                f"{self.path} has no column 'question' (it has: {names}), and none that holds puzzles of "
                f"{self.task.seq_len} cells; name one 'question', and one 'answer' if answers are given"
            )
        return columns

    def _may_be_text(self, table: _Table) -> bool:
        """Whether a table without a column of puzzles may be none: a heading with a comma, one column a cell."""
        if not isinstance(table, _Csv) or not self.path.name.lower().removesuffix(".gz").endswith(_TABLES):
            return isinstance(table, _Csv)
        cells, lines = self.task.cells, self._first_lines(self._head.decode(self._encoding, errors="replace"))
        return cells is not None and any(
            cells.plain(found.question) for found in find_puzzles(lines, cells) if not found.problem
        )

    def reads(self, text: str) -> str | None:
        """The puzzle that `text` is; None if it is none."""
        if self.task.cells:
            return self.task.cells.whole(text)
        try:
            self.task.parse(text)
        except UserError:
            return None
        return text

    def _is_complete(self, puzzle: str) -> bool:
        return self.task.cells is None or self.task.cells.is_complete(puzzle)

    # Text

    def _without_header(self, lines: Iterator[str], cells: Cells) -> Iterator[str]:
        """The lines; the header of a table with a column for each cell is left empty."""
        table, header = self._misread, None
        if table and len(table.names) in (cells.size, 2 * cells.size) and min(map(len, table.names)) > 1:
            header = table.num_before
        return ("\n" if number == header else line for number, line in enumerate(lines))

    def _lines(self) -> Iterator[str]:
        with open_text(self.path, self._encoding) as text:
            for number, line in enumerate(iter(lambda: text.readline(_LONGEST_LINE), ""), start=1):
                if len(line) == _LONGEST_LINE:
                    raise UserError(
                        f"{self.path}, line {number} is longer than a puzzle can be; is it another kind of file?"
                    )
                yield line

    def _text_chunks(self) -> Iterator[Chunk]:
        cells, lines = self.task.cells, self._lines()
        if cells:
            found = find_puzzles(self._without_header(lines, cells), cells)
        else:
            found = _drawings(lines, self.task) if self.task.keeps_spaces else _every_line(lines)
        while some := list(islice(found, _ROWS_PER_CHUNK)):
            yield _chunk_of(some)


def _every_line(lines: Iterable[str]) -> Iterator[Found]:
    for number, line in enumerate(lines, start=1):
        if text := line.partition("#")[0].strip():
            yield Found(number, text)


def _drawings(lines: Iterable[str], task: Task) -> Iterator[Found]:
    """Puzzles whose every character counts: of all their cells in one line, or in several up to an empty one."""
    size, separator = task.seq_len, task.separator
    first, rows = 0, list[str]()
    for number, line in enumerate(chain(lines, [""]), start=1):
        row = line.rstrip("\r\n")
        if row and not rows:
            first = number
        if row:
            rows.append(row)
        is_whole = len(row) >= size or (len(rows) == 1 and separator is not None and separator in row)
        if rows and (not row or is_whole or sum(map(len, rows)) >= size):
            yield Found(first, "\n".join(rows))
            rows = []


def _chunk_of(found: list[Found]) -> Chunk:
    good = [one for one in found if not one.problem]
    return Chunk(
        pa.array([one.question for one in good], pa.string()),
        pa.array([one.answer for one in good], pa.string()),
        None,
        np.array([one.line for one in good], np.int64),
        [(one.line, one.problem) for one in found if one.problem],
    )


# CSV


def _csv_table(path: Path, encoding: str, lines: list[str], reads: Callable[[str], object]) -> "_Csv | None":
    """The table that the first lines begin, if they begin one with a header."""
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), None)
    if first is None:
        return None
    found = None
    for separator in _SEPARATORS:
        try:
            rows = list(islice(csv.reader(lines[first:], delimiter=separator), _ROWS_LOOKED_AT + 1))
        except csv.Error:  # a NUL, or a field of 128 kB
            continue
        names, rows = rows[0], [row for row in rows[1:] if row]
        table = _Csv(path, encoding, separator, first, names, [list(row) for row in rows])
        if "question" in (name.strip().lower() for name in names):
            return table
        if len(names) < 2 or any(reads(name) for name in names):
            continue
        whole = [row for row in rows if len(row) == len(names)]
        has_puzzles = any(reads(cell) for row in whole for cell in row)
        if 2 * len(whole) >= len(rows) and (has_puzzles or (rows and found is None)):
            found = table
        if has_puzzles:
            break
    return found


@dataclass(frozen=True)
class _Csv:
    path: Path
    encoding: str
    separator: str
    num_before: int  # lines before the header
    names: list[str]
    rows: list[list[str | None]]
    unit = "line"

    @cached_property
    def _has_newlines(self) -> bool:
        """Whether fields in quotes go over several lines."""
        return any("\n" in (cell or "") for row in self.rows if len(row) == len(self.names) for cell in row)

    def chunks(self, columns: Columns, skips: bool) -> Iterator[Chunk]:
        num_ragged = 0

        def on_ragged(_: pa.csv.InvalidRow) -> str:
            nonlocal num_ragged
            num_ragged += 1
            return "skip" if skips else "error"

        numbered = [str(i) for i in range(len(self.names))]  # names may be there twice
        wanted = [str(i) for i in dict.fromkeys(columns) if i is not None]
        next_number = 0
        try:
            with open_utf8(self.path, self.encoding) as content:
                batches = pa.csv.open_csv(
                    content,
                    read_options=pa.csv.ReadOptions(
                        block_size=_CSV_BLOCK_BYTES, column_names=numbered, skip_rows=self.num_before + 1
                    ),
                    parse_options=pa.csv.ParseOptions(
                        delimiter=self.separator,
                        invalid_row_handler=on_ragged,
                        newlines_in_values=self._has_newlines,
                    ),
                    convert_options=pa.csv.ConvertOptions(
                        column_types={name: pa.string() for name in wanted}, include_columns=wanted
                    ),
                )
                for batch in batches:
                    if batch.num_rows:
                        texts = [None if i is None else batch[str(i)] for i in columns]
                        numbers = np.arange(next_number, next_number + batch.num_rows)
                        yield Chunk(texts[0], texts[1], texts[2], numbers)
                    next_number += batch.num_rows
        except pa.ArrowException as error:
            if not num_ragged and "Empty CSV file" not in str(error):
                raise UserError(f"{self.path} is no readable CSV: {shown(first_line(error), 200)}") from None
        if num_ragged:
            nothing = pa.array([], pa.string())
            for line, row in self._lines():
                if len(row) != len(self.names):
                    text = shown(self.separator.join(row))
                    problem = f"{len(row)} columns instead of {len(self.names)} ('{text}')"
                    yield Chunk(nothing, None, None, np.empty(0, np.int64), [(line, problem)])

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """(line, fields) of every row under the header; empty lines are none."""
        with open_text(self.path, self.encoding) as text:
            lines = islice(enumerate(text, start=1), self.num_before + 1, None)
            if self._has_newlines:
                start = self.num_before + 2
                reader = csv.reader((line for _, line in lines), delimiter=self.separator)
                for row in reader:
                    if row:
                        yield start, row
                    start = self.num_before + 2 + reader.line_num
                return
            for number, line in lines:  # each by itself, as Arrow reads them: a quote may be left open
                if line.strip("\n"):
                    yield number, next(csv.reader([line], delimiter=self.separator))

    def places(self, numbers: set[int]) -> dict[int, int]:
        """Goes through the file: counting lines always would cost every good build."""
        full_rows = (line for line, row in self._lines() if len(row) == len(self.names))
        counted = enumerate(islice(full_rows, max(numbers) + 1))
        return {number: line for number, line in counted if number in numbers}


# JSON


@dataclass(frozen=True)
class _Json:
    path: Path
    encoding: str
    reads: Callable[[Any], bool]
    value: Any  # what the file holds; None: a value on each line
    names: list[str] = field(default_factory=list)
    rows: list[list[str | None]] = field(default_factory=list)

    @property
    def unit(self) -> str:
        return "entry" if self.value is not None else "line"

    def entries(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """(place, a puzzle with what is said of it, or what is wrong there)."""
        if self.value is not None:
            yield from enumerate(_records(self.path, self.value, self.reads), start=1)
            return
        with open_text(self.path, self.encoding) as text:
            for line, content in enumerate(text, start=1):
                if not content.strip():
                    continue
                try:
                    records: list[Any] = _records(self.path, json.loads(content), self.reads)
                except ValueError as error:
                    records = [f"no JSON: {first_line(error)} ('{shown(content.strip())}')"]
                yield from ((line, record) for record in records)

    def chunks(self, columns: Columns, skips: bool) -> Iterator[Chunk]:
        names = [None if i is None else self.names[i] for i in columns]
        entries = self.entries()
        while some := list(islice(entries, _ROWS_PER_CHUNK)):
            records = [(place, entry) for place, entry in some if isinstance(entry, dict)]
            texts = [
                None
                if name is None
                else pa.array([_text_of(entry.get(name)) for _, entry in records], pa.string())
                for name in names
            ]
            places = np.array([place for place, _ in records], np.int64)
            misfits = [(place, entry) for place, entry in some if isinstance(entry, str)]
            yield Chunk(texts[0], texts[1], texts[2], places, misfits)

    def places(self, numbers: set[int]) -> dict[int, int]:
        return {number: number for number in numbers}


def _json_table(path: Path, encoding: str, head: str, reads: Callable[[str], object]) -> _Json | None:
    """The JSON that `head` begins; None if it is none, but may be text."""

    def is_puzzle(value: Any) -> bool:
        if isinstance(value, list) and len(value) < 2:  # a list of one puzzle
            return False
        text = _text_of(value)
        return bool(text and reads(text))

    first, *others = [line for line in head.splitlines() if line.strip()]
    try:
        value = json.loads(first)
        is_lines = bool(others) and (isinstance(value, dict) or is_puzzle(value))
    except ValueError:
        is_lines = False
    value = None
    if not is_lines:
        with open_text(path, encoding) as text:
            try:
                value = json.load(text)
            except ValueError as error:
                if first.lstrip().startswith("["):  # as [Puzzle], or a row of a grid in brackets
                    return None
                raise UserError(f"{path} is no readable JSON: {first_line(error)}") from None
    table = _Json(path, encoding, is_puzzle, value)
    for _, entry in islice(table.entries(), _ROWS_LOOKED_AT):
        if isinstance(entry, dict):
            table.names.extend(name for name in entry if name not in table.names)
            table.rows.append([_text_of(entry.get(name)) for name in table.names])
    return table


def _records(path: Path, value: Any, is_puzzle: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """The puzzles in a value of JSON, each with what is said beside it."""
    if value == []:
        return []
    if isinstance(value, dict):
        if any(map(is_puzzle, value.values())):
            # `hrm-ray solve --json` says of its own answer whether it is one.
            return [{**value, "answer": None} if value.get("valid") is False and "answer" in value else value]
        columns = {
            name: list(column.values()) if isinstance(column, dict) else column
            for name, column in value.items()
            if isinstance(column, (dict, list)) and column
        }
        if len({len(column) for column in columns.values()}) == 1 and all(
            is_puzzle(column[0]) for column in columns.values()
        ):
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        found = {name: records for name in columns if (records := _records(path, value[name], is_puzzle))}
        if len(found) > 1:
            some = ", ".join(f"'{shown(name, 40)}'" for name in list(found)[:5])
            raise UserError(f"{path} holds puzzles under several names ({some}); give a file for each")
        return next(iter(found.values()), [] if columns or not value else [value])
    if (
        not isinstance(value, list)
        or is_puzzle(value)
        or not any(isinstance(part, (list, dict, str)) for part in value)
    ):
        return [{"question": value}]
    return [record for part in value for record in _records(path, part, is_puzzle)]


def _text_of(value: Any) -> str | None:
    """The text of a value: a string, or lists of strings and digits, as a grid is written; None if it is no text."""
    if isinstance(value, list):
        parts = ["." if part in (None, "") else _text_of(part) for part in value]
        return None if None in parts else "".join(part or "" for part in parts)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None or isinstance(value, dict) else str(value)


# Parquet


class _Parquet:
    MAGIC = b"PAR1"
    unit = "entry"

    def __init__(self, path: Path):
        self.path = path
        with self._open() as file:
            self.names: list[str] = file.schema_arrow.names
            first = next(file.iter_batches(_ROWS_LOOKED_AT), None)
        columns = [] if first is None else [_strings(column).to_pylist() for column in first.columns]
        self.rows: list[list[str | None]] = [list(row) for row in zip(*columns, strict=True)]

    @contextmanager
    def _open(self) -> Iterator[Any]:
        from pyarrow.parquet import ParquetFile  # slow, and seldom needed

        with open_utf8(self.path, "utf-8") as content:
            if not isinstance(content, str):
                content = pa.BufferReader(content.read())  # its end is read first
            with ParquetFile(content) as file:
                yield file

    def chunks(self, columns: Columns, skips: bool) -> Iterator[Chunk]:
        first = 0
        with self._open() as file:
            names = [self.names[i] for i in dict.fromkeys(columns) if i is not None]
            for batch in file.iter_batches(_ROWS_PER_CHUNK, columns=names):
                texts = [None if i is None else _strings(batch[self.names[i]]) for i in columns]
                yield Chunk(texts[0], texts[1], texts[2], np.arange(first, first + batch.num_rows))
                first += batch.num_rows

    def places(self, numbers: set[int]) -> dict[int, int]:
        return {number: number + 1 for number in numbers}


def _strings(column: pa.Array) -> pa.Array:
    """A column as text. Raises pa.ArrowInvalid if it holds text that is none."""
    try:
        texts = column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # lists, say
        return pa.array([_text_of(value) for value in column.to_pylist()], pa.string())
    texts.validate(full=True)
    return texts
