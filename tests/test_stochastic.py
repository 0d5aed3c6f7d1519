"""Risks from minibatches: exact on all data at once, and unbiased, or biased as predicted, on batches.

Monte Carlo comparisons are seeded and allow four standard errors; each also has power: what the estimator corrects,
or a nearby wrong one, lies many standard errors away.
"""

import math

import pytest
import torch
from families import EVERY, KINDS, SMOOTH_KINDS, thorough
from torch.autograd import grad
from torch.testing import assert_close

from drrho import KL, ChiSquare, CVaR, TotalVariation, constrained_risk, hybrid_risk, penalized_risk
from drrho.convex import minimize_linear
from drrho.stochastic import Multilevel, compositional_risk, dual_losses

EXACT = {"rtol": 1e-9, "atol": 1e-9}
RISKS = {
    "kl penalty": lambda z: penalized_risk(z, KL(), 0.7).value,
    "chi2 penalty": lambda z: penalized_risk(z, ChiSquare(), 0.7).value,
    "kl ball": lambda z: constrained_risk(z, KL(), 0.2).value,
    "chi2 ball": lambda z: constrained_risk(z, ChiSquare(), 0.2).value,
    "cvar": lambda z: constrained_risk(z, CVaR(0.3)).value,
}
every_risk = pytest.mark.parametrize("name", RISKS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def deviation(samples, exact):
    """Distance of the mean of independent samples from `exact`, in standard errors."""
    return ((samples.mean() - exact) / (samples.std() / math.sqrt(len(samples)))).item()


def assert_bias(samples, exact, predicted):
    """The mean is `predicted` away from `exact`, to four standard errors and the next order of the expansion."""
    error = samples.std() / math.sqrt(len(samples))
    assert abs(predicted) > 10 * error  # no bias at all would show
    assert abs(samples.mean() - exact - predicted) < 4 * error + 0.05 * abs(predicted)


def subsets(n, count, size, seed):
    """Indices of `count` batches of `size` drawn from n without replacement, each in random order."""
    return torch.rand(count, n, generator=generator(seed)).argsort(-1)[:, :size]


# The risk of the batch


@pytest.mark.slow
@every_risk
def test_the_risk_of_a_batch_is_low_by_order_one_over_b(name):
    data = normal(1000)
    exact = RISKS[name](data)
    bias = {}
    for b in (16, 32, 64):
        values = RISKS[name](data[torch.randint(1000, (40000, b), generator=generator(b))])
        assert deviation(values, exact) < -10
        bias[b] = (values.mean() - exact).item()
    for b in (16, 32):  # twice the batch, half the bias; with O(b^-1/2) the ratio is 1.41
        assert 1.75 < bias[b] / bias[2 * b] < 2.4


def test_without_replacement_the_risk_of_a_batch_is_low_too():
    data = normal(40)
    for risk in RISKS.values():
        assert deviation(risk(data[subsets(40, 20000, 20, seed=1)]), risk(data)) < -8


@pytest.mark.slow
@pytest.mark.parametrize("name, divergence", [("kl penalty", KL()), ("chi2 penalty", ChiSquare())])
def test_the_bias_of_a_penalty_is_that_of_its_dual_variable(name, divergence):
    data, b = normal(1000), 64
    exact = penalized_risk(data, divergence, 0.7)
    slope = divergence.conjugate_gradient((data - exact.threshold) / 0.7)  # 1 - slope is the dual's derivative
    hessian = divergence.curvature((data - exact.threshold) / 0.7).mean() / 0.7
    predicted = -slope.var(correction=0) / hessian / (2 * b)
    values = RISKS[name](data[torch.randint(1000, (200000, b), generator=generator(2))])
    assert_bias(values, exact.value, predicted)


# Dual variables


def ball(divergence):
    return 0.05 if divergence.has_radius else 0.0


@pytest.mark.parametrize("name", thorough(EVERY))
def test_at_the_optimal_dual_variables_the_mean_is_the_exact_risk(name):
    losses, divergence = normal(50).requires_grad_(), EVERY[name]
    for radius, risk in (
        (ball(divergence), constrained_risk(losses, divergence, ball(divergence))),
        (0.0, penalized_risk(losses, divergence, 4.0)),
    ):
        values = dual_losses(losses, divergence, risk.threshold, risk.strength.detach(), radius)
        assert_close(values.mean(), risk.value, **EXACT)
        if name not in ("tv", "cvar"):  # there the boundary loss has any ratio
            assert_close(grad(values.mean(), losses)[0], risk.weights, rtol=1e-7, atol=1e-9)


def test_the_derivative_for_cvar_is_the_weight_off_the_boundary():
    losses = normal(50).requires_grad_()
    risk = constrained_risk(losses, CVaR(0.35))
    (ratio,) = grad(dual_losses(losses, CVaR(0.35), risk.threshold).mean(), losses)
    off = losses != risk.threshold
    assert_close(ratio[off], risk.weights[off])
    assert off.sum() == 49


@pytest.mark.parametrize("name", thorough(KINDS))
def test_elsewhere_the_mean_is_higher(name):
    losses, divergence, radius = normal(50), EVERY[name], ball(EVERY[name])
    risk = constrained_risk(losses, divergence, radius)
    finite = 0
    for shift in (-0.3, -0.01, 0.01, 0.3):
        for factor in (0.5, 0.99, 1.0, 1.01, 2.0):
            try:
                values = dual_losses(losses, divergence, risk.threshold + shift, factor * risk.strength, radius)
            except ValueError as error:
                assert "raise threshold" in str(error)
            else:
                finite += 1
                assert values.mean() > risk.value - 1e-12
                if name in SMOOTH_KINDS:
                    assert values.mean() > risk.value + 1e-7
    assert finite >= 8


def test_the_dual_variables_of_a_ball_are_stationary_and_the_radius_has_its_multiplier():
    losses = normal(50)
    radius = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    risk = constrained_risk(losses, ChiSquare(), 0.1)
    duals = risk.threshold.requires_grad_(), risk.strength.requires_grad_()
    by_threshold, by_strength, by_radius = grad(
        dual_losses(losses, ChiSquare(), *duals, radius).mean(), (*duals, radius)
    )
    assert_close(torch.stack([by_threshold, by_strength]), torch.zeros(2, dtype=torch.float64), **EXACT)
    assert_close(by_radius, risk.strength.detach())


def test_both_a_price_and_a_radius_give_the_hybrid_risk():
    losses, price, radius = 3 * normal(50), 0.5, 0.1
    risk = hybrid_risk(losses, KL(), radius, price)
    assert risk.strength > price
    values = dual_losses(losses, KL(), risk.threshold, risk.strength, radius)
    assert_close(values.mean() - price * radius, risk.value, **EXACT)


def test_rows_have_dual_variables_radii_and_tails_of_their_own():
    losses, radius = normal(3, 50), torch.tensor([0.01, 0.1, 0.5])
    risk = constrained_risk(losses, KL(), radius)
    together = dual_losses(losses, KL(), risk.threshold, risk.strength, radius)
    assert_close(together.mean(-1), risk.value, **EXACT)
    tails = CVaR(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    square = normal(3, 3)  # as many losses as rows, where a tail per loss would pass unseen
    risk = constrained_risk(square, tails)
    assert_close(dual_losses(square, tails, risk.threshold).mean(-1), risk.value, **EXACT)


def test_dual_losses_keep_the_type():
    for given, answered in ((torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32)):
        assert dual_losses(torch.ones(3, dtype=given), KL(), 0.5, 2.0, 0.1).dtype == answered
    assert dual_losses([1.0, 2.0], KL(), 1, 2, 0).dtype == torch.float64


@pytest.mark.parametrize("divergence, domain", [(TotalVariation(), "raise threshold"), (KL(), "a loss of 1000.0")])
def test_losses_beyond_the_domain_are_refused(divergence, domain):
    with pytest.raises(ValueError, match=domain):
        dual_losses([0.0, 1000.0], divergence, 0.0, 1.0, 0.1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((KL(), 0.0), "strength must be given for KL"),
        ((KL(), 0.0, 0.0), "strength must be finite and > 0, got 0.0"),
        ((KL(), 0.0, -1.0), "strength must be finite and > 0, got -1.0"),
        ((KL(), 0.0, math.inf), "strength must be finite and > 0, got inf"),
        ((KL(), 0.0, 1.0, -0.1), "radius must be finite and >= 0, got -0.1"),
        ((KL(), math.nan, 1.0), "threshold must be finite, got nan"),
        ((KL(), torch.zeros(3), 1.0), "threshold of shape"),
    ],
)
def test_dual_variables_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        dual_losses(torch.ones(2), *arguments)


# Convergence: a regression with skewed noise, whose exact robust minimizer a conic program gives


def regression():
    n = 300
    x = torch.cat([torch.ones(n, 1, dtype=torch.float64), normal(n, 2, seed=3)], 1)
    noise = torch.empty(n, dtype=torch.float64).exponential_(generator=generator(4))
    return x, x @ torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64) + x[:, 1].abs() * (noise - 1)


def descend(x, y, parameters, loss_of_batch, steps=2000, lr=0.03):
    """Averaged stochastic gradient descent from the ordinary least squares; `parameters` are trained along."""
    model = torch.linalg.lstsq(x, y[:, None]).solution[:, 0].requires_grad_()
    optimizer = torch.optim.SGD([model, *parameters], lr=lr)
    average = torch.zeros(3, dtype=torch.float64)
    for step, rows in enumerate(torch.randint(len(y), (steps, 16), generator=generator(5))):
        optimizer.param_groups[0]["lr"] = lr / math.sqrt(1 + step / 100)
        optimizer.zero_grad()
        loss_of_batch((y[rows] - x[rows] @ model).square()).backward()
        optimizer.step()
        if step >= steps // 2:
            average += model.detach() / (steps - steps // 2)
    return average


def assert_minimizes(risk, model, x, y, best):
    """Ordinary least squares is 5 % or more above the minimum, `model` 1 % or less."""
    ordinary = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    assert risk((y - x @ ordinary).square()) > 1.05 * best
    assert (1 - 1e-6) * best < risk((y - x @ model).square()) < 1.01 * best


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.2)])
def test_descent_on_model_and_dual_variables_finds_the_minimizer(divergence):
    x, y = regression()
    radius = 0.2 if divergence.has_radius else 0.0
    start = constrained_risk(y[:64].square(), divergence, radius)
    threshold = start.threshold.requires_grad_()
    log_strength = (start.strength.log() if divergence.has_radius else torch.zeros(())).requires_grad_()
    model = descend(
        x,
        y,
        [threshold, log_strength],
        lambda losses: dual_losses(losses, divergence, threshold, log_strength.exp(), radius).mean(),
    )
    best = minimize_linear(x, y, divergence, radius=radius or None).value
    assert_minimizes(lambda z: constrained_risk(z, divergence, radius).value, model, x, y, best)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [{"gamma": 0.1}, {"log_step": -2.5}])
def test_descent_on_compositional_estimates_finds_the_minimizer(rate):
    (x, y), log_u = regression(), torch.tensor(-torch.inf)

    def loss_of_batch(losses):
        nonlocal log_u
        value, log_u = compositional_risk(losses, log_u, 8.0, **rate)
        return value

    model = descend(x, y, [], loss_of_batch)
    best = minimize_linear(x, y, KL(), strength=8.0).value
    assert_minimizes(lambda z: penalized_risk(z, KL(), 8.0).value, model, x, y, best)
    assert abs(8.0 * log_u.item() - best) < 0.25 * best


# Multilevel Monte Carlo


@pytest.mark.slow
@every_risk
def test_multilevel_is_unbiased_for_the_risk_of_all_data_and_its_gradient(name):
    data, direction, multilevel, count = normal(64, seed=6), normal(64, seed=9), Multilevel(4, 4), 20000
    assert multilevel.largest_size == 64
    risk, draws = RISKS[name], generator(8)
    sizes = torch.multinomial(torch.tensor(multilevel.probabilities), count, replacement=True, generator=draws)
    values, slopes = [], []
    for level, repeats in enumerate(sizes.bincount(minlength=4).tolist(), start=1):
        index = subsets(64, repeats, 4 << level, seed=level)
        batches = data[index].requires_grad_()
        estimates = multilevel.estimate(batches, risk)
        values.append(estimates.detach())
        slopes.append((grad(estimates.sum(), batches)[0] * direction[index]).sum(-1))
    whole = data.clone().requires_grad_()
    exact = risk(whole)
    slope = grad(exact, whole)[0] @ direction
    assert abs(deviation(torch.cat(values), exact.detach())) < 4
    assert abs(deviation(torch.cat(slopes), slope)) < 4
    assert deviation(risk(data[subsets(64, count, 4, seed=7)]), exact.detach()) < -25


def test_levels_are_drawn_with_their_probabilities_at_the_stated_cost():
    multilevel, draws = Multilevel(base_size=3, levels=4), generator(10)
    assert multilevel.probabilities == (0.5, 0.25, 0.125, 0.125)
    assert multilevel.expected_size == 15
    assert sum(p * 3 * 2**j for j, p in enumerate(multilevel.probabilities, start=1)) == 15
    sizes = torch.tensor([multilevel.draw_size(draws) for _ in range(4000)])
    for level, p in enumerate(multilevel.probabilities, start=1):
        share = (sizes == 3 * 2**level).double().mean().item()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 4000)
    assert set(sizes.tolist()) == {6, 12, 24, 48}
    assert Multilevel(5, 1).probabilities == (1.0,) and Multilevel(5, 1).draw_size() == 10


def test_one_level_is_the_risk_of_the_batch_and_constants_stay():
    losses = normal(2, 8)
    assert_close(Multilevel(4, 1).estimate(losses, RISKS["kl ball"]), RISKS["kl ball"](losses))
    for size in (2, 4, 8):
        assert_close(Multilevel(1, 3).estimate([0.7] * size, RISKS["cvar"]).item(), 0.7)


def test_a_multilevel_estimate_by_hand_with_a_radius_per_row():
    losses, radius = normal(2, 8), torch.tensor([0.05, 0.3])
    estimate = Multilevel(2, 3).estimate(losses, lambda z: constrained_risk(z, KL(), radius).value)
    for row, r, found in zip(losses, radius.tolist(), estimate, strict=True):
        whole, left, right = (constrained_risk(part, KL(), r).value for part in (row, row[:4], row[4:]))
        base = sum(constrained_risk(row[i : i + 2], KL(), r).value for i in (0, 2, 4, 6)) / 4
        assert_close(found, base + 4 * (whole - (left + right) / 2))


def test_wrong_sizes_and_levels_are_refused():
    for size in (4, 12, 64):
        with pytest.raises(ValueError, match=rf"one of \[8, 16, 32\], got {size}"):
            Multilevel(4, 3).estimate(torch.zeros(size), RISKS["cvar"])
    with pytest.raises(ValueError, match="base_size must be >= 1, got 0"):
        Multilevel(0, 3)
    with pytest.raises(ValueError, match="levels must be >= 1, got 0"):
        Multilevel(4, 0)


# Compositional moving average

NEVER = torch.tensor(-torch.inf)


@pytest.mark.parametrize("log_u", [-math.inf, -3.0, 40.0])
def test_all_data_at_rate_one_are_the_penalized_risk(log_u):
    losses = normal(2, 50).requires_grad_()
    exact = penalized_risk(losses, KL(), 0.3)
    step = compositional_risk(losses, torch.full((2,), log_u), 0.3, gamma=1.0)
    assert_close(step.value, exact.value)
    assert_close(grad(step.value.sum(), losses)[0], exact.weights)
    assert_close(step.log_u, exact.value.detach() / 0.3)
    assert not step.log_u.requires_grad


@pytest.mark.parametrize("rate", [{"gamma": 0.25}, {"log_step": -1.0}, {"log_step": torch.tensor([-1.0, 2.0])}])
def test_the_state_and_the_gradient_by_their_formulas(rate):
    losses, tau, u = normal(2, 6).requires_grad_(), 0.8, torch.tensor([0.5, 3.0], dtype=torch.float64)
    step = compositional_risk(losses, u.log(), tau, **rate)
    g = (losses / tau).exp().mean(-1).detach()
    if "gamma" in rate:
        u = 0.75 * u + 0.25 * g
    else:
        alpha = torch.as_tensor(rate["log_step"], dtype=torch.float64).exp()
        assert_close(torch.sigmoid(u.log() + alpha.log()), alpha * u / (1 + alpha * u))  # the rate
        u = (u + alpha * u * g) / (1 + alpha * u)  # the proximal step
    assert_close(step.log_u, u.log())
    assert_close(step.value, tau * u.log())
    weights = (losses.detach() / tau).exp() / u[:, None] / 6
    assert_close(grad(step.value.sum(), losses)[0], weights)


@pytest.mark.parametrize("rate", [{"gamma": 0.25}, {"log_step": -1.0}])
def test_the_first_step_takes_the_batch(rate):
    losses = normal(5)
    step = compositional_risk(losses, NEVER, 0.8, **rate)
    assert_close(step.value, penalized_risk(losses, KL(), 0.8).value)


def test_all_data_are_a_fixed_point_that_the_adaptive_rate_reaches():
    losses, log_u = normal(50), torch.tensor(5.0, dtype=torch.float64)
    for _ in range(200):
        log_u = compositional_risk(losses, log_u, 0.5, log_step=-1.0).log_u
    assert_close(0.5 * log_u, penalized_risk(losses, KL(), 0.5).value)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.5, 0.15])
def test_the_stationary_bias_is_that_of_the_delta_method(gamma):
    data, direction, b, chains = 0.6 * normal(1000, seed=11), normal(1000, seed=12) + 1, 16, 20000
    e = data.exp()
    g, slope = e.mean(), (e * direction).mean()
    v, c = e.var(correction=0) / b, ((e - g) * (e * direction - slope)).mean() / b
    log_u, draws = torch.full((chains,), -torch.inf, dtype=torch.float64), generator(13)
    for _ in range(math.ceil(4 / gamma)):
        index = torch.randint(1000, (chains, b), generator=draws)
        losses = data[index].requires_grad_()
        step = compositional_risk(losses, log_u, 1.0, gamma=gamma)
        log_u = step.log_u
    slopes = (grad(step.value.sum(), losses)[0] * direction[index]).sum(-1)
    u, batch_slope = log_u.exp(), (e * direction)[index].mean(-1)
    factor = gamma / (2 - gamma)
    # u and the batch's slope are unbiased, so their errors to first order, subtracted, take noise away and no bias.
    assert abs(deviation(u, g)) < 4
    assert_bias(step.value.detach() - (u / g - 1), g.log(), -factor * v / (2 * g**2))
    noise = batch_slope / g - slope / g * (u / g)
    assert_bias(slopes - noise, slope / g, factor * v * slope / g**3 - gamma * c / g**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_losses_stay_finite(dtype, shift):
    state = torch.tensor([-math.inf, shift, -1e4, 1e4], dtype=dtype)
    losses = (normal(5).to(dtype) + shift).expand(4, 5).clone().requires_grad_()
    rounding = 4e4 * torch.finfo(dtype).eps  # of exponents of size 1e4
    step = compositional_risk(losses, state, 1.0, gamma=0.1)
    (weights,) = grad(step.value.sum(), losses)
    assert torch.isfinite(step.log_u).all() and torch.isfinite(step.value).all()
    assert (weights >= 0).all() and (weights.sum(-1) <= 10 * (1 + rounding)).all()
    assert step.value.dtype == dtype


def test_the_adaptive_rate_keeps_what_it_takes_from_a_far_larger_state():
    # rate 1 - exp(-1000), and yet the old u leaves 1 / exp(log_step)
    step = compositional_risk(torch.zeros(3, dtype=torch.float64), torch.tensor(1000.0), 1.0, log_step=0.0)
    assert step.log_u.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"strength": 0.0}, "strength must be finite and > 0, got 0.0"),
        ({"strength": -1.0}, "strength must be finite and > 0, got -1.0"),
        ({"gamma": 0.0}, r"gamma must lie in \(0, 1\], got 0.0"),
        ({"gamma": 1.5}, r"gamma must lie in \(0, 1\], got 1.5"),
        ({"gamma": None}, "exactly one of gamma and log_step, got gamma=None and log_step=None"),
        ({"log_step": 1.0}, "exactly one of gamma and log_step, got gamma=0.5 and log_step=1.0"),
        ({"gamma": None, "log_step": math.inf}, "log_step must be finite, got inf"),
        ({"log_u": torch.zeros(3)}, r"log_u must have shape \[\], one per row of losses, got \[3\]"),
        ({"log_u": torch.tensor(math.nan)}, "log_u must be finite, .* got nan"),
        ({"log_u": torch.tensor(math.inf)}, "log_u must be finite, .* got inf"),
        ({"log_u": torch.tensor(-2000.0), "gamma": None, "log_step": 0.0}, "log_u must not lie .* got -2000.0"),
    ],
)
def test_compositional_arguments_out_of_range_are_refused(changed, message):
    arguments = {"losses": torch.zeros(4), "log_u": NEVER, "strength": 1.0, "gamma": 0.5} | changed
    with pytest.raises(ValueError, match=message):
        compositional_risk(**arguments)
