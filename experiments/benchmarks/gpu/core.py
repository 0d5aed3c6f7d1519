"""The part ``core``: time and memory of the risks beside torch's own operations on the same losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.benchmarks.gpu.cases import Risk, Setting, drawn, dtype_name, risk_named, size_name
from experiments.benchmarks.gpu.clock import measured, milliseconds, or_reason, ratio, release
from experiments.benchmarks.gpu.record import Record

YARDSTICKS: dict[str, Callable[[Tensor], Any]] = {
    "clone": lambda z: z.clone(),
    "sum": lambda z: z.sum(-1),
    "softmax": lambda z: torch.softmax(z, -1),
    "sort": lambda z: torch.sort(z, dim=-1),
    "topk n/10": lambda z: torch.topk(z, z.shape[-1] // 10, sorted=False),
}
RISKS: dict[str, Risk] = {
    "chi-square ball .01": risk_named("chi-square", "ball .01"),
    "chi-square ball .5": risk_named("chi-square", "ball .5"),
    "KL ball .01": risk_named("KL", "ball .01"),
    "KL ball .5": risk_named("KL", "ball .5"),
    "CVaR .1": risk_named("CVaR .1", "ball .5"),
    "KL penalty .5": risk_named("KL", "penalty .5"),
    "chi-square penalty .5": risk_named("chi-square", "penalty .5"),
    "KL hybrid .01, .5": risk_named("KL", "hybrid .01, .5"),
    "Cressie-Read 1.5 ball .5": risk_named("Cressie-Read 1.5", "ball .5"),
    "total variation ball .5": risk_named("total variation", "ball .5"),
    "a user's ball .5": risk_named("a user's", "ball .5"),
}
_USERS = "a user's ball .5"
# Solved by torch operations where a row is long: at 1e8 losses they would take the time of all others.
_OPERATIONS = ("Cressie-Read 1.5 ball .5", "total variation ball .5", _USERS)
_MEMORY_REACH = 3.0
_WIDE = 10**6  # losses from which memory is counted in arrays of them
Reach = dict[str, tuple[str, float]]  # by risk: a yardstick and the largest multiple of its time


class Size(NamedTuple):
    """Losses, and what the time of a risk of them is aimed at."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    yardstick: str
    reach: Reach
    left_out: tuple[str, ...] = ()


def _all_within(yardstick: str, reach: float) -> Reach:
    return {name: (yardstick, reach) for name in RISKS if name != _USERS}


_LONG: Reach = {
    "chi-square ball .01": ("sort", 0.3),
    "chi-square ball .5": ("sort", 0.3),
    "KL ball .01": ("sort", 0.5),
    "KL ball .5": ("sort", 0.5),
    "CVaR .1": ("topk n/10", 1.5),
}
SIZES = (
    Size((4096, 1024), torch.float32, "softmax", _all_within("softmax", 5.0)),
    Size((4096, 4096), torch.float32, "softmax", _all_within("softmax", 4.0)),
    Size((4096, 4096), torch.bfloat16, "softmax", {}),
    Size((10**4,), torch.float32, "sort", {}),
    Size((10**6,), torch.float32, "sort", _all_within("sort", 1.5)),
    Size((10**6,), torch.float64, "sort", {}),
    Size((10**8,), torch.float32, "sort", _LONG, _OPERATIONS),
)


def run(setting: Setting, record: Record) -> None:
    """Measure all sizes."""
    record.text(
        "Yardsticks",
        "ms of torch's operations on the same losses, `exp(normal) - 2`: medians of single calls, each waited for.",
    )
    record.text(
        "Risks",
        "ms of a call with value, weights, multipliers and certificate, beside torch's own on the same losses in the "
        "same run; `with gradient`: forward and backward. Arrays: peak memory of a call, as a multiple of the losses.",
    )
    for size in SIZES:
        shape = small(size.shape) if setting.small else size.shape
        measure_size(size._replace(shape=shape), setting, record)
        release()


def small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape of at most 1000 losses, for a dry run."""
    return (min(shape[0], 500),) if len(shape) == 1 else (4, min(shape[1], 128))


def measure_size(size: Size, setting: Setting, record: Record) -> None:
    """Time yardsticks and risks of one size, and hold them against what is aimed at."""
    z = drawn(size.shape, size.dtype, setting.device)
    losses, dtype = size_name(size.shape), dtype_name(size.dtype)
    yardsticks = {
        name: or_reason(lambda call=call: milliseconds(lambda: call(z)))[0] for name, call in YARDSTICKS.items()
    }
    record.row("Yardsticks", losses=losses, dtype=dtype, **yardsticks)
    for name in (name for name in RISKS if name not in size.left_out):
        figures = _figures(z, RISKS[name])
        yardstick, reach = size.reach.get(name, (size.yardstick, None))
        times = ratio(figures.get("ms"), yardsticks[yardstick])
        record.row("Risks", losses=losses, dtype=dtype, risk=name, yardstick=yardstick, times=times, **figures)
        case = f"{name}, {losses} {dtype}"
        if reach is not None:
            record.aim(f"{case}: time against torch.{yardstick.split()[0]}", times, reach, unit="x")
        if z.numel() >= _WIDE and name != _USERS:
            record.aim(f"{case}: memory of a call", figures.get("arrays"), _MEMORY_REACH, unit="arrays")


def _figures(z: Tensor, risk: Risk) -> dict[str, Any]:
    """Return time without and with a backward pass, and memory; a note where one cannot be had."""
    tracked = z.detach().requires_grad_()
    forward, note = or_reason(lambda: measured(lambda: risk(z)))
    if forward is None:
        return {"note": note}
    both, note = or_reason(lambda: milliseconds(lambda: torch.autograd.grad(risk(tracked).value.sum(), tracked)))
    arrays = None if forward.peak is None else forward.peak / (z.numel() * z.element_size())
    return {"ms": forward.ms, "with gradient ms": both, "arrays": arrays, "note": note}
