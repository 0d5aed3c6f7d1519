"""From losses of any size to a certified solution: the ends of the parameter range, normalization, certificate."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from drrho.divergences import KL, CVaR, Divergence, expm1_minus
from drrho.solvers import Dual, Rows, solve_ball, solve_penalty
from drrho.solvers.tail import tail
from drrho.validation import refuse

_CHUNK = 2**18  # losses solved at a time on the CPU, so that a batch of rows stays in the cache


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
    for parameter, name, meaning in (
        (radius, "radius", "bounds D_phi(p || q)"),
        (strength, "strength", "is the price of D_phi(p || q)"),
    ):
        if parameter is not None:
            allowed = torch.isfinite(parameter) & (parameter >= 0)
            refuse(~allowed, parameter, f"{name} must be finite and >= 0, got {{}}: it {meaning}")
    if len(z) == 0:
        none = z.new_zeros(0)
        return Solution(none, torch.zeros_like(z), *(none.clone() for _ in range(7)))
    if isinstance(divergence, CVaR):
        return _cvar(z, strength, alpha, base, problem)
    if radius is None and isinstance(divergence, KL):
        assert strength is not None
        return _kl_penalty(z, strength, base, problem)
    if alpha is not None and len(z) > 1:
        step = 1  # every row has a divergence of its own
    else:
        step = max(1, _CHUNK // z.shape[-1]) if z.device.type == "cpu" else len(z)
    parts = []
    for first in range(0, len(z), step):
        chosen = slice(first, first + step)
        here = divergence
        if alpha is not None:
            here = dataclasses.replace(divergence, alpha=float(alpha[first]))  # pyright: ignore[reportArgumentType]
        parts.append(
            _iterated(
                z[chosen],
                None if radius is None else radius[chosen].cpu().numpy(),
                None if strength is None else strength[chosen].cpu().numpy(),
                base if base is None or len(base) == 1 else base[chosen],
                problem._replace(divergence=here),
            )
        )
    return parts[0] if len(parts) == 1 else Solution(*map(torch.cat, zip(*parts, strict=True)))


# --- normalization ------------------------------------------------------------------------------------------


class _Extremes(NamedTuple):
    top: Tensor
    span: Tensor


def _extremes(z: Tensor, base: Tensor | None, group: Any) -> _Extremes:
    """Return maximum and range of each row over the losses that have base weight, having refused what is not finite."""
    top, low = z.amax(-1), z.amin(-1)
    refuse(~torch.isfinite(top - low), top - low, "losses must be finite and have a finite range, got a range of {}")
    if base is not None:
        outside = base <= 0
        top, low = z.masked_fill(outside, -torch.inf).amax(-1), z.masked_fill(outside, torch.inf).amin(-1)
    if group is not None:
        both = torch.stack([top, -low])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
        top, low = both[0], -both[1]
    return _Extremes(top, top - low)


def sample_count(z: Tensor, group: Any) -> int:
    """Return n, over all ranks."""
    if group is None:
        return z.shape[-1]
    count = torch.tensor([z.shape[-1]], device=z.device)
    dist.all_reduce(count, group=group)
    return int(count)


def _normalized(z: Tensor, extremes: _Extremes, base: Tensor | None, group: Any) -> Rows:
    scale = torch.where(extremes.span > 0, extremes.span, 1.0)
    d = (z - extremes.top[:, None]).div_(scale[:, None])
    if base is not None:
        d.clamp_(-1, 0)  # losses without base weight may lie outside
    return Rows(d, base, group, sample_count(z, group))


def _spread_out(tilt: Tensor, rows: Rows) -> Tensor:
    """Turn tilts into weights, in place."""
    ratio = tilt.add_(1)
    return ratio.mul_(1 / rows.count) if rows.base is None else ratio.mul_(rows.base)


# --- closed forms: no iteration, no decision on the host but whether a branch can be skipped -----------------


def _cvar(z: Tensor, strength: Tensor | None, alpha: Tensor | None, base: Tensor | None, problem: Problem) -> Solution:
    top, span = extremes = _extremes(z, base, problem.group)
    fraction = float(problem.divergence.alpha) if alpha is None else alpha
    if alpha is None and base is None and problem.group is None:
        rows, scale, origin, highest = Rows(z, None, None, z.shape[-1]), 1.0, 0.0, top
    else:
        rows = _normalized(z, extremes, base, problem.group)
        scale, origin, highest = span, top, torch.zeros_like(top)
    tilt, threshold = tail(rows, fraction)
    mean = rows.means(rows.d)[0]
    work = rows.d - mean[:, None]
    (gain,) = rows.means((tilt, work))
    torch.sub(rows.d, threshold[:, None], out=work)
    beyond = rows.means(work.clamp_(min=0))[0]
    value = torch.where(threshold == highest, highest, mean + gain)
    zero = torch.zeros_like(value)
    return Solution(
        value=origin + scale * value,
        weights=_spread_out(tilt, rows),
        premium=scale * gain,
        threshold=origin + scale * threshold,
        strength=zero if strength is None else strength.clone(),
        gap=scale * (threshold + beyond / fraction - (mean + gain)),
        distance=zero,
        alpha_slope=-scale * beyond / fraction**2,
        on_ball=zero if strength is not None else zero + 1,
    )


def _kl_penalty(z: Tensor, strength: Tensor, base: Tensor | None, problem: Problem) -> Solution:
    """Return ``p ~ q exp(z / strength)``, about the mean where the range is less than the strength, else the maximum.

    About the mean, ``log mean exp`` is a quantity of second order and summed as such.
    """
    traced = torch.compiler.is_compiling()
    top, span = _extremes(z, base, problem.group)
    if base is not None:
        z = torch.minimum(z, top[:, None])  # losses without base weight may lie above
    rows = Rows(z, base, problem.group, sample_count(z, problem.group))
    hard = (strength == 0) | (span == 0)
    price = torch.where(hard, 1.0, strength)
    near = span <= price
    some_near, all_near = (True, False) if traced else (bool(near.any()), bool(near.all()))
    below = z - top[:, None]
    depth = rows.means(below)[0]  # the mean, from the maximum
    ratio = psi = gain = None
    if some_near:
        x = below if all_near else below.clone()
        x.sub_(depth[:, None]).div_(torch.where(near, price, torch.inf)[:, None])
        shift, square = rows.means(x, (x, x))
        e = torch.expm1(x)
        first, product = rows.means(e, (x, e))
        if traced or bool((square < torch.finfo(z.dtype).eps ** 0.5).any()):
            excess = rows.means(expm1_minus(x))[0]
        else:
            excess = first - shift
        psi, gain = torch.log1p(excess), product / (1 + excess)
        ratio = e.add_(1).div_((1 + first)[:, None])
        del x
    if not all_near:
        x = below.div_(torch.where(near, torch.inf, price)[:, None])
        e = torch.exp(x)
        total, product, shift = rows.means(e, (e, x), x)
        far_psi, far_gain = torch.log(total) - shift, product / total - shift
        e.div_(total[:, None])
        ratio = e if ratio is None else torch.where(near[:, None], ratio, e)
        psi = far_psi if psi is None else torch.where(near, psi, far_psi)
        gain = far_gain if gain is None else torch.where(near, gain, far_gain)
        del x, e
    assert ratio is not None and psi is not None and gain is not None
    if traced or bool(hard.any()):
        tied = (z == top[:, None]).to(z.dtype)
        share = rows.means(tied)[0]
        ratio = torch.where(hard[:, None], tied / share[:, None], ratio)
        psi = torch.where(hard, -depth, psi)  # the price is 1 there
        gain = torch.where(hard, psi - torch.log(share), gain)
    distance = gain - psi
    premium = price * psi
    residual = rows.means(ratio)[0] - 1  # mean of phi* at the threshold
    weights = ratio.mul_(1 / rows.count) if base is None else ratio.mul_(base)
    zero = torch.zeros_like(premium)
    return Solution(
        value=torch.where(hard, top, top + (depth + premium)),
        weights=weights,
        premium=premium,
        threshold=torch.where(hard, top, top + (depth + premium)),
        strength=strength.clone(),
        gap=torch.where(hard, 0.0, price * residual),
        distance=distance,
        alpha_slope=zero,
        on_ball=zero,
    )


# --- everything else ----------------------------------------------------------------------------------------


def _iterated(
    z: Tensor, radius: np.ndarray | None, strength: np.ndarray | None, base: Tensor | None, problem: Problem
) -> Solution:
    extremes = _extremes(z, base, problem.group)
    rows = _normalized(z, extremes, base, problem.group)
    top, span = (field.cpu().numpy() for field in extremes)
    if radius is None or strength is None:
        return _one_bound(rows, top, span, radius, strength, problem.divergence)
    priced = _one_bound(rows, top, span, None, strength, problem.divergence)
    outside = priced.distance.cpu().numpy() > radius
    if not outside.any():
        return priced
    bound = _one_bound(rows.select(outside), top[outside], span[outside], radius[outside], None, problem.divergence)
    price = torch.from_numpy(strength[outside]).to(z.device) * bound.distance
    bound = bound._replace(value=bound.value - price, premium=bound.premium - price)
    if outside.all():
        return bound
    chosen = torch.from_numpy(outside).to(z.device)
    for field, solved in zip(priced, bound, strict=True):
        field[chosen] = solved
    return priced


def _one_bound(
    rows: Rows,
    top: np.ndarray,
    span: np.ndarray,
    radius: np.ndarray | None,
    strength: np.ndarray | None,
    divergence: Divergence,
) -> Solution:
    """Solve a ball or a penalty: rows that are at the mean or at the maximum here, the others by iteration."""
    constrained = radius is not None
    scale = np.where(span > 0, span, 1.0)
    hard_tilt, hard_threshold, maximal = _least_divergent_maximizer(rows, divergence)
    if constrained:
        parameter = radius
        hard = (span == 0) | (radius >= maximal)
        flat = (radius == 0) & ~hard
    else:
        assert strength is not None
        with np.errstate(over="ignore"):
            parameter = strength / scale
        hard = (span == 0) | (parameter == 0) | (maximal == 0)
        flat = ~hard & (parameter > 1 / np.finfo(np.float64).tiny)  # no weight differs from q by a rounding error

    mean = rows.host_means(rows.d)[0]
    tilt, dual = _open_rows(rows, divergence, parameter, ~(hard | flat), constrained)
    hard = hard | dual.saturated
    threshold = np.where(hard, hard_threshold, np.where(flat, mean, dual.threshold))
    multiplier = np.where(hard, 0.0, np.where(flat, np.inf, dual.strength))
    if bool((hard | flat).any()):
        columns = torch.from_numpy(np.stack([hard, flat])).to(rows.d.device)[:, :, None]
        tilt = torch.where(columns[0], hard_tilt(), torch.where(columns[1], 0.0, tilt))

    # Both sides of the certificate in normalized units, from the definitions of primal and dual.
    y = rows.d - rows.column(mean)
    surplus, gain = rows.host_means(tilt, (tilt, y))
    distance = dual.distance
    if distance is None or bool((hard | flat).any()):
        summed = rows.host_means(divergence.phi_of_tilt(tilt))[0] if distance is None else np.where(flat, 0.0, maximal)
        distance = summed if distance is None else np.where(hard | flat, summed, distance)
    finite = np.where(flat, 1.0, multiplier)
    bound = _mean_conjugate(divergence, rows, y, mean, surplus, distance, threshold, finite) + threshold
    if constrained:
        gap = bound + finite * parameter - (mean + gain)
    else:
        gain = gain - np.where(flat | (parameter == 0), 0.0, parameter * distance)
        gap = np.where(parameter == 0, hard_threshold, bound) - (mean + gain)
    slope = np.zeros_like(mean) if divergence.alpha is None else _alpha_slope(divergence, rows, threshold, finite)

    at_top = hard & (threshold == 0) & (constrained | (parameter == 0) | (span == 0))
    del y

    def tensor(row_values: np.ndarray) -> Tensor:
        return torch.from_numpy(row_values).to(rows.d.device)

    return Solution(
        value=tensor(np.where(at_top, top, top + scale * (mean + gain))),
        weights=_spread_out(tilt, rows),
        premium=tensor(scale * gain),
        threshold=tensor(top + scale * threshold),
        strength=tensor(scale * multiplier if strength is None else strength.copy()),
        gap=tensor(np.where(flat, 0.0, scale * gap)),
        distance=tensor(np.where(flat, 0.0, distance)),
        alpha_slope=tensor(scale * slope),
        on_ball=tensor(np.full_like(mean, float(constrained))),
    )


def _least_divergent_maximizer(rows: Rows, divergence: Divergence):
    """Return what maximizes ``<p, d>`` alone: its tilt (a function), threshold, and D.

    Uniform on the ties at the maximum, or, where ratios are capped, the tail's weights.
    """
    if divergence.alpha is not None:
        tilt, threshold = tail(rows, float(divergence.alpha))
        return (lambda: tilt), threshold.cpu().numpy(), rows.host_means(divergence.phi_of_tilt(tilt))[0]
    share = rows.host_means((rows.d == 0).to(rows.d.dtype))[0]

    def uniform_on_ties() -> Tensor:
        column = torch.from_numpy((1 - share) / share).to(rows.d.device)[:, None]
        return torch.where(rows.d == 0, column, -1.0)

    return uniform_on_ties, np.zeros_like(share), divergence.maximal_radius(share)


def _open_rows(
    rows: Rows, divergence: Divergence, parameter: np.ndarray, is_open: np.ndarray, constrained: bool
) -> tuple[Tensor, Dual]:
    """Solve the rows that are neither the mean nor the maximum; leave the others at a placeholder."""
    solver = solve_ball if constrained else solve_penalty
    if is_open.all():
        tilt, dual = solver(divergence, rows, parameter)
        return _tilt_at(rows, divergence, dual) if tilt is None else tilt, dual
    tilt = torch.zeros_like(rows.d)
    size = len(is_open)
    dual = Dual(np.zeros(size), np.zeros(size), None, np.zeros(size, dtype=bool))
    if not is_open.any():
        return tilt, dual
    chosen = rows.select(is_open)
    found, solved = solver(divergence, chosen, parameter[is_open])
    tilt[torch.from_numpy(is_open).to(tilt.device)] = _tilt_at(chosen, divergence, solved) if found is None else found
    dual.threshold[is_open], dual.strength[is_open] = solved.threshold, solved.strength
    dual.saturated[is_open] = solved.saturated
    if solved.distance is None:
        return tilt, dual
    distance = np.zeros(size)
    distance[is_open] = solved.distance
    return tilt, dual._replace(distance=distance)


def _tilt_at(rows: Rows, divergence: Divergence, dual: Dual) -> Tensor:
    s = (rows.d - rows.column(dual.threshold)).div_(rows.column(np.where(dual.saturated, 1.0, dual.strength)))
    return divergence.tilt(s)


def _mean_conjugate(
    divergence: Divergence,
    rows: Rows,
    y: Tensor,
    mean: np.ndarray,
    surplus: np.ndarray,
    distance: np.ndarray,
    threshold: np.ndarray,
    strength: np.ndarray,
) -> np.ndarray:
    """Return ``strength * mean phi*((d - threshold) / strength)``; at strength 0 the limit.

    ``y = d - mean`` is overwritten. In the Cressie-Read family the conjugate is a combination of two sums that are
    known: the ratios' surplus over 1 and D.
    """
    at_zero = strength == 0
    if divergence.order is not None:
        known = strength * (surplus + (divergence.order - 1) * distance)
        return np.where(at_zero, 0.0, known) if bool(at_zero.any()) else known
    s = y.sub_(rows.column(threshold - mean))
    if divergence.alpha is not None:
        limit = rows.host_means(s.clamp(min=0))[0] / float(divergence.alpha)
    else:
        limit = np.zeros_like(strength)
    s = s.div_(rows.column(np.where(at_zero, 1.0, strength)))
    conjugate = rows.host_means(divergence.conjugate(s))[0]
    return np.where(at_zero, limit, strength * conjugate)


def _alpha_slope(divergence: Divergence, rows: Rows, threshold: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Return d value / d alpha: minus the mean excess over what the cap cuts off, divided by alpha squared."""
    cut = threshold + strength * float(divergence.slope_at_cap())
    return -rows.host_means((rows.d - rows.column(cut)).clamp_(min=0))[0] / float(divergence.alpha) ** 2
