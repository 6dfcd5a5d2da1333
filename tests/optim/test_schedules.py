"""Everything that changes over a run is a function of (step, total steps), exact at both ends."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.optim.schedules import anneal, first_step_at, warmup_cosine

SHAPES = ("linear", "cosine", "exponential")


def test_published_learning_rate():
    share = [warmup_cosine(s, 12, warmup_steps=3, min_ratio=0.1) for s in range(1, 13)]
    assert share[:3] == [1 / 3, 2 / 3, 1.0]
    assert share[3] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 9)))
    assert share[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(share[2:]))


def test_without_warmup_and_decay_it_is_constant():
    assert {warmup_cosine(s, 10, warmup_steps=0, min_ratio=1.0) for s in range(1, 11)} == {1.0}


def value(step, total_steps, shape, start=0.1, end=0.001, ratio=0.5):
    return anneal(step, total_steps, start=start, end=end, ratio=ratio, shape=shape)


@given(
    total_steps=st.integers(1, 10**6),
    ratio=st.floats(0, 1),
    start=st.floats(-10, 10),
    end=st.floats(-10, 10),
    shape=st.sampled_from(SHAPES),
)
def test_exact_at_both_ends_and_between_them_elsewhere(total_steps, ratio, start, end, shape):
    last = first_step_at(ratio, total_steps)
    if ratio > 0:
        assert value(0, total_steps, shape, start, end, ratio) == start
    assert value(last, total_steps, shape, start, end, ratio) == end
    assert value(total_steps, total_steps, shape, start, end, ratio) == end
    steps = range(0, total_steps, max(1, total_steps // 50))
    values = [value(step, total_steps, shape, start, end, ratio) for step in steps]
    low, high = min(start, end), max(start, end)
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in values)
    assert all((b - a) * (end - start) >= -1e-9 for a, b in pairwise(values))


@given(total_steps=st.integers(1, 10**6), data=st.data())
def test_a_ratio_of_whole_steps_ends_at_that_step(total_steps, data):
    last = data.draw(st.integers(1, total_steps))
    assert first_step_at(last / total_steps, total_steps) == last
    assert value(last, total_steps, "linear", 1, 0, last / total_steps) == 0
    assert value(last - 1, total_steps, "linear", 1, 0, last / total_steps) > 0


@pytest.mark.parametrize(("ratio", "last"), [(0.55, 55), (0.07, 7), (0.14, 14), (0.28, 28), (0.005, 1)])
def test_a_decimal_ratio_ends_where_one_expects(ratio, last):
    assert first_step_at(ratio, 100) == last
    assert value(last, 100, "linear", 1, 0, ratio) == 0


def test_shapes():
    assert value(25, 100, "linear", 0, 1) == 0.5
    assert value(25, 100, "cosine", 0, 1) == pytest.approx(0.5)
    assert value(25, 100, "exponential", 0, 1) == pytest.approx((1 - math.exp(-2.5)) / (1 - math.exp(-5)))
    # Half a cosine is smooth at both ends; the exponential is fast early.
    assert value(1, 100, "cosine", 0, 1) < value(1, 100, "linear", 0, 1) < value(1, 100, "exponential", 0, 1)
