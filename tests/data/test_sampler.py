"""Steps to examples: every group once an epoch, nothing but arithmetic."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.sampler import PADDING, Sampler, filled_cells
from hrm_ray.halting.act import min_halt_steps


def split(examples_per_puzzle: list[list[int]]) -> SimpleNamespace:
    """Groups as lists of their puzzles' sizes."""
    sizes = [size for group in examples_per_puzzle for size in group]
    return SimpleNamespace(
        puzzle_starts=np.cumsum([0, *sizes]), group_starts=np.cumsum([0, *map(len, examples_per_puzzle)])
    )


GROUPS = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=9)


@settings(deadline=None)
@given(GROUPS, st.integers(0, 2**40), st.integers(1, 12))
def test_an_epoch_takes_one_whole_puzzle_of_every_group(groups, seed, batch_size):
    data = split(groups)
    sampler = Sampler(data, seed, batch_size)
    stream = np.concatenate([sampler.ids(step) for step in range(1, 60)])
    position = 0
    puzzle_of = np.repeat(np.arange(len(data.puzzle_starts) - 1), np.diff(data.puzzle_starts))
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    for _ in range(2):
        seen = []
        for _ in groups:
            if position >= len(stream):
                return
            puzzle = puzzle_of[stream[position]]
            whole = np.arange(*data.puzzle_starts[puzzle : puzzle + 2])
            part = stream[position : position + len(whole)]
            np.testing.assert_array_equal(part, whole[: len(part)])
            position += len(whole)
            seen.append(group_of[puzzle])
        assert position > len(stream) or sorted(seen) == list(range(len(groups)))


@settings(deadline=None)
@given(GROUPS, st.integers(0, 2**40), st.integers(1, 12), st.permutations(range(1, 9)))
def test_any_step_can_be_asked_for_in_any_order(groups, seed, batch_size, steps):
    sampler = Sampler(split(groups), seed, batch_size)
    in_order = {step: Sampler(split(groups), seed, batch_size).ids(step) for step in sorted(steps)}
    for step in steps:
        np.testing.assert_array_equal(sampler.ids(step), in_order[step])


def test_epochs_and_seeds_differ():
    data = split([[1]] * 100)
    sampler = Sampler(data, 0, 100)
    assert not np.array_equal(sampler.ids(1), sampler.ids(2))
    assert not np.array_equal(sampler.ids(1), Sampler(data, 1, 100).ids(1))


def test_all_puzzles_of_a_group_get_their_turn():
    sampler = Sampler(split([[1] * 8] * 50), 0, 50)
    seen = np.unique(np.concatenate([sampler.ids(step) for step in range(1, 60)]))
    assert len(seen) == 400


def test_order_never_changes():
    """Frozen: a change here would change every continued run."""
    assert Sampler(split([[1] * 3] * 6), 7, 6).ids(1).tolist() == [14, 5, 9, 7, 17, 0]
    drawn = min_halt_steps(7, 3, 8, exploration_prob=0.5, halt_max_steps=16)
    assert drawn.tolist() == [10, 8, 5, 12, 13, 14, 0, 0]
    assert np.packbits(filled_cells(7, 3, 2, 16, 0.5), axis=1).tolist() == [[63, 207], [0, 0]]


def test_partial_last_batch():
    sampler = Sampler(split([[1]] * 10), 0, 4, num_examples=10)
    ids = np.concatenate([sampler.ids(step) for step in range(1, 4)])
    assert sorted(ids[:10]) == list(range(10))
    assert (ids[10:] == PADDING).all()


@pytest.mark.parametrize("prob", [0.0, 0.1, 1.0])
def test_exploration(prob):
    drawn = np.concatenate(
        [min_halt_steps(1, s, 500, exploration_prob=prob, halt_max_steps=8) for s in range(40)]
    )
    explores = drawn > 0
    assert explores.mean() == pytest.approx(prob, abs=0.01)
    if prob:
        values, counts = np.unique(drawn[explores], return_counts=True)
        assert values.tolist() == list(range(2, 9))
        assert counts / counts.sum() == pytest.approx(np.full(7, 1 / 7), abs=0.02)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.7, 1.0])
def test_cells_are_filled_in_by_a_share_of_each_puzzle(share):
    filled = filled_cells(1, 5, 4000, 200, share)
    assert filled.shape == (4000, 200) and filled.dtype == bool
    by_puzzle = filled.mean(1)
    assert by_puzzle.mean() == pytest.approx(share, abs=0.01)
    least, most = max(0, 2 * share - 1), min(1, 2 * share)
    # Evenly over the whole range: the deviation of that, and of so many cells by themselves.
    expected = np.sqrt((most - least) ** 2 / 12 + share * (1 - share) / 200)
    assert by_puzzle.std() == pytest.approx(expected, abs=0.01)
    assert least - 0.15 < by_puzzle.min() and by_puzzle.max() < most + 0.15
    assert filled.mean(0) == pytest.approx(np.full(200, share), abs=0.04)  # no cell is preferred


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 2**40), st.integers(1, 8), st.floats(0, 1), st.floats(0, 1))
def test_what_is_filled_in_at_a_share_is_so_at_a_larger_one_too(seed, step, size, share, other):
    """And it is a function of its key alone."""
    less, more = (filled_cells(seed, step, size, 9, s) for s in sorted((share, other)))
    assert not (less & ~more).any()
    np.testing.assert_array_equal(less, filled_cells(seed, step, size, 9, min(share, other)))
    assert not filled_cells(seed, step, size, 9, 0.0).any() and filled_cells(seed, step, size, 9, 1.0).all()


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=20),
    st.integers(1, 3),
    st.floats(0.01, 0.99),
    st.integers(0, 2**40),
    st.integers(1, 12),
)
def test_the_easiest_are_visited_evenly(ratings, size, share, seed, batch_size):
    """Each group has two puzzles of `size` examples; with all of them the order is that without a curriculum."""
    data = split([[size, size]] * len(ratings))
    data.ratings = np.array(ratings)
    sampler, num_groups = Sampler(data, seed, batch_size), len(ratings)
    steps = range(1, -(-num_groups * size // batch_size) + 1)
    epoch = np.concatenate([sampler.ids(step, share) for step in steps])[: num_groups * size]
    by_puzzle = epoch.reshape(num_groups, size)
    assert (np.diff(by_puzzle, axis=1) == 1).all() and (by_puzzle[:, 0] % size == 0).all()  # whole ones
    visits = np.bincount(by_puzzle[:, 0] // (2 * size), minlength=num_groups)
    easy = np.argsort(ratings, kind="stable")[: max(1, round(share * num_groups))]
    assert np.ptp(visits[easy]) <= 1 and visits[easy].min() >= 1 and visits.sum() == visits[easy].sum()
    without = Sampler(split([[size, size]] * num_groups), seed, batch_size)
    for step in steps:
        fresh = Sampler(data, seed, batch_size)
        np.testing.assert_array_equal(sampler.ids(step, share), fresh.ids(step, share))
        np.testing.assert_array_equal(fresh.ids(step, 1.0), without.ids(step))
