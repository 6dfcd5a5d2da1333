"""Which examples a training step sees: arithmetic on (dataset, seed, step), with no state to save.

An epoch visits every group once, in an order drawn for that epoch, takes one puzzle of the group, drawn too, and
all of the puzzle's examples. The epochs follow one another in an endless stream; step s (counted from 1) takes
its positions (s-1)*B .. s*B. The published loader differs in one point: it cuts a puzzle's examples at a batch's
end and drops the rest, where here they go on in the next batch.

The draws are raw Philox words (Salmon et al. 2011) keyed by seed, purpose and counter: numpy promises that they
never change, which it does not for its shuffles.
"""

import numpy as np

from hrm_ray.data.shards import Split

PADDING = -1  # the id of an empty place in a partial batch

# What a stream of random words is for; part of the key, so that no two purposes share a stream.
_GROUP_ORDER, _PUZZLE_CHOICE, _EXPLORATION, _CHOICE, _REPLAY, _VISIT = range(6)


def _words(seed: int, purpose: int, counter: int, count: int) -> np.ndarray:
    """uint64[count], a pure function of the key (seed, purpose, counter)."""
    key = np.array([seed, purpose], dtype=np.uint64)
    position = np.array([0, 0, 0, counter], dtype=np.uint64)
    return np.random.Philox(key=key, counter=position).random_raw(count)


class Sampler:
    """Maps steps to example ids.

    Args:
        split: the training examples.
        seed: of the order.
        global_batch_size: examples a step, over all workers.
        num_examples: end of the stream, for a partial last batch; None: endless.
    """

    def __init__(self, split: Split, seed: int, global_batch_size: int, num_examples: int | None = None):
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._num_examples = num_examples
        self._puzzle_starts, self._group_starts = split.puzzle_starts, split.group_starts
        sizes = np.diff(self._puzzle_starts)
        # Puzzles of one size make epochs of one length, so that any position is found without a search.
        self._epoch_length = int(sizes[0]) * (len(self._group_starts) - 1) if np.ptp(sizes) == 0 else None
        self._epoch_ends = [0]  # of the epochs looked at so far, when their lengths differ
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def _epoch(self, epoch: int) -> np.ndarray:
        """Example ids of `epoch` in order, int64."""
        if self._cached[0] == epoch:
            return self._cached[1]
        num_groups = len(self._group_starts) - 1
        groups = np.argsort(_words(self._seed, _GROUP_ORDER, epoch, num_groups), kind="stable")
        num_puzzles = self._group_starts[groups + 1] - self._group_starts[groups]
        draws = _words(self._seed, _PUZZLE_CHOICE, epoch, num_groups)
        puzzles = self._group_starts[groups] + (draws % num_puzzles.astype(np.uint64)).astype(np.int64)
        starts = self._puzzle_starts[puzzles]
        sizes = self._puzzle_starts[puzzles + 1] - starts
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self._cached = (epoch, np.repeat(starts, sizes) + within)
        return self._cached[1]

    def _locate(self, position: int) -> tuple[int, int]:
        """(epoch, offset in it) of a position of the stream."""
        if self._epoch_length is not None:
            return divmod(position, self._epoch_length)
        while self._epoch_ends[-1] <= position:
            self._epoch_ends.append(self._epoch_ends[-1] + len(self._epoch(len(self._epoch_ends) - 1)))
        epoch = int(np.searchsorted(self._epoch_ends, position, side="right")) - 1
        return epoch, position - self._epoch_ends[epoch]

    def ids(self, step: int) -> np.ndarray:
        """Example ids of the global batch of `step` (from 1), int64 [global_batch_size]; `PADDING` after the end."""
        first = (step - 1) * self._global_batch_size
        last = first + self._global_batch_size
        if self._num_examples is not None:
            last = max(first, min(last, self._num_examples))
        ids = np.full(self._global_batch_size, PADDING, dtype=np.int64)
        filled, wanted = 0, last - first
        while filled < wanted:
            epoch, offset = self._locate(first + filled)
            part = self._epoch(epoch)[offset : offset + wanted - filled]
            ids[filled : filled + len(part)] = part
            filled += len(part)
        return ids


def min_halt_steps(
    seed: int, step: int, global_batch_size: int, *, exploration_prob: float, halt_max_steps: int
) -> np.ndarray:
    """The earliest ACT step at which each global slot may halt at training step `step`, int32 [global_batch_size].

    With probability `exploration_prob` uniform over 2..halt_max_steps, else 0 (free to halt).
    """
    if halt_max_steps < 2:
        return np.zeros(global_batch_size, np.int32)
    draws = _words(seed, _EXPLORATION, step, 2 * global_batch_size).reshape(2, -1)
    explores = _as_uniform(draws[0]) < exploration_prob
    minimum = 2 + (draws[1] % np.uint64(halt_max_steps - 1)).astype(np.int32)
    return np.where(explores, minimum, 0).astype(np.int32)


def choice_draws(seed: int, step: int, global_batch_size: int) -> np.ndarray:
    """A number from [0, 1) for each global slot at training step `step`, float32: whether the slot halts."""
    return _as_uniform(_words(seed, _CHOICE, step, global_batch_size)).astype(np.float32)


def replay_draws(seed: int, step: int, global_batch_size: int, count: int) -> np.ndarray:
    """`count` numbers from [0, 1) for each global slot at `step`, float32 [slots, count]: what is remembered."""
    words = _words(seed, _REPLAY, step, global_batch_size * count)
    return _as_uniform(words).astype(np.float32).reshape(-1, count)


def _as_uniform(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(11)) * 2.0**-53


def visit_draws(seed: int, step: int, global_batch_size: int) -> np.ndarray:
    """A random uint64 for every slot's example at `step`, by which a task may vary it; [global_batch_size]."""
    return _words(seed, _VISIT, step, global_batch_size)
