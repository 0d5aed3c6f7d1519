"""Streaming moments of the losses of one model or of a pair, which merge exactly, in any order, over chunks and ranks.

Moments are kept up to the fourth order, with extremes and their ties. The merge is that of Chan, Golub & LeVeque (1983)
and Pebay (2008).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from drrho.ranks import Group
from drrho.validation import ArrayLike, as_losses

__all__ = ["Moments", "PairedMoments", "gather", "merge", "moments", "paired_moments"]

CHUNK = 1 << 15  # samples at a time, a multiple of 4 (each counter of the bootstrap's generator gives four numbers)
_NO_SPREAD = -1100  # the exponent of a channel whose values are all equal, below that of every float
_LARGEST = 2.0**1021  # differences of differences of such losses are still finite

_State = TypeVar("_State", bound="_CentralSums")


@dataclass(frozen=True, eq=False)
class _CentralSums:
    """Sums over samples of products of k channels, up to the fourth order, as merging and the delta method need them.

    Deviations from the mean are in units of ``2**exponents``, so that fourth powers neither overflow nor vanish.
    ``gram`` is the Gram matrix of (1, the k deviations, their products over ``pairs``); moving the center maps this
    vector linearly, which makes a merge exact. ``means + remainders`` is the center in twice the precision, since
    rounding the mean of losses near 1e8 would cost a merge eight digits.
    """

    count: int
    means: np.ndarray  # [k], as remainders, exponents, minima, maxima
    remainders: np.ndarray
    exponents: np.ndarray
    gram: np.ndarray  # [1 + k + pairs, the same]
    minima: np.ndarray
    maxima: np.ndarray
    ties: np.ndarray  # [2, k]: how many samples attain the minimum and the maximum

    pairs: ClassVar[tuple[tuple[int, int], ...]]

    def packed(self) -> np.ndarray:
        """Return all fields as one float64 vector."""
        fields = (self.means, self.remainders, self.exponents, self.gram, self.minima, self.maxima, self.ties)
        return np.concatenate([[self.count], *(np.ravel(field) for field in fields)]).astype(np.float64)

    def unpacked(self: _State, vector: np.ndarray) -> _State:
        """Return the state that a `packed` vector holds, with the shapes of this state."""
        k, gram = len(self.means), self.gram.size
        means, remainders, exponents, gram, minima, maxima, ties = np.split(
            vector[1:], np.cumsum([k, k, k, gram, k, k])
        )
        return type(self)(
            int(vector[0]),
            means,
            remainders,
            exponents.astype(np.int32),
            gram.reshape(self.gram.shape),
            minima,
            maxima,
            ties.reshape(self.ties.shape).astype(np.int64),
        )

    @classmethod
    def of(cls: type[_State], values: np.ndarray) -> _State:
        """Return the sums over one block of values ``[k, m]``."""
        origin = values[:, :1]
        shifted = values - origin
        exponents = _exponents(np.abs(shifted).max(1))
        units = np.ldexp(shifted, -exponents[:, None])
        center = units.mean(1, keepdims=True)
        units -= center
        correction = units.mean(1, keepdims=True)
        monomials = monomials_of(units - correction, cls.pairs)
        means, remainders = _two_sum(origin[:, 0], np.ldexp((center + correction)[:, 0], exponents))
        low, high = values.min(1), values.max(1)
        ties = np.stack([(values == low[:, None]).sum(1), (values == high[:, None]).sum(1)])
        return cls(values.shape[1], means, remainders, exponents, monomials @ monomials.T, low, high, ties)

    @classmethod
    def empty(cls: type[_State]) -> _State:
        """Return the state of no samples, the identity of :func:`merge`."""
        k = 1 + max(max(pair) for pair in cls.pairs)
        size = 1 + k + len(cls.pairs)
        zeros, lowest = np.zeros(k), np.full(k, _NO_SPREAD)
        ties = np.zeros((2, k), dtype=int)
        return cls(0, zeros, zeros, lowest, np.zeros((size, size)), np.full(k, np.inf), np.full(k, -np.inf), ties)

    def seconds(self, exponents: np.ndarray) -> np.ndarray:
        """Return the sums of the products over ``pairs``, in units of the given exponents."""
        a, b = np.array(self.pairs).T
        finer = self.exponents - exponents
        return np.ldexp(self.gram[0, 1 + len(finer) :], finer[a] + finer[b])


class Moments(_CentralSums):
    """Moments of one row of losses: mean, central sums, extremes and how often they are attained.

    :func:`moments` computes them, and :func:`merge` combines two of them.

    Examples
    --------
    >>> from drrho.moments import moments
    >>> found = moments([0.0, 0.0, 3.0])
    >>> found.mean, round(found.variance, 6), round(found.skewness, 6), found.ties_at_minimum
    (1.0, 3.0, 0.707107, 2)
    """

    pairs = ((0, 0),)

    @property
    def mean(self) -> float:
        """The mean; NaN without samples."""
        return float(self.means[0]) if self.count else np.nan

    @property
    def m2(self) -> float:
        """``sum (x - mean)^2``; like m3 and m4 in the units of the losses, where it may overflow."""
        return self._central_sum(2)

    @property
    def m3(self) -> float:
        """``sum (x - mean)^3``."""
        return self._central_sum(3)

    @property
    def m4(self) -> float:
        """``sum (x - mean)^4``."""
        return self._central_sum(4)

    @property
    def minimum(self) -> float:
        """The smallest loss; inf without samples."""
        return float(self.minima[0])

    @property
    def maximum(self) -> float:
        """The largest loss; -inf without samples."""
        return float(self.maxima[0])

    @property
    def ties_at_minimum(self) -> int:
        """The number of samples that attain the minimum."""
        return int(self.ties[0, 0])

    @property
    def ties_at_maximum(self) -> int:
        """The number of samples that attain the maximum."""
        return int(self.ties[1, 0])

    @property
    def variance(self) -> float:
        """The unbiased variance, ``m2 / (n - 1)``; NaN for n < 2."""
        return self.m2 / (self.count - 1) if self.count > 1 else np.nan

    @property
    def population_variance(self) -> float:
        """``m2 / n``, the variance in the formulas of the chi-square risk; NaN without samples."""
        return self.m2 / self.count if self.count else np.nan

    @property
    def skewness(self) -> float:
        """``mean (x - mean)^3 / s^3`` with the population variance s^2; NaN when all losses are equal."""
        return self._standardized(3)

    @property
    def kurtosis(self) -> float:
        """``mean (x - mean)^4 / s^4`` with the population variance s^2, 3 for normal losses; NaN when all are equal."""
        return self._standardized(4)

    def _central_sum(self, order: int) -> float:
        with np.errstate(over="ignore"):
            return float(np.ldexp(self.gram[order // 2, order - order // 2], order * self.exponents[0]))

    def _standardized(self, order: int) -> float:
        if self.count == 0 or self.minimum == self.maximum:
            return np.nan
        sums = self.gram / self.count
        return float(sums[order // 2, order - order // 2] / sums[1, 1] ** (order / 2))


class PairedMoments(_CentralSums):
    """Joint moments of losses, reference losses and excess losses on the same samples.

    The excess has its own channel, because V(l) + V(r) - 2 Cov(l, r) cancels where the reference is close.
    :func:`paired_moments` computes them, :func:`merge` combines two of them, and :func:`gather` those of all ranks.

    Examples
    --------
    >>> from drrho.moments import paired_moments
    >>> found = paired_moments([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    >>> abs(found.losses.mean - found.reference.mean - found.excess.mean) < 1e-12
    True
    """

    pairs = ((0, 0), (1, 1), (2, 2), (0, 1))

    @property
    def losses(self) -> Moments:
        """Moments of the losses."""
        return self._channel(0)

    @property
    def reference(self) -> Moments:
        """Moments of the reference losses."""
        return self._channel(1)

    @property
    def excess(self) -> Moments:
        """Moments of losses minus reference losses."""
        return self._channel(2)

    @property
    def cross(self) -> float:
        """``sum (l - mean) (r - mean)``; divided by n - 1 it is the covariance."""
        return float(np.ldexp(self.gram[1, 2], self.exponents[0] + self.exponents[1]))

    def _channel(self, k: int) -> Moments:
        rows = [0, 1 + k, 4 + k]
        fields = (self.means, self.remainders, self.exponents, self.minima, self.maxima)
        mean, remainder, exponent, low, high = (field[k : k + 1] for field in fields)
        gram, ties = self.gram[np.ix_(rows, rows)], self.ties[:, k : k + 1]
        return Moments(self.count, mean, remainder, exponent, gram, low, high, ties)


def moments(losses: ArrayLike) -> Moments:
    """Return the moments of ``losses``, accumulated in float64 and in chunks.

    Parameters
    ----------
    losses : tensor, array or sequence of any shape
        Every entry is a sample. For no samples use ``Moments.empty()``.

    Raises
    ------
    ValueError
        If there is no entry, or one is NaN, infinite or above 2^1021.
    TypeError
        For integer tensors.

    Examples
    --------
    >>> from drrho.moments import moments
    >>> found = moments([1.0, 2.0, 4.0, 5.0])
    >>> found.count, found.mean, found.variance, found.maximum
    (4, 3.0, 3.3333333333333335, 5.0)
    """
    row = _row(losses, "losses")
    return reduce(merge, (Moments.of(_block(part)[None]) for part in row.split(CHUNK)))


def paired_moments(losses: ArrayLike, reference_losses: ArrayLike) -> PairedMoments:
    """Return the joint moments of two models' losses on the same samples, in the same order.

    Parameters
    ----------
    losses, reference_losses : tensors, arrays or sequences of one shape
        Every entry is a sample. For no samples use ``PairedMoments.empty()``.

    Raises
    ------
    ValueError
        If the shapes differ, there is no entry, or one is NaN, infinite or above 2^1021.
    TypeError
        For integer tensors.

    Examples
    --------
    >>> from drrho.moments import paired_moments
    >>> found = paired_moments([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    >>> round(found.losses.variance, 4), round(found.excess.variance, 4)
    (2.3333, 0.3333)
    """
    target, reference = as_pair(losses, reference_losses)
    parts = zip(target.split(CHUNK), reference.split(CHUNK), strict=True)
    return reduce(merge, (PairedMoments.of(as_channels(l_part, r_part)) for l_part, r_part in parts))


def merge(a: _State, b: _State) -> _State:
    """Return the moments of the samples of ``a`` and ``b`` together, exact up to rounding.

    The operation is associative and commutative up to rounding, and the empty state is its identity, bit for bit. Sums
    are moved to the common mean by the binomial theorem (Chan, Golub & LeVeque 1983; Pebay 2008 for higher and cross
    orders).

    Raises
    ------
    TypeError
        If one is paired and the other is not.

    Examples
    --------
    >>> from drrho.moments import merge, moments
    >>> first, second = moments([1.0, 2.0]), moments([4.0, 5.0])  # of two batches
    >>> merge(first, second).variance == moments([1.0, 2.0, 4.0, 5.0]).variance
    True
    """
    if type(a) is not type(b):
        raise TypeError(f"moments of one kind can be merged, got {type(a).__name__} and {type(b).__name__}")
    if a.count == 0 or b.count == 0:
        return a if b.count == 0 else b
    count = a.count + b.count
    delta = (b.means - a.means) + (b.remainders - a.remainders)
    exponents = np.maximum(np.maximum(a.exponents, b.exponents), _exponents(abs(delta)))
    means, remainders = _two_sum(a.means, a.remainders + delta * (b.count / count))
    units = np.ldexp(delta, -exponents)
    gram = _moved(a, -units * (b.count / count), exponents) + _moved(b, units * (a.count / count), exponents)
    minima, maxima = np.minimum(a.minima, b.minima), np.maximum(a.maxima, b.maxima)
    ties = sum(state.ties * np.stack([state.minima == minima, state.maxima == maxima]) for state in (a, b))
    return type(a)(count, means, remainders, exponents, gram, minima, maxima, np.asarray(ties))


def gather(state: _State, group: Group = None) -> _State:
    """Return the moments of the samples of all ranks of ``group`` (default: the world), merged in the order of ranks.

    Every rank of the group calls this function with its own state, which may be ``empty()``, and all get the same bits.
    The ranks exchange vectors of float64, in which counts and exponents are exact.

    Examples
    --------
    >>> import torch.distributed as dist
    >>> from drrho.moments import gather, moments
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun starts more ranks
    >>> gather(moments([1.0, 2.0])).count
    2
    >>> dist.destroy_process_group()
    """
    sent = torch.from_numpy(state.packed())
    if dist.get_backend(group) == "nccl":
        sent = sent.cuda()
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group=group)
    return reduce(merge, [state.unpacked(vector.cpu().numpy()) for vector in received])


def _moved(state: _CentralSums, shift: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Return the Gram matrix after adding ``shift`` to the deviations, all in units of the given exponents."""
    units = np.ldexp(1.0, state.exponents - exponents)
    map_ = translation(shift, state.pairs) * monomials_of(units[:, None], state.pairs)[:, 0]
    return map_ @ state.gram @ map_.T


def translation(shift: np.ndarray, pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Return the linear maps of (1, deviations, products over ``pairs``) when ``shift`` ``[..., k]`` is added."""
    k = shift.shape[-1]
    map_ = np.zeros((*shift.shape[:-1], 1 + k + len(pairs), 1 + k + len(pairs)))
    map_[...] = np.eye(map_.shape[-1])
    map_[..., 1 : 1 + k, 0] = shift
    for row, (a, b) in enumerate(pairs, start=1 + k):  # (x + s)(y + t) = xy + t x + s y + st
        map_[..., row, 0] = shift[..., a] * shift[..., b]
        map_[..., row, 1 + a] += shift[..., b]
        map_[..., row, 1 + b] += shift[..., a]
    return map_


def monomials_of(deviations: np.ndarray, pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Return ones, the deviations ``[k, m]`` and their products over ``pairs``, stacked to ``[1 + k + pairs, m]``."""
    a, b = np.array(pairs).T
    return np.concatenate([np.ones_like(deviations[:1]), deviations, deviations[a] * deviations[b]])


def _exponents(size: np.ndarray) -> np.ndarray:
    """Return e with ``size <= 2**e``, elementwise."""
    return np.where(size > 0, np.frexp(size)[1], _NO_SPREAD)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounded sum and its rounding error (Knuth 1969)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _row(losses: ArrayLike, name: str) -> Tensor:
    row = as_losses(losses, name).detach().flatten()
    largest = row.abs().max().item()
    if largest > _LARGEST:
        raise ValueError(f"{name} must be at most 2^1021 in size, got {largest}: their differences overflow")
    return row


def as_pair(losses: ArrayLike, reference_losses: ArrayLike) -> tuple[Tensor, Tensor]:
    """Check two models' losses on the same samples, and return them as rows."""
    target, reference = as_losses(losses, "losses"), as_losses(reference_losses, "reference_losses")
    if target.shape != reference.shape:
        raise ValueError(
            f"reference_losses must have the shape of losses, {list(target.shape)}, got {list(reference.shape)}"
        )
    return _row(target, "losses"), _row(reference, "reference_losses")


def _block(part: Tensor) -> np.ndarray:
    return part.to("cpu", torch.float64).numpy()


def as_channels(target: Tensor, reference: Tensor) -> np.ndarray:
    """Return losses, reference losses and excess losses as the channels ``[3, m]`` of `PairedMoments`."""
    first, second = _block(target), _block(reference)
    return np.stack([first, second, first - second])
