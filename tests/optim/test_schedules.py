"""The published learning-rate schedule."""

import math
from itertools import pairwise

import pytest

from hrm_ray.optim.schedules import warmup_cosine


def test_values():
    share = [warmup_cosine(s, 12, warmup_steps=3, min_ratio=0.1) for s in range(1, 13)]
    assert share[:3] == [1 / 3, 2 / 3, 1.0]
    assert share[3] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 9)))
    assert share[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(share[2:]))


def test_without_warmup_and_decay_it_is_constant():
    assert {warmup_cosine(s, 10, warmup_steps=0, min_ratio=1.0) for s in range(1, 11)} == {1.0}
