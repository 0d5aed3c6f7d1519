"""Roots on the device: the safeguarded Newton of ``kernels.h`` for a function that decreases in x, of several rows."""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from drrho.solvers.device.tiles import EPS, INFINITY

FOUND = tl.constexpr(0)  # x is the root, and was not moved
AGAIN = tl.constexpr(1)
LAST = tl.constexpr(2)  # x was moved to the root, where the function is not known yet
LOST = tl.constexpr(3)


class Limits(NamedTuple):
    """What a search may do: numbers, or ``[rows]``.

    ``close`` is the error of x after which a step is the last, 0 where the function is wanted at the root; with
    ``from_above``, the number above is wanted where none meets the tolerance.
    """

    tolerance: Any
    close: Any
    iterations: Any
    newton_iterations: Any
    longest_down: Any
    longest_up: Any
    least: Any
    largest: Any
    from_above: Any


class Search(NamedTuple):
    """What is known of a root, ``[rows]``: its bracket, the last slope, and the curvature (NaN: unknown)."""

    low: Any
    high: Any
    at_low: Any
    at_high: Any
    last: Any
    before: Any
    curvature: Any
    x: Any
    slope: Any
    iteration: Any
    fallen: Any
    saturated: Any
    missed: Any


@triton.jit
def open_search(low, curvature):
    """Return a search that knows a lower bound, or minus infinity, and the curvature."""
    nothing = low * 0 + float("nan")
    none = tl.zeros_like(low).to(tl.int32)
    far = tl.zeros_like(low) + INFINITY
    return Search(low, far, nothing, nothing, far, far, curvature, nothing, nothing, none, none, none, none)


@triton.jit
def advance(search, limits, x, value, step):
    """Return the search, x and the state after a value at x, positive below the root, and Newton's step."""
    below, above = value > 0, value <= 0
    raised, lowered = below & (x >= search.low), above & (x <= search.high)
    low, at_low = tl.where(raised, x, search.low), tl.where(raised, value, search.at_low)
    high, at_high = tl.where(lowered, x, search.high), tl.where(lowered, value, search.at_high)
    saturated = (x <= limits.least) | (x >= limits.largest)
    reached = tl.abs(value) <= limits.tolerance
    bounded = (low > -INFINITY) & (high < INFINITY)
    collapsed = high - low <= tl.maximum(tl.abs(x), 1.0) * (4 * EPS)
    # Halley's step, if the curvature is known
    slope, size = -value / step, tl.abs(step)
    falls = (slope < 0) & (slope > -INFINITY)
    between = (slope - search.slope) / (x - search.x)
    curvature = tl.where(falls & (tl.abs(between) < INFINITY), between, search.curvature)
    factor = 1 + 0.5 * step * curvature / slope
    bends = falls & (factor > 0.5) & (factor < 2)
    bent = tl.where(bends, step / factor, step)
    error = size * size * tl.where(bends, tl.maximum(1e-3, size), 1.0)
    error = tl.where(bends, 0.1 * tl.abs(bent - step) + error, error)
    newton = x + bent
    inside = (newton > low) & (newton < high)
    ends = inside & ~saturated & ((error <= limits.close) | (reached & (limits.close > 0)))
    missed = ~reached & bounded & ~saturated
    lifted = missed & below & (limits.from_above != 0)
    iteration = search.iteration + 1
    state = tl.where(iteration >= limits.iterations, LOST, AGAIN)
    state = tl.where(reached | collapsed | saturated, tl.where(lifted, LAST, FOUND), state)
    state = tl.where(ends, LAST, state)
    # Every other time the chord, which finds a root close to an end, as next to a plateau
    trusted = inside & (bent >= -limits.longest_down) & (bent <= limits.longest_up)
    trusted = trusted & (iteration <= limits.newton_iterations) & ((2 * size <= search.before) | ~bounded)
    fallen = tl.where(trusted, search.fallen, search.fallen + 1)
    chord = low + (high - low) * (at_low / (at_low - at_high))
    by_chord = (fallen % 2 == 1) & (chord > low) & (chord < high)
    outward = tl.where(below, x + limits.longest_up, x - limits.longest_up)
    halved = tl.where(by_chord, chord, tl.where(bounded, 0.5 * low + 0.5 * high, outward))
    following = tl.where(trusted, newton, halved)
    following = tl.minimum(tl.maximum(following, limits.least), limits.largest)
    moved = tl.where(ends, newton, tl.where(state == LAST, high, tl.where(state == AGAIN, following, x)))
    search = Search(
        low,
        high,
        at_low,
        at_high,
        tl.abs(following - x),
        search.last,
        curvature,
        tl.where(falls, x, search.x),
        tl.where(falls, slope, search.slope),
        iteration,
        fallen,
        saturated.to(tl.int32),
        tl.where(ends, 0, missed.to(tl.int32)),
    )
    return search, moved, state
