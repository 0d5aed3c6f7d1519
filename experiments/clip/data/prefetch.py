"""Batches on the device of the model, each copied there while the step before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.clip.data.batch import Batch, Stream


class Prefetched:
    """A stream whose batches are on a device: a `experiments.clip.data.batch.Stream`.

    When a batch is given, the copy of the next one has begun, from page-locked memory and on a CUDA stream of its own;
    what the caller's stream does with a batch waits for its own copy alone. On the CPU nothing is copied.

    An error of the batch ahead is raised when that batch is due, and the counts are those of the batches given, so
    that a caller does not notice that one is read ahead.
    """

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self._stream, self._device = stream, device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._counts = stream.state_dict()
        self.steps_per_epoch = stream.steps_per_epoch

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yield this rank's part of each batch of the epoch, beginning with step ``first``."""
        source = self._stream.batches(epoch, first)
        due = self._fetch(source)
        while due is not None:
            if isinstance(due, Exception):
                raise due
            following = self._fetch(source)
            self._counts = due.counts
            yield self._arrived(due)
            due = following

    def _fetch(self, source: Iterator[Batch]) -> _Ahead | Exception | None:
        """Begin to copy the next batch; return it, or the error that took its place, or None at the end."""
        try:
            batch = next(source, None)
        except Exception as error:
            return error
        if batch is None:
            return None
        with torch.cuda.stream(self._side):  # which does nothing without one
            batch = batch.of_each(self._copied)
        return _Ahead(batch, self._stream.state_dict(), self._end_of_copies())

    def _end_of_copies(self) -> torch.cuda.Event | None:
        if self._side is None:
            return None
        event = torch.cuda.Event()
        event.record(self._side)
        return event

    def _copied(self, part: Tensor) -> Tensor:
        if self._side is not None and not part.is_pinned():
            part = part.pin_memory()
        return part.to(self._device, non_blocking=True)

    def _arrived(self, due: _Ahead) -> Batch:
        """Return the batch, for the stream that runs now."""
        if due.copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(due.copied)
            # Its memory is of the other stream, which must not use it again before this one is done with it.
            due.batch.of_each(lambda part: _used_by(part, current))
        return due.batch

    def state_dict(self) -> dict[str, int]:
        """Return this rank's counts, of the batches that were given."""
        return dict(self._counts)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load the counts that `state_dict` returned, and continue from them."""
        self._stream.load_state_dict(state)
        self._counts = self._stream.state_dict()

    def close(self) -> None:
        """End the worker processes."""
        self._stream.close()


class _Ahead(NamedTuple):
    """A batch whose copy has begun, the stream's counts with it, and the event of the copy's end."""

    batch: Batch
    counts: Mapping[str, int]
    copied: torch.cuda.Event | None


def _used_by(part: Tensor, stream: torch.cuda.Stream) -> Tensor:
    part.record_stream(stream)  # pyright: ignore[reportArgumentType]
    return part
