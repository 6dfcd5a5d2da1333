"""Raw puzzles -> a verified dataset, on Ray Data.

The driver reads the source in chunks, selects rows and writes the shards; the work between (solving, generating,
augmenting) is mapped over blocks by Ray Data, on as many CPUs or machines as there are, and comes back in order.
Random decisions are keyed by row and group, and shards are cut on the driver by whole groups: so neither the
number of CPUs nor the size of blocks can change a byte.

    train, test rows -> cheap checks -> [rate] -> select -> solve: one solution? -> augment -> drop what is in test
                                                                                       -> shards -> manifest

Ray is imported only inside functions: reading a dataset needs none of it.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from hrm_ray import nodes
from hrm_ray.data.format import Manifest, SplitInfo, from_tokens, to_tokens
from hrm_ray.data.keyed_random import row_keys
from hrm_ray.data.placing import is_remote, manifest_at, placed
from hrm_ray.data.recipe import GENERATOR, Recipe
from hrm_ray.data.row_set import RowSet
from hrm_ray.data.shards import open_dataset
from hrm_ray.data.sources import BadRows, Rows, Source, open_source
from hrm_ray.data.tasks.base import get_task
from hrm_ray.data.tasks.sudoku import Sudoku
from hrm_ray.data.verify import verify
from hrm_ray.data.writer import DatasetWriter, balanced_cuts, writable_folder
from hrm_ray.errors import UserError
from hrm_ray.ray_session import ray_session

# Purposes of random keys: the choice of test rows and that of training rows are independent.
_TEST, _TRAIN = 1, 2

# Named in the manifest in place of a source's digest; counts up when the generator's output changes.
_GENERATOR_DIGEST = "generator-1"

_ROWS_PER_TASK = 16_384  # augmented rows a Ray task returns: 3 MB of 9x9 boards
_GENERATED_PER_TASK = 512
_MAX_TRIES = 1_000  # boards dug for one generated puzzle
_OBJECT_STORE_BYTES = 96 << 20  # of a private cluster; more spills to disk


def build(
    recipe: Recipe, out: str | Path, *, overwrite: bool = False, show_progress: bool = True
) -> Manifest:
    """Build the dataset of `recipe` in `out`, a local folder or a URI, verified; nothing is there before it is whole.

    Uses the Ray that is initialised, else that of RAY_ADDRESS, else a private one that ends with the build.
    A dataset of the same recipe and source is left as it is.

    Args:
        overwrite: replace whatever dataset is in `out`.
        show_progress: progress bars and notes on stderr.

    Raises:
        UserError: the source, a row of it (see Recipe.on_bad), or `out` cannot be used.
    """
    assert recipe.source is not None  # Recipe makes sure
    source = None if recipe.source == GENERATOR else open_source(recipe.source)
    digest = source.digest() if source else _GENERATOR_DIGEST
    if not overwrite and (found := manifest_at(out)) is not None and _is_of(found, recipe, digest):
        if not is_remote(out):
            open_dataset(out)  # says what is missing or damaged
        if show_progress:
            print(f"{out} is up to date", file=sys.stderr)
        return found
    with placed(out, overwrite=overwrite, show_progress=show_progress) as folder:
        if is_remote(out):
            staged = manifest_at(folder)
            if staged is not None and _is_of(staged, recipe, digest) and not verify(folder):
                return staged  # of an earlier try
            overwrite = True
        return _build(recipe, source, digest, folder, overwrite=overwrite, show_progress=show_progress)


def _build(
    recipe: Recipe,
    source: Source | None,
    digest: str,
    out: Path,
    *,
    overwrite: bool,
    show_progress: bool,
) -> Manifest:
    writable_folder(out, overwrite=overwrite)
    task = get_task(recipe.task, size=recipe.size)
    assert isinstance(task, Sudoku)
    with DatasetWriter(out, overwrite=overwrite) as writer, ExitStack() as stack:
        job = _Job(recipe, task, BadRows(skip=recipe.on_bad == "skip"), show_progress, stack)
        train, test = job.load(source) if source else job.generate()
        splits = {"train": job.write(writer, "train", train, recipe.num_aug, RowSet(test.questions))}
        if len(test):
            splits["test"] = job.write(writer, "test", test, 0, None)
        manifest = Manifest(
            task=task.name,
            task_options=task.options,
            vocab_size=task.vocab_size,
            seq_len=task.seq_len,
            pad_id=task.pad_id,
            ignore_label_id=task.ignore_label_id,
            blank_identifier_id=task.blank_identifier_id,
            num_puzzle_identifiers=1,
            seed=recipe.seed,
            recipe=recipe.model_dump(mode="json"),
            source_digest=digest,
            report=job.report(),
            splits=splits,
        )
        writer.finish(manifest)
    if show_progress:
        for line in job.notes():
            print(line, file=sys.stderr)
    return manifest


def _is_of(manifest: Manifest, recipe: Recipe, digest: str) -> bool:
    """Whether a dataset was built from this recipe and source, wherever the source lay."""
    wanted = recipe.model_dump(mode="json")
    same = {**manifest.recipe, "source": None} == {**wanted, "source": None}
    return same and manifest.source_digest == digest


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


@dataclass
class _Job:
    """One build: the recipe, and what is counted on the way. `stack` ends what the build began."""

    recipe: Recipe
    task: Sudoku
    bad: BadRows
    show_progress: bool
    stack: ExitStack
    num_groups_in_test: int = 0
    num_examples_in_test: int = 0

    # Getting train and test puzzles

    def load(self, source: Source) -> tuple[Rows, Rows]:
        """Train and test puzzles of a source: selected, each with exactly one solution, no train puzzle in test."""
        recipe, seq_len = self.recipe, self.task.seq_len
        train = _Sample(recipe.subsample_size, recipe.seed, _TRAIN)
        if "test" in source.parts:
            sample = _Sample(recipe.num_test, recipe.seed, _TEST)
            for rows in self._read(source, "test"):
                sample.add(rows)
            test = sample.result(seq_len)
            in_test = RowSet(test.questions)
            for rows in self._read(source, "train"):
                train.add(self._without(rows, in_test))
            chosen = train.result(seq_len)
        elif recipe.num_test is None:
            raise UserError(
                f"{source.parts['train']} has no test part; pass num_test=NUMBER to hold puzzles out (0: none)"
            )
        else:
            sample = _Sample(recipe.num_test, recipe.seed, _TEST, on_rejected=train.add)
            for rows in self._read(source, "train"):
                sample.add(rows)
            test = sample.result(seq_len)
            chosen = self._without(train.result(seq_len), RowSet(test.questions))
        if not recipe.rate:  # rating has solved them already
            test = self._solve(test, source.parts.get("test", source.parts["train"]), "check test")
            chosen = self._solve(chosen, source.parts["train"], "check train")
        if not len(chosen):
            raise UserError(f"source={recipe.source}: no training puzzles are left; {self._why_none_left()}")
        return chosen, test

    def _why_none_left(self) -> str:
        if not self.bad.count:
            return "loosen the recipe"
        if self.show_progress:
            for line in self._skipped():
                print(line, file=sys.stderr)
        some = self.bad.listed()[:3]
        more = f"; and {self.bad.count - len(some)} more" if self.bad.count > len(some) else ""
        return f"{self.bad.count} bad rows were skipped: {'; '.join(some)}{more}"

    def _read(self, source: Source, part: str) -> Iterator[Rows]:
        recipe = self.recipe
        by_source = recipe.min_difficulty is not None and not recipe.rate
        chunks = source.read(part, self.task, self.bad, ratings=by_source)
        if recipe.rate:
            chunks = iter([Rows.concat(list(chunks), self.task.seq_len)])
        for rows in chunks:
            if recipe.rate:
                rows = self._solve(rows, source.parts[part], f"rate {part}")
            if recipe.min_difficulty is not None:
                rows = rows.take(rows.ratings >= recipe.min_difficulty)
            yield rows

    def _without(self, rows: Rows, in_test: RowSet) -> Rows:
        dropped = in_test.contains(rows.questions)
        self.num_groups_in_test += int(dropped.sum())
        return rows.take(~dropped)

    def _solve(self, rows: Rows, file: Path, label: str) -> Rows:
        """Fill in the answers and ratings; rows without exactly one solution go to `bad`."""
        if not len(rows):
            return rows
        per_task = int(np.clip(len(rows) // 64, 256, 16_384))
        column = from_tokens(rows.questions)
        blocks = [pa.table({"inputs": column[i : i + per_task]}) for i in range(0, len(rows), per_task)]
        solved = list(self._map(partial(_solve_block, self.task), blocks, len(rows), label))
        answers = np.concatenate([to_tokens(block["answers"]) for block in solved])
        num_solutions = np.concatenate([block["num_solutions"].to_numpy() for block in solved])
        ratings = np.concatenate([block["num_guesses"].to_numpy() for block in solved])
        for i in np.flatnonzero(num_solutions != 1):
            reason = "no solution" if num_solutions[i] == 0 else "several solutions"
            text = self.task.to_text(rows.questions[i])
            self.bad.add(file, int(rows.numbers[i]), f"question '{text}' has {reason}")
        return Rows(rows.questions, answers, ratings, rows.numbers).take(num_solutions == 1)

    def generate(self) -> tuple[Rows, Rows]:
        """Generated train and test puzzles, all distinct. Test comes first: it does not change with num_train."""
        recipe, seq_len = self.recipe, self.task.seq_len
        assert recipe.num_train is not None and recipe.num_test is not None and recipe.num_clues is not None
        num_wanted = recipe.num_train + recipe.num_test
        make = partial(_generate_block, self.task, recipe.seed, recipe.num_clues, _MAX_TRIES)
        questions = answers = np.empty((0, seq_len), np.uint8)
        next_index = 0
        while len(questions) < num_wanted:
            if next_index > 20 * num_wanted + 10_000:
                raise UserError(
                    f"found only {len(questions)} different {recipe.size}x{recipe.size} puzzles with "
                    f"{recipe.num_clues} clues, {num_wanted} are wanted; "
                    "lower num_train or num_test, or change num_clues"
                )
            # A few more than are missing, since some will be duplicates; doubled, so that the last need few rounds.
            num_more = max(int(1.02 * (num_wanted - len(questions))) + 64, next_index)
            indices = np.arange(next_index, next_index + num_more)
            next_index = int(indices[-1]) + 1
            blocks = [
                pa.table({"index": indices[i : i + _GENERATED_PER_TASK]})
                for i in range(0, len(indices), _GENERATED_PER_TASK)
            ]
            made = list(self._map(make, blocks, len(indices), "generate"))
            questions = np.concatenate([questions, *(to_tokens(block["inputs"]) for block in made)])
            answers = np.concatenate([answers, *(to_tokens(block["labels"]) for block in made)])
            if not questions.any(axis=1).all():
                raise UserError(
                    f"no {recipe.size}x{recipe.size} puzzle with {recipe.num_clues} clues and one solution found "
                    f"in {_MAX_TRIES} tries; ask for more clues"
                )
            # Of equal puzzles the first made stays, whatever was made together with it.
            first = np.sort(np.unique(questions, axis=0, return_index=True)[1])
            questions, answers = questions[first], answers[first]
        numbers = np.arange(num_wanted)
        rows = Rows(questions[:num_wanted], answers[:num_wanted], np.full(num_wanted, -1), numbers)
        return rows.take(numbers >= recipe.num_test), rows.take(numbers < recipe.num_test)

    # Writing

    def write(
        self, writer: DatasetWriter, name: str, rows: Rows, num_aug: int, in_test: RowSet | None
    ) -> SplitInfo:
        """Write a split: each row of `rows` is a group, followed by its `num_aug` copies, each its own puzzle.

        Copies that are in `in_test` are dropped and counted.
        """
        copies = 1 + num_aug
        cuts = balanced_cuts(np.full(len(rows), copies), self.recipe.rows_per_shard)
        split = writer.split(name, self.task.seq_len, cuts)
        num_written = 0
        for inputs, labels, groups in self._augmented(rows, num_aug, in_test, f"write {name}"):
            puzzles = np.arange(num_written, num_written + len(groups))
            split.add(inputs, labels, np.zeros(len(groups), np.int32), puzzles, groups)
            num_written += len(groups)
        self.num_examples_in_test += len(rows) * copies - num_written
        return split.finish()

    def _augmented(
        self, rows: Rows, num_aug: int, in_test: RowSet | None, label: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        groups = np.arange(len(rows))
        if not num_aug:
            yield rows.questions, rows.answers, groups
            return
        import ray

        self._start_ray()
        per_task = max(1, _ROWS_PER_TASK // (1 + num_aug))
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
        augment = partial(_augment_block, self.task, num_aug, self.recipe.seed, ray.put(in_test))
        for block in self._map(augment, blocks, len(rows) * (1 + num_aug), label):
            yield to_tokens(block["inputs"]), to_tokens(block["labels"]), block["group"].to_numpy()

    def _start_ray(self) -> None:
        """Started only when needed, so that mistakes in the source are reported without waiting for Ray."""
        if self.stack.enter_context(ray_session(_OBJECT_STORE_BYTES)):
            _check_for_cpus()

    def _map(
        self, function: Callable[[pa.Table], pa.Table], blocks: list[pa.Table], total: int, label: str
    ) -> Iterator[pa.Table]:
        self._start_ray()
        with tqdm(
            total=total, desc=label, unit="row", unit_scale=True, disable=not self.show_progress
        ) as bar:
            for block in ordered_map(function, blocks):
                bar.update(block.num_rows)
                yield block

    # Telling

    def report(self) -> dict[str, Any]:
        """What was left out, for the manifest."""
        return {
            "bad_rows_skipped": self.bad.count,
            "bad_rows": self.bad.listed(),
            "train_puzzles_dropped_in_test": self.num_groups_in_test,
            "train_augmentations_dropped_in_test": self.num_examples_in_test,
        }

    def notes(self) -> Iterator[str]:
        """The same for a person; nothing to tell, no line."""
        yield from self._skipped()
        yield (
            f"dropped because they equal a test example: {self.num_groups_in_test} training puzzles, "
            f"{self.num_examples_in_test} augmentations"
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


def _solve_block(task: Sudoku, block: pa.Table) -> pa.Table:
    answers, num_solutions, num_guesses = task.solve(to_tokens(block["inputs"]))
    return pa.table(
        {"answers": from_tokens(answers), "num_solutions": num_solutions, "num_guesses": num_guesses}
    )


def _generate_block(task: Sudoku, seed: int, num_clues: int, max_tries: int, block: pa.Table) -> pa.Table:
    first = block["index"][0].as_py()
    questions, answers = task.generate(seed, first, block.num_rows, num_clues, max_tries)
    return pa.table({"inputs": from_tokens(questions), "labels": from_tokens(answers)})


def _check_for_cpus() -> None:
    """Say if the work has to wait for a CPU. Raises UserError if the cluster can never have one."""
    grows, cpu = nodes.growth(), {"CPU": 1}
    if grows is not None and not nodes.most(cpu, grows):
        raise UserError(
            f"building data needs a CPU, the cluster has none: {nodes.room(grows)}; add a node with CPUs"
        )
    if (waits := nodes.waiting_for(cpu, 1, grows)) is not None:
        print(waits, file=sys.stderr)


def _augment_block(task: Sudoku, num_aug: int, seed: int, in_test: Any, block: pa.Table) -> pa.Table:
    import ray

    groups = block["group"].to_numpy()
    inputs, labels = task.augment(
        to_tokens(block["inputs"]), to_tokens(block["labels"]), groups, num_aug, seed
    )
    groups = np.repeat(groups, 1 + num_aug)
    kept = ~ray.get(in_test).contains(inputs)
    return pa.table(
        {"inputs": from_tokens(inputs[kept]), "labels": from_tokens(labels[kept]), "group": groups[kept]}
    )


# Ray


def ordered_map(function: Callable[[pa.Table], pa.Table], blocks: list[pa.Table]) -> Iterator[pa.Table]:
    """Map `function` over `blocks` with Ray Data; results come in the order of the blocks, some perhaps in parts."""
    import ray

    context = ray.data.DataContext.get_current()
    before = context.execution_options.preserve_order, context.enable_progress_bars
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # ours counts rows of the dataset
    try:
        results = ray.data.from_arrow(blocks).map_batches(
            function, batch_format="pyarrow", batch_size=None, zero_copy_batch=True
        )
        yield from results.iter_batches(batch_format="pyarrow", batch_size=None)
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before
