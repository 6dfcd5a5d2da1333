"""Steps to examples: every group once an epoch, nothing but arithmetic."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.data.sampler import PADDING, Sampler
from hrm_ray.halting.act import min_halt_steps


def split(examples_per_puzzle: list[list[int]]) -> SimpleNamespace:
    """Groups as lists of their puzzles' sizes."""
    sizes = [size for group in examples_per_puzzle for size in group]
    return SimpleNamespace(
        puzzle_starts=np.cumsum([0, *sizes]), group_starts=np.cumsum([0, *map(len, examples_per_puzzle)])
    )


GROUPS = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=9)


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
