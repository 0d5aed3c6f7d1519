"""Rows on the device in tiles: a first look at them, and how every pass reads losses and writes weights.

A program has several short rows or one long one. A pass reads its losses again in tiles ``[rows, tile]``, from the
cache of the processor that has read them before, so that a row may have any length and few registers hold a pass.
As in ``kernels.h``, losses are read as ``d = (z - maximum) * 2^j`` in float64, with the range of d in [1, 2). Where
the losses are narrower, `rough` reads them in float32, for iterations that only look for a place to begin at.
"""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
EPS = tl.constexpr(2.0**-52)


class Row(NamedTuple):
    """Pointers ``[rows, 1]`` to losses, base weights (None: uniform) and weights, and numbers ``[rows]``.

    ``first`` ``[rows, 1]`` are the first losses, which stand for those beyond the end, where the mass is zero.
    ``range``, ``mean``, ``variance`` are those of d; ``all`` is the mass of all losses, n or the sum of the base
    weights; ``share`` is that of the losses tied at the maximum.
    """

    z: Any
    base: Any
    weights: Any
    n: Any
    first: Any
    top: Any
    low: Any
    scale: Any
    range: Any
    all: Any
    mean: Any
    variance: Any
    share: Any


@triton.jit
def places(start, TILE: tl.constexpr):
    """Return the places of a tile in its row, ``[1, tile]``."""
    return start + tl.arange(0, TILE)[None, :]


@triton.jit
def losses(row, i):
    """Return losses as they are."""
    return tl.load(row.z + i, mask=i < row.n, other=row.first)


@triton.jit
def mass(row, i):
    """Return the mass of losses: 1 or their base weight, 0 beyond the end."""
    if row.base is None:
        found = tl.where(i < row.n, 1.0, 0.0).to(tl.float64)
    else:
        found = tl.load(row.base + i, mask=i < row.n, other=0.0)
    return found


@triton.jit
def depth(row, i):
    """Return d in float64."""
    return depth_of(row, losses(row, i))


@triton.jit
def depth_of(row, z):
    """Return d in float64; losses without base weight may lie outside its range, and are moved to the nearer end."""
    d = (z.to(tl.float64) - row.top[:, None]) * row.scale[:, None]
    if row.base is not None:
        d = tl.maximum(tl.minimum(d, 0.0), -row.range[:, None])
    return d


@triton.jit
def rough_depth(row, i):
    """Return d in float32."""
    return rough_depth_of(row, losses(row, i))


@triton.jit
def rough_depth_of(row, z):
    """Return d in float32."""
    top, scale = row.top.to(tl.float32), row.scale.to(tl.float32)
    d = (z.to(tl.float32) - top[:, None]) * scale[:, None]
    if row.base is not None:
        d = tl.maximum(tl.minimum(d, 0.0), -row.range.to(tl.float32)[:, None])
    return d


@triton.jit
def store(row, i, weights, chosen):
    """Store weights of chosen rows."""
    weights = weights.to(row.weights.dtype.element_ty)
    tl.store(row.weights + i, weights, mask=(i < row.n) & chosen[:, None])


@triton.jit
def _both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _all_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def two_sums(a, b):
    """Return the sums of two tiles over each row, in float64."""
    a, b = tl.reduce((a, b), 1, _both)
    return a.to(tl.float64), b.to(tl.float64)


@triton.jit
def three_sums(a, b, c):
    """Return the sums of three tiles over each row, in float64."""
    a, b, c = tl.reduce((a, b, c), 1, _all_three)
    return a.to(tl.float64), b.to(tl.float64), c.to(tl.float64)


@triton.jit
def _scale_of(span):
    """Return the power of two that takes a range to [1, 2), or as near to it as there is one."""
    exponent = 2046 - (span.to(tl.int64, bitcast=True) >> 52)
    bits = tl.where(exponent > 0, exponent << 52, 1 << 51)
    return tl.where(span > 0, bits.to(tl.float64, bitcast=True), 1.0)


@triton.jit
def look(z, base, n, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Return what follows from losses, base weights and n, in the order of `Row`, and which rows can be solved."""
    WORK: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    first = tl.load(z)
    start = first.to(WORK)
    high, low = tl.full([ROWS, TILE], -INFINITY, WORK), tl.full([ROWS, TILE], INFINITY, WORK)
    odd, sum = tl.zeros([ROWS, TILE], WORK), tl.zeros([ROWS, TILE], WORK)
    masses, wrong = tl.zeros([ROWS, TILE], tl.float64), tl.zeros([ROWS, TILE], tl.float64)
    for begin in range(0, n, TILE):
        i = places(begin, TILE)
        x = tl.load(z + i, mask=i < n, other=first).to(WORK)
        odd += x * 0.0  # NaN for what is not finite
        if base is None:
            high, low = tl.maximum(high, x), tl.minimum(low, x)
            sum += x - start
        else:
            m = tl.load(base + i, mask=i < n, other=0.0)
            high, low = tl.maximum(high, tl.where(m > 0, x, -INFINITY)), tl.minimum(low, tl.where(m > 0, x, INFINITY))
            sum += (x - start) * m.to(WORK)
            masses += m
            wrong += tl.where(m >= 0, 0.0, 1.0)
    odd, sum = two_sums(odd, sum)
    top, low = tl.max(high, 1).to(tl.float64), tl.min(low, 1).to(tl.float64)
    if base is None:
        all = tl.zeros_like(top) + n
        bad = tl.zeros_like(top)
    else:
        all, bad = two_sums(masses, wrong)
    span = top - low
    good = (odd == 0) & (bad == 0) & (all > 0) & (all < INFINITY) & (tl.abs(span) < INFINITY)
    scale = _scale_of(span)
    range_, mean = span * scale, (sum / all + (tl.sum(start, 1).to(tl.float64) - top)) * scale
    mean = tl.where((mean <= 0) & (mean >= -range_), mean, -0.5 * range_)
    row = Row(z, base, z, n, first, top, low, scale, range_, all, mean, mean, mean)
    mean, variance, share = _spread_out(row, TILE)
    return first, top, low, scale, range_, all, mean, variance, share, good


@triton.jit
def _spread_out(row, TILE: tl.constexpr):
    """Return mean and variance of d, about a mean that is nearly right, and the share of ties at the maximum."""
    mean, variance, share = row.mean, row.variance, row.share
    attempt = 0
    going = 1
    while going > 0:
        sum, square = tl.zeros([row.z.shape[0], TILE], tl.float64), tl.zeros([row.z.shape[0], TILE], tl.float64)
        tied = tl.zeros_like(sum)
        for begin in range(0, row.n, TILE):
            i = places(begin, TILE)
            d, m = depth(row, i), mass(row, i)
            y = d - mean[:, None]
            ym = y * m
            sum += ym
            square += y * ym
            tied += tl.where(d == 0, m, 0.0)
        sum, square, tied = three_sums(sum, square, tied)
        shift = sum / row.all
        variance = square / row.all - shift * shift
        mean, share = mean + shift, tied / row.all
        attempt += 1
        canceled = tl.where(shift * shift <= variance / 16, 0, 1)
        going = tl.where(attempt < 2, tl.max(canceled, 0), 0)
    return mean, variance, share
