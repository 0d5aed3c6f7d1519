"""The order in which an epoch visits the samples: a pure function of (seed, epoch, position)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from ..errors import UserError

Key = TypeVar("Key")
T = TypeVar("T")

#: How the samples of an epoch are ordered, which is what decides how they are read.
#: ``random``: by offset, each on its own (`Order`). ``blocks``, ``shards``: every part of a shard, or every shard, once
#: and in one piece (`data.lanes.Lanes`).
Reading = Literal["random", "blocks", "shards"]

_SHARDS, _BLOCK = 0, 1
_KEPT = 4


class Visits(NamedTuple):
    """Samples in the order of their visits.

    ``occurrence`` distinguishes the visits of one sample in one epoch: the number of the repetition, or with resampling
    the position in the epoch.
    """

    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride] (a field, not tuple.index)
    occurrence: np.ndarray


class Visiting(Protocol):
    """The order of an epoch's visits."""

    #: Visits of an epoch.
    samples: int

    def visits(self, epoch: int, start: int, stop: int) -> Visits:
        """Return the visits at positions ``start`` to ``stop`` of an epoch."""
        ...

    def part(self, size: int, rank: int, ranks: int) -> tuple[int, int]:
        """Return first and stop of a rank's part of a batch of ``size``."""
        ...


def bounds(total: int, parts: int, part: int) -> tuple[int, int]:
    """Return start and end of a part of ``total``; sizes of parts differ by at most one, the larger ones come first."""
    size, larger = divmod(total, parts)
    start = part * size + min(part, larger)
    return start, start + size + (part < larger)


class RankPart(NamedTuple):
    """A rank's part of every batch of an epoch, which has ``steps`` of them."""

    order: Visiting
    steps: int
    rank: int
    ranks: int

    def positions(self, step: int) -> tuple[int, int]:
        """Return first and stop of the part's positions in the epoch."""
        start, stop = bounds(self.order.samples, self.steps, step)
        first, last = self.order.part(stop - start, self.rank, self.ranks)
        return start + first, start + last

    def visits(self, epoch: int, step: int) -> Visits:
        """Return the part's visits."""
        return self.order.visits(epoch, *self.positions(step))

    @property
    def size(self) -> int:
        """The number of visits of the largest part."""
        return math.ceil(math.ceil(self.order.samples / self.steps) / self.ranks)


def checked_weights(counts: np.ndarray, weights: Sequence[float] | None, resampled: bool) -> np.ndarray:
    """Return the weight of each shard; refuse what an order of this kind cannot have."""
    found = np.ones(len(counts)) if weights is None else np.asarray(weights, dtype=np.float64)
    for weight in np.unique(found):
        if not (0 <= weight < np.inf) or not (resampled or (weight >= 1 and weight == int(weight))):
            kind = "a number >= 0" if resampled else "an integer >= 1, unless samples are drawn with replacement"
            raise UserError(f"the weight of a source must be {kind}, got {weight:g}")
    if resampled and not (counts * found).sum() > 0:
        raise UserError("there is nothing to draw: all weights are 0")
    return found


def epoch_length(counts: np.ndarray, weights: np.ndarray, resampled: bool, chosen: int | None) -> int:
    """Return the number of visits of an epoch."""
    if chosen is not None and not (resampled and chosen > 0):
        raise UserError(f"{chosen} samples per epoch: only resampling has a length to choose, at least 1")
    return chosen or int(counts.sum() if resampled else counts @ weights.astype(np.int64))


class _Layout(NamedTuple):
    """An epoch's blocks: ``shard`` and ``copy`` are in shuffled order.

    Block b consists of entries ``cut[b]`` to ``cut[b + 1]`` and covers positions ``start[b]`` to ``start[b + 1]``.
    """

    shard: np.ndarray
    copy: np.ndarray
    cut: np.ndarray
    start: np.ndarray


class Order:
    """The order of an epoch: every sample once, shuffled in blocks so that reads are local; or draws with replacement.

    The shards are shuffled and grouped into blocks of at most ``block_shards``; the samples of a block are shuffled.
    With more shards in a block, the order is closer to a uniform permutation, and more files are read at a time.

    Parameters
    ----------
    counts : sequence of int
        Number of samples of each shard; sample indices count through the shards.
    weights : sequence of float
        Weight of each shard. Without resampling, an integer >= 1: how often an epoch visits each of its samples, every
        time at another position. With resampling, any number >= 0, proportional to the probability of each sample.
    resampled : bool
        Draw with replacement: every block draws ``block_shards`` shards, then its samples from these, so that each
        visit is a sample of weight w with probability proportional to w.
    epoch_samples : int
        Visits per epoch with resampling; by default the number of samples.
    """

    def __init__(
        self,
        counts: Sequence[int],
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        block_shards: int = 16,
        resampled: bool = False,
        epoch_samples: int | None = None,
    ) -> None:
        if block_shards < 1:
            raise UserError(f"a block must have at least 1 shard, got {block_shards}")
        self._counts = np.asarray(counts, dtype=np.int64)
        self._firsts = np.cumsum(self._counts) - self._counts
        self._weights = checked_weights(self._counts, weights, resampled)
        self._seed, self._block_shards, self._resampled = seed, block_shards, resampled
        self._layouts: dict[int, _Layout] = {}
        self._blocks: dict[tuple[int, int], Visits] = {}
        self.samples = epoch_length(self._counts, self._weights, resampled, epoch_samples)
        if resampled:
            mass = self._counts * self._weights
            self._chances = mass / mass.sum()
            self._block_samples = max(1, block_shards * int(self._counts.sum()) // max(1, len(self._counts)))

    def part(self, size: int, rank: int, ranks: int) -> tuple[int, int]:
        """Return first and stop of a rank's part of a batch of ``size``."""
        return bounds(size, ranks, rank)

    def visits(self, epoch: int, start: int, stop: int) -> Visits:
        """Return the visits at positions ``start`` to ``stop`` of an epoch."""
        if not 0 <= start <= stop <= self.samples:
            raise ValueError(f"the positions {start} to {stop} must lie between 0 and {self.samples}")
        if self._resampled:
            bounds = np.arange(-(-stop // self._block_samples) + 1) * self._block_samples
        else:
            bounds = self._layout(epoch).start
        first = int(np.searchsorted(bounds, start, side="right")) - 1
        last = int(np.searchsorted(bounds, stop, side="left"))
        parts = [Visits(np.empty(0, np.int64), np.empty(0, np.int64))]
        for block in range(first, last):
            visits, origin = self._block(epoch, block), int(bounds[block])
            part = slice(max(0, start - origin), stop - origin)
            parts.append(Visits(visits.index[part], visits.occurrence[part]))
        return Visits(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _layout(self, epoch: int) -> _Layout:
        return _remembered(self._layouts, epoch, lambda: self._arrange(epoch))

    def _arrange(self, epoch: int) -> _Layout:
        full = np.flatnonzero(self._counts)
        copies = self._weights[full].astype(np.int64)
        shard = np.repeat(full, copies)
        copy = np.arange(len(shard)) - np.repeat(np.cumsum(copies) - copies, copies)
        order = self._generator(epoch, _SHARDS).permutation(len(shard))
        shard, copy = shard[order], copy[order]
        blocks = -(-len(shard) // self._block_shards)
        cut = np.arange(blocks + 1) * len(shard) // max(1, blocks)
        start = np.concatenate([[0], np.cumsum(self._counts[shard])])[cut]
        return _Layout(shard, copy, cut, start)

    def _block(self, epoch: int, block: int) -> Visits:
        make = self._drawn if self._resampled else self._shuffled
        return _remembered(self._blocks, (epoch, block), lambda: make(epoch, block))

    def _shuffled(self, epoch: int, block: int) -> Visits:
        layout = self._layout(epoch)
        members = slice(layout.cut[block], layout.cut[block + 1])
        shard = layout.shard[members]
        counts = self._counts[shard]
        # Row r of the block's i-th shard is entry (counts before i) + r.
        index = np.arange(counts.sum()) + np.repeat(self._firsts[shard] - (np.cumsum(counts) - counts), counts)
        occurrence = np.repeat(layout.copy[members], counts)
        order = self._generator(epoch, _BLOCK, block).permutation(len(index))
        return Visits(index[order], occurrence[order])

    def _drawn(self, epoch: int, block: int) -> Visits:
        generator = self._generator(epoch, _BLOCK, block)
        shards = generator.choice(len(self._counts), size=self._block_shards, p=self._chances)
        shard = shards[generator.integers(len(shards), size=self._block_samples)]
        index = self._firsts[shard] + generator.integers(self._counts[shard])
        return Visits(index, np.arange(self._block_samples) + block * self._block_samples)

    def _generator(self, epoch: int, *use: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self._seed, epoch], spawn_key=use))


def _remembered(cache: dict[Key, T], key: Key, make: Callable[[], T]) -> T:
    """Return ``cache[key]``, which is computed if it is not there; only the newest few values are kept."""
    if key not in cache:
        while len(cache) >= _KEPT:
            del cache[next(iter(cache))]
        cache[key] = make()
    return cache[key]
