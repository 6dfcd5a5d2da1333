"""Which examples a training step sees: arithmetic on (dataset, seed, step), with no state to save.

An epoch visits every group once, in an order drawn for that epoch, takes one puzzle of the group, drawn too, and
all of the puzzle's examples. The epochs follow one another in an endless stream; step s (counted from 1) takes
its positions (s-1)*B .. s*B. The published loader differs in one point: it cuts a puzzle's examples at a batch's
end and drops the rest, where here they go on in the next batch.

Of a share of the easiest groups (`curriculum.rating`) each is visited more often instead: a step with the share p maps
every group, by its rank in difficulty, onto the first p of them. An epoch stays as long, and at p = 1 its order is that
without a curriculum.
"""

from functools import cached_property

import numpy as np

from hrm_ray.data.shards import Split
from hrm_ray.draws import Purpose, uniform, words

PADDING = -1  # the id of an empty place in a partial batch


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
        self._split = split
        self._epoch_ends = [0]  # of the epochs looked at so far, when their lengths differ
        self._orders: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0, np.int64), np.empty(0, np.uint64))
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The groups of `epoch` in order, int64, and for each a random number that chooses its puzzle, uint64."""
        if self._orders[0] != epoch:
            num_groups = len(self._group_starts) - 1
            groups = np.argsort(words(self._seed, Purpose.GROUP_ORDER, epoch, num_groups), kind="stable")
            self._orders = epoch, groups, words(self._seed, Purpose.PUZZLE_CHOICE, epoch, num_groups)
        return self._orders[1:]

    def _chosen(self, groups: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """A puzzle of each of `groups`, int64."""
        num_puzzles = self._group_starts[groups + 1] - self._group_starts[groups]
        return self._group_starts[groups] + (draws % num_puzzles.astype(np.uint64)).astype(np.int64)

    def _epoch(self, epoch: int) -> np.ndarray:
        """Example ids of `epoch` in order, int64."""
        if self._cached[0] == epoch:
            return self._cached[1]
        puzzles = self._chosen(*self._order(epoch))
        starts = self._puzzle_starts[puzzles]
        sizes = self._puzzle_starts[puzzles + 1] - starts
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self._cached = (epoch, np.repeat(starts, sizes) + within)
        return self._cached[1]

    @cached_property
    def _by_rating(self) -> tuple[np.ndarray, np.ndarray]:
        """The groups from easy to hard, and the place of each in that order, int64 both."""
        assert self._split.ratings is not None and self._epoch_length is not None
        groups = np.argsort(self._split.ratings, kind="stable")
        return groups, np.argsort(groups)

    def _easier(self, epoch: int, offset: int, count: int, share: float) -> np.ndarray:
        """As `_epoch`, at most `count` ids from `offset` on, of the easiest `share` of the groups."""
        assert self._epoch_length is not None
        size = self._epoch_length // (len(self._group_starts) - 1)
        places = np.arange(offset, min(offset + count, self._epoch_length))
        groups, draws = (values[places // size] for values in self._order(epoch))
        by_rating, rank = self._by_rating
        num_easy = max(1, round(share * len(rank)))
        groups = by_rating[rank[groups] * num_easy // len(rank)]
        return self._puzzle_starts[self._chosen(groups, draws)] + places % size

    def _locate(self, position: int) -> tuple[int, int]:
        """(epoch, offset in it) of a position of the stream."""
        if self._epoch_length is not None:
            return divmod(position, self._epoch_length)
        while self._epoch_ends[-1] <= position:
            self._epoch_ends.append(self._epoch_ends[-1] + len(self._epoch(len(self._epoch_ends) - 1)))
        epoch = int(np.searchsorted(self._epoch_ends, position, side="right")) - 1
        return epoch, position - self._epoch_ends[epoch]

    def ids(self, step: int, share: float = 1.0) -> np.ndarray:
        """Example ids of the global batch of `step` (from 1), int64 [global_batch_size]; `PADDING` after the end.

        Args:
            share: of the groups, the easiest, from which they are.
        """
        first = (step - 1) * self._global_batch_size
        last = first + self._global_batch_size
        if self._num_examples is not None:
            last = max(first, min(last, self._num_examples))
        ids = np.full(self._global_batch_size, PADDING, dtype=np.int64)
        filled, wanted = 0, last - first
        while filled < wanted:
            epoch, offset = self._locate(first + filled)
            if share < 1:
                part = self._easier(epoch, offset, wanted - filled, share)
            else:
                part = self._epoch(epoch)[offset : offset + wanted - filled]
            ids[filled : filled + len(part)] = part
            filled += len(part)
        return ids


def visit_draws(seed: int, step: int, global_batch_size: int) -> np.ndarray:
    """A random uint64 for every slot's example at `step`, by which a task may vary it; [global_batch_size]."""
    return words(seed, Purpose.VISIT, step, global_batch_size)


def filled_cells(seed: int, step: int, global_batch_size: int, seq_len: int, share: float) -> np.ndarray:
    """Which cells of every slot's question are to be filled in at `step`; bool [global_batch_size, seq_len].

    For every puzzle a share is drawn, evenly from as wide a range around `share` (0 to 1) as there is, and then every
    cell by itself. Without the former all puzzles of a step would be about equally hard (of 45 blanks, 31 or 32 +- 3
    filled in at a share of 0.7). So harder ones come from the start and easy ones until the end, and no step is a jump.
    """
    draws = uniform(words(seed, Purpose.FILLING, step, global_batch_size * (1 + seq_len)))
    draws = draws.reshape(global_batch_size, 1 + seq_len)
    shares = share + min(share, 1 - share) * (2 * draws[:, :1] - 1)
    return draws[:, 1:] < shares
