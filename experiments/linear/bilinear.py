"""Bilinear contrastive models of noisy pairs: the data, the closed forms of all methods, and what theory says of them.

Two views ``x, y`` in R^d share ``signal`` directions of correlation theta; a pair is matched with probability eta and
independent otherwise. A similarity is ``x^T W y``, and what is to be learned is the direction of ``W* = U V^T``. All
methods minimize the spectral contrastive loss, which is the chi-square penalized contrastive risk with weights that may
be negative; its minimizer of rank ``signal`` is the truncated matrix of `truncated`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """Both views of n pairs, centered, ``[n, d]`` each, and which pairs are matched, ``[n]``."""

    x: Array
    y: Array
    matched: NDArray[np.bool_]

    @cached_property
    def whitened(self) -> Whitened:
        """The pairs in coordinates in which each view's sample covariance is I."""
        parts = []
        for view in (self.x, self.y):
            factor = np.linalg.cholesky(view.T @ view / len(view))
            inverse = np.linalg.inv(factor)
            parts.append((view @ inverse.T, inverse.T))
        (x, of_x), (y, of_y) = parts
        return Whitened(x, y, of_x, of_y)


class Whitened(NamedTuple):
    """Views ``z = L^-1 x`` of covariance I, where ``C = L L^T`` is that of x, and the maps ``L^-T``."""

    x: Array
    y: Array
    of_x: Array
    of_y: Array

    def minimizer(self, moment: Array) -> Array:
        """Return ``C_x^-1 S C_y^-1`` of a cross moment ``S``, given in the whitened coordinates."""
        return self.of_x @ moment @ self.of_y.T


@dataclass(frozen=True)
class Model:
    """The law of the pairs, in coordinates where both views have covariance I and W* is the first ``signal`` axes.

    That loses no generality: all methods here are equivariant to linear maps of either view. Views ``x = U z + noise``
    with noise of variance s^2 in all directions have ``correlation = 1 / (1 + s^2)``.
    """

    signal: int
    dimension: int
    correlation: float = 0.8

    def information(self, eta: Any) -> Array:
        """Return what one pair adds to ``1 / tan^2`` of the error's angle, to leading order in the number of pairs.

        It is the squared norm of the signal ``c U V^T``, ``c = eta theta``, over the summed variances of the entries
        of ``S - (C_x - I) c U V^T - c U V^T (C_y - I)`` that turn it: those of one signal axis and one other axis, and
        those of two signal axes but for their common scale. For small c it is ``eta^2 theta^2 / (2 d - k)``.
        """
        eta = np.asarray(eta, float)
        k, theta = self.signal, self.correlation
        square, fourth = (eta * theta) ** 2, eta * theta**2
        outside = 2 * k * (self.dimension - k) * (1 - square)
        across = k * (k - 1) * (1 - 2 * square + 2 * square * fourth)
        along = (k - 1) * (1 + 2 * fourth - 5 * square + 4 * square * fourth)
        return square * k / (outside + across + along)

    def draw(self, rng: np.random.Generator, n: int) -> tuple[Array, Array, Array, Array]:
        """Return ``x``, a matched ``y``, an independent ``y`` and a uniform number for each of n pairs.

        A pair is matched at eta where its number is below eta: one draw serves all eta.
        """
        x, independent = rng.standard_normal((2, n, self.dimension))
        matched = rng.standard_normal((n, self.dimension))
        k, theta = self.signal, self.correlation
        matched[:, :k] = theta * x[:, :k] + np.sqrt(1 - theta**2) * matched[:, :k]
        return x, matched, independent, rng.random(n)

    def error(self, w: Array) -> Array:
        """Return the sine of the angle between W ``[..., d, d]`` and W*; 1 where their product is not positive."""
        k = self.signal
        product = np.trace(w[..., :k, :k], axis1=-2, axis2=-1)
        cosine = product / np.maximum(np.sqrt(k) * np.linalg.norm(w, axis=(-2, -1)), np.finfo(float).tiny)
        return np.sqrt(1 - np.clip(cosine, 0, 1) ** 2)

    def truncated(self, w: Array) -> Array:
        """Return the nearest matrices of rank ``signal`` (Eckart and Young)."""
        left, values, right = np.linalg.svd(w)
        k = self.signal
        return (left[..., :k] * values[..., None, :k]) @ right[..., :k, :]


def mixed(drawn: tuple[Array, Array, Array, Array], n: int, eta: float) -> Pairs:
    """Return the first n pairs of a draw, of which a share eta is matched, both views centered."""
    x, matched, independent, uniform = (part[:n] for part in drawn)
    is_matched = uniform < eta
    y = np.where(is_matched[:, None], matched, independent)
    return Pairs(x - x.mean(0), y - y.mean(0), is_matched)


def estimate(pairs: Pairs) -> Array:
    """Return the twin: the minimizer ``C_x^-1 S C_y^-1`` over all W, of temperature 1, without a reference."""
    white = pairs.whitened
    return white.minimizer(white.x.T @ white.y / len(white.x))


def scores(pairs: Pairs, w: Array) -> Array:
    """Return ``x_i^T W y_i`` of each pair."""
    return np.einsum("ij,ij->i", pairs.x @ w, pairs.y)


def selected(pairs: Pairs, ranking: Array, shares: tuple[float, ...]) -> Array:
    """Return the minimizer on each of ascending shares of the pairs, those that rank highest, ``[shares, d, d]``.

    Positives are the chosen pairs; negatives are of all pairs.
    """
    white, order = pairs.whitened, np.argsort(-ranking, kind="stable")
    found, total, done = [], np.zeros((white.x.shape[1],) * 2), 0
    for share in shares:
        upto = max(round(share * len(order)), 1)
        block = order[done:upto]
        total, done = total + white.x[block].T @ white.y[block], upto
        found.append(white.minimizer(total / upto))
    return np.stack(found)


def learnable(model: Model, pairs: Pairs, reference: Array, shares: tuple[float, ...], chunks: int = 10) -> Array:
    """Return the minimizers on pairs that are chosen chunk by chunk by learnability, ``[shares, d, d]``.

    Of each chunk the share with the largest ``r_ii - s_ii`` is kept, the learner's loss minus the reference's, where
    the learner is the estimate of rank ``signal`` from what was kept of the chunks before.
    """
    white = pairs.whitened
    edges = np.linspace(0, len(white.x), chunks + 1).round().astype(int)
    moments, kept = np.zeros((len(shares), *reference.shape)), np.zeros(len(shares))
    learner = np.zeros_like(moments)
    for start, stop in pairwise(edges):
        raw = pairs.x[start:stop], pairs.y[start:stop]
        for place, share in enumerate(shares):
            ranking = np.einsum("ij,ij->i", raw[0] @ (reference - learner[place]), raw[1])
            chosen = start + np.argsort(-ranking, kind="stable")[: max(round(share * (stop - start)), 1)]
            moments[place] += white.x[chosen].T @ white.y[chosen]
            kept[place] += len(chosen)
        learner = model.truncated(white.minimizer(moments / kept[:, None, None]))
    return white.minimizer(moments / kept[:, None, None])


def error_of(information: Any) -> Array:
    """Return the sine of an angle whose tangent is ``information ** -0.5``."""
    return 1 / np.sqrt(1 + np.asarray(information, float))


class Errors(NamedTuple):
    """Predicted errors: of the reference, and of the methods without selection, with a perfect one, and with both."""

    reference: Array
    twin: Array
    published: Array
    steered: Array
    selected: Array
    both: Array


def predicted(model: Model, eta: Any, n: Any, m: Any, coefficient: float = 1.0) -> Errors:
    """Return the errors of n pairs, a share eta of them matched, with a reference of m matched pairs.

    ``published`` steers with a constant coefficient, ``steered`` with the best one; ``selected`` keeps the matched
    pairs and no others, which no filter does; ``both`` steers on these. Informations of independent estimates add up.
    """
    eta, n, m = np.broadcast_arrays(*(np.asarray(value, float) for value in (eta, n, m)))
    reference, twin, matched = m * model.information(1), n * model.information(eta), eta * n * model.information(1)
    # Of cR + W: the signals add up, and so do the variances (signal^2 / information) of what turns them.
    published = (coefficient + eta) ** 2 / (coefficient**2 / reference + eta**2 / twin)
    return Errors(*map(error_of, (reference, twin, published, twin + reference, matched, matched + reference)))


def pays_from(eta: Any, coefficient: float = 1.0) -> Array:
    """Return the ratio of the reference's information to the twin's from which steering with this coefficient pays."""
    return 1 / (1 + 2 * np.asarray(eta, float) / coefficient)


def beats_selection_from(eta: Any) -> Array:
    """Return the ratio from which the best steering knows more than a perfect filter alone, for small correlations."""
    return 1 / np.asarray(eta, float) - 1
