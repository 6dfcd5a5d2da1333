"""Raw puzzles -> a verified dataset, on Ray Data.

A family's `Builder` reads or generates puzzles and gives the examples in order; the work that takes long is mapped over
blocks by Ray Data, on as many CPUs or machines as there are, and comes back in order. Shards are cut on the driver, by
whole groups, and random decisions are keyed: so neither the number of CPUs nor the size of blocks can change a byte.

Ray is imported only inside functions: reading a dataset needs none of it.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from hrm_ray import nodes
from hrm_ray.data.builder import Builder, Part, builder_of
from hrm_ray.data.format import Manifest, SplitInfo
from hrm_ray.data.placing import is_remote, manifest_at, placed
from hrm_ray.data.recipe import Recipe
from hrm_ray.data.shards import open_dataset
from hrm_ray.data.verify import verify
from hrm_ray.data.writer import DatasetWriter, balanced_cuts, writable_folder
from hrm_ray.errors import UserError
from hrm_ray.ray_session import ray_session

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
        UserError: the source, something in it, or `out` cannot be used.
    """
    builder = builder_of(recipe)
    digest = builder.digest()
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
        return _build(builder, digest, folder, overwrite=overwrite, show_progress=show_progress)


def _build(builder: Builder, digest: str, out: Path, *, overwrite: bool, show_progress: bool) -> Manifest:
    writable_folder(out, overwrite=overwrite)
    recipe = builder.recipe
    with DatasetWriter(out, overwrite=overwrite) as writer, ExitStack() as stack:
        workers = _Workers(show_progress, stack)
        splits = {part.name: _write(writer, builder, part, recipe) for part in builder.parts(workers)}
        task = builder.task
        manifest = Manifest(
            task=task.name,
            task_options=task.options,
            vocab_size=task.vocab_size,
            seq_len=task.seq_len,
            pad_id=task.pad_id,
            ignore_label_id=task.ignore_label_id,
            blank_identifier_id=task.blank_identifier_id,
            num_puzzle_identifiers=builder.num_puzzle_identifiers,
            seed=recipe.seed,
            recipe=recipe.model_dump(mode="json"),
            source_digest=digest,
            report=builder.report(),
            extra_files=tuple(writer.add_file(name, content) for name, content in builder.files().items()),
            splits=splits,
        )
        writer.finish(manifest)
    if show_progress:
        for line in builder.notes():
            print(line, file=sys.stderr)
    return manifest


def _write(writer: DatasetWriter, builder: Builder, part: Part, recipe: Recipe) -> SplitInfo:
    cuts = balanced_cuts(part.rows_per_group, recipe.rows_per_shard)
    split = writer.split(part.name, builder.task, cuts)
    for examples in part.blocks:
        split.add(*examples)
    return split.finish()


def _is_of(manifest: Manifest, recipe: Recipe, digest: str) -> bool:
    """Whether a dataset was built from this recipe and source, wherever the source lay."""
    wanted = recipe.model_dump(mode="json")
    defaults = type(recipe).model_construct().model_dump(mode="json")  # of keys that recipes did not have yet
    same = defaults | manifest.recipe | {"source": None} == wanted | {"source": None}
    return same and manifest.source_digest == digest


class _Workers:
    """See `builder.Workers`. `stack` ends what the build began."""

    def __init__(self, show_progress: bool, stack: ExitStack):
        self.show_progress, self._stack = show_progress, stack

    def map(
        self,
        function: Callable[[pa.Table], pa.Table],
        blocks: list[pa.Table],
        *,
        total: int,
        label: str,
        on_ray: bool = True,
    ) -> Iterator[pa.Table]:
        if on_ray:
            self._start_ray()
        results = (ordered_map if on_ray else threaded_map)(function, blocks)
        hidden = not self.show_progress
        with tqdm(total=total, desc=label, unit="row", unit_scale=True, disable=hidden) as bar:
            for block in results:
                bar.update(block.num_rows)
                yield block

    def share(self, value: Any) -> Callable[[], Any]:
        import ray

        self._start_ray()
        return partial(ray.get, ray.put(value))

    def _start_ray(self) -> None:
        """Started only when needed, so that mistakes in the source are reported without waiting for Ray."""
        if self._stack.enter_context(ray_session(_OBJECT_STORE_BYTES)):
            _check_for_cpus()


def _check_for_cpus() -> None:
    """Say if the work has to wait for a CPU. Raises UserError if the cluster can never have one."""
    grows, cpu = nodes.growth(), {"CPU": 1}
    if grows is not None and not nodes.most(cpu, grows):
        raise UserError(
            f"building data needs a CPU, the cluster has none: {nodes.room(grows)}; add a node with CPUs"
        )
    if (waits := nodes.waiting_for(cpu, 1, grows)) is not None:
        print(waits, file=sys.stderr)


def threaded_map(function: Callable[[pa.Table], pa.Table], blocks: list[pa.Table]) -> Iterator[pa.Table]:
    """Map `function`, whose time goes to compiled code, over `blocks` by threads of this process, in their order."""
    num_threads = os.cpu_count() or 1
    running: deque[Future[pa.Table]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for block in blocks:
                running.append(pool.submit(function, block))
                if len(running) > num_threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


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
