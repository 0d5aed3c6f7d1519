"""The safeguarded Newton against bisection in scipy, on functions with plateaus and jumps in slope."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from drrho.solvers.root import EPS, Bracket, Residual, Safeguard, find_root


class Falling:
    """A sum of falling sigmoids, steep ones and flat ones: between them there are plateaus."""

    def __init__(self, seed, rows):
        rng = np.random.default_rng(seed)
        self.centers = rng.uniform(-40, 40, size=(rows, 4))
        self.widths = 10.0 ** rng.uniform(-2, 1, size=(rows, 4))
        self.level = rng.uniform(-3.5, 3.5, size=rows)
        self.calls = 0

    def values(self, x, row=slice(None)):
        return -np.tanh((x[..., None] - self.centers[row]) / self.widths[row]).sum(-1) - self.level[row]

    def __call__(self, x):
        self.calls += 1
        inner = (x[:, None] - self.centers) / self.widths
        with np.errstate(all="ignore"):
            slope = -(1 / np.cosh(inner) ** 2 / self.widths).sum(-1)
            return Residual(self.values(x), -self.values(x) / slope)

    def alone(self, row):
        one = object.__new__(Falling)
        one.calls = 0
        one.centers, one.widths, one.level = self.centers[[row]], self.widths[[row]], self.level[[row]]
        return one


def guard(rows, iterations=300, failure="no root", newton_iterations=40, **rest):
    return Safeguard(np.full(rows, 1e-12), iterations, failure, newton_iterations, (10.0, 10.0), **rest)


def root_of(function, rows, **options):
    with np.errstate(all="ignore"):
        return find_root(function, np.zeros(rows), Bracket.open(rows), guard(rows, **options))


@given(seed=st.integers(0, 10**6))
@settings(derandomize=True, deadline=None, max_examples=80, database=None)
def test_roots_are_those_of_bisection(seed):
    function = Falling(seed, 5)
    found = root_of(function, 5)
    assert not found.saturated.any()
    for row in range(5):
        expected = brentq(lambda x, row=row: float(function.values(np.array(x), row)), -1e3, 1e3, xtol=1e-14)
        at_root = abs(function.values(found.x[row], row))
        assert at_root <= 1e-12 or abs(found.x[row] - expected) <= 1e-13 * max(1, abs(expected))


@given(seed=st.integers(0, 10**6))
@settings(derandomize=True, deadline=None, max_examples=20, database=None)
def test_rows_of_a_batch_are_solved_as_alone(seed):
    function = Falling(seed, 4)
    together = root_of(function, 4).x
    assert together.tolist() == [root_of(function.alone(row), 1).x[0] for row in range(4)]


def test_a_line_takes_one_step():
    calls = []

    def line(x):
        calls.append(x)
        return Residual(3.0 - x, 3.0 - x)

    assert root_of(line, 1).x == [3.0]
    assert len(calls) == 2


def test_a_root_beyond_an_end_is_saturated_there():
    found = root_of(lambda x: Residual(50.0 - x, 50.0 - x), 1, ends=(-np.inf, 20.0))
    assert found.x == [20.0]
    assert found.saturated.all()


def test_a_useless_step_leaves_bisection():
    function = Falling(3, 2)

    def blind(x):
        value, _, _ = function(x)
        return Residual(value, np.full_like(x, np.nan))

    np.testing.assert_allclose(root_of(blind, 2).x, root_of(function, 2).x, rtol=0, atol=1e-9)


def test_without_a_root_the_failure_is_raised_or_x_returned():
    def drifting(x):
        return Residual(np.ones_like(x), np.ones_like(x))

    with pytest.raises(RuntimeError, match="no root"):
        root_of(drifting, 2, iterations=5)
    assert root_of(drifting, 2, iterations=5, failure=None).x.tolist() == [4.0, 4.0]


def test_where_a_function_jumps_over_zero_x_from_above_is_below_it():
    def jump(x):
        return Residual(np.where(x < 1.0, 1.0, -1.0), np.full_like(x, np.nan))

    with np.errstate(all="ignore"):
        x = find_root(jump, np.zeros(1), Bracket.open(1), guard(1), from_above=True).x
    assert 1.0 <= x[0] <= 1.0 + 8 * EPS


def test_rows_that_are_not_ready_wait():
    seen = []

    def late(x):
        seen.append(x.copy())
        return Residual(2.0 - x, 2.0 - x, np.array([True, len(seen) > 3]))

    assert root_of(late, 2).x.tolist() == [2.0, 2.0]
    assert [x[1] for x in seen] == [0.0, 0.0, 0.0, 0.0, 2.0]


def test_the_last_step_is_followed_and_not_evaluated():
    steps = []

    def almost(x):
        return Residual(1e-10 - x, 1e-10 - x)

    with np.errstate(all="ignore"):
        found = find_root(
            almost, np.zeros(1), Bracket.open(1), guard(1), finish=lambda step, done: steps.append((step[0], done[0]))
        )
    assert found.x == [1e-10]
    assert steps == [(1e-10, False)]
