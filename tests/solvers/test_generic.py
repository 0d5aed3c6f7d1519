"""Threshold and strength of any phi: the ratios' mean is one, their divergence the radius."""

import numpy as np
import pytest
import torch
from families import USERS
from problems import normalized_rows

from drrho import Divergence
from drrho.solvers.generic import generic_ball, generic_penalty

LOSSES = np.random.default_rng(0).normal(size=(3, 50))
every_user = pytest.mark.parametrize("name", USERS)


def ratios_of(rows, found):
    (block,) = rows.blocks()
    return found.tilt.ratio(block.d, found.tilt.tilt(block.d))


@every_user
def test_the_ball_is_exhausted(name):
    rows, radius, divergence = normalized_rows(LOSSES), np.array([1e-3, 0.02, 0.15]), USERS[name].divergence
    found = generic_ball(divergence, rows, radius)
    ratios = ratios_of(rows, found)
    np.testing.assert_allclose(ratios.mean(1), 1, rtol=1e-11)
    np.testing.assert_allclose(divergence.phi(ratios).mean(1), radius, rtol=1e-9)
    np.testing.assert_allclose(found.dual.distance, radius, rtol=1e-11)


@every_user
def test_the_penalty_s_ratios_have_mean_one_at_the_strength_given(name):
    rows, strength = normalized_rows(LOSSES), np.array([0.05, 1.0, 1e4])
    found = generic_penalty(USERS[name].divergence, rows, strength)
    np.testing.assert_allclose(ratios_of(rows, found).mean(1), 1, rtol=1e-9)  # the certificate divides by the mean
    np.testing.assert_allclose(found.dual.strength, strength, rtol=1e-14)


@pytest.mark.slow
@every_user
def test_rows_of_a_batch_are_solved_as_alone(name):
    divergence, radius = USERS[name].divergence, np.array([1e-6, 0.02, 0.3])
    together = generic_ball(divergence, normalized_rows(LOSSES), radius).dual
    for row in range(3):
        alone = generic_ball(divergence, normalized_rows(LOSSES[[row]]), radius[[row]]).dual
        np.testing.assert_allclose(together.strength[row], alone.strength[0], rtol=1e-7)


@pytest.mark.slow
def test_a_phi_whose_ratios_jump_is_refused():
    class Jumps(Divergence):
        def phi(self, t):
            return torch.where(t < 0, torch.inf, (t - 1).abs())

        def conjugate(self, s):
            return torch.where(s > 1, torch.inf, s.clamp(min=-1))

        def conjugate_gradient(self, s):
            return (s >= -1).to(s.dtype)

    with pytest.raises(RuntimeError, match="strictly convex"):
        generic_ball(Jumps(), normalized_rows(LOSSES), np.full(3, 0.1))
