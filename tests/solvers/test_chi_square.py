"""The active set of chi-square against a sort of the losses, which tries every support."""

import numpy as np
import pytest
from problems import normalized_rows

from drrho import ChiSquare
from drrho.solvers.chi_square import chi_square_ball, chi_square_penalty

LOSSES = np.random.default_rng(0).exponential(size=(4, 25))
D = (LOSSES - LOSSES.max(1, keepdims=True)) / np.ptp(LOSSES, axis=1)[:, None]


def ratios(dual, row):
    return np.maximum(1 + (D[row] - dual.threshold[row]) / dual.strength[row], 0)


@pytest.mark.parametrize("strength", [0.01, 0.3, 5.0])
def test_the_penalty_projects_on_the_simplex(strength):
    dual = chi_square_penalty(ChiSquare(), normalized_rows(LOSSES), np.full(4, strength)).dual
    for row in range(4):
        best = np.sort(D[row] / (25 * strength))[::-1]
        excess = (np.cumsum(best) - 1) / np.arange(1, 26)
        cut = excess[np.flatnonzero(best > excess)[-1]]
        expected = np.maximum(D[row] / (25 * strength) - cut, 0)
        np.testing.assert_allclose(ratios(dual, row) / 25, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("radius", [1e-10, 0.05, 0.5, 3.0])
def test_the_ball_is_exhausted(radius):
    dual = chi_square_ball(ChiSquare(), normalized_rows(LOSSES), np.full(4, radius)).dual
    for row in range(4):
        t = ratios(dual, row)
        np.testing.assert_allclose(t.mean(), 1, rtol=1e-12)
        np.testing.assert_allclose(np.square(t - 1).mean() / 2, radius, rtol=1e-9)


def test_a_long_row_ends_at_the_same_support():
    losses = np.random.default_rng(1).exponential(size=(1, 200_000))
    dual = chi_square_ball(ChiSquare(), normalized_rows(losses), np.array([4.0])).dual
    d = (losses - losses.max()) / np.ptp(losses)
    t = np.maximum(1 + (d - dual.threshold) / dual.strength, 0)
    np.testing.assert_allclose([t.mean(), np.square(t - 1).mean() / 2], [1, 4], rtol=1e-10)
