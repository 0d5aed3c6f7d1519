"""Batches of training pairs from a catalog, the same for any number of workers and ranks and after interruptions.

The stream is a pure function of (seed, epoch, position). An epoch's order (`experiments.clip.data.order`) is divided
into global batches whose sizes differ by at most one, and each of these into contiguous parts, one per rank. The random
numbers of a visit (augmentation, choice among captions) are a function of (seed, epoch, index, occurrence).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from experiments.clip.catalog.catalog import Catalog
from experiments.clip.data.batch import Batch, Reference
from experiments.clip.data.draws import Draws, random_state_restored, visit_draws
from experiments.clip.data.order import Order, Visits
from experiments.clip.data.reader import SKIPS_ALLOWED, Reader, Skip, decode
from experiments.clip.errors import UserError
from experiments.clip.io.workers import Workers

_SEEN = "seen"


class Loader:
    """Loads the batches of a catalog's samples: a `experiments.clip.data.batch.Stream`.

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
        Number of shards whose samples are shuffled together.
    skip_limit : float
        Largest share of the samples so far that may be skipped, once more than `SKIPS_ALLOWED` are.
    pin_memory : bool
        Whether batches are put into page-locked memory, which makes copies to a GPU faster.
    reference : Reference, optional
        The reference, whose inputs are collated into each batch.

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
        skip_limit: float = 0.1,
        pin_memory: bool = False,
        reference: Reference | None = None,
    ) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be from 0 to {ranks - 1}, got {rank}")
        if batch_size < ranks:
            raise UserError(f"the global batch size must be at least the number of ranks, {ranks}, got {batch_size}")
        order = Order(
            [shard.samples for shard in catalog.shards],
            seed=seed,
            weights=catalog.shard_weights(weights),
            block_shards=block_shards,
            resampled=resampled,
            epoch_samples=epoch_samples,
        )
        self.samples = order.samples
        self.steps_per_epoch = -(-self.samples // batch_size)
        self.skipped: Counter[str] = Counter()
        self._seen = 0
        self._skip_limit = skip_limit
        part = _Part(order, self.steps_per_epoch, rank, ranks)
        # At any time, workers read from at most two neighboring blocks.
        task = _BatchMaker(part, Reader(catalog, kept=2 * block_shards + 2), transform, tokenize, seed, reference)
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
        """End the worker processes."""
        self._workers.close()

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


class _Part(NamedTuple):
    """A rank's part of every batch."""

    order: Order
    steps: int
    rank: int
    ranks: int

    def visits(self, epoch: int, step: int) -> Visits:
        start, stop = _bounds(self.order.samples, self.steps, step)
        first, last = _bounds(stop - start, self.ranks, self.rank)
        return self.order.visits(epoch, start + first, start + last)

    @property
    def size(self) -> int:
        """The number of visits of the largest part."""
        return math.ceil(math.ceil(self.order.samples / self.steps) / self.ranks)


def _bounds(total: int, parts: int, part: int) -> tuple[int, int]:
    """Return start and end of a part of ``total``; sizes of parts differ by at most one, the larger ones come first."""
    size, larger = divmod(total, parts)
    start = part * size + min(part, larger)
    return start, start + size + (part < larger)


class _BatchMaker:
    """Makes the batch of (epoch, step), in this process or in a worker."""

    def __init__(
        self,
        part: _Part,
        reader: Reader,
        transform: Callable[[Image.Image], Tensor],
        tokenize: Callable[[Sequence[str]], Tensor],
        seed: int,
        reference: Reference | None,
    ) -> None:
        self._part, self._reader, self._seed, self._reference = part, reader, seed, reference
        self._transform, self._tokenize = transform, tokenize

    def __call__(self, key: tuple[int, int]) -> Batch:
        epoch, step = key
        images: list[Tensor] = []
        captions: list[str] = []
        indices: list[int] = []
        drawn: list[Draws] = []
        own_images: list[Tensor | None] = []
        skipped: Counter[str] = Counter()
        visits = self._part.visits(epoch, step)
        with random_state_restored():
            for raw, occurrence in zip(
                self._reader.read_many(visits.index.tolist()), visits.occurrence.tolist(), strict=True
            ):
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
