"""Sample weights for estimators: those of the core, in a pipeline and in a grid search."""

import numpy as np
import pytest
import torch
from families import EVERY
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from drrho import KL, ChiSquare, CVaR, drrho_risk
from drrho.integrations.sample_weights import drrho_weights


@pytest.mark.parametrize("name", EVERY)
def test_the_weights_are_those_of_the_core(name):
    losses, reference = np.random.default_rng(0).normal(size=(2, 30))
    weights = drrho_weights(losses, reference, EVERY[name], rho=2.0)
    expected = drrho_risk(losses, reference, EVERY[name], rho=2.0).weights.numpy()
    np.testing.assert_allclose(weights, 30 * expected, rtol=1e-6, atol=1e-12)
    assert weights.mean() == pytest.approx(1) and weights.dtype == np.float64


@pytest.fixture(scope="module")
def digits():
    """Digits of which 40 % have a wrong label, with losses of a model of each kind, and which are wrong."""
    x, y = load_digits(return_X_y=True)
    draws = np.random.default_rng(0)
    order = draws.permutation(len(x))
    x, y = x[order], y[order]
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.05)).fit(x[:300], y[:300])
    x, clean = x[300:900], y[300:900]
    wrong = draws.random(600) < 0.4
    y = np.where(wrong, (clean + draws.integers(1, 10, 600)) % 10, clean)
    target = make_pipeline(StandardScaler(), LogisticRegression(C=0.05))
    chances = cross_val_predict(target, x, y, cv=3, method="predict_log_proba")
    losses = [-found[range(600), y] for found in (chances, reference.predict_log_proba(x))]
    return x, y, clean, wrong, losses


def test_samples_that_are_hard_for_the_reference_weigh_little(digits):
    *_, wrong, losses = digits
    weights = drrho_weights(*losses, KL(), strength=1.0)
    assert weights[wrong].mean() < 0.4 < 1 < weights[~wrong].mean()


def test_in_a_pipeline(digits):
    x, y, clean, _, losses = digits
    weights = drrho_weights(*losses, CVaR(0.5))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.05))
    plain = model.fit(x, y).score(x, clean)
    steered = model.fit(x, y, logisticregression__sample_weight=weights).score(x, clean)
    assert steered > plain


def test_in_a_grid_search(digits):
    x, y, clean, _, losses = digits
    weights = drrho_weights(*losses, ChiSquare(), radius=0.5)
    search = GridSearchCV(DecisionTreeClassifier(random_state=0), {"max_depth": [4, 8]}, cv=3)
    plain = search.fit(x, y).score(x, clean)
    assert search.fit(x, y, sample_weight=weights).score(x, clean) > plain


def test_what_cannot_be_weighed_is_refused():
    with pytest.raises(ValueError, match=r"reference_losses must be finite, got nan at index \[1\]"):
        drrho_weights([1.0, 2.0], [0.0, np.nan], KL(), strength=1.0)
    with pytest.raises(ValueError, match="at least 2 samples to compare, got 1"):
        drrho_weights([1.0], [0.0], KL(), strength=1.0)
    with pytest.raises(ValueError, match="give radius, strength"):
        drrho_weights([1.0, 2.0], [0.0, 0.0], KL())
    with pytest.raises(ValueError, match=r"losses must have shape \[n\].*got \[2, 3\]"):
        drrho_weights(np.ones((2, 3)), np.ones((2, 3)), KL(), strength=1.0)
    with pytest.raises(TypeError, match="losses"):
        drrho_weights(["1", "2"], [0.0, 0.0], KL(), strength=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_a_graph_and_of_half_precision_are_weighed(dtype):
    losses = torch.tensor([2.0, 2.0, 2.0], dtype=dtype, requires_grad=True)
    weights = drrho_weights(losses, torch.tensor([0.125, 1.0, 4.0], dtype=dtype), KL(), strength=1.0)
    assert np.allclose(weights, drrho_weights([2.0, 2.0, 2.0], [0.125, 1.0, 4.0], KL(), strength=1.0), rtol=1e-6)
