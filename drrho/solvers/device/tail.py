"""CVaR and total variation on the device, by selection without sorting (``kernels_tail.c``)."""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl

from drrho.solvers.device.answers import Answer, answer_of, into_ball, store_ties, with_ends
from drrho.solvers.device.functions import key_of, number_of
from drrho.solvers.device.tiles import INFINITY, depth, losses, mass, places, store, three_sums

_CHORDS = tl.constexpr(8)  # steps after which every other one halves the numbers between the ends


@triton.jit
def _normal_quantile(p):
    """Return where the normal distribution has the mass p above it, to 1e-3 (Abramowitz and Stegun 26.2.23)."""
    near = tl.minimum(tl.minimum(p, 1 - p), 0.5)
    t = tl.sqrt(-2 * tl.log(tl.maximum(near, 1e-300)))
    x = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    return tl.where(p <= 0.5, x, -x)


@triton.jit
def _around(row, at, TILE: tl.constexpr, FROM_BELOW: tl.constexpr):
    """Return the mass at and above a loss, or less that below it, the least loss there, and the largest below."""
    WORK: tl.constexpr = at.dtype
    COUNTED: tl.constexpr = tl.int32 if row.base is None else tl.float64
    found = tl.zeros([row.z.shape[0], TILE], COUNTED)
    least, largest = tl.zeros_like(found).to(WORK) + INFINITY, tl.zeros_like(found).to(WORK) - INFINITY
    for begin in range(0, row.n, TILE):
        i = places(begin, TILE)
        z = losses(row, i).to(WORK)
        up = z >= at[:, None]
        if row.base is None:
            counted = i < row.n
            m = tl.where(counted, 1, 0)
        else:
            m = mass(row, i)
            counted = m > 0
        found += tl.where(up, 0, -m) if FROM_BELOW else tl.where(up, m, 0)
        least = tl.minimum(least, tl.where(up & counted, z, INFINITY))
        largest = tl.maximum(largest, tl.where(~up & counted, z, -INFINITY))
    return tl.sum(found, 1).to(tl.float64), tl.min(least, 1), tl.max(largest, 1)


@triton.jit
def _select(row, wanted, live, TILE: tl.constexpr, FROM_BELOW: tl.constexpr):
    """Return the largest loss with at least a mass at or above it, that mass, and the mass above it.

    From below, the largest with at most a mass below it, which is wanted as a negative number. Chords through the
    masses at both ends of a bracket, an end that stays losing weight (Illinois), and after some of them bisection of
    the numbers between; every pass moves an end to a loss.
    """
    WORK: tl.constexpr = tl.float64 if row.z.dtype.element_ty == tl.float64 else tl.float32
    low, high = row.low.to(WORK), tl.where(live, row.top, row.low).to(WORK)
    zero = tl.zeros_like(row.all)
    at_low, above_high = (zero, -row.all) if FROM_BELOW else (row.all, zero)
    share = wanted / row.all + 1 if FROM_BELOW else wanted / row.all
    pivot = (row.top + (row.mean + tl.sqrt(row.variance) * _normal_quantile(share)) / row.scale).to(WORK)
    half, side, step = 0.5 * row.all / row.n, zero.to(WORK), 0
    going = tl.max((low < high).to(tl.int32), 0)
    while going > 0:
        t = pivot
        if (step >= _CHORDS) & (step % 2 == 0):
            a, b = key_of(low), key_of(high)
            t = number_of((a | b) - ((a ^ b) >> 1))
        t = tl.where(t > low, t, number_of(key_of(low) + 1))
        t = tl.minimum(t, high)
        reached, least, largest = _around(row, t, TILE, FROM_BELOW)
        open, enough = low < high, reached >= wanted
        up, down = open & enough, open & ~enough
        low, at_low = tl.where(up, least, low), tl.where(up, reached, at_low)
        high, above_high = tl.where(down, largest, high), tl.where(down, reached, above_high)
        side = tl.where(enough, tl.maximum(side, 0.0) + 1, tl.minimum(side, 0.0) - 1)
        fewer = tl.exp2((1 - tl.abs(side)).to(tl.float32)).to(WORK)
        over = (at_low - wanted + half).to(WORK) * tl.where(side < 0, fewer, 1.0)
        under = (wanted - above_high - half).to(WORK) * tl.where(side > 0, fewer, 1.0)
        pivot = low + (high - low) * (over / (over + under))
        step += 1
        going = tl.max((low < high).to(tl.int32), 0)
    return low.to(tl.float64), at_low, above_high


@triton.jit
def _masses(row, at, TILE: tl.constexpr, DEEP: tl.constexpr):
    """Return the mass of what lies above a loss, below it, and at it; or above a depth."""
    higher = tl.zeros([row.z.shape[0], TILE], tl.float64)
    lower, equal = tl.zeros_like(higher), tl.zeros_like(higher)
    for begin in range(0, row.n, TILE):
        i = places(begin, TILE)
        m = mass(row, i)
        z = depth(row, i) if DEEP else losses(row, i).to(tl.float64)
        higher += tl.where(z > at[:, None], m, 0.0)
        lower += tl.where(z < at[:, None], m, 0.0)
        equal += tl.where(z == at[:, None], m, 0.0)
    return three_sums(higher, lower, equal)


@triton.jit
def _tail_of(row, alpha, chosen, TILE: tl.constexpr):
    """Return the loss at which the worst alpha ends, what is above and at it, and the tilts of those two."""
    wanted = alpha * row.all
    if row.base is None:
        wanted = tl.minimum(tl.maximum(tl.ceil(wanted), 1.0), row.all)
    inner = chosen & (row.range > 0) & (row.share * row.all < wanted)
    loss, reached, higher = _select(row, wanted, inner, TILE, False)
    loss = tl.where(inner, loss, row.top)
    if row.base is None:  # counts, whose difference is exact
        reached, higher = tl.where(inner, reached, row.share * row.all), tl.where(inner, higher, 0.0)
        lower, equal = row.all - reached, reached - higher
    else:
        higher, lower, equal = _masses(row, loss, TILE, False)
    # The same number twice; near alpha = 1 the second form would cancel.
    from_below = lower - (1 - alpha) * (row.all - equal)
    left_over = tl.where(alpha > 0.5, from_below, alpha * row.all - higher - equal * alpha)
    above = (1 - alpha) / alpha
    tied = tl.maximum(tl.minimum(left_over / (equal * alpha), above), -1.0)
    return loss, higher, equal, above, tied


@triton.jit
def tail_mean(row, alpha, chosen, TILE: tl.constexpr):
    """Solve CVaR: store weights of chosen rows, and return the answer."""
    at, _, _, above, tied = _tail_of(row, alpha, chosen, TILE)
    each = 1 / row.all
    tilted = tl.zeros([row.z.shape[0], TILE], tl.float64)
    gained, exceeded = tl.zeros_like(tilted), tl.zeros_like(tilted)
    for begin in range(0, row.n, TILE):
        i = places(begin, TILE)
        z, m = losses(row, i).to(tl.float64), mass(row, i)
        if row.base is not None:  # those without base weight
            z = tl.maximum(tl.minimum(z, row.top[:, None]), row.low[:, None])
        # Losses close to the threshold need not differ in depth.
        beyond = z - at[:, None]
        tilt = tl.where(beyond > 0, above[:, None], tl.where(beyond == 0, tied[:, None], -1.0))
        store(row, i, (tilt + 1) * (m * each[:, None]), chosen)
        weighted = beyond * row.scale[:, None] * m
        tilted += tilt * m
        gained += tilt * weighted
        exceeded += tl.maximum(weighted, 0.0)
    tilted, gained, exceeded = three_sums(tilted, gained, exceeded)
    surplus, beyond = tilted / row.all, exceeded / row.all
    depth_at = (at - row.top) * row.scale
    from_mean = depth_at - row.mean
    zero = tl.zeros_like(row.mean)
    return Answer(
        gained / row.all + from_mean * surplus,  # as if taken about the mean
        from_mean + beyond / alpha,
        depth_at,
        zero,
        zero,
        -beyond / (alpha * alpha),
        tl.where(depth_at == 0, 1.0, 0.0),
        at,
        zero.to(tl.int32),
    )


@triton.jit
def _moved(row, at, tied, at_top, chosen, TILE: tl.constexpr):
    """Store weights; return the means of tilts, of them times ``d - mean``, of their sizes, and of what is missed."""
    each = 1 / row.all
    tilted = tl.zeros([row.z.shape[0], TILE], tl.float64)
    gained, moved, missed = tl.zeros_like(tilted), tl.zeros_like(tilted), tl.zeros_like(tilted)
    for begin in range(0, row.n, TILE):
        i = places(begin, TILE)
        d, m = depth(row, i), mass(row, i)
        below = at[:, None] - d
        kept = tl.where(below == 0, tied[:, None], tl.where(d == 0, at_top[:, None], 0.0))
        tilt = tl.where(below > 0, -1.0, kept)
        store(row, i, (tilt + 1) * (m * each[:, None]), chosen)
        weighted = tilt * m
        tilted += weighted
        gained += weighted * (d - row.mean[:, None])
        moved += tl.abs(weighted)
        missed += tl.maximum(below, 0.0) * m
    tilted, gained, moved = three_sums(tilted, gained, moved)
    return tilted * each, gained * each, moved * each, tl.sum(missed, 1) * each


@triton.jit
def total_variation(row, radius, price, chosen, TILE: tl.constexpr, BALL: tl.constexpr):
    """Solve balls or penalties, whose price is in units of d: store weights of chosen rows, and return the answer.

    What lies low is moved to the maximum.
    """
    largest = 1 - row.share
    reached = radius >= largest if BALL else (price == 0) | (largest == 0)
    hard = (row.range == 0) | reached
    flat = (radius == 0 if BALL else price > 1e280) & ~hard
    inner = chosen & ~hard
    tied = tl.zeros_like(row.mean)
    if BALL:
        # Counted from below: a small radius has digits that 1 - radius does not keep.
        loss, _, _ = _select(row, -radius * row.all, inner & ~flat, TILE, True)
        at = (loss - row.top) * row.scale
        _, lower, equal = _masses(row, at, TILE, True)
        tied = tl.minimum(tl.maximum((lower - radius * row.all) / equal, -1.0), 0.0)
    else:
        at = -price
        _, lower, equal = _masses(row, at, TILE, True)
    at, tied = tl.where(flat, -2.0, at), tl.where(flat, 0.0, tied)
    at_top = tl.where(flat, 0.0, (lower - tied * equal) / (row.share * row.all))
    surplus, gain, distance, missed = _moved(row, at, tied, at_top, inner, TILE)
    store_ties(row, chosen & hard, TILE)
    distance, gain = distance / 2, gain / (1 + surplus)
    dual = missed + radius * -at if BALL else missed
    if not BALL:
        gain -= price * distance
    threshold = -tl.minimum(-at, row.range) / 2
    answer = answer_of(gain, dual, threshold, -at, distance, (hard & ~hard).to(tl.int32))
    answer = into_ball(row, answer, radius, 1 + surplus, None, None, inner & ~flat, TILE, BALL)
    return with_ends(answer, row, hard, flat, largest)
