"""Some steps of every training method, through the trainer, on the device against the CPU, in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from experiments.benchmarks.gpu.agreement import Check

PAIRS = 128
#: Largest differences of the weights, in units of their change, and of the method's state, relative to its norm.
TOLERANCES = {"weights": 2e-2, "state": 1e-3}
_QUICK = ("openclip", "fastclip v2", "fastclip, chi-square", "drrho")


def names(small: bool) -> list[str]:
    """Return the names of the methods."""
    from experiments.benchmarks.gpu.training import METHODS

    return [name for name in METHODS if name in _QUICK or not small]


def checks(name: str, device: str, small: bool) -> Iterator[Check]:
    """Compare a method's trainings."""
    from experiments.benchmarks.gpu.training import few_steps
    from experiments.clip.distributed import Ranks

    with tempfile.TemporaryDirectory() as folder:
        scratch, batch = Path(folder), 16 if small else PAIRS
        places = {place: Ranks(device=torch.device(place)) for place in ("cpu", device)}
        found = {
            place: few_steps(name, (), batch, scratch, scratch / f"{place}-{number}", ranks)
            for number, (place, ranks) in enumerate(places.items())
        }
        errors = found[device].differences(found["cpu"])
        yield Check("method", name, "float32", name).held(errors, TOLERANCES)
