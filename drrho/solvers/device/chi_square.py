"""Chi-square balls and penalties on the device: a monotone active set (``kernels_chi_square.c``)."""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from drrho.solvers.device.answers import answer_of, into_ball, store_ties, with_ends
from drrho.solvers.device.tiles import (
    INFINITY,
    depth,
    depth_of,
    losses,
    mass,
    places,
    rough_depth_of,
    store,
    three_sums,
)

_FLAT = tl.constexpr(2.0**1022)  # strength in units of the range at which no weight differs from the base weights


class Support(NamedTuple):
    """The losses of positive weight, ``d > eta``, ``[rows]``: ratios less one are ``(d - origin) / strength + offset``.

    The threshold may have no digits for that.
    """

    eta: Any
    threshold: Any
    strength: Any
    origin: Any
    offset: Any
    saturated: Any


@triton.jit
def _supported(radius, price, kept, dropped, mean, variance, BALL: tl.constexpr):
    """Return the support where losses of mass ``kept``, and of that mean and variance, are all that is in it."""
    if BALL:
        c = 2 * radius * kept - dropped
        saturated = (c <= 0) | (variance <= 0)
        spread = tl.sqrt(variance / c)
        strength = kept * spread
    else:
        saturated = price < 0
        spread = price / kept
        strength = price
    return Support(mean - spread, mean - dropped * spread, strength, mean, dropped / kept, saturated)


@triton.jit
def _moments_above(row, floor, origin, TILE: tl.constexpr, PRECISE: tl.constexpr):
    """Return of ``d >= floor`` the mass in and out, over all, mean, variance, how far that is off, and the least d."""
    WORK: tl.constexpr = tl.float64 if PRECISE else tl.float32
    READ: tl.constexpr = tl.float64 if row.z.dtype.element_ty == tl.float64 else tl.float32
    floor, held = floor.to(WORK)[:, None], origin.to(WORK)
    kept = tl.zeros([row.z.shape[0], TILE], WORK)
    sum, square = tl.zeros_like(kept), tl.zeros_like(kept)
    least = tl.zeros([row.z.shape[0], TILE], READ) + row.top.to(READ)[:, None]
    for begin in range(0, row.n, TILE):
        i = places(begin, TILE)
        z = losses(row, i)
        d = depth_of(row, z) if PRECISE else rough_depth_of(row, z)
        inside = tl.where(d >= floor, mass(row, i).to(WORK), 0.0)
        y = d - held[:, None]
        weighted = y * inside
        kept += inside
        sum += weighted
        square += y * weighted
        least = tl.minimum(least, tl.where(inside > 0, z.to(READ), INFINITY))
    least = (tl.min(least, 1).to(tl.float64) - row.top) * row.scale
    kept, sum, square = three_sums(kept, sum, square)
    dropped, each = (row.all - kept).to(WORK), (1 / row.all).to(WORK)
    kept, sum, square = kept.to(WORK), sum.to(WORK), square.to(WORK)
    inverse = 1 / kept
    shift = sum * inverse
    return kept * each, dropped * each, held + shift, square * inverse - shift * shift, shift, least


@triton.jit
def _active_set(
    row, radius, price, support, dropped, live, TILE: tl.constexpr, BALL: tl.constexpr, PRECISE: tl.constexpr
):
    """Shrink the support to ``{d >= eta}`` until it stays.

    Including a loss below the final threshold only lowers the threshold, so nothing that belongs to the support is
    ever dropped. Moments are summed about what is close to the mean.
    """
    center = support.origin
    attempt, low = tl.zeros_like(center), -row.range.to(center.dtype)
    live = live & (support.eta > low) & ~support.saturated
    going = tl.max(live.to(tl.int32), 0)
    while going > 0:
        floor = tl.minimum(support.eta, 0.0)
        kept, out, mean, variance, shift, least = _moments_above(row, floor, center, TILE, PRECISE)
        settled = live & ((shift * shift <= 64 * variance) | (attempt >= 2))
        found = _supported(radius, price, kept, out, mean, variance, BALL)
        same = (out == dropped) | (least >= found.eta)
        support = Support(
            tl.where(settled, tl.maximum(found.eta, floor), support.eta),  # it only grows, but for rounding
            tl.where(settled, found.threshold, support.threshold),
            tl.where(settled, found.strength, support.strength),
            tl.where(settled, found.origin, support.origin),
            tl.where(settled, found.offset, support.offset),
            tl.where(settled, found.saturated, support.saturated),
        )
        dropped = tl.where(settled, out, dropped)
        center, attempt = tl.where(live, mean, center), tl.where(settled, 0.0, attempt + 1)
        live = live & ~(settled & (same | found.saturated | ~(support.eta > low)))
        going = tl.max(live.to(tl.int32), 0)
    return support


@triton.jit
def _tilted(row, support, chosen, TILE: tl.constexpr):
    """Store weights; return the means of the tilts, of them times ``d - mean``, and of their squares."""
    held = support.strength.to(tl.int64, bitcast=True) >> 52
    bits = tl.where(held > 0, tl.maximum(2046 - held, 0), 2046) << 52
    near = bits.to(tl.float64, bitcast=True)  # two factors, as one might overflow; a division would take longer
    rest = tl.where(support.strength == INFINITY, 0.0, 1 / (support.strength * near))
    each = 1 / row.all
    tilted = tl.zeros([row.z.shape[0], TILE], tl.float64)
    gained, squared = tl.zeros_like(tilted), tl.zeros_like(tilted)
    for begin in range(0, row.n, TILE):
        i = places(begin, TILE)
        d, m = depth(row, i), mass(row, i)
        t = (d - support.origin[:, None]) * near[:, None] * rest[:, None] + support.offset[:, None]
        t = tl.maximum(t, -1.0)
        store(row, i, (t + 1) * (m * each[:, None]), chosen)
        weighted = t * m
        tilted += weighted
        gained += weighted * (d - row.mean[:, None])
        squared += weighted * t
    tilted, gained, squared = three_sums(tilted, gained, squared)
    return tilted / row.all, gained / row.all, squared / row.all


@triton.jit
def chi_square(row, radius, price, chosen, TILE: tl.constexpr, BALL: tl.constexpr):
    """Solve balls or penalties, whose price is in units of d: store weights of chosen rows, and return the answer."""
    largest = (1 / row.share - 1) / 2
    reached = radius >= largest if BALL else price == 0
    hard = (row.range == 0) | (largest == 0) | reached
    flat = (radius == 0 if BALL else price > _FLAT) & ~hard
    end = hard | flat
    live = chosen & ~end
    todo = live
    r, p = tl.where(end, 1.0, radius), tl.where(end, 1.0, price)
    zero = tl.zeros_like(row.mean)
    support = _supported(r, p, zero + 1, zero, row.mean, row.variance, BALL)
    if row.z.dtype.element_ty != tl.float64:
        # From a floor somewhat lower than it seems; had it been too high, the next were lower.
        begun = Support(
            support.eta.to(tl.float32),
            support.threshold.to(tl.float32),
            support.strength.to(tl.float32),
            support.origin.to(tl.float32),
            support.offset.to(tl.float32),
            support.saturated,
        )
        nothing = zero.to(tl.float32)
        rough = _active_set(row, r.to(tl.float32), p.to(tl.float32), begun, nothing, live, TILE, BALL, False)
        floor = rough.eta.to(tl.float64) - 1e-5 * row.range
        good = live & (rough.eta > begun.eta) & ~rough.saturated & (floor <= 0)
        if tl.max(good.to(tl.int32), 0) > 0:
            kept, dropped, mean, variance, _, least = _moments_above(
                row, floor, rough.origin.to(tl.float64), TILE, True
            )
            found = _supported(r, p, kept, dropped, mean, variance, BALL)
            good = good & (found.eta >= floor) & ~found.saturated
            zero = tl.where(good, dropped, zero)
            todo = live & ~(good & (least >= found.eta))
            support = Support(
                tl.where(good, found.eta, support.eta),
                tl.where(good, found.threshold, support.threshold),
                tl.where(good, found.strength, support.strength),
                tl.where(good, found.origin, support.origin),
                tl.where(good, found.offset, support.offset),
                tl.where(good, found.saturated, support.saturated),
            )
    support = _active_set(row, r, p, support, zero, todo, TILE, BALL, True)
    hard = hard | (live & support.saturated)
    inner = chosen & ~hard
    held = Support(
        support.eta,
        support.threshold,
        tl.where(hard | flat, INFINITY, support.strength),
        support.origin,
        tl.where(hard | flat, 0.0, support.offset),
        support.saturated,
    )
    surplus, gain, square = _tilted(row, held, inner, TILE)
    store_ties(row, chosen & hard, TILE)
    half, gain = square / 2, gain / (1 + surplus)
    distance = tl.maximum(half - surplus * surplus / 2, 0.0) / ((1 + surplus) * (1 + surplus))  # of sum one
    dual = held.strength * (surplus + half) + ((held.origin - row.mean) - held.strength * held.offset)
    if BALL:
        dual += held.strength * radius
    else:
        gain -= price * distance
    answer = answer_of(gain, dual, held.threshold, held.strength, distance, (hard & ~hard).to(tl.int32))
    answer = into_ball(row, answer, radius, 1 + surplus, None, None, inner & ~flat, TILE, BALL)
    return with_ends(answer, row, hard, flat, largest)
