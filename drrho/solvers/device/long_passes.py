"""KL and chi-square risks of long rows: Newton's method in the multiplier, a pass over the row for each step.

The algorithms are those of ``kernels_kl.c`` and ``kernels_chi_square.c``. A launch begins by adding up the sums of the
launch before it and by moving the multipliers, in every program alike; what has converged is not read again.
"""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl

from drrho.solvers.device.functions import exponentials, log1p
from drrho.solvers.device.long_rows import (
    DONE,
    FRESH,
    LOW,
    MEAN,
    MODE,
    ON_BALL,
    OWN,
    PAID,
    PRICE,
    RADIUS,
    RANGE,
    REFUSED,
    SCALE,
    SHARE,
    TOP,
    VARIANCE,
    copy_state,
    load_tile,
    looked_at,
    places,
    put_total,
    reweigh,
    row_of,
    sampled,
    state_at,
    store_tile,
    sums_at,
    total,
    workspace,
    write_field,
)

# --- what belongs to KL: x = log b, the logarithm psi of the mean of exp(b (d - origin)), and the search for x --------

_X = tl.constexpr(OWN.value)
_PSI = tl.constexpr(OWN.value + 1)
_SEARCH = tl.constexpr(OWN.value + 2)  # ten numbers

# --- what belongs to chi-square: the support is d >= floor; its ratios less one are (d - center) / strength + offset --

_FLOOR = tl.constexpr(OWN.value)
_CENTER = tl.constexpr(OWN.value + 1)
_STRENGTH = tl.constexpr(OWN.value + 2)
_OFFSET = tl.constexpr(OWN.value + 3)
_NU = tl.constexpr(OWN.value + 4)
_SAFE = tl.constexpr(OWN.value + 5)  # a floor below which the support reaches
_BEFORE = tl.constexpr(OWN.value + 6)  # losses in the support at the pass before

_NUMBERS = tl.constexpr(10)
_CEILING = tl.constexpr(688.49)  # of log b
_CHI_SQUARE = tl.constexpr(0)
_INFINITY = tl.constexpr(float("inf"))


# --- KL ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _is_near(b, mean):
    return b * -mean <= 30.0


@triton.jit
def _kl_terms(d, rate, origin, near, inside):
    """Return exp(rate y) of ``y = d - origin``, and what is summed: about the mean, of positive terms alone."""
    y = d - origin
    power, e, beyond = exponentials(y * rate)
    first = tl.where(inside, tl.where(near, beyond, power), 0.0)
    second = tl.where(inside, tl.where(near, e, power), 0.0) * y
    return power, first, second, second * y


@triton.jit
def _kl_path(first, second, third, b, near, mean, variance):
    """Return mass, psi, gain, D and d log D / d log b from the means of `_kl_terms`."""
    mass = tl.where(near, 1.0 + first, first)
    psi = tl.where(near, log1p(tl.where(near, first, 0.0)), tl.log(tl.where(near, 1.0, first)))
    at = second / mass
    distance = b * at - psi
    spread = (third + tl.where(near, variance, 0.0)) / mass - at * at
    return mass, psi, at - tl.where(near, 0.0, mean), distance, b * b * spread / distance


@triton.jit
def _open_search(radius, span):
    low = 0.5 * (tl.log(8.0 * radius) - 2.0 * tl.log(span))
    nothing = low * 0.0
    open_side = nothing + _INFINITY
    return low, open_side, nothing, nothing, nothing, nothing, nothing, open_side, open_side, nothing


@triton.jit
def _advance(search, x, value, step, tolerance, close):
    """Return the search, x, whether it is found and whether it is beyond reach: `advance` of ``kernels_rows.c``.

    The value decreases in x; ``step`` is Newton's. What is found is at x, or a step away from where it was measured.
    """
    low, high, at_low, at_high, x_before, slope_before, curvature, last, before, fallen = search
    below = value > 0
    narrower = below & (x >= low)
    low, at_low = tl.where(narrower, x, low), tl.where(narrower, value, at_low)
    narrower = (value <= 0) & (x <= high)
    high, at_high = tl.where(narrower, x, high), tl.where(narrower, value, at_high)
    saturated = x >= _CEILING
    bounded = high < _INFINITY
    size = tl.abs(step)
    slope = -value / step
    usable = (slope < 0) & (slope > -_INFINITY)
    between = (slope - slope_before) / (x - x_before)
    known = usable & (slope_before < 0) & (tl.abs(between) < _INFINITY)
    curvature = tl.where(known, between, curvature)
    factor = 1.0 + 0.5 * step * curvature / slope  # Halley's step, if the curvature is known
    halley = usable & (factor > 0.5) & (factor < 2.0) & (curvature != 0.0)
    bent = tl.where(halley, step / factor, step)
    error = tl.where(halley, 0.1 * tl.abs(bent - step) + tl.maximum(1e-3, size) * size * size, size * size)
    newton = x + bent
    inside = (newton > low) & (newton < high)
    reached = (tl.abs(value) <= tolerance) | (high - low <= 1e-15 * tl.maximum(tl.abs(x), 1.0))
    jump = inside & ((error <= close) | reached)
    found = jump | reached | saturated
    trusted = inside & (bent <= 10.0) & ((2.0 * size <= before) | (bounded == 0))
    chord = low + (high - low) * (at_low / (at_low - at_high))
    fallen = tl.where(trusted, fallen, 1.0 - fallen)
    middle = tl.where(bounded, (low + high) / 2, tl.where(below, x + 10.0, x - 10.0))
    middle = tl.where((fallen == 1.0) & bounded & (chord > low) & (chord < high), chord, middle)
    following = tl.minimum(tl.where(trusted, newton, middle), _CEILING)
    moved = tl.where(found, tl.where(jump, newton, x), following)
    x_before, slope_before = tl.where(usable, x, x_before), tl.where(usable, slope, slope_before)
    search = (low, high, at_low, at_high, x_before, slope_before, curvature, tl.abs(moved - x), last, fallen)
    return search, moved, found, saturated


@triton.jit
def _kl_step(search, x, first, second, third, radius, mean, variance, tolerance, close):
    """Return `_advance`'s results at the sums of a pass, and the psi that is foretold at the new x."""
    b = tl.exp(x)
    near = _is_near(b, mean)
    _, psi, _, distance, slope = _kl_path(first, second, third, b, near, mean, variance)
    value = tl.log(radius) - tl.log(distance)
    value = tl.where(value == value, value, -_INFINITY)
    search, moved, found, saturated = _advance(search, x, value, value / slope, tolerance, close)
    psi = tl.where(_is_near(tl.exp(moved), mean) == near, psi + (distance + psi) * (moved - x), 0.0)
    return search, moved, found, saturated, psi


@triton.jit
def _rate(x, price):
    return tl.where(price >= 0, tl.minimum(1.0 / price, 1e300), tl.exp(x))


@triton.jit
def _read_search(state):
    at = state + _SEARCH
    return (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
            tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9))  # fmt: skip


@triton.jit
def _write_search(state, search):
    for j in tl.static_range(_NUMBERS):
        tl.store(state + _SEARCH + j, search[j])


@triton.jit
def _kl_moved(source, target, sums, parts, n, tolerance, close, PARTS: tl.constexpr):
    """Move x by the sums of a pass; return b, psi (thrice), the mode and whether that is all."""
    x, radius, price, mean = (
        tl.load(source + _X),
        tl.load(source + RADIUS),
        tl.load(source + PRICE),
        tl.load(source + MEAN),
    )
    variance, mode = tl.load(source + VARIANCE), tl.load(source + MODE)
    psi, done = tl.load(source + _PSI), tl.load(source + DONE)
    paid, on_ball = tl.load(source + PAID), tl.load(source + ON_BALL)
    if (done == 0) & (tl.load(source + FRESH) == 0):
        first, second = total(sums, 0, parts, PARTS) / n, total(sums, 1, parts, PARTS) / n
        third = total(sums, 2, parts, PARTS) / n
        search = _read_search(source)
        # The penalty is found at once; a hybrid whose penalty lies outside the ball goes on from there.
        b = _rate(x, price)
        near = _is_near(b, mean)
        _, own_psi, _, distance, _ = _kl_path(first, second, third, b, near, mean, variance)
        at_price, given = (price >= 0) & (distance <= radius), price
        x = tl.where(price >= 0, tl.log(b), x)
        search, moved, found, saturated, psi = _kl_step(
            search, x, first, second, third, radius, mean, variance, tolerance, close
        )
        x, psi = tl.where(at_price, x, moved), tl.where(at_price, own_psi, psi)
        done = (at_price | found).to(tl.float64)
        mode = tl.where(saturated & (at_price == 0), 1.0, mode)
        price = tl.where(at_price, price, -1.0)
        on_ball = (at_price == 0).to(tl.float64)
        paid = tl.where(at_price | (given < 0), paid, given)
        if tl.program_id(0) == 0:
            _write_search(target, search)
    if tl.program_id(0) == 0:
        tl.store(target + _X, x)
        tl.store(target + _PSI, psi)
        tl.store(target + PRICE, price)
        tl.store(target + PAID, paid)
        tl.store(target + ON_BALL, on_ball)
        tl.store(target + DONE, done)
        tl.store(target + MODE, mode)
        tl.store(target + FRESH, 0.0)
    return _rate(x, price), psi, psi, psi, mode, done


@triton.jit
def _kl_outset(radius, variance, span):
    """Return x where D is the radius to second order, but at least what any losses of that range need."""
    x = tl.maximum(0.5 * (tl.log(2.0 * radius) - tl.log(variance)), 0.5 * tl.log(8.0 * radius) - tl.log(span))
    return tl.minimum(x, _CEILING)


@triton.jit
def _kl_start(state, sample, share, radius, mean, variance, span):
    """Solve a sample for x, nearly and in float32, and begin the search on the row."""
    own_mean = tl.sum(sample * share, 0)
    y = sample - own_mean
    own_variance = tl.sum(y * y * share, 0)
    begun = _kl_outset(radius, variance, span)
    search, step, x = _open_search(radius, span), 0, begun
    sample, share, everywhere = sample.to(tl.float32), share.to(tl.float32), sample <= 0
    while (step < 14) & (x < 60.0):
        b = tl.exp(x)
        near = _is_near(b, own_mean)
        origin = tl.where(near, own_mean, 0.0).to(tl.float32)
        _, first, second, third = _kl_terms(sample, b.to(tl.float32), origin, near, everywhere)
        first, second = tl.sum(first * share, 0).to(tl.float64), tl.sum(second * share, 0).to(tl.float64)
        third = tl.sum(third * share, 0).to(tl.float64)
        search, x, found, _, _ = _kl_step(search, x, first, second, third, radius, own_mean, own_variance, 1e-3, 1e-4)
        step = tl.where(found, 14, step + 1)
    _, _, _, _, _, _, curvature, _, _, _ = search
    low, high, nothing, _, _, _, _, last, before, fallen = _open_search(radius, span)
    _write_search(state, (low, high, nothing, nothing, nothing, nothing, curvature, last, before, fallen))
    tl.store(state + _X, tl.where(x < 60.0, x, begun))
    tl.store(state + _PSI, 0.0)


# --- chi-square -------------------------------------------------------------------------------------------------------


@triton.jit
def _above(d, floor, center):
    """Return the moments of what lies in a support, elementwise."""
    inside = d >= floor
    y = tl.where(inside, d - center, 0.0)
    return tl.where(inside, 1.0, 0.0).to(d.dtype), y, y * y


@triton.jit
def _supported(radius, price, kept, dropped, mean, variance):
    """Return whether there are multipliers for a support, then its floor, nu, strength, offset and spread."""
    c = 2.0 * radius * kept - dropped
    valid = tl.where(price < 0, (c > 0) & (variance > 0), kept > 0)
    spread = tl.where(price < 0, tl.sqrt(tl.where(valid, variance / c, 1.0)), price / kept)
    strength = tl.where(price < 0, kept * spread, price)
    return valid, mean - spread, mean - dropped * spread, strength, dropped / kept, spread


@triton.jit
def _moments(count, first, second, center, n):
    """Return the share in a support and out of it, its mean and variance."""
    shift = first / count
    return count / n, (n - count) / n, center + shift, second / count - shift * shift


@triton.jit
def _write_support(state, floor, nu, strength, center, offset):
    tl.store(state + _FLOOR, floor)
    tl.store(state + _NU, nu)
    tl.store(state + _STRENGTH, strength)
    tl.store(state + _CENTER, center)
    tl.store(state + _OFFSET, offset)


@triton.jit
def _chi_square_moved(source, target, sums, parts, n, close, PARTS: tl.constexpr):
    """Move the support by the sums of a pass; return floor, center, strength, offset, mode and whether that is all."""
    floor, center, done = tl.load(source + _FLOOR), tl.load(source + _CENTER), tl.load(source + DONE)
    strength, offset, nu = tl.load(source + _STRENGTH), tl.load(source + _OFFSET), tl.load(source + _NU)
    safe, before, mode = tl.load(source + _SAFE), tl.load(source + _BEFORE), tl.load(source + MODE)
    radius, price = tl.load(source + RADIUS), tl.load(source + PRICE)
    paid, on_ball = tl.load(source + PAID), tl.load(source + ON_BALL)
    if (done == 0) & (tl.load(source + FRESH) == 0):
        count = total(sums, 0, parts, PARTS)
        first, second = total(sums, 1, parts, PARTS), total(sums, 2, parts, PARTS)
        kept, dropped, mean, variance = _moments(count, first, second, center, n)
        shift = mean - center
        canceled = shift * shift > 64.0 * variance
        valid, following, new_nu, new_strength, new_offset, spread = _supported(
            radius, price, kept, dropped, mean, variance
        )
        again = canceled & valid
        stuck = (valid == 0) & (floor <= safe)  # nothing smaller than a support that holds the answer's
        small = tl.abs(following - floor) <= close * spread
        found = valid & (small | ((count == before) & (following >= floor)))
        # A hybrid whose penalty lies outside the ball goes on from there.
        square = variance / (new_strength * new_strength) + new_offset * new_offset
        outside = found & (again == 0) & (price >= 0) & (0.5 * (kept * square + dropped) > radius)
        if outside:
            on_ball, paid, price = on_ball * 0.0 + 1.0, price, price * 0.0 - 1.0
            _, safe, _, _, _, _ = _supported(
                radius, price, 1.0, 0.0, tl.load(source + MEAN), tl.load(source + VARIANCE)
            )
            valid, following, new_nu, new_strength, new_offset, spread = _supported(
                radius, price, kept, dropped, mean, variance
            )
            found = found & (count < 0)
        done = ((found & (again == 0)) | stuck).to(tl.float64)
        mode = tl.where(stuck, 1.0, mode)
        safe = tl.where(valid & (following >= floor) & (again == 0), tl.maximum(safe, floor), safe)
        moved = tl.where(valid, tl.maximum(following, safe), (safe + floor) / 2)
        floor = tl.where(again, floor, tl.minimum(moved, 0.0))
        before = tl.where(again, before, count)
        strength, offset = tl.where(valid, new_strength, strength), tl.where(valid, new_offset, offset)
        nu, center = tl.where(valid, new_nu, nu), tl.where(valid, mean, center)
    if tl.program_id(0) == 0:
        _write_support(target, floor, nu, strength, center, offset)
        tl.store(target + _SAFE, safe)
        tl.store(target + _BEFORE, before)
        tl.store(target + PRICE, price)
        tl.store(target + PAID, paid)
        tl.store(target + ON_BALL, on_ball)
        tl.store(target + DONE, done)
        tl.store(target + MODE, mode)
        tl.store(target + FRESH, 0.0)
    return floor, center, strength, offset, mode, done


@triton.jit
def _chi_square_start(state, sample, share, radius, price, mean, variance, span):
    """Begin with the support of a sample; return whether the support is the whole row."""
    one = span * 0.0 + 1.0
    valid, safe, nu, strength, offset, _ = _supported(radius, price, one, 0.0 * one, mean, variance)
    safe = tl.where(valid, safe, -span)
    center = tl.sum(sample * share, 0)
    y = sample - center
    _, floor, _, _, _, _ = _supported(radius, price, one, 0.0 * one, center, tl.sum(y * y * share, 0))
    floor, step, before = tl.maximum(floor, safe), 0, 0.0 * one
    while step < 20:
        inside, first, second = _above(sample, floor, center)
        held, first, second = tl.sum(inside * share, 0), tl.sum(first * share, 0), tl.sum(second * share, 0)
        kept, dropped, middle, spread = _moments(held, first, second, center, one)
        usable, following, _, _, _, _ = _supported(radius, price, kept, dropped, middle, spread)
        step = tl.where(usable & (held != before), step + 1, 20)
        before = held
        floor, center = tl.where(usable, tl.maximum(following, floor), floor), tl.where(usable, middle, center)
    whole = valid & (safe <= -span)
    _write_support(state, tl.where(whole, safe, floor), nu, strength, tl.where(whole, mean, center), offset)
    tl.store(state + _SAFE, safe)
    tl.store(state + _BEFORE, -1.0)
    return whole


# --- the launches -----------------------------------------------------------------------------------------------------


@triton.jit
def _parameter(at, absent):
    """Return a parameter of this program's row, or what stands for one that is absent, and whether it is refused."""
    if at is None:
        value, refused = tl.full((), absent, tl.float64), tl.full((), 0, tl.int1)
    else:
        value = tl.load(at + tl.program_id(1))
        refused = ((value >= 0) & (value < _INFINITY)) == 0
    return value, refused


@triton.jit(do_not_specialize=["n", "parts"])
def start(
    z, work, radius_at, strength_at, n, parts, SAMPLE: tl.constexpr, ALIGNED: tl.constexpr, FAMILY: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Finish the first look of each row by one program; find the ends of the parameter's range; solve a sample.

    A hybrid begins as the penalty, and goes on as the ball once that is found to lie outside.
    """
    here = workspace(work, parts)
    refused, top, low, scale, span, mean, variance, share = looked_at(here, parts, n, PARTS)
    radius, bad_radius = _parameter(radius_at, _INFINITY)
    strength, bad_strength = _parameter(strength_at, -1.0)
    refused = refused | bad_radius | bad_strength
    price = strength * scale
    largest = (1.0 / share - 1.0) / 2 if FAMILY == _CHI_SQUARE else -tl.log(share)
    bound = (price < 0) | ((radius < largest) & ((price == 0) | ((radius == 0) & (price <= 4e307))))
    if FAMILY == _CHI_SQUARE:  # a price at which all losses are in the support
        bound = bound | ((mean - price <= -span) & (price > 0) & (variance > 2.0 * radius * price * price))
    paid = tl.where(bound, tl.maximum(price, 0.0), 0.0)
    price = tl.where(bound, -1.0, price)
    hard = (span == 0) | tl.where(bound, radius >= largest, price == 0)
    flat = tl.where(bound, radius == 0, price > 4e307)
    mode = tl.where(hard, 1.0, tl.where(flat, 2.0, 0.0))
    state = state_at(here, 1)
    done = refused | (mode != 0)
    if done == 0:
        if FAMILY == _CHI_SQUARE:
            sample, held = sampled(z, here, parts, n, top, scale, SAMPLE, PARTS, ALIGNED)
            done = _chi_square_start(state, sample, held, radius, price, mean, variance, span)
        elif strength_at is None:
            sample, held = sampled(z, here, parts, n, top, scale, SAMPLE, PARTS, ALIGNED)
            _kl_start(state, sample, held, radius, mean, variance, span)
        else:
            tl.store(state + _X, _kl_outset(radius, variance, span))
            tl.store(state + _PSI, 0.0)
            _write_search(state, _open_search(radius, span))
    tl.store(state + REFUSED, refused.to(tl.float64))
    tl.store(state + TOP, top)
    tl.store(state + LOW, low)
    tl.store(state + SCALE, scale)
    tl.store(state + RANGE, span)
    tl.store(state + MEAN, mean)
    tl.store(state + VARIANCE, variance)
    tl.store(state + SHARE, share)
    tl.store(state + MODE, mode)
    tl.store(state + DONE, done.to(tl.float64))
    tl.store(state + RADIUS, radius)
    tl.store(state + PRICE, price)
    tl.store(state + PAID, paid)
    tl.store(state + ON_BALL, bound.to(tl.float64))
    tl.store(state + FRESH, 1.0)


@triton.jit
def _moved(here, turn, parts, n, FAMILY: tl.constexpr, PARTS: tl.constexpr, SINGLE: tl.constexpr):
    """Move the multipliers by the sums of the launch before, and return them, the mode and whether that is all."""
    source, target, sums = state_at(here, turn), state_at(here, turn + 1), sums_at(here, turn, parts)
    if tl.program_id(0) == 0:
        copy_state(source, target)
        tl.debug_barrier()
    radius = tl.maximum(tl.load(source + RADIUS), 0.0)
    if FAMILY == _CHI_SQUARE:
        found = _chi_square_moved(source, target, sums, parts, n, 1e-7 if SINGLE else 1e-10, PARTS)
    else:
        tolerance = (1e-8 if SINGLE else 1e-13) + 9e-16 / tl.maximum(tl.sqrt(radius), 1e-3)
        found = _kl_moved(source, target, sums, parts, n, tolerance, 1e-8 if SINGLE else 1e-16, PARTS)
    return found


@triton.jit(do_not_specialize=["n", "parts", "turn"])
def step(
    z, work, n, parts, turn, FAMILY: tl.constexpr, PARTS: tl.constexpr, SINGLE: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Move the multipliers, and store the sums that the next step needs, unless it needs none."""
    here = workspace(work, parts)
    one, other, _, _, _, done = _moved(here, turn, parts, n, FAMILY, PARTS, SINGLE)
    if done == 0:
        state, sums, TILE = state_at(here, turn), sums_at(here, turn + 1, parts), ROWS * LANES
        top, scale, mean = tl.load(state + TOP), tl.load(state + SCALE), tl.load(state + MEAN)
        near = _is_near(one, mean)
        origin = tl.where(near, mean, 0.0)
        row, lanes = row_of(z, n, ALIGNED), places(ROWS, LANES)
        first = tl.zeros((LANES,), tl.float64)
        second = tl.zeros((LANES,), tl.float64)
        third = tl.zeros((LANES,), tl.float64)
        for tile in range(tl.program_id(0), tl.cdiv(n, TILE), parts):
            x, inside = load_tile(row, tile, n, top, lanes, TILE)
            d = (x.to(tl.float64) - top) * scale
            if FAMILY == _CHI_SQUARE:
                a, b, c = _above(tl.where(inside, d, -_INFINITY), one, other)
            else:
                _power, a, b, c = _kl_terms(d, one, origin, near, inside)
            first += tl.sum(a, 0)
            second += tl.sum(b, 0)
            third += tl.sum(c, 0)
        put_total(sums, 0, first)
        put_total(sums, 1, second)
        put_total(sums, 2, third)


@triton.jit(do_not_specialize=["n", "parts", "turn"])
def weigh(
    z, weights, work, n, parts, turn, FAMILY: tl.constexpr, PARTS: tl.constexpr, SINGLE: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store the weights, and the sums of both sides of their certificate."""
    here = workspace(work, parts)
    one, other, strength, offset, mode, _ = _moved(here, turn, parts, n, FAMILY, PARTS, SINGLE)
    state, sums, TILE = state_at(here, turn), sums_at(here, turn + 1, parts), ROWS * LANES
    top, scale, mean = tl.load(state + TOP), tl.load(state + SCALE), tl.load(state + MEAN)
    near = _is_near(one, mean)
    origin = tl.where(near, mean, 0.0)
    each = 1.0 / n.to(tl.float64)
    steady = tl.where(mode == 2, each, 0.0)
    tied = tl.where(mode == 1, each / tl.load(state + SHARE), steady)
    each = each if FAMILY == _CHI_SQUARE else each * tl.exp(-other)
    near_one = 1.0 / strength
    row, lanes, into = row_of(z, n, ALIGNED), places(ROWS, LANES), row_of(weights, n, ALIGNED)
    first = tl.zeros((LANES,), tl.float64)
    second = tl.zeros((LANES,), tl.float64)
    third = tl.zeros((LANES,), tl.float64)
    for tile in range(tl.program_id(0), tl.cdiv(n, TILE), parts):
        x, inside = load_tile(row, tile, n, top, lanes, TILE)
        d = (x.to(tl.float64) - top) * scale
        if FAMILY == _CHI_SQUARE:
            tilt = tl.maximum((d - other) * near_one + offset, -1.0)
            weight = (tilt + 1.0) * each
            a = tl.where(inside, tilt, 0.0)
            b, c = a * (d - mean), a * tilt
        else:
            power, a, b, c = _kl_terms(d, one, origin, near, inside)
            weight = power * each
        if mode != 0:
            weight = tl.where(d == 0.0, tied, steady)
        store_tile(into, tile, n, weight, lanes, TILE)
        first += tl.sum(a, 0)
        second += tl.sum(b, 0)
        third += tl.sum(c, 0)
    put_total(sums, 0, first)
    put_total(sums, 1, second)
    put_total(sums, 2, third)


@triton.jit
def _kl_answer(state, first, second, third, radius, price, mean, variance):
    """Return gain, dual value, threshold, strength and D at the weights, and what these sum to."""
    b = _rate(tl.load(state + _X), price)
    near = _is_near(b, mean)
    mass, psi, gain, distance, _ = _kl_path(first, second, third, b, near, mean, variance)
    strength = tl.where(price >= 0, price, 1.0 / b)
    origin = tl.where(near, mean, 0.0)
    premium = strength * psi + (origin - mean)  # of second order, about the mean; phi* has mean zero at the threshold
    dual = tl.where(price >= 0, premium, premium + strength * radius)
    gain = tl.where(price >= 0, premium, gain)
    return gain, dual, origin + strength * psi, strength, distance, mass * tl.exp(-tl.load(state + _PSI))


@triton.jit
def _chi_square_answer(state, first, second, third, radius, price, mean):
    """Return the same of chi-square."""
    strength, surplus, half_square = tl.load(state + _STRENGTH), first, third / 2
    gain = second / (1.0 + surplus)
    distance = tl.maximum(half_square - surplus * surplus / 2, 0.0) / ((1.0 + surplus) * (1.0 + surplus))
    dual = strength * (surplus + half_square) + (
        (tl.load(state + _CENTER) - mean) - strength * tl.load(state + _OFFSET)
    )
    dual = tl.where(price >= 0, dual, dual + strength * radius)
    gain = tl.where(price >= 0, gain - price * distance, gain)
    return gain, dual, tl.load(state + _NU), strength, distance, 1.0 + surplus


@triton.jit
def _into_ball(gain, dual, strength, distance, radius, price):
    """Return gain, D and the share of the weights that is kept so that they lie in the ball: as ``kernels.h`` does."""
    outside = (price < 0) & (distance > radius * (1 + 4.5e-16))
    excess, slope = distance - radius, gain / strength
    lost = tl.where(excess < 1e-9 * radius, tl.minimum(excess / distance, 1.001 * excess / slope), excess / distance)
    kept = tl.where(outside, 1.0 - lost, 1.0)
    gain, distance = gain * kept, tl.where(outside, radius, distance)
    above = (gain > dual) & (gain - dual <= 1e-11 * gain)  # by the rounding of D, as duality is weak
    kept = tl.where(above & (price < 0), kept * (dual / gain), kept)
    return tl.where(above, dual, gain), distance, kept


@triton.jit(do_not_specialize=["n", "parts", "turn"])
def finish(
    work, weights, strength_at, fields, failed, n, parts, turn, FAMILY: tl.constexpr, PARTS: tl.constexpr,
    SINGLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write the fields of each row, by its first program; make its weights sum to one, and lie in the ball."""
    here = workspace(work, parts)
    state, sums = state_at(here, turn), sums_at(here, turn, parts)
    first, second = total(sums, 0, parts, PARTS) / n, total(sums, 1, parts, PARTS) / n
    third = total(sums, 2, parts, PARTS) / n
    mean, radius, price, share = (
        tl.load(state + MEAN),
        tl.load(state + RADIUS),
        tl.load(state + PRICE),
        tl.load(state + SHARE),
    )
    if FAMILY == _CHI_SQUARE:
        answer = _chi_square_answer(state, first, second, third, radius, price, mean)
        largest = (1.0 / share - 1.0) / 2
    else:
        answer = _kl_answer(state, first, second, third, radius, price, mean, tl.load(state + VARIANCE))
        largest = -tl.log(share)
    gain, dual, threshold, strength, distance, mass = answer
    gain, distance, kept = _into_ball(gain, dual, strength, distance, radius, price)
    hard, flat = tl.load(state + MODE) == 1, tl.load(state + MODE) == 2
    at_end = hard | flat
    unfelt = 3e-8 if SINGLE else 9e-16
    felt = (at_end == 0) & ((tl.abs(mass - 1.0) > unfelt) | (1.0 - kept > unfelt))
    gain = tl.where(hard, -mean, tl.where(flat, 0.0, gain))
    gap = tl.where(at_end, 0.0, dual - gain)
    certain = tl.abs(gap) <= (1e-7 if SINGLE else 1e-9) * tl.abs(gain) + 1.5e-14 * tl.load(state + RANGE)
    certain = certain & (tl.load(state + REFUSED) == 0)
    distance = tl.where(hard, largest, tl.where(flat, 0.0, distance))
    on_ball, paid = tl.load(state + ON_BALL), tl.load(state + PAID) * distance
    if strength_at is not None:
        gain = tl.where(hard & (price > 0), gain - price * largest, gain)
        outside = distance > tl.load(state + RADIUS) * (1 + 1e-12)  # a hybrid has a radius, a penalty an infinite one
        certain = certain & ((on_ball != 0) | (outside == 0))
    factor, added = tl.where(felt, kept / mass, 1.0), tl.where(felt, (1.0 - kept) / n, 0.0)
    reweigh(weights, failed, n, factor, added, certain, ROWS, LANES, ALIGNED)
    if tl.program_id(0) == 0:
        top, scale = tl.load(state + TOP), tl.load(state + SCALE)
        highest = (tl.load(state + RANGE) == 0) | (hard & ((on_ball != 0) | (price == 0)))
        threshold = tl.where(hard, 0.0, tl.where(flat, mean, threshold))
        strength = tl.where(hard, 0.0, tl.where(flat, _INFINITY, strength)) / scale
        if strength_at is not None:
            strength = tl.where(on_ball != 0, strength, tl.load(strength_at + tl.program_id(1)))
        write_field(fields, 0, tl.where(highest, top - paid / scale, top + (mean + (gain - paid)) / scale), certain)
        write_field(fields, 1, (gain - paid) / scale, certain)
        write_field(fields, 2, top + threshold / scale, certain)
        write_field(fields, 3, strength, certain)
        write_field(fields, 4, gap / scale, certain)
        write_field(fields, 5, distance, certain)
        write_field(fields, 6, 0.0 * distance, certain)
        write_field(fields, 7, on_ball, certain)
