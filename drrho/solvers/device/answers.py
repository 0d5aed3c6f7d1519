"""Answers of rows on the device: the ends of a parameter's range, and weights that lie in the ball."""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from drrho.solvers.device.tiles import EPS, INFINITY, depth, mass, places, store


class Answer(NamedTuple):
    """What solves rows, ``[rows]``, in units of d.

    ``gain`` and ``dual`` are by how much the primal and the dual value exceed the mean; ``slope`` is d value / d
    alpha; ``highest`` says that the value is the maximum itself, but for what is paid; ``exactly`` is the threshold in
    units of the losses, NaN where that is to be computed; ``failed`` says that the row is to be solved otherwise.
    """

    gain: Any
    dual: Any
    threshold: Any
    strength: Any
    distance: Any
    slope: Any
    highest: Any
    exactly: Any
    failed: Any


@triton.jit
def answer_of(gain, dual, threshold, strength, distance, failed):
    """Return an answer without what only the maximum and divergences with an alpha have."""
    nothing = gain * 0
    return Answer(gain, dual, threshold, strength, distance, nothing, nothing, nothing + float("nan"), failed)


@triton.jit
def with_ends(answer, row, hard, flat, largest):
    """Return the answer with rows that are at their maximum, D ``largest``, or flat, at their base weights."""
    zero = tl.zeros_like(answer.gain)
    end = hard | flat
    return Answer(
        tl.where(end, tl.where(hard, -row.mean, 0.0), answer.gain),
        tl.where(end, tl.where(hard, -row.mean, 0.0), answer.dual),
        tl.where(end, tl.where(hard, 0.0, row.mean), answer.threshold),
        tl.where(end, tl.where(hard, 0.0, INFINITY), answer.strength),
        tl.where(end, tl.where(hard, largest, 0.0), answer.distance),
        tl.where(end, zero, answer.slope),
        tl.where(end, tl.where(hard, 1.0, 0.0), answer.highest),
        tl.where(end, float("nan"), answer.exactly),
        tl.where(end, 0, answer.failed),
    )


@triton.jit
def chosen_of(where, one, other):
    """Return one answer where that is said, and the other elsewhere."""
    return Answer(
        tl.where(where, one.gain, other.gain),
        tl.where(where, one.dual, other.dual),
        tl.where(where, one.threshold, other.threshold),
        tl.where(where, one.strength, other.strength),
        tl.where(where, one.distance, other.distance),
        tl.where(where, one.slope, other.slope),
        tl.where(where, one.highest, other.highest),
        tl.where(where, one.exactly, other.exactly),
        tl.where(where, one.failed, other.failed),
    )


@triton.jit
def store_ties(row, hard, TILE: tl.constexpr):
    """Store the weights of rows at their maximum: the base weights restricted to the ties."""
    if tl.max(hard.to(tl.int32), 0) > 0:
        each = 1 / (row.share * row.all)
        for begin in range(0, row.n, TILE):
            i = places(begin, TILE)
            store(row, i, tl.where(depth(row, i) == 0, mass(row, i) * each[:, None], 0.0), hard)


@triton.jit
def _reweigh(row, factor, added, rate, center, chosen, TILE: tl.constexpr):
    """Multiply stored weights of chosen rows by a factor, and add a multiple of the base weights.

    With a small rate, the factor is times ``exp(rate (d - center))``, to second order.
    """
    tl.debug_barrier()  # so that what others have stored is there
    for begin in range(0, row.n, TILE):
        i = places(begin, TILE)
        weights = tl.load(row.weights + i, mask=i < row.n, other=0.0).to(tl.float64)
        if rate is not None:
            u = (depth(row, i) - center[:, None]) * rate[:, None]
            weights += weights * (u + 0.5 * u * u)
        store(row, i, weights * factor[:, None] + mass(row, i) * added[:, None], chosen)


@triton.jit
def into_ball(row, answer, radius, total, rate, center, chosen, TILE: tl.constexpr, BALL: tl.constexpr):
    """Make the stored weights of chosen rows sum to one and lie in the ball; return what answer they give.

    Rounding may have left D outside: it is convex, and zero at the base weights, with the slope ``gain / strength``
    towards them, which no more than a little of them needs. A rate, where it is given, is one of `_reweigh`.
    """
    UNFELT: tl.constexpr = 2.0**-50 if row.weights.dtype.element_ty == tl.float64 else 2.0**-25
    gain, distance, kept = answer.gain, answer.distance, tl.zeros_like(answer.gain) + 1
    if BALL:
        outside = distance > radius * (1 + 2 * EPS)
        excess = distance - radius
        lost = tl.where(excess < 1e-9 * radius, 1.001 * excess * answer.strength / gain, 1.0)
        kept = tl.where(outside, 1 - tl.minimum(excess / distance, lost), 1.0)
        gain, distance = gain * kept, tl.where(outside, radius, distance)
    # By weak duality, what exceeds the bound does so by the rounding of D at the weights.
    above = (gain > answer.dual) & (gain - answer.dual <= 1e-11 * gain)
    if BALL:
        kept = tl.where(above, kept * (answer.dual / gain), kept)
    gain = tl.where(above, answer.dual, gain)
    changed = chosen & ((tl.abs(total - 1) > UNFELT) | (1 - kept > UNFELT))
    if rate is not None:
        changed = changed | (chosen & (rate != 0))
    if tl.max(changed.to(tl.int32), 0) > 0:
        _reweigh(row, kept / total, (1 - kept) / row.all, rate, center, changed, TILE)
    return Answer(
        gain,
        answer.dual,
        answer.threshold,
        answer.strength,
        distance,
        answer.slope,
        answer.highest,
        answer.exactly,
        answer.failed,
    )


@triton.jit
def tolerated(row, radius):
    """Return how near log D has to be to its own: narrow rows get answers with digits to spare, as others do."""
    LEAST: tl.constexpr = 450 * 2.0**-52 if row.z.dtype.element_ty == tl.float64 else 1e-8
    return 1 / tl.maximum(tl.sqrt(radius), 1e-3) * (4 * EPS) + LEAST


@triton.jit
def fill(row, value, chosen, TILE: tl.constexpr):
    """Store one number as all weights of chosen rows."""
    for begin in range(0, row.n, TILE):
        i = places(begin, TILE)
        store(row, i, tl.zeros_like(depth(row, i)) + value, chosen)
