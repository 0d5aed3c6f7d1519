"""The compiled CPU kernels beside the same risks by torch operations."""

import contextlib
import subprocess
import sys

import numpy as np
import problems
import pytest
import torch
from families import thorough_items
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import HARD, value_tolerance

from drrho import KL, ChiSquare, CressieRead, CVaR, TotalVariation, constrained_risk, hybrid_risk, penalized_risk
from drrho.solvers import native
from drrho.solvers.algorithms import algorithm_of

pytestmark = pytest.mark.skipif("config.getoption('--portable')", reason="needs the kernels")

RISKS = {
    "chi-square ball": lambda z, x: constrained_risk(z, ChiSquare(), x),
    "chi-square penalty": lambda z, x: penalized_risk(z, ChiSquare(), x),
    "chi-square hybrid": lambda z, x: hybrid_risk(z, ChiSquare(), x, 0.3),
    "KL ball": lambda z, x: constrained_risk(z, KL(), x),
    "KL penalty": lambda z, x: penalized_risk(z, KL(), x),
    "KL hybrid": lambda z, x: hybrid_risk(z, KL(), x, 0.3),
    "CVaR": lambda z, x: constrained_risk(z, CVaR(min(1.0, x + 1e-3))),
}
every_risk = pytest.mark.parametrize("solve", RISKS.values(), ids=RISKS)


@contextlib.contextmanager
def torch_alone():
    """Do without the kernels."""
    built, native.library = native.library, None
    try:
        yield
    finally:
        native.library = built


def agree(solve, losses, parameter, dtype=torch.float64):
    z = torch.tensor(losses, dtype=dtype)
    fast = solve(z, parameter)
    with torch_alone():
        plain = solve(z, parameter)
    eps, scale = torch.finfo(dtype).eps, value_tolerance(losses, dtype)
    spread = float(np.ptp(np.float64(z.numpy())))
    torch.testing.assert_close(fast.value, plain.value, rtol=0, atol=scale)
    torch.testing.assert_close(fast.threshold, plain.threshold, rtol=1e-9 + 8 * eps, atol=scale)
    torch.testing.assert_close(fast.strength, plain.strength, rtol=1e-9 + 64 * eps, atol=1e-12 * spread)
    torch.testing.assert_close(fast.premium, plain.premium, rtol=1e-10 + 64 * eps, atol=4 * eps * spread)
    torch.testing.assert_close(
        fast.weights * len(losses), plain.weights * len(losses), rtol=1e-9 + 2000 * eps, atol=1e-11
    )
    assert fast.gap.abs() <= scale


@pytest.mark.slow
@every_risk
@pytest.mark.parametrize("losses", thorough_items(HARD, "normal", "tied maxima", "offset 1e8", "scale 1e-150"))
@pytest.mark.parametrize("parameter", [1e-8, 1e-3, 0.2, 3.0])
def test_same_answer_on_hard_rows(solve, losses, parameter):
    agree(solve, losses, parameter)


@pytest.mark.slow
@every_risk
@pytest.mark.parametrize("n", [*range(1, 20), 255, 256, 257, 511, 512, 513, 2000])
def test_same_answer_at_any_length(solve, n):
    losses = np.random.default_rng(n).normal(size=n)
    agree(solve, losses, 0.1)
    agree(solve, losses, 0.1, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", RISKS)
@settings(max_examples=60, deadline=None)
@given(losses=problems.rows(min_size=2), parameter=problems.radii(-6, 2))
def test_same_answer_anywhere(name, losses, parameter):
    if "hybrid" in name:  # where the penalty's weights lie on the ball's edge, the multipliers of both are optimal
        divergence = KL() if "KL" in name else ChiSquare()
        ratios = penalized_risk(losses, divergence, 0.3).weights * len(losses)
        assume(abs(divergence.phi(ratios).mean() - parameter) > 1e-9 * parameter)
    agree(RISKS[name], losses, parameter)


def test_hybrid_whose_penalty_lies_on_the_edge_of_the_ball():
    z = torch.tensor([0.0, 0.0, 1.6875], dtype=torch.float64)
    fast = hybrid_risk(z, ChiSquare(), 1.0, 0.3)
    with torch_alone():
        plain = hybrid_risk(z, ChiSquare(), 1.0, 0.3)
    for risk in (fast, plain):  # the multipliers may differ, each with its certificate
        assert risk.value == pytest.approx(1.6875 - 0.3, rel=1e-15)
        assert torch.allclose(risk.weights, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), atol=1e-15)
        assert abs(risk.gap) <= 1e-14


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_orders_one_and_two_are_kl_and_chi_square(order):
    z = torch.randn(50, dtype=torch.float64)
    same = {1.0: KL(), 2.0: ChiSquare()}[order]
    assert algorithm_of(CressieRead(order)).kernel == algorithm_of(same).kernel
    assert torch.equal(constrained_risk(z, CressieRead(order), 0.1).weights, constrained_risk(z, same, 0.1).weights)
    assert algorithm_of(TotalVariation()).kernel is None
    assert algorithm_of(CressieRead(1.5)).kernel is None


def test_a_subclass_is_not_taken_for_its_parent():
    class Doubled(KL):
        def phi(self, t):
            return 2 * super().phi(t)

    assert algorithm_of(Doubled()).kernel is None


@pytest.mark.slow
@every_risk
def test_rows_are_independent_of_threads_layout_and_neighbors(solve):
    z = torch.randn(1030, 1024, dtype=torch.float64)
    whole = solve(z, 0.1)  # large enough for threads
    transposed = solve(z.T.contiguous().T, 0.1)
    assert torch.equal(whole.weights, transposed.weights)
    for row in (0, 514, 515, 1029):
        alone = solve(z[row], 0.1)
        assert torch.equal(alone.weights, whole.weights[row])
        assert alone.value == whole.value[row]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(solve(z, 0.1).weights, whole.weights)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@given(
    share=st.floats(1e-6, 1.0),
    kind=st.sampled_from(["normal", "geometric", "ties", "clustered", "huge", "reversed"]),
    n=st.sampled_from([300, 1000, 20_000]),
)
@settings(max_examples=120, deadline=None)
def test_selection_is_that_of_a_sort(share, kind, n):
    rng = np.random.default_rng(n)
    losses = {
        "normal": rng.normal(size=n),
        "geometric": 2.0 ** -rng.integers(0, 1000, size=n),
        "ties": rng.integers(0, 3, size=n).astype(float),
        "clustered": np.where(rng.random(n) < 0.01, 1e6, 1 + 1e-9 * rng.normal(size=n)),
        "huge": 1e307 * rng.normal(size=n),
        "reversed": -np.arange(n, dtype=float),
    }[kind]
    ordered = np.sort(losses)[::-1]
    risk = constrained_risk(torch.tensor(losses), CVaR(share))
    assert risk.threshold == ordered[min(n, max(1, int(np.ceil(share * n)))) - 1]


def test_overflowing_range_is_refused_in_its_row():
    z = torch.zeros(3, 5, dtype=torch.float64)
    z[1, 0], z[1, 1] = 1.7e308, -1.7e308
    with pytest.raises(ValueError, match="finite range"):
        constrained_risk(z, KL(), 0.1)


@pytest.mark.slow
def test_wheel_holds_the_kernels(tmp_path, pytestconfig):
    """The built package is one for this platform, and brings its libraries."""
    from hatchling.builders.wheel import WheelBuilder

    (built,) = WheelBuilder(str(pytestconfig.rootpath)).build(directory=str(tmp_path), versions=["standard"])
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", built], capture_output=True, text=True).stdout
    assert "_kernels_default.so" in names
    assert "py3-none-any" not in built
