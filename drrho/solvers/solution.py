"""From losses of any size to a certified solution: the ends of the parameter range, normalization, certificate."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrho.divergences import KL, CVaR, Divergence
from drrho.solvers import native, solve_ball, solve_penalty
from drrho.solvers.closed import solve_cvar, solve_kl_penalty
from drrho.solvers.problem import REFUSED, REFUSED_ALPHA, REFUSED_RANGE, Problem, Solution, extremes_of, sample_count
from drrho.solvers.rows import Block, Dual, Rows, some
from drrho.solvers.tail import Tail, tail
from drrho.validation import refuse

_CHUNK = 2**18  # losses of several rows solved at a time on the CPU, so that they stay in the cache
_FLAT = 1 / np.finfo(np.float64).tiny  # relative strength at which no weight differs from q by a rounding error


def solve(
    z: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
    problem: Problem,
) -> Solution:
    """Maximize ``<p, z> - strength * D(p || base)`` subject to ``D(p || base) <= radius``, either of them optional.

    ``z`` ``[rows, n]``, parameters ``[rows]``, ``base`` ``[rows or 1, n]``; ``alpha`` ``[rows]`` replaces the
    divergence's where that is a tensor.

    Raises
    ------
    ValueError
        For a loss that is not finite, a range that overflows, or a parameter that is negative or not finite.
    """
    divergence = problem.divergence
    if len(z) == 0:
        none = z.new_zeros(0)
        return Solution(none, torch.zeros_like(z), *(none.clone() for _ in range(7)))
    if native.takes(z, alpha, base, problem):
        return native.solve_natively(z, radius, strength, alpha, divergence)
    if alpha is not None:
        refuse(~((alpha > 0) & (alpha <= 1)), alpha, REFUSED_ALPHA)
    if base is not None:
        refuse(~(base >= 0), base, "base_weights must be >= 0 with rows that sum to 1, got {}")
    if isinstance(divergence, CVaR) or (radius is None and isinstance(divergence, KL)):
        for parameter, name in ((radius, "radius"), (strength, "strength")):
            if parameter is not None:
                refuse(~((parameter >= 0) & (parameter < torch.inf)), parameter, REFUSED[name])
        if isinstance(divergence, CVaR):
            return solve_cvar(z, strength, alpha, base, problem)
        assert strength is not None
        return solve_kl_penalty(z, strength, base, problem)
    bound, price = _on_host(radius, "radius"), _on_host(strength, "strength")
    if alpha is None and (len(z) == 1 or z.numel() <= _CHUNK or z.device.type != "cpu"):
        return _iterated(z, bound, price, base, problem)
    # A row with an alpha of its own has a divergence of its own.
    step = 1 if alpha is not None else max(1, _CHUNK // z.shape[-1])
    whole = None
    for first in range(0, len(z), step):
        chosen = slice(first, first + step)
        here = divergence
        if alpha is not None:
            here = dataclasses.replace(divergence, alpha=float(alpha[first]))  # pyright: ignore[reportArgumentType]
        part = _iterated(
            z[chosen],
            None if bound is None else bound[chosen],
            None if price is None else price[chosen],
            base if base is None or len(base) == 1 else base[chosen],
            problem._replace(divergence=here),
        )
        if whole is None:
            whole = Solution(*(field.new_empty(len(z), *field.shape[1:]) for field in part))
        for field, solved in zip(whole, part, strict=True):
            field[chosen] = solved
    assert whole is not None
    return whole


def _on_host(parameter: Tensor | None, name: str) -> np.ndarray | None:
    if parameter is None:
        return None
    values = parameter.cpu().numpy()
    allowed = (values >= 0) & (values < np.inf)
    if some(~allowed):
        raise ValueError(REFUSED[name].format(values[~allowed][0]))
    return values


def _iterated(
    z: Tensor, radius: np.ndarray | None, strength: np.ndarray | None, base: Tensor | None, problem: Problem
) -> Solution:
    top, low = extremes_of(z, base, problem.group).cpu().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        span = top - low
    if some(~np.isfinite(span)):
        raise ValueError(REFUSED_RANGE.format(span[~np.isfinite(span)][0]))
    constant = span == 0
    scale = np.where(constant, 1.0, span) if some(constant) else span
    rows = Rows(z, base, problem.group, sample_count(z, problem.group), top, scale)
    if radius is None or strength is None:
        return _one_bound(rows, span, radius, strength, problem.divergence)
    priced = _one_bound(rows, span, None, strength, problem.divergence)
    outside = priced.distance.cpu().numpy() > radius
    if not outside.any():
        return priced
    bound = _one_bound(rows.select(outside), span[outside], radius[outside], None, problem.divergence)
    price = torch.from_numpy(strength[outside]).to(z.device) * bound.distance
    bound = bound._replace(value=bound.value - price, premium=bound.premium - price)
    if outside.all():
        return bound
    chosen = torch.from_numpy(outside).to(z.device)
    for field, solved in zip(priced, bound, strict=True):
        field[chosen] = solved
    return priced


def _one_bound(
    rows: Rows, span: np.ndarray, radius: np.ndarray | None, strength: np.ndarray | None, divergence: Divergence
) -> Solution:
    """Solve a ball or a penalty: rows that are at the mean or at the maximum here, the others by iteration."""
    top, scale = rows.top, rows.scale
    assert top is not None and scale is not None
    constrained = radius is not None
    maximizer = _least_divergent_maximizer(rows, divergence)
    if radius is not None:
        parameter = radius
        hard = (span == 0) | (radius >= maximizer.distance)
        flat = (radius == 0) & ~hard
    else:
        assert strength is not None
        with np.errstate(over="ignore"):
            parameter = strength / scale
        hard = (span == 0) | (parameter == 0) | (maximizer.distance == 0)
        flat = (parameter > _FLAT) & ~hard
    at_end = hard | flat
    all_open = not some(at_end)
    mean, _ = rows.mean_and_ties()
    solver = solve_ball if constrained else solve_penalty
    if all_open:
        found, dual = solver(divergence, rows, parameter)
    elif at_end.all():
        found, dual = None, Dual(np.zeros_like(mean), np.ones_like(mean), None, np.zeros_like(hard))
    else:
        found, dual = solver(divergence, rows.select(~at_end), parameter[~at_end])
        dual = _placed(dual, ~at_end)
    threshold, multiplier = dual.threshold, dual.strength
    ends = None
    if some(dual.saturated) or not all_open:
        hard = hard | dual.saturated
        threshold = np.where(hard, maximizer.threshold, np.where(flat, mean, threshold))
        multiplier = np.where(hard, 0.0, np.where(flat, np.inf, multiplier))
        ends = torch.from_numpy(np.stack([hard, flat])).to(rows.z.device)[:, :, None]

    # Both sides of the certificate in normalized units, from the definitions of primal and dual.
    finite = np.where(flat, 1.0, multiplier) if ends is not None else multiplier
    unit = np.where(hard, 1.0, finite) if ends is not None else multiplier
    measured = dual.distance is None or ends is not None
    weights, whole = torch.empty_like(rows.z), rows.whole
    origin, center, divisor = rows.column(threshold), rows.column(mean), rows.column(unit)
    chosen = None if all_open else torch.from_numpy(~at_end).to(rows.z.device)
    cut = None if divergence.alpha is None else rows.column(threshold + finite * float(divergence.slope_at_cap()))

    def certified(block: Block):
        place = weights if whole else weights[:, block.place]
        tilt = torch.sub(block.d, origin, out=place).div_(divisor)
        conjugate = () if divergence.order is not None else (divergence.conjugate(tilt),)
        if found is None:
            divergence.tilt_(tilt) if dual.fine else tilt.copy_(divergence.conjugate_gradient(tilt)).sub_(1)
        else:
            inside = block.d if chosen is None else block.d[chosen]
            own = slice(None) if chosen is None else chosen
            tilt = place.new_zeros(place.shape)
            tilt[own], place[own] = found.tilt(inside), found.ratio(inside)
        if ends is not None:
            tilt = torch.where(ends[0], maximizer.tilt(block.d), torch.where(ends[1], 0.0, tilt))
            place.copy_(torch.where(ends.any(0), tilt + 1 if found else tilt, place))
        if block.base is not None:  # phi may be infinite where there is no base weight to multiply it
            tilt = tilt.masked_fill(block.base == 0, 0.0)
        distance = (divergence.phi_of_tilt(tilt),) if measured else ()
        beyond = () if cut is None else ((block.d - cut).clamp_(min=0),)
        return tilt, (tilt, block.d - center), *distance, *conjugate, *beyond

    surplus, gain, *sums = rows.host_means(certified)
    gain = gain / (1 + surplus)  # at the weights returned, which sum to 1
    distance = dual.distance
    if measured:
        summed = sums.pop(0)
        distance = summed if distance is None else np.where(hard | flat, summed, distance)
    assert distance is not None
    beyond = sums.pop() if cut is not None else 0 * mean
    if divergence.order is not None:  # a combination of two sums that are known
        conjugate = surplus + (divergence.order - 1) * distance
    else:
        (conjugate,) = sums
    slope = beyond if divergence.alpha is None else -beyond / float(divergence.alpha) ** 2
    with np.errstate(invalid="ignore"):
        bound = finite * conjugate + threshold
    if ends is not None:  # at strength 0 the limit of strength * phi*(s / strength)
        recession = 0.0 if divergence.alpha is None else beyond / float(divergence.alpha)
        bound = np.where(hard, recession + threshold, bound)
    if not constrained:
        with np.errstate(invalid="ignore"):  # D may be infinite where it has no price
            gain = gain - np.where(parameter == 0, 0.0, parameter * distance)
        if ends is not None:
            bound = np.where(parameter == 0, maximizer.threshold + (bound - threshold), bound)
    else:
        bound = bound + finite * parameter
    value, gap = top + scale * (mean + gain), bound - (mean + gain)
    if ends is not None:
        at_top = hard & (maximizer.threshold == 0) & (constrained | (parameter == 0) | (span == 0))
        value, gap = np.where(at_top, top, value), np.where(flat, 0.0, gap)
    weights = weights if found else weights.add_(1)
    weights.mul_(rows.column(1 / (1 + surplus) / (rows.count if rows.base is None else 1)))
    if rows.base is not None:
        weights.mul_(rows.base)
    numbers = torch.from_numpy(
        np.array(
            [
                value,
                scale * gain,
                top + scale * threshold,
                scale * multiplier if strength is None else strength,
                scale * gap,
                distance,
                scale * slope,
                np.ones_like(mean) if constrained else 0 * mean,
            ]
        )
    )
    first, *others = numbers.to(rows.z.device).unbind()
    return Solution(first, weights, *others)


def _placed(solved: Dual, chosen: np.ndarray) -> Dual:
    """Put solved rows among the others, whose place is filled with ones."""
    fields = []
    for field in (solved.threshold, solved.strength, solved.distance, solved.saturated):
        whole = None if field is None else np.ones(len(chosen), dtype=field.dtype)
        if whole is not None and field is not None:
            whole[chosen] = field
        fields.append(whole)
    fields[3] &= chosen
    return Dual(*fields, fine=solved.fine)


class _Maximizer(NamedTuple):
    """What maximizes ``<p, d>`` alone, least divergent: uniform on the ties, or, under a cap, the tail's weights."""

    found: Tail | None
    above: np.ndarray
    threshold: np.ndarray
    distance: np.ndarray

    def tilt(self, d: Tensor) -> Tensor:
        """Return the tilt of losses ``[rows, width]``."""
        if self.found is not None:
            return self.found.tilt(d)
        return torch.where(d == 0, torch.from_numpy(self.above).to(d.device)[:, None], -1.0)


def _least_divergent_maximizer(rows: Rows, divergence: Divergence) -> _Maximizer:
    if divergence.alpha is not None:
        found = tail(rows, float(divergence.alpha))
        (distance,) = rows.host_means(lambda block: (divergence.phi_of_tilt(found.tilt(block.d)),))
        return _Maximizer(found, distance, found.threshold.cpu().numpy(), distance)
    _, share = rows.mean_and_ties()
    return _Maximizer(None, (1 - share) / share, 0 * share, divergence.maximal_radius(share))
