"""What the device and the host do during some calls, from a trace of ``torch.profiler``."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_RUNTIME = ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_WAITS = re.compile("cuda(Stream|Event|Device)Synchronize")
_ITEM = "aten::_local_scalar_dense"
_TOP = 15
_LONGEST_NAME = 90


@dataclass
class Trace:
    """Counts, and times in microseconds, of everything between start and end.

    Attributes
    ----------
    busy : float
        Time during which a kernel or a copy ran on the device, overlaps counted once.
    launches : int
        Kernels that the host launched.
    waits : dict
        Calls in which the host waits for the device: by name, their number and time.
    items : int
        Reads of a tensor's value by the host, on any device.
    copies : dict
        By kind and kind of memory: number, bytes and time.
    kernels : list
        The kernels that took longest: name, number, time.
    """

    busy: float = 0.0
    launches: int = 0
    items: int = 0
    waits: dict[str, list[float]] = field(default_factory=dict)
    copies: dict[str, list[float]] = field(default_factory=dict)
    kernels: list[tuple[str, int, float]] = field(default_factory=list)

    @property
    def waited(self) -> int:
        """How often the host waited for the device."""
        return int(sum(count for count, _ in self.waits.values()))

    def per(self, calls: int) -> dict[str, Any]:
        """Return everything divided by a number of calls."""
        return {
            **asdict(self),
            "busy": self.busy / calls,
            "launches": self.launches / calls,
            "items": self.items / calls,
            "waits": {name: [number / calls for number in numbers] for name, numbers in self.waits.items()},
            "copies": {name: [number / calls for number in numbers] for name, numbers in self.copies.items()},
            "kernels": [(name, count / calls, time / calls) for name, count, time in self.kernels],
        }


class Tracer:
    """Traces from `start` to `stop`."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)

    def start(self) -> None:
        """Begin."""
        self._profile.__enter__()

    def stop(self) -> Trace:
        """End, and return what was seen."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.__exit__(None, None, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            return read(json.loads(path.read_text())["traceEvents"])


def traced(call: Callable[[], Any], calls: int = 1) -> Trace:
    """Return the trace of so many calls, the last wait left out: it is the tracer's own."""
    tracer = Tracer()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    tracer.start()
    for _ in range(calls):
        call()
    found = tracer.stop()
    own = found.waits.get("cudaDeviceSynchronize")
    if own is not None:
        own[0] -= 1
    return found


def read(events: Iterable[Mapping[str, Any]]) -> Trace:
    """Summarize the events of a trace in Chrome's format."""
    trace, intervals = Trace(), []
    kernels: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    waits: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    copies: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    counted: Counter[str] = Counter()
    for event in events:
        kind, name, time = event.get("cat", ""), event.get("name", ""), float(event.get("dur", 0.0))
        if kind in _DEVICE:
            intervals.append((float(event["ts"]), float(event["ts"]) + time))
        if kind == "kernel":
            _add(kernels[name[:_LONGEST_NAME]], 1, time)
        elif kind == "gpu_memcpy":
            _add(copies[name], 1, float(event.get("args", {}).get("bytes", 0)), time)
        elif kind in _RUNTIME and _WAITS.fullmatch(name):
            _add(waits[name], 1, time)
        elif kind in _RUNTIME:
            counted["launches"] += "LaunchKernel" in name or "GraphLaunch" in name
        elif name == _ITEM:
            counted["items"] += 1
    trace.busy, trace.launches, trace.items = _union(intervals), counted["launches"], counted["items"]
    trace.waits, trace.copies = dict(waits), dict(copies)
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:_TOP]
    trace.kernels = [(name, int(count), time) for name, (count, time) in longest]
    return trace


def _add(sums: list[float], *numbers: float) -> None:
    for place, number in enumerate(numbers):
        sums[place] += number


def _union(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
