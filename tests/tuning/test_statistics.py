"""The confidence interval of a mean."""

import math

import pytest
import scipy.stats

from hrm_ray.tuning.statistics import confidence


def test_one_to_five():
    """The 97.5 % quantile of Student's t with 4 degrees of freedom is 2.776, as in printed tables."""
    mean, std, half_width = confidence([1, 2, 3, 4, 5])
    assert mean == 3
    assert std == pytest.approx(math.sqrt(2.5))
    assert half_width == pytest.approx(2.7764451 * math.sqrt(2.5 / 5))


@pytest.mark.parametrize("values", [[0.1, 0.4], [0.9, 0.91, 0.97], [-3.0, 5.0, 1e3, 2.0]])
def test_is_that_of_scipy(values):
    mean, _, half_width = confidence(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=mean, scale=scipy.stats.sem(values))
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))


def test_equal_values():
    assert confidence([0.5, 0.5, 0.5]) == (0.5, 0.0, 0.0)


def test_one_value_has_none():
    with pytest.raises(ValueError, match="at least two"):
        confidence([1.0])
