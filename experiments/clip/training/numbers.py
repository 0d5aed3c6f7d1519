"""The numbers of training steps: summed over ranks in one message, and read when that waits for nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Numbers by name.
Record = dict[str, float]


class RankSum(NamedTuple):
    """A number to log of which every rank has a part: ``finish`` of the sum of the parts over ranks."""

    part: Tensor
    finish: Callable[[float], float]


#: A number to log: one that the host knows, or one that the device will have computed.
Number = float | Tensor | RankSum


def packed(numbers: Sequence[Tensor]) -> Tensor:
    """Return scalars of any types in one tensor, float64, by a few operations."""
    dtypes = list(dict.fromkeys(number.dtype for number in numbers))
    parts = [[k for k, number in enumerate(numbers) if number.dtype == dtype] for dtype in dtypes]
    stacked = [torch.stack([numbers[k].detach().reshape(()) for k in part]).double() for part in parts]
    if len(parts) == 1:
        return stacked[0]
    places = {k: place for place, k in enumerate(k for part in parts for k in part)}
    together = torch.cat(stacked).unbind()
    return torch.stack([together[places[k]] for k in range(len(numbers))])


def on_device(log: Mapping[str, Number]) -> list[Tensor]:
    """Return the numbers that the device computes and every rank has, in order."""
    return [number for number in log.values() if isinstance(number, Tensor)]


def parts_of_ranks(log: Mapping[str, Number]) -> list[Tensor]:
    """Return this rank's parts of the numbers that are summed over ranks, in order."""
    return [number.part for number in log.values() if isinstance(number, RankSum)]


def filled_in(log: Mapping[str, Number], sums: Iterable[float], values: Iterable[float]) -> Record:
    """Return the log with the numbers that `parts_of_ranks`, summed, and `on_device` gave."""
    sums, values, record = iter(sums), iter(values), {}
    for name, number in log.items():
        if isinstance(number, RankSum):
            record[name] = number.finish(next(sums))
        elif isinstance(number, Tensor):
            value = next(values)
            record[name] = value if number.is_floating_point() else int(value)
        else:
            record[name] = number
    return record


class LateNumbers:
    """Numbers that are copied from the device while it goes on, and received in order some steps later.

    Parameters
    ----------
    lag : int
        How many of the last ones may still be on their way; the same on all ranks, which receive them alike.
    """

    def __init__(self, device: torch.device, lag: int) -> None:
        self._device, self._lag = device, lag
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: deque[tuple[Callable[[], list[float]], Callable[[list[float]], None]]] = deque()

    def put(self, numbers: Tensor | None, receive: Callable[[list[float]], None]) -> None:
        """Send numbers ``[n]``, or none, to ``receive``."""
        self._pending.append((list if numbers is None else self._copied(numbers), receive))

    def read(self, *, all_of_them: bool = False) -> None:
        """Let those be received that are old enough."""
        while len(self._pending) > (0 if all_of_them else self._lag):
            values, receive = self._pending.popleft()
            receive(values())

    def _copied(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Start to copy the numbers; return what waits for them."""
        if self._stream is None:
            return numbers.tolist
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        copy, done = torch.empty_like(numbers, device="cpu", pin_memory=True), torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            copy.copy_(numbers, non_blocking=True)
            done.record()
        numbers.record_stream(self._stream)

        def values() -> list[float]:
            done.synchronize()
            return copy.tolist()

        return values
