"""KL balls and penalties on the device: weights proportional to ``exp(b d)`` (``kernels_kl.c``)."""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from drrho.solvers.device.answers import (
    answer_of,
    into_ball,
    store_ties,
    tolerated,
    with_ends,
)
from drrho.solvers.device.functions import exponentials, log1p, rough_exponentials
from drrho.solvers.device.search import AGAIN, LOST, Limits, advance, open_search
from drrho.solvers.device.tiles import INFINITY, depth, mass, places, rough_depth, store, three_sums

_FLAT = tl.constexpr(2.0**1022)  # strength in units of the range at which no weight differs from the base weights
_CEILING = tl.constexpr(688.49)  # of log b
_SMALL = tl.constexpr(3e-5)  # step in log b whose third order is not felt in float32
_FAR = tl.constexpr(30.0)  # exponent at the maximum beyond which the mean is no origin for the sums


class Path(NamedTuple):
    """``p ~ q exp(b d)`` at given b, ``[rows]``.

    ``mass`` is the mean of ``exp(b (d - origin))`` and ``psi`` its logarithm; ``gain`` and ``variance`` are those of
    d under the weights, the gain over the mean; ``slope`` is minus d log D / d log b.
    """

    origin: Any
    mass: Any
    psi: Any
    gain: Any
    distance: Any
    slope: Any


@triton.jit
def _path(row, b, each, chosen, TILE: tl.constexpr, PRECISE: tl.constexpr, STORE: tl.constexpr):
    """Return the path at b, by sums about the mean while that is near enough to the maximum, else about that.

    With ``e = exp(b y) - 1`` all sums about the mean are of positive terms, that of ``e - b y`` too. Exponentials of
    chosen rows are stored, times a factor.
    """
    WORK: tl.constexpr = tl.float64 if PRECISE else tl.float32
    NARROW: tl.constexpr = row.z.dtype.element_ty != tl.float64
    near = b * -row.mean <= _FAR
    origin, rate = tl.where(near, row.mean, 0.0).to(WORK), b.to(WORK)[:, None]
    first = tl.zeros([row.z.shape[0], TILE], WORK)
    second, third = tl.zeros_like(first), tl.zeros_like(first)
    for begin in range(0, row.n, TILE):
        i = places(begin, TILE)
        d = depth(row, i) if PRECISE else rough_depth(row, i)
        y = d - origin[:, None]
        if PRECISE:
            ratio, tilt, beyond = exponentials(y * rate, NARROW)
        else:
            ratio, tilt, beyond = rough_exponentials(y * rate)
        one, e = tl.where(near[:, None], beyond, ratio), tl.where(near[:, None], tilt, ratio)
        if row.base is None:
            inside = i < row.n
            one, e = tl.where(inside, one, 0.0), tl.where(inside, e, 0.0)
        else:
            m = mass(row, i)
            ratio, one, e = ratio * m, one * m.to(WORK), e * m.to(WORK)
        if STORE:
            store(row, i, ratio * each[:, None], chosen)
        ye = y * e
        first += one
        second += ye
        third += ye * y
    first, second, third = three_sums(first, second, third)
    each_mass = 1 / row.all
    first, second, third = first * each_mass, second * each_mass, third * each_mass
    shift = tl.where(near, row.mean - origin.to(tl.float64), 0.0)  # the mean, as seen from the origin
    beyond = tl.where(near, first + b * shift, first - 1)
    total, psi = tl.where(near, 1 + beyond, first), log1p(beyond)
    inverse = 1 / total
    at = (second + shift) * inverse
    square = third + tl.where(near, row.variance + shift * shift, 0.0)
    distance = b * at - psi
    slope = -b * b * (square * inverse - at * at) / distance
    return Path(origin.to(tl.float64), total, psi, at + (origin.to(tl.float64) - row.mean), distance, slope)


@triton.jit
def _find_rate(row, radius, x, limits, chosen, TILE: tl.constexpr, PRECISE: tl.constexpr):
    """Return log b by Newton on log D, which increases with it, psi foretold there, and what went wrong.

    A search that is not precise has its own arithmetic in float32 too, but for what cancels.
    """
    WORK: tl.constexpr = tl.float64 if PRECISE else tl.float32
    low = (0.5 * (tl.log(tl.zeros_like(radius) + 8) + tl.log(radius)) - tl.log(row.range)).to(WORK)
    search = open_search(low, low * 0 + float("nan"))
    x = tl.minimum(tl.maximum(low, x.to(WORK)), _CEILING)
    psi, state = tl.zeros_like(radius), tl.where(chosen, AGAIN, LOST)
    saturated = search.saturated
    target, inverse, b = tl.log(radius), 1 / radius, tl.exp(x).to(tl.float64)
    going = tl.max((state == AGAIN).to(tl.int32), 0)
    while going > 0:
        path = _path(row, b, psi, chosen, TILE, PRECISE, False)
        if PRECISE:
            value = target - tl.log(path.distance)
        else:
            value = -tl.log((path.distance * inverse).to(WORK))
        value = tl.where(value == value, value, -INFINITY)  # D has plateaus in b, between the gaps of close losses
        found, moved, reached = advance(search, limits, x, value, path.slope.to(WORK))
        live, following = state == AGAIN, tl.exp(moved).to(tl.float64)
        same = (following * -row.mean <= _FAR) == (b * -row.mean <= _FAR)
        foretold = tl.where(same, path.psi + (path.distance + path.psi) * (moved - x).to(tl.float64), 0.0)
        psi, x, state = tl.where(live, foretold, psi), tl.where(live, moved, x), tl.where(live, reached, state)
        search, saturated, b = found, tl.where(live, found.saturated, saturated), tl.where(live, following, b)
        going = tl.max((state == AGAIN).to(tl.int32), 0)
    return x, psi, saturated != 0, state == LOST


@triton.jit
def _begun(row, radius, live, TILE: tl.constexpr):
    """Return log b to begin at, psi foretold there, and which rows are so near that a small step leads to the root.

    That is as of normal losses, or in narrow rows what float32 finds.
    """
    x, psi, near = 0.5 * (tl.log(2 * radius) - tl.log(row.variance)), tl.zeros_like(radius), live & ~live
    if row.z.dtype.element_ty != tl.float64:
        limits = Limits(1e-5, 1e-5, 13, 40, INFINITY, 10.0, -INFINITY, _CEILING, 0)
        rough, foretold, saturated, lost = _find_rate(row, radius, x, limits, live, TILE, False)
        near = live & ~lost & ~saturated & (tl.abs(rough) < 80) & (tl.abs(foretold) < 80)
        x, psi = tl.where(near, rough.to(tl.float64), x), tl.where(near, foretold, 0.0)
    return x, psi, near


@triton.jit
def _ball(row, radius, hard, flat, chosen, TILE: tl.constexpr):
    """Store weights; return b, the path there, psi as it was foretold, and what is left to do.

    That is a small step in log b, zero in most rows that are not narrow, which rows are at their maximum, and which
    failed.
    """
    CLOSE: tl.constexpr = 1e-16 if row.z.dtype.element_ty == tl.float64 else 1e-9
    live, held = chosen & ~hard & ~flat, tl.where(hard | flat, 1.0, radius)
    tolerance, target = tolerated(row, held), tl.log(held)
    x, psi, near = _begun(row, held, live, TILE)
    sought, failed, tried = live & ~near, live & ~live, tl.zeros_like(live.to(tl.int32))
    b, path, step = psi, Path(psi, psi, psi, psi, psi, psi), psi
    going = 1
    while going > 0:
        limits = Limits(tolerance, tl.where(tried == 0, CLOSE, 0.0), 400, 40, INFINITY, 10.0, -INFINITY, _CEILING, 0)
        at, foretold, saturated, lost = _find_rate(row, held, x, limits, sought, TILE, True)
        x, psi = tl.where(sought, at, x), tl.where(sought, foretold, psi)
        hard, failed = hard | (sought & saturated), failed | (sought & lost)
        tried += sought.to(tl.int32)
        b = tl.where(hard | flat, 0.0, tl.exp(x))
        psi = tl.where(hard | flat, 0.0, psi)
        path = _path(row, b, tl.exp(-psi) / row.all, chosen & ~hard, TILE, True, True)
        value = target - tl.log(path.distance)
        newton = -value / path.slope
        followed = live & ~hard & (tried == 0) & (tl.abs(newton) <= _SMALL)
        step = tl.where(followed, newton, 0.0)
        # A curvature from a long step may have misled the last one.
        off = ~(tl.abs(value) <= 8 * tolerance)
        sought = live & ~hard & ~failed & ~followed & off & (tried < 2)
        going = tl.max(sought.to(tl.int32), 0)
    return b, path, psi, step, hard, failed


@triton.jit
def _followed(row, path, b, step):
    """Return b and the path after a small step in log b: psi to third order, the mean of d to second order."""
    at = path.gain + (row.mean - path.origin)
    spread = -path.slope * path.distance  # b^2 times the variance
    turned = step + 0.5 * step * step
    rate, moved = b * (1 + turned), at + spread / b * turned
    psi = path.psi + b * at * turned + 0.5 * spread * step * step
    mass = path.mass * (1 + 0.5 * spread * step * step)
    there = step != 0
    return tl.where(there, rate, b), Path(
        path.origin,
        tl.where(there, mass, path.mass),
        tl.where(there, psi, path.psi),
        tl.where(there, moved + (path.origin - row.mean), path.gain),
        tl.where(there, rate * moved - psi, path.distance),
        path.slope,
    )


@triton.jit
def lies_outside(row, radius, price, chosen, TILE: tl.constexpr):
    """Return which narrow rows have a penalty's weights so far outside the ball that float32 tells."""
    if row.z.dtype.element_ty == tl.float64:
        outside = chosen & ~chosen
    else:
        open = (row.range > 0) & (price > 0) & (price < _FLAT)
        b = tl.where(open, 1 / price, 1.0)
        path = _path(row, b, row.all, chosen, TILE, False, False)
        outside = open & (path.distance > radius * (1 + 1e-3)) & (path.distance < INFINITY)
    return outside


@triton.jit
def kl(row, radius, price, chosen, TILE: tl.constexpr, BALL: tl.constexpr):
    """Solve balls or penalties, whose price is in units of d: store weights of chosen rows, and return the answer."""
    largest = -tl.log(row.share)
    psi, failed = tl.zeros_like(row.mean), chosen & ~chosen
    tilt, center = row.mean, row.mean  # of a ball
    if BALL:
        hard = (row.range == 0) | (radius >= largest)
        flat = (radius == 0) & ~hard
        b, path, psi, step, hard, failed = _ball(row, radius, hard, flat, chosen, TILE)
        center, tilt = path.gain + row.mean, step * b
        b, path = _followed(row, path, b, step)
        strength = 1 / b
    else:
        hard = (row.range == 0) | (price == 0)
        flat = (price > _FLAT) & ~hard
        b = tl.where(hard | flat, 0.0, tl.minimum(1 / price, 1e300))
        path = _path(row, b, 1 / row.all, chosen & ~hard, TILE, True, True)
        strength = price
    store_ties(row, chosen & hard, TILE)
    premium = strength * path.psi + (path.origin - row.mean)  # of second order, about the mean
    # phi* has mean zero at the threshold, so that nothing else is in the dual value.
    gain, dual = path.gain if BALL else premium, premium + strength * radius if BALL else premium
    answer = answer_of(gain, dual, path.origin + strength * path.psi, strength, path.distance, failed.to(tl.int32))
    total, inner = path.mass * tl.exp(-psi), chosen & ~hard & ~flat
    if BALL:
        answer = into_ball(row, answer, radius, total, tilt, center, inner, TILE, True)
    else:
        answer = into_ball(row, answer, radius, total, None, None, inner, TILE, False)
    return with_ends(answer, row, hard, flat, largest)
