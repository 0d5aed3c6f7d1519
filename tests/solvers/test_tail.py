"""Selection against a sort: the tail's ratios, and the mass that total variation moves."""

import numpy as np
import pytest
import torch
from problems import normalized_rows, tensor

from drrho import TotalVariation
from drrho.solvers.tail import tail, total_variation_ball, total_variation_penalty

LOSSES = np.round(np.random.default_rng(0).normal(size=(3, 20)), 1)  # with ties


def sorted_tail(losses, alpha):
    """The mean of the worst alpha of the losses."""
    best, n = np.sort(losses)[::-1], len(losses)
    shares = np.clip(alpha * n - np.arange(n), 0, 1)
    return (shares @ best) / (alpha * n)


def mean_under(rows, tilt):
    (block,) = rows.blocks()
    ratios = tilt(block.d) + 1
    np.testing.assert_allclose(ratios.mean(1), 1, rtol=1e-13)
    assert (ratios >= 0).all()
    return (ratios.numpy() * LOSSES).mean(1)


@pytest.mark.parametrize("alpha", [0.05, 0.33, 0.6, 1.0])
@pytest.mark.parametrize("kind", [float, tensor])
def test_the_tail_is_that_of_a_sort(alpha, kind):
    rows = normalized_rows(LOSSES)
    given = alpha if kind is float else torch.full((3,), alpha, dtype=torch.float64)
    expected = [sorted_tail(row, alpha) for row in LOSSES]
    np.testing.assert_allclose(mean_under(rows, tail(rows, given).tilt), expected, rtol=1e-12, atol=1e-14)


def test_the_tail_of_a_long_row_is_that_of_a_sort():
    losses = np.random.default_rng(1).normal(size=(1, 200_000))
    rows = normalized_rows(losses)
    ordered = np.sort((losses[0] - losses.max()) / np.ptp(losses))
    assert tail(rows, 0.1).threshold.item() == pytest.approx(ordered[-20_000], abs=1e-15)


@pytest.mark.parametrize("radius", [0.03, 0.4, 0.7])
def test_total_variation_moves_the_lowest_to_the_maximum(radius):
    rows = normalized_rows(LOSSES)
    found = total_variation_ball(TotalVariation(), rows, np.full(3, radius))
    expected = [radius * row.max() + (1 - radius) * sorted_tail(row, 1 - radius) for row in LOSSES]
    np.testing.assert_allclose(mean_under(rows, found.tilt.tilt), expected, rtol=1e-12, atol=1e-14)


def test_its_penalty_moves_what_lies_further_below_than_the_strength():
    rows = normalized_rows(LOSSES)
    found = total_variation_penalty(TotalVariation(), rows, np.full(3, 0.25))
    (block,) = rows.blocks()
    tilt = found.tilt.tilt(block.d)
    distance = tilt.abs().mean(1) / 2
    value = (found.tilt.ratio(block.d, tilt) * block.d).mean(1) - 0.25 * distance
    np.testing.assert_allclose(value, block.d.clamp(min=-0.25).mean(1), rtol=0, atol=1e-14)
