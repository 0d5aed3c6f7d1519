"""The weights of solved rows, and both sides of their certificate from the definitions of primal and dual.

All is in normalized units, of `rows.Rows`, until the solution is assembled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrho.divergences import Divergence
from drrho.solvers.dual import Found
from drrho.solvers.ends import Ends, Maximizer
from drrho.solvers.problem import Solution, fraction_of
from drrho.solvers.rows import Block, Rows, Term, some


class Bound(NamedTuple):
    """A ball, whose ``parameter`` is its radius, or a penalty, whose parameter is its ``price`` over the range."""

    divergence: Divergence
    parameter: np.ndarray
    price: np.ndarray | None = None

    @property
    def is_ball(self) -> bool:
        """Whether it is a ball."""
        return self.price is None


class Sums(NamedTuple):
    """Means over the base weights, ``[rows]`` each.

    Of the tilts, ``surplus``, by which the ratios miss the mean one; of ``d`` less its mean under the weights,
    ``gain``; of phi at the ratios, ``distance``; of ``phi*((d - threshold) / strength)``, ``conjugate``; and of what
    the losses exceed the point by where the ratios meet their cap, ``beyond``.
    """

    surplus: np.ndarray
    gain: np.ndarray
    distance: np.ndarray
    conjugate: np.ndarray
    beyond: np.ndarray


class Multipliers(NamedTuple):
    """Multipliers ``[rows]``, the strength also with stand-ins: ``finite`` has 1 for infinity, ``unit`` also for 0."""

    threshold: np.ndarray
    strength: np.ndarray
    finite: np.ndarray
    unit: np.ndarray


def certified(rows: Rows, span: np.ndarray, bound: Bound, found: Found, ends: Ends, maximizer: Maximizer) -> Solution:
    """Return the solution of all rows; ``span`` is the range of their losses."""
    threshold, strength = found.dual.threshold, found.dual.strength
    finite = np.where(ends.flat, 1.0, strength)
    multipliers = Multipliers(threshold, strength, finite, np.where(ends.hard, 1.0, finite))
    ratios, sums = _measured(rows, bound.divergence, found, multipliers, ends)
    mean, _ = rows.mean_and_ties()
    gain, dual = _primal_and_dual(bound, multipliers, ends, sums, maximizer)
    top, scale = rows.top, rows.scale
    assert top is not None and scale is not None
    free = bound.is_ball | (bound.parameter == 0) | (span == 0)
    value = np.where(ends.hard & (maximizer.threshold == 0) & free, top, top + scale * (mean + gain))
    numbers = [
        value,
        scale * gain,
        top + scale * threshold,
        scale * strength if bound.price is None else bound.price,
        scale * np.where(ends.flat, 0.0, dual - (mean + gain)),
        sums.distance,
        scale * _slope_in_alpha(bound.divergence, sums),
        np.full_like(mean, bound.is_ball),
    ]
    weights = ratios.mul_(rows.column(1 / (1 + sums.surplus) / (rows.count if rows.base is None else 1)))
    if rows.base is not None:
        weights.mul_(rows.base)
    first, *others = torch.from_numpy(np.array(numbers)).to(rows.z.device).unbind()
    return Solution(first, weights, *others)


def _measured(
    rows: Rows, divergence: Divergence, found: Found, multipliers: Multipliers, ends: Ends
) -> tuple[Tensor, Sums]:
    """Return the density ratios ``[rows, n]`` and their sums, by one pass over the losses."""
    known, order, capped = found.dual.distance, divergence.cressie_read_order, divergence.tail_fraction is not None
    at_end = ends.hard | ends.flat
    names = ["surplus", "gain"]
    names += ["distance"] * (known is None or some(at_end)) + ["conjugate"] * (order is None) + ["beyond"] * capped
    mean, _ = rows.mean_and_ties()
    center, ratios = rows.column(mean), torch.empty_like(rows.z)
    origin, unit = rows.column(multipliers.threshold), rows.column(multipliers.unit)
    cut = rows.column(multipliers.threshold + multipliers.finite * float(divergence.slope_at_cap()))

    def sums(block: Block) -> tuple[Term, ...]:
        tilt = found.tilt.tilt(block.d)
        ratios[:, block.place] = found.tilt.ratio(block.d, tilt)
        if block.base is not None:  # phi may be infinite where there is no base weight to multiply it
            tilt = tilt.masked_fill(block.base == 0, 0.0)
        terms: dict[str, Callable[[], Term]] = {
            "surplus": lambda: tilt,
            "gain": lambda: (tilt, block.d - center),
            "distance": lambda: divergence.phi_of_tilt(tilt),
            "conjugate": lambda: divergence.conjugate((block.d - origin).div_(unit)),
            "beyond": lambda: (block.d - cut).clamp_(min=0),
        }
        return tuple(terms[name]() for name in names)

    means = dict(zip(names, rows.host_means(sums), strict=True))
    surplus, distance = means["surplus"], means.get("distance", known)
    assert distance is not None
    if known is not None:
        distance = np.where(at_end, distance, known)
    # For a Cressie-Read order, the mean of phi* is a combination of two that are known.
    conjugate = means["conjugate"] if order is None else surplus + (order - 1) * distance
    gain = means["gain"] / (1 + surplus)  # at the weights returned, which sum to 1
    return ratios, Sums(surplus, gain, distance, conjugate, means.get("beyond", np.zeros_like(mean)))


def _primal_and_dual(
    bound: Bound, multipliers: Multipliers, ends: Ends, sums: Sums, maximizer: Maximizer
) -> tuple[np.ndarray, np.ndarray]:
    """Return by how much the primal value exceeds the mean, and the dual value."""
    divergence, parameter = bound.divergence, bound.parameter
    # At strength 0 the limit of strength * phi*(s / strength).
    recession = 0.0 if divergence.tail_fraction is None else sums.beyond / fraction_of(divergence)
    with np.errstate(invalid="ignore"):
        expected = np.where(ends.hard, recession, multipliers.finite * sums.conjugate)
        if bound.is_ball:
            return sums.gain, expected + multipliers.threshold + multipliers.finite * parameter
        price = np.where(parameter == 0, 0.0, parameter * sums.distance)  # D may be infinite where it has no price
    dual = expected + multipliers.threshold
    free = maximizer.threshold + (dual - multipliers.threshold)
    return sums.gain - price, np.where(parameter == 0, free, dual)


def _slope_in_alpha(divergence: Divergence, sums: Sums) -> np.ndarray:
    """Return d value / d alpha."""
    return sums.beyond if divergence.tail_fraction is None else -sums.beyond / fraction_of(divergence) ** 2
