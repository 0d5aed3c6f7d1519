"""Linear models that minimize the DRRho risk, as scikit-learn estimators (the extra ``linear``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax

from drrho.divergences import ChiSquare, Divergence
from drrho.minimize import Array, Hinge, Logistic, PointLoss, Squared, minimize_risk

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("drrho.linear needs scikit-learn: pip install drrho[linear]") from error

__all__ = ["DRRhoClassifier", "DRRhoRegressor"]

_LOSSES: dict[str, PointLoss] = {"logistic": Logistic(), "hinge": Hinge(), "squared": Squared()}

_PARAMETERS = """
    divergence : Divergence, optional
        ``ChiSquare()`` if not given; ``KL()``, ``CVaR(alpha)``, or any other.
    rho, radius : float, optional
        At most one: ``rho``, the statistical radius (the ball has radius ``rho / n``, n the sum of the sample
        weights), or ``radius``, the bound on D itself. ``rho = 1`` if neither is given; CVaR takes none. 0 is the
        plain mean.
    reference : fitted estimator, callable or array ``[n]``, optional
        The frozen reference model: an estimator with {methods}; a
        function ``reference(X, y)`` that returns losses ``[n]``; or the losses themselves. Nothing is subtracted if
        it is not given, which is distributionally robust optimization (and, at radius 0, empirical risk minimization).
    l2 : float
        Price of the squared coefficients, ``risk + (l2 / 2) ||W||^2``, >= 0; the intercept has none.
    fit_intercept : bool
    tol : float
        Duality gap at which to stop, relative to the risk or the spread of the excess losses.
    max_iter : int
        Most Newton steps, after which a conic solver takes over.

    Attributes
    ----------
    coef_, intercept_ : ndarray
        Shaped as scikit-learn's linear models shape theirs.
    risk_ : float
        The robust risk of the excess losses of the training sample, without the penalty.
    weights_ : ndarray ``[n]``
        Worst-case weights of the training sample.
    radius_ : float
        The bound on D that was used.
    duality_gap_ : float
        Bound on how far risk and penalty are above their minimum; NaN where a conic solver was used: for CVaR, total
        variation, the hinge loss, and at radii where the hard maximum counts (needs cvxpy).
    n_iter_ : int
        Newton steps.

    Notes
    -----
    The DRRho risk is that of Wei et al. (ICML 2025), the worst-case mean of ``loss - reference loss`` over weights p
    with ``D(p || 1/n) <= rho / n``; without a reference Duchi & Namkoong (arXiv 1610.02581).
"""


def _checked(model: Any, *data: Any, **rules: Any) -> Any:
    return validate_data(model, *data, dtype=np.float64, **rules)


class _LinearModel(BaseEstimator):
    """What classifier and regressor share."""

    def __init__(self, divergence, rho, radius, reference, l2, fit_intercept, tol, max_iter) -> None:
        self.divergence = divergence
        self.rho = rho
        self.radius = radius
        self.reference = reference
        self.l2 = l2
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter

    def _minimize(self, x: Array, y: Array, loss: PointLoss, reference: Array | None, sample_weight: Any) -> None:
        """Fit coefficients to targets ``[n, k]``."""
        divergence = ChiSquare() if self.divergence is None else self.divergence
        if not isinstance(divergence, Divergence):
            raise TypeError(f"divergence must be a Divergence such as KL() or ChiSquare(), got {divergence!r}")
        for value, name in ((self.l2, "l2"), (self.tol, "tol"), (self.max_iter, "max_iter")):
            if not 0 <= value < np.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        base, kept, count = None, None, float(len(x))
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
            count = float(sample_weight.sum())
            if count <= 0:
                raise ValueError("sample_weight must have a positive sum, got zeros")
            kept = sample_weight > 0
            x, y, sample_weight = x[kept], y[kept], sample_weight[kept]
            reference = reference if reference is None else reference[kept]
            base = None if np.ptp(sample_weight) == 0 else sample_weight / count
        self.radius_ = self._bound(divergence, count)
        fit = minimize_risk(
            x,
            y,
            loss,
            divergence,
            radius=self.radius_,
            reference_losses=reference,
            l2=float(self.l2),
            fit_intercept=self.fit_intercept,
            base_weights=base,
            tolerance=float(self.tol),
            max_iterations=int(self.max_iter),
        )
        self.risk_, self.duality_gap_, self.n_iter_ = fit.risk, fit.duality_gap, max(fit.iterations, 1)
        self.weights_ = fit.weights
        if kept is not None:
            self.weights_ = np.zeros(len(kept))
            self.weights_[kept] = fit.weights
        self.coef_, self.intercept_ = fit.coefficients.T, fit.intercept

    def _bound(self, divergence: Divergence, count: float) -> float:
        for value, name in ((self.rho, "rho"), (self.radius, "radius")):
            if value is not None and not 0 <= value < np.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if self.rho is not None and self.radius is not None:
            raise ValueError(f"give one of rho (radius * n) and radius, got rho={self.rho} and radius={self.radius}")
        if not divergence.has_radius:
            if self.rho is not None or self.radius is not None:
                raise ValueError(f"{divergence} takes no radius, got rho={self.rho} and radius={self.radius}")
            return 0.0
        return self.radius if self.radius is not None else (1.0 if self.rho is None else self.rho) / count

    def _reference_losses(self, given: Any, y: Any, n: int, of_estimator: Any) -> Array | None:
        """Return the reference's losses ``[n]`` on the training sample as it was given."""
        if self.reference is None:
            return None
        if hasattr(self.reference, "predict"):
            losses = of_estimator(self.reference, given)
        else:
            losses = self.reference(given, y) if callable(self.reference) else self.reference
        losses = np.asarray(losses.detach().cpu() if isinstance(losses, torch.Tensor) else losses, dtype=np.float64)
        if losses.shape != (n,) or not np.isfinite(losses).all():
            raise ValueError(
                f"reference must give one finite loss for each of the {n} samples, got shape {list(losses.shape)}"
                + (f" with {losses[~np.isfinite(losses)][0]}" if losses.shape == (n,) else "")
            )
        return losses


class DRRhoRegressor(RegressorMixin, _LinearModel):  # noqa: D101 (put together below)
    __doc__ = (
        """Minimize the DRRho risk of squared losses ``(y - <w, x> - b)^2`` over a linear predictor.

    Parameters
    ----------"""
        + _PARAMETERS.format(methods="``predict``")
        + """
    Examples
    --------
    >>> import numpy as np
    >>> from drrho.linear import DRRhoRegressor
    >>> x, y = np.arange(4.0)[:, None], np.array([0.0, 1.0, 2.0, 6.0])
    >>> [round(float(DRRhoRegressor(radius=r, l2=0).fit(x, y).coef_[0]), 3) for r in (0.0, 0.1, 0.5)]
    [1.9, 1.925, 2.0]
    """
    )

    def __init__(
        self,
        divergence=None,
        *,
        rho=None,
        radius=None,
        reference=None,
        l2=1e-3,
        fit_intercept=True,
        tol=1e-8,
        max_iter=50,
    ) -> None:
        super().__init__(divergence, rho, radius, reference, l2, fit_intercept, tol, max_iter)

    def fit(self, X, y, sample_weight=None) -> DRRhoRegressor:
        """Fit to features ``[n, d]`` and targets ``[n]`` or ``[n, k]``; ``sample_weight`` ``[n]`` is proportional to q.

        Raises
        ------
        ValueError, TypeError
            Naming the parameter and its value.
        RuntimeError
            If no minimum was found.
        """
        given = X, y
        X, y = _checked(self, X, y, y_numeric=True, multi_output=True)
        targets = y.reshape(len(y), -1).astype(np.float64)

        def of_estimator(model, features):
            return Squared().values(np.asarray(model.predict(features)).reshape(targets.shape), targets)

        reference = self._reference_losses(*given, len(X), of_estimator)
        self._minimize(X, targets, Squared(), reference, sample_weight)
        if y.ndim == 1:
            self.coef_, self.intercept_ = self.coef_[0], self.intercept_[0]
        return self

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def predict(self, X) -> Array:
        """Return predictions ``[n]`` or ``[n, k]``."""
        check_is_fitted(self)
        X = _checked(self, X, reset=False)
        return X @ self.coef_.T + self.intercept_


def _has_probabilities(model: DRRhoClassifier) -> bool:
    return model.loss == "logistic"


class DRRhoClassifier(ClassifierMixin, _LinearModel):  # noqa: D101 (put together below)
    __doc__ = (
        """Minimize the DRRho risk of a classification loss over a linear predictor.

    Parameters
    ----------
    loss : {"logistic", "hinge", "squared"}
        Of two classes with labels -1 and 1: ``log(1 + exp(-y f))``, ``max(0, 1 - y f)``, ``(y - f)^2``. Of more: the
        cross-entropy of softmax, or the sum of the binary losses over one-against-rest labels."""
        + _PARAMETERS.format(
            methods="``predict_log_proba`` (logistic loss) or\n        ``decision_function`` and the same classes"
        )
        + """
    classes_ : ndarray

    Examples
    --------
    >>> from sklearn.datasets import load_breast_cancer
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.preprocessing import scale
    >>> from drrho import KL
    >>> from drrho.linear import DRRhoClassifier
    >>> x, y = load_breast_cancer(return_X_y=True)
    >>> x = scale(x)
    >>> reference = LogisticRegression().fit(x[:300], y[:300])
    >>> target = DRRhoClassifier(KL(), rho=1.0, reference=reference, l2=1e-2).fit(x[300:], y[300:])
    >>> bool(target.duality_gap_ < 1e-8), bool(target.score(x[300:], y[300:]) > 0.95)
    (True, True)
    """
    )

    def __init__(
        self,
        divergence=None,
        *,
        loss="logistic",
        rho=None,
        radius=None,
        reference=None,
        l2=1e-3,
        fit_intercept=True,
        tol=1e-8,
        max_iter=50,
    ) -> None:
        super().__init__(divergence, rho, radius, reference, l2, fit_intercept, tol, max_iter)
        self.loss = loss

    def fit(self, X, y, sample_weight=None) -> DRRhoClassifier:
        """Fit to features ``[n, d]`` and labels ``[n]``; ``sample_weight`` ``[n]`` is proportional to q.

        Raises
        ------
        ValueError, TypeError
            Naming the parameter and its value.
        RuntimeError
            If no minimum was found.
        """
        given = X, y
        X, y = _checked(self, X, y)
        check_classification_targets(y)
        if self.loss not in _LOSSES:
            raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, got {self.loss!r}")
        loss = _LOSSES[self.loss]
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least 2 classes, got 1 class: {self.classes_[0]!r}")
        targets = self._targets(codes)

        def of_estimator(model, features):
            if self.loss == "logistic" and hasattr(model, "predict_log_proba"):
                return -model.predict_log_proba(features)[np.arange(len(y)), self._columns(model)[codes]]
            scores = np.asarray(model.decision_function(features)).reshape(len(y), -1)
            columns = self._columns(model)
            return loss.values(scores if scores.shape[1] == 1 else scores[:, columns], targets)

        reference = self._reference_losses(*given, len(X), of_estimator)
        self._minimize(X, targets, loss, reference, sample_weight)
        if loss is _LOSSES["logistic"] and len(self.classes_) > 2:  # softmax does not see what all scores share
            self.coef_, self.intercept_ = self.coef_ - self.coef_.mean(0), self.intercept_ - self.intercept_.mean()
        return self

    def _targets(self, codes) -> Array:
        """Return what the loss compares with, ``[n, k]``."""
        if len(self.classes_) == 2:
            return (2.0 * codes - 1)[:, None]
        one_hot = np.eye(len(self.classes_))[codes]
        return one_hot if self.loss == "logistic" else 2 * one_hot - 1

    def _columns(self, model: Any) -> Any:
        """Return where the reference has this model's classes."""
        position = {label: column for column, label in enumerate(model.classes_)}
        missing = [label for label in self.classes_ if label not in position]
        if missing:
            raise ValueError(f"reference must know the classes of y, got one without {str(missing[0])!r}")
        if len(self.classes_) != len(model.classes_) and self.loss != "logistic":
            raise ValueError(f"reference must have the {len(self.classes_)} classes of y, got {len(model.classes_)}")
        return np.array([position[label] for label in self.classes_])

    def decision_function(self, X) -> Array:
        """Return scores ``[n]`` for two classes, ``[n, k]`` for more."""
        check_is_fitted(self)
        X = _checked(self, X, reset=False)
        scores = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X) -> Any:
        """Return the most likely labels ``[n]``."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]

    @available_if(_has_probabilities)
    def predict_proba(self, X) -> Array:
        """Return the model's probabilities ``[n, k]`` (logistic loss only)."""
        scores = self.decision_function(X)
        return np.column_stack([expit(-scores), expit(scores)]) if scores.ndim == 1 else softmax(scores, axis=1)

    @available_if(_has_probabilities)
    def predict_log_proba(self, X) -> Array:
        """Return logarithms of `predict_proba`."""
        return np.log(self.predict_proba(X))
