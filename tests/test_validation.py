"""Bad input is refused by name: the message carries the argument and the value it got."""

import math

import numpy as np
import pytest
import torch

from drrho import KL, ChiSquare, CVaR, constrained_risk, drrho_risk, excess_losses, penalized_risk

LOSSES = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
BATCH = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
DIVERGENCES = pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.3)], ids=["kl", "chi2", "cvar"])
BALLS = pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=["kl", "chi2"])


def assert_refused(call, *mentions, error=ValueError):
    __tracebackhide__ = True
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value).lower()
    for mention in mentions:
        assert str(mention).lower() in message, f"{message!r} does not mention {mention!r}"


@BALLS
@pytest.mark.parametrize("radius", [-0.25, -1e-30, math.nan, -math.inf])
def test_radius_must_be_a_nonnegative_number(divergence, radius):
    assert_refused(lambda: constrained_risk(LOSSES, divergence, radius), "radius", radius)


@BALLS
@pytest.mark.parametrize("bad", [-0.25, math.nan])
def test_one_bad_radius_of_a_batch(divergence, bad):
    radius = torch.tensor([0.1, bad], dtype=torch.float64)
    assert_refused(lambda: constrained_risk(BATCH, divergence, radius), "radius", bad)


@BALLS
@pytest.mark.parametrize("strength", [-0.25, math.nan, math.inf, -math.inf])
def test_strength_must_be_finite_and_nonnegative(divergence, strength):
    assert_refused(lambda: penalized_risk(LOSSES, divergence, strength), "strength", strength)


@BALLS
@pytest.mark.parametrize("bad", [-0.25, math.nan, math.inf])
def test_one_bad_strength_of_a_batch(divergence, bad):
    strength = torch.tensor([0.1, bad], dtype=torch.float64)
    assert_refused(lambda: penalized_risk(BATCH, divergence, strength), "strength", bad)


@BALLS
def test_radius_of_another_batch_shape(divergence):
    assert_refused(lambda: constrained_risk(BATCH, divergence, torch.full((3,), 0.1)), "radius", "3")
    assert_refused(lambda: penalized_risk(BATCH, divergence, torch.full((3,), 0.1)), "strength", "3")


@BALLS
def test_radius_must_not_add_batch_dimensions(divergence):
    assert_refused(lambda: constrained_risk(LOSSES, divergence, torch.full((4,), 0.1)), "radius", "4")


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.0000001, 2.0, math.nan, math.inf])
def test_tail_fraction_must_be_in_zero_one(alpha):
    assert_refused(lambda: CVaR(alpha), "alpha", alpha)


@DIVERGENCES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("convert", [lambda z: z, lambda z: z.float(), lambda z: z.half(), lambda z: z.numpy()])
def test_losses_must_be_finite(divergence, bad, convert):
    losses = BATCH.clone()
    losses[1, 2] = bad
    for call in (constrained_risk, lambda z, d: penalized_risk(z, d, 1.0)):
        assert_refused(lambda call=call: call(convert(losses), divergence), "losses", bad)


@DIVERGENCES
def test_losses_must_not_be_empty(divergence):
    for shape in ((0,), (3, 0)):
        for call in (constrained_risk, lambda z, d: penalized_risk(z, d, 1.0)):
            assert_refused(
                lambda call=call, shape=shape: call(torch.zeros(shape), divergence),
                "losses",
                ", ".join(map(str, shape)),
            )


@DIVERGENCES
def test_losses_must_have_a_dimension(divergence):
    for scalar in (torch.tensor(1.5), np.float64(1.5), 1.5):
        assert_refused(lambda scalar=scalar: constrained_risk(scalar, divergence), "losses")
        assert_refused(lambda scalar=scalar: penalized_risk(scalar, divergence, 1.0), "losses")


@DIVERGENCES
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_losses_must_not_be_an_integer_tensor(divergence, dtype):
    losses = torch.ones(3, dtype=dtype)
    assert_refused(lambda: constrained_risk(losses, divergence), "losses", dtype, error=TypeError)
    assert_refused(lambda: penalized_risk(losses, divergence, 1.0), "losses", dtype, error=TypeError)


def test_losses_must_not_be_complex():
    assert_refused(lambda: constrained_risk(LOSSES + 0j, KL(), 0.1), "losses", "complex", error=TypeError)


@BALLS
def test_exactly_one_of_rho_and_radius(divergence):
    assert_refused(lambda: drrho_risk(LOSSES, LOSSES, divergence), "rho", "radius")
    assert_refused(lambda: drrho_risk(LOSSES, LOSSES, divergence, rho=0.75, radius=0.125), "rho", "radius", 0.75, 0.125)


@BALLS
@pytest.mark.parametrize("bad", [-0.25, math.nan])
def test_rho_must_be_a_nonnegative_number(divergence, bad):
    assert_refused(lambda: drrho_risk(LOSSES, LOSSES, divergence, rho=bad), "rho", bad)
    assert_refused(lambda: drrho_risk(LOSSES, LOSSES, divergence, radius=bad), "radius", bad)


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((2, 3), (2, 4)), ((5, 3), (2, 3))])
def test_reference_losses_must_match(shapes):
    ours, theirs = map(torch.zeros, shapes)
    for call in (excess_losses, lambda a, b: drrho_risk(a, b, KL(), rho=1.0)):
        assert_refused(
            lambda call=call: call(ours, theirs),
            "reference_losses",
            *(", ".join(map(str, shape)) for shape in shapes),
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_reference_losses_must_be_finite(bad):
    reference = LOSSES.clone()
    reference[0] = bad
    assert_refused(lambda: drrho_risk(LOSSES, reference, KL(), rho=1.0), "losses", bad)
