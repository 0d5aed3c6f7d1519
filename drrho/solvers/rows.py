"""Rows of losses as the solvers see them: normalized, in blocks, with sums that reach over all ranks.

What has one entry per loss stays on its device and is made block by block, so that temporary results stay in the
cache and no array of the rows' size is allocated beside the answer. What has one entry per row (multipliers,
brackets, moments) is a NumPy array on the host, where an iteration decides how to continue: a step on a handful of
numbers costs a tenth of what it costs as device operations, and a pass over the losses synchronizes just once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from drrho.ranks import Group

_BLOCK = 2**16  # losses of one row at a time on the CPU
_CONDENSED_FROM = 2**17  # losses of a row from which an iteration starts on fewer of them
_PROBES = 2**12  # losses whose quantiles place the bins
_BINS = 2**12
_DEVICE_BLOCK = 2**24  # and on a device, where it is put into bins
_POINT = 1e-14  # variance in a bin, over its width squared, that may be rounding

Term = Tensor | tuple[Tensor, Tensor]
Chosen = np.ndarray | slice  # flags of some rows, or all of them


class Block(NamedTuple):
    """Normalized losses ``d`` ``[rows, width]``, their base weights (None: uniform), and their place in the rows."""

    d: Tensor
    base: Tensor | None
    place: slice


class Rows:
    """Rows ``d`` with ``-1 <= d <= 0``: losses ``z`` ``[rows, n]`` minus their row's maximum, over their row's range.

    ``base`` ``[rows or 1, n]`` holds base weights (None: uniform); with a ``group`` every rank holds a part of
    the last dimension, and ``count`` is n over all of them. Without ``top``, d is z itself.
    """

    def __init__(
        self,
        z: Tensor,
        base: Tensor | None,
        group: Group,
        count: int,
        top: np.ndarray | None = None,
        scale: np.ndarray | None = None,
    ) -> None:
        self.z, self.base, self.group, self.count = z, base, group, count
        self.top, self.scale = top, scale
        is_short = len(z) > 1 or z.shape[-1] <= _BLOCK
        is_one_block = is_short or z.device.type != "cpu" or torch.compiler.is_compiling()
        self._only = Block(self.normalized(z), base, slice(None)) if is_one_block else None
        self._looked: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.z)

    def normalized(self, z: Tensor) -> Tensor:
        """Return d of losses ``[rows, width]``."""
        if self.top is None or self.scale is None:
            return z
        d = (z - self.column(self.top)).div_(self.column(self.scale))
        return d if self.base is None else d.clamp_(-1, 0)  # losses without base weight may lie outside

    def blocks(self) -> Iterator[Block]:
        """Yield the rows in blocks: all at once, or, where a single row is long, a part of it at a time."""
        if self._only is not None:
            yield self._only
            return
        for first in range(0, self.z.shape[-1], _BLOCK):
            place = slice(first, first + _BLOCK)
            base = None if self.base is None else self.base[:, place]
            yield Block(self.normalized(self.z[:, place]), base, place)

    def means(self, terms: Callable[[Block], tuple[Term, ...]]) -> Tensor:
        """Return base-weighted means over the last dimension, ``[terms, rows]``; a pair means its product."""
        total = None
        for block in self.blocks():
            sums = torch.stack([_sum(term, block.base) for term in terms(block)])
            total = sums if total is None else total.add_(sums)
        assert total is not None
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total.div_(self.count) if self.base is None else total

    def host_means(self, terms: Callable[[Block], tuple[Term, ...]]) -> np.ndarray:
        """Return `means` on the host."""
        means = self.means(terms)
        return means.numpy() if means.device.type == "cpu" else means.cpu().numpy()

    def mean_and_ties(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean of d and the base weight of the maximum, ``[rows]`` each."""
        if self._looked is None:
            # d is 0 at the maximum and negative elsewhere
            mean, ties = self.host_means(lambda block: (block.d, block.d.sign().add_(1)))
            self._looked = mean, ties
        return self._looked

    def column(self, per_row: np.ndarray) -> float | Tensor:
        """Return what broadcasts one host number per row against ``d``."""
        return column(per_row, self.z.device)

    def select(self, chosen: Chosen) -> Rows:
        """Return the chosen rows only."""
        if isinstance(chosen, slice) or chosen.all():
            return self
        mask = torch.from_numpy(chosen).to(self.z.device)
        base = self.base if self.base is None or len(self.base) == 1 else self.base[mask]
        top, scale = (None if field is None else field[chosen] for field in (self.top, self.scale))
        part = Rows(self.z[mask], base, self.group, self.count, top, scale)
        if self._looked is not None:
            part._looked = self._looked[0][chosen], self._looked[1][chosen]
        return part

    def condensed(self) -> Rows | None:
        """Return a long row as some thousands of weighted losses with nearly its sums; None where that saves nothing.

        The largest losses, on which the solution hangs most, are kept. The others are put into bins, and each bin is
        replaced by the two weighted losses that have its mean, variance and skewness (Gauss's quadrature): a sum of
        what is smooth in the losses is off by the fourth power of a bin's width.
        """
        n = self.z.shape[-1]
        if len(self) > 1 or self.group is not None or n < _CONDENSED_FROM:
            return None
        assert self.top is not None and self.scale is not None
        probes, top = torch.sort(self.z[0, :: n // _PROBES]).values, float(self.top[0])
        rare, floor = float(probes[len(probes) // 64]), float(probes[-len(probes) // 64])
        least, unit = top - float(self.scale[0]), 2.0 ** (52 - math.ceil(math.log2(n)))
        near, far = _Bins.between(rare, floor, unit, probes), _Bins.between(least, rare, unit, probes)
        parts = [(probes.new_full((1,), top), probes.new_full((1,), float(self.mean_and_ties()[1][0])))]
        size = _BLOCK if self.z.device.type == "cpu" else _DEVICE_BLOCK
        for first in range(0, n, size):
            z = self.z[0, first : first + size]
            base = torch.full_like(z, 1 / n) if self.base is None else self.base[0, first : first + size]
            is_high, is_far = z > floor, z < rare
            near.add(z, base * n, is_high | is_far | (z >= top))
            low, high = torch.where(is_far)[0], torch.where(is_high & (z < top))[0]
            far.add(z[low], base[low] * n, None)
            parts.append((z[high], base[high]))
        parts += [(z, weight / n) for z, weight in (near.condensed(), far.condensed())]
        z, base = (torch.cat(fields)[None] for fields in zip(*parts, strict=True))
        return Rows(z, base, None, base.shape[-1], self.top, self.scale)


class _Bins(NamedTuple):
    """Bins of equal width from ``low`` on, ``density`` in a unit of the losses; the last is for what is outside.

    ``moments`` ``[4, bins + 1]`` are sums of weights times powers of the position in the bin. Each term is rounded to
    a multiple of ``1 / unit``: whole numbers up to ``2**53`` have the same sum in any order, as a GPU adds them.
    """

    low: float
    density: float
    unit: float
    moments: Tensor

    @classmethod
    def between(cls, low: float, high: float, unit: float, like: Tensor) -> _Bins:
        """Return empty bins."""
        density = _BINS * (1 - 2.0**-40) / (high - low) if high > low else 0.0
        return cls(low, density, unit, like.new_zeros(4, _BINS + 1))

    def add(self, z: Tensor, weight: Tensor, outside: Tensor | None) -> None:
        """Add losses ``[m]`` of some weight, 1 on average, but for those outside."""
        place = (z - self.low).mul_(self.density)
        index = place.to(torch.int64).clamp_(0, _BINS - 1)  # losses without base weight may lie anywhere
        y, term = place.frac_().sub_(0.5), weight * self.unit
        if outside is not None:
            index.masked_fill_(outside, _BINS)
        for total in self.moments:
            total.index_add_(0, index, term.round())
            term.mul_(y)

    def condensed(self) -> tuple[Tensor, Tensor]:
        """Return two losses for each bin that is not empty, and their weights."""
        filled = self.moments[0, :-1] > 0
        count, *sums = self.moments[:, :-1][:, filled]
        first, second, third = (total / count for total in sums)
        variance, skew = second - first**2, third - 3 * first * second + 2 * first**3
        is_point = variance <= _POINT  # losses that are all the same
        variance = variance.clamp(min=_POINT)
        root = torch.sqrt(skew**2 + 4 * variance**3)
        below, above = (skew - root) / (2 * variance), (skew + root) / (2 * variance)
        share = (above / (above - below)).masked_fill(is_point, 1.0)
        y = first + torch.stack([below.masked_fill(is_point, 0.0), above])
        place = torch.arange(_BINS, device=y.device)[filled] + 0.5 + y.clamp(-0.5, 0.5)
        z = self.low + (place / self.density if self.density > 0 else torch.zeros_like(place))
        return z.flatten(), (torch.stack([share, 1 - share]) * (count / self.unit)).flatten()


def _sum(term: Term, base: Tensor | None) -> Tensor:
    first, second = term if isinstance(term, tuple) else (term, None)
    if base is not None:
        first = first * base
    if second is None:
        return first.sum(-1)
    if len(first) == 1 and len(second) == 1:
        return torch.mv(first, second[0])
    return (first * second).sum(-1)


def some(flags: np.ndarray) -> bool:
    """Return whether any of the flags is set; for a single row without NumPy's reduction, which costs more."""
    return bool(flags[0]) if len(flags) == 1 else bool(flags.any())


def column(per_row: np.ndarray | Tensor, device: torch.device) -> float | Tensor:
    """Return what broadcasts one number per row against losses: for a single row a number, which is faster."""
    if len(per_row) == 1 and not torch.compiler.is_compiling():
        return per_row.item()
    numbers = torch.from_numpy(per_row) if isinstance(per_row, np.ndarray) else per_row
    return numbers.to(device)[:, None]


def scatter(chosen: np.ndarray, inside: np.ndarray, outside: np.ndarray | float) -> np.ndarray:
    """Return an array over all rows: ``inside`` in the chosen ones, in their order, ``outside`` in the others."""
    everywhere = np.empty(len(chosen), dtype=inside.dtype)
    everywhere[chosen], everywhere[~chosen] = inside, outside
    return everywhere


def by_parts(
    flags: np.ndarray,
    inside: Callable[[Chosen], tuple[np.ndarray, ...]],
    outside: Callable[[Chosen], tuple[np.ndarray, ...]],
) -> tuple[np.ndarray, ...]:
    """Return fields of all rows, those of the flagged ones from one function and those of the others from another."""
    if not some(~flags):
        return inside(slice(None))
    if not some(flags):
        return outside(slice(None))
    return tuple(scatter(flags, *parts) for parts in zip(inside(flags), outside(~flags), strict=True))
