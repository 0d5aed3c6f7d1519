"""Losses of predictions and targets, with derivatives and conjugates: what a linear model is fitted to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, expit, log_softmax, softmax

Array: TypeAlias = NDArray[np.float64]


class Slopes(NamedTuple):
    """Losses at predictions ``f`` ``[n, k]``, with their derivatives in f.

    ``curvature`` is ``[n, k, k]``, or ``[n, k]`` where it is diagonal.
    """

    values: Array
    gradient: Array
    curvature: Array


class PointLoss(ABC):
    """A loss of predictions ``f`` ``[n, k]`` and targets ``y`` of the same shape, convex in f and >= 0."""

    #: What `drrho.convex` calls it.
    name: Literal["squared", "logistic", "hinge"]

    @abstractmethod
    def values(self, f: Array, y: Array) -> Array:
        """Return the losses ``[n]``."""

    def slopes(self, f: Array, y: Array) -> Slopes | None:
        """Return losses with derivatives; None where there are kinks."""
        return None

    @abstractmethod
    def allowed(self, s: Array, y: Array) -> Array:
        """Return slopes ``[n, k]`` moved to where `conjugate` is finite."""

    @abstractmethod
    def conjugate(self, s: Array, y: Array) -> Array:
        """Return ``sup_f <s, f> - loss(f, y)`` ``[n]`` of `allowed` slopes ``[n, k]``."""


class Squared(PointLoss):
    """``sum_k (y_k - f_k)^2``."""

    name = "squared"

    def values(self, f: Array, y: Array) -> Array:
        """Return the losses ``[n]``."""
        return np.square(y - f).sum(1)

    def slopes(self, f: Array, y: Array) -> Slopes:
        """Return losses with derivatives."""
        return Slopes(self.values(f, y), 2 * (f - y), np.full_like(f, 2.0))

    def allowed(self, s: Array, y: Array) -> Array:
        """Return the slopes."""
        return s

    def conjugate(self, s: Array, y: Array) -> Array:
        """Return ``sum_k s_k y_k + s_k^2 / 4``."""
        return (s * (y + s / 4)).sum(1)


class Logistic(PointLoss):
    """``log(1 + exp(-y f))`` of labels -1 and 1 (k = 1), or the cross-entropy of softmax(f) with one-hot y."""

    name = "logistic"

    def values(self, f: Array, y: Array) -> Array:
        """Return the losses ``[n]``."""
        return np.logaddexp(0, -y * f)[:, 0] if f.shape[1] == 1 else -(log_softmax(f, axis=1) * y).sum(1)

    def slopes(self, f: Array, y: Array) -> Slopes:
        """Return losses with derivatives."""
        values = self.values(f, y)
        if f.shape[1] == 1:
            wrong = expit(-y * f)
            return Slopes(values, -y * wrong, wrong * (1 - wrong))
        chance = softmax(f, axis=1)
        curvature = np.eye(f.shape[1]) * chance[:, None, :] - chance[:, :, None] * chance[:, None, :]
        return Slopes(values, chance - y, curvature)

    def allowed(self, s: Array, y: Array) -> Array:
        """Return slopes that are those of probabilities."""
        if s.shape[1] == 1:
            return -y * np.clip(-y * s, 0, 1)
        chance = np.maximum(s + y, 0)
        total = chance.sum(1, keepdims=True)
        return np.where(total > 0, chance / np.where(total > 0, total, 1.0), y) - y

    def conjugate(self, s: Array, y: Array) -> Array:
        """Return minus the entropy of the probabilities."""
        if s.shape[1] == 1:
            wrong = -y * s
            return -(entr(wrong) + entr(1 - wrong))[:, 0]
        return -entr(s + y).sum(1)


class Hinge(PointLoss):
    """``sum_k max(0, 1 - y_k f_k)`` of labels -1 and 1."""

    name = "hinge"

    def values(self, f: Array, y: Array) -> Array:
        """Return the losses ``[n]``."""
        return np.maximum(0, 1 - y * f).sum(1)

    def allowed(self, s: Array, y: Array) -> Array:
        """Return slopes with ``-1 <= y_k s_k <= 0``."""
        return y * np.clip(y * s, -1, 0)

    def conjugate(self, s: Array, y: Array) -> Array:
        """Return ``sum_k y_k s_k``."""
        return (y * s).sum(1)


class SmoothedHinge(Hinge):
    """``sum_k max_{0 <= a <= 1} a (1 - y_k f_k) - (width / 2) (a - center_k)^2``.

    At most the hinge loss, and equal to it where ``center`` is the hinge loss's own maximizing a.

    Parameters
    ----------
    width : float
        > 0.
    center : ndarray ``[n, k]``
        Between 0 and 1.
    """

    def __init__(self, width: float, center: Array) -> None:
        self.width, self.center = width, center

    def active(self, f: Array, y: Array) -> Array:
        """Return the maximizing a ``[n, k]``."""
        return np.clip(self.center + (1 - y * f) / self.width, 0, 1)

    def values(self, f: Array, y: Array) -> Array:
        """Return the losses ``[n]``."""
        active = self.active(f, y)
        return (active * (1 - y * f) - self.width / 2 * np.square(active - self.center)).sum(1)

    def slopes(self, f: Array, y: Array) -> Slopes:
        """Return losses with derivatives."""
        active = self.active(f, y)
        return Slopes(self.values(f, y), -y * active, ((active > 0) & (active < 1)) / self.width)
