"""Means with intervals, and where a curve meets a level."""

import numpy as np
import pytest
from scipy import stats

from experiments.clip.study.intervals import Interval, crossing, half_width, interval


def test_interval_is_student_s():
    values = np.array([1.0, 2.0, 4.0, 5.0])
    low, high = stats.t.interval(0.95, 3, loc=3.0, scale=stats.sem(values))
    assert interval(values) == pytest.approx((3.0, low, high))
    assert half_width(values, 0.5) == pytest.approx(stats.t.interval(0.5, 3, scale=stats.sem(values))[1])
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


def test_one_number_has_no_interval():
    mean, low, high = interval(np.array([2.0]))
    assert mean == 2.0 and np.isnan(low) and np.isnan(high)


def test_crossing_interpolates_in_the_logarithm():
    numbers = np.array([10.0, 100.0, 1000.0])
    assert crossing(numbers, np.array([1.0, -1.0, -2.0])) == pytest.approx(10**1.5)
    assert crossing(numbers, np.array([-1.0, 1.0, 1.0])) == 10.0
    assert crossing(numbers, np.array([3.0, 2.0, 1.0])) is None
