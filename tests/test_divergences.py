"""Identities of the divergences: phi, its conjugate and the conjugate's gradient against each other and mpmath.

Definitions: Cressie & Read 1984; Ben-Tal et al. 2013 (conjugates); Levy et al. 2020 (capped KL); the penalty
of total variation and its conjugate: Ben-Tal et al. 2013, table 4.
"""

import math

import mpmath as mp
import numpy as np
import oracles
import pytest
import torch
from families import ORDERS, POWERS, SMOOTH
from problems import tensor

from drrho import (
    KL,
    CappedKL,
    ChiSquare,
    CressieRead,
    CVaR,
    Divergence,
    TotalVariation,
    constrained_risk,
    drrho_risk,
    penalized_risk,
)
from drrho.contrastive import contrastive_risk
from drrho.stochastic import dual_losses

LIBRARY = (
    {"kl": KL(), "chi2": ChiSquare(), "cvar 0.3": CVaR(0.3), "cvar 1": CVaR(1.0), "tv": TotalVariation()}
    | {f"order {order:g}": CressieRead(order) for order in ORDERS}
    | {"capped kl 0.3": CappedKL(0.3), "capped kl 1": CappedKL(1.0)}
)
every_divergence = pytest.mark.parametrize("divergence", LIBRARY.values(), ids=LIBRARY)
every_smooth = pytest.mark.parametrize("name", SMOOTH)
every_order = pytest.mark.parametrize("order", ORDERS)
ACCURACY = 1e-11  # what the risks promise of the premium, which is linear in phi
NEAR_ONE = [1e-10, -1e-8, 1e-6, -1e-5, 1e-4, -1e-3, 5e-3, -0.02, 0.05, 0.0999, -0.11, 0.3, -0.6]


def interior(divergence, count=81):
    """Slopes inside the domain of the conjugate, kinks left out."""
    end = {CressieRead(order): 1 / (1 - order) for order in ORDERS if order < 1} | {TotalVariation(): 0.5}
    top = end.get(divergence, 3.0)
    s = torch.linspace(-3.7, top, count, dtype=torch.float64)[:-1]
    return s[(s != 0) & (s != -0.5)]


def in_mpmath(function, points):
    with mp.workdps(oracles.DIGITS):
        return [float(function(mp.mpf(x))) for x in points]


@every_divergence
def test_minimum_is_zero_at_one(divergence):
    t = torch.linspace(0, 4, 401, dtype=torch.float64)
    phi = divergence.phi(t)
    assert divergence.phi(tensor([1.0])).item() == 0.0
    assert not phi.isnan().any()
    assert torch.all(phi >= 0)


@every_divergence
def test_phi_is_convex(divergence):
    t = torch.linspace(0, 4, 129, dtype=torch.float64)
    phi = divergence.phi(t)
    inside = torch.isfinite(phi)
    assert torch.equal(inside, inside.cummin(0).values | (inside & ~inside[0]))  # an interval
    left, middle, right = phi[:-2], phi[1:-1], phi[2:]
    chord = (left + right) / 2
    assert torch.all((middle <= chord + 1e-15 * chord.abs()) | torch.isinf(chord))


@every_divergence
def test_outside_the_domain_phi_is_infinite(divergence):
    below = tensor([-1e-9, -0.5, -1.0, -7.0])
    assert torch.all(divergence.phi(below) == math.inf)


@pytest.mark.parametrize("alpha", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("kind", [CVaR, CappedKL])
def test_past_its_cap_phi_is_infinite(kind, alpha):
    divergence = kind(alpha)
    assert torch.all(divergence.phi(tensor([1 / alpha * (1 + 1e-9), 2 / alpha, 1e300])) == math.inf)
    assert torch.isfinite(divergence.phi(tensor([1 / alpha, 1.0, 0.0]))).all()


@pytest.mark.parametrize("order, limit", [(3.0, 1 / 3), (2.0, 0.5), (1.5, 2 / 3), (1.0, 1.0), (0.5, 2.0)])
def test_ratio_zero_costs_one_over_the_order(order, limit):
    assert abs(CressieRead(order).phi(tensor([0.0])).item() - limit) <= 4 * 2.0**-52 * limit


@pytest.mark.parametrize("order", [0.0, -1.0, -2.5])
def test_ratio_zero_is_refused_from_order_zero_down(order):
    assert CressieRead(order).phi(tensor([0.0])).item() == math.inf


@pytest.mark.parametrize("order", [0.9, 0.5, 0.2, 0.0, -1.0, -2.5])
def test_conjugate_is_infinite_beyond_its_domain(order):
    divergence, end = CressieRead(order), 1 / (1 - order)
    assert torch.all(divergence.conjugate(tensor([end * (1 + 1e-9), end + 1, 100.0])) == math.inf)
    at_the_end = divergence.conjugate(tensor([2.0 if order == 0.5 else end])).item()
    if order in (0.5, 0.0):  # where the end is a float
        assert at_the_end == math.inf
    if order == -1.0:
        assert at_the_end == 1.0


def test_conjugate_of_total_variation_ends_at_one_half():
    s = tensor([-2.0, -0.5, -0.25, 0.25, 0.5, 0.5 + 1e-9, 3.0])
    assert TotalVariation().conjugate(s).tolist() == [-0.5, -0.5, -0.25, 0.25, 0.5, math.inf, math.inf]


@every_divergence
def test_fenchel_young_with_equality_at_the_gradient(divergence):
    s = interior(divergence)
    t = divergence.conjugate_gradient(s)
    conjugate, phi = divergence.conjugate(s), divergence.phi(t)
    size = 1 + phi.abs() + (s * t).abs()
    assert torch.all((conjugate + phi - s * t).abs() <= 1e-13 * size)
    other = torch.linspace(0.01, 4, 57, dtype=torch.float64)[:, None]
    bound = s * other - divergence.phi(other)
    assert torch.all(conjugate >= bound - 1e-13 * (1 + bound.abs().clamp(max=1e300)))


@every_divergence
def test_conjugate_gradient_is_the_derivative_of_the_conjugate(divergence):
    s = interior(divergence).requires_grad_()
    (derivative,) = torch.autograd.grad(divergence.conjugate(s).sum(), s)
    expected = divergence.conjugate_gradient(s.detach())
    assert torch.all((derivative - expected).abs() <= 1e-12 * (1 + expected.abs()))


@every_divergence
def test_conjugate_lies_above_its_tangent_at_zero(divergence):
    s = interior(divergence)
    assert divergence.conjugate(tensor([0.0])).item() == 0.0
    assert torch.all(divergence.conjugate(s) >= s - 1e-15)
    assert torch.all(divergence.conjugate_gradient(s).diff() >= 0)


@pytest.mark.parametrize("name", [name for name in SMOOTH if name not in ("jensen-shannon",)])
def test_curvature_at_one_is_one(name):
    divergence, h = SMOOTH[name].divergence, 2.0**-13
    second = (divergence.phi(tensor([1 + h])) + divergence.phi(tensor([1 - h]))).item() / h**2
    # The fourth derivative is below 40 for orders from -1 to 3; a plain formula rounds by eps in a number near one.
    assert abs(second - 1) <= 40 * h**2 / 12 + 8 * 2.0**-52 / h**2


def test_curvature_of_jensen_shannon_at_one_is_one_half():
    h = 2.0**-13
    second = sum(SMOOTH["jensen-shannon"].divergence.phi(tensor([1 + e])).item() for e in (h, -h)) / h**2
    assert abs(second - 0.5) <= 40 * h**2 / 12 + 8 * 2.0**-52 / h**2


@every_smooth
def test_definition_in_mpmath(name):
    divergence, phi, conjugate, cap = SMOOTH[name]
    t = [x for x in [0.0, 1e-300, 1e-9, 0.2, 0.9, 1.0, 1.7, 3.25, 49.0, 1e6] if x <= cap]
    expected = np.array(in_mpmath(phi, t))
    finite = np.isfinite(expected)
    actual = divergence.phi(tensor(t)).numpy()
    assert np.all(np.isposinf(actual) == ~finite)
    size = expected[finite] + np.array(t)[finite] + 1
    assert np.all(np.abs(actual[finite] - expected[finite]) <= 1e-14 * size)
    s = [-50.0, -3.0, -1.5, -0.7, -1e-9, 0.0, 1e-9, 0.3, 0.49]
    expected = np.array(in_mpmath(conjugate, s))
    assert np.all(np.abs(divergence.conjugate(tensor(s)).numpy() - expected) <= 1e-14 * (1 + np.abs(expected)))


@pytest.mark.parametrize("name", ["kl", "chi2", *POWERS, "capped kl 0.3"])
def test_phi_near_one_keeps_its_digits(name):
    divergence, phi, *_ = SMOOTH[name]
    t = [1 + e for e in NEAR_ONE]
    expected = np.array(in_mpmath(phi, t))
    actual = divergence.phi(tensor(t)).numpy()
    assert np.all(np.abs(actual - expected) <= ACCURACY * expected), np.abs(actual / expected - 1)


@pytest.mark.parametrize("name", ["kl", "chi2", *POWERS, "capped kl 0.3"])
def test_conjugate_near_zero_keeps_its_digits(name):
    divergence, _, conjugate, _ = SMOOTH[name]
    expected = np.array(in_mpmath(conjugate, NEAR_ONE))
    actual = divergence.conjugate(tensor(NEAR_ONE)).numpy()
    assert np.all(np.abs(actual - expected) <= 1e-14 * np.abs(expected)), np.abs(actual / expected - 1)


# --- the Cressie-Read family as one family ------------------------------------------------------------------


@pytest.mark.parametrize("order, named", [(1.0, KL()), (1, KL()), (2.0, ChiSquare()), (2, ChiSquare())])
def test_named_members(order, named):
    t = torch.cat([torch.linspace(0, 5, 101, dtype=torch.float64), tensor([1 + 1e-7, 1 - 1e-4, -1.0])])
    s = torch.linspace(-4, 3, 71, dtype=torch.float64)
    member = CressieRead(order)
    for ours, theirs in (
        (member.phi(t), named.phi(t)),
        (member.conjugate(s), named.conjugate(s)),
        (member.conjugate_gradient(s), named.conjugate_gradient(s)),
    ):
        assert torch.allclose(ours, theirs, rtol=1e-14, atol=0.0)


def test_members_by_their_own_formulas():
    t = torch.linspace(0.05, 5, 100, dtype=torch.float64)
    formulas = {
        0.5: 2 * (t.sqrt() - 1) ** 2,
        0.0: -t.log() + t - 1,
        -1.0: (t - 1) ** 2 / (2 * t),
        3.0: (t**3 - 3 * t + 2) / 6,
    }
    for order, expected in formulas.items():
        assert torch.allclose(CressieRead(order).phi(t), expected, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("pole", [0.0, 1.0])
@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-7, 1e-10, 1e-13, 1e-16])
@pytest.mark.parametrize("side", [-1, 1])
def test_orders_next_to_a_pole_of_the_formula(pole, step, side):
    order = pole + side * step
    divergence = CressieRead(order)
    t = [1e-3, 0.2, 0.9, 1 + 1e-3, 1.0 + 1e-6, 1.7, 5.0, 60.0]
    expected = np.array(in_mpmath(oracles.power_phi(order), t))
    assert np.all(np.abs(divergence.phi(tensor(t)).numpy() - expected) <= ACCURACY * expected)
    s = [-3.0, -0.5, -1e-3, 1e-6, 0.3, 0.8]
    expected = np.array(in_mpmath(oracles.power_conjugate(order), s))
    assert np.all(np.abs(divergence.conjugate(tensor(s)).numpy() - expected) <= ACCURACY * np.abs(expected))


@pytest.mark.parametrize("pole, limit", [(0.0, CressieRead(0.0)), (1.0, KL())])
def test_family_is_continuous_in_the_order(pole, limit):
    t = torch.linspace(0.1, 6, 60, dtype=torch.float64)
    s = torch.linspace(-3, 0.8, 60, dtype=torch.float64)
    for step in (1e-3, 1e-6, 1e-9, 1e-12):
        for order in (pole - step, pole + step):
            # d phi / d order is bounded by t log^2 t + phi, d phi* / d order by s^2 phi*'^2, both below 120 here.
            assert (CressieRead(order).phi(t) - limit.phi(t)).abs().max() <= 120 * step + 1e-13
            assert (CressieRead(order).conjugate(s) - limit.conjugate(s)).abs().max() <= 120 * step + 1e-13


def test_phi_falls_with_the_order_below_one_and_grows_above():
    t = tensor([0.3, 0.8])
    values = torch.stack([CressieRead(order).phi(t) for order in sorted(ORDERS)])
    assert torch.all(values.diff(dim=0) < 0)
    values = torch.stack([CressieRead(order).phi(tensor([1.3, 4.0])) for order in sorted(ORDERS)])
    assert torch.all(values.diff(dim=0) > 0)


def test_capped_kl_is_kl_below_its_cap():
    t = torch.linspace(0, 1 / 0.3, 50, dtype=torch.float64)[:-1]
    assert torch.equal(CappedKL(0.3).phi(t), KL().phi(t))
    s = torch.linspace(-3, math.log(1 / 0.3) - 1e-9, 50, dtype=torch.float64)
    assert torch.allclose(CappedKL(0.3).conjugate(s), KL().conjugate(s), rtol=1e-15, atol=0)
    beyond = CappedKL(0.3).conjugate_gradient(tensor([1.3, 4.0, 800.0]))
    assert torch.allclose(beyond, torch.full_like(beyond, 1 / 0.3), rtol=1e-15, atol=0)


# --- what they are and what they refuse ---------------------------------------------------------------------


def test_divergences_are_values():
    assert CressieRead(0.5) == CressieRead(order=0.5) != CressieRead(0.25)
    assert CappedKL(0.5) == CappedKL(alpha=0.5) != CappedKL(0.25)
    assert TotalVariation() == TotalVariation()
    assert len({CressieRead(3), CressieRead(3), CappedKL(0.1), CappedKL(0.1), TotalVariation(), TotalVariation()}) == 3
    assert all(isinstance(divergence, Divergence) for divergence in LIBRARY.values())


@every_divergence
def test_phi_and_conjugate_keep_dtype_and_shape(divergence):
    for dtype in (torch.float32, torch.float64):
        x = torch.full((2, 3), 0.25, dtype=dtype)
        for result in (divergence.phi(x), divergence.conjugate(x), divergence.conjugate_gradient(x)):
            assert result.dtype == dtype
            assert result.shape == x.shape


@pytest.mark.parametrize("kind", [CVaR, CappedKL])
@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.0000001, 2.0, math.nan, math.inf])
def test_tail_fraction_must_be_in_zero_one(kind, alpha):
    for given in (alpha, torch.tensor(alpha, dtype=torch.float64), torch.tensor([0.5, alpha], dtype=torch.float64)):
        with pytest.raises(ValueError, match="alpha") as caught:
            kind(given)
        assert str(alpha) in str(caught.value)


@pytest.mark.parametrize("order", [math.nan, math.inf, -math.inf])
def test_order_must_be_finite(order):
    with pytest.raises(ValueError, match="order") as caught:
        CressieRead(order)
    assert str(order) in str(caught.value)


def test_a_divergence_needs_all_three_functions():
    class Incomplete(Divergence):
        def phi(self, t):
            return (t - 1) ** 2

    with pytest.raises(TypeError, match="conjugate"):
        Incomplete()


@pytest.mark.parametrize("kind", [KL, ChiSquare, TotalVariation, CressieRead, CVaR, CappedKL])
def test_a_class_with_another_phi_than_its_parent_is_refused(kind):
    """It would inherit closed forms, kernels and the order of the parent, and get the parent's risk."""

    def doubled(self, t):
        return 2 * kind.phi(self, t)

    with pytest.raises(TypeError, match=rf"Doubled must not change phi of {kind.__name__}.*drrho.Divergence"):
        type("Doubled", (kind,), {"phi": doubled})
    same = type("Same", (kind,), {"__doc__": "Nothing else."})
    with pytest.raises(TypeError, match=f"Bent must not change conjugate of Same|of {kind.__name__}"):
        type("Bent", (same,), {"conjugate": doubled})
    mixin = type("Mixin", (), {"phi": doubled})
    with pytest.raises(TypeError, match="must not change phi"):
        type("Mixed", (mixin, kind), {})


@pytest.mark.parametrize("divergence", ["KL", KL, None, 2.0])
def test_what_is_no_divergence_is_refused_by_every_function_that_takes_one(divergence):
    z, features = torch.rand(4), torch.eye(3)
    calls = (
        lambda: constrained_risk(z, divergence, 0.1),
        lambda: penalized_risk(z, divergence, 0.1),
        lambda: drrho_risk(z, z, divergence),
        lambda: drrho_risk(z, z, divergence, rho=1.0),
        lambda: contrastive_risk(features, features, 0.1, divergence=divergence),
        lambda: dual_losses(z, divergence, 0.0, 1.0),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"divergence must be a Divergence such as KL\(\) or ChiSquare\(\), got"):
            call()


@pytest.mark.parametrize("given", ["a", None, True, [0.5]])
def test_orders_and_fractions_that_are_no_numbers_are_refused(given):
    with pytest.raises(TypeError, match="order must be a number, got"):
        CressieRead(given)
    for kind in (CVaR, CappedKL):
        with pytest.raises(TypeError, match="alpha must be a number or a tensor, got"):
            kind(given)
    assert CVaR(np.float32(0.5)) == CVaR(0.5) and CressieRead(np.int64(2)) == CressieRead(2)
