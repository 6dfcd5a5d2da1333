"""Where the puzzles are in a text: one a line, a grid over several lines, a column of a table.

A task says how its puzzles are written (`Cells`); the rules of a puzzle are not known here. What can mean one thing
only is read. What cannot be read is a `Found` with a `problem`, or one whose text the task refuses; none is left out.
A line is passed over only if it is empty, part of a frame, a remark (`#`) or a heading in words.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from hrm_ray.errors import UserError, shown

_BETWEEN_CELLS = str.maketrans("", "", " \t|,;:\"'()[]{}│┃║")
_BETWEEN_FIELDS = re.compile(r"[\s,;:/|\"'#()\[\]{}<>=]+")
_FRAME = set("+-=|*_~# \t,;()[]{}") | {chr(code) for code in range(0x2500, 0x2580)}  # the latter draw boxes
_FRAME_WITH_DASHES = _FRAME | set(".:'")
_NUMBER = re.compile(r"(\d{1,6})[.:)]?")  # of the puzzle below
_WORD = re.compile(r"[^\W\d_]{2,}")
_SEPARATORS = ",;\t"

# What `hrm-ray solve` and `hrm-ray data show` print beside grids; others label their puzzles so too.
_VERDICT = re.compile(r"(valid|NOT valid|cannot be checked), confidence ")
_NOTE = "note: "
_LABEL = re.compile(r"(question|answer|solution)\W", re.IGNORECASE)
_HEADS_ANSWER = re.compile(r"\W*(solution|answer|solved)", re.IGNORECASE)
_HEADS_STATE = "[state]"  # of an .sdk file: the puzzle above, partly solved

_QUESTION_NAMES = {"question", "puzzle", "quiz", "problem", "input", "sudoku"}
_ANSWER_NAMES = {"answer", "solution", "output", "target", "label"}
_RATING_NAMES = ("rating", "difficulty")


@dataclass(frozen=True)
class Cells:
    """How the puzzles of a task are written: a grid, one character a cell.

    Attributes:
        width, height: cells of a row, and rows.
        symbols: the characters of cells that are given.
        blanks: the usual ones for a cell that is not; the first is ours.
    """

    width: int
    height: int
    symbols: str
    blanks: str

    @property
    def size(self) -> int:
        """Cells of a puzzle."""
        return self.width * self.height

    def plain(self, chars: str) -> str | None:
        """`chars` as one puzzle, a character a cell, with one of `blanks` for each blank; None if it is none.

        In place of the usual blanks any one other character may stand for all of them, if a cell is given at all.
        """
        if len(chars) != self.size:
            return None
        others = set(chars).difference(self.symbols, self.blanks)
        if not others:
            return chars
        other = others.pop()
        if others or other.isdigit() or not other.isprintable():
            return None
        kinds = set(chars)
        if kinds.intersection(self.blanks) or not kinds.intersection(self.symbols):
            return None
        return chars.replace(other, self.blanks[0])

    def whole(self, text: str) -> str | None:
        """The puzzle that `text` is, on one line or several, as `plain`; None if it is not exactly one."""
        if chars := self.plain(text) or self.plain(text.strip()):
            return chars
        if "\n" in text.strip():
            found = list(find_puzzles(text.splitlines(), self))
            return self.plain(found[0].question) if len(found) == 1 else None
        taken = _take(self, [part for part in _BETWEEN_FIELDS.split(text) if part])
        if taken and not taken[1]:
            return taken[0]
        grids = self.of_fields(text)
        return grids[0] if len(grids) == 1 else None

    def of_fields(self, text: str) -> list[str]:
        """The puzzle, and its answer if that follows, of a text with one field a cell, an empty one for a blank."""
        chars = _fields(text, self.blanks[0], (self.size, 2 * self.size))
        return [part for part in map(self.plain, (chars[: self.size], chars[self.size :])) if part]

    def is_complete(self, chars: str) -> bool:
        """Whether no cell is blank."""
        return not set(chars).difference(self.symbols)


class Found(NamedTuple):
    """A puzzle in a text; with `problem`, what is wrong there in its place."""

    line: int
    question: str = ""
    answer: str | None = None
    problem: str | None = None


def find_puzzles(lines: Iterable[str], cells: Cells) -> Iterator[Found]:
    """The puzzles in the lines of a text, in order."""
    finder = _Finder(cells)
    for number, line in enumerate(lines, start=1):
        finder.add(number, line)
        if len(finder.found) > 1:  # the last may still get its answer
            yield from finder.found[:-1]
            del finder.found[:-1]
    finder.end_grid()
    yield from finder.found


class _Row(NamedTuple):
    """A line of a grid.

    Attributes:
        is_frame: it may be a part of the frame as well, as ``---------``.
        problem: why it is no row, though it stands where one should.
    """

    line: int
    question: str = ""
    answer: str | None = None
    is_frame: bool = False
    problem: str | None = None


@dataclass
class _Finder:
    """Puts puzzles together from the lines of a text."""

    cells: Cells
    found: list[Found] = field(default_factory=list)
    _rows: list[_Row] = field(default_factory=list)  # of the grid that is being read
    _bands: list[list[_Row]] = field(default_factory=list)  # its rows before the last empty line, and so on
    _number: int = 0  # the last heading that is a number
    _next: str = "puzzle"  # what the next grid is, by its heading: "puzzle", "answer" (of the last), "state"

    def add(self, line: int, raw: str) -> None:
        """Read the next line."""
        raw = raw.rstrip("\r\n")
        if chars := self.cells.plain(raw):
            self.end_grid()
            self._add(Found(line, chars))
            return
        text = raw.strip(" \t\x1a\ufeff")
        row = self._row(line, raw)
        in_grid = bool(self._bands) or not all(row.is_frame for row in self._rows)
        if row and (text or in_grid):
            self._rows.append(row)
        elif not text:
            self._end_band()
        elif text.startswith(("#", _NOTE)):
            self.end_grid()
        elif set(text) <= (_FRAME_WITH_DASHES if "--" in text else _FRAME):
            pass
        elif verdict := _VERDICT.match(text):
            self.end_grid()
            if verdict[1] == "NOT valid" and self.found:
                self.found[-1] = self.found[-1]._replace(answer=None)
        elif found := self._in_line(line, raw):
            self.end_grid()
            self._add_labelled(found, text)
        elif self._is_heading(text) or self._is_next_number(text):
            self.end_grid()
            self._next = "answer" if _HEADS_ANSWER.match(text) else "puzzle"
            if text.lower() == _HEADS_STATE:
                self._next = "state"
        elif in_grid and len(text) <= 5 * self.cells.width:
            problem = f"'{shown(text)}' is no row of {self.cells.width} cells, as the lines beside it are"
            self._rows.append(_Row(line, problem=problem))
        else:
            self.end_grid()
            self.found.append(Found(line, text))

    def _add(self, found: Found) -> None:
        """Add a puzzle, or what its heading says that it is."""
        kind, self._next = self._next, "puzzle"
        last = self.found[-1] if self.found else None
        if last is None or last.problem:
            self.found.append(found)
        elif kind == "puzzle":
            if (
                found.answer is None
                and last.answer is None
                and self._completes(found.question, last.question)
            ):
                self._answer(found)
            else:
                self.found.append(found)
        elif kind == "answer":
            if self.cells.is_complete(found.question):
                self._answer(found)
            else:  # "Solved in 5 minutes"
                self.found.append(found)

    def _completes(self, chars: str, question: str) -> bool:
        """Whether a grid without blanks keeps what a question with blanks gives."""
        cells = self.cells
        return (
            len(chars) == len(question) == cells.size
            and cells.is_complete(chars)
            and not cells.is_complete(question)
            and all(
                clue == cell or clue not in cells.symbols for cell, clue in zip(chars, question, strict=True)
            )
        )

    def _answer(self, found: Found) -> None:
        """`found` is the answer of the last puzzle; one that has another is left to stand as a puzzle of its own."""
        last = self.found[-1]
        if last.answer in (None, found.question):
            self.found[-1] = last._replace(answer=found.question)
        else:
            self.found.append(found)

    # Puzzles on one line

    def _in_line(self, line: int, raw: str) -> Found | None:
        """The puzzle of a line that holds more than that: spaces or commas, its answer, a remark."""
        cells, size = self.cells, self.cells.size
        start, behind = raw[:size], raw[size : size + 1]
        fields = [text for text in _BETWEEN_FIELDS.split(raw) if text]
        if grids := cells.of_fields(raw):
            fields = []
        elif (
            (first := cells.plain(start))
            and _BETWEEN_FIELDS.fullmatch(behind)
            and behind not in start
            and not (" " in start and behind.isspace())
        ):
            fields = _BETWEEN_FIELDS.split(raw[size:])
            grids = [first, *_grids(cells, fields)]
        elif taken := _take(cells, fields):
            following = _take(cells, taken[1])
            if not following and taken[1] and self._goes_on(fields, taken[1]):
                count = f"{len(fields)} fields, a grid has {len(fields) - len(taken[1])}"
                return Found(line, problem=f"{count}: give the cells alone, without an index or a remark")
            grids = [taken[0], *([following[0]] if following else _grids(cells, taken[1]))]
            fields = [] if following else taken[1]
        else:
            grids = _grids(cells, fields)
        grids = list(dict.fromkeys(grids))
        complete = [chars for chars in grids if cells.is_complete(chars)]
        if len(complete) > 1 or len(grids) - len(complete) > 1:
            return Found(line, problem=f"{len(grids)} puzzles on one line; give each a line of its own")
        if grids and (damaged := self._damaged(fields)):
            problem = f"'{shown(damaged)}' stands beside a puzzle, but is no puzzle or answer of {size} cells itself"
            return Found(line, problem=problem)
        grids.sort(key=cells.is_complete)  # the question, then its answer
        return Found(line, *grids) if grids else None

    def _is_next_number(self, text: str) -> bool:
        """Whether a line numbers the grid below: grids are numbered in order, what is left of a puzzle is not."""
        match = _NUMBER.fullmatch(text)
        is_between_grids = not self._bands and len(self._solid(self._rows)) % self.cells.height == 0
        if not match or not is_between_grids or int(match[1]) != self._number + 1:
            return False
        self._number += 1
        return True

    def _goes_on(self, fields: list[str], left: list[str]) -> bool:
        """Whether what is left of a line's fields looks like cells too: nobody knows then which are the grid's."""
        known = set(self.cells.symbols + self.cells.blanks)
        return len(left[0]) == len(fields[0]) and set(left[0]) <= known

    def _damaged(self, fields: list[str]) -> str | None:
        """What among the fields of a line may be left of a puzzle or an answer."""
        cells, symbols = self.cells, set(self.cells.symbols)
        left = [text for text in fields if cells.plain(text) is None]
        in_cells = [text for text in left if not set(text).difference(cells.symbols, cells.blanks)]
        for text in [*left, "".join(in_cells)]:
            others = set(text).difference(cells.symbols, cells.blanks)
            if (
                len(text) >= cells.size // 2
                and len(others) <= 1
                and symbols & set(text)
                and len(text) < 2 * cells.size
            ):
                return text
        return None

    def _add_labelled(self, found: Found, text: str) -> None:
        """Add the puzzle of a line which may say what it is."""
        label = _LABEL.match(text)
        last = self.found[-1] if self.found else None
        if label is None or last is None or last.problem or found.problem:
            self._add(found)
        elif label[1].lower() != "question":
            self._answer(found)
        elif found.question != last.question:  # `data show` prints it as a grid and as a line
            self._add(found)

    def _is_heading(self, text: str) -> bool:
        """Whether a line without a puzzle is words, and not what is left of a puzzle."""
        cells, symbols = self.cells, set(self.cells.symbols)
        if all(len(set(word.lower())) == 1 for word in _WORD.findall(text)):
            return False
        runs = re.findall(f"[{re.escape(cells.symbols + cells.blanks)}]+", text)
        return not (
            any(len(run) > cells.width and symbols & set(run) for run in runs)
            or any(len(part) >= cells.size // 2 and symbols & set(part) for part in text.split())
        )

    # Grids over several lines

    def _row(self, line: int, raw: str) -> _Row | None:
        """A line as a row of a grid, its frame left out; None if it is none."""
        cells, width, blank = self.cells, self.cells.width, self.cells.blanks[0]
        if len(raw) < width or len(raw) > 8 * width + 16 or cells.of_fields(raw):
            return None
        if ("'" in raw or "!" in raw or "|   |" in raw) and (row := self._marked_row(line, raw)):
            return row
        if chars := _fields(raw, blank, (width,)):
            return self._row_of(line, chars)
        chars = raw.translate(_BETWEEN_CELLS)
        if len(chars) == width:
            return self._row_of(line, chars)
        chars = raw.replace("|", "")
        if len(chars) == width and set(chars) - set(cells.symbols) == {" "}:
            return _Row(line, chars.replace(" ", blank), is_frame=not chars.strip())
        return None

    def _marked_row(self, line: int, raw: str) -> _Row | None:
        """A row as `Task.render` marks it (4' was answered, 4! is not the clue), or question and answer abreast."""
        width, blank = self.cells.width, self.cells.blanks[0]
        known = self.cells.symbols + self.cells.blanks
        cells = raw.replace("|", " ").split()
        if len(cells) not in (width, 2 * width):
            return None
        if any(cell[0] not in known or cell[1:] not in ("", "'", "!") for cell in cells):
            return None
        if any("!" in cell for cell in cells[:width]):
            problem = "a digit marked ! is not the clue, which is not shown; give the question itself"
            return _Row(line, problem=problem)
        question = "".join(blank if "'" in cell else cell[0] for cell in cells[:width])
        return _Row(line, question, "".join(cell[0] for cell in cells[-width:]))

    def _row_of(self, line: int, chars: str) -> _Row | None:
        kinds = set(chars)
        others = kinds.difference(self.cells.symbols, self.cells.blanks)
        if len(others) > 1 or any(other.isdigit() for other in others):
            return None
        return _Row(line, chars, is_frame=others == kinds)

    def _solid(self, rows: list[_Row]) -> list[_Row]:
        """`rows` without the frame; what may be either is a row where only so the grid is whole."""
        solid, height = [row for row in rows if not row.is_frame], self.cells.height
        return rows if solid and len(solid) % height and len(rows) % height == 0 else solid

    def _end_band(self) -> None:
        """An empty line: the grid ends, or it is one with empty lines between its rows."""
        rows, height = self._solid(self._rows), self.cells.height
        fits = (
            len(rows) == len(self._bands[0])
            if self._bands
            else 0 < len(rows) < height and height % len(rows) == 0
        )
        if fits and len(rows) * (len(self._bands) + 1) < height and not any(row.problem for row in rows):
            self._bands.append(rows)
            self._rows = []
        elif rows:
            self.end_grid()

    def end_grid(self) -> None:
        """What follows is no part of the grid that was being read."""
        bands, rows, height = self._bands, self._solid(self._rows), self.cells.height
        self._bands, self._rows = [], []
        before = list(chain.from_iterable(bands))
        if bands and len(rows) == len(bands[0]) and len(before) + len(rows) == height:
            before, rows = [], before + rows
        for part in (before, rows):
            if part:
                self._add_grids(part)

    def _add_grids(self, rows: list[_Row]) -> None:
        cells, height = self.cells, self.cells.height
        problem = next((row for row in rows if row.problem), None)
        if problem:
            self.found.append(Found(problem.line, problem=problem.problem))
            return
        if len(rows) % height:
            count = f"{len(rows)} row{'s' * (len(rows) > 1)} of {cells.width} cells; a grid has {height}"
            self.found.append(Found(rows[0].line, problem=f"{count}: one may be missing, or too many"))
            return
        for start in range(0, len(rows), height):
            grid = rows[start : start + height]
            question = "".join(row.question for row in grid)
            answer = None
            if any(row.answer for row in grid):
                answer = "".join(row.answer or row.question for row in grid)
            self._add(Found(grid[0].line, cells.plain(question) or question, answer))


def _fields(text: str, blank: str, counts: tuple[int, ...]) -> str:
    """The characters of a line of so many fields, one in each, `blank` for an empty field; "" if it is no such line."""
    for separator in _SEPARATORS:
        if text.count(separator) + 1 in counts:
            fields = [part.strip() or blank for part in text.split(separator)]
            if all(len(part) == 1 for part in fields):
                return "".join(fields)
    return ""


def _grids(cells: Cells, fields: list[str]) -> list[str]:
    return [chars for text in fields if (chars := cells.plain(text))]


def _take(cells: Cells, fields: list[str]) -> tuple[str, list[str]] | None:
    """A puzzle made of the first fields, all of one length ("003 020 600 ..."), and the fields after them."""
    length = len(fields[0]) if fields else 0
    if not length or cells.size % length:
        return None
    num = cells.size // length
    if len(fields) < num or any(len(text) != length for text in fields[:num]):
        return None
    chars = cells.plain("".join(fields[:num]))
    return (chars, fields[num:]) if chars else None


# Tables


class Columns(NamedTuple):
    """Which columns of a table hold what; None: none does."""

    question: int
    answer: int | None
    rating: int | None


def choose_columns(
    where: str,
    names: Sequence[str],
    rows: Sequence[Sequence[str | None]],
    reads: Callable[[str], str | None],
    is_complete: Callable[[str], bool],
) -> Columns | None:
    """Know the columns of a table by the published names (question, answer, rating), else by what they hold.

    Args:
        where: the file, for the message.
        names: of the columns.
        rows: the first rows.
        reads: the puzzle that a text is; None if it is none.
        is_complete: whether a puzzle has no blanks.

    Returns:
        None if no column holds puzzles.

    Raises:
        UserError: several columns may be meant.
    """
    lower = [name.strip().lower() for name in names]
    columns = [[row[i] or "" for row in rows if i < len(row)] for i in range(len(names))]
    grids = [[reads(text) for text in column if text.strip()] for column in columns]
    some = [i for i in range(len(names)) if any(grids[i])]
    held = [i for i in some if sum(map(bool, grids[i])) * 2 >= len(grids[i])] or some
    has_blanks = [i for i in held if any(chars and not is_complete(chars) for chars in grids[i])]

    def named(wanted: set[str], among: list[int]) -> list[int]:
        return [i for i in among if lower[i].rstrip("s").replace("quizze", "quiz") in wanted]

    def one_of(columns: list[int], wanted: set[str], what: str) -> int | None:
        if len(columns) > 1:
            columns = named(wanted, columns) or columns
        if len(columns) > 1 and any(grids[i] != grids[columns[0]] for i in columns):
            both = " and ".join(repr(shown(names[i], 40)) for i in columns[:2])
            raise UserError(f"{where}: the columns {both} may both be the {what}; name one of them '{what}'")
        return columns[0] if columns else None

    if "question" in lower:
        question: int | None = lower.index("question")
    else:
        question = one_of(has_blanks or held, _QUESTION_NAMES, "question")
    if question is None:
        return None
    if "answer" in lower:
        answer: int | None = lower.index("answer")
    else:
        rest = [i for i in held if i != question]
        answer = one_of(
            [i for i in rest if i not in has_blanks] or named(_ANSWER_NAMES, rest), _ANSWER_NAMES, "answer"
        )
    rating = next((lower.index(name) for name in _RATING_NAMES if name in lower), None)
    return Columns(question, answer, rating)
