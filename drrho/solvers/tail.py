"""Piecewise linear divergences by selection: CVaR, also as the limit of capped ones, and total variation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drrho.solvers.rows import Dual, Rows


def tail(rows: Rows, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return tilt ``[rows, n]`` and threshold ``[rows]`` of the worst ``alpha`` of each row.

    Losses above the threshold have ratio ``1 / alpha``; what is left is shared equally among those at it, so that
    value and weights are continuous in alpha. ``tilt`` is the ratio minus one.
    """
    d, n = rows.d, rows.count
    if isinstance(alpha, float) and rows.base is None and rows.group is None:
        budget = alpha * n  # never rounded
        position = min(n, max(1, math.ceil(budget)))
        threshold = torch.kthvalue(d, n - position + 1, dim=-1).values
    else:
        threshold = _select(rows, alpha)
    if isinstance(alpha, Tensor):
        alpha = alpha.to(d)
    relation = torch.sub(d, threshold[:, None]).sign_()
    tied = 1 - relation.abs()
    above = relation.clamp(min=0)
    whole = 1.0 if rows.base is not None else float(n)
    higher, equal = rows.means(above, tied) * whole
    # The same number twice; near alpha = 1 the second form would cancel.
    from_below = (whole - higher - equal) - (1 - alpha) * (whole - equal)
    from_above = (alpha * whole - higher) - equal * alpha
    left_over = torch.where(torch.as_tensor(alpha, device=d.device) > 0.5, from_below, from_above)
    boundary = left_over / (equal * alpha)
    full = (1 - alpha) / alpha
    below = relation.clamp_(max=0)  # -1 where no weight is left
    tilt = below.addcmul_(above, full[:, None] if isinstance(full, Tensor) else d.new_tensor(full))
    return tilt.addcmul_(tied, boundary[:, None]), threshold


def _select(rows: Rows, alpha: float | Tensor) -> Tensor:
    """Return the largest value with base weight at least ``alpha`` at or above it, by bisection on its bits.

    The bits of a nonnegative float64 are ordered like the number, so 62 counting passes end at the exact loss,
    whatever the rows, the weights and the number of ranks.
    """
    depth = -rows.d.to(torch.float64)
    bits = depth.view(torch.int64)
    tail_mass = torch.as_tensor(alpha, dtype=torch.float64, device=depth.device).expand(len(depth))
    low = torch.full((len(depth),), -1, dtype=torch.int64, device=depth.device)
    high = torch.full_like(low, int(np.float64(1.0).view(np.int64)))
    counted = rows._replace(d=depth)
    for _ in range(62):
        middle = (low + high) // 2
        enough = counted.means((bits <= middle[:, None]).to(torch.float64))[0] >= tail_mass
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle)
    return -high.view(torch.float64).to(rows.d.dtype)


def total_variation_ball(rows: Rows, radius: np.ndarray) -> tuple[Tensor, Dual]:
    """Move the lowest base mass ``radius`` to the maximum: ``radius max + (1 - radius) CVaR_(1 - radius)``."""
    kept = torch.from_numpy(1 - radius).to(rows.d.device)
    tilt, threshold = tail(rows, kept)
    # (1 - radius) times the tail's ratio is 1 above the threshold: the tilt there is zero.
    tilt = tilt.add_(1).mul_(kept[:, None]).sub_(1).clamp_(max=0)
    return _moved_to_maximum(rows, tilt), _total_variation_dual(-threshold.cpu().numpy())


def total_variation_penalty(rows: Rows, strength: np.ndarray) -> tuple[Tensor, Dual]:
    """Move every loss's mass to the maximum that lies more than ``strength`` below it: ``mean max(d, -strength)``."""
    tilt = (rows.d < -rows.column(strength)).to(rows.d.dtype).neg_()
    return _moved_to_maximum(rows, tilt), _total_variation_dual(strength)


def _moved_to_maximum(rows: Rows, tilt: Tensor) -> Tensor:
    tied = (rows.d == 0).to(tilt.dtype)
    moved, share = rows.means(tilt, tied)
    return tilt.addcmul_(tied, -(moved / share)[:, None])


def _total_variation_dual(strength: np.ndarray) -> Dual:
    """The maximum sits at s = 1/2, the boundary at s = -1/2."""
    return Dual(-strength / 2, strength, None, np.zeros(len(strength), dtype=bool))
