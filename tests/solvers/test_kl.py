"""The KL ball and penalty in normalized units, from their definitions."""

import numpy as np
import pytest
from problems import normalized_rows
from scipy.special import logsumexp

from drrho import KL
from drrho.solvers.kl import kl_ball, kl_penalty

RNG = np.random.default_rng(0)
LOSSES = np.stack([RNG.normal(size=60), RNG.exponential(size=60), np.round(RNG.normal(size=60))])
D = (LOSSES - LOSSES.max(1, keepdims=True)) / np.ptp(LOSSES, axis=1)[:, None]


@pytest.mark.parametrize("radius", [1e-14, 1e-6, 0.05, 1.0])
def test_the_ball_is_exhausted(radius):
    dual = kl_ball(KL(), normalized_rows(LOSSES), np.full(3, radius)).dual
    x = D / dual.strength[:, None]
    log_ratio = x - (logsumexp(x, axis=1, keepdims=True) - np.log(60))
    if radius > 1e-10:  # below, this sum of its definition cancels
        np.testing.assert_allclose((np.exp(log_ratio) * log_ratio).mean(1), radius, rtol=1e-8)
    np.testing.assert_allclose(dual.distance, radius, rtol=1e-10)
    np.testing.assert_allclose(dual.threshold, dual.strength * (logsumexp(x, axis=1) - np.log(60)), rtol=1e-8)
    assert not dual.saturated.any()


def test_the_penalty_has_the_threshold_of_a_logsumexp():
    strength = np.array([1e-3, 0.2, 50.0])
    dual = kl_penalty(KL(), normalized_rows(LOSSES), strength).dual
    expected = strength * (logsumexp(D / strength[:, None], axis=1) - np.log(60))
    np.testing.assert_allclose(dual.threshold, expected, rtol=1e-12)


def test_rows_about_the_mean_and_about_the_maximum_are_solved_as_alone():
    radius = np.array([1e-4, 3.9, 0.5])  # the second is far from its mean
    together = kl_ball(KL(), normalized_rows(LOSSES), radius).dual
    for row in range(3):
        alone = kl_ball(KL(), normalized_rows(LOSSES[[row]]), radius[[row]]).dual
        np.testing.assert_allclose(together.strength[row], alone.strength[0], rtol=1e-10)


def test_a_long_row_that_starts_from_a_part_exhausts_its_ball():
    losses = np.random.default_rng(1).normal(size=(1, 200_000))
    dual = kl_ball(KL(), normalized_rows(losses), np.array([0.3])).dual
    x = (losses - losses.max()) / np.ptp(losses) / dual.strength[0]
    log_ratio = x - (logsumexp(x) - np.log(losses.size))
    np.testing.assert_allclose((np.exp(log_ratio) * log_ratio).mean(), 0.3, rtol=1e-10)
