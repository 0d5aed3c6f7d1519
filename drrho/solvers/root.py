"""Roots of many decreasing functions at once, one per row, by safeguarded Newton.

A divergence gives a function of ``x`` ``[rows]`` that says how far each row is from its root and where Newton's
method would go; here it is decided whether that is believed. The functions may have plateaus, where a flat slope
must not throw x out of reach, and rounding near the root can let Newton creep, while halving a bracket cannot.

The iteration ends. While a side of the bracket is open, a step that is not trusted goes a fixed length to that side,
so that the other bound, or an end of what x may be, is met after finitely many. Once both bounds are known, let w be
their distance and e the distance at which they count as one. Every second step that is not trusted halves the bracket,
which can happen ``log2(w / e)`` times. Between two of these, a trusted step is at most half as long as the one before
the last (the rule of Dekker and Brent), so that after ``2 log2(w / e)`` of them in a row a step is shorter than e: it
meets the root to rounding, or leaves the bracket and is not trusted. So there are at most about ``4 log2(w / e)^2``
passes; where Newton's method converges, it is followed, and the error squares. A limit on the passes, far below that
bound, is set by the caller; what is found within it is judged by its certificate (``certificate.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from drrho.solvers.rows import some

EPS = float(np.finfo(np.float64).eps)
_SQUARED = 1e-9  # a residual whose square is far within any tolerance here, whatever the curvature


class Residual(NamedTuple):
    """A function at x, ``[rows]`` each: its value, positive below the root, and Newton's step, NaN where unknown.

    Rows that are not ``ready``, because their value is not known yet, stay where they are.
    """

    value: np.ndarray
    step: np.ndarray
    ready: np.ndarray | bool = True


class Root(NamedTuple):
    """Where an iteration ended, ``[rows]`` each; ``saturated`` marks rows at an end of what x may be."""

    x: np.ndarray
    saturated: np.ndarray


class Bracket:
    """What bounds a root from below and above, row by row."""

    def __init__(self, low: np.ndarray, high: np.ndarray) -> None:
        self.low, self.high = low, high

    @classmethod
    def open(cls, size: int) -> Bracket:
        """Return a bracket of all numbers."""
        return cls(np.full(size, -np.inf), np.full(size, np.inf))

    def narrow(self, x: np.ndarray, below: np.ndarray, above: np.ndarray) -> None:
        """Take x for a bound where it lies below the root, or above it, and is closer than the bound known."""
        self.low = np.where(below, np.maximum(self.low, x), self.low)
        self.high = np.where(above, np.minimum(self.high, x), self.high)

    def contains(self, x: np.ndarray) -> np.ndarray:
        """Return whether x lies strictly inside."""
        return (x > self.low) & (x < self.high)

    def collapsed(self, size: np.ndarray) -> np.ndarray:
        """Return whether there is hardly a number left inside, for numbers of the given size."""
        return self.high - self.low <= 4 * EPS * size

    def halved(self, x: np.ndarray, below: np.ndarray, longest: float) -> np.ndarray:
        """Return the middle, or the longest step from x towards the root while a side is open."""
        away = np.where(below, x + longest, x - longest)
        return np.where(np.isfinite(self.low + self.high), (self.low + self.high) / 2, away)

    def on_chord(self, seen: list[tuple[np.ndarray, np.ndarray]], power: np.ndarray) -> np.ndarray:
        """Return where the line through both ends is zero, NaN unless both are among the x and values seen.

        Of the way there from the closer end a power is taken, 1/2 for between that and the whole way.
        """
        at_low = at_high = np.full(len(self.low), np.nan)
        for x, value in seen:
            at_low, at_high = np.where(x == self.low, value, at_low), np.where(x == self.high, value, at_high)
        way = at_low / (at_low - at_high)
        away = np.where(way < 0.5, way, 1 - way) ** power
        return self.low + (self.high - self.low) * np.where(way < 0.5, away, 1 - away)


class Safeguard(NamedTuple):
    """How Newton's method is kept from harm.

    ``ends`` are the least and largest x allowed; ``longest`` bounds a step, that down and that up; after
    ``newton_iterations`` the bracket is halved. ``failure`` is what is raised if there is no root after
    ``iterations``; None: x is returned as it is then, for a start of another iteration.
    """

    tolerance: np.ndarray
    iterations: int
    failure: str | None
    newton_iterations: int
    longest: tuple[float, float]
    ends: tuple[float, float] = (-np.inf, np.inf)


def find_root(
    function: Callable[[np.ndarray], Residual],
    x: np.ndarray,
    bracket: Bracket,
    guard: Safeguard,
    *,
    finish: Callable[[np.ndarray, np.ndarray], None] | None = None,
    follow: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None = None,
    from_above: bool = False,
) -> Root:
    """Find x where a function that decreases in x is zero to the tolerance, or where no number is closer.

    Parameters
    ----------
    function
        Takes x to a `Residual`. It may keep what else it computes: its last call is at the x returned, unless
        ``finish`` has moved it.
    x, bracket
        Where to start, and what is known to bound the root, which is narrowed in place.
    finish
        For a function that can follow a small step without another pass over the losses: called with the last step
        and the rows that need none, once all others are so close that the step squares an error that is tiny already.
    follow
        For a function with a state: called after each step with x before it, x after it, and the rows that take it.
    from_above
        Whether, where no number meets the tolerance, the one just above the root is wanted.

    Raises
    ------
    RuntimeError
        With ``guard.failure``.
    """
    (down, up), (least, largest) = guard.longest, guard.ends
    last = before = np.full(len(x), np.inf)  # the sizes of the last two steps
    fallen = np.zeros(len(x), dtype=int)  # how often Newton was not trusted
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    for iteration in range(guard.iterations):
        value, step, ready = function(x)
        below, above = (value > 0) & ready, (value <= 0) & ready
        bracket.narrow(x, below, above)
        seen.append((x, value))
        saturated = ((x <= least) | (x >= largest)) & ready
        reached = np.abs(value) <= guard.tolerance
        done = (reached | bracket.collapsed(np.maximum(np.abs(x), 1))) & ready | saturated
        if not some(~done):
            between = below & ~reached & np.isfinite(bracket.high)
            if from_above and some(between):
                x = np.where(between, bracket.high, x)
                function(x)
            return Root(x, saturated)
        newton = x + step
        inside = bracket.contains(newton)
        if finish is not None and not some(~(done | (np.abs(value) <= _SQUARED) & inside)):
            last = np.where(done, 0.0, newton - x)
            finish(last, done)
            return Root(x + last, saturated)
        if iteration + 1 == guard.iterations:
            break
        trusted = inside & (step >= -down) & (step <= up) & (iteration < guard.newton_iterations)
        trusted &= (2 * np.abs(step) <= before) | ~np.isfinite(bracket.low + bracket.high)
        following = newton
        if some(~trusted):
            following = np.where(trusted, newton, bracket.halved(x, below, up))
            # In turns with the middle, the chord: it finds a root close to an end, as next to a plateau.
            fallen = fallen + (~trusted & ready)
            chord = bracket.on_chord(seen, np.where(fallen % 4 == 1, 1.0, 0.3))
            following = np.where(~trusted & bracket.contains(chord) & (fallen % 2 == 1), chord, following)
        following = np.minimum(np.maximum(following, least), largest)
        moved = ready & ~done
        last, before = np.where(moved, np.abs(following - x), last), np.where(moved, last, before)
        if follow is not None:
            follow(x, following, moved)
        x = np.where(moved, following, x)
    if guard.failure is not None:
        raise RuntimeError(guard.failure)
    return Root(x, np.zeros(len(x), dtype=bool))
