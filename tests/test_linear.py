"""Linear DRRho models: scikit-learn's contract, agreement with conic programs and with scikit-learn's own models."""

import pickle
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.ensemble import BaggingClassifier, BaggingRegressor
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, ShuffleSplit, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import scale
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator

from drrho import KL, CappedKL, ChiSquare, CressieRead, CVaR, TotalVariation, constrained_risk, drrho_risk
from drrho.choosing import choose_rho
from drrho.convex import minimize_linear
from drrho.linear import DRRhoClassifier, DRRhoRegressor

CASES = {
    "KL": (KL(), 0.05),
    "KL tiny": (KL(), 1e-6),
    "KL past the maximum": (KL(), 10.0),
    "chi-square": (ChiSquare(), 0.05),
    "chi-square large": (ChiSquare(), 2.0),
    "Hellinger": (CressieRead(0.5), 0.1),
    "capped KL": (CappedKL(0.2), 0.1),
    "CVaR": (CVaR(0.1), None),
    "CVaR of all": (CVaR(1.0), None),
    "total variation": (TotalVariation(), 0.1),
    "mean": (ChiSquare(), 0.0),
}
every_case = pytest.mark.parametrize("divergence, radius", CASES.values(), ids=CASES)


def table(seed=0, n=120, d=5, classes=2):
    """Features in different units, real targets, labels -1 and 1 (or 0, 1, 2), and losses of some reference."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * 10.0 ** rng.integers(-2, 3, size=d) + 3
    score = scale(x) @ rng.normal(size=(d, classes)) + rng.standard_t(3, size=(n, classes))
    labels = np.where(score[:, 0] > 0, 1, -1) if classes == 2 else score.argmax(1)
    return x, score[:, 0], labels, 0.3 * np.abs(rng.normal(size=n))


def objective(model, losses, reference):
    """Risk and penalty at a fitted model, from the definition."""
    divergence = model.divergence
    risk = constrained_risk(losses - reference, divergence, model.radius_).value.item()
    return risk + model.l2 / 2 * np.square(model.coef_).sum()


@pytest.mark.slow
@pytest.mark.parametrize("model", [DRRhoRegressor(), DRRhoRegressor(KL()), DRRhoClassifier(), DRRhoClassifier(KL())])
@pytest.mark.filterwarnings("ignore")  # scikit-learn's checks warn on purpose
def test_scikit_learn_contract(model):
    assert check_estimator(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [DRRhoClassifier(CVaR(0.5)), DRRhoClassifier(loss="hinge"), DRRhoRegressor(CVaR(0.5))]
)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_contract_where_there_are_kinks(model):
    asked = "check_sample_weight_equivalence_on_dense_data"
    results = check_estimator(
        model, on_fail=None, expected_failed_checks={asked: "asks 1e-7 of coefficients; a gap of 1e-8 leaves 1e-4"}
    )
    assert not [result["check_name"] for result in results if result["status"] == "failed"]
    assert sum(result["status"] == "passed" for result in results) > 40


@pytest.mark.slow
@every_case
def test_regression_agrees_with_the_conic_program(divergence, radius):
    x, y, _, reference = table()
    model = DRRhoRegressor(divergence, radius=radius, reference=reference, l2=0.01).fit(x, y)
    conic = minimize_linear(x, y, divergence, radius=radius, reference_losses=reference, l2=0.01, fit_intercept=True)
    value = objective(model, np.square(y - model.predict(x)), reference)
    assert value == pytest.approx(conic.value, rel=1e-6, abs=1e-6)
    assert model.risk_ == pytest.approx(value - 0.005 * np.square(model.coef_).sum(), rel=1e-12)
    kinks = isinstance(divergence, TotalVariation) or divergence == CVaR(0.1) or radius == 10.0
    losses = np.square(y - model.predict(x)) - reference
    assert 0 <= model.duality_gap_ <= 1e-8 * max(abs(model.risk_), np.ptp(losses))
    if not kinks:  # more exact than the conic solution
        at_conic = constrained_risk(conic.losses - reference, divergence, radius or 0.0).value.item()
        assert value <= at_conic + 0.005 * np.square(conic.coefficients).sum() + 1e-10
        assert 0 <= model.duality_gap_ <= 1e-8 * max(1, abs(value))
        np.testing.assert_allclose(model.predict(x), x @ conic.coefficients + conic.intercept, atol=2e-3)


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("loss", ["logistic", "hinge", "squared"])
def test_classification_agrees_with_the_conic_program(divergence, radius, loss):
    x, _, y, reference = table(1)
    model = DRRhoClassifier(divergence, loss=loss, radius=radius, reference=reference, l2=0.01).fit(x, y)
    conic = minimize_linear(
        x, y, divergence, loss=loss, radius=radius, reference_losses=reference, l2=0.01, fit_intercept=True
    )
    f = model.decision_function(x)
    losses = {"logistic": np.logaddexp(0, -y * f), "hinge": np.maximum(0, 1 - y * f), "squared": np.square(y - f)}[loss]
    assert objective(model, losses, reference) == pytest.approx(conic.value, rel=1e-6, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["logistic", "hinge", "squared"])
@pytest.mark.parametrize("divergence, radius", [(KL(), 0.1), (ChiSquare(), 0.3), (CVaR(0.3), None)])
def test_three_classes_agree_with_the_conic_program(divergence, radius, loss):
    x, _, y, reference = table(2, classes=3)
    model = DRRhoClassifier(divergence, loss=loss, radius=radius, reference=reference, l2=0.01).fit(x, y)
    one_hot = np.eye(3)[y]
    targets = one_hot if loss == "logistic" else 2 * one_hot - 1
    conic = minimize_linear(
        x, targets, divergence, loss=loss, radius=radius, reference_losses=reference, l2=0.01, fit_intercept=True
    )
    f = model.decision_function(x)
    losses = {
        "logistic": np.logaddexp.reduce(f, axis=1) - f[np.arange(len(y)), y],
        "hinge": np.maximum(0, 1 - targets * f).sum(1),
        "squared": np.square(targets - f).sum(1),
    }[loss]
    assert objective(model, losses, reference) == pytest.approx(conic.value, rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(conic.losses, losses, atol=5e-2)


def test_radius_zero_is_ridge_regression():
    x, y = load_diabetes(return_X_y=True)
    ours = DRRhoRegressor(radius=0, l2=0.2).fit(x, y)
    theirs = Ridge(alpha=0.1 * len(x)).fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-10)
    plain = DRRhoRegressor(radius=0, l2=0).fit(x, y)
    np.testing.assert_allclose(plain.predict(x), LinearRegression().fit(x, y).predict(x), rtol=1e-9)


@pytest.mark.parametrize("load", [load_breast_cancer, load_wine])
def test_radius_zero_is_logistic_regression(load):
    x, y = load(return_X_y=True)
    x = scale(x)
    ours = DRRhoClassifier(radius=0, l2=0.1).fit(x, y)
    theirs = LogisticRegression(C=10 / len(x), tol=1e-10, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-6)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)
    assert np.array_equal(ours.predict(x), theirs.predict(x))


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CressieRead(0.5), CappedKL(0.3)])
@pytest.mark.parametrize("rho", [1e-4, 1.0, 30.0])
def test_duality_gap_bounds_what_can_be_gained(divergence, rho):
    x, y, _, reference = table(3)
    x = scale(x)
    model = DRRhoRegressor(divergence, rho=rho, reference=reference, l2=0.1).fit(x, y)
    best = objective(model, np.square(y - model.predict(x)), reference)
    rng = np.random.default_rng(0)
    for size in (1e-6, 1e-4, 1e-2, 1.0):
        for _ in range(10):
            coefficients = model.coef_ + size * rng.normal(size=5)
            losses = np.square(y - x @ coefficients - model.intercept_ - size * rng.normal())
            moved = constrained_risk(losses - reference, divergence, rho / len(y)).value.item()
            assert moved + 0.05 * np.square(coefficients).sum() >= best - model.duality_gap_ - 1e-12 * abs(best)
    # A Newton method that stopped early would not have closed it.
    assert model.duality_gap_ <= 1e-8 * max(1.0, abs(best))


def test_an_unfinished_fit_is_not_called_done():
    x, _, y, _ = table(4)
    with pytest.raises(RuntimeError, match=r"no minimum found in 1 steps: .* Raise max_iter=1"):
        DRRhoClassifier(KL(), radius=0.3, max_iter=1).fit(x, y)
    assert DRRhoClassifier(KL(), radius=0.3).fit(x, y).n_iter_ > 1


def test_no_conic_solver_is_needed(monkeypatch):
    for module in ("cvxpy", "drrho.convex", "drrho.conic"):
        monkeypatch.setitem(sys.modules, module, None)
    x, y, _, _ = table(4)
    assert 0 <= DRRhoRegressor(CVaR(0.2)).fit(x, y).duality_gap_ < 1e-5


def test_reference_as_estimator_function_and_losses_is_the_same():
    x, y = load_breast_cancer(return_X_y=True)
    x = scale(x)
    reference = LogisticRegression(C=0.1).fit(x[:200], y[:200])
    losses = -reference.predict_log_proba(x[200:])[np.arange(len(y) - 200), y[200:]]
    fits = [
        DRRhoClassifier(KL(), rho=2.0, reference=given).fit(x[200:], y[200:])
        for given in (
            reference,
            losses,
            torch.tensor(losses),
            lambda features, labels: -reference.predict_log_proba(features)[np.arange(len(labels)), labels],
            DRRhoClassifier(radius=0, l2=1 / (0.1 * 200), tol=1e-14).fit(x[:200], y[:200]),
        )
    ]
    for fit in fits[1:4]:
        assert np.array_equal(fit.coef_, fits[0].coef_)
    np.testing.assert_allclose(fits[4].coef_, fits[0].coef_, atol=1e-3)  # scikit-learn's default tolerance
    assert abs(DRRhoClassifier(KL(), rho=2.0).fit(x[200:], y[200:]).coef_ - fits[0].coef_).max() > 0.1


def test_reference_scores_for_the_hinge_loss():
    x, _, y, _ = table(5)
    x = scale(x)
    machine = LinearSVC(random_state=0).fit(x[:60], y[:60])
    with_scores = DRRhoClassifier(loss="hinge", rho=1.0, reference=machine).fit(x[60:], y[60:])
    losses = np.maximum(0, 1 - y[60:] * machine.decision_function(x[60:]))
    assert np.array_equal(
        with_scores.coef_, DRRhoClassifier(loss="hinge", rho=1.0, reference=losses).fit(x[60:], y[60:]).coef_
    )


@pytest.mark.parametrize("divergence", [KL(), ChiSquare()])
def test_minimizer_beats_the_reference_and_every_other_model_on_its_own_risk(divergence):
    x, y = load_diabetes(return_X_y=True)
    x, y = scale(x), scale(y)
    reference = LinearRegression().fit(x[:150], y[:150])
    target = DRRhoRegressor(divergence, rho=2.0, reference=reference, l2=0).fit(x[150:], y[150:])
    others = [reference, LinearRegression().fit(x[150:], y[150:]), Ridge(10.0).fit(x[150:], y[150:])]

    def risk(model):
        losses, of_reference = (np.square(y[150:] - m.predict(x[150:])) for m in (model, reference))
        return drrho_risk(losses, of_reference, divergence, rho=2.0).value.item()

    assert risk(target) == pytest.approx(target.risk_, abs=1e-12)
    assert risk(reference) == 0.0
    assert target.risk_ < min(map(risk, others))


def test_rho_is_radius_times_the_number_of_samples():
    x, y, _, _ = table(6)
    by_rho = DRRhoRegressor(rho=3.0).fit(x, y)
    assert by_rho.radius_ == 3.0 / len(y)
    assert np.array_equal(by_rho.coef_, DRRhoRegressor(radius=3.0 / len(y)).fit(x, y).coef_)
    assert DRRhoRegressor().fit(x, y).radius_ == 1 / len(y)


def test_weights_of_samples():
    x, y, _, reference = table(7)
    counts = np.random.default_rng(0).integers(0, 4, size=len(y))
    weighted = DRRhoRegressor(KL(), rho=2.0, reference=reference).fit(x, y, sample_weight=counts)
    repeated = DRRhoRegressor(KL(), rho=2.0, reference=reference.repeat(counts)).fit(
        x.repeat(counts, 0), y.repeat(counts)
    )
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-7)
    assert weighted.weights_.shape == y.shape
    assert (weighted.weights_[counts == 0] == 0).all()
    assert weighted.weights_.sum() == pytest.approx(1)


@pytest.mark.parametrize("classes", [2, 3])
def test_log_probabilities_far_away_are_the_scores(classes):
    x, _, y, _ = table(10, classes=classes)
    model = DRRhoClassifier().fit(x, y)
    far = x[:4] + 1e4 * np.sign(x[:4])
    scores = model.decision_function(far)
    logarithms = model.predict_log_proba(far)
    assert np.isfinite(logarithms).all() and logarithms.min() < -1000
    if classes == 2:
        expected = np.stack([-np.logaddexp(0, scores), -np.logaddexp(0, -scores)], axis=1)
    else:
        expected = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    np.testing.assert_allclose(logarithms, expected, rtol=1e-13, atol=1e-300)
    np.testing.assert_allclose(model.predict_log_proba(x), np.log(model.predict_proba(x)), rtol=1e-9)


@pytest.mark.parametrize("classes", [2, 3])
def test_reference_losses_far_away_are_finite(classes):
    x, _, y, _ = table(11, classes=classes)
    x = scale(x)
    reference = LogisticRegression().fit(x, y)
    far, labels = np.vstack([x, 1e4 * x[:5]]), np.append(y, reference.predict(-1e4 * x[:5]))
    scores = reference.decision_function(far)
    if classes == 2:
        losses = np.logaddexp(0, -labels * scores)
    else:
        losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(far)), labels]
    assert losses.max() > 1000
    steered = DRRhoClassifier(radius=0.01, l2=0.1, reference=reference).fit(far, labels)
    expected = DRRhoClassifier(radius=0.01, l2=0.1).fit(far, labels, reference_losses=losses)
    np.testing.assert_allclose(steered.coef_, expected.coef_, rtol=1e-9)


class Doubtful(LogisticRegression):
    """Probabilities that are not the softmax of the scores."""

    def predict_proba(self, X):
        certain = super().predict(X)[:, None] == self.classes_
        return certain.astype(float)


def test_a_reference_that_excludes_a_label_is_refused():
    x, _, y, _ = table(12)
    with pytest.raises(ValueError, match=r"reference must give one finite loss .* with inf"):
        DRRhoClassifier(reference=Doubtful().fit(x, y)).fit(x, y)


X, Y, LABELS, _ = table()
CODES = (LABELS > 0).astype(int)
STEERED = {
    "classifier": (DRRhoClassifier(rho=0.01, reference=LogisticRegression().fit(scale(X)[:60], CODES[:60])), CODES),
    "regressor": (DRRhoRegressor(rho=0.01, reference=Ridge().fit(scale(X)[:60], Y[:60])), Y),
    "frozen": (DRRhoRegressor(rho=0.01, reference=FrozenEstimator(Ridge().fit(scale(X)[:60], Y[:60]))), Y),
    "pipeline": (DRRhoRegressor(rho=0.01, reference=make_pipeline(Ridge()).fit(scale(X)[:60], Y[:60])), Y),
    "function": (DRRhoRegressor(reference=lambda x, y: np.square(y)), Y),
}


@pytest.mark.parametrize("model, y", STEERED.values(), ids=STEERED)
def test_a_fitted_reference_stays_fitted_in_cross_validation(model, y):
    x = scale(X)
    copy = clone(model)
    assert copy is not model and copy.reference is model.reference
    assert np.array_equal(copy.fit(x, y).coef_, model.fit(x, y).coef_)
    scores = cross_val_score(model, x, y, cv=3)
    by_hand = clone(model).fit(x[:0:-1], y[:0:-1]).score(x, y)
    assert np.isfinite(scores).all() and np.isfinite(by_hand)
    search = GridSearchCV(model, {"l2": [0.01, 0.1]}, cv=3).fit(x, y)
    assert search.best_estimator_.reference is model.reference
    inside = GridSearchCV(make_pipeline(clone(model)), {f"{type(model).__name__.lower()}__l2": [0.1]}, cv=3).fit(x, y)
    assert inside.best_estimator_[-1].reference is model.reference


def test_a_fitted_reference_stays_fitted_in_ensembles():
    x, (classifier, _), (regressor, _) = scale(X), STEERED["classifier"], STEERED["regressor"]
    for ensemble, y in (
        (BaggingClassifier(classifier, n_estimators=3, random_state=0), CODES),
        (BaggingRegressor(regressor, n_estimators=3, random_state=0), Y),
        (CalibratedClassifierCV(classifier, cv=3), CODES),
    ):
        assert ensemble.fit(x, y).score(x, y) > 0.3


def test_references_as_candidates_of_a_search():
    x = scale(X)
    ridges = [Ridge(alpha).fit(x[:40], Y[:40]) for alpha in (0.1, 10.0)]
    grid = {"reference": [None, *map(FrozenEstimator, ridges)]}
    search = GridSearchCV(DRRhoRegressor(), grid, cv=3, error_score="raise").fit(x[40:], Y[40:])
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    with pytest.raises(NotFittedError, match=r"reference must be fitted .* unfitted Ridge.*FrozenEstimator\(model\)"):
        GridSearchCV(DRRhoRegressor(), {"reference": ridges}, cv=3, error_score="raise").fit(x[40:], Y[40:])


def test_losses_of_the_reference_are_split_with_the_samples():
    x = scale(X)
    reference = Ridge().fit(x[:60], Y[:60])
    losses = np.square(Y - reference.predict(x))
    given = cross_val_score(DRRhoRegressor(), x, Y, cv=3, params={"reference_losses": losses})
    assert np.array_equal(given, cross_val_score(DRRhoRegressor(reference=reference), x, Y, cv=3))
    assert not np.allclose(given, cross_val_score(DRRhoRegressor(), x, Y, cv=3))
    with pytest.raises(ValueError, match=r"reference .* cloned .* got losses.*reference_losses to fit"):
        cross_val_score(DRRhoRegressor(reference=losses), x, Y, cv=3)
    with pytest.raises(ValueError, match="one of the parameter reference and reference_losses"):
        DRRhoRegressor(reference=reference).fit(x, Y, reference_losses=losses)
    with pytest.raises(ValueError, match=r"reference_losses must give .* got shape \[3\]"):
        DRRhoRegressor().fit(x, Y, reference_losses=np.zeros(3))


def test_parameters_of_the_reference_are_frozen():
    model = DRRhoClassifier(reference=LogisticRegression(C=2.0).fit(X, LABELS))
    assert model.get_params()["reference"] is model.reference
    assert not any(name.startswith("reference__") for name in model.get_params())
    with pytest.raises(ValueError, match=r"reference__C cannot be set: the reference is frozen"):
        model.set_params(reference__C=1.0)
    other = LogisticRegression().fit(X, LABELS)
    assert model.set_params(reference=other, l2=0.5).reference is other and model.l2 == 0.5


def test_a_steered_model_is_pickled_with_its_reference():
    model = DRRhoClassifier(KL(), reference=LogisticRegression().fit(X, LABELS)).fit(X, LABELS)
    loaded = pickle.loads(pickle.dumps(model))
    assert np.array_equal(loaded.predict(X), model.predict(X))
    assert np.array_equal(clone(loaded).fit(X, LABELS).coef_, model.coef_)


def test_an_unfitted_reference_is_refused_by_name():
    with pytest.raises(NotFittedError, match=r"reference must be fitted .* unfitted LogisticRegression"):
        DRRhoClassifier(reference=LogisticRegression()).fit(X, LABELS)
    with pytest.raises(TypeError, match="fitted estimator, got the class LogisticRegression"):
        DRRhoClassifier(reference=LogisticRegression).fit(X, LABELS)


def test_several_targets():
    x, y, _, _ = table(8)
    both = np.column_stack([y, -2 * y + 1])
    model = DRRhoRegressor(KL(), radius=0.1, l2=0).fit(x, both)
    assert model.coef_.shape == (2, 5)
    np.testing.assert_allclose(model.predict(x)[:, 1], -2 * model.predict(x)[:, 0] + 1, atol=1e-6)


def test_labels_of_any_kind():
    x, _, y, _ = table(9)
    names = np.where(y > 0, "yes", "no")
    model = DRRhoClassifier().fit(x, names)
    assert set(model.predict(x)) <= {"yes", "no"}
    assert np.array_equal(model.predict(x) == "yes", DRRhoClassifier().fit(x, y).predict(x) == 1)
    assert not hasattr(DRRhoClassifier(loss="hinge"), "predict_proba")


REFUSED = {
    "both radii": (DRRhoRegressor(rho=1.0, radius=0.1), Y, ValueError, "rho=1.0 and radius=0.1"),
    "negative rho": (DRRhoRegressor(rho=-1.0), Y, ValueError, "rho must be finite and >= 0, got -1.0"),
    "radius of CVaR": (DRRhoRegressor(CVaR(0.1), rho=1.0), Y, ValueError, "takes no radius"),
    "divergence": (DRRhoRegressor("kl"), Y, TypeError, "divergence must be a Divergence .* got 'kl'"),
    "l2": (DRRhoRegressor(l2=-0.1), Y, ValueError, "l2 must be finite and >= 0, got -0.1"),
    "loss": (
        DRRhoClassifier(loss="exponential"),
        LABELS,
        ValueError,
        "loss must be one of logistic.* got 'exponential'",
    ),
    "one class": (DRRhoClassifier(), np.ones(len(X)), ValueError, "at least 2 classes, got 1 class"),
    "length of the reference": (DRRhoRegressor(reference=np.zeros(3)), Y, ValueError, r"120 samples, got shape \[3\]"),
    "NaN in the reference": (DRRhoRegressor(reference=np.full(120, np.nan)), Y, ValueError, "finite loss .* nan"),
    "classes of the reference": (
        DRRhoClassifier(reference=LogisticRegression().fit(X, LABELS > 0)),
        np.where(LABELS > 0, "a", "b"),
        ValueError,
        "without 'a'",
    ),
}


@pytest.mark.parametrize("model, y, error, message", REFUSED.values(), ids=REFUSED)
def test_refusals_name_argument_and_value(model, y, error, message):
    with pytest.raises(error, match=message):
        model.fit(X, y)


def test_unfitted():
    with pytest.raises(NotFittedError):
        DRRhoRegressor().predict(X)


# --- rho by cross-validation ------------------------------------------------------------------------------------------


def noisy_classes(n=120):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(n, 3))
    return x, (x[:, 0] + 0.5 * rng.standard_t(2, size=n) > 0.4).astype(int)


@pytest.mark.parametrize("weighted", [False, True])
def test_cv_chooses_rho_as_choose_rho_does(weighted):
    x, y = noisy_classes()
    weights = np.random.default_rng(6).integers(1, 4, len(y)).astype(float) if weighted else None
    model = DRRhoClassifier(rho=[0.0, 1.0, 30.0], cv=4, l2=0.05).fit(x, y, sample_weight=weights)
    splits = list(StratifiedKFold(4).split(x, y))

    def losses_of(rho, train, held_out):
        own = None if weights is None else weights[train]
        fold = DRRhoClassifier(rho=rho, l2=0.05).fit(x[train], y[train], sample_weight=own)
        return -fold.predict_log_proba(x[held_out])[np.arange(len(held_out)), y[held_out]]

    expected = choose_rho([0.0, 1.0, 30.0], losses_of, len(x), folds=splits, sample_weight=weights)
    assert model.rho_choice_.rho == expected.rho
    assert model.rho_choice_.means == pytest.approx(expected.means, rel=1e-9)
    again = DRRhoClassifier(rho=expected.rho, l2=0.05).fit(x, y, sample_weight=weights)
    assert np.array_equal(model.coef_, again.coef_) and model.radius_ == again.radius_


def test_cv_of_a_regressor_with_a_splitter_and_a_reference():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(60, 2))
    y = x @ [1.0, -1.0] + rng.standard_t(3, size=60)
    model = DRRhoRegressor(cv=KFold(3, shuffle=True, random_state=0), reference=Ridge().fit(x, y)).fit(x, y)
    assert model.rho_choice_.candidates == (0.0, 0.5, 1.35, 5.0, 20.0)
    assert model.radius_ == model.rho_choice_.rho / 60
    assert clone(model).cv is not None and model.get_params()["cv"].n_splits == 3
    assert not hasattr(DRRhoRegressor().fit(x, y), "rho_choice_")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cv": 3, "radius": 0.1}, "cv chooses rho, which cannot be with radius=0.1"),
        ({"cv": 3, "divergence": CVaR(0.1)}, "cv chooses rho, which cannot be with radius=None and CVaR"),
        ({"cv": 3, "rho": 1.0}, "rho must be a sequence of candidates where cv chooses one, got 1.0"),
        ({"cv": 3, "rho": []}, "candidates must be different numbers >= 0, got"),
        ({"rho": [0.0, 1.0]}, "rho must be a number where cv does not choose among several"),
        ({"cv": ShuffleSplit(3)}, "folds must hold out each of the 120 rows once"),
    ],
)
def test_what_cv_cannot_do_is_refused(options, message):
    x, y = noisy_classes()
    with pytest.raises(ValueError, match=message):
        DRRhoClassifier(**options).fit(x, y)
