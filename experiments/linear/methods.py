"""The methods that are compared: a tuning grid of twelve settings each, and how a setting is fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from drrho import KL, ChiSquare, CVaR
from drrho.linear import DRRhoClassifier, DRRhoRegressor
from drrho.pointwise import Logistic, Squared

Array = NDArray[Any]
Scores = Callable[[Array], Array]  # features [n, d] to scores [n, k]
Setting = dict[str, float]

_PRICES = (1e-3, 2e-2, 4e-1)  # of the squared coefficients, for methods that have a second parameter
_RADII = (0.3, 3.0, 10.0, 30.0)  # rho
_TAILS = (0.2, 0.4, 0.6, 0.8)


def losses_of(scores: Array, y: Array, classes: int) -> Array:
    """Return the loss ``[n]`` of scores ``[n, k]``: cross-entropy of ``classes`` classes, squared where there are 0."""
    if classes == 0:
        return Squared().values(scores, y[:, None])
    return Logistic().values(scores, _coded(y, classes))


def errors_of(scores: Array, y: Array, classes: int) -> Array:
    """Return the loss ``[n]`` in [0, 1] that bounds are about: 0-1, or squared and clipped at 1."""
    if classes == 0:
        return np.minimum(np.square(y - scores[:, 0]), 1.0)
    predicted = (scores[:, 0] > 0).astype(int) if classes == 2 else scores.argmax(1)
    return (predicted != y).astype(float)


def _coded(y: Array, classes: int) -> Array:
    return (2.0 * y - 1)[:, None] if classes == 2 else np.eye(classes)[y]


def _grid(**values: tuple[float, ...]) -> list[Setting]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


@dataclass(frozen=True)
class Method:
    """A way to learn a linear model from n samples, with or without the reference."""

    name: str
    grid: list[Setting]
    fit: Callable[[Setting, Array, Array, int, Any], Scores]


def scores_of(model: Any, classes: int) -> Scores:
    """Return a fitted estimator's scores as a function."""
    if classes == 0:
        return lambda x: model.predict(x)[:, None]
    return lambda x: model.decision_function(x).reshape(len(x), -1)


def _estimator(divergence: Callable[[Setting], Any], steered: bool) -> Callable[..., Scores]:
    def fit(setting: Setting, x: Array, y: Array, classes: int, reference: Any) -> Scores:
        estimator = DRRhoClassifier if classes else DRRhoRegressor
        model = estimator(
            divergence(setting),
            rho=setting.get("rho"),
            l2=setting["l2"],
            reference=losses_of(scores_of(reference, classes)(x), y, classes) if steered else None,
        )
        return scores_of(model.fit(x, y), classes)

    return fit


def fit_reference(x: Array, y: Array, classes: int, l2: float) -> Any:
    """Return the reference: a model of the same class, trained by empirical risk minimization."""
    return (DRRhoClassifier if classes else DRRhoRegressor)(radius=0.0, l2=l2).fit(x, y)


def _mean_risk(setting: Setting, x: Array, y: Array, classes: int, reference: Any) -> Scores:
    return scores_of(fit_reference(x, y, classes, setting["l2"]), classes)


def _fine_tuned(setting: Setting, x: Array, y: Array, classes: int, reference: Any) -> Scores:
    """Minimize the mean loss plus ``price / 2`` times the squared distance from the reference."""
    loss, targets = (Logistic(), _coded(y, classes)) if classes else (Squared(), y[:, None])
    features = np.column_stack([x, np.ones(len(x))])
    start = np.column_stack([np.atleast_2d(reference.coef_), np.atleast_1d(reference.intercept_)]).T
    price = setting["price"]

    def objective(flat: Array) -> tuple[float, Array]:
        w = flat.reshape(start.shape)
        slopes = loss.slopes(features @ w, targets)
        away = w - start
        gradient = features.T @ slopes.gradient / len(x) + price * away
        return float(slopes.values.mean() + price * np.square(away).sum() / 2), gradient.reshape(-1)

    w = minimize(objective, start.reshape(-1), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    return lambda new: np.column_stack([new, np.ones(len(new))]) @ w.reshape(start.shape)


def _robust(name: str, divergence: Callable[[Setting], Any], **grid: tuple[float, ...]) -> list[Method]:
    settings = _grid(l2=_PRICES, **grid)
    return [
        Method(f"DRO {name}", settings, _estimator(divergence, steered=False)),
        Method(f"DRRho {name}", settings, _estimator(divergence, steered=True)),
    ]


METHODS = {
    method.name: method
    for method in (
        Method("ERM", _grid(l2=tuple(np.geomspace(1e-4, 10.0, 12))), _mean_risk),
        Method("fine-tuning", _grid(price=tuple(np.geomspace(1e-4, 30.0, 12))), _fine_tuned),
        *_robust("chi-square", lambda _: ChiSquare(), rho=_RADII),
        *_robust("KL", lambda _: KL(), rho=_RADII),
        *_robust("CVaR", lambda setting: CVaR(setting["alpha"]), alpha=_TAILS),
    )
}
