"""From losses of any size to a certified solution: the ends of the parameter range, normalization, certificate."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from drrho.divergences import KL, CVaR, Divergence, expm1_minus
from drrho.solvers import solve_ball, solve_penalty
from drrho.solvers.rows import Block, Dual, Rows, some
from drrho.solvers.tail import Tail, column, tail
from drrho.validation import refuse

_CHUNK = 2**18  # losses of several rows solved at a time on the CPU, so that they stay in the cache
_FLAT = 1 / np.finfo(np.float64).tiny  # relative strength at which no weight differs from q by a rounding error


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
    group: Any


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
    if base is not None:
        refuse(~(base >= 0), base, "base_weights must be >= 0 with rows that sum to 1, got {}")
    if isinstance(divergence, CVaR) or (radius is None and isinstance(divergence, KL)):
        for parameter, name in ((radius, "radius"), (strength, "strength")):
            if parameter is not None:
                refuse(~((parameter >= 0) & (parameter < torch.inf)), parameter, _REFUSAL[name])
        if isinstance(divergence, CVaR):
            return _cvar(z, strength, alpha, base, problem)
        assert strength is not None
        return _kl_penalty(z, strength, base, problem)
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


_REFUSAL = {
    "radius": "radius must be finite and >= 0, got {}: it bounds D_phi(p || q)",
    "strength": "strength must be finite and >= 0, got {}: it is the price of D_phi(p || q)",
}


def _on_host(parameter: Tensor | None, name: str) -> np.ndarray | None:
    if parameter is None:
        return None
    values = parameter.cpu().numpy()
    allowed = (values >= 0) & (values < np.inf)
    if some(~allowed):
        raise ValueError(_REFUSAL[name].format(values[~allowed][0]))
    return values


# --- normalization ------------------------------------------------------------------------------------------


def _extremes(z: Tensor, base: Tensor | None, group: Any) -> Tensor:
    """Return maximum and range of each row over the losses that have base weight, ``[2, rows]``."""
    extremes = torch.stack([z.amax(-1), z.amin(-1)])
    if base is not None or group is not None:
        refuse(~torch.isfinite(extremes), extremes, "losses must be finite, got {}")
    if base is not None:
        outside = base <= 0
        extremes = torch.stack(
            [z.masked_fill(outside, -torch.inf).amax(-1), z.masked_fill(outside, torch.inf).amin(-1)]
        )
    if group is not None:
        extremes[1].neg_()
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        extremes[1].neg_()
    extremes[1] = extremes[0] - extremes[1]
    return extremes


_RANGE = "losses must be finite and have a finite range, got a range of {}"


def sample_count(z: Tensor, group: Any) -> int:
    """Return n, over all ranks."""
    if group is None:
        return z.shape[-1]
    count = torch.tensor([z.shape[-1]], device=z.device)
    dist.all_reduce(count, group=group)
    return int(count)


# --- closed forms: no iteration, no decision on the host but whether a branch can be skipped -----------------


def _cvar(z: Tensor, strength: Tensor | None, alpha: Tensor | None, base: Tensor | None, problem: Problem) -> Solution:
    top, span = _extremes(z, base, problem.group)
    refuse(~torch.isfinite(span), span, _RANGE)
    count = sample_count(z, problem.group)
    fraction = float(problem.divergence.alpha) if alpha is None else alpha
    if alpha is None and base is None and problem.group is None:
        rows, scale, origin, highest = Rows(z, None, None, count), 1.0, 0.0, top
    else:
        scale, origin, highest = torch.where(span > 0, span, 1.0), top, torch.zeros_like(top)
        rows = Rows(z, base, problem.group, count, top.cpu().numpy(), scale.cpu().numpy())
    found = tail(rows, fraction)
    (mean,) = rows.means(lambda block: (block.d,))
    weights = torch.empty_like(z)
    at = column(found.threshold)

    def certified(block: Block):
        beyond = block.d - at
        tilt = found.tilt_of(torch.sign(beyond))
        torch.add(tilt, 1, out=weights[:, block.place]).mul_(1 / count if block.base is None else block.base)
        return tilt, (tilt, beyond), beyond.clamp(min=0)

    surplus, gain, beyond = rows.means(certified)
    gain = gain - (mean - found.threshold) * surplus  # as if taken about the mean
    value = torch.where(found.threshold == highest, highest, mean + gain)
    zero = torch.zeros_like(value)
    return Solution(
        value=origin + scale * value,
        weights=weights,
        premium=scale * gain,
        threshold=origin + scale * found.threshold,
        strength=zero if strength is None else strength.clone(),
        gap=scale * (found.threshold + beyond / fraction - (mean + gain)),
        distance=zero.clone(),
        alpha_slope=-scale * beyond / fraction**2,
        on_ball=zero.clone() if strength is not None else zero + 1,
    )


def _kl_penalty(z: Tensor, strength: Tensor, base: Tensor | None, problem: Problem) -> Solution:
    """Return ``p ~ q exp(z / strength)``, about the mean where the range is less than the strength, else the maximum.

    About the mean, ``log mean exp`` is a quantity of second order and summed as such.
    """
    traced = torch.compiler.is_compiling()
    top, span = _extremes(z, base, problem.group)
    refuse(~torch.isfinite(span), span, _RANGE)
    count = sample_count(z, problem.group)
    rows = Rows(z, base, problem.group, count)
    ceiling = None if base is None else top[:, None]  # losses without base weight may lie above

    summit = column(top)

    def from_top(block: Block) -> Tensor:
        d = block.d if ceiling is None else torch.minimum(block.d, ceiling)
        return d - summit

    hard = (strength == 0) | (span == 0)
    price = torch.where(hard, 1.0, strength)
    near = span <= price
    some_near, all_near, some_hard = (True, False, True) if traced else map(bool, (near.any(), near.all(), hard.any()))
    weights = torch.empty_like(z)
    parts = []
    if some_near:
        parts.append(_about_mean(rows, from_top, torch.where(near, price, torch.inf), weights, traced))
    if not all_near:
        far = (~near)[:, None] if some_near else None
        unit = torch.where(near, torch.inf, price)
        divisor = column(unit)

        def about_top(block: Block):
            x = from_top(block).div_(divisor)
            place = weights[:, block.place]
            e = torch.exp(x, out=place if far is None else None)
            if far is not None:
                place.copy_(torch.where(far, e, place))
            return e, (e, x), x

        total, first, shift = rows.means(about_top)
        log_total = torch.log(total)
        parts.append(
            _Tilted(
                depth=torch.where(near, 0.0, shift * unit),
                psi=log_total - shift,
                gain=first / total - shift,
                mass=total,
                residual=total * torch.exp(-log_total) - 1,
            )
        )
    depth, psi, gain, mass, residual = (
        parts[0] if len(parts) == 1 else [torch.where(near, *both) for both in zip(*parts, strict=True)]
    )
    if some_hard:
        tied = (z == top[:, None]).to(z.dtype)
        weights = torch.where(hard[:, None], tied, weights)
        share, depth_at_top = rows.means(lambda block: (tied[:, block.place], from_top(block)))
        depth = torch.where(hard, depth_at_top, depth)
        psi = torch.where(hard, -depth, psi)  # the price is 1 there
        gain, mass = torch.where(hard, psi - torch.log(share), gain), torch.where(hard, share, mass)
    weights = weights.mul_(column(1 / (mass * (count if base is None else 1.0))))
    if base is not None:
        weights = weights.mul_(base)
    premium = price * psi
    value = torch.where(hard, top, top + (depth + premium))
    zero = torch.zeros_like(premium)
    return Solution(
        value=value,
        weights=weights,
        premium=premium,
        threshold=value.clone(),
        strength=strength.clone(),
        gap=torch.where(hard, 0.0, price * residual),  # phi* has mean zero at the threshold
        distance=gain - psi,
        alpha_slope=zero,
        on_ball=zero.clone(),
    )


class _Tilted(NamedTuple):
    """Of ``x = z / strength``: the mean of z less its maximum, log mean exp(x) less the mean of x, E_p[x] less it.

    ``mass`` is the mean of the exponentials as stored; ``residual`` that of ``phi*`` at the threshold.
    """

    depth: Tensor
    psi: Tensor
    gain: Tensor
    mass: Tensor
    residual: Tensor


def _about_mean(rows: Rows, from_top, unit: Tensor, weights: Tensor, traced: bool) -> _Tilted:
    """Store ``exp(x)`` for ``x = (z - mean) / unit``.

    The mean of exp(x) - 1 - x is of second order in x: what rounding leaves of it decides how it is summed.
    """
    eps = torch.finfo(unit.dtype).eps

    def spread_out(block: Block):
        below = from_top(block)
        return below, (below, below)

    depth, square = rows.means(spread_out)
    center, divisor = column(depth), column(unit)
    variance = (square - depth.square()) / unit.square()
    # Over many losses the rounding of the exponentials averages out, and only that of their mean is left.
    coarse = not traced and rows.count >= 2**17 and bool((variance > 4 * eps ** (1 / 3)).all())
    fine = traced or bool((variance < eps**0.56).any())

    def exponent(block: Block) -> Tensor:
        return from_top(block).sub_(center).div_(divisor)

    def sums(block: Block):
        x = exponent(block)
        place = weights[:, block.place]
        if coarse:
            e = torch.exp(x, out=place)
        else:
            e = torch.expm1(x)
            torch.add(e, 1, out=place)
        return x, e, (x, e)

    shift, first, product = rows.means(sums)
    if coarse:
        first, product = first - 1, product - shift
    excess = rows.means(lambda block: (expm1_minus(exponent(block)),))[0] if fine else first - shift
    psi, mass = torch.log1p(excess), 1 + first
    return _Tilted(depth, psi, product / (1 + excess), mass, mass * torch.exp(-psi) - 1)


# --- everything else ----------------------------------------------------------------------------------------


def _iterated(
    z: Tensor, radius: np.ndarray | None, strength: np.ndarray | None, base: Tensor | None, problem: Problem
) -> Solution:
    extremes = _extremes(z, base, problem.group).cpu().numpy()
    top, span = extremes
    if some(~np.isfinite(span)):
        raise ValueError(_RANGE.format(span[~np.isfinite(span)][0]))
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
        gain = gain - (
            parameter * distance
            if ends is None
            else np.where(parameter == 0, 0.0, parameter) * np.where(parameter == 0, 0.0, distance)
        )
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
        np.stack(
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
