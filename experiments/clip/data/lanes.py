"""An order of an epoch for storage where every request costs: samples are read in blocks, each once, by one rank.

A batch is divided into lanes, the same ones in every batch, and each lane visits shards of its own, so that a rank
reads those of its lanes only. The number of lanes follows from the size of the batch, not from the number of ranks: the
order is a pure function of (seed, epoch, catalog, batch size), and a run resumes in the middle of an epoch on another
number of ranks.

- The shards are shuffled, laid end to end, and cut into one stretch for each lane.
- The shards of a stretch are cut into blocks, runs of neighboring samples of about ``block_bytes``, or left whole.
- The blocks of a stretch are shuffled, and the samples of ``group_blocks`` blocks at a time are shuffled together.

So a batch has samples of ``lanes * group_blocks`` blocks from everywhere in the data. Of these a rank keeps its lanes'
part at a time, and every block is asked for once in an epoch; those at the ends of stretches twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .order import Visits, bounds, checked_weights, epoch_length

BLOCK_BYTES = 8 * 2**20
#: Visits of a batch that each lane gives, where shards are read in blocks, and where they are read whole.
LANE_VISITS = {"blocks": 32, "shards": 256}
#: Blocks of a lane whose samples are shuffled together.
GROUP_BLOCKS = {"blocks": 4, "shards": 1}

_SHARDS, _LANE, _GROUP = 0, 1, 2
_EPOCHS = 2  # whose lanes are kept


class Block(NamedTuple):
    """Samples ``first`` to ``stop`` of shard number ``shard``, which steps up to ``until`` visit in lane ``lane``.

    ``number`` counts the blocks of the lane in the order of the epoch, so that epoch, lane and number name a block.
    """

    epoch: int
    lane: int
    number: int
    shard: int
    first: int
    stop: int
    until: int


class _Lane(NamedTuple):
    """A lane's blocks in an epoch: block b consists of samples ``first[b]`` to ``stop[b]``.

    Group g is of blocks ``cut[g]`` to ``cut[g + 1]`` and covers the lane's positions ``start[g]`` to ``start[g + 1]``.
    """

    shard: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    copy: np.ndarray
    cut: np.ndarray
    start: np.ndarray


class _Stretches(NamedTuple):
    """The shuffled shards of an epoch: shard ``shard[i]`` covers positions ``start[i]`` to ``start[i + 1]``."""

    shard: np.ndarray
    copy: np.ndarray
    start: np.ndarray


class Lanes:
    """The order of an epoch in lanes: every sample once, or by weights; or draws of blocks with replacement.

    Parameters
    ----------
    counts, sizes : sequence of int
        Number of samples and of bytes of each shard; sample indices count through the shards.
    batch_size : int
        Size of the global batch, from which the number of lanes follows.
    weights, resampled, epoch_samples
        As for `data.order.Order`; with resampling whole blocks are drawn, each with a probability
        proportional to the weight of its shard, and visited once for every draw.
    block_bytes : int, optional
        About how many bytes of a shard are read at a time; None for shards as a whole.
    lane_visits : int
        About how many visits of a batch each lane gives.
    group_blocks : int
        Number of blocks of a lane whose samples are shuffled together.
    """

    def __init__(
        self,
        counts: Sequence[int],
        sizes: Sequence[int],
        *,
        seed: int,
        batch_size: int,
        weights: Sequence[float] | None = None,
        resampled: bool = False,
        epoch_samples: int | None = None,
        block_bytes: int | None = BLOCK_BYTES,
        lane_visits: int = LANE_VISITS["blocks"],
        group_blocks: int = GROUP_BLOCKS["blocks"],
    ) -> None:
        if block_bytes is not None and block_bytes < 1:
            raise UserError(f"a block must have at least 1 byte, got {block_bytes}")
        self._counts = np.asarray(counts, dtype=np.int64)
        self._firsts = np.cumsum(self._counts) - self._counts
        self._weights = checked_weights(self._counts, weights, resampled)
        self._seed, self._resampled, self._group_blocks = seed, resampled, group_blocks
        self._block_bytes = block_bytes
        self._bytes_per_sample = np.asarray(sizes, dtype=np.float64) / np.maximum(self._counts, 1)
        self.samples = epoch_length(self._counts, self._weights, resampled, epoch_samples)
        self.steps = max(1, -(-self.samples // batch_size))
        self.lanes = max(1, batch_size // lane_visits)
        self._small, self._larger = divmod(self.samples, self.steps)  # so many batches have one visit more
        numbers = np.arange(self.lanes + 1)
        shares = [size * numbers // self.lanes for size in (self._small, self._small + 1)]
        # How many visits of a batch a lane gives, in small batches and in the larger ones before them.
        self._share, self._larger_share = (np.diff(share) for share in shares)
        self._origins = np.concatenate([[0], np.cumsum(self._before(np.arange(self.lanes), self.steps))])
        self._stretches: dict[int, _Stretches] = {}
        self._lanes: dict[int, dict[int, _Lane]] = {}
        self._blocks = self._pieces(self._counts, self._bytes_per_sample)
        if resampled:
            mass = self._weights * self._blocks
            self._chances = mass / mass.sum()
        mean = self._counts.sum() / max(1, self._blocks.sum())
        #: How many steps a group of blocks lasts, on average.
        self.group_steps = max(1, round(group_blocks * mean * self.lanes * self.steps / max(1, self.samples)))

    def part(self, size: int, rank: int, ranks: int) -> tuple[int, int]:
        """Return first and stop of a rank's part of a batch of ``size``: complete lanes where the number allows it."""
        return size * rank // ranks, size * (rank + 1) // ranks

    def visits(self, epoch: int, start: int, stop: int) -> Visits:
        """Return the visits at positions ``start`` to ``stop`` of an epoch."""
        parts = [Visits(np.empty(0, np.int64), np.empty(0, np.int64))]
        parts += [self._lane_visits(epoch, *part) for part in self._parts(start, stop)]
        return Visits(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def blocks(self, epoch: int, start: int, stop: int) -> list[Block]:
        """Return the blocks that hold the samples at positions ``start`` to ``stop`` of an epoch, each once."""
        found: dict[Block, None] = {}
        for lane, first, last in self._parts(start, stop):
            found |= dict.fromkeys(self._lane_blocks(epoch, lane, first, last))
        return list(found)

    def lane_visits(self, epoch: int, lane: int) -> Visits:
        """Return all visits of a lane in an epoch, in their order."""
        return self._lane_visits(epoch, lane, 0, int(self._origins[lane + 1] - self._origins[lane]))

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield lane and the positions in it that positions ``start`` to ``stop`` of an epoch are."""
        if not 0 <= start <= stop <= self.samples:
            raise ValueError(f"the positions {start} to {stop} must lie between 0 and {self.samples}")
        while start < stop:
            step = self._step(start)
            begin, end = bounds(self.samples, self.steps, step)
            size, last = end - begin, min(stop, end)
            for lane in range(self._lane_at(start - begin, size), self._lane_at(last - 1 - begin, size) + 1):
                low, high = size * lane // self.lanes, size * (lane + 1) // self.lanes
                shift = int(self._before(lane, step)) - begin - low
                if low < high:
                    yield lane, shift + max(start, begin + low), shift + min(last, begin + high)
            start = last

    def _step(self, position: int) -> int:
        """Return the step whose batch has a position of the epoch."""
        of_larger = self._larger * (self._small + 1)
        if position < of_larger:
            return position // (self._small + 1)
        return self._larger + (position - of_larger) // self._small

    def _lane_at(self, offset: int, size: int) -> int:
        """Return the lane of an offset in a batch: the last one that begins there or before."""
        return ((offset + 1) * self.lanes - 1) // size

    def _before(self, lane: np.ndarray | int, step: int) -> np.ndarray:
        """Return how many visits a lane has in the batches before a step."""
        larger = min(step, self._larger)
        return larger * self._larger_share[lane] + (step - larger) * self._share[lane]

    def _last_step(self, lane: int, position: int) -> int:
        """Return the step that visits a position of a lane."""
        share, larger_share = int(self._share[lane]), int(self._larger_share[lane])
        of_larger = self._larger * larger_share
        if position < of_larger:
            return position // larger_share
        return self._larger + (position - of_larger) // share

    def _groups(self, epoch: int, lane: int, first: int, stop: int) -> tuple[_Lane, range]:
        """Return a lane, and the numbers of the groups that cover positions ``first`` to ``stop`` of it."""
        layout = self._lane(epoch, lane)
        begin = int(np.searchsorted(layout.start, first, side="right")) - 1
        return layout, range(begin, int(np.searchsorted(layout.start, stop, side="left")))

    def _lane_visits(self, epoch: int, lane: int, first: int, stop: int) -> Visits:
        layout, groups = self._groups(epoch, lane, first, stop)
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for group in groups:
            blocks = slice(layout.cut[group], layout.cut[group + 1])
            sizes = layout.stop[blocks] - layout.first[blocks]
            index = np.arange(sizes.sum()) + np.repeat(layout.first[blocks] - (np.cumsum(sizes) - sizes), sizes)
            copy = np.repeat(layout.copy[blocks], sizes)
            order = self._generator(epoch, _GROUP, lane, group).permutation(len(index))
            origin = int(layout.start[group])
            own = order[max(0, first - origin) : stop - origin]
            parts.append((index[own], copy[own]))
        index, copy = (np.concatenate(column) for column in zip(*parts, strict=True))
        if self._resampled:
            copy = self._origins[lane] + np.arange(first, stop)
        return Visits(index, copy)

    def _lane_blocks(self, epoch: int, lane: int, first: int, stop: int) -> Iterator[Block]:
        layout, groups = self._groups(epoch, lane, first, stop)
        for group in groups:
            until = self._last_step(lane, int(layout.start[group + 1]) - 1)
            for number in range(layout.cut[group], layout.cut[group + 1]):
                shard, first, stop = (int(column[number]) for column in (layout.shard, layout.first, layout.stop))
                yield Block(epoch, lane, number, shard, first, stop, until)

    def _lane(self, epoch: int, lane: int) -> _Lane:
        if epoch not in self._lanes:
            while len(self._lanes) >= _EPOCHS:
                old = next(iter(self._lanes))
                del self._lanes[old]
                self._stretches.pop(old, None)
            self._lanes[epoch] = {}
        lanes = self._lanes[epoch]
        if lane not in lanes:
            lanes[lane] = self._made(epoch, lane)
        return lanes[lane]

    def _made(self, epoch: int, lane: int) -> _Lane:
        """Lay out a lane: its blocks in their order, and the groups of them."""
        capacity = int(self._origins[lane + 1] - self._origins[lane])
        blocks = self._drawn(epoch, lane, capacity) if self._resampled else self._cut(epoch, lane)
        shard, first, stop, copy = blocks
        # The first groups of the lanes have different sizes, so that not all lanes begin a new one at the same time.
        cut = np.arange(1 + lane % self._group_blocks, len(shard), self._group_blocks)
        cut = np.concatenate([[0], cut, [len(shard)]]).astype(np.int64)
        start = np.concatenate([[0], np.cumsum(stop - first)])[cut]
        return _Lane(shard, first, stop, copy, cut, start)

    def _cut(self, epoch: int, lane: int) -> tuple[np.ndarray, ...]:
        """Return the blocks of a lane's stretch in their order, each with shard, first, stop and copy."""
        stretches = self._stretched(epoch)
        begin, end = int(self._origins[lane]), int(self._origins[lane + 1])
        low = int(np.searchsorted(stretches.start, begin, side="right")) - 1
        high = int(np.searchsorted(stretches.start, end, side="left"))
        entries = slice(low, max(low, high))
        shard, starts = stretches.shard[entries], stretches.start[entries]
        first_row = np.maximum(begin - starts, 0)
        rows = np.minimum(end - starts, self._counts[shard]) - first_row
        pieces = self._pieces(rows, self._bytes_per_sample[shard])
        number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        of = np.repeat(np.arange(len(shard)), pieces)
        origin = self._firsts[shard] + first_row
        first, stop = (origin[of] + rows[of] * (number + k) // pieces[of] for k in (0, 1))
        order = self._generator(epoch, _LANE, lane).permutation(len(of))
        return shard[of][order], first[order], stop[order], stretches.copy[entries][of][order]

    def _drawn(self, epoch: int, lane: int, capacity: int) -> tuple[np.ndarray, ...]:
        """Return blocks drawn with replacement, of ``capacity`` samples together."""
        generator = self._generator(epoch, _LANE, lane)
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        drawn = 0
        mean = max(1.0, float(self._chances @ (self._counts / np.maximum(self._blocks, 1))))
        while drawn < capacity:
            number = int((capacity - drawn) / mean) + 8
            shard = generator.choice(len(self._counts), size=number, p=self._chances)
            pieces, counts = self._blocks[shard], self._counts[shard]
            piece = generator.integers(pieces)
            first, stop = (self._firsts[shard] + counts * (piece + k) // pieces for k in (0, 1))
            parts.append((shard, first, stop))
            drawn += int((stop - first).sum())
        shard, first, stop = (np.concatenate(column) for column in zip(*parts, strict=True)) if parts else [_NONE] * 3
        ends = np.cumsum(stop - first)
        last = int(np.searchsorted(ends, capacity, side="left")) + 1 if capacity else 0
        shard, first, stop, ends = shard[:last], first[:last], stop[:last].copy(), ends[:last]
        if last:
            stop[-1] -= ends[-1] - capacity
        return shard, first, stop, np.zeros(last, np.int64)

    def _pieces(self, rows: np.ndarray, bytes_per_sample: np.ndarray) -> np.ndarray:
        """Return the number of blocks into which runs of samples are cut."""
        if self._block_bytes is None:
            return (rows > 0).astype(np.int64)
        pieces = np.ceil(rows * bytes_per_sample / self._block_bytes).astype(np.int64)
        return np.minimum(np.maximum(pieces, rows > 0), rows)

    def _stretched(self, epoch: int) -> _Stretches:
        if epoch not in self._stretches:
            full = np.flatnonzero(self._counts)
            copies = self._weights[full].astype(np.int64)
            shard = np.repeat(full, copies)
            copy = np.arange(len(shard)) - np.repeat(np.cumsum(copies) - copies, copies)
            order = self._generator(epoch, _SHARDS).permutation(len(shard))
            shard = shard[order]
            start = np.concatenate([[0], np.cumsum(self._counts[shard])])
            self._stretches[epoch] = _Stretches(shard, copy[order], start)
        return self._stretches[epoch]

    def _generator(self, epoch: int, *use: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self._seed, epoch], spawn_key=use))


_NONE = np.empty(0, np.int64)
