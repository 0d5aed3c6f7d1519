"""The part ``nccl``: a group of ranks, one rank with NCCL on a GPU, gives what no group gives, to rounding.

Every rank computes both in the same process: trainings through the trainer (DistributedDataParallel and FSDP2), their
checkpoints, sharded running state, and the library's risks with a group.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.benchmarks.gpu import ranks_library
from experiments.benchmarks.gpu.agreement import Check, relative
from experiments.benchmarks.gpu.cases import Setting, missing_packages
from experiments.benchmarks.gpu.crew import outcomes
from experiments.benchmarks.gpu.record import Record
from experiments.benchmarks.measure import explain

_SECONDS = 100.0
_STEPS = 4
# Adam's steps do not depend on the size of a gradient but where this constant is larger: rounding stays rounding.
_SMOOTH = ("--adam-eps", "0.01", "--warmup", "1")
_FASTCLIP = ("--method", "fastclip", "--temperature", "0.1")
_STEERED = ("--method", "drrho", "--temperature", "0.1")
TRAININGS: dict[str, tuple[str, ...]] = {
    "openclip, DDP": ("--method", "openclip"),
    "openclip, FSDP2": ("--method", "openclip", "--parallel", "fsdp"),
    "openclip, FSDP2, accumulated": ("--method", "openclip", "--parallel", "fsdp", "--accumulation", "2"),
    "openclip, FSDP2, bfloat16": ("--method", "openclip", "--parallel", "fsdp", "--precision", "bfloat16"),
    "drrho beside its reference, DDP": _STEERED,
    "drrho beside its reference, FSDP2": (*_STEERED, "--parallel", "fsdp"),
    "fastclip v2, DDP": (*_FASTCLIP, "--temperature-scheme", "individual", "--rho", "0.5"),
    "fastclip v3, DDP": (*_FASTCLIP, "--temperature-scheme", "global", "--rho", "0.5"),
    "fastclip, chi-square, DDP": (*_FASTCLIP, "--divergence", "chi-square"),
    "drrho on rho top-k, DDP": (*_STEERED, "--select", "rho-top-k", "--candidates", "2"),
    "two levels, FSDP2": ("--method", "two-level", "--temperature", "0.1", "--parallel", "fsdp"),
}
_QUICK = ("openclip, DDP", "openclip, FSDP2", "drrho beside its reference, DDP")
#: Differences relative to the norms: of weights, of running state, and of weights when a run is resumed at its end.
_BFLOAT16 = 5e-3  # of weights, where FSDP2 casts them and autocast the inputs of products
TOLERANCES = {"weights": 1e-4, "state": 1e-3, "resumed": 0.0}


class Place(NamedTuple):
    """A rank of a group that is to be made."""

    rank: int
    ranks: int
    setting: Setting
    port: int


def run(setting: Setting, record: Record) -> None:
    """Compare with and without a group, of one rank, and without a GPU also of two."""
    record.text("Ranks", "Differences from the same without a group, relative to the norm.")
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
        if not missing_packages("open_clip", "tyro"):
            found += trainings(place, device)
    finally:
        dist.destroy_process_group()
    return found


def trainings(place: Place, device: torch.device) -> Iterator[Check]:
    """Train by every method of `TRAININGS`, with the group and without it."""
    names = _QUICK if place.setting.small else TRAININGS
    for name in names:
        yield _attempted(name, partial(_compared, name, place, device))


def _attempted(name: str, compare: Callable[[], Check]) -> Check:
    """Return the comparison, or why it was not possible: the next one may be. Ranks fail together, or time runs out."""
    try:
        return compare()
    except Exception as error:
        return Check("training", name, "", name, problem=explain(error))


class Result(NamedTuple):
    """All weights in one vector, and the method's state."""

    weights: Tensor
    state: Tensor


def _compared(name: str, place: Place, device: torch.device) -> Check:
    from experiments.clip.distributed import Ranks

    folder = place.setting.scratch / f"{place.ranks}-{name.replace(' ', '-').replace(',', '')}"
    group = Ranks(place.rank, place.ranks, device, dist.group.WORLD)
    alone = Ranks(device=device)
    expected, _ = _trained(name, place, alone, folder / f"alone-{place.rank}")
    found, resumed = _trained(name, place, group, folder / "group", resume=True)
    shutil.rmtree(folder / f"alone-{place.rank}", ignore_errors=True)
    errors = {
        "weights": relative(found.weights, expected.weights),
        "resumed": resumed,
    }
    if place.ranks == 1 and expected.state.numel():  # with more ranks a state is a part of the samples'
        errors["state"] = relative(found.state, expected.state)
    tolerances = TOLERANCES | ({"weights": _BFLOAT16} if "bfloat16" in name else {})
    return Check("training", name, "", name).held(errors, tolerances)


def _trained(name: str, place: Place, ranks: Any, out: Path, resume: bool = False) -> tuple[Result, float]:
    """Train; return what came of it, and how far a training that resumes from its checkpoint is from it."""
    from experiments.benchmarks.gpu.training import Training, made_up_catalog

    setting = place.setting
    batch, pixels = (16, 32) if setting.small else (64, 64)
    catalog = made_up_catalog(batch * _STEPS, setting.scratch / f"catalog-{place.ranks}-{place.rank}", pixels)
    model = "glyph-micro" if setting.small else "glyph-small"
    words = ["--catalog", catalog, "--model", model, "--batch-size", batch, "--epochs", 1, "--log-every", 1]
    words += ["--device", setting.device, *_SMOOTH, *TRAININGS[name]]
    training = Training(list(map(str, words)), out, ranks, lambda step: None)
    training.fit()
    result = Result(_weights(training), _state(training))
    if not resume:
        return result, 0.0
    again = Training(list(map(str, words)), out, ranks, lambda step: None)
    again.fit()
    return result, relative(_weights(again), result.weights)


def _weights(training: Any) -> Tensor:
    from experiments.clip.training.towers import full_tensor

    parameters = training.clip.model.state_dict().values()
    return torch.cat([full_tensor(value).detach().double().cpu().reshape(-1) for value in parameters])


def _state(training: Any) -> Tensor:
    values = training.trainer.state.method.state_dict().values()
    flat = [value.detach().double().cpu().reshape(-1).nan_to_num(-99.0, -99.0, -99.0) for value in values]
    return torch.cat(flat) if flat else torch.empty(0)
