"""Batches on the device of the model, each copied there while the step before it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .batch import Batch, Stream


class Copyable(Protocol):
    """Something that holds tensors."""

    def of_each(self: Item, change: Callable[[Tensor], Tensor]) -> Item:
        """Return the same with each of its tensors changed."""
        ...


Item = TypeVar("Item", bound=Copyable)


@dataclass(frozen=True)
class Begun(Generic[Item]):
    """What is being copied to a device, and the event of the copy's end, if there is one."""

    item: Item
    end: torch.cuda.Event | None


class Copies:
    """Copies to a device that run beside what it computes: from page-locked memory, on a CUDA stream of their own.

    On the CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, item: Item) -> Begun[Item]:
        """Begin to copy, and return at once."""
        with torch.cuda.stream(self._side):  # which does nothing without one
            item = item.of_each(self._copied)
        if self._side is None:
            return Begun(item, None)
        event = torch.cuda.Event()
        event.record(self._side)
        return Begun(item, event)

    def _copied(self, part: Tensor) -> Tensor:
        if self._side is not None and not part.is_pinned():
            part = part.pin_memory()
        return part.to(self._device, non_blocking=True)

    def finish(self, begun: Begun[Item]) -> Item:
        """Return the copy for the stream that runs now, which waits for it; the host does not."""
        if begun.end is None:
            return begun.item
        current = torch.cuda.current_stream(self._device)
        current.wait_event(begun.end)
        # The memory is of the other stream, which must not use it again before this one is done with it.
        return begun.item.of_each(lambda part: _used_by(part, current))


def _used_by(part: Tensor, stream: torch.cuda.Stream) -> Tensor:
    part.record_stream(stream)  # pyright: ignore[reportArgumentType]
    return part


def copied_ahead(items: Iterator[Item], device: torch.device) -> Iterator[Item]:
    """Yield items on a device; when one is yielded, the copy of the next one has begun."""
    copies = Copies(device)
    due: Begun[Item] | None = None
    for item in items:
        following = copies.begin(item)
        if due is not None:
            yield copies.finish(due)
        due = following
    if due is not None:
        yield copies.finish(due)


class Prefetched:
    """A stream whose batches are on a device: a `data.batch.Stream`.

    When a batch is given, the copy of the next one has begun. An error of the batch ahead is raised when that batch is
    due, and the counts are those of the batches given, so that a caller does not notice that one is read ahead.
    """

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self._stream, self._copies = stream, Copies(device)
        self._counts = stream.state_dict()
        self._begun: tuple[tuple[int, int], Iterator[Batch]] | None = None
        self.steps_per_epoch = stream.steps_per_epoch

    def begin(self, epoch: int, first: int) -> None:
        """Let workers make the batches that `batches` will be asked for first, while the caller prepares for them."""
        self._begun = (epoch, first), self._stream.batches(epoch, first)

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yield this rank's part of each batch of the epoch, beginning with step ``first``."""
        begun, self._begun = self._begun, None
        source = begun[1] if begun and begun[0] == (epoch, first) else self._stream.batches(epoch, first)
        due = self._fetch(source)
        while due is not None:
            if isinstance(due, Exception):
                raise due
            following = self._fetch(source)
            begun, self._counts = due
            yield self._copies.finish(begun)
            due = following

    def _fetch(self, source: Iterator[Batch]) -> _Ahead | Exception | None:
        """Begin to copy the next batch; return it, or the error that took its place, or None at the end."""
        try:
            batch = next(source, None)
        except Exception as error:
            return error
        return None if batch is None else _Ahead(self._copies.begin(batch), self._stream.state_dict())

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
    """A batch whose copy has begun, and the stream's counts with it."""

    batch: Begun[Batch]
    counts: Mapping[str, int]
