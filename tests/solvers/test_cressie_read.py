"""Ratios on the path of powers have mean one, and their divergence is the radius."""

import numpy as np
import pytest
from problems import normalized_rows

from drrho import CressieRead
from drrho.solvers.cressie_read import cressie_read_ball, cressie_read_penalty

LOSSES = np.random.default_rng(0).normal(size=(3, 50))
every_order = pytest.mark.parametrize("order", [3.0, 1.5, 0.5, 0.1, 0.0, -1.0])


def ratios_of(rows, found):
    (block,) = rows.blocks()
    return found.tilt.ratio(block.d, found.tilt.tilt(block.d)), block.d


@every_order
def test_the_ball_is_exhausted(order):
    rows, radius, divergence = normalized_rows(LOSSES), np.array([1e-5, 0.02, 0.15]), CressieRead(order)
    found = cressie_read_ball(divergence, rows, radius)
    ratios, d = ratios_of(rows, found)
    np.testing.assert_allclose(ratios.mean(1), 1, rtol=1e-12)
    np.testing.assert_allclose(divergence.phi(ratios).mean(1), radius, rtol=1e-9)
    s = (d.numpy() - found.dual.threshold[:, None]) / found.dual.strength[:, None]
    conjugate = divergence.conjugate_gradient(d.new_tensor(s))
    np.testing.assert_allclose(ratios, conjugate, rtol=1e-7, atol=1e-12)


@every_order
def test_the_penalty_s_ratios_are_those_of_its_multipliers(order):
    rows, strength, divergence = normalized_rows(LOSSES), np.array([0.1, 1.0, 1e3]), CressieRead(order)
    found = cressie_read_penalty(divergence, rows, strength)
    ratios, d = ratios_of(rows, found)
    np.testing.assert_allclose(ratios.mean(1), 1, rtol=1e-12)
    s = (d.numpy() - found.dual.threshold[:, None]) / strength[:, None]
    np.testing.assert_allclose(ratios, divergence.conjugate_gradient(d.new_tensor(s)), rtol=1e-9, atol=1e-12)
    assert found.dual.strength == pytest.approx(strength, rel=1e-14)


@every_order
def test_rows_of_a_batch_are_solved_as_alone(order):
    divergence, radius = CressieRead(order), np.array([1e-8, 0.02, 0.3])  # about the mean, and about the maximum
    together = cressie_read_ball(divergence, normalized_rows(LOSSES), radius).dual
    for row in range(3):
        alone = cressie_read_ball(divergence, normalized_rows(LOSSES[[row]]), radius[[row]]).dual
        np.testing.assert_allclose(together.strength[row], alone.strength[0], rtol=1e-9)
        np.testing.assert_allclose(together.threshold[row], alone.threshold[0], rtol=1e-9)
