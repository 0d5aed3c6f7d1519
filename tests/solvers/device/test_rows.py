"""Risks by the kernels for a GPU beside the same by the compiled CPU kernels, and every kernel compiled for a GPU."""

import numpy as np
import pytest
import torch
from interpreted import DEVICE, by_device_kernels
from problems import HARD, value_tolerance

from drrho import (
    KL,
    ChiSquare,
    CressieRead,
    CVaR,
    RobustRisk,
    TotalVariation,
    constrained_risk,
    hybrid_risk,
    penalized_risk,
)
from drrho.solvers.device import dispatch
from drrho.solvers.problem import Problem

pytest.importorskip("triton")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIVERGENCES = {"KL": KL(), "chi-square": ChiSquare(), "CVaR": CVaR(0.15), "total variation": TotalVariation()} | {
    f"order {order:g}": CressieRead(order) for order in (1.5, 0.5, 3.0, -1.0, 0.0, 1.2)
}
#: One that sums powers, one that sums exponentials, and one that is found by selection.
SOME = {name: DIVERGENCES[name] for name in ("KL", "chi-square", "CVaR")}


def ball(z, divergence, parameter, base=None):
    return constrained_risk(z, divergence, parameter, base_weights=base)


def penalty(z, divergence, parameter, base=None):
    return penalized_risk(z, divergence, parameter, base_weights=base)


def hybrid(z, divergence, parameter, base=None):
    return hybrid_risk(z, divergence, parameter, 0.8, base_weights=base)


FORMS = {"ball": ball, "penalty": penalty, "hybrid": hybrid}
every_risk = pytest.mark.parametrize(
    "form, divergence",
    [(form, divergence) for form in FORMS.values() for divergence in DIVERGENCES.values()],
    ids=[f"{name} {form}" for form in FORMS for name in DIVERGENCES],
)


def agree(form, z, divergence, parameter, base=None):
    """Compare with the same in float64 on the CPU, to the rounding of the answer."""
    compare(z, *both(form, z, divergence, parameter, base))


def both(form, z, divergence, parameter, base=None):
    """Return the answers of the device's kernels, and of the CPU in float64."""
    with by_device_kernels():
        fast = form(z.to(DEVICE), divergence, parameter, base)
    return RobustRisk(*(field.cpu().double() for field in fast)), form(z.double(), divergence, parameter, base)


def compare(z, fast, plain):
    """Hold answers against those in float64, to the rounding of the losses of type ``z``."""
    narrow = z.dtype != torch.float64
    eps = 2.0**-23 if narrow else 2.0**-52
    scale = max(value_tolerance(row, torch.float32 if narrow else torch.float64) for row in z.double().tolist())
    spread = float(z.double().max() - z.double().min())
    names = plain._fields
    for name, found, expected in zip(names, fast, plain, strict=True):
        if name == "weights":
            n = z.shape[-1]
            torch.testing.assert_close(found * n, expected * n, rtol=1e-9 + 200 * eps, atol=max(1e-11, 0.01 * eps))
        elif name == "gap":
            assert (found.abs() <= scale).all()
        elif name == "premium":
            torch.testing.assert_close(found, expected, rtol=1e-10 + 4 * eps, atol=4 * 2.0**-52 * spread)
        elif name == "strength":
            torch.testing.assert_close(found, expected, rtol=1e-9 + 4 * eps, atol=1e-12 * spread)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-9 + 4 * eps, atol=scale)


def some_rows(rows, n, dtype=torch.float64, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, n))).to(dtype)


def some_base(rows, n):
    """Base weights of which some are zero, but not all."""
    rng = np.random.default_rng(1)
    base = rng.exponential(size=(rows, n)) * (rng.random((rows, n)) > 0.25)
    base[:, 0] = 1.0
    return base / base.sum(1, keepdims=True)


some_risks = pytest.mark.parametrize(
    "form, divergence",
    [(form, divergence) for form in FORMS.values() for divergence in SOME.values()],
    ids=[f"{name} {form}" for form in FORMS for name in SOME],
)


@every_risk
def test_same_answer(form, divergence):
    agree(form, some_rows(2, 50), divergence, 0.05)


@some_risks
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_same_answer_of_narrow_losses(form, divergence, dtype):
    agree(form, some_rows(3, 75, dtype), divergence, 0.05)


@pytest.mark.parametrize("radius", [0.01, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_skewed_narrow_rows_are_not_declined(radius, seed):
    z = torch.exp(some_rows(4, 256, torch.float32, seed)) - 2
    with by_device_kernels():
        dispatch.solve_on_device(z.to(DEVICE), radius_of(z, radius), None, None, None, Problem(KL(), None), 1, no_other)


def radius_of(z, radius):
    return torch.full((len(z),), radius, dtype=torch.float64, device=DEVICE)


def no_other(*given):
    raise AssertionError("rows were declined")


@some_risks
@pytest.mark.parametrize("shared", [True, False], ids=["one base", "a base each"])
def test_same_answer_with_base_weights(form, divergence, shared):
    z = some_rows(2, 40, torch.float32)
    z[:, 5] = 1e3
    base = some_base(1 if shared else 2, 40)
    base[:, 5] = 0.0
    agree(form, z, divergence, 0.2, base / base.sum(1, keepdims=True))


@pytest.mark.slow
@pytest.mark.parametrize("n", sorted({len(losses) for losses in HARD.values()}))
@pytest.mark.parametrize(
    "form, divergence, dtype",
    [
        pytest.param(form, divergence, dtype, id=f"{name} {kind} {dtype}")
        for dtype in DTYPES[:2]
        for kind, form in FORMS.items()
        for name, divergence in (DIVERGENCES if dtype == torch.float64 else SOME).items()
    ],
)
def test_same_answer_on_hard_rows(form, divergence, dtype, n):
    """Every parameter of every row, in one call for the rows of a length, and each judged by its own losses."""
    z = torch.tensor(np.array([losses for losses in HARD.values() if len(losses) == n]), dtype=dtype)
    z = z[torch.isfinite(z.amax(-1) - z.amin(-1))]  # what is out of range in float32 is not for it
    parameters = torch.tensor([0.0, 1e-8, 0.2, 3.0], dtype=torch.float64).repeat_interleave(len(z))
    z = z.repeat(4, 1)
    fast, plain = both(form, z, divergence, parameters)
    for row in range(len(z)):
        compare(z[row, None], *(RobustRisk(*(field[row, None] for field in risk)) for risk in (fast, plain)))


@pytest.mark.parametrize("n", [1, 2, 3, 33, 64, 65, 300])
@pytest.mark.parametrize("divergence", SOME.values(), ids=SOME)
def test_any_length(n, divergence):
    agree(ball, some_rows(2, n, torch.float32), divergence, 0.1)


@some_risks
@pytest.mark.parametrize("shape", [(2, 64, 1), (4, 32, 1), (1, 256, 2)])
def test_rows_in_programs_of_any_shape(form, divergence, shape, monkeypatch):
    monkeypatch.setattr("drrho.solvers.device.rows._shape", lambda rows, n: shape)
    agree(form, some_rows(5, 150, torch.float32) * torch.tensor([[1e-3], [1.0], [10.0], [0.0], [3.0]]), divergence, 0.3)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_leading_dimensions_and_parameters_of_rows(divergence):
    z = some_rows(6, 30).reshape(2, 3, 30)
    radius = torch.tensor([[0.0, 1e-4, 0.1], [0.5, 2.0, 50.0]], dtype=torch.float64)
    with by_device_kernels():
        fast = constrained_risk(z.to(DEVICE), divergence, radius.to(DEVICE))
    plain = constrained_risk(z, divergence, radius)
    torch.testing.assert_close(fast.value.cpu(), plain.value, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(fast.weights.cpu(), plain.weights, rtol=1e-9, atol=1e-12)


def test_alpha_of_rows():
    z, alpha = some_rows(4, 30), torch.tensor([0.01, 0.3, 0.8, 1.0], dtype=torch.float64)
    with by_device_kernels():
        fast = constrained_risk(z.to(DEVICE), CVaR(alpha.to(DEVICE)))
    plain = constrained_risk(z, CVaR(alpha))
    torch.testing.assert_close(fast.value.cpu(), plain.value, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(fast.threshold.cpu(), plain.threshold, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_the_weights(dtype):
    z = some_rows(3, 20, dtype).to(DEVICE).requires_grad_()
    with by_device_kernels():
        risk = constrained_risk(z, KL(), 0.1)
        risk.value.sum().backward()
    assert z.grad is not None
    assert z.grad.dtype == dtype
    torch.testing.assert_close(z.grad, risk.weights.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_losses_that_are_not_finite_are_refused(bad, dtype):
    z = some_rows(3, 20, dtype)
    z[1, 4] = bad
    with by_device_kernels(), pytest.raises(ValueError, match=r"losses must be finite, got .* at index \[1, 4\]"):
        constrained_risk(z.to(DEVICE), KL(), 0.1)


def test_bad_parameters_are_refused_by_name():
    z = some_rows(2, 20).to(DEVICE)
    with by_device_kernels():
        with pytest.raises(ValueError, match="radius must be finite and >= 0, got -1"):
            constrained_risk(z, KL(), torch.tensor([0.1, -1.0]))
        with pytest.raises(ValueError, match="strength must be finite and >= 0, got inf"):
            penalized_risk(z, ChiSquare(), torch.tensor([torch.inf, 1.0]))
        with pytest.raises(ValueError, match="range"):
            constrained_risk(torch.tensor([[1.7e308, -1.7e308]], device=DEVICE, dtype=torch.float64), KL(), 0.1)


def test_where_nothing_can_be_read_a_refused_row_is_nan(monkeypatch):
    z = some_rows(3, 20)
    z[1, 4] = torch.nan
    monkeypatch.setattr("drrho.solvers.device.dispatch.values_are_readable", lambda: False)
    with by_device_kernels():
        risk = constrained_risk(z.to(DEVICE), KL(), 0.1)
    for field in risk:
        missing = field.cpu().isnan().reshape(3, -1)
        assert missing[1].all()
        assert not missing[[0, 2]].any()
