"""What the device and the host do during some calls, from a trace of ``torch.profiler``."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from experiments.benchmarks.gpu.clock import synchronize

_MARK = "traced"
_HOST = ("cuda_runtime", "cuda_driver", "cpu_op")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_WAITS = re.compile("cuda(Stream|Event|Device)Synchronize")
_LAUNCHES = re.compile("cu(da)?LaunchKernel|cudaGraphLaunch")
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
        self._profile, self._mark = profile(activities=activities), record_function(_MARK)

    def start(self) -> None:
        """Begin."""
        self._profile.__enter__()
        self._mark.__enter__()

    def stop(self) -> Trace:
        """End, and return what was seen."""
        self._mark.__exit__(None, None, None)
        synchronize()
        self._profile.__exit__(None, None, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            return read(json.loads(path.read_text())["traceEvents"])


def traced(call: Callable[[], Any]) -> Trace:
    """Return the trace of a call."""
    tracer = Tracer()
    synchronize()
    tracer.start()
    call()
    return tracer.stop()


def read(events: Sequence[Mapping[str, Any]]) -> Trace:
    """Summarize the events of a trace in Chrome's format: of the host, those between `Tracer.start` and its stop."""
    marks = [event for event in events if event.get("cat") == "user_annotation" and event.get("name") == _MARK]
    first = min((float(mark["ts"]) for mark in marks), default=-math.inf)
    last = max((float(mark["ts"]) + float(mark["dur"]) for mark in marks), default=math.inf)
    trace, intervals = Trace(), []
    kernels: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    waits: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    copies: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for event in events:
        kind, name, time = event.get("cat", ""), event.get("name", ""), float(event.get("dur", 0.0))
        if kind in _DEVICE:
            intervals.append((float(event["ts"]), float(event["ts"]) + time))
        if kind == "kernel":
            _add(kernels[name[:_LONGEST_NAME]], 1, time)
        elif kind == "gpu_memcpy":
            _add(copies[name], 1, float(event.get("args", {}).get("bytes", 0)), time)
        elif kind in _HOST and first <= float(event["ts"]) <= last:
            if _WAITS.fullmatch(name):
                _add(waits[name], 1, time)
            trace.launches += bool(_LAUNCHES.search(name))
            trace.items += name == _ITEM
    trace.busy, trace.waits, trace.copies = _union(intervals), dict(waits), dict(copies)
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
