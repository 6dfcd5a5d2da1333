"""What is made ahead is what would be made when it is asked for."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.data.prefetch import Prefetcher


@given(st.lists(st.integers(0, 5), max_size=20))
def test_keys_may_be_asked_for_in_any_order(keys):
    prefetcher = Prefetcher(lambda key: key * 10)
    assert [prefetcher.get(key) for key in keys] == [key * 10 for key in keys]


def test_the_next_is_made_before_it_is_asked_for_and_once():
    made, is_made = [], threading.Event()

    def make(key: int) -> int:
        made.append(key)
        if key == 8:
            is_made.set()
        return key

    prefetcher = Prefetcher(make)
    assert prefetcher.get(7) == 7
    assert is_made.wait(60)
    assert prefetcher.get(8) == 8
    assert made.count(7) == made.count(8) == 1


def test_a_failure_is_raised_where_its_value_is_asked_for():
    def make(key: int) -> int:
        if key == 2:
            raise OSError("no such page")
        return key

    prefetcher = Prefetcher(make)
    assert prefetcher.get(1) == 1
    with pytest.raises(OSError, match="no such page"):
        prefetcher.get(2)
    assert prefetcher.get(3) == 3
