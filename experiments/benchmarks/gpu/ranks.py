"""The part ``nccl``: a group of ranks, one rank with NCCL on a GPU, gives what no group gives, to rounding.

Every rank computes both in the same process: trainings through the trainer (DistributedDataParallel and FSDP2), their
checkpoints, sharded running state, and the library's risks with a group.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from experiments.benchmarks.gpu import ranks_library
from experiments.benchmarks.gpu.agreement import Check, relative
from experiments.benchmarks.gpu.cases import TRAINER, Setting, missing_packages
from experiments.benchmarks.gpu.crew import outcomes
from experiments.benchmarks.gpu.record import Record
from experiments.benchmarks.measure import explain

_SECONDS = 105.0
_ENOUGH = 75.0  # seconds after which no training is started
_FSDP = ("--parallel", "fsdp")
#: By name: a method, and options beside it.
TRAININGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "openclip, DDP": ("openclip", ()),
    "openclip, FSDP2": ("openclip", _FSDP),
    "drrho beside its reference, DDP": ("drrho", ()),
    "drrho beside its reference, FSDP2": ("drrho", _FSDP),
    "openclip, FSDP2, accumulated": ("openclip", (*_FSDP, "--accumulation", "2")),
    "openclip, FSDP2, bfloat16": ("openclip", (*_FSDP, "--precision", "bfloat16")),
    "fastclip v2, DDP": ("fastclip v2", ()),
    "fastclip v3, FSDP2": ("fastclip v3", _FSDP),
    "fastclip, chi-square, DDP": ("fastclip, chi-square", ()),
    "drrho on rho top-k, DDP": ("drrho on rho top-k", ()),
    "two levels, FSDP2": ("two levels", _FSDP),
}
_QUICK = 3  # trainings of a dry run
_RESUMED = 4  # trainings that are resumed at their end
#: Largest differences: of weights in units of their change, of the state relative to its norm.
TOLERANCES = {"weights": 1e-3, "state": 1e-3, "resumed": 0.0}
_BFLOAT16 = 0.2  # of weights, where FSDP2 casts them and autocast the inputs of products


class Place(NamedTuple):
    """A rank of a group that is to be made."""

    rank: int
    ranks: int
    setting: Setting
    port: int


def run(setting: Setting, record: Record) -> None:
    """Compare with and without a group, of one rank, and without a GPU also of two."""
    record.text("Ranks", "Differences from the same without a group, relative to the norm.")
    if missing := missing_packages(*TRAINER):
        record.text("Ranks", f"The trainings were left out: they need {missing[0]}, see --packages.")
    counts = (1,) if setting.device == "cuda" else (1, 2)
    for count in counts:
        places = [Place(rank, count, setting, _free_port()) for rank in range(count)]
        places = [place._replace(port=places[0].port) for place in places]
        seconds = _SECONDS * (1 + 5 * setting.small)
        for place, found, problem in outcomes(work, places, count, seconds):
            if problem:
                record.fail(f"rank {place.rank} of {count}", problem)
                continue
            for check in found:
                record.row("Ranks", ranks=count, rank=place.rank, kind=check.kind, case=check.case, **check.errors)
                if check.problem:
                    record.fail(f"{check.case}, rank {place.rank} of {count}", check.problem)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(place: Place) -> list[Check]:
    """Join the group and compare everything on this rank."""
    setting = place.setting
    backend, device = ("nccl", torch.device("cuda", 0)) if setting.device == "cuda" else ("gloo", torch.device("cpu"))
    if setting.device == "cuda":
        torch.cuda.set_device(device)
    address = f"tcp://127.0.0.1:{place.port}"
    dist.init_process_group(backend, init_method=address, rank=place.rank, world_size=place.ranks)
    try:
        found = list(ranks_library.checks(device))
        if not missing_packages(*TRAINER):
            try:
                found.extend(trainings(place, device))
            except Exception as error:  # the library's checks are done, and kept
                found.append(Check("training", "start", "", "start", problem=explain(error)))
    finally:
        dist.destroy_process_group()
    return found


def trainings(place: Place, device: torch.device) -> Iterator[Check]:
    """Train by everything in `TRAININGS`, with the group and without it."""
    from experiments.benchmarks.gpu.training import group_ranks

    ranks, started = group_ranks(place.rank, place.ranks, device), time.monotonic()
    for number, name in enumerate(TRAININGS):
        if place.setting.small and number >= _QUICK:
            return
        if place.ranks == 1 and not place.setting.small and time.monotonic() - started > _ENOUGH:
            yield Check("training", name, "", name, problem="there was no time left for it")
        else:
            yield _attempted(name, partial(_compared, name, place, ranks, number < _RESUMED))


def _attempted(name: str, compare: Callable[[], Check]) -> Check:
    """Return the comparison, or why it was not possible: the next one may be. Ranks fail together, or time runs out."""
    try:
        return compare()
    except Exception as error:
        return Check("training", name, "", name, problem=explain(error))


def _compared(name: str, place: Place, ranks: Any, resumes: bool) -> Check:
    from experiments.benchmarks.gpu.training import few_steps
    from experiments.clip.distributed import Ranks

    method, extra = TRAININGS[name]
    folder = place.setting.scratch / f"{place.ranks}-{name.replace(' ', '-').replace(',', '')}"
    size, scratch = 16 if place.setting.small else 64, place.setting.scratch / f"of-{place.ranks}"
    alone = Ranks(device=ranks.device)
    expected = few_steps(method, extra, size, scratch / f"alone-{place.rank}", folder / f"alone-{place.rank}", alone)
    found = few_steps(method, extra, size, scratch, folder / "group", ranks)
    # With more ranks than one, a rank's state is of its part of the samples.
    errors = found.differences(expected, with_state=place.ranks == 1)
    if resumes:
        again = few_steps(method, extra, size, scratch, folder / "group", ranks)
        errors["resumed"] = relative(again.after, found.after)
    tolerances = TOLERANCES | ({"weights": _BFLOAT16} if "bfloat16" in name else {})
    return Check("training", name, "", name).held(errors, tolerances)
