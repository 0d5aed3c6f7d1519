"""Cressie-Read balls and penalties on the device: ratios on a path of powers (``kernels_powers.c``).

Ratios are proportional to ``(1 + y)_+^p``, ``p = 1 / (k - 1)``, where ``y = (d - origin) / unit`` for orders k > 1, and
minus that below. About the mean, the power less ``1 + p y`` is summed, which is of second order and of one sign.
"""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from drrho.solvers.device.answers import answer_of, into_ball, store_ties, tolerated, with_ends
from drrho.solvers.device.functions import expm1, exponentials, log1p, logarithms, power
from drrho.solvers.device.search import AGAIN, LOST, Limits, advance, open_search
from drrho.solvers.device.tiles import INFINITY, depth, mass, places, rough_depth, store, three_sums

#: How powers are taken: those of the orders 1.5, 3, 0.5 and -1 by a few operations. LOGARITHMIC: of small orders,
#: whose D is a difference of logarithms.
SQUARE = tl.constexpr(0)
ROOT = tl.constexpr(1)
INVERSE_SQUARE = tl.constexpr(2)
INVERSE_ROOT = tl.constexpr(3)
GENERAL = tl.constexpr(4)
LOGARITHMIC = tl.constexpr(5)
#: What a pass over the losses does: sum roughly, in float32, sum precisely, or that and store.
ROUGH = tl.constexpr(0)
PRECISE = tl.constexpr(1)
LAST = tl.constexpr(2)
_FAR = tl.constexpr(30.0)  # logarithm of the maximum's power beyond which the mean is no origin for the sums
_LOG_LEAST = tl.constexpr(-667.7496)  # log 1e-290
_LOG_LARGEST = tl.constexpr(667.7496)


def form_of(order: float) -> int:
    """Return how powers of a divergence of that order are taken."""
    named = {1.5: SQUARE, 3.0: ROOT, 0.5: INVERSE_SQUARE, -1.0: INVERSE_ROOT}
    return named.get(order, LOGARITHMIC if abs(order) < 0.25 else GENERAL).value


class Path(NamedTuple):
    """Weights at a distance v of the maximum from the pole, or from the edge of the support, ``[rows]``.

    ``unit`` is v at the origin; ``log_total`` the logarithm of the mean power, ``total_slope`` its slope in log v;
    ``gain`` the mean of ``d - origin`` under the weights; ``slope`` is d log D / d log v, and ``mean_slope`` that of
    ``(k - 1) log(mean power of v)``.
    """

    origin: Any
    unit: Any
    log_total: Any
    gain: Any
    distance: Any
    slope: Any
    mean_slope: Any
    total_slope: Any


@triton.jit
def _powers(y, p, FORM: tl.constexpr):
    """Return ``g^p``, the same less 1, less ``1 + p y``, and ``g^(p - 1)``, for ``g = (1 + y)_+``."""
    outside = y <= -1.0
    if FORM == SQUARE:
        g = tl.maximum(y + 1.0, 0.0)
        ratio, reciprocal = g * g, g
        beyond_one = tl.where(outside, -1.0, y * (y + 2.0))
        beyond_line = tl.where(outside, -1.0 - 2.0 * y, y * y)
    elif FORM == ROOT:
        s = tl.sqrt(tl.maximum(y + 1.0, 0.0))
        both = 1.0 / (s * (1.0 + s))
        curve = y * (both * s)
        ratio, reciprocal = s, tl.where(outside, 0.0, both * (1.0 + s))
        beyond_one = tl.where(outside, -1.0, curve)
        beyond_line = tl.where(outside, -1.0 - 0.5 * y, -0.5 * curve * curve)
    elif FORM == INVERSE_SQUARE:
        inverse = 1.0 / (y + 1.0)
        ratio = inverse * inverse
        reciprocal = ratio * inverse
        beyond_one, beyond_line = -y * (y + 2.0) * ratio, y * y * (2.0 * y + 3.0) * ratio
    elif FORM == INVERSE_ROOT:
        s = tl.sqrt(y + 1.0)
        both = 1.0 / (s * (1.0 + s))
        inverse, share = both * (1.0 + s), both * s
        ratio, reciprocal = inverse, inverse * inverse * inverse
        beyond_one, beyond_line = -y * both, 0.5 * y * y * (s + 2.0) * both * share
    else:
        ratio, beyond_one, beyond_line, reciprocal = power(y, p)
    return ratio, beyond_one, beyond_line, reciprocal


@triton.jit
def _sums(row, k, origin, rate, central, each, chosen, TILE: tl.constexpr, FORM: tl.constexpr, PASS: tl.constexpr):
    """Return the means of four terms, and store the powers of chosen rows, times a factor."""
    WORK: tl.constexpr = tl.float32 if PASS == ROUGH else tl.float64
    p = (1 / (k - 1))[:, None]
    squared = (central | (tl.abs(k - 1) < 0.1))[:, None]
    inverse = tl.where(tl.abs(k) < 1e-20, 0.0, 1 / k)[:, None]
    held, unit = origin.to(WORK), rate.to(WORK)
    first = tl.zeros([row.z.shape[0], TILE], WORK)
    second, third, fourth = tl.zeros_like(first), tl.zeros_like(first), tl.zeros_like(first)
    for begin in range(0, row.n, TILE):
        i = places(begin, TILE)
        d = rough_depth(row, i) if PASS == ROUGH else depth(row, i)
        y, m = (d - held[:, None]) * unit[:, None], mass(row, i).to(WORK)
        ratio, beyond_one, beyond_line, reciprocal = _powers(y, p, FORM)
        if PASS == LAST:
            store(row, i, ratio * m * each[:, None], chosen)
        ym = y * m
        first += tl.where(central[:, None], beyond_line, ratio) * m
        second += tl.where(central[:, None], beyond_one, ratio) * ym
        third += reciprocal * tl.where(squared, y * ym, m)
        if FORM == LOGARITHMIC:
            u, bent, _ = logarithms(y)
            _, _, curved = exponentials(u * (p * k[:, None]))
            fourth += (curved * inverse + p * tl.where(central[:, None], bent, u)) * m
    first, second, third = three_sums(first, second, third)
    # What rounding of the origin leaves of the mean of y
    shift = tl.where(central, (origin - held.to(tl.float64)) * rate, 0.0)
    first, second = first / row.all + shift / (k - 1), second / row.all + shift
    return first, second, third / row.all, tl.sum(fourth, 1) / row.all


@triton.jit
def _path(row, k, v, each, chosen, TILE: tl.constexpr, FORM: tl.constexpr, PASS: tl.constexpr):
    """Return the path at v."""
    sign = tl.where(k < 1, 1.0, -1.0).to(tl.float64)
    about_mean = v - sign * row.mean
    near = tl.where(k < 1, v > 1e-3 * about_mean, about_mean > -0.3 * row.mean)
    central = near & (tl.log(v / about_mean) / (k - 1) <= _FAR)
    origin, unit = tl.where(central, row.mean, 0.0), tl.where(central, about_mean, v)
    first, second, third, fourth = _sums(row, k, origin, -sign / unit, central, each, chosen, TILE, FORM, PASS)
    log_total = tl.where(central, log1p(first), tl.log(first))
    total, rate = tl.exp(log_total), tl.exp((1 - k) * log_total)
    y, curved = second / total, third / total
    # where the sum is of y^2 / (1 + y): 1 / (1 + y) = 1 - y + y^2 / (1 + y)
    square = central | (tl.abs(k - 1) < 0.1)
    h_mean = tl.where(square, 1 - y + curved, curved)
    spread = tl.where(square, curved * (1 + y) - y * y, (1 + y) * h_mean - 1)
    if FORM == LOGARITHMIC:
        log_rate = -k * log_total
        quotient = tl.where(k == 0, -log_total, expm1(log_rate) / k)
        distance = (tl.exp(log_rate) * fourth + quotient) / (k - 1)
    else:
        distance = (expm1((1 - k) * log_total) + rate * y) / (k * (k - 1))
    slope = -v * rate / unit * spread / ((k - 1) * (k - 1)) / distance
    mean_slope = v * h_mean / unit
    return Path(
        origin, unit, log_total, -sign * unit * y, distance, slope, mean_slope, (mean_slope - v / unit) / (k - 1)
    )


@triton.jit
def _residual(path, k, radius, unit, BALL: tl.constexpr):
    """Return what is zero at the solution of a ball or, where a unit is wanted, of a penalty."""
    if BALL:
        value = tl.log(path.distance) - tl.log(radius)
    else:
        value = tl.log(unit / path.unit) - (k - 1) * path.log_total
    return value


@triton.jit
def _find_pole(
    row,
    k,
    radius,
    unit,
    x,
    limits,
    chosen,
    TILE: tl.constexpr,
    FORM: tl.constexpr,
    BALL: tl.constexpr,
    PASS: tl.constexpr,
):
    """Return log v, log_total foretold there, and how the search went."""
    nothing = tl.zeros_like(x)
    search = open_search(nothing - INFINITY, nothing + float("nan"))
    log_total, state = nothing, tl.where(chosen, AGAIN, LOST)
    saturated, missed = search.saturated, search.missed
    going = tl.max((state == AGAIN).to(tl.int32), 0)
    while going > 0:
        path = _path(row, k, tl.exp(x), nothing, chosen, TILE, FORM, PASS)
        value = _residual(path, k, radius, unit, BALL)
        slope = path.slope if BALL else -path.mean_slope
        value = tl.where(value == value, value, -INFINITY)
        search, moved, reached = advance(search, limits, x, value, slope)
        live = state == AGAIN
        log_total = tl.where(live, path.log_total + path.total_slope * (moved - x), log_total)
        saturated, missed = tl.where(live, search.saturated, saturated), tl.where(live, search.missed, missed)
        x, state = tl.where(live, moved, x), tl.where(live, reached, state)
        going = tl.max((state == AGAIN).to(tl.int32), 0)
    return x, log_total, saturated != 0, missed != 0, state == LOST


@triton.jit
def powers(row, k, radius, price, chosen, TILE: tl.constexpr, FORM: tl.constexpr, BALL: tl.constexpr):
    """Solve balls or penalties, whose price is in units of d: store weights of chosen rows, and return the answer."""
    EXACT: tl.constexpr = 450 * 2.0**-52
    CLOSE: tl.constexpr = 1e-16 if row.z.dtype.element_ty == tl.float64 else 1e-8
    zero = tl.zeros_like(row.mean)
    largest = tl.where(k > 0, expm1(-(k - 1) * tl.log(row.share)) / (k * (k - 1)), INFINITY)
    largest = tl.where((row.range == 0) | (row.share >= 1), 0.0, largest)
    reached = radius >= largest if BALL else (price == 0) | (largest == 0)
    hard = (row.range == 0) | reached
    flat = (radius == 0 if BALL else price > 1e280) & ~hard
    r, s = tl.where(hard | flat, 1.0, radius), tl.where(hard | flat, 1.0, price)
    unit = s / tl.abs(k - 1)
    tolerance = tolerated(row, r) if BALL else zero + EXACT
    begun = tl.sqrt(row.variance) / (tl.abs(k - 1) * tl.sqrt(2 * r)) if BALL else unit
    x = tl.log(tl.maximum(begun + tl.where(k < 1, 1.0, -1.0) * row.mean, 1e-3 * begun))
    todo, tried = chosen & ~hard & ~flat, 0
    if (row.z.dtype.element_ty != tl.float64) and FORM < GENERAL:
        loose = Limits(1e-5, 1e-5, 20, 20, 10.0, 10.0, _LOG_LEAST, _LOG_LARGEST, 1)
        rough, _, _, _, lost = _find_pole(row, k, r, unit, x, loose, todo, TILE, FORM, BALL, ROUGH)
        x = tl.where(~lost & (tl.abs(rough) < _LOG_LARGEST), rough, x)
    failed, log_total = todo & ~todo, zero
    path = Path(zero, zero + 1, zero, zero, zero, zero, zero, zero)
    going = 1
    while going > 0:
        # Above order 2 no slope tells of losses that come in.
        ends = (tried > 0) | (k > 2)
        close = tl.where(ends, 0.0, CLOSE)
        limits = Limits(tolerance, close, 400, 50, 10.0, 10.0, _LOG_LEAST, _LOG_LARGEST, 1)
        at, foretold, saturated, missed, lost = _find_pole(row, k, r, unit, x, limits, todo, TILE, FORM, BALL, PRECISE)
        highest = todo & saturated & (r >= largest * (1 - 1e-8)) if BALL else todo & ~todo
        # Where ratios jump between two numbers they are to be mixed.
        bad = todo & (lost | (saturated & ~highest) | (missed & (k > 2)))
        x = tl.where(todo, at, x)
        log_total = tl.where(todo, tl.where(tl.abs(foretold) < 600, foretold, 0.0), log_total)
        failed, hard = failed | bad, hard | highest
        path = _path(row, k, tl.exp(x), tl.exp(-log_total) / row.all, chosen & ~hard & ~flat, TILE, FORM, LAST)
        # A slope that has cancelled, as next to a far outlier, may have misled the last step.
        off = ~(tl.abs(_residual(path, k, r, unit, BALL)) <= 8 * tolerance)
        todo = todo & off & ~ends & ~missed & ~failed & ~hard
        tried += 1
        going = tl.max(todo.to(tl.int32), 0)
    store_ties(row, chosen & hard, TILE)
    _store_base(row, chosen & flat, TILE)
    # t^(k - 1) = exp(log_total)^(1 - k) (1 + y) = 1 + (k - 1) s, and mean phi*(s) = (k - 1) D where mean t = 1.
    shift = expm1((1 - k) * path.log_total) / (k - 1)
    strength = tl.abs(k - 1) * tl.exp((k - 1) * path.log_total) * path.unit if BALL else price
    gain = path.gain + (path.origin - row.mean)
    dual = strength * ((k - 1) * path.distance - shift) + (path.origin - row.mean)
    if BALL:
        dual += strength * radius
    else:
        gain -= price * path.distance
    answer = answer_of(gain, dual, path.origin - strength * shift, strength, path.distance, failed.to(tl.int32))
    total = tl.exp(path.log_total - log_total)
    answer = into_ball(row, answer, radius, total, None, None, chosen & ~hard & ~flat & ~failed, TILE, BALL)
    return with_ends(answer, row, hard, flat, largest)


@triton.jit
def _store_base(row, flat, TILE: tl.constexpr):
    """Store the base weights."""
    if tl.max(flat.to(tl.int32), 0) > 0:
        for begin in range(0, row.n, TILE):
            i = places(begin, TILE)
            store(row, i, mass(row, i) / row.all[:, None], flat)
