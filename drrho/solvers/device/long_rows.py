"""What the passes over a long row share: tiles, sums that many programs make, and the first look at the losses.

A row is read by all programs of a launch, a tile at a time. Each program stores its sums in float64, and the programs
of the next launch add them up, all in the same order and so to the same bits: nothing waits for the host.
"""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

# --- a workspace for each row, float64: two states, which launches read and write in turn, two sets of sums, peaks ---

STATES = 40  # numbers in a state
SUMS = 8  # numbers that a program stores in a pass
PEAKS = 8  # maxima that it finds in the first one, each of a part of its losses

REFUSED = tl.constexpr(0)  # whether there is a loss or a parameter for which there is no answer
TOP = tl.constexpr(1)
LOW = tl.constexpr(2)
SCALE = tl.constexpr(3)
RANGE = tl.constexpr(4)
MEAN = tl.constexpr(5)  # of d = (z - top) * scale, like all that follows
VARIANCE = tl.constexpr(6)
SHARE = tl.constexpr(7)  # of the losses tied at the maximum
MODE = tl.constexpr(8)  # 0, or an end of the parameter's range: 1, the maximum, or 2, the mean
DONE = tl.constexpr(9)  # whether the multipliers are found
RADIUS = tl.constexpr(10)
PRICE = tl.constexpr(11)  # in units of d; -1: none is given
FRESH = tl.constexpr(12)  # whether no pass has been made
PAID = tl.constexpr(13)  # the price of a hybrid whose radius binds, else 0
ON_BALL = tl.constexpr(14)  # whether the radius determines the strength
OWN = tl.constexpr(16)  # the first number of what belongs to a divergence

_STATES = tl.constexpr(STATES)
_SUMS = tl.constexpr(SUMS)
_PEAKS = tl.constexpr(PEAKS)


def room(programs: int) -> int:
    """Return the float64 numbers of a row's workspace."""
    return 2 * STATES + (2 * SUMS + PEAKS) * programs


@triton.jit
def workspace(work, parts):
    """Return where the workspace of this program's row begins, for passes of so many programs."""
    return work + tl.program_id(1).to(tl.int64) * (2 * _STATES + (2 * _SUMS + _PEAKS) * parts)


@triton.jit
def state_at(here, turn):
    """Return the state that is read at a turn, which is written at the turn before."""
    return here + _STATES * (turn % 2)


@triton.jit
def sums_at(here, turn, parts):
    """Return the sums that are read at a turn."""
    return here + 2 * _STATES + _SUMS * parts * (turn % 2)


@triton.jit
def peaks_at(here, parts):
    """Return the peaks of all programs."""
    return here + 2 * _STATES + 2 * _SUMS * parts


@triton.jit
def total(sums, place, parts, PARTS: tl.constexpr):
    """Return a sum over all programs."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(sums + part * _SUMS + place, mask=part < parts, other=0.0), 0)


@triton.jit
def put_total(sums, place, lanes):
    """Store this program's sum of what its lanes hold."""
    tl.store(sums + tl.program_id(0) * _SUMS + place, tl.sum(lanes, 0))


@triton.jit
def copy_state(source, target):
    """Copy a state, by the row's first program."""
    slot = tl.arange(0, 64)
    tl.store(target + slot, tl.load(source + slot, mask=slot < _STATES), mask=slot < _STATES)


# --- tiles ------------------------------------------------------------------------------------------------------------


@triton.jit
def row_of(z, n, ALIGNED: tl.constexpr):
    """Return where this program's row begins; ``ALIGNED`` promises that rows begin at multiples of 16 losses."""
    offset = tl.program_id(1).to(tl.int64) * n
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return z + offset


@triton.jit
def places(ROWS: tl.constexpr, LANES: tl.constexpr):
    """Return the places of losses in a tile, ``[ROWS, LANES]``: sums over the rows stay in a thread."""
    return tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _start(tile, TILE: tl.constexpr):
    return tl.full((), TILE, tl.int64) * tile


@triton.jit
def load_tile(row, tile, n, fill, lanes, TILE: tl.constexpr):
    """Return the losses of a tile, float32 or float64, and which of them there are; the others are filled in."""
    start = _start(tile, TILE)
    if start + TILE <= n:
        x = tl.load(row + start + lanes)
    else:
        x = tl.load(row + start + lanes, mask=lanes < n - start, other=0.0)
        x = tl.where(lanes < n - start, x, fill.to(x.dtype))
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x, lanes < tl.minimum(n - start, TILE)


@triton.jit
def store_tile(row, tile, n, x, lanes, TILE: tl.constexpr):
    """Store a tile."""
    start = _start(tile, TILE)
    if start + TILE <= n:
        tl.store(row + start + lanes, x.to(row.dtype.element_ty))
    else:
        tl.store(row + start + lanes, x.to(row.dtype.element_ty), mask=lanes < n - start)


# --- a first look -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def look(z, work, n, ROWS: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """Store each program's extremes, ties at its maximum, moments about an origin of its own, and peaks."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    here = workspace(work, parts)
    row = row_of(z, n, ALIGNED)
    TILE: tl.constexpr = ROWS * LANES
    lanes = places(ROWS, LANES)
    some = tl.load(row + _start(part, TILE)).to(tl.float64)  # a loss, to fill in
    first, inside = load_tile(row, part, n, some, lanes, TILE)
    count = tl.sum(tl.sum(inside.to(tl.float64), 0), 0)
    origin = (
        tl.sum(tl.sum(tl.where(inside, first.to(tl.float64), 0.0), 0), 0) / count
    )  # so close to the mean that no square cancels
    high = tl.full((LANES,), float("-inf"), first.dtype)
    low = -high
    tied = tl.zeros((LANES,), tl.int32)
    odd = tl.zeros((LANES,), tl.float64)
    sum = tl.zeros((LANES,), tl.float64)
    square = tl.zeros((LANES,), tl.float64)
    count = tl.zeros((), tl.float64)
    for tile in range(part, tl.cdiv(n, TILE), parts):
        x, inside = load_tile(row, tile, n, some, lanes, TILE)
        count += tl.minimum(n - _start(tile, TILE), TILE).to(tl.float64)
        odd += tl.sum(tl.where(tl.abs(x) < float("inf"), 0.0, 1.0), 0)
        highest = tl.max(x, 0)
        ties = tl.sum((inside & (x == highest[None, :])).to(tl.int32), 0)
        tied = tl.where(highest > high, ties, tl.where(highest == high, tied + ties, tied))
        high = tl.maximum(high, highest)
        low = tl.minimum(low, tl.min(x, 0))
        y = tl.where(inside, x.to(tl.float64) - origin, 0.0)
        sum += tl.sum(y, 0)
        square += tl.sum(y * y, 0)
    top = tl.max(high, 0)
    sums = sums_at(here, 0, parts)
    at = sums + part * _SUMS
    tl.store(at, top.to(tl.float64))
    tl.store(at + 1, tl.min(low, 0).to(tl.float64))
    put_total(sums, 2, tl.where(high == top, tied, 0).to(tl.float64))
    put_total(sums, 3, odd)
    tl.store(at + 4, count)
    tl.store(at + 5, origin)
    put_total(sums, 6, sum)
    put_total(sums, 7, square)
    peaks = tl.max(tl.reshape(high, (_PEAKS, LANES // _PEAKS)), 1).to(tl.float64)
    tl.store(peaks_at(here, parts) + part * _PEAKS + tl.arange(0, _PEAKS), peaks)


@triton.jit
def looked_at(here, parts, n, PARTS: tl.constexpr):
    """Add up what `look` has stored.

    Return whether losses are refused, their maximum, minimum, scale, range, mean, variance and share of ties.
    """
    part = tl.arange(0, PARTS)
    there = part < parts
    at = sums_at(here, 0, parts) + part * _SUMS
    high = tl.load(at, mask=there, other=float("-inf"))
    low = tl.min(tl.load(at + 1, mask=there, other=float("inf")), 0)
    tied = tl.load(at + 2, mask=there, other=0.0)
    odd = tl.sum(tl.load(at + 3, mask=there, other=0.0), 0)
    count = tl.load(at + 4, mask=there, other=0.0)
    top = tl.max(high, 0)
    span = top - low
    refused = (odd > 0) | ((span < float("inf")) == 0)
    exponent = span.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    scale = (0x7FE0000000000000 - exponent).to(tl.float64, bitcast=True)  # a power of two: the range is in [1, 2)
    scale = tl.where((span > 0) & (refused == 0), scale, 1.0)
    # Moments of each program about its own mean, and those of the means.
    shift = tl.load(at + 6, mask=there, other=0.0) / tl.where(there, count, 1.0)
    inner = tl.load(at + 7, mask=there, other=0.0) - count * shift * shift
    own = (tl.load(at + 5, mask=there, other=0.0) - top) * scale + shift * scale
    mean = tl.sum(tl.where(there, count * own, 0.0), 0) / n
    apart = tl.where(there, own - mean, 0.0)
    variance = tl.sum(tl.maximum(inner, 0.0) * scale * scale + count * apart * apart, 0) / n
    share = tl.sum(tl.where(high == top, tied, 0.0), 0) / n
    return refused, top, low, scale, span * scale, mean, variance, share


@triton.jit
def sampled(z, here, parts, n, top, scale, SAMPLE: tl.constexpr, PARTS: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a sample of d and the share of the row that each of its losses stands for.

    Of its first half, a loss at equal distances, those up to a cut stand for all others up to it. Above the cut, the
    mean of the peaks, the peaks stand for what is there. How much that is the first half tells, if it has enough of
    it; if not: of the parts of a row in no order ``exp(-m)`` have no loss above the cut where they have m on average.
    """
    HALF: tl.constexpr = SAMPLE // 2
    i = tl.arange(0, SAMPLE)
    step = n // HALF
    plain, count = i < HALF, parts * _PEAKS
    peak = (i >= HALF) & (i < HALF + count)
    x = tl.load(row_of(z, n, ALIGNED) + i.to(tl.int64) * step + step // 2, mask=plain, other=0.0).to(tl.float64)
    x = tl.where(plain, x, tl.load(peaks_at(here, parts) + (i - HALF), mask=peak, other=0.0))
    d = tl.where(plain | peak, (x - top) * scale, 0.0)
    cut = tl.sum(tl.where(peak, d, 0.0), 0) / count
    over = peak & (d > cut)
    number = tl.sum(over.to(tl.float64), 0)
    some = (number > 0) & (number < count)
    mass = tl.minimum(-tl.log(tl.where(some, 1.0 - number / count, 1.0)) * count / n, 0.5)
    seen = tl.sum((plain & (d > cut)).to(tl.float64), 0)
    mass = tl.where(some & (seen >= 16), seen / HALF, mass)
    under = plain & (d <= tl.where(some, cut, 0.0))
    each = (1.0 - mass) / tl.maximum(tl.sum(under.to(tl.float64), 0), 1.0)
    return d, tl.where(under, each, tl.where(over, mass / tl.maximum(number, 1.0), 0.0))


# --- answers ----------------------------------------------------------------------------------------------------------


@triton.jit
def write_field(fields, field: tl.constexpr, value, certain):
    """Write a field of this program's row, ``[fields, rows]``: NaN where nothing is certain."""
    at = fields + field * tl.num_programs(1) + tl.program_id(1)
    tl.store(at, tl.where(certain, value, float("nan")).to(fields.dtype.element_ty))


@triton.jit
def reweigh(weights, failed, n, factor, added, certain, ROWS: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """Multiply the stored weights by a factor and add a number to each, where that changes them.

    Where nothing is certain they are NaN, and ``failed`` is one.
    """
    factor = tl.where(certain, factor, float("nan"))
    if failed is not None:
        tl.store(failed, 1, mask=certain == 0)
    if (factor != 1.0) | (added != 0.0):
        row, lanes, TILE = row_of(weights, n, ALIGNED), places(ROWS, LANES), ROWS * LANES
        for tile in range(tl.program_id(0), tl.cdiv(n, TILE), tl.num_programs(0)):
            x, _ = load_tile(row, tile, n, factor, lanes, TILE)
            store_tile(row, tile, n, x.to(tl.float64) * factor + added, lanes, TILE)
