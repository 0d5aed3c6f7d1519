"""The weights of solved rows, and both sides of their certificate from the definitions of primal and dual.

All is in normalized units, of `rows.Rows`, until the solution is assembled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from drrho.divergences import Divergence
from drrho.solvers.dual import Exponents, Found
from drrho.solvers.ends import Ends, Maximizer
from drrho.solvers.problem import Solution, fraction_of
from drrho.solvers.root import EPS
from drrho.solvers.rows import Block, Rows, Term, some

_ALLOWED = 1e-8  # gap of an answer over its premium
_ROUNDING = 512 * EPS  # gap of an answer over the range of the losses
_LEAST = 64 * float(np.finfo(np.float64).smallest_subnormal)  # gap of an answer, where the range is no normal number
_BEYOND = 1e-11  # by how much of itself rounding in D may move a premium
_SAME = 256 * EPS  # difference of a solver's D and its sum
_CLOSE = 1e-12  # by how much sums of ratios may miss what they should be, where better ones can be found
_LINEAR = 1e-8  # surplus up to which D is followed to first order
_SLIGHT = 1e-6  # and change of D, over D
_LONG, _COARSE = 2**17, 30.0  # on rows so long rounding averages out up to such a strength
_NUDGES = 12


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

    Of the tilts, ``surplus``, by which the ratios miss the mean one; of ``d`` less its mean under the ratios,
    ``gain``; of phi at the ratios, ``distance``; of ``phi*(s) - s`` at ``s = (d - threshold) / strength``, ``bend``;
    and of what the losses exceed the point by where the ratios meet their cap, ``beyond``.
    """

    surplus: np.ndarray
    gain: np.ndarray
    distance: np.ndarray
    bend: np.ndarray
    beyond: np.ndarray


class Multipliers(NamedTuple):
    """Multipliers ``[rows]``; ``finite`` is the strength with 1 for infinity, that of the exponents also 1 for 0."""

    threshold: np.ndarray
    strength: np.ndarray
    finite: np.ndarray
    exponents: Exponents

    @property
    def unit(self) -> np.ndarray:
        """The strength of the exponents."""
        return self.exponents.strength


class Primal(NamedTuple):
    """Feasible weights ``q (1 - kept + kept ratio / mean ratio)``, and their gain over the mean and D, ``[rows]``."""

    gain: np.ndarray
    distance: np.ndarray
    kept: np.ndarray


def certified(
    rows: Rows,
    span: np.ndarray,
    bound: Bound,
    found: Found,
    ends: Ends,
    maximizer: Maximizer,
    *,
    refuse: bool = False,
) -> Solution | None:
    """Return the solution of all rows with its gap; ``span`` is the range of their losses.

    None where a better one can be found, and this is not one to the last digits.

    Raises
    ------
    RuntimeError
        Where asked to ``refuse``, if a dual value is not within `_ALLOWED` of what the weights attain.
    """
    if not bound.is_ball and some(span == 0):  # equal losses leave D nothing to be paid for
        bound = bound._replace(parameter=np.where(span == 0, 0.0, bound.parameter))
    with np.errstate(all="ignore"):
        multipliers, ratios, sums = _measured(rows, bound.divergence, found, ends)
        if found.is_rough and some(_is_off(bound, sums)):
            return None
        primal = _feasible(rows, bound, multipliers, ends, ratios, sums)
        mean, _ = rows.mean_and_ties()
        gain, dual = _primal_and_dual(bound, mean, multipliers, ends, sums, primal, maximizer)
        # By weak duality, what exceeds the bound does so by rounding: in a ball, by that of D at the weights.
        above = (gain > dual + 2 * EPS) & (gain - dual <= _BEYOND * primal.gain) & ~ends.flat
        shrunk = above & ends.open
        if bound.is_ball and some(shrunk):
            primal = primal._replace(kept=np.where(shrunk, primal.kept * (dual / gain), primal.kept))
        gain = np.where(above, dual, gain)
    top, scale = rows.top, rows.scale
    assert top is not None and scale is not None
    gap = np.where(ends.flat, 0.0, dual - gain)
    free = bound.is_ball & (primal.kept == 1) | (bound.parameter == 0) | (span == 0)
    value = np.where(ends.hard & (maximizer.threshold == 0) & free, top, top + scale * (mean + gain))
    numbers = [
        value,
        scale * gain,
        top + scale * multipliers.threshold,
        scale * multipliers.strength if bound.price is None else bound.price,
        scale * gap,
        primal.distance,
        scale * _slope_in_alpha(bound.divergence, sums),
        np.full_like(mean, bound.is_ball),
    ]
    failed = _is_uncertified(span, numbers) if refuse else np.zeros_like(span, dtype=bool)
    if some(failed):
        if found.better is not None:
            return None
        _refuse_uncertified(bound, numbers, failed)
    count = rows.count if rows.base is None else 1
    weights = ratios.mul_(rows.column(primal.kept / (1 + sums.surplus) / count))
    if some(primal.kept < 1):
        weights.add_(rows.column((1 - primal.kept) / count))
    if rows.base is not None:
        weights.mul_(rows.base)
    first, *others = torch.from_numpy(np.array(numbers)).to(rows.z.device).unbind()
    return Solution(first, weights, *others)


def _is_off(bound: Bound, sums: Sums) -> np.ndarray:
    """Return whether the ratios, or their D in a ball, miss what they should be, ``[rows]``."""
    missed = np.abs(sums.surplus)
    if bound.is_ball:
        missed = np.maximum(missed, np.abs(sums.distance / bound.parameter - 1))
    return ~(missed <= _CLOSE)


def _measured(rows: Rows, divergence: Divergence, found: Found, ends: Ends) -> tuple[Multipliers, Tensor, Sums]:
    """Return the multipliers, the density ratios ``[rows, n]`` and their sums, by one pass over the losses.

    A threshold may be rounded out of the domain of phi* by an error of the losses' own: it is then moved up by as
    much, which adds no more than that error to the dual value, and the sums are made again.
    """
    strength = found.dual.strength
    finite = np.where(ends.flat, 1.0, strength)
    exponents = found.dual.exponents._replace(strength=np.where(ends.hard, 1.0, finite))
    threshold, nudge, ratios = found.dual.threshold, 0.0, torch.empty_like(rows.z)
    for attempt in range(_NUDGES):
        moved = exponents._replace(offset=exponents.offset - nudge / exponents.strength)
        multipliers = Multipliers(threshold + nudge, strength, finite, moved)
        sums = _sums(rows, divergence, found, multipliers, ends, ratios)
        outside = ~np.isfinite(sums.bend) & ends.open
        if attempt + 1 == _NUDGES or not some(outside):
            return multipliers, ratios, sums
        nudge = np.where(outside, np.maximum(4 * nudge, EPS * np.abs(threshold)), nudge)
    raise AssertionError("unreachable")


def _sums(
    rows: Rows, divergence: Divergence, found: Found, multipliers: Multipliers, ends: Ends, ratios: Tensor
) -> Sums:
    """Return the sums, and store the ratios."""
    known, order, capped = found.dual.distance, divergence.cressie_read_order, divergence.tail_fraction is not None
    at_end = ends.hard | ends.flat
    measured = known is None or order is None or some(at_end)
    # At orders 1 and 2 phi*(s) = t - 1 + (k - 1) phi(t), of which both parts are summed; the others are evaluated.
    direct = order not in (1, 2)
    names = ["surplus", "gain"] + ["distance"] * measured + ["bend"] * direct + ["beyond"] * capped
    mean, _ = rows.mean_and_ties()
    center = rows.column(mean)
    cut = rows.column(multipliers.threshold + multipliers.finite * float(divergence.slope_at_cap()))
    # Where the strength exceeds the losses' range, the rounding of phi* does.
    fine = order is None and some(multipliers.unit > (1.0 if rows.count < _LONG else _COARSE))
    steep = order is None and not divergence.has_kinks  # phi may be so at zero
    precise = divergence.bend if rows.count < _LONG else divergence.averaged_bend
    bend_of = precise if fine else divergence.rough_bend

    def sums(block: Block) -> tuple[Term, ...]:
        tilt = found.tilt.tilt(block.d)
        ratio = found.tilt.ratio(block.d, tilt)
        ratios[:, block.place] = ratio
        if block.base is not None:  # phi may be infinite where there is no base weight to multiply it
            tilt = tilt.masked_fill(block.base == 0, 0.0)
        terms: dict[str, Callable[[], Term]] = {
            "surplus": lambda: tilt,
            "gain": lambda: (tilt, block.d - center),
            "distance": lambda: divergence.phi_of_tilt(tilt) if not steep else _phi(divergence, tilt, ratio),
            "bend": lambda: bend_of(multipliers.exponents.of(block.d)),
            "beyond": lambda: (block.d - cut).clamp_(min=0),
        }
        return tuple(terms[name]() for name in names)

    means = dict(zip(names, rows.host_means(sums), strict=True))
    surplus, distance = means["surplus"], means.get("distance", known)
    assert distance is not None
    if known is not None:
        # The solver's D has more digits than a sum over phi where the ratios are close to one, if it is the same.
        same = np.abs(distance - known) <= _SAME * (1 + known)
        distance = np.where(at_end | ~same, distance, known)
    bend = (
        means["bend"]
        if direct
        else surplus + (order - 1) * distance - (mean - multipliers.threshold) / multipliers.unit
    )
    return Sums(surplus, means["gain"], distance, bend, means.get("beyond", np.zeros_like(mean)))


def _phi(divergence: Divergence, tilt: Tensor, ratio: Tensor) -> Tensor:
    """Return phi of ratios, of those close to one by their tilt and of those close to zero by themselves."""
    small = tilt < -0.5
    phi = divergence.phi_of_tilt(tilt)
    return torch.where(small, divergence.phi(ratio), phi) if small.any() else phi


def _feasible(rows: Rows, bound: Bound, multipliers: Multipliers, ends: Ends, ratios: Tensor, sums: Sums) -> Primal:
    """Return the weights that sum to one and lie in the ball, next to the ratios."""
    mean, _ = rows.mean_and_ties()
    surplus, gain = sums.surplus, sums.gain / (1 + sums.surplus)
    # D at the ratios over their mean: to first order in the surplus, where phi' is s; summed where that is too much.
    slope = np.where(ends.open, (mean + gain - multipliers.threshold) / multipliers.unit, 0.0)
    felt = np.abs(surplus) > 4 * EPS
    distance = np.where(felt, np.maximum(sums.distance - surplus * slope, 0.0), sums.distance)
    missed = ((np.abs(surplus) > _LINEAR) | (np.abs(surplus * slope) > _SLIGHT * sums.distance) & felt) & ends.open
    if some(missed):
        divisor = rows.column(1 + surplus)
        (again,) = rows.host_means(lambda block: (bound.divergence.phi(ratios[:, block.place] / divisor),))
        distance = np.where(missed, again, distance)
    kept = np.ones_like(mean)
    if bound.is_ball:  # D is convex and zero at q, so that D falls at least as fast as what is kept
        outside = distance > bound.parameter * (1 + 2 * EPS)
        kept = np.where(outside, bound.parameter / distance, 1.0)
        gain, distance = kept * gain, np.where(outside, bound.parameter, distance)
    return Primal(gain, distance, kept)


def _primal_and_dual(
    bound: Bound,
    mean: np.ndarray,
    multipliers: Multipliers,
    ends: Ends,
    sums: Sums,
    primal: Primal,
    maximizer: Maximizer,
) -> tuple[np.ndarray, np.ndarray]:
    """Return by how much the primal and the dual value exceed the mean.

    The dual ``threshold + strength * mean phi*(s)``, less the mean, is ``strength * mean (phi*(s) - s)``: a sum of
    terms of one sign, in which no threshold cancels.
    """
    divergence, parameter = bound.divergence, bound.parameter
    # At strength 0 the limit of strength * phi*(s / strength).
    recession = 0.0 if divergence.tail_fraction is None else sums.beyond / fraction_of(divergence)
    at_maximum = multipliers.threshold - mean + recession
    dual = np.where(ends.hard, at_maximum, multipliers.finite * sums.bend)
    if bound.is_ball:
        return primal.gain, dual + np.where(ends.hard, 0.0, multipliers.finite * parameter)
    # D may be infinite where it has no price, and has none to pay where the price is beyond measure.
    price = np.where((parameter == 0) | ends.flat, 0.0, parameter * primal.distance)
    free = maximizer.threshold - mean + recession
    return primal.gain - price, np.where(parameter == 0, free, dual)


def _is_uncertified(span: np.ndarray, numbers: list[np.ndarray]) -> np.ndarray:
    """Return which answers their own certificate does not hold to."""
    premium, gap = numbers[1], numbers[4]
    allowed = _ALLOWED * np.abs(premium) + _ROUNDING * span + _LEAST
    return ~((np.abs(gap) <= allowed) & np.isfinite(allowed))


def _refuse_uncertified(bound: Bound, numbers: list[np.ndarray], failed: np.ndarray) -> NoReturn:
    """Refuse the first of the answers that failed."""
    _, premium, threshold, strength, gap, distance, *_ = numbers
    name, given = ("radius", bound.parameter) if bound.price is None else ("strength", bound.price)
    raise RuntimeError(
        f"no certified risk of {bound.divergence} at {name} {given[failed][0]:.6g}: threshold "
        f"{threshold[failed][0]:.6g} and strength {strength[failed][0]:.6g} leave a gap of {gap[failed][0]:.3g} to "
        f"weights of premium {premium[failed][0]:.6g} and D {distance[failed][0]:.6g}; phi must be strictly "
        "convex with its minimum 0 at 1, and conjugate and conjugate_gradient must belong to it"
    )


def _slope_in_alpha(divergence: Divergence, sums: Sums) -> np.ndarray:
    """Return d value / d alpha."""
    return sums.beyond if divergence.tail_fraction is None else -sums.beyond / fraction_of(divergence) ** 2
