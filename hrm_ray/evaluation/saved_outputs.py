"""Model outputs that were saved as .npz, read a part at a time: those of ARC-1 are larger than memory may be."""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from hrm_ray.data.tasks.arc import Arc
from hrm_ray.errors import UserError, first_line, shown
from hrm_ray.evaluation.held_out import HeldOut
from hrm_ray.evaluation.votes import Votes

# Names of each array, the first one found is taken; what its numbers are (numpy's letters); whether it has a column a
# cell. `preds` is what the published code calls it.
_ARRAYS = {
    "inputs": (("inputs",), "iu", True),
    "predictions": (("preds", "predictions"), "iu", True),
    "puzzle_identifiers": (("puzzle_identifiers",), "iu", False),
    "q_halt_logits": (("q_halt_logits",), "f", False),
}
_HOW = "hrm-ray eval RUN data=DIR save_outputs=[inputs,predictions,puzzle_identifiers,q_halt_logits] out=FILE.npz"
_AT_ONCE = 8192  # rows


class _Array(NamedTuple):
    """One array of the file, read from its start."""

    name: str
    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype


class SavedOutputs:
    """The arrays `inputs`, `preds` (or `predictions`), `puzzle_identifiers` and `q_halt_logits` of an .npz file.

    Attributes:
        num_rows: how many rows they have.

    Raises:
        UserError: no such file, no .npz, an array missing, or of another shape or type than `Votes.add` takes. The
            content of the arrays is checked when they are read.
    """

    def __init__(self, file: str):
        self.file = file
        if not Path(file).is_file():
            raise UserError(f"there is no file {shown(file)}; make one with: {_HOW}")
        with self._open() as arrays:
            self.num_rows = arrays[0].shape[0]

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """The rows in order, some thousand at a time, as `Votes.add` takes them. Raises UserError: damaged."""
        with self._open() as arrays:
            for start in range(0, self.num_rows, _AT_ONCE):
                count = min(_AT_ONCE, self.num_rows - start)
                inputs, predictions, identifiers, q = (self._rows(array, count) for array in arrays)
                if np.isnan(q).any():
                    row = start + int(np.isnan(q).argmax())
                    raise UserError(
                        f"{self.file}: q_halt_logits of row {row} is not a number; the model is broken"
                    )
                yield inputs, predictions, identifiers, q

    @contextmanager
    def _open(self) -> Iterator[list[_Array]]:
        """The arrays in the order of `_ARRAYS`, checked to fit each other."""
        with ExitStack() as stack:
            try:
                archive = stack.enter_context(zipfile.ZipFile(self.file))
                names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
                arrays = [
                    self._array(archive, stack, self._found(known, names), kinds, has_cells)
                    for known, kinds, has_cells in _ARRAYS.values()
                ]
            except zipfile.BadZipFile:
                raise UserError(f"{self.file} is no .npz file; make one with: {_HOW}") from None
            except (UserError, PermissionError):
                raise
            except Exception as error:  # of any kind where the bytes are damaged
                raise self._damaged(error) from None
            lengths = {array.name: array.shape[0] for array in arrays}
            if len(set(lengths.values())) > 1:
                different = ", ".join(f"{name} {length}" for name, length in lengths.items())
                raise UserError(f"{self.file}: arrays of different lengths: {different}")
            if not arrays[0].shape[0]:
                raise UserError(f"{self.file} holds no rows")
            yield arrays

    def _found(self, known: tuple[str, ...], names: set[str]) -> str:
        for name in known:
            if name in names:
                return name
        there = ", ".join(sorted(names)) or "nothing"
        raise UserError(
            f"{self.file} has no array '{shown(known[0])}', only: {shown(there)}; save all with: {_HOW}"
        )

    def _array(
        self, archive: zipfile.ZipFile, stack: ExitStack, name: str, kinds: str, has_cells: bool
    ) -> _Array:
        stream = stack.enter_context(archive.open(f"{name}.npy"))
        version = np.lib.format.read_magic(stream)
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, is_by_column, dtype = read_header(stream)
        if dtype.kind not in kinds:
            raise UserError(f"{self.file}: {name} is of type {dtype}; {_WORDS[kinds]} are needed")
        if len(shape) != 1 + has_cells or (has_cells and shape[1] != Arc.seq_len):
            needed = f"[rows, {Arc.seq_len}]" if has_cells else "[rows]"
            raise UserError(f"{self.file}: {name} is of shape {list(shape)}; {needed} is needed")
        if is_by_column and has_cells:
            raise UserError(f"{self.file}: {name} lies column by column; save np.ascontiguousarray of it")
        num_bytes = dtype.itemsize * int(np.prod(shape, dtype=object))
        if stream.tell() + num_bytes != archive.getinfo(f"{name}.npy").file_size:
            raise UserError(f"{self.file} is damaged: {name} is not as long as it says; save it again")
        return _Array(name, stream, shape, dtype)

    def _rows(self, array: _Array, count: int) -> np.ndarray:
        """The next `count` rows."""
        shape = (count, *array.shape[1:])
        try:
            content = array.stream.read(array.dtype.itemsize * int(np.prod(shape)))
            return np.frombuffer(content, array.dtype).reshape(shape)
        except Exception as error:  # of any kind where the bytes are damaged
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.file} is damaged: {first_line(error)}; save it again")


_WORDS = {"iu": "whole numbers", "f": "floating-point numbers"}


def count_votes(
    files: Sequence[SavedOutputs], held_out: HeldOut, on_rows: Callable[[int], object] | None = None
) -> Votes:
    """The votes of all files together, in their order.

    Args:
        on_rows: called with the number of rows done after each part.

    Raises:
        UserError: a damaged file, identifiers of another build, a file none of whose rows is of a test pair.
    """
    votes = Votes(held_out.names)
    num_votes = 0
    for saved in files:
        num_puzzles = 0  # rows that are no padding
        for batch in saved.batches():
            try:
                votes.add(*batch)
            except UserError as error:
                raise UserError(f"{saved.file}: {error}") from None
            num_puzzles += int((batch[2] != 0).sum())
            if on_rows:
                on_rows(len(batch[0]))
        before, num_votes = num_votes, _num_votes(votes, held_out)
        known = f"{saved.file}: {num_votes - before} of its {saved.num_rows} inputs are of test pairs of the data set"
        if num_votes == before:
            raise UserError(f"{known}; give outputs of its test split")
        if 2 * (num_votes - before) < num_puzzles:
            raise UserError(
                f"{known}: they are of another build, in which the puzzle identifiers mean other copies; give the data "
                "set that the outputs are of"
            )
    return votes


def _num_votes(votes: Votes, held_out: HeldOut) -> int:
    """Rows that were of a test pair."""
    return sum(votes.num_votes(task, pair.input) for task, pairs in held_out.tasks.items() for pair in pairs)
