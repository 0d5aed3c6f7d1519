"""Linear models that minimize the DRRho risk, as scikit-learn estimators (the extra ``linear``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
from scipy.special import expit, log_expit, log_softmax, softmax

from drrho.choosing import Rows, choose_rho
from drrho.divergences import ChiSquare, Divergence, check_divergence
from drrho.minimize import LinearFit, minimize_risk
from drrho.pointwise import Array, Hinge, Logistic, PointLoss, Squared
from drrho.validation import ArrayLike

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import NotFittedError
    from sklearn.model_selection import check_cv
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

_CANDIDATES = (0.0, 0.5, 1.35, 5.0, 20.0)  # of rho, where cv chooses one

_PARAMETERS = """
    divergence : Divergence, optional
        By default ``ChiSquare()``; or ``KL()``, ``CVaR(alpha)``, or any other.
    rho, radius : float, optional; with ``cv`` rho is a sequence
        At most one of ``rho``, the statistical radius (the ball has radius ``rho / n``, where n is the sum of the
        sample weights), and ``radius``, the bound on D itself. By default ``rho = 1``; CVaR takes neither. 0 gives the
        mean. With ``cv``, ``rho`` is a sequence of candidates, by default (0, 0.5, 1.35, 5, 20).
    reference : fitted estimator, callable or array ``[n]``, optional
        The frozen reference model: an estimator with {methods}; a
        function ``reference(X, y)`` that returns losses ``[n]``; or the losses themselves, which belong to the samples
        of one `fit` (see Notes). Without a reference nothing is subtracted, which is distributionally robust
        optimization (and, at radius 0, empirical risk minimization).
    l2 : float
        Price of the squared coefficients, ``risk + (l2 / 2) ||W||^2``, >= 0; the intercept is not penalized.
    cv : int or splitter of scikit-learn, optional
        Choose rho by cross-validation: the least candidate whose held-out losses are within a standard error of the
        best (`drrho.choosing.choose_rho`). Folds of a classifier have the classes in equal shares.
    fit_intercept : bool
    tol : float
        Duality gap at which to stop, relative to the risk or the spread of the excess losses. Above 1e-6 (or ``tol``,
        if that is larger) a fit is an error.
    max_iter : int
        Maximum number of Newton steps.

    Attributes
    ----------
    coef_, intercept_ : ndarray
        Of the same shapes as in scikit-learn's linear models.
    risk_ : float
        The robust risk of the excess losses of the training sample, without the penalty.
    weights_ : ndarray ``[n]``
        Worst-case weights of the training samples, those of the saddle point.
    radius_ : float
        The bound on D that was used.
    rho_choice_ : drrho.choosing.RhoChoice
        With ``cv``: the rho that was chosen, and a table of the candidates' held-out losses.
    duality_gap_ : float
        Upper bound on the difference of risk plus penalty from its minimum, by Fenchel duality. Where ``l2 = 0`` and
        there is no minimum (the logistic loss of separable classes), from the infimum.
    n_iter_ : int
        Number of Newton steps.{attributes}

    Notes
    -----
    A fitted reference stays fitted: ``sklearn.base.clone`` keeps it as it is, so that cross-validation and ensembles
    subtract the losses of the very model that was given, as if it were a ``sklearn.frozen.FrozenEstimator``. Its own
    parameters (``reference__C``) cannot be set. The candidates of a parameter grid are cloned by scikit-learn before
    this class sees them: there, write ``{{"reference": [None, FrozenEstimator(model)]}}``. Losses given as an array
    cannot be split, so such a model is not cloned; ``cross_val_score(model, X, y, params={{"reference_losses": l}})``
    passes each split its own part.

    The DRRho risk is that of Wei et al. (ICML 2025), the worst-case mean of ``loss - reference loss`` over weights p
    with ``D(p || 1/n) <= rho / n``; without a reference Duchi & Namkoong (arXiv 1610.02581). Smooth risks are minimized
    by Newton's method; those with kinks (CVaR, total variation, the hinge loss, radii that reach the hard maximum) by
    Newton's method on smoothed risks whose center follows the worst case (`drrho.minimize`).
"""


def _checked(model: _LinearModel, *data: Any, **rules: Any) -> Any:
    """Return X, or X and y, as arrays that scikit-learn has validated."""
    return validate_data(model, *data, dtype=np.float64, **rules)


class _LinearModel(BaseEstimator):
    """The common part of classifier and regressor."""

    def __init__(
        self,
        divergence: Divergence | None,
        rho: float | Sequence[float] | None,
        radius: float | None,
        reference: Reference | None,
        l2: float,
        cv: Any,
        fit_intercept: bool,
        tol: float,
        max_iter: int,
    ) -> None:
        self.divergence = divergence
        self.rho = rho
        self.radius = radius
        self.reference = reference
        self.l2 = l2
        self.cv = cv
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name; the reference is frozen, so none of its own are among them."""
        return super().get_params(deep=False)

    def set_params(self, **params: Any) -> _LinearModel:
        """Set parameters by name.

        Raises
        ------
        ValueError
            For a name that is no parameter, such as one of the frozen reference's own.
        """
        inner = [name for name in params if name.startswith("reference__")]
        if inner:
            raise ValueError(
                f"{inner[0]} cannot be set: the reference is frozen, so nothing would refit it. Give several fitted "
                "models as candidates of 'reference', each as sklearn.frozen.FrozenEstimator(model)"
            )
        return super().set_params(**params)

    def __sklearn_clone__(self) -> _LinearModel:
        if self.reference is not None and not hasattr(self.reference, "predict") and not callable(self.reference):
            raise ValueError(
                "reference must be a fitted estimator or a function to be cloned (for cross-validation, a search or an "
                "ensemble), got losses, which cannot be split with the samples: pass them as reference_losses to fit, "
                'as in cross_val_score(model, X, y, params={"reference_losses": losses})'
            )
        without = copy(self)
        without.reference = None
        cloned: Any = BaseEstimator.__sklearn_clone__(without)
        cloned.reference = self.reference
        return cloned

    def _minimize(
        self,
        x: Array,
        y: Array,
        loss: PointLoss,
        reference: Array | None,
        sample_weight: ArrayLike | None,
        labels: np.ndarray,
    ) -> None:
        """Fit coefficients to targets ``[n, k]``; folds of ``cv`` are made by the labels ``[n]``."""
        divergence = ChiSquare() if self.divergence is None else self.divergence
        check_divergence(divergence)
        for value, name in ((self.l2, "l2"), (self.tol, "tol"), (self.max_iter, "max_iter")):
            if not 0 <= value < np.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        kept, weights, folds = None, None, cast(list[tuple[Rows, Rows]], [])
        if self.cv is not None:
            splitter: Any = check_cv(self.cv, labels, classifier=isinstance(self, ClassifierMixin))
            folds = list(splitter.split(x, labels))
        if sample_weight is not None:
            weights = np.asarray(_check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True))
            if not weights.sum() > 0:
                raise ValueError("sample_weight must have a positive sum, got zeros")
            kept = weights > 0
            x, y, weights = x[kept], y[kept], weights[kept]
            reference = reference if reference is None else reference[kept]
            place = np.cumsum(kept) - 1  # samples without weight are in no fold
            folds = [(place[train[kept[train]]], place[test[kept[test]]]) for train, test in folds]

        def fit_rows(rows: Rows | slice, radius_of: Callable[[float], float]) -> tuple[LinearFit, float]:
            own = None if weights is None else weights[rows]
            count = float(len(x[rows]) if own is None else own.sum())
            radius = radius_of(count)
            found = minimize_risk(
                x[rows],
                y[rows],
                loss,
                divergence,
                radius=radius,
                reference_losses=None if reference is None else reference[rows],
                l2=float(self.l2),
                fit_intercept=self.fit_intercept,
                base_weights=None if own is None or np.ptp(own) == 0 else own / count,
                tolerance=float(self.tol),
                max_iterations=int(self.max_iter),
            )
            return found, radius

        radius_of = partial(self._bound, divergence)
        if self.cv is not None:
            candidates = self._candidates(divergence)

            def losses_of(rho: float, train: Rows, held_out: Rows) -> Array:
                fit, _ = fit_rows(train, lambda count: rho / count)
                return loss.values(x[held_out] @ fit.coefficients + fit.intercept, y[held_out])

            self.rho_choice_ = choice = choose_rho(candidates, losses_of, len(x), folds=folds, sample_weight=weights)
            radius_of = lambda count: choice.rho / count  # noqa: E731
        fit, self.radius_ = fit_rows(slice(None), radius_of)
        self.risk_, self.duality_gap_, self.n_iter_ = fit.risk, fit.duality_gap, max(fit.iterations, 1)
        self.weights_ = fit.weights
        if kept is not None:
            self.weights_ = np.zeros(len(kept))
            self.weights_[kept] = fit.weights
        self.coef_, self.intercept_ = fit.coefficients.T, fit.intercept

    def _candidates(self, divergence: Divergence) -> Sequence[float]:
        """Return the rhos from which ``cv`` chooses."""
        if self.radius is not None or not divergence.has_radius:
            raise ValueError(f"cv chooses rho, which cannot be with radius={self.radius} and {divergence}")
        if self.rho is None:
            return _CANDIDATES
        if isinstance(self.rho, int | float):
            raise ValueError(f"rho must be a sequence of candidates where cv chooses one, got {self.rho}")
        return self.rho

    def _bound(self, divergence: Divergence, count: float) -> float:
        for value, name in ((self.rho, "rho"), (self.radius, "radius")):
            if value is not None and not isinstance(value, int | float | np.number):
                raise ValueError(f"{name} must be a number where cv does not choose among several, got {value}")
            if value is not None and not 0 <= value < np.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if self.rho is not None and self.radius is not None:
            raise ValueError(f"give one of rho (radius * n) and radius, got rho={self.rho} and radius={self.radius}")
        if not divergence.has_radius:
            if self.rho is not None or self.radius is not None:
                raise ValueError(f"{divergence} takes no radius, got rho={self.rho} and radius={self.radius}")
            return 0.0
        rho = 1.0 if self.rho is None else float(self.rho)  # pyright: ignore[reportArgumentType]
        return self.radius if self.radius is not None else rho / count

    def _reference_losses(
        self,
        features: ArrayLike,
        y: ArrayLike,
        n: int,
        of_estimator: Callable[[Any, ArrayLike], Array],
        given: ArrayLike | None,
    ) -> Array | None:
        """Return the reference's losses ``[n]`` on the training data as the user passed them."""
        name, losses = "reference", self.reference
        if given is not None:
            if losses is not None:
                raise ValueError("give one of the parameter reference and reference_losses, got both")
            name, losses = "reference_losses", given
        elif isinstance(losses, type):
            raise TypeError(f"reference must be a fitted estimator, got the class {losses.__name__}: fit an instance")
        elif hasattr(losses, "predict"):
            try:
                losses = of_estimator(losses, features)
            except NotFittedError as error:
                raise NotFittedError(
                    f"reference must be fitted before this model is, got an unfitted {type(self.reference).__name__}. "
                    "Where a parameter grid holds the reference, scikit-learn clones it: give it as "
                    "sklearn.frozen.FrozenEstimator(model)"
                ) from error
        elif callable(losses):
            losses = losses(features, y)
        if losses is None:
            return None
        losses = np.asarray(losses.detach().cpu() if isinstance(losses, torch.Tensor) else losses, dtype=np.float64)
        if losses.shape != (n,):
            raise ValueError(
                f"{name} must give one finite loss for each of the {n} samples, got shape {list(losses.shape)}. "
                "Losses of a part of the samples go to fit as reference_losses"
            )
        if not np.isfinite(losses).all():
            raise ValueError(
                f"{name} must give one finite loss for each of the {n} samples, got shape [{n}] with "
                f"{losses[~np.isfinite(losses)][0]}"
            )
        return losses


class DRRhoRegressor(RegressorMixin, _LinearModel):  # noqa: D101 (put together below)
    __doc__ = (
        """Minimize the DRRho risk of squared losses ``(y - <w, x> - b)^2`` over a linear predictor.

    Parameters
    ----------"""
        + _PARAMETERS.format(methods="``predict``", attributes="")
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
        rho: float | Sequence[float] | None = None,
        radius: float | None = None,
        reference: Reference | None = None,
        l2: float = 1e-3,
        cv: Any = None,
        fit_intercept: bool = True,
        tol: float = 1e-8,
        max_iter: int = 200,
    ) -> None:
        super().__init__(divergence, rho, radius, reference, l2, cv, fit_intercept, tol, max_iter)

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        *,
        reference_losses: ArrayLike | None = None,
    ) -> DRRhoRegressor:
        """Fit to features ``[n, d]`` and targets ``[n]`` or ``[n, k]``; ``sample_weight`` ``[n]`` is proportional to q.

        ``reference_losses`` ``[n]`` are the losses of the reference on these samples, instead of the parameter
        ``reference``; scikit-learn splits them with the samples.

        Raises
        ------
        ValueError, TypeError
            Naming the parameter and its value.
        RuntimeError
            If no minimum was found in ``max_iter`` steps; the message holds the duality gap.
        """
        x, labels = _checked(self, X, y, y_numeric=True, multi_output=True)
        targets = labels.reshape(len(labels), -1).astype(np.float64)

        def of_estimator(model: Estimator, features: ArrayLike) -> Array:
            return Squared().values(np.asarray(model.predict(features)).reshape(targets.shape), targets)

        reference = self._reference_losses(X, y, len(x), of_estimator, reference_losses)
        self._minimize(x, targets, Squared(), reference, sample_weight, labels)
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


def _log_of_scores(scores: Array) -> Array:
    """Return log-probabilities ``[n, k]`` of scores ``[n]`` or ``[n, k]``, finite however far the scores are apart."""
    return np.column_stack([log_expit(-scores), log_expit(scores)]) if scores.ndim == 1 else log_softmax(scores, axis=1)


def _log_probabilities(model: Any, features: ArrayLike) -> Array:
    """Return a reference's log-probabilities ``[n, k]``, where it rounds some to zero those of its scores.

    That is done only if its probabilities are the softmax of its scores.
    """
    with np.errstate(divide="ignore"):
        logarithms = np.asarray(model.predict_log_proba(features), dtype=np.float64)
    if np.isfinite(logarithms).all() or not hasattr(model, "decision_function"):
        return logarithms
    of_scores = _log_of_scores(np.asarray(model.decision_function(features), dtype=np.float64))
    same = of_scores.shape == logarithms.shape and np.allclose(np.exp(of_scores), np.exp(logarithms), atol=1e-6)
    return of_scores if same else logarithms


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
            methods="``predict_log_proba`` (logistic loss) or\n        ``decision_function`` and the same classes",
            attributes="\n    classes_ : ndarray\n        The labels, sorted.",
        )
        + """
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
        rho: float | Sequence[float] | None = None,
        radius: float | None = None,
        reference: Reference | None = None,
        l2: float = 1e-3,
        cv: Any = None,
        fit_intercept: bool = True,
        tol: float = 1e-8,
        max_iter: int = 200,
    ) -> None:
        super().__init__(divergence, rho, radius, reference, l2, cv, fit_intercept, tol, max_iter)
        self.loss = loss

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        *,
        reference_losses: ArrayLike | None = None,
    ) -> DRRhoClassifier:
        """Fit to features ``[n, d]`` and labels ``[n]``; ``sample_weight`` ``[n]`` is proportional to q.

        ``reference_losses`` ``[n]`` are the losses of the reference on these samples, instead of the parameter
        ``reference``; scikit-learn splits them with the samples.

        Raises
        ------
        ValueError, TypeError
            Naming the parameter and its value.
        RuntimeError
            If no minimum was found in ``max_iter`` steps; the message holds the duality gap.
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
                return -_log_probabilities(model, features)[np.arange(len(x)), self._columns(model)[codes]]
            scores = np.asarray(model.decision_function(features)).reshape(len(x), -1)
            columns = self._columns(model)
            return loss.values(scores if scores.shape[1] == 1 else scores[:, columns], targets)

        reference = self._reference_losses(X, y, len(x), of_estimator, reference_losses)
        self._minimize(x, targets, loss, reference, sample_weight, codes)
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
            raise ValueError(
                f"reference must know the classes of y, got one without {str(missing[0])!r}: fit it to the same labels "
                "(scikit-learn's ensembles, such as BaggingClassifier, replace labels by 0, 1, ...)"
            )
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
        return _log_of_scores(self.decision_function(X))
