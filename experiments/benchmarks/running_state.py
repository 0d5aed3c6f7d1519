"""Measure the running estimates: lookup and update of a batch, and the memory that a rank holds.

``python experiments/benchmarks/running_state.py`` measures one process at 255 million samples (2 GB);
``--ranks 2 --samples 20000000`` spreads the samples over two gloo processes of this machine, each with a batch of its
own. Prints a table, writes nothing. Every step visits other samples, so that no row is in a cache from the step before.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from drrho.running import RunningEstimates
from experiments.benchmarks import memory
from experiments.benchmarks.measure import markdown, provenance, seconds, within

REACH_MS = 2.0
REACH_MEMORY = 1.1
REHEARSAL = 100_000  # samples of the state on which code and buffers are loaded before anything is counted


class Setting(NamedTuple):
    """What is measured."""

    samples: int
    batch: int
    ranks: int
    steps: int


@dataclass(frozen=True)
class Row:
    """One operation: times on the first rank, of which the median is to reach, or the largest memory of any rank."""

    measured: str
    value: float
    fastest: float | None
    unit: str
    reach: float
    met: str


class Times(NamedTuple):
    """Seconds of every call."""

    lookups: list[float]
    updates: list[float]


def steps(estimates: RunningEstimates, setting: Setting, rank: int) -> Times:
    """Look up and update random batches in turn."""
    generator = torch.Generator().manual_seed(rank)
    times = Times([], [])
    for _ in range(setting.steps):
        index = torch.randint(len(estimates), (setting.batch,), generator=generator)
        other = torch.randint(len(estimates), (setting.batch,), generator=generator)
        log_u = torch.randn(2, setting.batch, generator=generator)
        times.lookups.append(_seconds(lambda index=index: estimates.lookup(index), setting.ranks))
        times.updates.append(
            _seconds(lambda index=other, u=log_u: estimates.update(index, (u[0], u[1])), setting.ranks)
        )
    return times


def _seconds(call: Any, ranks: int) -> float:
    if ranks > 1:
        dist.barrier()
    return seconds(call)


def measured(setting: Setting, rank: int = 0, group: Any = None) -> tuple[Times, float]:
    """Return the times of this rank, and the peak bytes that state and steps take on any rank."""
    steps(RunningEstimates(REHEARSAL, group=group), setting, rank)
    before = memory.peak()
    estimates = RunningEstimates(setting.samples, group=group)
    times = steps(estimates, setting, rank)
    held = torch.tensor(float(memory.peak() - before))
    if group is not None:
        dist.all_reduce(held, dist.ReduceOp.MAX, group=group)
    return times, held.item()


def work(rank: int, folder: str, setting: Setting) -> None:
    """One rank; the first one prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=setting.ranks)
    result = measured(setting, rank, dist.group.WORLD)
    if rank == 0:
        print(table(setting, *result))
    dist.destroy_process_group()


def table(setting: Setting, times: Times, held: float) -> str:
    """Return the figures beside what is aimed at."""
    share = held / (8 * math.ceil(setting.samples / setting.ranks))
    rows: list[tuple[str, float, float | None, str, float]] = [
        (name, 1e3 * statistics.median(calls), 1e3 * min(calls), "ms", REACH_MS)
        for name, calls in (("lookup", times.lookups), ("update", times.updates))
    ]
    rows.append(("memory of a rank", share, None, f"8 n / ranks ({held / 1e6:.0f} MB)", REACH_MEMORY))
    return markdown(Row(*row, met=within(row[1], row[-1])) for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=255_000_000, help="n over all ranks (default: 255000000)")
    parser.add_argument("--batch", type=int, default=5120, help="samples of a step on each rank (default: 5120)")
    parser.add_argument("--ranks", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--steps", type=int, default=100, help="timings of which the median counts (default: 100)")
    setting = Setting(**vars(parser.parse_args(arguments)))
    torch.set_num_threads(1)
    given = sys.argv[1:] if arguments is None else arguments
    record = provenance(shlex.join(["python", "experiments/benchmarks/running_state.py", *given]))
    print(
        f"`{record['command']}`, {record['date']}. {record['machine']}; {record['threads']} thread a process, load at "
        f"the start {record['load']}, torch {record['versions']['torch']}.\n"
    )
    print(f"n = {setting.samples}, ranks = {setting.ranks}, batch of a rank = {setting.batch}\n")
    if setting.ranks == 1:
        print(table(setting, *measured(setting)))
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, args=(folder, setting), nprocs=setting.ranks)


if __name__ == "__main__":
    main()
