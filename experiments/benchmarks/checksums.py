"""Measure what checksums add to writing and to loading a checkpoint, beside the same without them, in turns.

``python experiments/benchmarks/checksums.py`` writes a checkpoint of 1 GB, as a training does, with its checksum and
without, by turns, so that what else the machine does meets both; then it verifies it and reads its tensors. Medians of
all rounds go to results/checksums.md; what checksums add is the difference of the quickest rounds, as a disk that is
busy with the checkpoints before doubles others.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.benchmarks.measure import provenance, within, write_page
from experiments.clip.distributed import Ranks
from experiments.clip.io.checksums import checksum
from experiments.clip.training import checkpoint_writer
from experiments.clip.training.checkpoint import Checkpoint, check_sound, step_folder
from experiments.clip.training.checkpoint_writer import CheckpointWriter

REACH_SHARE, REACH_SECONDS = 0.03, 0.5
PARTS = 64  # tensors


@dataclass(frozen=True)
class Row:
    """A figure over rounds, and what it is to stay below."""

    measured: str
    median: float
    rounds: str
    unit: str
    reach: float | None
    met: str


def state_of(size: int) -> dict[str, Tensor]:
    """Return tensors of so many bytes together, whose contents cannot be compressed."""
    return {f"weight{k}": torch.randn(size // 4 // PARTS) for k in range(PARTS)}


@contextmanager
def without_checksums() -> Iterator[None]:
    """Let checkpoints be written in the block as if a checksum took no time."""
    computed, checkpoint_writer.checksum = checkpoint_writer.checksum, lambda path: "0" * 64
    try:
        yield
    finally:
        checkpoint_writer.checksum = computed


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def written(folder: Path, state: dict[str, Tensor], step: int) -> Path:
    """Write a checkpoint, from the copy of the state to the last rename."""
    writer = CheckpointWriter(folder, {}, Ranks(), keep=1)
    writer.start(state, {}, {}, {"step": step})
    writer.commit()
    return step_folder(folder, step)


def rounds_of(folder: Path, state: dict[str, Tensor], rounds: int) -> dict[str, list[float]]:
    """Return seconds of each round: written with and without checksums, the checksum alone, verified, loaded."""
    names = ("with", "without", "alone", "processor", "verified", "loaded")
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in ("with", "without") if number % 2 else ("without", "with"):
            step = 2 * number + (name == "with") + 1
            if name == "without":
                with without_checksums():
                    found[name].append(seconds(lambda step=step: written(folder, state, step)))
                continue
            found[name].append(seconds(lambda step=step: written(folder, state, step)))
            path = step_folder(folder, step)
            [part] = path.glob("*.safetensors")
            began = time.process_time()
            found["alone"].append(seconds(lambda part=part: checksum(part)))
            found["processor"].append(time.process_time() - began)
            found["loaded"].append(seconds(lambda path=path: Checkpoint(path).full_tensors("")))
            found["verified"].append(seconds(lambda path=path: check_sound(path)))
    return found


def rows(found: dict[str, list[float]], gigabytes: float) -> list[Row]:
    """Return the figures."""
    shares = [100 * (a - b) / b for a, b in zip(found["with"], found["without"], strict=True)]
    least = 100 * (min(found["with"]) / min(found["without"]) - 1)
    size = f"{gigabytes:g} GB"
    return [
        _row(f"a checkpoint of {size} written without checksums", found["without"], "s"),
        _row(f"a checkpoint of {size} written with checksums", found["with"], "s"),
        Row("what checksums add to the quickest", least, _listed(shares), "%", 100 * REACH_SHARE, within(least, 3.0)),
        _row("the checksum alone, beside which the disk is written", found["alone"], "s"),
        _row("processor time of that, over all threads", found["processor"], "s"),
        _row(f"{size} read without verification", found["loaded"], "s"),
        _row(f"{size} verified before it is read", found["verified"], "s", REACH_SECONDS * gigabytes),
    ]


def _row(measured: str, values: Sequence[float], unit: str, reach: float | None = None) -> Row:
    median = statistics.median(values)
    return Row(measured, median, _listed(values), unit, reach, within(median, reach))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def main(arguments: Sequence[str]) -> int:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="10^9 bytes of a checkpoint")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; a temporary folder by default")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "checksums.md")
    options = parser.parse_args(arguments)
    record = provenance(shlex.join(["python", "experiments/benchmarks/checksums.py", *arguments]))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = rounds_of(Path(folder), state_of(int(1e9 * options.gigabytes)), options.rounds)
    table = rows(found, options.gigabytes)
    about = "One rank; with and without by turns."
    write_page(options.output, "Checksums of checkpoints", record, about, table)
    return int(any(row.met == "NO" for row in table))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
