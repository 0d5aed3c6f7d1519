"""Any strictly convex phi: safeguarded Newton on threshold and strength together, from phi* and its gradient.

The threshold is sought as the offset ``u = -threshold / strength``, the argument of phi* at the maximum, where phi*
is largest. For given strength the mean of the ratios ``phi*'(d / strength + u)`` increases in u, and for given u in
the strength, since ``d <= 0``: what bounds u from below at one strength bounds it at all smaller ones, and what
bounds it from above at all larger ones. Where phi* has a pole, u is moved on a logarithmic scale of its distance
from it, so that no step leaves the domain, and a u at which the maximum's ratio alone is too large is refused without
a pass over the losses.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from drrho.divergences import Divergence
from drrho.solvers.dual import BalancedPoint, Exponents, Found, MixedTilt
from drrho.solvers.root import EPS, Bracket, Residual, Root, Safeguard, find_root
from drrho.solvers.rows import Block, Rows, some

_ITERATIONS = 60  # passes over the losses
_SHORT, _RARE_ITERATIONS = 10_000, 400  # and over rows so short that a pass costs little, or next to plateaus
_LEAST_STEP, _LONGEST_STEP = 2.0, 64.0  # in log strength, while one side is open: doubled each time
_FLOOR = float(np.log(1e-290))
_TOLERANCE = 1e-13  # on log D
_BALANCED = 1e-7  # step of u, over its scale, whose square is an error of D's rounding
_MEAN = 64 * EPS  # by how much the ratios' mean may miss one where the next number is no closer
_MEAN_SLACK = 1e-15  # loss of a mean of two sides, over strength times radius, that is rounding
_HALVING = 5  # steps of u at one strength after which every other one halves the bracket
_FINE = 1e-2  # spread of (d - eta) / lambda below which differences are replaced by quadratures
_FINE_LONG = 3e-4  # the same on long rows, whose rounding averages out
_LINEAR = 0.1  # step of u, over its scale, beyond which the maximum's ratio is followed rather than its slope
_ROUNDS = 3  # of grids, on which it is followed
_EVENLY = np.linspace(0.0, 1.0, 65)
_ENDS = np.concatenate([[0.0], np.geomspace(1e-14, 0.4, 34)])
_ENDS = np.concatenate([_ENDS, 1 - _ENDS[::-1]])  # close to either end
_GRID = 64  # arguments of phi* tried at a time in the search for its pole


def generic_ball(divergence: Divergence, rows: Rows, radius: np.ndarray) -> Found:
    """Solve ``mean t = 1`` and ``D = radius`` for ``t = phi*'((d - threshold) / strength)``.

    Both are monotone: the mean in the threshold, and D, at the threshold that gives mean 1, in the strength, with
    ``d log D / d log strength = -mean(h) Var_h(s) / D``.
    """
    deviation = _deviation(rows)
    at_zero = float(divergence.curvature(torch.zeros(1, dtype=torch.float64))[0])
    x = np.log(deviation) + 0.5 * np.log((at_zero if 0 < at_zero < np.inf else 1.0) / (2 * radius))
    return _solve(divergence, rows, deviation, x, radius)


def generic_penalty(divergence: Divergence, rows: Rows, strength: np.ndarray) -> Found:
    """Solve ``mean t = 1`` for ``t = phi*'((d - threshold) / strength)``."""
    return _solve(divergence, rows, _deviation(rows), np.log(strength), None)


def _deviation(rows: Rows) -> np.ndarray:
    origin = rows.column(rows.mean_and_ties()[0])

    def spread_out(block: Block):
        y = block.d - origin
        return ((y, y),)

    return np.sqrt(rows.host_means(spread_out)[0])


def _solve(
    divergence: Divergence, rows: Rows, deviation: np.ndarray, x: np.ndarray, radius: np.ndarray | None
) -> Found:
    """Find ``x = log strength`` from where it is given, or leave it there: without a radius.

    A long row is solved as the few losses that it is condensed to, and as it is where its sums are not those.
    """
    condensed, end = rows.condensed(), pole_of(divergence)
    with np.errstate(all="ignore"):
        offset = np.minimum(-rows.mean_and_ties()[0] * np.exp(-x), 0.9 * end)

    def solved(
        part: Rows, x: np.ndarray, offset: np.ndarray, *, strictly: bool = False
    ) -> tuple[Found, np.ndarray, np.ndarray]:
        with np.errstate(all="ignore"):
            balance = _Balance(divergence, part, end, offset, deviation, radius, rows.count, strictly=strictly)
            x, saturated = balance.solve(x)
            return balance.found(saturated), x, balance.balanced_offset

    def improvable(x: np.ndarray, offset: np.ndarray) -> Found:
        found, x, offset = solved(rows, x, offset)
        return found._replace(better=lambda: solved(rows, x, offset, strictly=True)[0])

    if condensed is None:
        return improvable(x, offset)
    found, x, offset = solved(condensed, x, offset)
    return found._replace(better=lambda: improvable(x, offset), is_rough=True)


def pole_of(divergence: Divergence) -> float:
    """Return the largest number at which phi* is finite; infinity if that is 1024 or more, by a search on grids."""
    low, high = 0.0, 1024.0
    if bool(torch.isfinite(divergence.conjugate(torch.tensor([high], dtype=torch.float64)))):
        return np.inf
    grid = np.concatenate([[0.0], np.geomspace(2.0**-20, high, _GRID)])
    while True:
        finite = torch.isfinite(divergence.conjugate(torch.from_numpy(grid))).numpy()
        first = int(np.argmin(finite))  # the least that is outside
        if first == 0:
            return np.inf  # not even zero: phi* will be refused by its sums
        low, high = grid[first - 1], grid[first]
        if high - low <= 2 * EPS * high:
            return float(low)
        grid = np.linspace(low, high, _GRID)


class _Balance:
    """``log D - log radius`` as a function of x, log strength: known once the offset makes the ratios' mean one.

    Each call is one pass over the losses and a Newton step of the offset. A radius of None asks for the offset only.
    ``strictly`` asks for an offset that is known to balance the ratios, rather than for one that should: next to
    kinks of phi* Newton's steps promise more than they hold.
    """

    def __init__(
        self,
        divergence: Divergence,
        rows: Rows,
        end: float,
        offset: np.ndarray,
        deviation: np.ndarray,
        radius: np.ndarray | None,
        count: int,
        *,
        strictly: bool,
    ) -> None:
        self.divergence, self.rows, self.end, self.strictly = divergence, rows, end, strictly
        self.radius, self.deviation = radius, deviation
        self.share = rows.mean_and_ties()[1]
        self.at_zero = divergence.phi(torch.zeros(1, dtype=torch.float64)).numpy()
        #: On these losses, and on the ``count`` that they stand for, which get the answer.
        self.finest, self.finest_answer = (_FINE if n < 2**17 else _FINE_LONG for n in (rows.count, count))
        size = len(offset)
        self.offset = offset
        self.low, self.high = _Side.unknown(0.0, size), _Side.unknown(end, size)
        self.tries = np.zeros(size, dtype=int)  # at this strength
        self.missed = np.full(size, np.inf)  # by the mean at the last of them
        self.reach = np.full(size, _LEAST_STEP)
        #: What was balanced: last, closest to the radius, and next to it on the side of a larger and a smaller D.
        self.point = self.best = self.beyond = self.within = BalancedPoint.none(size)

    def solve(self, x: np.ndarray) -> Root:
        """Find the strength, or the offset at the strength given."""
        tolerance = np.full_like(x, _TOLERANCE)
        if self.radius is not None:
            tolerance += 4 * EPS / np.sqrt(np.maximum(self.radius, self.finest**2))
        iterations = _RARE_ITERATIONS if self.strictly or self.rows.count < _SHORT else _ITERATIONS
        guard = Safeguard(
            tolerance=tolerance,
            iterations=iterations,
            failure=None,  # the certificate decides
            newton_iterations=iterations,
            longest=(_LONGEST_STEP, _LONGEST_STEP),
            ends=(-np.inf if self.radius is None else _FLOOR, np.inf),
        )
        self._enter(np.exp(x))
        root = find_root(self, x, Bracket.open(len(x)), guard, follow=self.follow)
        # Where no strength is closer, as next to a jump, the last point is as good as the best
        unfinished = ~(np.abs(self.value) <= np.maximum(tolerance, 4 * np.abs(self.best.value)))
        unfinished &= np.abs(self.best.value) < np.inf
        if some(unfinished):
            self.point = self.best.where(unfinished, self.point)
        never = np.isnan(self.point.x)
        if some(never):
            self.point = self._here(root.x, self.distance).where(never, self.point)
        self.is_mean = (self._slack() < np.abs(self.point.value)) & (np.abs(self.point.value) > tolerance)
        # Where phi is infinite at zero, no strength is the maximum's: what underflows is as good
        return Root(self.point.x, root.saturated & np.isfinite(self.at_zero))

    def __call__(self, x: np.ndarray) -> Residual:
        strength = np.exp(x)
        self.fine = bool((self.deviation / strength < self.finest).any())
        moments = _moments(self.divergence, self.rows, self.offset, strength, fine=self.fine)
        self.tries += 1
        above = moments.surplus > 0
        self.low, self.high = self.low.moved(~above, self.offset, moments), self.high.moved(above, self.offset, moments)
        # Newton on log mean t, which is closer to a line than the mean
        step = -np.log1p(moments.surplus) * (1 + moments.surplus) / moments.h
        usable = np.isfinite(step) & np.isfinite(moments.distance)
        # Newton squares the error, measured against the scales on which phi*' changes.
        scale = np.minimum(np.minimum(1.0, self.deviation / strength), self.end - self.offset)
        size = np.abs(step) / scale
        # Where a ratio rises from zero as a root does, its slope is large and known for a shorter way than that
        error = size * np.maximum(1.0, (moments.h * scale) ** 2)
        # Nothing lies between the bounds, or nothing that makes a difference to the mean: a mean of both sides does.
        self.adjacent = self.high.offset <= np.nextafter(self.low.offset, np.inf)
        self.at_pole = self.adjacent & (self.high.offset >= self.end) & np.isfinite(self.low.surplus)
        self.collapsed = self.adjacent & np.isfinite(self.low.surplus + self.high.surplus) | self.at_pole
        if some(self.at_pole):
            self._refuse_jumps()
        distance = moments.distance + moments.hs * step  # at the offset that the step leads to
        lost = ~(distance > 0)  # to first order nothing is left of D
        distance = np.where(lost, moments.distance, distance)
        if some(self.collapsed):
            distance = np.where(self.collapsed, self._across()[1], distance)
        self.distance, self.moments, self.usable, self.far = distance, moments, usable, size > _LINEAR
        self.step = np.where(usable & ~self.collapsed, step, 0.0)
        if self.radius is None:
            enough = np.full_like(x, _BALANCED)
            value = newton = np.zeros_like(x)
        else:
            value = np.log(distance) - np.log(self.radius)
            spread = moments.hss / moments.h - (moments.hs / moments.h) ** 2
            newton = value * distance / (moments.h * spread)
            # D falls in x: on a plateau its slope may be rounding, of either sign
            newton = np.sign(value) * np.fmin(np.where(self.at_pole, np.nan, np.abs(newton)), self.reach)
            # D is off by the square of what the offset is: enough to tell on which side of the radius it is
            rough = np.clip(0.1 * np.abs(value), _BALANCED, 0.1) * np.minimum(np.sqrt(self.radius), 1.0)
            enough = np.where(lost, _BALANCED, np.maximum(rough, _BALANCED))
        next_one = np.spacing(self.offset)
        self.unresolved = usable & (np.abs(step) < next_one) & (np.abs(moments.surplus) > _MEAN) & ~self.collapsed
        if some(self.unresolved):
            self.step = np.where(self.unresolved, np.sign(step) * next_one, self.step)
        enough_here = np.abs(moments.surplus) <= _MEAN if self.strictly else (error <= enough) & ~self.unresolved
        self.balanced = usable & enough_here | self.collapsed
        self.value = np.where(self.balanced, value, np.inf)
        if some(self.balanced):
            self._remember(x, distance)
            value = np.where(self.balanced & self._is_between(), 0.0, value)
        return Residual(value, newton, self.balanced)

    def _remember(self, x: np.ndarray, distance: np.ndarray) -> None:
        """Keep what was balanced by the last pass, where it is closer to the radius than what is known."""
        new = self._here(x, distance)
        if some(self.collapsed):
            split = self.collapsed & (np.abs(self.moments.surplus) > EPS)
            low = np.where(split, self.low.offset, new.low)
            new = new._replace(
                low=low,
                high=np.where(split & ~self.at_pole, self.high.offset, low),
                share=np.where(split, self._across()[0], 0.0),
                added=np.where(split & self.at_pole, self._at_maximum()[1], 0.0),
            )
        self.point = new.where(self.balanced, self.point)
        self.best = new.where(np.abs(self.value) < np.abs(self.best.value), self.best)
        self.beyond = new.where((self.value > 0) & (self.value < self.beyond.value), self.beyond)
        self.within = new.where((self.value <= 0) & (-self.value < np.abs(self.within.value)), self.within)

    def _here(self, x: np.ndarray, distance: np.ndarray) -> BalancedPoint:
        """Return the point that the last step leads to."""
        offset, none = self._inside(self._stepped(self.step)), np.zeros_like(x)
        return BalancedPoint(self.value, x, offset, offset, none, none, distance)

    def _is_between(self) -> np.ndarray:
        """Whether a mean of the weights on both sides is optimal to rounding, though neither side is on the radius."""
        return self._slack() <= _MEAN_SLACK

    def _slack(self) -> np.ndarray:
        """Return a bound on what a mean of both sides loses, over strength times radius; NaN while one is unknown."""
        return (self.within.x - self.beyond.x) * (self.beyond.value - self.within.value)

    @property
    def balanced_offset(self) -> np.ndarray:
        """The offset that balances the ratios at the point reached."""
        return self.point.low

    def _stepped(self, step: np.ndarray) -> np.ndarray:
        """Return the offset after a step, whose size is understood near a pole as one of the distance's logarithm."""
        if np.isinf(self.end):
            return self.offset + step
        room = self.end - self.offset
        return np.where(step > -room, self.end - room * np.exp(-step / room), self.offset + step)

    def _inside(self, offset: np.ndarray) -> np.ndarray:
        return np.where((offset >= self.low.offset) & (offset <= self.high.offset), offset, self.offset)

    def follow(self, x: np.ndarray, following: np.ndarray, moved: np.ndarray) -> None:
        """Move the offset: with the strength in the rows that are moved, by its own step in the others."""
        done = self.balanced & ~moved
        proposal = self._stepped(self.step)
        # d offset / d log strength = E_h[s] - offset: followed on a logarithmic scale towards either end.
        inside = np.where((proposal > 0) & (proposal < self.end), proposal, self.offset)
        room = np.minimum(inside, np.inf if np.isinf(self.end) else self.end - inside)
        drift = np.minimum(self.moments.hs / self.moments.h - self.offset, 0.0) * (following - x)
        ahead = self._logistic(inside, drift, room)
        proposal = np.where(moved, np.where(np.isfinite(ahead), ahead, self.offset), proposal)
        smaller, larger = moved & (following < x), moved & (following > x)
        self.low, self.high = self.low.forgotten(larger, 0.0), self.high.forgotten(smaller, self.end)
        self.low, self.high = self.low.stale(smaller), self.high.stale(larger)
        self.reach = np.where(moved & (np.abs(following - x) >= self.reach), 2 * self.reach, self.reach)
        self.tries = np.where(moved, 0, self.tries)
        slow = ~(np.abs(self.moments.surplus) < 0.25 * self.missed)
        halved = ~moved & ((self.tries > _HALVING) & (self.tries % 2 == 0) & slow | ~self.usable)
        self.missed = np.where(moved, np.inf, np.abs(self.moments.surplus))
        far = self.far & ~moved & ~done & ~halved & ~self.adjacent
        if some(far):
            proposal = np.where(far, self._by_top(), proposal)
        # What goes beyond a bound has its root next to it, unless that is known not to have it
        known = (proposal <= self.low.offset) & np.isfinite(self.low.surplus)
        known |= (proposal >= self.high.offset) & np.isfinite(self.high.surplus)
        known &= ~moved & ~self.adjacent
        proposal = np.minimum(
            np.maximum(proposal, np.nextafter(self.low.offset, np.inf)), np.nextafter(self.high.offset, 0)
        )
        trusted = (proposal > self.low.offset) & (proposal < self.high.offset) & ~halved & ~known
        new = np.where(trusted, proposal, self._middle())
        if some(known):
            new = np.where(known & (self.tries % 2 == 1), self._on_chord(), new)
        stuck = self.adjacent & ~moved
        if some(stuck):  # what is missing is a pass at one of the bounds
            new = np.where(stuck, np.where(np.isnan(self.low.surplus), self.low.offset, self.high.offset), new)
        self.offset = np.where(done, self._inside(self._stepped(self.step)), new)
        self._enter(np.exp(np.where(moved, following, x)))

    def _by_top(self) -> np.ndarray:
        """Return where the mean is one if all ratios but the maximum's, which is known, are linear in the offset.

        Next to a pole the maximum's ratio is what changes. The search is one on grids, which takes no pass.
        """
        low, high, moments = self.low.offset[:, None], self.high.offset[:, None], self.moments
        here, h = (field.numpy() for field in self.divergence.ratio_and_curvature(torch.from_numpy(self.offset)))
        rest, slope = moments.surplus - self.share * here, np.maximum(moments.h - self.share * h, 0.0)
        grid = _ENDS
        for _ in range(_ROUNDS):
            at = low + (high - low) * grid
            at = np.where(grid > 0.5, high - (high - low) * (1 - grid), at)
            ratio = self.divergence.conjugate_gradient(torch.from_numpy(at)).numpy()
            mean = self.share[:, None] * ratio + rest[:, None] + slope[:, None] * (at - self.offset[:, None])
            above = (mean > 0) | ~np.isfinite(ratio) | (at >= high)
            first = np.maximum(above.argmax(1), 1)[:, None]
            low, high = np.take_along_axis(at, first - 1, 1), np.take_along_axis(at, first, 1)
            grid = _EVENLY
        return ((low + high) / 2)[:, 0]

    def _logistic(self, offset: np.ndarray, drift: np.ndarray, room: np.ndarray) -> np.ndarray:
        """Return the offset moved by a small drift as one of ``log(offset / (end - offset))``."""
        if np.isinf(self.end):
            return offset * np.exp(drift / offset)
        left = self.end - offset
        ratio = left / offset * np.exp(-drift * (1 / offset + 1 / left))
        return np.where(ratio < 1, self.end - self.end * (ratio / (1 + ratio)), self.end / (1 + ratio))

    def _middle(self) -> np.ndarray:
        """Return a number between the bounds: in the middle of the logarithms of what is close to zero or the pole."""
        low, high = self.low.offset, self.high.offset
        middle = np.where(high > 4 * low, np.where(low > 0, np.sqrt(low * high), high / 4), (low + high) / 2)
        if not np.isinf(self.end):
            far, near = self.end - low, self.end - high
            close = (low > self.end / 2) & (far > 4 * near)
            middle = np.where(close, self.end - np.where(near > 0, np.sqrt(far * near), far / 16), middle)
        return np.minimum(middle, np.nextafter(high, -np.inf))

    def _on_chord(self) -> np.ndarray:
        """Return where the line through both bounds gives mean one, which must lie between them."""
        low, high = self.low, self.high
        middle, chord = (
            self._middle(),
            low.offset - low.surplus * (high.offset - low.offset) / (high.surplus - low.surplus),
        )
        return np.where((chord > low.offset) & (chord < high.offset), chord, middle)

    def _enter(self, strength: np.ndarray) -> None:
        """Move the offset to where the maximum alone does not have more than all weight; that takes no pass."""
        self.high = self.high.limited(1 / strength)  # the threshold is no less than the least loss
        for _ in range(_ITERATIONS):
            ratio = self.divergence.conjugate_gradient(torch.from_numpy(self.offset)).numpy()
            above = (
                (self.offset > self.high.offset) | (self.share * ratio > 1 + 1e-12) | ~np.isfinite(ratio) | (ratio < 0)
            )
            above &= (self.offset > self.low.offset) & (self.high.offset > np.nextafter(self.low.offset, np.inf))
            if not some(above):
                return
            self.high = self.high.limited(np.where(above, self.offset, np.inf))
            self.offset = np.where(above, self._middle(), self.offset)

    def _across(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how much of the upper side makes the mean one, and D there, or a little more: it is convex.

        Next to the pole the upper side is the lower one with what the mean lacks at the maximum, whose ratio may be
        anything there.
        """
        share = self.low.surplus / (self.low.surplus - self.high.surplus)
        share = np.where(self.low.surplus == 0, 0.0, share)
        distance = self.low.distance + share * (self.high.distance - self.low.distance)
        if some(self.at_pole):
            here, lacking = self._at_maximum()
            more, less = (self.divergence.phi(torch.from_numpy(t)).numpy() for t in (here + lacking, here))
            distance = np.where(self.at_pole, self.low.distance + self.share * (more - less), distance)
            share = np.where(self.at_pole, 1.0, share)
        return share, distance

    def _refuse_jumps(self) -> None:
        """Refuse an end of phi* at which its slope does not grow: there the ratios jump."""
        before = self.end * (1 - np.array([1e-8, 2 * EPS]))
        far, near = self.divergence.conjugate_gradient(torch.from_numpy(before)).tolist()
        if not near > 1.01 * far:
            missed = self.low.surplus[self.at_pole]
            raise RuntimeError(
                f"no threshold of {self.divergence} makes the weights sum to 1: the nearest is off by {missed[0]:.3g}, "
                "since conjugate_gradient jumps there; phi must be strictly convex"
            )

    def _at_maximum(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the maximum's ratio at the lower side, and what is added to it for the mean to be one."""
        ratio = self.divergence.conjugate_gradient(torch.from_numpy(self.low.offset)).numpy()
        return ratio, np.where(self.at_pole, -self.low.surplus / self.share, 0.0)

    def found(self, saturated: np.ndarray) -> Found:
        """Return the ratios at the point reached, or a mean of those on both sides where that is better."""
        point, is_mean = self.point, self.is_mean
        fine = self.fine and bool((self.deviation / np.exp(point.x) < self.finest_answer).any())
        if not some(is_mean):
            return point.found(self.divergence, saturated, fine=fine)
        first, second = self.beyond.where(is_mean, point), self.within.where(is_mean, point)
        share = (first.distance - self.radius) / (first.distance - second.distance)
        found, other = (side.found(self.divergence, saturated, fine=fine) for side in (first, second))
        tilt = MixedTilt(found.tilt, other.tilt, np.where(is_mean, share, 0.0))
        return Found(tilt, found.dual._replace(distance=None))


class _Side(NamedTuple):
    """A bound of the offset, with the surplus of the ratios and their D there; NaN if that was at another strength."""

    offset: np.ndarray
    surplus: np.ndarray
    distance: np.ndarray

    @classmethod
    def unknown(cls, bound: float, size: int) -> _Side:
        """Return a bound at which nothing is known."""
        return cls(np.full(size, bound), np.full(size, np.nan), np.full(size, np.nan))

    def moved(self, here: np.ndarray, offset: np.ndarray, moments: _Moments) -> _Side:
        """Return the side moved to an offset in some rows."""
        new = offset, moments.surplus, moments.distance
        return _Side(*(np.where(here, theirs, ours) for theirs, ours in zip(new, self, strict=True)))

    def stale(self, there: np.ndarray) -> _Side:
        """Return the same bound, in some rows without what was known at it."""
        return _Side(self.offset, *(np.where(there, np.nan, field) for field in self[1:]))

    def forgotten(self, there: np.ndarray, bound: float) -> _Side:
        """Return another bound in some rows."""
        return self.stale(there)._replace(offset=np.where(there, bound, self.offset))

    def limited(self, bound: np.ndarray) -> _Side:
        """Return no larger a bound than another."""
        return self.stale(bound < self.offset)._replace(offset=np.minimum(self.offset, bound))


class _Moments(NamedTuple):
    """At given multipliers, with ``s = d / strength + offset`` and ``h = phi*''(s)``, each ``[rows]``."""

    surplus: np.ndarray  # mean of the ratios, minus one
    distance: np.ndarray
    h: np.ndarray
    hs: np.ndarray
    hss: np.ndarray


def _moments(divergence: Divergence, rows: Rows, offset: np.ndarray, strength: np.ndarray, *, fine: bool) -> _Moments:
    exponents = Exponents(np.zeros_like(offset), strength, offset)

    def sums(block: Block):
        s = exponents.of(block.d)
        conjugate = divergence.conjugate(s)
        ratio, h = divergence.ratio_and_curvature(s)
        if fine:
            tilt, cost = divergence.tilt_and_cost(s, ratio, conjugate)
        else:
            tilt, cost = ratio - 1, s * ratio - conjugate
        hs = h * s
        return tilt, cost, h, hs, (hs, s), conjugate

    surplus, distance, h, hs, hss, conjugate = rows.host_means(sums)
    # Beyond the domain of phi*: the offset is too large.
    outside = ~np.isfinite(conjugate)
    surplus = np.where(outside | np.isnan(surplus), np.inf, surplus)
    return _Moments(surplus, np.where(outside, np.nan, distance), h, hs, hss)
