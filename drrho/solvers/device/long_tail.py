"""CVaR of long rows: its threshold by radix selection over integers that are ordered like the losses.

A sample brackets the threshold. Each pass then counts the losses of the bracket in equal bins, and the next one looks
into the bin that holds the threshold, until a bin is a single number. Few losses lie in the bracket, so that few are
counted one by one; those equal to the sample's own order statistics, which may be many, are counted together.
"""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from drrho.solvers.device.functions import key_of, number_of
from drrho.solvers.device.long_rows import (
    DONE,
    FRESH,
    LOW,
    MEAN,
    OWN,
    RANGE,
    REFUSED,
    SCALE,
    TOP,
    copy_state,
    load_tile,
    looked_at,
    places,
    put_total,
    reweigh,
    row_of,
    state_at,
    store_tile,
    sums_at,
    total,
    workspace,
    write_field,
)

BINS = 2048
_BINS = tl.constexpr(BINS)
_DIGITS = tl.constexpr(11)
_PLACES = tl.constexpr(20)  # to which a sample's keys are found

# Integers of a state, int64: the first key of the bracket, and the keys of a bin, as a power of two; the sample's keys;
# the largest and least key; how many losses are in the tail; the threshold's key, and what exceeds it and equals it.
_FIRST = tl.constexpr(OWN.value)
_SHIFT = tl.constexpr(OWN.value + 1)
_SAMPLED = tl.constexpr(OWN.value + 2)  # three
_HIGHEST = tl.constexpr(OWN.value + 5)
_LOWEST = tl.constexpr(OWN.value + 6)
_WANTED = tl.constexpr(OWN.value + 7)
_THRESHOLD = tl.constexpr(OWN.value + 8)
_HIGHER = tl.constexpr(OWN.value + 9)
_EQUAL = tl.constexpr(OWN.value + 10)
_ALPHA = tl.constexpr(OWN.value + 11)  # a float64 number


@triton.jit
def _integers(state):
    return state.to(tl.pointer_type(tl.int64))


@triton.jit
def _put(state, place, value):
    tl.store(_integers(state) + place, value.to(tl.int64))


@triton.jit
def _cover(width):
    """Return the least shift by which a width of keys, unsigned, leaves less than the number of bins."""
    shift = width * 0
    for _ in range(64 - _DIGITS):
        shift += ((width >> shift) >= _BINS).to(width.dtype)
    return shift.to(tl.int64)


@triton.jit
def _unsigned(difference):
    """Return a difference of keys, which is not negative but may have left their range, as an unsigned integer."""
    if difference.dtype == tl.int64:
        width = difference.to(tl.uint64, bitcast=True)
    else:
        width = difference.to(tl.uint32, bitcast=True)
    return width


@triton.jit
def _ranked(keys, ranks, bits: tl.constexpr):
    """Return those of the keys that have given ranks ``[4]`` from the largest, or close below, bit by bit."""
    found = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= ranks, 0, -(1 << (bits - 1)))
    found = found.to(tl.int64)
    for place in range(_PLACES):
        candidate = found + (tl.full((), 1, tl.int64) << (bits - 2 - place))
        count = tl.sum((keys[:, None] >= candidate[None, :]).to(tl.int32), 0)
        found = tl.where(count >= ranks, candidate, found)
    return found


@triton.jit(do_not_specialize=["n", "parts", "passes"])
def start_tail(
    z, work, counts, alpha, strength, order: tl.float64, n, parts, passes, SAMPLE: tl.constexpr, BITS: tl.constexpr,
    ALIGNED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Finish the first look of each row by one program, and bracket the threshold by a sample."""
    here = workspace(work, parts)
    refused, top, low, scale, span, mean, _, _ = looked_at(here, parts, n, PARTS)
    fraction = mean * 0.0 + order if alpha is None else tl.load(alpha + tl.program_id(1))
    refused = refused | (((fraction > 0) & (fraction <= 1)) == 0)
    if strength is not None:
        price = tl.load(strength + tl.program_id(1))
        refused = refused | (((price >= 0) & (price < float("inf"))) == 0)
    bins = tl.arange(0, _BINS)
    for j in range(passes):
        tl.store(counts + (tl.program_id(1) * passes + j) * _BINS + bins, tl.zeros((_BINS,), tl.int32))
    state = state_at(here, 1)
    wanted = tl.minimum(tl.maximum(tl.ceil(fraction * n), 1.0), n.to(tl.float64))
    step = n // SAMPLE
    at = tl.arange(0, SAMPLE).to(tl.int64) * step + step // 2
    keys = key_of(tl.load(row_of(z, n, ALIGNED) + at))
    highest, lowest = key_of(top.to(z.dtype.element_ty)).to(tl.int64), key_of(low.to(z.dtype.element_ty)).to(tl.int64)
    rank = wanted / n * SAMPLE
    margin = 2.5 * tl.sqrt(tl.full((), SAMPLE, tl.float64)) + 2.0
    j = tl.arange(0, 4)
    ranks = tl.where(j == 0, tl.ceil(rank + margin), tl.where(j == 2, tl.floor(rank - margin), tl.ceil(rank)))
    clamped = tl.minimum(tl.maximum(ranks, 1.0), 1.0 * SAMPLE).to(tl.int32)
    found = _ranked(keys.to(tl.int64), clamped, BITS)
    found = tl.where(j == 2, found + ((tl.full((), 1, tl.int64) << (BITS - 1 - _PLACES)) - 1), found)
    found = tl.where(ranks > SAMPLE, lowest, tl.where(ranks < 1, highest, found))
    tl.store(_integers(state) + _SAMPLED + j, found, mask=j < 3)
    first = tl.sum(tl.where(j == 0, found, 0), 0)
    last = tl.sum(tl.where(j == 2, found, 0), 0)
    _put(state, _FIRST, first)
    _put(state, _SHIFT, _cover(_unsigned(last - first)))
    _put(state, _HIGHEST, highest)
    _put(state, _LOWEST, lowest)
    _put(state, _WANTED, wanted)
    tl.store(state + _ALPHA, fraction)
    tl.store(state + REFUSED, refused.to(tl.float64))
    tl.store(state + TOP, top)
    tl.store(state + LOW, low)
    tl.store(state + SCALE, scale)
    tl.store(state + RANGE, span)
    tl.store(state + MEAN, mean)
    tl.store(state + DONE, refused.to(tl.float64))
    tl.store(state + FRESH, 1.0)


@triton.jit
def _bin_of(key, first, shift):
    """Return the bin of keys that are not below the first of the bracket."""
    return _unsigned(key - first) >> shift.to(_unsigned(key).dtype)


@triton.jit
def _narrowed(here, counts, turn, parts, PARTS: tl.constexpr):
    """Look for the threshold in the bins of the pass before.

    Return the first key, the shift, and whether the threshold is found, then its key, what exceeds it and equals it.
    """
    source, target, sums = state_at(here, turn), state_at(here, turn + 1), sums_at(here, turn, parts)
    leader = tl.program_id(0) == 0
    if leader:
        copy_state(source, target)
        tl.debug_barrier()
    integers = _integers(source)
    first, shift, done = tl.load(integers + _FIRST), tl.load(integers + _SHIFT), tl.load(source + DONE)
    threshold, higher = tl.load(integers + _THRESHOLD), tl.load(integers + _HIGHER)
    equal = tl.load(integers + _EQUAL)
    if (done == 0) & (tl.load(source + FRESH) == 0):
        wanted = tl.load(integers + _WANTED)
        bins = tl.arange(0, _BINS)
        held = tl.load(counts + (turn - 2) * _BINS + bins).to(tl.int64)
        above = total(sums, 0, parts, PARTS).to(tl.int64)
        for j in tl.static_range(3):
            key = tl.load(integers + _SAMPLED + j)
            number = total(sums, 1 + j, parts, PARTS).to(tl.int64)
            held += tl.where((key >= first) & (bins == _bin_of(key, first, shift).to(tl.int64)), number, 0)
        inside = tl.sum(held, 0)
        reached = above + inside - (tl.cumsum(held, 0) - held)  # at or above each bin's first key
        chosen = tl.maximum(tl.sum((reached >= wanted).to(tl.int64), 0) - 1, 0)
        equal = tl.sum(tl.where(bins == chosen, held, 0), 0)
        higher = tl.sum(tl.where(bins == chosen, reached, 0), 0) - equal
        too_high, too_low = above >= wanted, above + inside < wanted
        found = (shift == 0) & (too_high == 0) & (too_low == 0)
        beyond = first + (tl.full((), _BINS, tl.int64) << shift)
        lowest, highest = tl.load(integers + _LOWEST), tl.load(integers + _HIGHEST)
        narrower = tl.maximum(shift - _DIGITS, 0)
        width = _unsigned(tl.where(too_high, highest - beyond, first - lowest))
        threshold = first + chosen
        first = tl.where(too_high, beyond, tl.where(too_low, lowest, first + (chosen << shift)))
        if too_high | too_low:
            shift = _cover(width)
        else:
            shift = narrower
        done = found.to(tl.float64)
    if leader:
        _put(target, _FIRST, first)
        _put(target, _SHIFT, shift)
        _put(target, _THRESHOLD, threshold)
        _put(target, _HIGHER, higher)
        _put(target, _EQUAL, equal)
        tl.store(target + DONE, done)
        tl.store(target + FRESH, 0.0)
    return first, shift, done, threshold, higher, equal


@triton.jit(do_not_specialize=["n", "parts", "turn", "passes"])
def tally(
    z, work, counts, n, parts, turn, passes, PARTS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Narrow the bracket, and count the losses in its bins and above it, unless the threshold is found."""
    here, own = workspace(work, parts), counts + tl.program_id(1) * passes * _BINS
    first, shift, done, _, _, _ = _narrowed(here, own, turn, parts, PARTS)
    if done == 0:
        sums, TILE = sums_at(here, turn + 1, parts), ROWS * LANES
        row, lanes = row_of(z, n, ALIGNED), places(ROWS, LANES)
        integers = _integers(state_at(here, turn))
        kind = key_of(tl.load(row)).dtype
        begin = first.to(kind)
        one, two = tl.load(integers + _SAMPLED).to(kind), tl.load(integers + _SAMPLED + 1).to(kind)
        three = tl.load(integers + _SAMPLED + 2).to(kind)
        filled = tl.load(row)
        above = tl.zeros((LANES,), tl.int32)
        ones = tl.zeros((LANES,), tl.int32)
        twos = tl.zeros((LANES,), tl.int32)
        threes = tl.zeros((LANES,), tl.int32)
        for tile in range(tl.program_id(0), tl.cdiv(n, TILE), parts):
            x, there = load_tile(row, tile, n, filled, lanes, TILE)
            key = key_of(x)
            bin = _bin_of(key, begin, shift)
            at_least = there & (key >= begin)
            is_one, is_two, is_three = there & (key == one), there & (key == two), there & (key == three)
            inside = at_least & (bin < _BINS)
            above += tl.sum((at_least & (bin >= _BINS)).to(tl.int32), 0)
            ones += tl.sum(is_one.to(tl.int32), 0)
            twos += tl.sum(is_two.to(tl.int32), 0)
            threes += tl.sum(is_three.to(tl.int32), 0)
            counted = inside & ((is_one | is_two | is_three) == 0)
            tl.atomic_add(own + (turn - 1) * _BINS + bin.to(tl.int32), 1, mask=counted, sem="relaxed")
        put_total(sums, 0, above.to(tl.float64))
        put_total(sums, 1, ones.to(tl.float64))
        put_total(sums, 2, tl.where(two == one, 0, twos).to(tl.float64))
        put_total(sums, 3, tl.where((three == one) | (three == two), 0, threes).to(tl.float64))


@triton.jit(do_not_specialize=["n", "parts", "turn", "passes"])
def weigh_tail(
    z, weights, work, counts, n, parts, turn, passes, PARTS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store the weights, and the sums of what lies above the threshold and below it."""
    here = workspace(work, parts)
    _, _, _, key, higher, equal = _narrowed(here, counts + tl.program_id(1) * passes * _BINS, turn, parts, PARTS)
    state, sums, TILE = state_at(here, turn), sums_at(here, turn + 1, parts), ROWS * LANES
    row, lanes, into = row_of(z, n, ALIGNED), places(ROWS, LANES), row_of(weights, n, ALIGNED)
    threshold = number_of(key.to(key_of(tl.load(row)).dtype))
    above, tied = _tilts(tl.load(state + _ALPHA), higher.to(tl.float64), equal.to(tl.float64), n)
    each = 1.0 / n.to(tl.float64)
    above, tied = ((above + 1.0) * each).to(into.dtype.element_ty), ((tied + 1.0) * each).to(into.dtype.element_ty)
    at, scale = threshold.to(tl.float64), tl.load(state + SCALE)
    exceeded = tl.zeros((LANES,), tl.float64)
    missed = tl.zeros((LANES,), tl.float64)
    for tile in range(tl.program_id(0), tl.cdiv(n, TILE), parts):
        x, inside = load_tile(row, tile, n, threshold, lanes, TILE)
        store_tile(into, tile, n, tl.where(x > threshold, above, tl.where(x == threshold, tied, 0.0)), lanes, TILE)
        beyond = tl.where(inside, (x.to(tl.float64) - at) * scale, 0.0)
        exceeded += tl.sum(tl.maximum(beyond, 0.0), 0)
        missed += tl.sum(tl.minimum(beyond, 0.0), 0)
    put_total(sums, 0, exceeded)
    put_total(sums, 1, missed)


@triton.jit
def _tilts(alpha, higher, equal, n):
    """Return the ratios less one above the threshold and at it, from how many losses are there (``tail.py``)."""
    lower, above = n - higher - equal, (1.0 - alpha) / alpha
    # The same number twice; near alpha = 1 the second form would cancel.
    from_below, from_above = lower - (1.0 - alpha) * (n - equal), alpha * n - higher - equal * alpha
    left_over = tl.where(alpha > 0.5, from_below, from_above)
    return above, tl.maximum(tl.minimum(left_over / (equal * alpha), above), -1.0)


@triton.jit(do_not_specialize=["n", "parts", "turn"])
def finish_tail(
    work, z, weights, strength, fields, failed, n, parts, turn, SINGLE: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Write the fields of each row, by its first program; make its weights NaN where nothing is certain."""
    here = workspace(work, parts)
    state, sums = state_at(here, turn), sums_at(here, turn, parts)
    alpha, mean, top, scale = (
        tl.load(state + _ALPHA),
        tl.load(state + MEAN),
        tl.load(state + TOP),
        tl.load(state + SCALE),
    )
    integers = _integers(state)
    higher, equal = tl.load(integers + _HIGHER).to(tl.float64), tl.load(integers + _EQUAL).to(tl.float64)
    threshold = number_of(tl.load(integers + _THRESHOLD).to(key_of(tl.load(z)).dtype)).to(tl.float64)
    exceeded, missed = total(sums, 0, parts, PARTS) / n, total(sums, 1, parts, PARTS) / n
    above, tied = _tilts(alpha, higher, equal, n)
    surplus = (above * higher + tied * equal - (n - higher - equal)) / n
    nothing = 0.0 * alpha
    depth = (threshold - top) * scale
    from_mean = depth - mean
    gain = (above * exceeded - missed) + from_mean * surplus  # as if taken about the mean
    gap = from_mean + exceeded / alpha - gain
    certain = tl.abs(gap) <= (1e-7 if SINGLE else 1e-9) * tl.abs(gain) + 1.5e-14 * tl.load(state + RANGE)
    certain = certain & (tl.load(state + DONE) != 0) & (tl.load(state + REFUSED) == 0)
    reweigh(weights, failed, n, nothing + 1.0, nothing, certain, ROWS, LANES, ALIGNED)
    if tl.program_id(0) == 0:
        write_field(fields, 0, tl.where(depth == 0, top, top + (mean + gain) / scale), certain)
        write_field(fields, 1, gain / scale, certain)
        write_field(fields, 2, threshold, certain)
        write_field(fields, 3, nothing if strength is None else tl.load(strength + tl.program_id(1)), certain)
        write_field(fields, 4, gap / scale, certain)
        write_field(fields, 5, nothing, certain)
        write_field(fields, 6, -exceeded / (alpha * alpha) / scale, certain)
        write_field(fields, 7, nothing + 1.0 if strength is None else nothing, certain)
