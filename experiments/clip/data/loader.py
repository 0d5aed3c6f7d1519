"""Batches of training pairs from a catalog, the same for any number of workers and ranks and after interruptions.

The stream is a pure function of (seed, epoch, position). An epoch's order (`data.order`) is divided
into global batches whose sizes differ by at most one, and each of these into contiguous parts, one per rank. The random
numbers of a visit (augmentation, choice among captions) are a function of (seed, epoch, index, occurrence).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from ..catalog.catalog import Catalog
from ..errors import UserError
from ..io.copies import LocalCopies
from ..io.workers import Workers
from .batch import Batch, Reference
from .draws import Draws, random_state_restored, visit_draws
from .feed import BlockFeed
from .lanes import BLOCK_BYTES, GROUP_BLOCKS, LANE_VISITS, Lanes
from .memory import KeptBatches
from .order import Order, RankPart, Reading
from .reader import SKIPS_ALLOWED, Reader, Skip, decode

_SEEN = "seen"


class Loader:
    """Loads the batches of a catalog's samples: a `data.batch.Stream`.

    Parameters
    ----------
    transform : callable
        Maps a PIL image to the model's input, in bytes or normalized; may draw from the global generators of torch,
        NumPy and Python.
    tokenize : callable
        Maps a list of captions to tokens ``[b, length]``.
    batch_size : int
        Size of the global batch, summed over ranks; batches may be smaller.
    workers : int
        Number of processes of this rank that read and decode; 0 for this one.
    weights : sequence of float
        Weights of the sources, see `Order`.
    resampled : bool
        Draw samples with replacement, ``epoch_samples`` in each epoch.
    block_shards : int
        Number of shards whose samples are shuffled together, where they are read at random.
    reading : str
        How shards are read, and therefore in which order: see `data.order.Reading`.
    copies : Path, optional
        Where a folder for blocks of remote shards is made, by default among the system's temporary files.
    skip_limit : float
        Largest share of the samples so far that may be skipped, once more than `SKIPS_ALLOWED` are.
    pin_memory : bool
        Whether batches are put into page-locked memory, which makes copies to a GPU faster.
    reference : Reference, optional
        The reference, whose inputs are collated into each batch.
    caption_weights : sequence of float
        Weights of the sources of captions, see `data.reader.decode`.
    in_memory : bool
        Whether each sample stays in memory as it was at its first visit, with its first caption: for small pictures,
        read at random, without worker processes, and a ``transform`` that draws nothing.

    Attributes
    ----------
    samples : int
        Visits per epoch, summed over ranks.
    steps_per_epoch : int
        Batches per epoch.
    skipped : Counter
        Samples skipped so far on this rank, by reason.
    """

    def __init__(
        self,
        catalog: Catalog,
        transform: Callable[[Image.Image], Tensor],
        tokenize: Callable[[Sequence[str]], Tensor],
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
        weights: Sequence[float] | None = None,
        resampled: bool = False,
        epoch_samples: int | None = None,
        block_shards: int = 16,
        reading: Reading = "random",
        copies: Path | None = None,
        skip_limit: float = 0.1,
        pin_memory: bool = False,
        reference: Reference | None = None,
        caption_weights: Sequence[float] = (),
        in_memory: bool = False,
    ) -> None:
        if in_memory and (workers or reading != "random"):
            raise ValueError(f"in_memory needs workers 0 and reading random, got {workers} and {reading}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be from 0 to {ranks - 1}, got {rank}")
        if batch_size < ranks:
            raise UserError(f"the global batch size must be at least the number of ranks, {ranks}, got {batch_size}")
        weighing = {
            "seed": seed,
            "weights": catalog.shard_weights(weights),
            "resampled": resampled,
            "epoch_samples": epoch_samples,
        }
        order = _order(catalog, reading, batch_size, block_shards, weighing)
        self.samples = order.samples
        self.steps_per_epoch = -(-self.samples // batch_size)
        self.skipped: Counter[str] = Counter()
        self._seen = 0
        self._skip_limit = skip_limit
        part = RankPart(order, self.steps_per_epoch, rank, ranks)
        self._copies = LocalCopies(copies) if isinstance(order, Lanes) else None
        # At any time, workers read from at most two neighboring blocks.
        reader = Reader(catalog, 2 * block_shards + 2, caption_weights, self._copies)
        feed = BlockFeed(part, reader, self._copies, reading == "shards") if self._copies is not None else None
        maker = _BatchMaker(part, reader, feed, transform, tokenize, seed, reference)
        task = KeptBatches(part, reader, transform, tokenize, len(catalog), reference) if in_memory else maker
        self._workers: Workers[tuple[int, int], Batch] = Workers(task, workers, pin_memory=pin_memory)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Return an epoch's batches from step ``first`` on, without reading those before; workers begin at once.

        The parts of the ranks differ in size by one and by their skipped samples; a part may be empty.

        Raises
        ------
        UserError
            If too many samples are skipped, or if a worker dies.
        """
        if not 0 <= first <= self.steps_per_epoch:
            raise ValueError(f"first must be from 0 to {self.steps_per_epoch}, got {first}")
        keys = [(epoch, step) for step in range(first, self.steps_per_epoch)]
        return self._counted(keys, self._workers.map(keys))

    def _counted(self, keys: Sequence[tuple[int, int]], batches: Iterator[Batch]) -> Iterator[Batch]:
        for _, batch in zip(keys, batches, strict=True):
            self._count(batch)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of samples that this rank has seen, and of those that it skipped, by reason."""
        return {_SEEN: self._seen, **self.skipped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load the counts, so that the limit on skipped samples holds for a run that is often interrupted as well."""
        self._seen = state.get(_SEEN, 0)
        self.skipped = Counter({reason: count for reason, count in state.items() if reason != _SEEN})

    def close(self) -> None:
        """End the worker processes, and delete what they copied."""
        self._workers.close()
        if self._copies is not None:
            self._copies.close()

    def _count(self, batch: Batch) -> None:
        self._seen += len(batch.index) + sum(batch.skipped.values())
        self.skipped.update(batch.skipped)
        lost = self.skipped.total()
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.skipped.most_common())
        if lost > max(SKIPS_ALLOWED, self._skip_limit * self._seen):
            raise UserError(
                f"{lost} of the {self._seen} samples so far cannot be used ({reasons}): "
                f"correct the data, or raise the limit of {self._skip_limit:g}"
            )


def _order(
    catalog: Catalog, reading: Reading, batch_size: int, block_shards: int, weighing: dict[str, Any]
) -> Order | Lanes:
    counts = catalog.shards.samples.tolist()
    if reading == "random":
        return Order(counts, block_shards=block_shards, **weighing)
    return Lanes(
        counts,
        catalog.shards.bytes.tolist(),
        batch_size=batch_size,
        block_bytes=BLOCK_BYTES if reading == "blocks" else None,
        lane_visits=LANE_VISITS[reading],
        group_blocks=GROUP_BLOCKS[reading],
        **weighing,
    )


class _BatchMaker:
    """Makes the batch of (epoch, step), in this process or in a worker."""

    def __init__(
        self,
        part: RankPart,
        reader: Reader,
        feed: BlockFeed | None,
        transform: Callable[[Image.Image], Tensor],
        tokenize: Callable[[Sequence[str]], Tensor],
        seed: int,
        reference: Reference | None,
    ) -> None:
        self._part, self._reader, self._feed = part, reader, feed
        self._seed, self._reference = seed, reference
        self._transform, self._tokenize = transform, tokenize

    def __call__(self, key: tuple[int, int]) -> Batch:
        epoch, step = key
        images: list[Tensor] = []
        captions: list[str] = []
        indices: list[int] = []
        drawn: list[Draws] = []
        own_images: list[Any] = []
        skipped: Counter[str] = Counter()
        visits = self._part.visits(epoch, step)
        held = self._feed.ready(epoch, step) if self._feed is not None else ()
        raws = self._reader.read_many(visits.index.tolist(), held)
        with random_state_restored():
            for raw, occurrence in zip(raws, visits.occurrence.tolist(), strict=True):
                draws = visit_draws(self._seed, epoch, raw.index, occurrence)
                if self._reference is not None:
                    draws = self._reference.draws(raw.index, draws)
                pair = raw if isinstance(raw, Skip) else decode(raw, draws.choice)
                if isinstance(pair, Skip):
                    skipped[pair.reason] += 1
                    continue
                draws.seed_generators()
                images.append(self._transform(pair.image))
                captions.append(pair.caption)
                indices.append(pair.index)
                drawn.append(draws)
                if self._reference is not None:
                    own_images.append(self._reference.image(pair.image, draws))
            if not images:
                return self._empty(skipped)
            # In a worker, default_collate writes into shared memory.
            image, index = default_collate(images), torch.tensor(indices)
        reference_inputs = (
            None if self._reference is None else self._reference.collate(index, drawn, own_images, captions)
        )
        return Batch(image, self._tokens(captions), index, dict(skipped), reference_inputs, self._part.size)

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        return self._tokenize(captions).to(torch.int32)

    def _empty(self, skipped: Counter[str]) -> Batch:
        """Return a batch of zero samples, whose other dimensions are those of any batch."""
        image = self._transform(Image.new("RGB", (64, 64)))[None]
        index = torch.empty(0, dtype=torch.int64)
        reference_inputs = None if self._reference is None else self._reference.empty_inputs()
        return Batch(image[:0], self._tokens(["none"])[:0], index, dict(skipped), reference_inputs, self._part.size)
