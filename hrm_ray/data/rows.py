"""Building a family whose puzzles are a question and its answer: from files or a generator, with symmetric copies.

    train, test rows -> checks -> select -> complete -> augment -> drop what is in test -> shards

Each puzzle is a group; its copies are puzzles of that group.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hrm_ray.data.builder import Builder, Examples, Part, Workers
from hrm_ray.data.format import from_tokens, to_tokens
from hrm_ray.data.keyed_random import row_keys
from hrm_ray.data.recipe import RowRecipe
from hrm_ray.data.row_set import RowSet
from hrm_ray.data.sources import BadRows, Rows, Source, open_source
from hrm_ray.data.tasks.base import Symmetry, Task, import_family
from hrm_ray.errors import UserError
from hrm_ray.machine_code import njit

# Purposes of random keys: the choice of test rows and that of training rows are independent.
_TEST, _TRAIN = 1, 2

_BYTES_PER_TASK = 3 << 20  # of augmented rows that a Ray task returns
MAX_TRIES = 1_000  # for one generated puzzle


class _Sample:
    """Draws `size` rows of a stream, uniformly and without replacement, by the row's number alone; all if None.

    Keeps the rows with the smallest random keys, in file order; `on_rejected` gets those it lets go.
    """

    def __init__(
        self, size: int | None, seed: int, purpose: int, on_rejected: Callable[[Rows], None] | None = None
    ):
        self._size, self._seed, self._purpose = size, seed, purpose
        self._on_rejected = on_rejected
        self._chunks: list[Rows] = []

    def add(self, rows: Rows) -> None:
        self._chunks.append(rows)
        if self._size is not None and sum(map(len, self._chunks)) > 2 * self._size + 65_536:
            self._chunks = [self._trim(rows.questions.shape[1])]

    def _trim(self, seq_len: int) -> Rows:
        rows = Rows.concat(self._chunks, seq_len)
        if self._size is None or len(rows) <= self._size:
            return rows
        kept = np.zeros(len(rows), bool)
        kept[np.argsort(row_keys(self._seed, self._purpose, rows.numbers), kind="stable")[: self._size]] = (
            True
        )
        if self._on_rejected:
            self._on_rejected(rows.take(~kept))
        return rows.take(kept)

    def result(self, seq_len: int) -> Rows:
        """The sample, sorted by row number."""
        rows = self._trim(seq_len)
        return rows.take(np.argsort(rows.numbers, kind="stable"))


class RowBuilder(Builder):
    """Builds from rows. A family overrides what it has more of: a solver, a generator, symmetries.

    Attributes:
        generator_version: named in the manifest in place of a source's digest; counts up when the generator's output
            changes.
        num_copies: of every training puzzle, beside the original.
        generated_per_task: puzzles that a Ray task makes.
        copies_on_ray: whether making them takes longer than sending them between processes; else threads make them.
        keeps_ratings: whether the data set has those of its source.
    """

    recipe: RowRecipe
    task: Task
    generator_version: str = "generator-1"
    num_copies: int = 0
    generated_per_task: int = 512
    copies_on_ray: bool = True
    keeps_ratings: bool = False

    def __init__(self, recipe: RowRecipe):
        super().__init__(recipe)
        assert recipe.source is not None  # RowRecipe makes sure
        self.source = None if recipe.generates else open_source(recipe.source)
        if task := recipe.make_task():
            self.task = task
        self.bad = BadRows(skip=recipe.on_bad == "skip")
        self._num_groups_in_test = self._num_examples_in_test = 0

    # What a family may override

    def read(self, source: Source, part: str, workers: Workers) -> Iterator[Rows]:
        """The rows of a part from which puzzles are chosen."""
        return source.read(part, self.task, self.bad, ratings=False)

    def complete(self, rows: Rows, file: Path, label: str, workers: Workers) -> Rows:
        """The rows that can be used of those that were chosen, with their answers; the others go to `self.bad`."""
        has_answer = np.asarray(rows.answers.any(axis=1))
        for i in np.flatnonzero(~has_answer):
            self.bad.add(file, int(rows.numbers[i]), "it has no answer")
        return rows.take(has_answer)

    def generator(self) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
        """Makes puzzles number first..first+count-1 of the recipe, each by its number alone; runs in Ray's workers.

        Called with (first, count), it returns questions and answers, uint8 [count, seq_len] each; a question that
        could not be made is all zeros, and so are all after it.
        """
        raise UserError(f"task {self.task.name} has no generator; give source=PATH")

    def augmenter(self) -> Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Makes each puzzle, followed by its copies; runs in Ray's workers.

        Called with questions and answers, uint8 [n, seq_len], and the numbers of their groups, int64 [n]; it returns
        uint8 [n * (1 + num_copies), seq_len] twice. Unless a family says otherwise, the copies are made by the first
        symmetries of its task, the same for every puzzle.
        """
        return partial(_copy, self.task.symmetries(1 + self.num_copies))

    def too_few(self, num_found: int, num_wanted: int) -> str:
        """What to say when the generator finds no more different puzzles."""
        return (
            f"found only {num_found} different puzzles, {num_wanted} are wanted; lower num_train or num_test, or ask "
            "for larger ones"
        )

    def none_found(self) -> str:
        """What to say when the generator gives up."""
        return f"no such puzzle found in {MAX_TRIES} tries; ask for an easier kind"

    # Getting train and test puzzles

    def digest(self) -> str:
        made_of = self.source.digest() if self.source else self.generator_version
        file = import_family(self.recipe.task).__file__
        if "." in self.recipe.task and file:  # code of yours, which changes without a version
            made_of = hashlib.sha256(made_of.encode() + Path(file).read_bytes()).hexdigest()
        return made_of

    def parts(self, workers: Workers) -> Iterator[Part]:
        train, test = self._load(self.source, workers) if self.source else self._generate(workers)
        yield self._part("train", train, self.num_copies, RowSet(test.questions), workers)
        if len(test):
            yield self._part("test", test, 0, None, workers)

    def _load(self, source: Source, workers: Workers) -> tuple[Rows, Rows]:
        """Train and test puzzles of a source: selected, complete, no train puzzle in test."""
        recipe, seq_len = self.recipe, self.task.seq_len
        train = _Sample(recipe.subsample_size, recipe.seed, _TRAIN)
        if "test" in source.parts:
            sample = _Sample(recipe.num_test, recipe.seed, _TEST)
            for rows in self.read(source, "test", workers):
                sample.add(rows)
            test = sample.result(seq_len)
            in_test = RowSet(test.questions)
            for rows in self.read(source, "train", workers):
                train.add(self._without(rows, in_test))
            chosen = train.result(seq_len)
        elif recipe.num_test is None:
            raise UserError(
                f"{source.parts['train']} has no test part; pass num_test=NUMBER to hold puzzles out (0: none)"
            )
        else:
            sample = _Sample(recipe.num_test, recipe.seed, _TEST, on_rejected=train.add)
            for rows in self.read(source, "train", workers):
                sample.add(rows)
            test = sample.result(seq_len)
            chosen = self._without(train.result(seq_len), RowSet(test.questions))
        test = self.complete(test, source.parts.get("test", source.parts["train"]), "check test", workers)
        chosen = self.complete(chosen, source.parts["train"], "check train", workers)
        if not len(chosen):
            why = self._why_none_left(workers)
            raise UserError(f"source={recipe.source}: no training puzzles are left; {why}")
        return chosen, test

    def _why_none_left(self, workers: Workers) -> str:
        if not self.bad.count:
            return "loosen the recipe"
        if workers.show_progress:
            for line in self._skipped():
                print(line, file=sys.stderr)
        some = self.bad.listed()[:3]
        more = f"; and {self.bad.count - len(some)} more" if self.bad.count > len(some) else ""
        return f"{self.bad.count} bad rows were skipped: {'; '.join(some)}{more}"

    def _without(self, rows: Rows, in_test: RowSet) -> Rows:
        dropped = in_test.contains(rows.questions)
        self._num_groups_in_test += int(dropped.sum())
        return rows.take(~dropped)

    def _generate(self, workers: Workers) -> tuple[Rows, Rows]:
        """Generated train and test puzzles, all distinct. Test comes first: it does not change with num_train."""
        recipe = self.recipe
        assert recipe.num_train is not None and recipe.num_test is not None
        questions, answers = self.generated(recipe.num_train + recipe.num_test, workers)
        numbers = np.arange(len(questions))
        rows = Rows(questions, answers, np.full(len(numbers), -1), numbers)
        return rows.take(numbers >= recipe.num_test), rows.take(numbers < recipe.num_test)

    def generated(self, num_wanted: int, workers: Workers) -> tuple[np.ndarray, np.ndarray]:
        """So many different puzzles: questions and answers, uint8 [num_wanted, seq_len]."""
        make = partial(_generate_block, self.generator())
        made = self.distinct(make, self._first_made, num_wanted, workers)
        return to_tokens(made["inputs"]), to_tokens(made["labels"])

    def _first_made(self, made: pa.Table) -> np.ndarray:
        questions = to_tokens(made["inputs"])
        if not questions.any(axis=1).all():
            raise UserError(self.none_found())
        return np.unique(questions, axis=0, return_index=True)[1]

    def distinct(
        self,
        make: Callable[[pa.Table], pa.Table],
        first_of: Callable[[pa.Table], np.ndarray],
        num_wanted: int,
        workers: Workers,
    ) -> pa.Table:
        """The first `num_wanted` different puzzles of those with the numbers 0, 1, ...

        Args:
            make: makes those of a table with a column `index`, in order; runs in Ray's workers.
            first_of: the rows of a table of puzzles that stay; of equal ones the first, whatever was made with it.

        Raises:
            UserError: there are not so many.
        """
        next_index = num_found = 0
        found: list[pa.Table] = []
        while num_found < num_wanted:
            if next_index > 20 * num_wanted + 10_000:
                raise UserError(self.too_few(num_found, num_wanted))
            # A few more than are missing, since some will be duplicates; doubled, so that the last need few rounds.
            num_more = max(int(1.02 * (num_wanted - num_found)) + 64, next_index)
            indices = np.arange(next_index, next_index + num_more)
            next_index = int(indices[-1]) + 1
            starts = range(0, len(indices), self.generated_per_task)
            blocks = [pa.table({"index": indices[i : i + self.generated_per_task]}) for i in starts]
            found.extend(workers.map(make, blocks, total=len(indices), label="generate"))
            all_found = pa.concat_tables(found)
            found = [all_found.take(np.sort(first_of(all_found)))]
            num_found = found[0].num_rows
        return pa.concat_tables(found).slice(0, num_wanted)

    # Writing

    def _part(self, name: str, rows: Rows, num_copies: int, in_test: RowSet | None, workers: Workers) -> Part:
        """Each row is a group, followed by its copies. Copies that are in `in_test` are dropped and counted."""
        blocks = self._augmented(rows, num_copies, in_test, f"write {name}", workers)
        num_made = len(rows) * (1 + num_copies)
        ratings = rows.ratings if self.keeps_ratings else None
        return Part(name, np.full(len(rows), 1 + num_copies), self._numbered(blocks, num_made, ratings))

    def _numbered(
        self,
        blocks: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]],
        num_made: int,
        ratings: np.ndarray | None,
    ) -> Iterator[Examples]:
        """Every row is a puzzle of its own; `ratings` are those of groups."""
        num_written = 0
        for inputs, labels, groups in blocks:
            puzzles = np.arange(num_written, num_written + len(groups))
            rated = None if ratings is None else ratings[groups]
            yield Examples(inputs, labels, np.zeros(len(groups), np.int32), puzzles, groups, rated)
            num_written += len(groups)
        self._num_examples_in_test += num_made - num_written

    def _augmented(
        self, rows: Rows, num_copies: int, in_test: RowSet | None, label: str, workers: Workers
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        groups = np.arange(len(rows))
        if not num_copies:
            yield rows.questions, rows.answers, groups
            return
        per_task = max(1, _BYTES_PER_TASK // (2 * self.task.seq_len * (1 + num_copies)))
        blocks = [
            pa.table(
                {
                    "inputs": from_tokens(rows.questions[i : i + per_task]),
                    "labels": from_tokens(rows.answers[i : i + per_task]),
                    "group": groups[i : i + per_task],
                }
            )
            for i in range(0, len(rows), per_task)
        ]
        on_ray = self.copies_on_ray
        in_test_there = workers.share(in_test) if on_ray else partial(_same, in_test)
        augment = partial(_augment_block, self.augmenter(), 1 + num_copies, in_test_there)
        total = len(rows) * (1 + num_copies)
        for block in workers.map(augment, blocks, total=total, label=label, on_ray=on_ray):
            yield to_tokens(block["inputs"]), to_tokens(block["labels"]), block["group"].to_numpy()

    # Telling

    def report(self) -> dict[str, Any]:
        return {
            "bad_rows_skipped": self.bad.count,
            "bad_rows": self.bad.listed(),
            "train_puzzles_dropped_in_test": self._num_groups_in_test,
            "train_augmentations_dropped_in_test": self._num_examples_in_test,
        }

    def notes(self) -> Iterator[str]:
        yield from self._skipped()
        yield (
            f"dropped because they equal a test example: {self._num_groups_in_test} training puzzles, "
            f"{self._num_examples_in_test} augmentations"
        )

    def _skipped(self) -> Iterator[str]:
        if not self.bad.count:
            return
        listed = self.bad.listed()
        yield f"skipped {self.bad.count} bad rows:"
        yield from (f"  {line}" for line in listed)
        if self.bad.count > len(listed):
            yield f"  and {self.bad.count - len(listed)} more"


# What runs in Ray's workers


def _generate_block(make: Callable[[int, int], tuple[np.ndarray, np.ndarray]], block: pa.Table) -> pa.Table:
    questions, answers = make(block["index"][0].as_py(), block.num_rows)
    return pa.table({"inputs": from_tokens(questions), "labels": from_tokens(answers)})


def _copy(
    symmetries: list[Symmetry], inputs: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Every puzzle under each of the symmetries.

    Raises:
        UserError: one is no symmetry, or a puzzle has a token that it does not know.
    """
    cells = np.array([symmetry.cells for symmetry in symmetries], np.int32)
    tokens = np.array([symmetry.tokens for symmetry in symmetries], np.uint8)
    # What is wrong would be read from other memory, without an error.
    for what, permutations, size in (("cells", cells, inputs.shape[1]), ("tokens", tokens, tokens.shape[1])):
        if permutations.shape[1] != size or (np.sort(permutations, 1) != np.arange(size)).any():
            raise UserError(
                f"a symmetry's {what} are no permutation of 0..{size - 1}; mend those of the task"
            )
    if (strange := max(inputs.max(initial=0), labels.max(initial=0))) >= tokens.shape[1]:
        raise UserError(
            f"a puzzle has the token {strange}, the task has 0..{tokens.shape[1] - 1}; mend how it reads or makes them"
        )
    return _copies(inputs, cells, tokens), _copies(labels, cells, tokens)


@njit()
def _copies(rows, cells, tokens):
    """uint8 [n, S], int32 [copies, S], uint8 [copies, vocab] -> uint8 [n * copies, S]: tokens[x[cells]] of each row."""
    made = np.empty((len(rows) * len(cells), rows.shape[1]), np.uint8)
    for i in range(len(rows)):
        for k in range(len(cells)):
            copy = made[i * len(cells) + k]
            for cell in range(copy.size):
                copy[cell] = tokens[k, rows[i, cells[k, cell]]]
    return made


def _augment_block(
    augment: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    copies: int,
    in_test: Callable[[], RowSet],
    block: pa.Table,
) -> pa.Table:
    groups = block["group"].to_numpy()
    inputs, labels = augment(to_tokens(block["inputs"]), to_tokens(block["labels"]), groups)
    groups = np.repeat(groups, copies)
    if (found := in_test().contains(inputs)).any():
        inputs, labels, groups = inputs[~found], labels[~found], groups[~found]
    return pa.table({"inputs": from_tokens(inputs), "labels": from_tokens(labels), "group": groups})


def _same(value: Any) -> Any:
    return value
