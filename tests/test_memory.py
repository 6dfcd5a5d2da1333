"""Freed memory that is kept. (What is said where there is too little: training/test_memory.py.)"""

import os
import platform
import subprocess
import sys

import pytest

from hrm_ray import memory

# 256 MiB, freed at once, twice. By numpy: torch aligns its memory, for which old versions of glibc leave gaps.
ALLOCATES_AGAIN = """
import resource, sys, threading, numpy
from hrm_ray import memory
says = memory.keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.ones(2**25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def compare():
    first, again = faults(), faults()
    print(says, again < first / 10)
if sys.argv[1] == "first":
    compare()
else:
    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
"""


def what_is_kept(environment: dict[str, str], thread: str) -> list[str]:
    """Whether a process says that it keeps memory, and whether it does."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", ALLOCATES_AGAIN, thread]
    done = subprocess.run(command, env=others | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="nothing is done there")


@on_glibc
@pytest.mark.parametrize(
    ("tuned", "is_kept"),
    [
        ({}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "1000000"}, False),
        ({"MALLOC_MMAP_MAX_": "9"}, False),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"}, False),
        ({"GLIBC_TUNABLES": "glibc.pthread.rseq=1"}, True),
    ],
)
def test_freed_memory_is_kept_unless_the_user_tunes_it(tuned, is_kept):
    assert what_is_kept(tuned, "first") == [str(is_kept)] * 2


@on_glibc
def test_another_thread_keeps_memory_with_one_arena_only():
    assert what_is_kept({}, "another") == ["True", "False"]
    assert what_is_kept(memory.ONE_ARENA, "another") == ["True", "True"]


def test_without_glibc_nothing_is_done(monkeypatch):
    asked = []
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: asked.append(name) or object())
    assert not memory.keep_memory()
    assert asked == [None]
