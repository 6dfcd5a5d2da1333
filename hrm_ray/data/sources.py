"""Where raw puzzles come from: a file in any usual layout, a folder or zip file of them, a Hugging Face dataset.

A source has a train part and perhaps a test part, each one file (see `puzzle_files` for how it is read). Every row
passes the checks of its task that need no search (shape, characters, rules, answer); whether a question has one
solution is for the builder. A row that fails is a `BadRows` matter: stop, or skip, count and list.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hrm_ray.data.containers import is_file, members, split_member
from hrm_ray.data.puzzle_files import Chunk, PuzzleFile
from hrm_ray.data.tasks.base import Task
from hrm_ray.errors import UserError, first_line, shown
from hrm_ray.published import dataset_hint

PARTS = ("train", "test")
KINDS = (".csv", ".tsv", ".txt", ".sdk", ".sdm", ".ss", ".json", ".jsonl", ".ndjson", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zip")

# train.csv, TEST.CSV.GZ, train-00000-of-00001.parquet
_PART_NAME = re.compile(r"(train|test)(-\d+-of-\d+)?((?:\.[a-z0-9]+)+)", re.IGNORECASE)
_PATTERNS = [f"{folder}{part}*" for folder in ("", "data/") for part in PARTS]  # of a Hugging Face dataset
_MAX_LISTED = 20
_RATING = r"^-?\d{1,18}(\.\d*)?$"  # min_difficulty is whole: what is behind the point does not count


@dataclass(frozen=True)
class Rows:
    """Puzzles of one source part, in file order.

    Attributes:
        questions: uint8[n, S] tokens.
        answers: uint8[n, S] tokens, zeros where the source gives none.
        ratings: int64[n], -1 where the source gives none.
        numbers: int64[n], the row's number in its file: of a table counted from 0, of a text its line, from 1.
    """

    questions: np.ndarray
    answers: np.ndarray
    ratings: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: np.ndarray) -> "Rows":
        """The rows of a mask or of row indices."""
        if rows.dtype == bool and rows.all():
            return self
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
    _listed: list[tuple[Path, int, str]] = field(default_factory=list)  # file, place in it, reason
    _files: dict[Path, PuzzleFile] = field(default_factory=dict)

    @property
    def wants_reasons(self) -> bool:
        """Whether another reason would still be listed; if not, `add` may be given any."""
        return len(self._listed) < _MAX_LISTED

    def reading(self, file: PuzzleFile) -> None:
        """Rows of `file` come next."""
        self._files[file.path] = file

    def add(self, file: Path, number: int, reason: str) -> None:
        """Row `number` of `file` (see `Rows`) is bad.

        Raises:
            UserError: unless rows are to be skipped.
        """
        if not self.skip:
            self.add_misfit(file, self._files[file].places({number})[number], reason)
        self.count += 1
        if self.wants_reasons:
            self._listed.append((file, number, reason))

    def add_misfit(self, file: Path, place: int, reason: str) -> None:
        """At `place` of `file`, a line or an entry from 1, is no row at all. Raises as `add` does."""
        if not self.skip:
            where = f"{file}, {self._files[file].unit} {place}"
            raise UserError(f"{where}: {reason}; mend it, or pass on_bad=skip to leave it out")
        self.count += 1
        if self.wants_reasons:
            self._listed.append((file, -place, reason))  # negative: a place already, no row number

    def listed(self) -> list[str]:
        """The first bad rows, one line each."""
        places: dict[tuple[Path, int], int] = {}
        for path, file in self._files.items():
            numbers = {n for f, n, _ in self._listed if f == path and n >= 0}
            places |= {(path, n): place for n, place in file.places(numbers).items()}
        return [
            f"{shown(file.name)}, {self._files[file].unit} {places.get((file, number), -number)}: {reason}"
            for file, number, reason in self._listed
        ]


@dataclass(frozen=True)
class Source:
    """The files of a source; `parts` has "train" and perhaps "test"."""

    parts: dict[str, Path]

    def digest(self) -> str:
        """SHA-256, hex, of what the files hold."""
        total = hashlib.sha256()
        for part, file in self.parts.items():
            with split_member(file)[0].open("rb") as content:
                total.update(
                    f"{part}{file.suffix}:{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode()
                )
        return total.hexdigest()

    def first_question(self, part: str, task: Task) -> str:
        """The first puzzle of a part, as it is written. Raises UserError if there is none."""
        for chunk in PuzzleFile(self.parts[part], task).chunks(skips=True):
            if len(chunk.questions):
                return chunk.questions[0].as_py() or ""
        raise UserError(f"{self.parts[part]} holds no puzzles")

    def read(self, part: str, task: Task, bad: BadRows, *, ratings: bool) -> Iterator[Rows]:
        """The good rows of a part, chunk by chunk.

        Args:
            ratings: the rows must have the file's rating.

        Raises:
            UserError: a file that cannot be read, or holds no puzzles; a bad row (see BadRows).
        """
        file = PuzzleFile(self.parts[part], task)
        bad.reading(file)
        if ratings and not file.has_ratings:
            raise UserError(
                f"{file.path} has no column 'rating', which min_difficulty and keep_ratings need; pass rate=true to "
                "compute it"
            )
        empty = True
        for chunk in file.chunks(skips=bad.skip):
            for place, problem in chunk.misfits:
                bad.add_misfit(file.path, place, problem)
            if len(chunk.numbers):
                empty = False
                yield _checked(file.path, task, bad, ratings, chunk)
        if empty and not bad.count:
            raise UserError(f"{file.path} holds no puzzles")


def open_source(source: str) -> Source:
    """Find what `source` names: a file, a folder or zip with train (and test) files, or a Hugging Face dataset id.

    Raises:
        UserError: it is none of these, or cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.is_file():
        parts = _parts(path, members(path))
        return Source(parts or {"train": path})
    if path.is_dir():
        if hint := dataset_hint(path):
            raise UserError(f"source={hint}")
        return _folder(path)
    if is_file(path):  # in a zip file
        return Source({"train": path})
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and path.suffix.lower() not in KINDS + PACKED:
        return _folder(_download(source))
    raise UserError(f"source={source}: no such file or folder, and no Hugging Face dataset id (owner/name)")


def _folder(folder: Path) -> Source:
    files = [
        file for place in (folder, folder / "data") if place.is_dir() for file in sorted(place.iterdir())
    ]
    parts = _parts(folder, [file.relative_to(folder).as_posix() for file in files if file.is_file()])
    if not parts:
        raise UserError(
            f"source={folder}: the folder has no train.csv or train.txt (or another kind: {_kinds()})"
        )
    return Source(parts)


def _kinds() -> str:
    return ", ".join(kind.removeprefix(".") for kind in KINDS[1:] + PACKED)


def _parts(place: Path, names: Iterable[str]) -> dict[str, Path]:
    """The train and test files among the names of files in a folder or zip; empty without a train file."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = _PART_NAME.fullmatch(PurePosixPath(name).name)
        if match and all(f".{kind}" in KINDS + PACKED for kind in match[3].lower().split(".")[1:]):
            found.setdefault(match[1].lower(), []).append(name)
    for part, several in found.items():
        if len(several) > 1:
            some = ", ".join(shown(name) for name in several[:5]) + ", ..." * (len(several) > 5)
            raise UserError(f"source={place} holds several {part} files ({some}); keep one, or name one file")
    return {part: place / found[part][0] for part in PARTS if part in found} if "train" in found else {}


def _download(repo_id: str) -> Path:
    import huggingface_hub  # a second to import

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, repo_type="dataset", allow_patterns=_PATTERNS))
    except Exception as error:  # the hub, its HTTP client and the network raise some twenty unrelated types
        raise UserError(
            f"source={repo_id}: no such file or folder here, and no dataset that Hugging Face gives us "
            f"({type(error).__name__}: {first_line(error)}); check the path, or the id and the network"
        ) from None


def _checked(file: Path, task: Task, bad: BadRows, ratings: bool, chunk: Chunk) -> Rows:
    """Tokens of the rows that pass every check that needs no search; the others go to `bad`."""
    questions, good = task.parse_all(chunk.questions)
    good[good] = task.accepts(questions[good])
    answers = np.zeros_like(questions)
    if chunk.answers is not None:
        answers, complete = task.parse_all(chunk.answers, are_answers=True)
        written = chunk.answers if task.keeps_spaces else pc.utf8_trim_whitespace(chunk.answers)
        missing = pc.equal(pc.fill_null(written, ""), "").to_numpy(zero_copy_only=False)
        answers[missing] = 0
        complete &= good
        if task.checkable:
            complete[complete] = task.is_solution(questions[complete], answers[complete])
        good &= missing | complete
    values = np.full(len(questions), -1, np.int64)
    if ratings:
        assert chunk.ratings is not None  # the file has them
        rating_text = pc.utf8_trim_whitespace(pc.fill_null(chunk.ratings, ""))
        rated = pc.match_substring_regex(rating_text, _RATING).to_numpy(zero_copy_only=False)
        whole = pc.replace_substring_regex(rating_text.filter(pa.array(rated)), r"\..*", "")
        values[rated] = pc.cast(whole, pa.int64()).to_numpy()
        good &= rated
    for i in np.flatnonzero(~good):
        reason = ""
        if bad.wants_reasons:
            question = _plain(chunk.questions[i].as_py(), task)
            answer = _plain(chunk.answers[i].as_py() if chunk.answers is not None else None, task)
            reason = task.problem(question, answer) or ""
            if not reason and ratings and not rated[i]:
                reason = f"rating '{shown(rating_text[i].as_py())}' is no number"
            reason = reason or f"question '{shown(question)}' is no puzzle of task {task.name}"
        bad.add(file, int(chunk.numbers[i]), reason)
    return Rows(questions, answers, values, chunk.numbers).take(good)


def _plain(text: str | None, task: Task) -> str:
    """A text as it may stand in a message: without the spaces around it, unless they are cells."""
    text = text or ""
    if task.keeps_spaces:
        return text.strip("\r\n")
    return (task.cells and task.cells.plain(text)) or text.strip()
