"""No word and no file of a user's ends a command in anything but success or one clear line."""

import pytest

from tests.fuzz import fuzz


@pytest.mark.timeout(1800)  # less than a minute on two free cores
def test_words_and_damaged_files_end_in_success_or_one_line():
    counts, failures = fuzz(seed=0, count=5_000)
    assert not failures, "\n".join(failures)
    assert counts["done"] > 500 and counts["refused"] > 500
