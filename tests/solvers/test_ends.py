"""Rows at an end of the parameter's range need no iteration."""

import numpy as np
import pytest
import torch
from problems import normalized_rows

from drrho import KL, CappedKL, ChiSquare, CVaR, TotalVariation
from drrho.solvers.dual import Dual, Found, by_conjugate
from drrho.solvers.ends import ends_of_ball, ends_of_penalty, least_divergent_maximizer, with_ends

LOSSES = np.array([[1.0, 3.0, 3.0, 0.0], [0.0, 1.0, 2.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
SPAN = np.ptp(LOSSES, axis=1)


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), TotalVariation()], ids=repr)
def test_the_maximizer_is_uniform_on_the_ties(divergence):
    rows = normalized_rows(LOSSES)
    maximizer = least_divergent_maximizer(rows, divergence)
    (block,) = rows.blocks()
    ratios = maximizer.tilt(block.d) + 1
    assert ratios.tolist() == [[0, 2, 2, 0], [0, 0, 0, 4], [1, 1, 1, 1]]
    distance = divergence.phi(ratios).mean(1)
    np.testing.assert_allclose(maximizer.distance, distance, rtol=1e-14)


def test_under_a_cap_it_is_the_tail():
    rows = normalized_rows(LOSSES)
    (block,) = rows.blocks()
    for divergence in (CVaR(0.75), CappedKL(0.75)):
        ratios = least_divergent_maximizer(rows, divergence).tilt(block.d) + 1
        np.testing.assert_allclose(ratios[1], [0, 4 / 3, 4 / 3, 4 / 3], rtol=1e-14)
        np.testing.assert_allclose(ratios.mean(1), 1, rtol=1e-14)


def test_ends_of_balls_and_penalties():
    maximizer = least_divergent_maximizer(normalized_rows(LOSSES), KL())
    ball = ends_of_ball(SPAN, np.array([np.log(2), 0.0, 0.1]), maximizer)
    assert ball.hard.tolist() == [True, False, True]
    assert ball.flat.tolist() == [False, True, False]
    assert not ball.open.any()
    penalty = ends_of_penalty(SPAN, np.array([0.0, np.inf, 1.0]), maximizer)
    assert penalty.hard.tolist() == [True, False, True]
    assert penalty.flat.tolist() == [False, True, False]
    assert ends_of_ball(SPAN, np.array([0.5, 0.5, 0.5]), maximizer).open.tolist() == [True, True, False]


def test_open_rows_keep_their_place_among_the_others():
    rows = normalized_rows(LOSSES)
    maximizer = least_divergent_maximizer(rows, KL())
    ends = ends_of_ball(SPAN, np.array([5.0, 0.3, 0.0]), maximizer)
    one = Dual(np.array([-0.3]), np.array([0.7]), np.array([0.3]), np.array([False]))
    inner = by_conjugate(KL(), rows.select(ends.open), one)
    found, after = with_ends(rows, ends, inner, maximizer)
    assert found.dual.threshold.tolist() == [0.0, -0.3, 0.0]
    assert found.dual.strength.tolist() == [0.0, 0.7, 0.0]
    assert after.hard.tolist() == [True, False, True]
    (block,) = rows.blocks()
    tilt = found.tilt.tilt(block.d)
    assert torch.equal(tilt[1], torch.expm1((block.d[1] + 0.3) / 0.7))
    assert found.tilt.ratio(block.d, tilt)[0].tolist() == [0, 2, 2, 0]


def test_a_saturated_row_is_hard():
    rows = normalized_rows(LOSSES[:2])
    maximizer = least_divergent_maximizer(rows, KL())
    ends = ends_of_ball(SPAN[:2], np.array([0.1, 0.1]), maximizer)
    dual = Dual(np.zeros(2), np.ones(2), None, np.array([False, True]))
    found, after = with_ends(rows, ends, Found(by_conjugate(KL(), rows, dual).tilt, dual), maximizer)
    assert after.hard.tolist() == [False, True]
    assert found.dual.strength.tolist() == [1.0, 0.0]
