"""Linear models that minimize the DRRho risk, as scikit-learn estimators (the extra ``linear``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from scipy.special import expit, softmax

from drrho.divergences import ChiSquare, Divergence
from drrho.minimize import Array, Hinge, Logistic, PointLoss, Squared, minimize_risk
from drrho.validation import ArrayLike

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("drrho.linear needs scikit-learn: pip install drrho[linear]") from error

__all__ = ["DRRhoClassifier", "DRRhoRegressor"]


class Estimator(Protocol):
    """A fitted model with scikit-learn's interface."""

    def predict(self, X: ArrayLike, /) -> np.ndarray:
        """Return predictions ``[n]`` or ``[n, k]``."""
        ...


class Classifier(Estimator, Protocol):
    """A fitted classifier; one for the logistic loss also has ``predict_log_proba``."""

    classes_: np.ndarray

    def decision_function(self, X: ArrayLike, /) -> np.ndarray:
        """Return scores ``[n]`` or ``[n, k]``."""
        ...


#: A reference model: an estimator, a function of (X, y) that returns losses, or the losses.
Reference: TypeAlias = "Estimator | Callable[[ArrayLike, ArrayLike], ArrayLike] | ArrayLike"

_LOSSES: dict[str, PointLoss] = {"logistic": Logistic(), "hinge": Hinge(), "squared": Squared()}

_PARAMETERS = """
    divergence : Divergence, optional
        By default ``ChiSquare()``; or ``KL()``, ``CVaR(alpha)``, or any other.
    rho, radius : float, optional
        At most one of ``rho``, the statistical radius (the ball has radius ``rho / n``, where n is the sum of the
        sample weights), and ``radius``, the bound on D itself. By default ``rho = 1``; CVaR takes neither. 0 gives the
        mean.
    reference : fitted estimator, callable or array ``[n]``, optional
        The frozen reference model: an estimator with {methods}; a
        function ``reference(X, y)`` that returns losses ``[n]``; or the losses themselves. Without a reference nothing
        is subtracted, which is distributionally robust optimization (and, at radius 0, empirical risk minimization).
    l2 : float
        Price of the squared coefficients, ``risk + (l2 / 2) ||W||^2``, >= 0; the intercept is not penalized.
    fit_intercept : bool
    tol : float
        Duality gap at which to stop, relative to the risk or the spread of the excess losses.
    max_iter : int
        Maximum number of Newton steps, after which a conic solver is used.

    Attributes
    ----------
    coef_, intercept_ : ndarray
        Of the same shapes as in scikit-learn's linear models.
    risk_ : float
        The robust risk of the excess losses of the training sample, without the penalty.
    weights_ : ndarray ``[n]``
        Worst-case weights of the training samples.
    radius_ : float
        The bound on D that was used.
    duality_gap_ : float
        Upper bound on the difference of risk plus penalty from its minimum; NaN where a conic solver was used, which is
        the case for CVaR, total variation, the hinge loss, and radii that reach the hard maximum (needs cvxpy).
    n_iter_ : int
        Number of Newton steps.

    Notes
    -----
    The DRRho risk is that of Wei et al. (ICML 2025), the worst-case mean of ``loss - reference loss`` over weights p
    with ``D(p || 1/n) <= rho / n``; without a reference Duchi & Namkoong (arXiv 1610.02581).
"""


def _checked(model: _LinearModel, *data: Any, **rules: Any) -> Any:
    """Return X, or X and y, as arrays that scikit-learn has validated."""
    return validate_data(model, *data, dtype=np.float64, **rules)


class _LinearModel(BaseEstimator):
    """The common part of classifier and regressor."""

    def __init__(
        self,
        divergence: Divergence | None,
        rho: float | None,
        radius: float | None,
        reference: Reference | None,
        l2: float,
        fit_intercept: bool,
        tol: float,
        max_iter: int,
    ) -> None:
        self.divergence = divergence
        self.rho = rho
        self.radius = radius
        self.reference = reference
        self.l2 = l2
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter

    def _minimize(
        self, x: Array, y: Array, loss: PointLoss, reference: Array | None, sample_weight: ArrayLike | None
    ) -> None:
        """Fit coefficients to targets ``[n, k]``."""
        divergence = ChiSquare() if self.divergence is None else self.divergence
        if not isinstance(divergence, Divergence):
            raise TypeError(f"divergence must be a Divergence such as KL() or ChiSquare(), got {divergence!r}")
        for value, name in ((self.l2, "l2"), (self.tol, "tol"), (self.max_iter, "max_iter")):
            if not 0 <= value < np.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        base, kept, count = None, None, float(len(x))
        if sample_weight is not None:
            weights = np.asarray(_check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True))
            count = float(weights.sum())
            if count <= 0:
                raise ValueError("sample_weight must have a positive sum, got zeros")
            kept = weights > 0
            x, y, weights = x[kept], y[kept], weights[kept]
            reference = reference if reference is None else reference[kept]
            base = None if np.ptp(weights) == 0 else weights / count
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

    def _reference_losses(
        self, features: ArrayLike, y: ArrayLike, n: int, of_estimator: Callable[[Any, ArrayLike], Array]
    ) -> Array | None:
        """Return the reference's losses ``[n]`` on the training data as the user passed them."""
        if self.reference is None:
            return None
        if hasattr(self.reference, "predict"):
            losses = of_estimator(self.reference, features)
        else:
            losses = self.reference(features, y) if callable(self.reference) else self.reference
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
        divergence: Divergence | None = None,
        *,
        rho: float | None = None,
        radius: float | None = None,
        reference: Reference | None = None,
        l2: float = 1e-3,
        fit_intercept: bool = True,
        tol: float = 1e-8,
        max_iter: int = 50,
    ) -> None:
        super().__init__(divergence, rho, radius, reference, l2, fit_intercept, tol, max_iter)

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> DRRhoRegressor:
        """Fit to features ``[n, d]`` and targets ``[n]`` or ``[n, k]``; ``sample_weight`` ``[n]`` is proportional to q.

        Raises
        ------
        ValueError, TypeError
            Naming the parameter and its value.
        RuntimeError
            If no minimum was found.
        """
        x, labels = _checked(self, X, y, y_numeric=True, multi_output=True)
        targets = labels.reshape(len(labels), -1).astype(np.float64)

        def of_estimator(model: Estimator, features: ArrayLike) -> Array:
            return Squared().values(np.asarray(model.predict(features)).reshape(targets.shape), targets)

        reference = self._reference_losses(X, y, len(x), of_estimator)
        self._minimize(x, targets, Squared(), reference, sample_weight)
        if labels.ndim == 1:
            self.coef_, self.intercept_ = self.coef_[0], self.intercept_[0]
        return self

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def predict(self, X: ArrayLike) -> Array:
        """Return predictions ``[n]`` or ``[n, k]``."""
        check_is_fitted(self)
        x = _checked(self, X, reset=False)
        return x @ self.coef_.T + self.intercept_


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
        divergence: Divergence | None = None,
        *,
        loss: str = "logistic",
        rho: float | None = None,
        radius: float | None = None,
        reference: Reference | None = None,
        l2: float = 1e-3,
        fit_intercept: bool = True,
        tol: float = 1e-8,
        max_iter: int = 50,
    ) -> None:
        super().__init__(divergence, rho, radius, reference, l2, fit_intercept, tol, max_iter)
        self.loss = loss

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> DRRhoClassifier:
        """Fit to features ``[n, d]`` and labels ``[n]``; ``sample_weight`` ``[n]`` is proportional to q.

        Raises
        ------
        ValueError, TypeError
            Naming the parameter and its value.
        RuntimeError
            If no minimum was found.
        """
        x, labels = _checked(self, X, y)
        check_classification_targets(labels)
        if self.loss not in _LOSSES:
            raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, got {self.loss!r}")
        loss = _LOSSES[self.loss]
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least 2 classes, got 1 class: {self.classes_[0]!r}")
        targets = self._targets(codes)

        def of_estimator(model: Any, features: ArrayLike) -> Array:
            if self.loss == "logistic" and hasattr(model, "predict_log_proba"):
                return -model.predict_log_proba(features)[np.arange(len(x)), self._columns(model)[codes]]
            scores = np.asarray(model.decision_function(features)).reshape(len(x), -1)
            columns = self._columns(model)
            return loss.values(scores if scores.shape[1] == 1 else scores[:, columns], targets)

        reference = self._reference_losses(X, y, len(x), of_estimator)
        self._minimize(x, targets, loss, reference, sample_weight)
        if loss is _LOSSES["logistic"] and len(self.classes_) > 2:  # softmax is invariant to a shift of all scores
            self.coef_, self.intercept_ = self.coef_ - self.coef_.mean(0), self.intercept_ - self.intercept_.mean()
        return self

    def _targets(self, codes: np.ndarray) -> Array:
        """Encode the labels as targets ``[n, k]`` of the loss."""
        if len(self.classes_) == 2:
            return (2.0 * codes - 1)[:, None]
        one_hot = np.eye(len(self.classes_))[codes]
        return one_hot if self.loss == "logistic" else 2 * one_hot - 1

    def _columns(self, model: Classifier) -> np.ndarray:
        """Return the columns of this model's classes in the reference's scores."""
        position = {label: column for column, label in enumerate(model.classes_)}
        missing = [label for label in self.classes_ if label not in position]
        if missing:
            raise ValueError(f"reference must know the classes of y, got one without {str(missing[0])!r}")
        if len(self.classes_) != len(model.classes_) and self.loss != "logistic":
            raise ValueError(f"reference must have the {len(self.classes_)} classes of y, got {len(model.classes_)}")
        return np.array([position[label] for label in self.classes_])

    def decision_function(self, X: ArrayLike) -> Array:
        """Return scores ``[n]`` for two classes, ``[n, k]`` for more."""
        check_is_fitted(self)
        x = _checked(self, X, reset=False)
        scores = x @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Return the most likely labels ``[n]``."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]

    @available_if(_has_probabilities)
    def predict_proba(self, X: ArrayLike) -> Array:
        """Return the model's probabilities ``[n, k]`` (logistic loss only)."""
        scores = self.decision_function(X)
        return np.column_stack([expit(-scores), expit(scores)]) if scores.ndim == 1 else softmax(scores, axis=1)

    @available_if(_has_probabilities)
    def predict_log_proba(self, X: ArrayLike) -> Array:
        """Return the logarithms of `predict_proba`."""
        return np.log(self.predict_proba(X))
