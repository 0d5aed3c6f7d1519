"""The compiled CPU kernels beside the same risks by torch operations."""

import contextlib
import subprocess
import warnings

import numpy as np
import problems
import pytest
import torch
from families import thorough_items
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import HARD, value_tolerance

from drrho import (
    KL,
    CappedKL,
    ChiSquare,
    CressieRead,
    CVaR,
    TotalVariation,
    constrained_risk,
    hybrid_risk,
    penalized_risk,
)
from drrho.solvers import native
from drrho.solvers.algorithms import algorithm_of
from experiments.benchmarks import certificates

pytestmark = pytest.mark.skipif("config.getoption('--portable')", reason="needs the kernels")

ORDERS = (1.5, 0.5, 3.0, -1.0, 0.0, 1.2, 1.0001)
DIVERGENCES = {
    "chi-square": ChiSquare(),
    "KL": KL(),
    "total variation": TotalVariation(),
    "capped KL 0.3": CappedKL(0.3),
    "capped KL 0.95": CappedKL(0.95),
} | {f"order {order:g}": CressieRead(order) for order in ORDERS}


def ball(divergence):
    return lambda z, x, base=None: constrained_risk(z, divergence, x, base_weights=base)


def penalty(divergence):
    return lambda z, x, base=None: penalized_risk(z, divergence, x, base_weights=base)


def hybrid(divergence):
    return lambda z, x, base=None: hybrid_risk(z, divergence, x, 0.3, base_weights=base)


RISKS = {
    f"{name} {kind.__name__}": kind(divergence)
    for name, divergence in DIVERGENCES.items()
    for kind in (ball, penalty, hybrid)
    if kind is not hybrid or name in ("chi-square", "KL", "total variation", "order 1.5")
} | {"CVaR": lambda z, x, base=None: constrained_risk(z, CVaR(min(1.0, x + 1e-3)), base_weights=base)}
every_risk = pytest.mark.parametrize("solve", RISKS.values(), ids=RISKS)
#: One that sums powers, one that sums exponentials, and what is found by selection.
SOME = {
    name: RISKS[name]
    for name in (
        "chi-square ball",
        "KL ball",
        "KL penalty",
        "CVaR",
        "total variation ball",
        "capped KL 0.3 ball",
        "order 1.5 penalty",
        "order 0.5 ball",
        "order 1.2 ball",
        "order 0 ball",
    )
}
some_risks = pytest.mark.parametrize("solve", SOME.values(), ids=SOME)


@contextlib.contextmanager
def torch_alone():
    """Do without the kernels."""
    built, native.library = native.library, None
    try:
        yield
    finally:
        native.library = built


def agree(solve, losses, parameter, dtype=torch.float64, base=None):
    z = torch.tensor(losses, dtype=dtype)
    fast = solve(z, parameter, base)
    with torch_alone():
        plain = solve(z, parameter, base)
    eps, scale = torch.finfo(dtype).eps, value_tolerance(losses, dtype)
    spread = float(np.ptp(np.float64(z.numpy())))
    torch.testing.assert_close(fast.value, plain.value, rtol=0, atol=scale)
    torch.testing.assert_close(fast.threshold, plain.threshold, rtol=1e-9 + 8 * eps, atol=scale)
    torch.testing.assert_close(fast.strength, plain.strength, rtol=1e-9 + 64 * eps, atol=1e-12 * spread)
    torch.testing.assert_close(fast.premium, plain.premium, rtol=1e-10 + 64 * eps, atol=4 * eps * spread)
    torch.testing.assert_close(
        fast.weights * len(losses), plain.weights * len(losses), rtol=1e-9 + 2000 * eps, atol=max(1e-11, 0.01 * eps)
    )
    assert fast.gap.abs() <= scale


def agree_in_value(solve, losses, parameter):
    """Where a small strength leaves thresholds and exponents few digits, or many thresholds are right."""
    fast = solve(torch.tensor(losses, dtype=torch.float64), parameter)
    scale = value_tolerance(losses, torch.float64)
    assert fast.gap.abs() <= scale
    assert fast.weights.sum() == pytest.approx(1, abs=1e-14)
    with torch_alone(), contextlib.suppress(RuntimeError):  # there the certificate may fail
        plain = solve(losses, parameter)
        torch.testing.assert_close(fast.value, plain.value, rtol=0, atol=scale + plain.gap.abs().item())


def some_base(n, seed=0):
    """Base weights of which some are zero, but not all."""
    rng = np.random.default_rng(seed)
    base = rng.exponential(size=n) * (rng.random(n) > 0.25)
    base[rng.integers(n)] = 1.0
    return base / base.sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", RISKS)
@pytest.mark.parametrize("losses", thorough_items(HARD, "normal", "tied maxima", "offset 1e8", "scale 1e-150"))
@pytest.mark.parametrize("parameter", [1e-8, 1e-3, 0.2, 3.0])
def test_same_answer_on_hard_rows(name, losses, parameter):
    # Without the kernels, exponents count from the maximum, far from the losses that decide here.
    blunt = name.startswith("capped") and (not name.endswith("ball") or losses is HARD["geometric decay"])
    (agree_in_value if blunt else agree)(RISKS[name], losses, parameter)


def test_capped_balls_whose_distance_has_a_plateau():
    losses = torch.tensor(HARD["geometric decay"])
    for radius in np.geomspace(1e-4, 1.3e-3, 40):
        risk = constrained_risk(losses, CappedKL(0.95), radius)
        assert risk.gap.abs() <= 1e-14


@every_risk
def test_same_answer(solve):
    losses = np.random.default_rng(0).normal(size=75)
    agree(solve, losses, 0.05)
    agree(solve, losses, 0.05, base=some_base(75))


@pytest.mark.slow
@some_risks
@pytest.mark.parametrize("n", [*range(1, 20), 255, 256, 257, 511, 512, 513, 2000])
def test_same_answer_at_any_length(solve, n):
    losses = np.random.default_rng(n).normal(size=n)
    agree(solve, losses, 0.1)
    agree(solve, losses, 0.1, torch.float32)
    agree(solve, losses, 0.1, base=some_base(n))


@pytest.mark.slow
@every_risk
@pytest.mark.parametrize("parameter", [1e-3, 0.2])
def test_same_answer_on_a_long_row(solve, parameter):
    """Where the iteration starts from a part of the losses, and the row is summed in pieces."""
    losses = np.random.default_rng(0).exponential(size=150_001)
    agree(solve, losses, parameter)


@pytest.mark.slow
@some_risks
def test_base_weights_shared_by_rows_or_one_for_each(solve):
    z = torch.randn(6, 300, dtype=torch.float64)
    bases = torch.tensor(np.array([some_base(300, seed) for seed in range(6)]))
    each, shared = solve(z, 0.1, bases), solve(z, 0.1, bases[2])
    for row in range(6):
        for risk, base in ((each, bases[row]), (shared, bases[2])):
            alone = solve(z[row], 0.1, base)
            assert torch.equal(alone.weights, risk.weights[row])
            assert alone.value == risk.value[row]


@some_risks
def test_a_loss_without_base_weight_does_not_count(solve):
    losses, base = [3.0, 1.0, 0.0, 2.0, 0.5], [0.4, 0.0, 0.3, 0.1, 0.2]
    expected = solve(losses, 0.05, base)
    for outside in (1e300, -1e300, 0.0):
        risk = solve([3.0, outside, 0.0, 2.0, 0.5], 0.05, base)
        assert torch.equal(risk.value, expected.value)
        assert torch.equal(risk.weights, expected.weights)
        assert risk.weights[1] == 0


@some_risks
def test_uniform_base_weights_are_none(solve):
    z = torch.randn(40, dtype=torch.float64)
    weighted, plain = solve(z, 0.1, torch.full((40,), 1 / 40, dtype=torch.float64)), solve(z, 0.1)
    torch.testing.assert_close(weighted.value, plain.value, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(weighted.weights, plain.weights, rtol=1e-11, atol=1e-15)


@some_risks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_have_weights_equal_in_every_bit(solve, dtype):
    z = torch.randint(0, 7, (1003,)).to(dtype)
    weights = solve(z, 0.1).weights
    for loss in range(7):
        assert len(torch.unique(weights[z == loss])) == 1


@pytest.mark.slow
@some_risks
def test_one_long_row_does_not_depend_on_threads(solve):
    z = torch.randn(2**20 + 77, dtype=torch.float64)
    shares = torch.randint(0, 1000, z.shape)
    shares[0] += 2**30 - shares.sum()
    base = shares.double() / 2**30  # whose sum is exact, however it is made
    threads, answers = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append((solve(z, 0.1), solve(z, 0.1, base)))
    finally:
        torch.set_num_threads(threads)
    for other in answers[1:]:
        for first, second in zip(answers[0], other, strict=True):
            for one, two in zip(first, second, strict=True):
                assert torch.equal(one, two)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_float32_losses_are_solved_as_in_float64(name):
    divergence = DIVERGENCES[name]
    z = (1e3 + torch.randn(700, dtype=torch.float64)).float()
    narrow, wide = (constrained_risk(losses, divergence, 1e-3) for losses in (z, z.double()))
    assert narrow.value.dtype == narrow.weights.dtype == torch.float32
    torch.testing.assert_close(narrow.value, wide.value.float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(narrow.premium, wide.premium.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(narrow.weights, wide.weights.float(), rtol=1e-6, atol=1e-12)
    tracked = constrained_risk(z.clone().requires_grad_(), divergence, 1e-3)
    torch.testing.assert_close(tracked.weights, narrow.weights, rtol=1e-6, atol=1e-12)


NARROW = {
    "normal": lambda n: torch.randn(n, dtype=torch.float64),
    "heavy tails": lambda n: torch.exp(3 * torch.randn(n, dtype=torch.float64)),
    "few values": lambda n: torch.randint(-2, 3, (n,)).double(),
    "far from zero": lambda n: 1e5 + torch.randn(n, dtype=torch.float64),
    "tiny": lambda n: 1e-40 * torch.randn(n, dtype=torch.float64),
    "huge": lambda n: 1e37 * torch.rand(n, dtype=torch.float64),
}


@pytest.mark.parametrize("name", ["KL", "chi-square", "order 1.5", "order 0.5", "total variation", "capped KL 0.3"])
@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("n", [2, 16, 100, 1003, 140_001])
def test_passes_in_float32_leave_no_trace(name, kind, n, monkeypatch):
    """The way to the multipliers may be in float32: answers and certificates are those of float64."""
    monkeypatch.setattr(native, "solve_declined", None)
    divergence, z = DIVERGENCES[name], NARROW[kind](n).float()
    z[0] += 1e-3 * (z.max() - z.min() + z.max().abs())  # not all the same
    for radius in (1e-6, 0.02, 0.3):
        narrow, wide = (constrained_risk(losses, divergence, radius) for losses in (z, z.double()))
        torch.testing.assert_close(narrow.premium, wide.premium.float(), rtol=2e-7, atol=1e-44)
        assert (narrow.weights - wide.weights).abs().sum() <= 4e-7
        assert abs(narrow.gap) <= 1e-7 * wide.premium


def test_not_finite_float32_losses_are_refused():
    for odd in (np.nan, np.inf, -np.inf):
        for place in (0, 5, 99):
            z = torch.linspace(0, 1, 100)
            z[place] = odd
            with pytest.raises(ValueError, match="finite"):
                constrained_risk(z, ChiSquare(), 0.1)


def test_weights_of_a_high_order_that_jump_are_solved_otherwise():
    """Above order 2 no number has the radius where a loss comes in with an infinite slope."""
    losses = torch.tensor([[0.0, 0.0, 1.0, 1.0, 3.0], [0.0, 1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    for radius in (0.05, 0.2, 0.4):
        fast = constrained_risk(losses, CressieRead(20.0), radius)
        with torch_alone():
            plain = constrained_risk(losses, CressieRead(20.0), radius)
        torch.testing.assert_close(fast.value, plain.value, rtol=1e-10, atol=0)
        torch.testing.assert_close(fast.weights, plain.weights, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(losses=problems.rows(min_size=2), parameter=problems.radii(-6, 2))
def test_same_answer_anywhere(name, losses, parameter):
    if "hybrid" in name:  # where the penalty's weights lie on the ball's edge, the multipliers of both are optimal
        divergence = DIVERGENCES[name.removesuffix(" hybrid")]
        ratios = penalized_risk(losses, divergence, 0.3).weights * len(losses)
        assume(abs(divergence.phi(ratios).mean() - parameter) > 1e-9 * parameter)
    if "capped" in name:  # torch operations have fewer digits where a capped loss lies far above the others
        agree_in_value(RISKS[name], losses, parameter)
    else:
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


@pytest.mark.slow
@some_risks
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
@settings(max_examples=120, deadline=None, derandomize=True, database=None)
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


def test_a_negative_base_weight_is_refused_inside_a_transform():
    z = torch.randn(3, 4, dtype=torch.float64)
    base = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match="base_weights must be >= 0"):
        torch.func.vmap(lambda row: constrained_risk(row, KL(), 0.1, base_weights=base).value)(z)


def test_missing_kernels_are_said_once(tmp_path, monkeypatch):
    library, missing = native._load(tmp_path)
    assert library is None
    monkeypatch.setattr(native, "library", library)
    monkeypatch.setattr(native, "missing", missing)
    with pytest.warns(RuntimeWarning, match="Install a C compiler"):
        risk = constrained_risk([0.0, 1.0, 2.0], KL(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = constrained_risk([0.0, 1.0, 2.0], KL(), 0.1)
    assert risk.value == again.value


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, why", [("int drrho_version(void) { return 1; }", "version 1"), ("int other;", "does not load")]
)
def test_kernels_of_other_sources_are_not_called(tmp_path, source, why):
    (tmp_path / "kernels.c").write_text(source)
    command = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "_kernels_default.so"), str(tmp_path / "kernels.c")]
    subprocess.run(command, check=True)
    library, missing = native._load(tmp_path)
    assert library is None
    assert why in missing


def test_a_maximum_that_no_ball_holds_is_no_answer():
    """The maximum has a base weight of 1e-7: at order 50 its D overflows, far beyond the radius."""
    base = np.array([0.999999914, 8.58180748e-08, 4.65637183e-11])
    losses = np.array([-3.82446509e-11, -3.73308179e-16, -1.42945362e-14])
    problem = certificates.Problem(losses, base / base.sum(), True, 1.12)
    order = 49.686840001623125
    risk = problem.solve(CressieRead(order))
    verdict = certificates.judge(problem, certificates.power(order), risk)
    assert verdict.error <= verdict.allowed
    assert abs(risk.gap) <= 1e-8 * risk.premium <= 1e-25  # far from the maximum, 4e-11 above the mean


@pytest.mark.parametrize("order", [-2.0, -1.0, 0.7, 1.2, 1.9, 2.5])
def test_sums_in_float32_on_the_way_cost_no_digits(order, monkeypatch):
    """Rows of powers are solved by sums in float32 first; none is declined, and gaps are those of float64."""
    monkeypatch.setattr(native, "solve_declined", None)
    z = torch.empty(64, 256, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    for risk in (constrained_risk(z, CressieRead(order), 0.5), penalized_risk(z, CressieRead(order), 1.0)):
        assert float((risk.gap / risk.premium).abs().max()) < 1e-11
        assert float((risk.weights.sum(-1) - 1).abs().max()) < 1e-14
