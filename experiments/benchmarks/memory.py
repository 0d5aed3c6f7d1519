"""Peak memory of one problem, as ``python -m experiments.benchmarks.memory NAME N``; `measure.peak_arrays` runs it.

The high-water mark of resident memory before and after, in a process that does nothing else: whatever allocates,
torch or not, is counted. The losses exist before and are not counted; the answer is.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.problems import RACES, losses

CHECK = "three arrays"


def extra_arrays(name: str, n: int) -> float:
    """Return the highest peak over a problem's parameters, in float64 arrays of n."""
    calls = _calls(name)
    for call in calls:
        call(losses("exponential", 1000))  # loads what is loaded on first use
    z = losses("exponential", n)
    forget_peak()
    before = peak()
    for call in calls:
        call(z)
    return (peak() - before) / (8 * n)


def _calls(name: str) -> list[Callable[[torch.Tensor], Any]]:
    if name == CHECK:
        return [lambda z: [torch.ones_like(z) for _ in range(3)]]
    race = next(race for race in RACES if race.problem.name == name)
    return [lambda z, value=value: race.problem.solve(z, value) for value in race.values]


def forget_peak() -> None:
    """Make the present the high-water mark, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the high-water mark of resident memory in bytes."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS; on Linux a parent's peak is in it


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(extra_arrays(sys.argv[1], int(sys.argv[2])))
