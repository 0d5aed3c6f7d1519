"""Chi-square: a monotone active set, finite and exact (the argument of Michelot 1986 for simplex projection)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from drrho.divergences import Divergence
from drrho.solvers.dual import Dual, Found, by_conjugate
from drrho.solvers.rows import Block, Rows, some

_Step = Callable[
    [np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
]


def chi_square_ball(divergence: Divergence, rows: Rows, radius: np.ndarray) -> Found:
    """Shrink the support to ``{d >= eta}`` until it stays, ``eta = mean - std / sqrt(c)`` of the support.

    With base weight w in the support, ``c = w (1 + 2 radius) - 1``. Including an entry below the final threshold
    only lowers the threshold, so nothing that belongs to the support is ever dropped.
    """

    def step(kept, dropped, mean, variance):
        c = 2 * radius * kept - dropped
        saturated = (c <= 0) | (variance <= 0)
        if some(saturated):
            spread = np.sqrt(np.where(saturated, 1.0, variance) / np.where(saturated, 1.0, c))
            return np.where(saturated, -np.inf, mean - spread), mean - dropped * spread, kept * spread, saturated
        spread = np.sqrt(variance / c)
        return mean - spread, mean - dropped * spread, kept * spread, saturated

    return by_conjugate(divergence, rows, _active_set(rows, step))


def chi_square_penalty(divergence: Divergence, rows: Rows, strength: np.ndarray) -> Found:
    """Project ``d / (n strength)`` on the simplex: ``eta = mean - strength / w`` of the support of base weight w."""
    none = np.zeros(len(strength), dtype=bool)

    def step(kept, dropped, mean, variance):
        spread = strength / kept
        return mean - spread, mean - dropped * spread, strength, none

    return by_conjugate(divergence, rows, _active_set(rows, step))


def _active_set(rows: Rows, step: _Step) -> Dual:
    """Iterate ``step(kept, dropped base weight, mean, variance) -> (eta, nu = eta + lambda, lambda, saturated)``."""
    dropped = np.zeros(len(rows))
    mean, _ = rows.mean_and_ties()
    center = rows.column(mean)

    def spread_out(block: Block):
        y = block.d - center
        return y, (y, y)

    shift, square = rows.host_means(spread_out)
    mean = mean + shift
    eta, nu, strength, saturated = step(1.0 - dropped, dropped, mean, square - shift * shift)
    if some(eta > -1) and (condensed := rows.condensed()) is not None:  # -1 is the least loss
        # A long row begins near the threshold of a part of it. Its own support decides whether that is below the
        # final one: from above, the next threshold is lower.
        near = _active_set(condensed, step)
        guess = np.maximum(near.threshold - near.strength - 4 * np.sqrt(square / condensed.count), eta)
        kept, dropped_there, mean_there, variance = _moments_of_support(rows, np.minimum(guess, 0.0), mean)
        found = step(kept, dropped_there, mean_there, variance)
        if not some((found[0] < guess) | found[3]):
            dropped, mean = dropped_there, mean_there
            eta, nu, strength, saturated = found
    while some(eta > -1):
        eta_before, before = np.minimum(eta, 0.0), dropped
        kept, dropped, mean, variance = _moments_of_support(rows, eta_before, mean)
        eta, nu, strength, saturated = step(kept, dropped, mean, variance)
        if not some((dropped != before) & ~saturated):
            break
        eta = np.maximum(eta, eta_before)  # it only grows, but for rounding
    # The support's mean is known to the rounding of its losses, however small the strength.
    return Dual(nu, strength, None, saturated, (mean, dropped / (1 - dropped)))


def _moments_of_support(
    rows: Rows, eta: np.ndarray, center: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return base weight in and out of ``{d >= eta}``, and its mean and variance, summed about what is close to it."""
    attempt = 0
    while True:
        floor, origin = rows.column(eta), rows.column(center)

        def supported(block: Block, floor=floor, origin=origin):
            outside = torch.sub(floor, block.d).clamp_(min=0).sign_()
            inside = torch.rsub(outside, 1)
            y = (block.d - origin).mul_(inside)
            return inside, outside, block.d * inside, (y, y)

        kept, dropped, mean, square = rows.host_means(supported)
        mean, square = mean / kept, square / kept
        shift = mean - center
        variance = square - shift * shift
        attempt += 1
        if attempt == 3 or not some(shift * shift > 64 * variance):
            return kept, dropped, mean, variance
        center = mean  # the square has canceled: once more, about the mean
