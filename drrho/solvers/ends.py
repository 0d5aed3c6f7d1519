"""The ends of a parameter's range, where nothing is left to solve: the maximum of a row, or its base weights."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrho.divergences import Divergence
from drrho.solvers.dual import Dual, Found, Tilt
from drrho.solvers.problem import fraction_of
from drrho.solvers.rows import Rows, scatter, some
from drrho.solvers.tail import Tail, tail

_FLAT = 1e280  # strength in units of the range at which no weight differs from q, and the multipliers' range ends


class Maximizer(NamedTuple):
    """What maximizes ``<p, d>`` alone, least divergent: uniform on the ties, or, under a cap, the tail's weights.

    ``above`` is the tilt of the ties; ``found`` tells the tilts under a cap.
    """

    found: Tail | None
    above: np.ndarray
    threshold: np.ndarray
    distance: np.ndarray

    def tilt(self, d: Tensor) -> Tensor:
        """Return the tilt of losses ``[rows, width]``."""
        if self.found is not None:
            return self.found.tilt(d)
        return torch.where(d == 0, torch.from_numpy(self.above).to(d.device)[:, None], -1.0)


def least_divergent_maximizer(rows: Rows, divergence: Divergence) -> Maximizer:
    """Return the maximizer of each row."""
    if divergence.tail_fraction is not None:
        found = tail(rows, fraction_of(divergence))
        (distance,) = rows.host_means(lambda block: (divergence.phi_of_tilt(found.tilt(block.d)),))
        return Maximizer(found, distance, found.threshold.cpu().numpy(), distance)
    _, share = rows.mean_and_ties()
    return Maximizer(None, (1 - share) / share, 0 * share, divergence.maximal_radius(share))


class Ends(NamedTuple):
    """Which rows are ``hard``, at the maximum, and which are ``flat``, at their base weights: flags ``[rows]``."""

    hard: np.ndarray
    flat: np.ndarray

    @property
    def open(self) -> np.ndarray:
        """Which rows are at neither end."""
        return ~(self.hard | self.flat)


def ends_of_ball(span: np.ndarray, radius: np.ndarray, maximizer: Maximizer) -> Ends:
    """Return the rows whose ball reaches the maximum, or is a point; ``span`` is the range of the losses."""
    hard = (span == 0) | (radius >= maximizer.distance)
    return Ends(hard, (radius == 0) & ~hard)


def ends_of_penalty(span: np.ndarray, strength: np.ndarray, maximizer: Maximizer) -> Ends:
    """Return the rows without a price of D, or with one beyond measure; ``strength`` is in units of the range."""
    hard = (span == 0) | (strength == 0) | (maximizer.distance == 0)
    return Ends(hard, (strength > _FLAT) & ~hard)


class AtEnds(NamedTuple):
    """Tilts of rows some of which are at an end, flags ``[rows, 1]``: ``inner`` knows those that are ``solved``."""

    inner: Tilt | None
    solved: Tensor | slice
    hard: Tensor
    flat: Tensor
    maximizer: Maximizer

    def tilt(self, d: Tensor) -> Tensor:
        """Return the tilt of losses ``[rows, width]``."""
        tilt = d.new_zeros(d.shape)
        if self.inner is not None:
            tilt[self.solved] = self.inner.tilt(d[self.solved])
        return torch.where(self.hard, self.maximizer.tilt(d), torch.where(self.flat, 0.0, tilt))

    def ratio(self, d: Tensor, tilt: Tensor) -> Tensor:
        """Return the ratio of losses ``[rows, width]``."""
        ratio = tilt + 1
        if self.inner is not None:
            solved = d.new_zeros(d.shape)
            solved[self.solved] = self.inner.ratio(d[self.solved], tilt[self.solved])
            ratio = torch.where(self.hard | self.flat, ratio, solved)
        return ratio


def with_ends(rows: Rows, ends: Ends, found: Found | None, maximizer: Maximizer) -> tuple[Found, Ends]:
    """Return what solves all rows from what solves the open ones, None where there are none, and the ends of all.

    The strength is 0 at the maximum, infinite at the base weights. Rows that the solver has saturated are hard.
    """
    mean, _ = rows.mean_and_ties()
    inner, solved, distance = None, slice(None), None
    threshold, strength, hard = np.zeros_like(mean), np.ones_like(mean), ends.hard
    origin, offset = threshold, threshold
    if found is not None:
        inner, (threshold, strength, distance, saturated, _), *_ = found
        origin, _, offset = found.dual.exponents
        if not some(~ends.open):
            hard = hard | saturated
        else:
            chosen, solved = ends.open, torch.from_numpy(ends.open).to(rows.z.device)
            threshold, strength = scatter(chosen, threshold, 1.0), scatter(chosen, strength, 1.0)
            origin, offset = scatter(chosen, origin, 0.0), scatter(chosen, offset, 0.0)
            distance = None if distance is None else scatter(chosen, distance, 1.0)
            hard = hard | scatter(chosen, saturated, False)
    flat = ends.flat
    threshold = np.where(hard, maximizer.threshold, np.where(flat, mean, threshold))
    strength = np.where(hard, 0.0, np.where(flat, np.inf, strength))
    flags = torch.from_numpy(np.stack([hard, flat])).to(rows.z.device)[:, :, None]
    tilt = AtEnds(inner, solved, flags[0], flags[1], maximizer)
    anchor = np.where(hard | flat, threshold, origin), np.where(hard | flat, 0.0, offset)
    dual = Dual(threshold, strength, distance, hard, anchor)
    if found is None:
        return Found(tilt, dual), Ends(hard, flat)
    return found._replace(tilt=tilt, dual=dual), Ends(hard, flat)
