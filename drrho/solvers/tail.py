"""Piecewise linear divergences by selection: CVaR, also as the limit of capped ones, and total variation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrho.divergences import Divergence
from drrho.solvers.dual import Dual, Found
from drrho.solvers.rows import Block, Rows, column

_SAMPLED_FROM = 2**17  # losses of a row from which a sample brackets the threshold first


class Tail(NamedTuple):
    """The worst ``alpha`` of each row: what tells a loss's tilt from where it lies to the threshold, ``[rows]``.

    Losses above the threshold have ratio ``1 / alpha``; what is left is shared equally among those at it, so that
    value and weights are continuous in alpha. A tilt is a ratio minus one: ``above``, ``tied``, -1 below.
    """

    threshold: Tensor
    above: Tensor
    tied: Tensor

    def tilt(self, d: Tensor) -> Tensor:
        """Return the tilt of losses ``[rows, width]``."""
        return self.tilt_of(torch.sub(d, column(self.threshold, d.device)).sign_())

    def tilt_of(self, relation: Tensor) -> Tensor:
        """Return the tilt of losses by the sign of their excess over the threshold, which is overwritten."""
        above = relation.clamp(min=0)
        tied = torch.addcmul(relation.new_ones(1), relation, relation, value=-1)
        tilt = relation.clamp_(max=0)
        if len(tilt) == 1 and not torch.compiler.is_compiling():
            return tilt.add_(above, alpha=self.above.item()).add_(tied, alpha=self.tied.item())
        return tilt.addcmul_(above, self.above[:, None]).addcmul_(tied, self.tied[:, None])


def tail(rows: Rows, alpha: float | Tensor) -> Tail:
    """Select the worst ``alpha`` of each row."""
    threshold, higher, equal, total = _cut(rows, alpha)
    if isinstance(alpha, Tensor):
        alpha = alpha.to(rows.z)
    budget = alpha * total  # never rounded
    # The same number twice; near alpha = 1 the second form would cancel.
    from_below = (total - higher - equal) - (1 - alpha) * (total - equal)
    left_over = torch.where(
        torch.as_tensor(alpha, device=rows.z.device) > 0.5, from_below, budget - higher - equal * alpha
    )
    full = (1 - alpha) / alpha
    above = full if isinstance(full, Tensor) else torch.full_like(equal, full)
    return Tail(threshold, above, torch.minimum(left_over / (equal * alpha), above))


def _cut(rows: Rows, alpha: float | Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the threshold of the worst ``alpha``, the mass above it and at it, and the mass of all (n, or 1)."""
    found = None
    if isinstance(alpha, float) and rows.base is None and rows.group is None:
        position = min(rows.count, max(1, math.ceil(alpha * rows.count)))
        found = _largest_by_sample(rows, position)
        threshold = found[0] if found is not None else _largest(rows, position)
    else:
        threshold = _select(rows, alpha)
    total = 1.0 if rows.base is not None else float(rows.count)
    if found is not None:
        return *found, total
    at = column(threshold, rows.z.device)

    def masses(block: Block):
        relation = torch.sub(block.d, at).sign_()
        return relation.clamp(min=0), torch.addcmul(relation.new_ones(1), relation, relation, value=-1)

    higher, equal = rows.means(masses) * total
    return threshold, higher, equal, total


def _largest(rows: Rows, position: int) -> Tensor:
    """Return the ``position``-th largest loss of each row."""
    found = torch.kthvalue(rows.z, rows.z.shape[-1] - position + 1, dim=-1).values
    return rows.normalized(found[:, None])[:, 0]


def _largest_by_sample(rows: Rows, position: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the ``position``-th largest loss of one long row, and how many are larger and equal.

    Order statistics of a sample bracket it; it is selected among the losses between them, if it is there.
    """
    n = rows.z.shape[-1]
    if len(rows.z) > 1 or n < _SAMPLED_FROM or torch.compiler.is_compiling() or rows.z.device.type != "cpu":
        return None
    z = rows.z[0]
    sample = torch.sort(z[:: n // 2**14]).values
    rank = (n - position) / n * len(sample)
    margin = 5 * math.sqrt(len(sample)) / 2 + 2
    below, above = math.floor(rank - margin), math.ceil(rank + margin)
    low = float(sample[below]) if below >= 0 else -math.inf
    high = float(sample[above]) if above < len(sample) else math.inf
    higher = torch.cat([part[part > low] for part in z.split(2**16)])
    candidates = higher[higher <= high]
    over = len(higher) - len(candidates)
    place = len(candidates) - (position - over)
    if not 0 <= place < len(candidates):
        return None
    threshold = torch.kthvalue(candidates, place + 1).values[None]
    higher = over + torch.count_nonzero(candidates > threshold)
    equal = torch.count_nonzero(candidates == threshold)
    return rows.normalized(threshold[:, None])[:, 0], higher[None].to(z.dtype), equal[None].to(z.dtype)


def _select(rows: Rows, alpha: float | Tensor) -> Tensor:
    """Return the largest value with base weight at least ``alpha`` at or above it."""
    tail_mass = torch.as_tensor(alpha, dtype=torch.float64, device=rows.z.device).expand(len(rows))

    def enough(depth: Tensor):
        return lambda block: (block.d.to(torch.float64).abs().view(torch.int64) <= depth).to(torch.float64)

    return _by_bits(rows, enough, lambda mass: mass >= tail_mass)


def _select_from_below(rows: Rows, mass: Tensor) -> Tensor:
    """Return the largest value with base weight at most ``mass`` below it."""

    def lower(depth: Tensor):
        return lambda block: (block.d.to(torch.float64).abs().view(torch.int64) > depth).to(torch.float64)

    return _by_bits(rows, lower, lambda below: below <= mass)


def _by_bits(
    rows: Rows, counted: Callable[[Tensor], Callable[[Block], Tensor]], enough: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the largest value whose base weight, as counted at a depth, is enough; by bisection on its bits.

    The bits of a nonnegative float64 are ordered like the number, so 62 counting passes end at the exact loss,
    whatever the rows, the weights and the number of ranks.
    """
    low = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.z.device)
    high = torch.full_like(low, int(np.float64(1.0).view(np.int64)))
    for _ in range(62):
        middle = (low + high) // 2
        weigh = counted(middle[:, None])
        there = enough(rows.means(lambda block, weigh=weigh: (weigh(block),))[0])
        high = torch.where(there, middle, high)
        low = torch.where(there, low, middle)
    return -high.view(torch.float64).to(rows.z.dtype)


class TotalVariationTilt(NamedTuple):
    """Tilts of the total-variation risks: what lies low is moved to the maximum, of tilt ``at_top`` ``[rows]``."""

    lowered: Callable[[Tensor], Tensor]
    at_top: Tensor

    def tilt(self, d: Tensor) -> Tensor:
        """Return the tilt of losses ``[rows, width]``."""
        return self.lowered(d).addcmul_((d == 0).to(d.dtype), self.at_top[:, None])

    def ratio(self, d: Tensor, tilt: Tensor) -> Tensor:
        """Return one plus the tilt."""
        return tilt + 1


def total_variation_ball(divergence: Divergence, rows: Rows, radius: np.ndarray) -> Found:
    """Move the lowest base mass ``radius`` to the maximum: ``radius max + (1 - radius) CVaR_(1 - radius)``.

    That mass is counted from the lowest loss up: a small radius has digits that ``1 - radius`` does not keep.
    """
    moved = torch.from_numpy(radius).to(rows.z.device)
    threshold, below, equal, total = _cut_from_below(rows, radius, moved)
    lowest = Tail(threshold, torch.zeros_like(equal), ((below - moved * total) / equal).clamp(-1, 0))
    return Found(_received(rows, lowest.tilt), _dual(-threshold.cpu().numpy()))


def _cut_from_below(rows: Rows, radius: np.ndarray, moved: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the threshold of the lowest base mass, the mass below it and at it, and the mass of all (n, or 1)."""
    found = None
    if len(rows) == 1 and rows.base is None and rows.group is None:
        position = rows.count - min(rows.count - 1, math.floor(float(radius[0]) * rows.count))
        found = _largest_by_sample(rows, position)
        threshold = found[0] if found is not None else _largest(rows, position)
    else:
        threshold = _select_from_below(rows, moved)
    total = 1.0 if rows.base is not None else float(rows.count)
    if found is not None:
        _, higher, equal = found  # numbers of losses, so that the difference is exact
        return threshold, (total - higher) - equal, equal, total
    at = column(threshold, rows.z.device)

    def masses(block: Block):
        relation = torch.sub(block.d, at).sign_()
        return relation.clamp(max=0).neg_(), torch.addcmul(relation.new_ones(1), relation, relation, value=-1)

    below, equal = rows.means(masses) * total
    return threshold, below, equal, total


def total_variation_penalty(divergence: Divergence, rows: Rows, strength: np.ndarray) -> Found:
    """Move every loss's mass to the maximum that lies more than ``strength`` below it: ``mean max(d, -strength)``."""
    floor = -rows.column(strength)
    return Found(_received(rows, lambda d: (d < floor).to(d.dtype).neg_()), _dual(strength))


def _received(rows: Rows, lowered: Callable[[Tensor], Tensor]) -> TotalVariationTilt:
    moved, share = rows.means(lambda block: (lowered(block.d), (block.d == 0).to(block.d.dtype)))
    return TotalVariationTilt(lowered, -moved / share)


def _dual(strength: np.ndarray) -> Dual:
    """The maximum sits at s = 1/2, the boundary at s = -1/2; where no loss lies so low, the least loss above it."""
    return Dual(-np.minimum(strength, 1) / 2, strength, None, np.zeros(len(strength), dtype=bool))
