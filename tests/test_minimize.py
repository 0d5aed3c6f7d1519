"""Exact minimizers of linear predictors against other optimizers: values, and duality gaps that are true."""

import numpy as np
import pytest
from scipy.optimize import minimize

from drrho import KL, CappedKL, ChiSquare, CressieRead, CVaR, TotalVariation, constrained_risk
from drrho.convex import minimize_linear
from drrho.minimize import minimize_risk
from drrho.pointwise import Hinge, Logistic, Squared

RNG = np.random.default_rng(0)


def targets(loss, n, k):
    if isinstance(loss, Squared):
        return RNG.normal(size=(n, k))
    return RNG.choice([-1.0, 1.0], size=(n, 1)) if k == 1 else np.eye(k)[RNG.integers(k, size=n)]


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CressieRead(0.5)], ids=["kl", "chi2", "hellinger"])
@pytest.mark.parametrize("loss", [Squared(), Logistic()], ids=lambda loss: loss.name)
def test_the_minimum_is_that_of_another_optimizer(loss, divergence):
    x, y, l2, radius = RNG.normal(size=(40, 2)), targets(loss, 40, 1), 0.1, 0.05
    reference = 0.3 * np.abs(RNG.normal(size=40))
    fit = minimize_risk(
        x,
        y,
        loss,
        divergence,
        radius=radius,
        reference_losses=reference,
        l2=l2,
        fit_intercept=True,
        base_weights=None,
        tolerance=1e-9,
        max_iterations=50,
    )

    def objective(w):
        losses = loss.values((x @ w[:2] + w[2])[:, None], y) - reference
        return constrained_risk(losses, divergence, radius).value.item() + l2 / 2 * w[:2] @ w[:2]

    found = np.array([*fit.coefficients[:, 0], fit.intercept[0]])
    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
    best = minimize(objective, np.zeros(3), method="Nelder-Mead", options=options)
    assert objective(found) <= best.fun + 1e-12
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    assert fit.risk == pytest.approx(objective(found) - l2 / 2 * found[:2] @ found[:2], rel=1e-12)
    assert 0 <= fit.duality_gap <= 1e-8 and fit.iterations >= 1
    assert fit.weights.sum() == pytest.approx(1.0) and fit.weights.min() >= 0


def fitted(x, y, loss, divergence, radius, **given):
    options = {"reference_losses": None, "l2": 0.01, "fit_intercept": True, "base_weights": None}
    options |= {"tolerance": 1e-8, "max_iterations": 200}
    return minimize_risk(x, y, loss, divergence, radius=radius, **(options | given))


def objective(coefficients, intercept, x, y, loss, divergence, radius, reference, l2, base):
    losses = loss.values(x @ coefficients + intercept, y) - (0 if reference is None else reference)
    risk = constrained_risk(losses, divergence, radius, base_weights=base).value.item()
    return risk + l2 / 2 * np.square(coefficients).sum(), max(abs(risk), float(np.ptp(losses)))


BALLS = {
    "KL": (KL(), [0.0, 0.05, 20.0]),
    "chi-square": (ChiSquare(), [0.0, 3.0, 100.0]),
    "CVaR": (CVaR(0.3), [0.0]),
    "CVaR of one": (CVaR(0.01), [0.0]),
    "total variation": (TotalVariation(), [0.0, 0.1, 2.0]),
    "capped KL": (CappedKL(0.2), [5.0]),
    "order 3": (CressieRead(3.0), [0.5]),
}
KINDS = {
    "squared": (Squared(), 1),
    "two targets": (Squared(), 2),
    "logistic": (Logistic(), 1),
    "three classes": (Logistic(), 3),
    "hinge": (Hinge(), 1),
    "three hinges": (Hinge(), 3),
}


def sample(rng, kind, n=35, d=3):
    loss, k = KINDS[kind]
    x = rng.normal(size=(n, d)) * 10.0 ** rng.integers(-2, 3, size=d) + 3
    score = (x - x.mean(0)) / x.std(0) @ rng.normal(size=(d, k)) + rng.standard_t(3, size=(n, k))
    if isinstance(loss, Squared):
        return x, score
    return x, np.eye(k)[score.argmax(1)] if kind == "three classes" else np.where(score > 0, 1.0, -1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ball", BALLS)
def test_the_minimum_is_that_of_the_conic_program(kind, ball):
    rng = np.random.default_rng([list(KINDS).index(kind), list(BALLS).index(ball)])
    (loss, k), (divergence, radii) = KINDS[kind], BALLS[ball]
    for number, radius in enumerate(radii):
        x, y = sample(rng, kind)
        l2, intercept = [0.1, 0.0, 1e-3][(number + k) % 3], bool((number + len(ball)) % 2)
        reference = np.abs(rng.normal(size=35)) if number % 2 else None
        base = rng.dirichlet(np.full(35, 3.0)) if rng.integers(2) else None
        given = {"reference_losses": reference, "l2": l2, "fit_intercept": intercept, "base_weights": base}
        fit = fitted(x, y, loss, divergence, radius, **given)
        conic = minimize_linear(
            x,
            y if k > 1 else y[:, 0],
            divergence,
            loss=loss.name,
            radius=radius if divergence.has_radius else None,
            **given,
        )
        rest = (x, y, loss, divergence, radius, reference, l2, base)
        best, size = objective(fit.coefficients, fit.intercept, *rest)
        other, _ = objective(conic.coefficients.reshape(3, k), np.atleast_1d(conic.intercept), *rest)
        assert best <= other + 1e-6 * size + 1e-11
        assert 0 <= fit.duality_gap <= 1e-6 * size + 1e-11
        assert best - fit.duality_gap <= other + 1e-12 * size + 1e-11  # what the certificate says, to rounding
        assert fit.weights.sum() == pytest.approx(1) and fit.weights.min() >= 0


@pytest.mark.parametrize("kind", ["squared", "logistic", "hinge"])
@pytest.mark.parametrize("ball", ["CVaR", "chi-square", "total variation"])
def test_gaps_bound_what_can_be_gained_where_there_are_kinks(kind, ball):
    rng = np.random.default_rng(1)
    x, y = sample(rng, kind)
    loss, (divergence, radii) = KINDS[kind][0], BALLS[ball]
    fit = fitted(x, y, loss, divergence, radii[-1], tolerance=1e-3)  # stops early: the gap is not rounding
    rest = (x, y, loss, divergence, radii[-1], None, 0.01, None)
    best, size = objective(fit.coefficients, fit.intercept, *rest)
    assert 0 <= fit.duality_gap <= 1e-3 * size
    exact = fitted(x, y, loss, divergence, radii[-1])
    least, _ = objective(exact.coefficients, exact.intercept, *rest)
    assert least <= best + 1e-12 * size and best - fit.duality_gap <= least + 1e-12 * size


def test_a_large_chi_square_ball_on_noisy_labels_is_no_error():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 20))
    y = np.sign(x @ rng.normal(size=20) + rng.normal(size=1000))[:, None]
    fit = fitted(x, y, Logistic(), ChiSquare(), 3.0, l2=1e-3)
    assert fit.risk == pytest.approx(np.log(2), abs=1e-7)  # no predictor beats a constant in every seventh sample
    assert 0 <= fit.duality_gap <= 1e-8


@pytest.mark.parametrize("loss", [Logistic(), Hinge()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("divergence, radius", [(ChiSquare(), 0.1), (CVaR(0.3), 0.0)])
def test_separable_classes_without_a_penalty_reach_the_infimum(loss, divergence, radius):
    x = np.concatenate([RNG.normal(size=(20, 2)) - 5, RNG.normal(size=(20, 2)) + 5])
    y = np.repeat([-1.0, 1.0], 20)[:, None]
    fit = fitted(x, y, loss, divergence, radius, l2=0.0)
    assert 0 <= fit.risk <= fit.duality_gap <= 1e-10  # the infimum is 0, and for the logistic loss no minimum


def test_interpolated_targets_and_one_sample():
    x, y = RNG.normal(size=(3, 5)), RNG.normal(size=(3, 1))
    for divergence, radius in ((ChiSquare(), 10.0), (CVaR(0.5), 0.0), (KL(), 0.1)):
        fit = fitted(x, y, Squared(), divergence, radius, l2=0.0)
        assert fit.risk <= 1e-12 and 0 <= fit.duality_gap <= 1e-12
        alone = fitted(x[:1], y[:1], Squared(), divergence, radius)
        assert alone.risk == 0.0 and alone.duality_gap == 0.0


def test_an_unfinished_minimum_is_an_error():
    x, y = sample(np.random.default_rng(2), "logistic")
    with pytest.raises(RuntimeError, match=r"no minimum found in 2 steps: the duality gap is .* max_iter=2"):
        fitted(x, y, Logistic(), CVaR(0.3), 0.0, max_iterations=2)
    with pytest.raises(RuntimeError, match="give l2 > 0"):
        fitted(x, y, Logistic(), KL(), 0.1, max_iterations=1, l2=0.0)


def test_a_class_without_samples():
    x, y = sample(np.random.default_rng(3), "three classes")
    y = np.where(y[:, 2:] == 1, np.eye(3)[0], y)
    fit = fitted(x, y, Logistic(), KL(), 0.7, l2=0.1)  # its intercept is minus infinity at the infimum
    assert fit.intercept[2] < fit.intercept[:2].min() - 20
    assert 0 <= fit.duality_gap <= 1e-8


def test_a_ball_of_all_distributions_is_the_maximum_whatever_the_divergence():
    x, y = sample(np.random.default_rng(4), "squared")
    fits = [fitted(x, y, Squared(), divergence, 1e3) for divergence in (KL(), ChiSquare(), TotalVariation())]
    for fit in fits:
        assert fit.risk == pytest.approx(np.square(x @ fit.coefficients + fit.intercept - y).max(), rel=1e-12)
        assert fit.risk == pytest.approx(fits[0].risk, rel=1e-7)
