"""The bilinear model: its closed forms are the library's minimizers, and its formulas what data of it say."""

import numpy as np
import pytest
import torch

from drrho import KL, ChiSquare, CVaR
from drrho.contrastive import contrastive_risk
from experiments.linear.bilinear import (
    Model,
    Pairs,
    beats_selection_from,
    error_of,
    estimate,
    learnable,
    mixed,
    pays_from,
    predicted,
    scores,
    selected,
)

STRONG = Model(3, 6)
GRID = np.meshgrid([0.1, 0.3, 0.6, 1.0], [100, 1000, 10_000], [50, 500, 5000])


def drawn(model, n, eta, seed=0):
    return mixed(model.draw(np.random.default_rng(seed), n), n, eta)


def gradient(pairs, w, divergence, reference=None, **options):
    """The gradient of the library's contrastive risk, of similarities x^T W y, at W."""
    x, y = torch.from_numpy(pairs.x), torch.from_numpy(pairs.y)
    w = torch.from_numpy(w).requires_grad_()
    steering = None if reference is None else (x @ torch.from_numpy(reference), y)
    step = contrastive_risk(x @ w, y, 1.0, reference=steering, divergence=divergence, **options)
    step.value.backward()
    return w.grad.numpy(), step


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.3)], ids=str)
def test_a_steered_minimizer_is_the_reference_plus_the_twin(divergence):
    pairs, rng = drawn(STRONG, 80, 0.6), np.random.default_rng(1)
    w, reference = rng.standard_normal((2, 6, 6))
    twin, own = gradient(pairs, w, divergence)
    steered, step = gradient(pairs, reference + w, divergence, reference)
    np.testing.assert_allclose(steered, twin, atol=1e-12)  # also where both are zero
    for a, b in zip(step.distances, own.distances, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)  # and so are the weights of negatives
    elsewhere, _ = gradient(pairs, w, divergence, reference)
    assert abs(elsewhere - twin).max() > 0.01


def test_minimizers_of_the_kl_risk_differ_by_the_reference():
    pairs, reference = drawn(Model(2, 3, 0.5), 150, 0.7), np.random.default_rng(1).standard_normal((3, 3)) / 2
    found = []
    for steering in (None, reference):
        w = torch.zeros(3, 3, dtype=torch.float64)
        options = {"max_iter": 300, "line_search_fn": "strong_wolfe", "tolerance_grad": 1e-12, "tolerance_change": 0}
        optimizer = torch.optim.LBFGS([w], **options)

        def closure(w=w, steering=steering):
            w.grad = torch.from_numpy(gradient(pairs, w.detach().numpy(), KL(), steering)[0])
            return gradient(pairs, w.detach().numpy(), KL(), steering)[1].value

        optimizer.step(closure)
        found.append(w.numpy())
    np.testing.assert_allclose(found[1] - reference, found[0], atol=1e-6)


def test_the_closed_form_minimizes_the_chi_square_risk_where_weights_are_positive():
    x, noise = np.random.default_rng(0).uniform(-1, 1, (2, 400, 2))
    y = 0.1 * x + noise
    pairs = Pairs(x - x.mean(0), y - y.mean(0), np.ones(400, bool))
    w = estimate(pairs)
    assert (pairs.x @ w @ pairs.y.T).min() > -1  # the weights are 1 plus these
    found, _ = gradient(pairs, w, ChiSquare(), include_positive=True)
    np.testing.assert_allclose(found, 0, atol=1e-12)
    assert abs(gradient(pairs, 1.1 * w, ChiSquare(), include_positive=True)[0]).max() > 1e-3


def test_estimates_are_equivariant_so_that_coordinates_lose_no_generality():
    pairs, rng = drawn(STRONG, 300, 0.6), np.random.default_rng(2)
    a, b = rng.standard_normal((2, 6, 6))
    mapped = estimate(Pairs(pairs.x @ a, pairs.y @ b, pairs.matched))
    np.testing.assert_allclose(a @ mapped @ b.T, estimate(pairs), atol=1e-10)


@pytest.mark.parametrize("eta", [1.0, 0.7, 0.3])
def test_information_is_that_of_repeated_samples(eta):
    n, repeats = 5000, 60
    tangents = []
    for seed in range(repeats):
        sine = STRONG.error(STRONG.truncated(estimate(drawn(STRONG, n, eta, seed))))
        tangents.append(sine**2 / (1 - sine**2))
    mean, error = np.mean(tangents), np.std(tangents, ddof=1) / np.sqrt(repeats)
    assert 1 / (n * STRONG.information(eta)) == pytest.approx(mean, abs=4 * error + 0.03 * mean)


def test_little_correlation_leaves_the_rate_of_the_simple_formula():
    faint = Model(4, 26, 0.01)
    for eta in (0.2, 1.0):
        assert faint.information(eta) == pytest.approx(eta**2 * 0.01**2 / (2 * 26 - 4), rel=0.01)


def test_errors_are_sines_of_angles():
    target = np.zeros((6, 6))
    target[:3, :3] = np.eye(3)
    aside = np.zeros((6, 6))
    aside[4, 5] = np.sqrt(3)
    angles = np.array([0.0, 0.3, 1.2])
    found = STRONG.error(np.cos(angles)[:, None, None] * target + np.sin(angles)[:, None, None] * aside)
    np.testing.assert_allclose(found, np.sin(angles), atol=1e-7)
    assert STRONG.error(-target) == 1 and STRONG.error(0 * target) == 1
    assert error_of(np.tan(0.3) ** -2) == pytest.approx(np.sin(0.3))


def test_truncation_keeps_the_largest_singular_values():
    w = np.random.default_rng(0).standard_normal((2, 6, 6))
    singular = np.linalg.svd(STRONG.truncated(w), compute_uv=False)
    np.testing.assert_allclose(singular[:, :3], np.linalg.svd(w, compute_uv=False)[:, :3])
    np.testing.assert_allclose(singular[:, 3:], 0, atol=1e-12)


def test_a_share_of_the_pairs_is_matched():
    pairs = drawn(STRONG, 40_000, 0.3)
    assert pairs.matched.mean() == pytest.approx(0.3, abs=0.01)
    for chosen, expected in ((pairs.matched, 0.8), (~pairs.matched, 0.0)):
        cross = pairs.x[chosen].T @ pairs.y[chosen] / chosen.sum()
        np.testing.assert_allclose(cross, np.diag([expected] * 3 + [0] * 3), atol=0.05)
    np.testing.assert_allclose(pairs.x.mean(0), 0, atol=1e-12)


def test_selections_keep_what_ranks_highest():
    pairs, truth = drawn(STRONG, 500, 0.5), np.diag([1.0] * 3 + [0.0] * 3)
    ranking = scores(pairs, truth)
    np.testing.assert_allclose(ranking, np.diag(pairs.x @ truth @ pairs.y.T))
    half, everything = selected(pairs, ranking, (0.5, 1.0))
    np.testing.assert_allclose(everything, estimate(pairs), atol=1e-12)
    best = np.argsort(-ranking)[:250]
    inverse = [np.linalg.inv(view.T @ view / 500) for view in (pairs.x, pairs.y)]
    expected = inverse[0] @ (pairs.x[best].T @ pairs.y[best] / 250) @ inverse[1]
    np.testing.assert_allclose(half, expected, atol=1e-12)
    first, whole = learnable(STRONG, pairs, truth, (0.5, 1.0), chunks=1)  # before anything is learned
    np.testing.assert_allclose(first, half, atol=1e-12)
    np.testing.assert_allclose(whole, everything, atol=1e-12)
    assert abs(learnable(STRONG, pairs, truth, (0.5,))[0] - half).max() > 1e-3


def test_the_best_coefficient_adds_informations():
    eta, n, m = GRID
    found = predicted(STRONG, eta, n, m)
    assert (found.steered < np.minimum(found.twin, found.reference)).all() and (found.both <= found.selected).all()
    reference, twin = (m * STRONG.information(1), n * STRONG.information(eta))
    best = predicted(STRONG, eta, n, m, eta * reference / twin).published
    np.testing.assert_allclose(best, found.steered)
    for factor in (0.5, 2.0):
        assert (predicted(STRONG, eta, n, m, factor * eta * reference / twin).published > best).all()


@pytest.mark.parametrize("coefficient", [0.25, 1.0, 3.0])
def test_where_steering_pays_is_where_it_is_predicted_to_be_better(coefficient):
    eta, n, m = GRID
    found = predicted(STRONG, eta, n, m, coefficient)
    ratio = m * STRONG.information(1) / (n * STRONG.information(eta))
    pays = ratio > pays_from(eta, coefficient)
    assert 0 < pays.mean() < 1
    assert ((found.published < found.twin) == pays).all()


def test_a_perfect_filter_is_better_below_its_border():
    eta, n, m = GRID
    faint = Model(4, 26, 0.01)
    found = predicted(faint, eta, n, m)
    ratio = m * faint.information(1) / (n * faint.information(eta))
    clear = abs(ratio - beats_selection_from(eta)) > 0.01 * ratio
    assert ((found.steered < found.selected) == (ratio > beats_selection_from(eta)))[clear].all()
