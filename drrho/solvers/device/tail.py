"""CVaR on the device: the worst alpha of each row, by selection without sorting (``kernels_tail.c``)."""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl

from drrho.solvers.device.answers import Answer
from drrho.solvers.device.functions import key_of, number_of
from drrho.solvers.device.tiles import INFINITY, losses, mass, places, store, three_sums

_CHORDS = tl.constexpr(8)  # steps after which every other one halves the numbers between the ends


@triton.jit
def _normal_quantile(p):
    """Return where the normal distribution has the mass p above it, to 1e-3 (Abramowitz and Stegun 26.2.23)."""
    near = tl.minimum(tl.minimum(p, 1 - p), 0.5)
    t = tl.sqrt(-2 * tl.log(tl.maximum(near, 1e-300)))
    x = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    return tl.where(p <= 0.5, x, -x)


@triton.jit
def _around(row, at, TILE: tl.constexpr):
    """Return the mass at and above a loss, the least loss there, and the largest below."""
    WORK: tl.constexpr = at.dtype
    COUNTED: tl.constexpr = tl.int32 if row.base is None else tl.float64
    reached = tl.zeros([row.z.shape[0], TILE], COUNTED)
    least, largest = tl.zeros_like(reached).to(WORK) + INFINITY, tl.zeros_like(reached).to(WORK) - INFINITY
    for begin in range(0, row.n, TILE):
        i = places(begin, TILE)
        z = losses(row, i).to(WORK)
        up = z >= at[:, None]
        if row.base is None:
            reached += tl.where(up & (i < row.n), 1, 0)
            least, largest = (
                tl.minimum(least, tl.where(up, z, INFINITY)),
                tl.maximum(largest, tl.where(up, -INFINITY, z)),
            )
        else:
            m = mass(row, i)
            reached += tl.where(up, m, 0.0)
            least = tl.minimum(least, tl.where(up & (m > 0), z, INFINITY))
            largest = tl.maximum(largest, tl.where(up | (m == 0), -INFINITY, z))
    return tl.sum(reached, 1).to(tl.float64), tl.min(least, 1), tl.max(largest, 1)


@triton.jit
def _select(row, wanted, live, TILE: tl.constexpr):
    """Return the largest loss with at least a mass at or above it, that mass, and the mass above it.

    Chords through the masses at both ends of a bracket, an end that stays losing weight (Illinois), and after some of
    them bisection of the numbers between; every pass moves an end to a loss.
    """
    WORK: tl.constexpr = tl.float64 if row.z.dtype.element_ty == tl.float64 else tl.float32
    low, high = row.low.to(WORK), tl.where(live, row.top, row.low).to(WORK)
    at_low, above_high = row.all, tl.zeros_like(row.all)
    spread = tl.sqrt(row.variance) / row.scale
    pivot = row.top + row.mean / row.scale + spread * _normal_quantile(wanted / row.all)
    side, step = tl.zeros_like(row.all), 0
    going = tl.max((low < high).to(tl.int32), 0)
    while going > 0:
        t = pivot.to(WORK)
        if (step >= _CHORDS) & (step % 2 == 0):
            a, b = key_of(low), key_of(high)
            t = number_of((a | b) - ((a ^ b) >> 1))
        t = tl.where(t > low, t, number_of(key_of(low) + 1))
        t = tl.minimum(t, high)
        reached, least, largest = _around(row, t, TILE)
        open, enough = low < high, reached >= wanted
        up, down = open & enough, open & ~enough
        low, at_low = tl.where(up, least, low), tl.where(up, reached, at_low)
        high, above_high = tl.where(down, largest, high), tl.where(down, reached, above_high)
        side = tl.where(enough, tl.maximum(side, 0.0) + 1, tl.minimum(side, 0.0) - 1)
        fewer = tl.exp2((1 - tl.abs(side)).to(tl.float32)).to(tl.float64)
        over = (at_low - wanted + 0.5) * tl.where(side < 0, fewer, 1.0)
        under = (wanted - above_high - 0.5) * tl.where(side > 0, fewer, 1.0)
        a, b = low.to(tl.float64), high.to(tl.float64)
        pivot = a + (b - a) * (over / (over + under))
        step += 1
        going = tl.max((low < high).to(tl.int32), 0)
    return low.to(tl.float64), at_low, above_high


@triton.jit
def _masses(row, at, TILE: tl.constexpr):
    """Return the mass of what lies above a loss, below it, and at it."""
    higher = tl.zeros([row.z.shape[0], TILE], tl.float64)
    lower, equal = tl.zeros_like(higher), tl.zeros_like(higher)
    for begin in range(0, row.n, TILE):
        i = places(begin, TILE)
        z, m = losses(row, i).to(tl.float64), mass(row, i)
        higher += tl.where(z > at[:, None], m, 0.0)
        lower += tl.where(z < at[:, None], m, 0.0)
        equal += tl.where(z == at[:, None], m, 0.0)
    return three_sums(higher, lower, equal)


@triton.jit
def tail_of(row, alpha, chosen, TILE: tl.constexpr):
    """Return the loss at which the worst alpha ends, what is above and at it, and the tilts of those two."""
    wanted = alpha * row.all
    if row.base is None:
        wanted = tl.minimum(tl.maximum(tl.ceil(wanted), 1.0), row.all)
    inner = chosen & (row.range > 0) & (row.share * row.all < wanted)
    loss, reached, higher = _select(row, wanted, inner, TILE)
    loss = tl.where(inner, loss, row.top)
    if row.base is None:  # counts, whose difference is exact
        reached, higher = tl.where(inner, reached, row.share * row.all), tl.where(inner, higher, 0.0)
        lower, equal = row.all - reached, reached - higher
    else:
        higher, lower, equal = _masses(row, loss, TILE)
    # The same number twice; near alpha = 1 the second form would cancel.
    from_below = lower - (1 - alpha) * (row.all - equal)
    left_over = tl.where(alpha > 0.5, from_below, alpha * row.all - higher - equal * alpha)
    above = (1 - alpha) / alpha
    tied = tl.maximum(tl.minimum(left_over / (equal * alpha), above), -1.0)
    return loss, higher, equal, above, tied


@triton.jit
def tail_mean(row, alpha, chosen, TILE: tl.constexpr):
    """Solve CVaR: store weights of chosen rows, and return the answer."""
    at, _, _, above, tied = tail_of(row, alpha, chosen, TILE)
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
