"""The part ``calls``: what a call of a risk asks of the host, running estimates, vmap, compile, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drrho.running import RunningEstimates
from experiments.benchmarks.gpu.cases import Risk, Setting, drawn, size_name
from experiments.benchmarks.gpu.clock import host_microseconds, milliseconds, release
from experiments.benchmarks.gpu.core import RISKS, YARDSTICKS, small
from experiments.benchmarks.gpu.crew import outcomes
from experiments.benchmarks.gpu.record import Record
from experiments.benchmarks.gpu.trace import traced

TRANSFORMED = ("KL penalty .5", "chi-square ball .5", "KL ball .5", "CVaR .1")
SHAPES = ((4096, 1024), (10**6,))
STATE = (255_000_000, 5120)  # samples and a batch
_SECONDS = 45.0  # for the transforms


def run(setting: Setting, record: Record) -> None:
    """Check transforms, which have kernels to compile; then measure calls, and the running state."""
    transform_table(setting, record)
    call_table(setting, record)
    record.attempt("running state", lambda: state_table(setting, record))
    release()


def call_table(setting: Setting, record: Record) -> None:
    """Say where the time of a call goes: on the host, on the device, in waits."""
    title = "Calls"
    record.text(
        title,
        "One call, float32: how long the host is busy with it, how long the device is (profiler), kernels that are "
        "launched, waits of the host for the device, reads of a value by the host.",
    )
    for shape in SHAPES:
        z = drawn(small(shape) if setting.small else shape, torch.float32, setting.device)
        operations = {"softmax": YARDSTICKS["softmax"], "sort": YARDSTICKS["sort"], **RISKS}
        for name, call in operations.items():
            record.attempt(f"call of {name}", partial(_call_row, name, call, z, record))


def _call_row(name: str, call: Callable[[Tensor], Any], z: Tensor, record: Record) -> None:
    host = host_microseconds(lambda: call(z))
    found = traced(lambda: call(z))
    record.row(
        "Calls",
        losses=size_name(tuple(z.shape)),
        operation=name,
        **{"host us": host, "device us": found.busy, "launches": found.launches},
        waits=found.waited,
        items=found.items,
        copies=int(sum(number for number, *_ in found.copies.values())),
    )


def state_table(setting: Setting, record: Record) -> None:
    """Time the look-up and the update of running estimates."""
    samples, batch = (10_000, 64) if setting.small else STATE
    state = RunningEstimates(samples, device=setting.device)
    index = torch.randint(samples, (batch,), device=setting.device)
    fresh = (torch.zeros(batch, device=setting.device), torch.zeros(batch, device=setting.device))
    figures = {
        "look-up ms": milliseconds(lambda: state.lookup(index)),
        "update ms": milliseconds(lambda: state.update(index, fresh)),
        "waits of a look-up": traced(lambda: state.lookup(index)).waited,
        "waits of an update": traced(lambda: state.update(index, fresh)).waited,
    }
    record.row("Running estimates", samples=samples, batch=batch, **figures)


def transform_table(setting: Setting, record: Record) -> None:
    """Check that the risks work under vmap, under torch.compile and in a CUDA graph."""
    record.text("Transforms", "Largest difference from the plain call, relative to the range of the losses.")
    backend = "eager" if setting.small else "inductor"
    tasks = [("vmap", name) for name in TRANSFORMED] + [(f"compile, {backend}", TRANSFORMED[0])]
    if setting.device == "cuda":
        tasks += [("CUDA graph", name) for name in TRANSFORMED]
    places = [(transform, name, setting.device) for transform, name in tasks]
    # In processes of their own: a capture that fails can leave a device on which nothing more can be run.
    for (transform, name, _), difference, problem in outcomes(difference_under, places, 2, _SECONDS):
        if problem:
            record.fail(f"{transform} of {name}", problem)
        else:
            record.row("Transforms", transform=transform, risk=name, difference=difference)


def difference_under(place: tuple[str, str, str]) -> float:
    """Return how far a risk under a transform is from the plain one."""
    transform, name, device = place
    risk, z = RISKS[name], drawn((64, 500), torch.float32, device)
    kind, _, backend = transform.partition(", ")
    if kind == "vmap":
        value = torch.func.vmap(lambda row: risk(row).value)(z)
    elif kind == "compile":
        value = torch.compile(lambda losses: risk(losses).value, backend=backend)(z)
    else:
        value = _captured(risk, z)
    return (value - risk(z).value).abs().max().item() / (z.max() - z.min()).item()


def _captured(risk: Risk, z: Tensor) -> Tensor:
    """Return the value that a captured graph gives for losses which it was not captured with."""
    losses = z.flip(0).clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            risk(losses)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = risk(losses).value
    losses.copy_(z)
    graph.replay()
    return value.clone()
