"""Clocks of calls on a device, and the memory that they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from experiments.benchmarks.measure import explain, seconds

Figure = TypeVar("Figure")
REPEATS = 21
PATIENCE = 0.2  # seconds for the repeats of one figure


class Measured(NamedTuple):
    """Milliseconds of a call, and the peak of allocated memory beyond what is there before it; None without CUDA."""

    ms: float
    peak: int | None


def measured(call: Callable[[], Any], repeats: int = REPEATS, patience: float = PATIENCE) -> Measured:
    """Return the median time of single calls, what they queue on the device included, and the peak of one.

    Two calls come before: the first compiles kernels, the second is the one whose memory is measured. The time of the
    second says how many more there is patience for; where that is none, it is the time that is returned.
    """
    call()
    synchronize()
    peak: list[int | None] = []
    once = seconds(lambda: peak.append(_peak_bytes(call)))
    count = min(repeats, int(patience / max(once, 1e-9)))
    time = statistics.median(seconds(call) for _ in range(max(3, count))) if count else once
    return Measured(1e3 * time, peak[0])


def milliseconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the time of `measured`."""
    return measured(call, repeats).ms


def host_microseconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return how long the host is busy with a call, the median over calls that each find an idle device."""
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    synchronize()
    return 1e6 * statistics.median(times)


def _peak_bytes(call: Callable[[], Any]) -> int | None:
    if not torch.cuda.is_available():
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def synchronize() -> None:
    """Wait until the device has done what is queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def or_reason(measure: Callable[[], Figure]) -> tuple[Figure | None, str]:
    """Return a figure and "", or None and why it could not be measured."""
    try:
        return measure(), ""
    except Exception as error:  # the other figures are still worth having
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None, explain(error)


def ratio(measured: float | None, yardstick: float | None) -> float | None:
    """Return the quotient, if both are there."""
    return None if measured is None or yardstick is None else measured / yardstick


def release() -> None:
    """Give freed memory back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
