"""What is made ahead is what would be made when it is asked for."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.data.prefetch import Prefetcher


@given(st.lists(st.integers(0, 5), max_size=20))
def test_keys_may_be_asked_for_in_any_order(keys):
    prefetcher = Prefetcher(lambda key: key * 10, last=4)
    assert [prefetcher.get(key) for key in keys] == [key * 10 for key in keys]


def test_the_next_is_made_before_it_is_asked_for_and_once():
    made, is_made = [], threading.Event()

    def make(key: int) -> int:
        made.append(key)
        if key == 8:
            is_made.set()
        return key

    prefetcher = Prefetcher(make, last=8)
    assert prefetcher.get(7) == 7
    assert prefetcher.get(7) == 7
    assert is_made.wait(60)
    assert prefetcher.get(8) == 8
    assert made == [7, 8]


def test_a_failure_is_raised_where_its_value_is_asked_for_and_may_pass():
    failures = [OSError("no such page")]

    def make(key: int) -> int:
        if key == 2 and failures:
            raise failures.pop()
        return key

    prefetcher = Prefetcher(make, last=3)
    assert prefetcher.get(1) == 1
    with pytest.raises(OSError, match="no such page"):
        prefetcher.get(2)
    assert [prefetcher.get(2), prefetcher.get(3)] == [2, 3]


def test_its_thread_ends_with_it():
    threads = []

    def make(key: int) -> int:
        threads.append(threading.current_thread())
        return key

    prefetcher = Prefetcher(make, last=9)
    prefetcher.get(1)
    del prefetcher
    threads[0].join(60)
    assert not threads[0].is_alive()
