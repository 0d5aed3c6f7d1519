"""Ratios from multipliers, near one and away from it."""

import numpy as np
import pytest
import torch
from families import EVERY
from problems import normalized_rows, tensor

from drrho.solvers.dual import BalancedPoint, ConjugateTilt, Exponents, MixedTilt
from experiments.benchmarks.users import Jeffreys

D = tensor([[-1.0, -0.6, -0.1, 0.0]])


def exponents(strength, origin=-0.4, offset=0.0):
    return Exponents(*(np.array([number]) for number in (origin, strength, offset)))


def test_an_offset_has_the_digits_that_a_threshold_next_to_a_loss_has_not():
    near = exponents(1e-30, -0.1, 1.0)
    assert near.threshold == [-0.1]
    assert near.of(D)[0, 2] == 1.0


def test_a_mixed_tilt_lies_between_two():
    first, second = (ConjugateTilt(EVERY["kl"], exponents(1.0, origin), True) for origin in (-0.4, -0.3))
    mixed = MixedTilt(first, second, np.array([0.25])).tilt(D)
    torch.testing.assert_close(mixed, 0.75 * first.tilt(D) + 0.25 * second.tilt(D))


@pytest.mark.parametrize("name", ["kl", "chi2", "order 1.5", "jensen-shannon", "capped kl 0.3"])
@pytest.mark.parametrize("strength", [1.0, 1e3, 1e9])
def test_the_fine_form_keeps_the_digits_that_the_plain_one_rounds(name, strength):
    fine, plain = (ConjugateTilt(EVERY[name], exponents(strength), fine) for fine in (True, False))
    tilt = fine.tilt(D)
    torch.testing.assert_close(plain.tilt(D), tilt, rtol=0, atol=4e-16 * 4)
    torch.testing.assert_close(fine.ratio(D, tilt), tilt + 1)
    if strength == 1e9:  # the tilt is phi*''(0) s there
        curvature = EVERY[name].curvature(tensor([0.0]))
        torch.testing.assert_close(tilt, curvature * (D + 0.4) / strength, rtol=1e-8, atol=0)


def test_losses_are_not_changed():
    before = D.clone()
    ConjugateTilt(EVERY["kl"], exponents(2.0), True).tilt(D)
    assert torch.equal(D, before)
    assert len(normalized_rows(D)) == 1


def test_what_underflows_is_no_zero_where_phi_is_infinite():
    ratios = {}
    for divergence in (Jeffreys(), EVERY["kl"]):
        tilt = ConjugateTilt(divergence, exponents(1e-308, 0.0), False)
        ratios[type(divergence).__name__] = tilt.ratio(D, tilt.tilt(D))
    assert (ratios["Jeffreys"] > 0).all() and torch.isfinite(Jeffreys().phi(ratios["Jeffreys"])).all()
    assert ratios["KL"][0, 0] == 0  # and its phi is one there


def test_a_balanced_point_may_add_to_the_maximum():
    zero = np.zeros(1)
    point = BalancedPoint(zero, zero, zero, zero, zero + 1, zero + 0.5, zero)
    found = point.found(EVERY["kl"], zero > 0, fine=True)
    plain = point._replace(share=zero).found(EVERY["kl"], zero > 0, fine=True)
    torch.testing.assert_close(found.tilt.tilt(D), plain.tilt.tilt(D) + 0.5 * (D == 0))
    assert found.dual.distance is None and plain.dual.distance == 0
