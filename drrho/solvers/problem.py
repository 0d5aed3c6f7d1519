"""What is solved and what comes out of it, and the first look at the losses that every solution begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from drrho.divergences import Divergence
from drrho.ranks import Group
from drrho.validation import refuse

#: Refusals of a value, to be completed with it.
REFUSED_ALPHA = "alpha must lie in (0, 1], got {}: it is the fraction in the tail"
REFUSED_RANGE = "losses must be finite and have a finite range, got a range of {}"
REFUSED = {
    "radius": "radius must be finite and >= 0, got {}: it bounds D_phi(p || q)",
    "strength": "strength must be finite and >= 0, got {}: it is the price of D_phi(p || q)",
}


class Solution(NamedTuple):
    """Solved rows in the units of the losses.

    ``weights`` is ``[rows, n]``; all others are ``[rows]``. ``strength`` is the multiplier of D; ``distance`` is D at
    the weights; ``alpha_slope`` is d value / d alpha (0 without alpha); ``on_ball`` is 1 where the radius
    determines the strength, 0 where the strength was given.
    """

    value: Tensor
    weights: Tensor
    premium: Tensor
    threshold: Tensor
    strength: Tensor
    gap: Tensor
    distance: Tensor
    alpha_slope: Tensor
    on_ball: Tensor


class Problem(NamedTuple):
    """What is solved, beside the tensors: the divergence and the group of ranks over which rows are spread."""

    divergence: Divergence
    group: Group


def by_rows(
    function: Callable[..., Sequence[Tensor] | None],
    losses: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
    problem: Problem,
) -> Solution:
    """Apply a function that solves rows to losses ``[rows, n]``, or to ``[n]`` with scalar parameters."""
    row = (losses, radius, strength, alpha)
    if losses.ndim == 1:
        row = [tensor if tensor is None else tensor.unsqueeze(0) for tensor in row]
    fields = function(*row, base, problem)
    assert fields is not None
    return Solution(*(fields if losses.ndim == 2 else (field.squeeze(0) for field in fields)))


def extremes_of(z: Tensor, base: Tensor | None, group: Group) -> Tensor:
    """Return maximum and minimum of each row over the losses that have base weight, ``[2, rows]``."""
    extremes, worst = torch.stack([z.amax(-1), z.amin(-1)]), None
    if group is not None:  # all ranks refuse, or those that see nothing wrong would wait for those that do
        worst = extremes.abs().amax().nan_to_num_(nan=torch.inf)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
        refuse(~torch.isfinite(worst), worst, "losses must be finite on every rank, got {}")
    if base is not None:
        refuse(~torch.isfinite(extremes), extremes, "losses must be finite, got {}")
        outside = base <= 0
        extremes = torch.stack(
            [z.masked_fill(outside, -torch.inf).amax(-1), z.masked_fill(outside, torch.inf).amin(-1)]
        )
    if worst is not None:
        extremes[1].neg_()
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        extremes[1].neg_()
        extremes = torch.where(torch.isfinite(worst), extremes, torch.nan)  # NaN has no maximum that ranks agree on
    return extremes


def sample_count(z: Tensor, group: Group) -> int:
    """Return n, over all ranks."""
    if group is None:
        return z.shape[-1]
    count = torch.tensor([z.shape[-1]], device=z.device)
    dist.all_reduce(count, group=group)
    return int(count)


def fraction_of(divergence: Divergence) -> float:
    """Return the tail fraction of a divergence that has one for all rows."""
    fraction = divergence.tail_fraction
    assert fraction is not None
    return float(fraction)
