"""Short rows on the device: one program solves some rows or one, with its whole iteration, and stores the answer."""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drrho.solvers.device.answers import answer_of, chosen_of, fill
from drrho.solvers.device.chi_square import chi_square
from drrho.solvers.device.kl import kl, lies_outside
from drrho.solvers.device.launch import launch
from drrho.solvers.device.powers import GENERAL, form_of, powers
from drrho.solvers.device.tail import tail_mean, total_variation
from drrho.solvers.device.tiles import EPS, INFINITY, Row, look

FIELDS = 8  # value, premium, threshold, strength, gap, distance, alpha_slope, on_ball
_REGISTERS = 128  # of a thread, so that sixteen warps run at a time: the rest of an iteration waits for itself
_CHI_SQUARE = tl.constexpr(0)
_KL = tl.constexpr(1)
_TAIL = tl.constexpr(2)
_TOTAL_VARIATION = tl.constexpr(3)
_POWER = tl.constexpr(5)  # and from there on one for each form of powers


@triton.jit
def _parameter(pointer, index, good):
    """Return a radius or strength of rows, and which of them can be solved."""
    value = tl.load(pointer + index)
    return value, good & (value >= 0) & (value < INFINITY)


@triton.jit
def _solved(row, order, radius, price, chosen, KIND: tl.constexpr, TILE: tl.constexpr, BALL: tl.constexpr):
    if KIND == _CHI_SQUARE:
        answer = chi_square(row, radius, price, chosen, TILE, BALL)
    elif KIND == _KL:
        answer = kl(row, radius, price, chosen, TILE, BALL)
    elif KIND == _TOTAL_VARIATION:
        answer = total_variation(row, radius, price, chosen, TILE, BALL)
    else:
        answer = powers(row, order + tl.zeros_like(row.mean), radius, price, chosen, TILE, KIND - _POWER, BALL)
    return answer


@triton.jit
def _answered(row, radius, strength, alpha, order, index, good, KIND: tl.constexpr, TILE: tl.constexpr):
    """Return the answer, which rows can be solved, the price in units of losses, what was paid, and on_ball."""
    zero = tl.zeros_like(row.mean)
    on_ball, r, s, paid = zero + 1, zero, zero, zero
    if radius is not None:
        r, good = _parameter(radius, index, good)
    if strength is not None:
        s, good = _parameter(strength, index, good)
        on_ball = zero
    price = s * row.scale
    if KIND == _TAIL:
        a = zero + order if alpha is None else tl.load(alpha + index)
        good = good & (a > 0) & (a <= 1)
        answer = tail_mean(row, a, good, TILE)
    elif strength is None:
        answer = _solved(row, order, r, price, good, KIND, TILE, True)
    else:
        far = good & ~good
        if KIND == _KL:
            if radius is not None:
                far = good & lies_outside(row, r, price, good, TILE)
        answer = answer_of(zero, zero, zero, zero, zero, zero.to(tl.int32))
        if tl.max((~far).to(tl.int32), 0) > 0:
            answer = _solved(row, order, r, price, good & ~far, KIND, TILE, False)
        if radius is not None:
            outside = good & (far | (answer.distance > r))
            if tl.max(outside.to(tl.int32), 0) > 0:
                ball = _solved(row, order, r, price, outside, KIND, TILE, True)
                answer = chosen_of(outside, ball, answer)
            on_ball = outside.to(tl.float64)
            paid = tl.where(outside, price * answer.distance, 0.0)
    return answer, good, s, paid, on_ball


@triton.jit
def _store_fields(
    fields, step, row, answer, certified, strength, paid, on_ball, GIVEN: tl.constexpr, KIND: tl.constexpr
):
    """Store what `Solution` holds beside the weights; NaN where there is no certified answer."""
    out = fields.dtype.element_ty
    scale = 1 / row.scale
    unknown = tl.where(certified, 0.0, float("nan"))
    highest = (answer.highest != 0) & ((on_ball != 0) | (strength == 0) | (KIND == _TAIL))
    highest = highest | (row.range == 0)
    premium = (answer.gain - paid) * scale + unknown
    value = tl.where(highest, -paid, row.mean + (answer.gain - paid)) * scale
    threshold = tl.where(answer.exactly == answer.exactly, answer.exactly, row.top + answer.threshold * scale)
    multiplier = answer.strength * scale
    if GIVEN:
        multiplier = tl.where((on_ball == 0) | (KIND == _TAIL), strength, multiplier)
    gap = tl.where(answer.strength == INFINITY, 0.0, answer.dual - answer.gain) * scale
    tl.store(fields, (row.top + value + unknown).to(out))
    tl.store(fields + step, premium.to(out))
    tl.store(fields + 2 * step, (threshold + unknown).to(out))
    tl.store(fields + 3 * step, (multiplier + unknown).to(out))
    tl.store(fields + 4 * step, (gap + unknown).to(out))
    tl.store(fields + 5 * step, (answer.distance + unknown).to(out))
    tl.store(fields + 6 * step, (answer.slope * scale + unknown).to(out))
    tl.store(fields + 7 * step, (on_ball + unknown).to(out))


@triton.jit(do_not_specialize=["count"])
def _solve_rows(
    z,
    base,
    radius,
    strength,
    alpha,
    weights,
    fields,
    failed,
    count,
    n,
    base_stride,
    order: tl.float64,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    # The last program may solve its last row several times, and stores the same.
    index = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), count - 1)
    at = index.to(tl.int64)[:, None]
    q = None if base is None else base + at * base_stride
    first, top, low, scale, span, all, mean, variance, share, good = look(z + at * n, q, n, ROWS, TILE)
    row = Row(z + at * n, q, weights + at * n, n, first, top, low, scale, span, all, mean, variance, share)
    answer, good, s, paid, on_ball = _answered(row, radius, strength, alpha, order, index, good, KIND, TILE)
    gap = tl.where(answer.strength == INFINITY, 0.0, answer.dual - answer.gain)
    CLOSE: tl.constexpr = 1e-9 if z.dtype.element_ty == tl.float64 else 1e-7
    certified = tl.abs(gap) <= tl.abs(answer.gain) * CLOSE + row.range * (64 * EPS)
    certified = certified & good & (answer.failed == 0)
    step = count.to(tl.int64)
    _store_fields(fields + index, step, row, answer, certified, s, paid, on_ball, strength is not None, KIND)
    if tl.min(certified.to(tl.int32), 0) == 0:
        fill(row, float("nan"), ~certified, TILE)
        tl.store(failed, 1)


def _shape(rows: int, n: int) -> tuple[int, int, int]:
    """Return rows and tile of a program, and its warps.

    The iteration's own arithmetic is done by every warp of a program, so that few of them do more rows at a time;
    more where there are too few rows for all processors.
    """
    many = rows >= 1024
    if n <= 64 or (many and n <= 256):
        return 4, 32, 1
    if many and n <= 2048:
        return 2, 64, 1
    for warps in (1, 2, 4):
        if n <= (4096 if many else 256) * warps**2:
            return 1, 128 * warps, warps
    return 1, 1024, 8


def solve_rows(
    z: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
    failed: Tensor,
    kernel: int,
    order: float,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on rows ``[rows, n]``, or one ``[n]``; return weights and fields ``[FIELDS, rows]``.

    Parameters are float64. ``order`` is that of a power, or the tail fraction where there is no ``alpha``. Rows that
    are not solved, or refused, are NaN, and ``failed`` is one then.
    """
    rows, n = z.shape if z.ndim == 2 else (1, len(z))
    answer = torch.float64 if z.dtype == torch.float64 else torch.float32
    weights = torch.empty_like(z, dtype=answer)
    fields = weights.new_empty((FIELDS, *z.shape[:-1]))
    together, tile, warps = _shape(rows, n)
    stride = 0 if base is None or len(base) == 1 else n
    kind = kernel + form_of(order) if kernel == _POWER.value else kernel
    arguments = (z, base, radius, strength, alpha, weights, fields, failed, rows, n, stride, order)
    is_light = answer == torch.float32 and kind < _POWER.value + GENERAL.value
    launch(
        _solve_rows, -(-rows // together), arguments, (kind, together, tile), warps, _REGISTERS if is_light else None
    )
    return weights, fields
