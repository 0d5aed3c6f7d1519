"""Triton kernels over a tile of the similarity matrix: one pass for the sums of both directions, one for the weights.

A tile ``x`` ``[height, width]`` holds similarities of some image anchors (rows) with some text anchors (columns), its
rows ``pitch`` entries apart, a multiple of 16. Row i's positive is in column ``i + offset``, which may lie outside.
Exponents are ``x_ij rate_i`` in the direction of the rows and ``x_ij rate_j`` in that of the columns. Sums are kept
relative to their largest exponent, as ``(top, sum exp(y - top), sum (y - top) exp(y - top))``, so that they neither
overflow nor vanish at any temperature, and no bound of the exponents has to be known.

Nothing is added by atomic operations: every program writes its part, and parts are added in a fixed order.
"""

# pyright: reportArgumentType=false
# A constant of a kernel has the type of Triton's wrapper, and is passed as a number.

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_ROWS, BLOCK_COLUMNS = 64, 64
LEAST = tl.constexpr(1e-26)  # of a sum of exponentials relative to the largest, which is far from vanishing
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)  # exponentials are those of base 2
MERGED, PARTS = 64, 32  # anchors of a program that merges parts, and parts that it reads at a time
WARPS, REGISTERS = 8, 64  # of a program that reads a block, and of its threads: four programs to a processor

_COUNTS = ["across", "height", "width", "first_row", "first_column", "offset", "include_positive"]
_STRIDES = ["row_stride", "column_stride"]
VECTORS = ["row_rate_ptr", "column_rate_ptr", "row_log_ptr", "column_log_ptr", "by_row_ptr", "by_column_ptr"]  # views


@triton.jit
def _exponentials(d):
    """Return ``2^d`` and ``d 2^d``, which are 0 at minus infinity."""
    e = tl.exp2(d)
    return e, tl.maximum(d, -1e30) * e


@triton.jit
def _shifted(y, axis: tl.constexpr):
    """Return the largest exponents along the axis, and the sums relative to them."""
    top = tl.max(y, axis)
    base = tl.where(top == -float("inf"), 0.0, top)  # an anchor may have no negative in this block
    e, moments = _exponentials(y - tl.expand_dims(base, axis))
    return top, tl.sum(e, axis), tl.sum(moments, axis)


@triton.jit
def _entries(x_ptr, rows, columns, height, pitch):
    """Return pointers to a block, and which of them lie in memory; there are aligned rows, so that loads are wide."""
    held = (rows < height)[:, None] & (columns < pitch)[None, :]
    return x_ptr + rows.to(tl.int64)[:, None] * pitch + columns[None, :], held


@triton.jit
def _negatives(places, held, columns, width, own, excluded):
    """Return the similarities of a block, minus infinity where there are none, and in columns ``own`` if excluded."""
    x = tl.load(places, mask=held, other=-float("inf"))
    x = tl.where((columns < width)[None, :], x, -float("inf"))
    if excluded:
        x = tl.where(columns[None, :] == own[:, None], -float("inf"), x)
    return x


@triton.jit
def _store_parts(parts_ptr, slot, slots, place, size, top, total, moment):
    """Store sums of exponentials, whose exponents are of base 2, as those of base e."""
    at = parts_ptr + slot.to(tl.int64) * size + place
    plane = slots.to(tl.int64) * size
    tl.store(at, top * LN2, mask=place < size)
    tl.store(at + plane, total, mask=place < size)
    tl.store(at + 2 * plane, moment * LN2, mask=place < size)


@triton.jit(do_not_specialize=[*_COUNTS, *_STRIDES], do_not_specialize_on_alignment=VECTORS)
def sum_tile(
    x_ptr,
    parts_ptr,
    positive_ptr,
    row_rate_ptr,
    column_rate_ptr,
    across,
    pitch,
    height,
    width,
    first_row,
    first_column,
    offset,
    row_stride,
    column_stride,
    include_positive,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the parts of a block's sums, ``[3, blocks, height]`` and ``[3, blocks, width]``, and its positives.

    Where all anchors share one rate, both directions use the same exponentials, relative to the largest of the block,
    unless those of some anchor vanish.
    """
    j, i = tl.program_id(0) % across, tl.program_id(0) // across
    rows, columns = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    own = rows + offset  # columns of the positives
    here = (own >= j * COLUMNS) & (own < (j + 1) * COLUMNS) & (own < width) & (rows < height)
    positive = tl.load(x_ptr + rows.to(tl.int64) * pitch + own, mask=here, other=0.0)
    tl.store(positive_ptr + first_row + rows, positive, mask=here)
    first = i * ROWS + offset
    excluded = (include_positive == 0) & (first < (j + 1) * COLUMNS) & (first + ROWS > j * COLUMNS)
    places, held = _entries(x_ptr, rows, columns, height, pitch)
    x = _negatives(places, held, columns, width, own, excluded)
    down = tl.num_programs(0) // across
    column_parts = parts_ptr + 3 * across.to(tl.int64) * height
    rate = tl.load(row_rate_ptr + first_row * row_stride)
    done = (row_stride == 0) & (column_stride == 0) & (rate == tl.load(column_rate_ptr))
    if done:
        highest = tl.max(x)  # of a block that holds nothing but an excluded positive, -inf
        base = tl.where(highest == -float("inf"), 0.0, highest) * (rate * LOG2E)
        e, moments = _exponentials(x * (rate * LOG2E) - base)
        by_row, row_moment = tl.sum(e, 1), tl.sum(moments, 1)
        by_column, column_moment = tl.sum(e, 0), tl.sum(moments, 0)
        row_least = tl.min(tl.where(rows < height, by_row, 1.0))
        done = tl.minimum(row_least, tl.min(tl.where(columns < width, by_column, 1.0))) > LEAST
        if done:
            top = tl.zeros_like(by_row) + base
            _store_parts(parts_ptr, j, across, rows, height, top, by_row, row_moment)
            top = tl.zeros_like(by_column) + base
            _store_parts(column_parts, i, down, columns, width, top, by_column, column_moment)
    if done == 0:  # similarities are read again, so that they take no registers in the other branch
        x = _negatives(places, held, columns, width, own, excluded)
        rates = tl.load(row_rate_ptr + (first_row + rows) * row_stride, mask=rows < height, other=1.0) * LOG2E
        top, total, moment = _shifted(x * rates[:, None], 1)
        _store_parts(parts_ptr, j, across, rows, height, top, total, moment)
        rates = tl.load(column_rate_ptr + (first_column + columns) * column_stride, mask=columns < width, other=1.0)
        top, total, moment = _shifted(x * (rates * LOG2E)[None, :], 0)
        _store_parts(column_parts, i, down, columns, width, top, total, moment)


@triton.jit(do_not_specialize=["height", "width", "row_slots", "column_slots", "first_row", "first_column", "anchors"])
def merge_parts(
    parts_ptr,
    totals_ptr,
    height,
    width,
    row_slots,
    column_slots,
    first_row,
    first_column,
    anchors,
    MERGED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add the parts of a tile to the totals ``[3, anchors]`` of all rows and columns, in float64."""
    program, row_programs = tl.program_id(0), tl.cdiv(height, MERGED)
    size, slots, first = height, row_slots, first_row
    if program >= row_programs:
        parts_ptr += 3 * row_slots.to(tl.int64) * height
        program -= row_programs
        size, slots, first = width, column_slots, first_column
    place = program * MERGED + tl.arange(0, MERGED)
    inside = place < size
    totals_ptr += first + place
    top = tl.load(totals_ptr, mask=inside, other=-float("inf")).to(tl.float32)
    total = tl.load(totals_ptr + anchors, mask=inside, other=0.0)
    moment = tl.load(totals_ptr + 2 * anchors, mask=inside, other=0.0)
    plane = slots.to(tl.int64) * size
    slot = 0  # a while loop, since the interpreter of Triton 3.6 takes no range over an argument
    while slot < slots:
        slot_of = slot + tl.arange(0, PARTS)
        at = parts_ptr + slot_of.to(tl.int64)[:, None] * size + place[None, :]
        mask = (slot_of < slots)[:, None] & inside[None, :]
        tops = tl.load(at, mask=mask, other=-float("inf"))
        sums = tl.load(at + plane, mask=mask, other=0.0)
        moments = tl.load(at + 2 * plane, mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        moved, all_moved = top - base, tops - base[None, :]
        kept, all_kept = tl.exp(moved), tl.exp(all_moved)
        moment = kept * (moment + tl.where(kept > 0, moved, 0.0) * total)
        moment += tl.sum((all_kept * (moments + tl.where(all_kept > 0, all_moved, 0.0) * sums)).to(tl.float64), 0)
        total = kept * total + tl.sum((all_kept * sums).to(tl.float64), 0)
        top = higher
        slot += PARTS
    tl.store(totals_ptr, top.to(tl.float64), mask=inside)
    tl.store(totals_ptr + anchors, total, mask=inside)
    tl.store(totals_ptr + 2 * anchors, moment, mask=inside)


@triton.jit(
    do_not_specialize=["count", "first", "anchors", "log_negatives", *_STRIDES], do_not_specialize_on_alignment=VECTORS
)
def finish_totals(
    totals_ptr,
    out_ptr,
    positive_ptr,
    row_rate_ptr,
    column_rate_ptr,
    count,
    first,
    anchors,
    log_negatives,
    row_stride,
    column_stride,
    MERGED: tl.constexpr,
):
    """Write log sums, log means of exp(l / tau) and mean exponents, ``[3, 2, count]``, of a rank's own anchors."""
    side = tl.program_id(0) % 2  # 0: images, 1: texts
    place = tl.program_id(0) // 2 * MERGED + tl.arange(0, MERGED)
    inside = place < count
    positive = tl.load(positive_ptr + place, mask=inside, other=0.0).to(tl.float64)
    row_rate = tl.load(row_rate_ptr + place * row_stride, mask=inside & (side == 0), other=0.0)
    column_rate = tl.load(column_rate_ptr + (first + place) * column_stride, mask=inside & (side == 1), other=0.0)
    positive *= row_rate + column_rate
    totals_ptr += place + side * (count + first)
    top = tl.load(totals_ptr, mask=inside, other=0.0)
    total = tl.load(totals_ptr + anchors, mask=inside, other=1.0)
    moment = tl.load(totals_ptr + 2 * anchors, mask=inside, other=0.0)
    log_sum = top + tl.log(total)
    out_ptr += side * count + place
    tl.store(out_ptr, log_sum.to(tl.float32), mask=inside)
    tl.store(out_ptr + 2 * count, (log_sum - positive - log_negatives).to(tl.float32), mask=inside)
    tl.store(out_ptr + 4 * count, (top + moment / total - positive).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=[*_COUNTS, *_STRIDES], do_not_specialize_on_alignment=VECTORS)
def weigh_tile(
    x_ptr,
    weights_ptr,
    row_log_ptr,
    column_log_ptr,
    by_row_ptr,
    by_column_ptr,
    row_rate_ptr,
    column_rate_ptr,
    across,
    pitch,
    height,
    width,
    first_row,
    first_column,
    offset,
    row_stride,
    column_stride,
    include_positive,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write the gradient with respect to the similarities, in their place or as ``[2, height, pitch]`` in bfloat16.

    Given are the gradients with respect to the log means of exp(l / tau), and the log sums of rows and columns. The two
    bfloat16 parts of a weight, rounded and the rest, add up to it within 2^-17 of it.
    """
    j, i = tl.program_id(0) % across, tl.program_id(0) // across
    rows, columns = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    places, held = _entries(x_ptr, rows, columns, height, pitch)
    x = tl.load(places, mask=held, other=0.0)
    at, valid = first_row + rows, rows < height
    rate = tl.load(row_rate_ptr + at * row_stride, mask=valid, other=0.0)
    by_row = tl.load(by_row_ptr + at, mask=valid, other=0.0) * rate
    log = tl.load(row_log_ptr + at, mask=valid, other=0.0) * LOG2E
    weights = by_row[:, None] * tl.exp2(x * (rate * LOG2E)[:, None] - log[:, None])
    at, valid = first_column + columns, columns < width
    rate = tl.load(column_rate_ptr + at * column_stride, mask=valid, other=0.0)
    by_column = tl.load(by_column_ptr + at, mask=valid, other=0.0) * rate
    log = tl.load(column_log_ptr + at, mask=valid, other=0.0) * LOG2E
    weights += by_column[None, :] * tl.exp2(x * (rate * LOG2E)[None, :] - log[None, :])
    first = i * ROWS + offset
    if (first < (j + 1) * COLUMNS) & (first + ROWS > j * COLUMNS):
        own = (rows + offset)[:, None] == columns[None, :]
        at_positive = tl.where(include_positive == 0, 0.0, weights) - (by_row[:, None] + by_column[None, :])
        weights = tl.where(own, at_positive, weights)
    places, held = _entries(weights_ptr, rows, columns, height, pitch)
    if SPLIT:
        high = weights.to(tl.bfloat16)
        tl.store(places, high, mask=held)
        tl.store(places + height.to(tl.int64) * pitch, (weights - high.to(tl.float32)).to(tl.bfloat16), mask=held)
    else:
        tl.store(places, weights, mask=held)
