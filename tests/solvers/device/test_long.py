"""Long rows by the device's kernels, which Triton's interpreter runs here, beside the CPU's and independent solvers."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from interpreted import DEVICE, by_device_kernels

from drrho import KL, ChiSquare, CVaR, constrained_risk, hybrid_risk, penalized_risk
from drrho.solvers.algorithms import algorithm_of
from drrho.solvers.problem import Solution

pytest.importorskip("triton")
from drrho.solvers.device.long import solve_long_rows

N = 40_000


def losses_like(name, n=N):
    rng = np.random.default_rng(5)
    normal = rng.normal(size=n)
    return {
        "normal": normal,
        "shifted by 1e6": 1e6 + 1e-2 * normal,
        "tiny": 1e-8 * normal,
        "log-normal": np.exp(2 * normal),
        "Cauchy": np.tan(np.pi * (rng.random(n) - 0.5)),
        "tied": np.minimum(np.round(2 * normal), 2.0),
        "two values": (normal > 2).astype(float),
        "sorted": np.sort(normal),
        "outlier first": np.concatenate([[1e4], normal[1:]]),
    }[name]


def solved(z, divergence, radius=None, strength=None):
    """Return the solution of rows ``[rows, n]``, and whether one was refused or declined."""
    z = torch.as_tensor(z, device=DEVICE)
    failed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    radius, strength = (
        None if number is None else torch.full(z.shape[:-1], number, dtype=torch.float64, device=DEVICE)
        for number in (radius, strength)
    )
    kernel, fraction = algorithm_of(divergence).kernel, divergence.tail_fraction or 0.0
    assert kernel is not None
    with np.errstate(all="ignore"):  # the interpreter warns of what a GPU does not
        weights, fields = solve_long_rows(z, radius, strength, None, None, failed, kernel, fraction)
    value, *others = fields.cpu().unbind()
    return Solution(value, weights.cpu(), *others), bool(failed.item())


def agree(found, expected, dtype):
    """Compare with a risk in float64 of the same, perhaps narrower, losses."""
    close = 1e-10 if dtype == torch.float64 else 3e-7
    spread = (expected.weights.max() * expected.weights.numel()).item()
    value = expected.value.item()
    torch.testing.assert_close(found.premium.double(), expected.premium, rtol=close, atol=0)
    torch.testing.assert_close(found.value.double(), expected.value, rtol=0, atol=close * abs(value) + close * spread)
    torch.testing.assert_close(found.strength.double(), expected.strength, rtol=close, atol=0)
    torch.testing.assert_close(
        found.weights.double(), expected.weights, rtol=0, atol=close * expected.weights.max().item()
    )
    assert abs(found.gap.item()) <= 1e-7 * expected.premium.item()
    assert found.weights.double().sum().item() == pytest.approx(1, abs=0.1 * close + 4e-8 * (dtype == torch.float32))


BALLS = [(ChiSquare(), r) for r in (1e-8, 0.3, 20.0)] + [(KL(), r) for r in (1e-8, 0.3, 5.0)]
PENALTIES = [(divergence, s) for divergence in (ChiSquare(), KL()) for s in (1e-3, 0.5, 1e4)]
HARD = ["tied", "shifted by 1e6", "log-normal", "tiny", "Cauchy", "two values", "sorted", "outlier first"]
of_any_shape = pytest.mark.parametrize(
    "name", ["normal", *(pytest.param(name, marks=pytest.mark.slow) for name in HARD)]
)


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


@of_any_shape
@pytest.mark.parametrize("alpha", [1e-4, 0.1, 0.7])
def test_tail_means_are_those_of_the_cpu(alpha, name):
    z = torch.tensor(losses_like(name), dtype=torch.float32)
    found, failed = solved(z, CVaR(alpha))
    assert not failed
    expected = constrained_risk(z.double(), CVaR(alpha))
    assert found.threshold.item() == expected.threshold.item()
    agree(found, expected, torch.float32)


def test_tail_mean_in_float64():
    z = torch.tensor(losses_like("normal"))
    found, failed = solved(z, CVaR(0.1))
    assert not failed
    agree(found, constrained_risk(z, CVaR(0.1)), torch.float64)


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


def test_tail_fractions_that_are_refused():
    z = torch.tensor(losses_like("normal"), device=DEVICE)
    for alpha in (0.0, 1.5, np.nan):
        failed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        fraction = torch.tensor(alpha, dtype=torch.float64, device=DEVICE)
        with np.errstate(all="ignore"):
            _, fields = solve_long_rows(z, None, None, fraction, None, failed, 2, 0.0)
        assert failed.item() == 1
        assert fields.isnan().all()


def test_a_sample_that_misses_the_threshold():
    # Losses at equal distances, of which the sample is made, all lie below the tail.
    z = np.zeros(N)
    step = N // 4096
    z[np.arange(N) % step != step // 2] = 1 + np.random.default_rng(0).random(N - len(z[step // 2 :: step]))
    found, failed = solved(z, CVaR(0.4))
    assert not failed
    agree(found, constrained_risk(torch.tensor(z), CVaR(0.4)), torch.float64)


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


# --- the kernels as a GPU's compiler sees them, which allows less than the interpreter --------------------------------

COMPILE = """
import os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from drrho.solvers.device import long_passes, long_rows, long_tail

PTXAS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
TYPES = dict.fromkeys(("n", "parts", "turn", "passes"), "i32") | {"work": "*fp64", "order": "fp64", "alpha": "*fp64"}
TYPES |= dict.fromkeys(("counts", "failed"), "*i32")
FORMS = {"ball": ["radius_at"], "penalty": ["strength_at"], "hybrid": ["radius_at", "strength_at"]}


def check(function, held, given=(), **constants):
    for losses in ("*fp32", "*fp64"):
        single, width = losses == "*fp32", 1024 if losses == "*fp32" else 512
        types = TYPES | dict.fromkeys(("z", "weights", "fields"), losses) | dict.fromkeys(given, "*fp64")
        known = {"ROWS": held * 256 // width, "LANES": width, "ALIGNED": True, "PARTS": 256, "SAMPLE": 4096}
        known |= {"SINGLE": single, "BITS": 32 if single else 64} | constants
        names = function.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        fixed = {name: known.get(name) for name, kind in signature.items() if kind == "constexpr"}
        aligned = {(j,): [["tt.divisibility", 16]] for j, name in enumerate(names) if signature[name][0] == "*"}
        options = {"num_warps": 8, "maxnreg": 128 if held else None}
        source = ASTSource(function, signature, fixed, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "kernel.ptx")
            with open(path, "w") as file:
                file.write(compiled.asm["ptx"])
            command = [PTXAS, "-v", "-arch=sm_90a", path, "-o", path + ".cubin"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        spilled = re.findall(r"(\\d+) bytes spill stores", said)
        assert spilled == ["0"], (function, losses, constants, said)


family = int(sys.argv[1])
if family == 2:
    check(long_rows.look, 8)
    check(long_tail.start_tail, 0)
    check(long_tail.tally, 8)
    check(long_tail.weigh_tail, 8)
    check(long_tail.finish_tail, 8)
else:
    for given in FORMS.values():
        check(long_passes.start, 0, given, FAMILY=family)
        check(long_passes.finish, 8, given, FAMILY=family)
    check(long_passes.step, 8, FAMILY=family)
    check(long_passes.weigh, 4 if family else 8, FAMILY=family)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", [0, 1, 2])
def test_kernels_compile_for_a_gpu_without_spills(family):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", COMPILE, str(family)], check=True, env=environment)
