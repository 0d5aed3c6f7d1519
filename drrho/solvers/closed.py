"""Risks in closed form: CVaR and the KL penalty, without iteration, in the losses' own dtype, and traceable.

Decisions on the host only skip branches; a compiled graph takes them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from drrho.divergences import expm1_minus
from drrho.solvers.problem import REFUSED_RANGE, Problem, Solution, extremes_of, fraction_of, sample_count
from drrho.solvers.rows import Block, Rows, column
from drrho.solvers.tail import tail
from drrho.validation import refuse


def solve_cvar(
    z: Tensor, strength: Tensor | None, alpha: Tensor | None, base: Tensor | None, problem: Problem
) -> Solution:
    """Return the mean of the worst ``alpha`` of each row; a strength or radius has no effect."""
    top, low = extremes_of(z, base, problem.group)
    span = top - low
    refuse(~torch.isfinite(span), span, REFUSED_RANGE)
    count = sample_count(z, problem.group)
    fraction = fraction_of(problem.divergence) if alpha is None else alpha
    if alpha is None and base is None and problem.group is None:
        rows, scale, origin, highest = Rows(z, None, None, count), 1.0, 0.0, top
    else:
        scale, origin, highest = torch.where(span > 0, span, 1.0), top, torch.zeros_like(top)
        rows = Rows(z, base, problem.group, count, top.cpu().numpy(), scale.cpu().numpy())
    found = tail(rows, fraction)
    (mean,) = rows.means(lambda block: (block.d,))
    weights = torch.empty_like(z)
    at = column(found.threshold, z.device)

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


def solve_kl_penalty(
    z: Tensor, strength: Tensor | None, alpha: Tensor | None, base: Tensor | None, problem: Problem
) -> Solution:
    """Return ``p ~ q exp(z / strength)``, about the mean where the range is less than the strength, else the maximum.

    About the mean, ``log mean exp`` is a quantity of second order and summed as such. KL has no ``alpha``.
    """
    assert strength is not None
    traced = torch.compiler.is_compiling()
    top, low = extremes_of(z, base, problem.group)
    span = top - low
    refuse(~torch.isfinite(span), span, REFUSED_RANGE)
    count = sample_count(z, problem.group)
    rows = Rows(z, base, problem.group, count)
    ceiling = None if base is None else top[:, None]  # losses without base weight may lie above

    summit = column(top, z.device)

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
        divisor = column(unit, z.device)

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
    weights = weights.mul_(column(1 / (mass * (count if base is None else 1.0)), z.device))
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


def _about_mean(
    rows: Rows, from_top: Callable[[Block], Tensor], unit: Tensor, weights: Tensor, traced: bool
) -> _Tilted:
    """Store ``exp(x)`` for ``x = (z - mean) / unit``.

    The mean of exp(x) - 1 - x is of second order in x: what rounding leaves of it decides how it is summed.
    """
    eps = torch.finfo(unit.dtype).eps

    def spread_out(block: Block):
        below = from_top(block)
        return below, (below, below)

    depth, square = rows.means(spread_out)
    center, divisor = column(depth, unit.device), column(unit, unit.device)
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
    # exp(psi) is one plus the excess: at a large strength that has more digits than their quotient
    return _Tilted(depth, psi, product / (1 + excess), mass, (first - excess) / (1 + excess))
