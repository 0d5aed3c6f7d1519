"""Long rows by the device's kernels, which Triton's interpreter runs here, beside the CPU's and independent solvers."""

import numpy as np
import pytest
import torch
from interpreted import DEVICE, by_device_kernels
from long_rows_cases import N, agree, losses_like, of_any_shape, solved

from drrho import KL, ChiSquare, CVaR, constrained_risk, hybrid_risk, penalized_risk

pytest.importorskip("triton")

BALLS = [(ChiSquare(), r) for r in (1e-8, 0.3, 20.0)] + [(KL(), r) for r in (1e-8, 0.3, 5.0)]
PENALTIES = [(divergence, s) for divergence in (ChiSquare(), KL()) for s in (1e-3, 0.5, 1e4)]


def named(case):
    return f"{type(case[0]).__name__} {case[1]:g}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@of_any_shape
@pytest.mark.parametrize("case", BALLS, ids=named)
def test_balls_are_those_of_the_cpu(case, name, dtype):
    z = torch.tensor(losses_like(name), dtype=dtype)
    divergence, radius = case
    found, failed = solved(z, divergence, radius)
    assert not failed
    agree(found, constrained_risk(z.double(), divergence, radius), dtype)


@of_any_shape
@pytest.mark.parametrize("case", PENALTIES, ids=named)
def test_penalties_are_those_of_the_cpu(case, name):
    divergence, strength = case
    for dtype in (torch.float64, torch.float32):
        z = torch.tensor(losses_like(name), dtype=dtype)
        strength = case[1] * z.double().std().item()
        found, failed = solved(z, divergence, strength=strength)
        assert not failed
        agree(found, penalized_risk(z.double(), divergence, strength), dtype)


@pytest.mark.parametrize("divergence", [ChiSquare(), KL()], ids=str)
@pytest.mark.parametrize("radius", [0.0, 1e9], ids=["mean", "maximum"])
def test_ends_of_the_radius(divergence, radius):
    z = torch.tensor(losses_like("tied"))
    found, failed = solved(z, divergence, radius)
    expected = constrained_risk(z, divergence, radius)
    assert not failed
    assert found.strength.item() == expected.strength.item()
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-12, atol=0)


def test_equal_losses_and_no_price():
    constant = torch.full((N,), 3.25)
    for divergence in (ChiSquare(), KL(), CVaR(0.3)):
        found, failed = solved(constant, divergence, 0.5)
        assert not failed
        assert (found.value.item(), found.premium.item(), found.gap.item()) == (3.25, 0.0, 0.0)
        torch.testing.assert_close(found.weights, torch.full((N,), 1 / N))
    z = torch.tensor(losses_like("tied"))
    for divergence in (ChiSquare(), KL()):
        found, failed = solved(z, divergence, strength=0.0)
        assert not failed
        assert found.value.item() == z.max().item()


@pytest.mark.parametrize("divergence", [ChiSquare(), KL(), CVaR(0.1)], ids=str)
def test_rows_of_a_batch_are_solved_alike(divergence):
    z = torch.tensor(np.stack([losses_like("normal", 33_000), losses_like("log-normal", 33_000)]), dtype=torch.float32)
    together, failed = solved(z, divergence, 0.2)
    assert not failed
    for j in range(2):
        alone, _ = solved(z[j], divergence, 0.2)
        for field, of_all in zip(alone, together, strict=True):
            torch.testing.assert_close(field, of_all[j], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_losses_are_answered_in_float32(dtype):
    z = torch.tensor(losses_like("normal"), dtype=dtype)
    for divergence in (ChiSquare(), KL(), CVaR(0.1)):
        found, failed = solved(z, divergence, 0.2)
        assert not failed
        assert {field.dtype for field in found} == {torch.float32}
        agree(found, constrained_risk(z.double(), divergence, 0.2), torch.float32)


@pytest.mark.parametrize("divergence", [ChiSquare(), KL(), CVaR(0.1)], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_refused_is_nan(divergence, bad):
    z = np.stack([losses_like("normal", 33_000)] * 2)
    z[1, 20_000] = bad
    found, failed = solved(z, divergence, 0.2)
    assert failed
    assert all(field[1].isnan().all() for field in found)
    assert not any(field[0].isnan().any() for field in found)


@pytest.mark.parametrize("radius", [-1.0, np.nan, np.inf])
def test_radii_that_are_refused(radius):
    for divergence in (ChiSquare(), KL()):
        found, failed = solved(losses_like("normal"), divergence, radius)
        assert failed
        assert found.value.isnan().all()


@pytest.mark.parametrize("divergence", [ChiSquare(), KL()], ids=str)
@pytest.mark.parametrize(
    "radius, strength", [(0.01, 0.5), (0.5, 10.0), (0.5, 0.3), (0.0, 0.3), (0.3, 0.0), (3.0, 0.01), (1e9, 0.0)]
)
def test_hybrids_are_those_of_the_cpu(divergence, radius, strength):
    z = torch.tensor(losses_like("normal"), dtype=torch.float32)
    found, failed = solved(z, divergence, radius, strength)
    assert not failed
    expected = hybrid_risk(z.double(), divergence, radius, strength)
    spread = (z.max() - z.min()).item()
    for name in ("value", "premium", "threshold", "strength"):
        mine, other = getattr(found, name).double(), getattr(expected, name)
        torch.testing.assert_close(mine, other, rtol=3e-7, atol=1e-8 * spread, msg=name)
    largest = expected.weights.max().item()
    torch.testing.assert_close(found.weights.double(), expected.weights, rtol=0, atol=3e-7 * largest)


def test_risks_are_solved_so():
    z = torch.tensor(losses_like("normal"), dtype=torch.float32, device=DEVICE)
    base = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    base = base / base.sum()
    risks = {
        "ball": lambda x: constrained_risk(x, KL(), 0.3),
        "penalty": lambda x: penalized_risk(x, ChiSquare(), 0.5),
        "tail mean": lambda x: constrained_risk(x, CVaR(0.1)),
        "hybrid": lambda x: hybrid_risk(x, ChiSquare(), 0.1, 0.3),
        "base weights": lambda x: constrained_risk(x, KL(), 0.3, base_weights=base.to(x.device)),
    }
    for name, risk in risks.items():
        with by_device_kernels():
            found = risk(z)
        expected = risk(z.cpu().double())
        for field, by_cpu in zip(found, expected, strict=True):
            assert field.dtype == torch.float32, name
            torch.testing.assert_close(field.cpu().double(), by_cpu, rtol=3e-7, atol=1e-8)


def test_where_few_passes_do_not_suffice_more_are_made():
    z = torch.tensor(losses_like("sorted"), device=DEVICE)
    with by_device_kernels():
        found = constrained_risk(z, ChiSquare(), 1000.0)
    expected = constrained_risk(z.cpu(), ChiSquare(), 1000.0)
    torch.testing.assert_close(found.value.cpu(), expected.value, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.weights.cpu(), expected.weights, rtol=1e-11, atol=1e-15)


def test_refusals_name_what_is_refused():
    z = torch.tensor(losses_like("normal"), device=DEVICE)
    with by_device_kernels():
        with pytest.raises(ValueError, match="radius must be finite and >= 0, got -1"):
            constrained_risk(z, KL(), torch.tensor(-1.0))
        z[7] = torch.nan
        with pytest.raises(ValueError, match="losses must be finite"):
            constrained_risk(z, ChiSquare(), 0.1)
