"""The parts ``correct``: every risk, then the contrastive risk and every method, against the CPU in float64."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drrho import RobustRisk, constrained_risk
from experiments.benchmarks.gpu import correct_losses, correct_methods
from experiments.benchmarks.gpu.agreement import Check, agree
from experiments.benchmarks.gpu.cases import (
    DIVERGENCES,
    TRAINER,
    Setting,
    drawn,
    dtype_name,
    forms_of,
    missing_packages,
    risk_named,
    size_name,
)
from experiments.benchmarks.gpu.crew import outcomes
from experiments.benchmarks.gpu.record import Record
from experiments.benchmarks.measure import explain

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
#: Shapes with their dtypes. A kernel is compiled for each length of rows, dtype and form of risk, for seconds: no two
#: shapes are solved by the same kernel in a dtype, and bfloat16, which is read as float32 is, has one.
SHAPES = {(7,): 1, (3, 5, 257): 2, (64, 1024): 3, (2, 40_000): 2, (100_003,): 1, (10**6,): 2}
WITH_BASE = (64, 1024)
LENGTHS, _SHORT = ("short rows", "long rows"), 1024  # losses
_SMALL = 4000  # losses, at most, in a dry run
# Solved by torch operations, of which the host waits for each pass: ten processes at once would take too long.
_USERS, _USERS_MOST = "a user's", 10**5
_SECONDS = 95.0
_WORKERS = 10
#: Largest difference of value and gap, relative to the range of the losses, and of weights times n, relative to the
#: largest of them, or to 1: orders of magnitude above what rounding leaves.
TOLERANCES = {
    torch.float64: {"value": 1e-12, "weights": 1e-7, "gradient": 1e-7, "gap": 1e-12},
    torch.float32: {"value": 1e-5, "weights": 1e-3, "gradient": 1e-3, "gap": 1e-5},
    torch.bfloat16: {"value": 1e-5, "weights": 1e-3, "gradient": 1e-2, "gap": 1e-5},
}
_REFUSED = ("NaN", "infinite", "radius < 0", "radius NaN", "integers", "no losses", "negative base weights")


class Unit(NamedTuple):
    """What one process checks at a time: a kind of check, by name of the work, with what it is about.

    One divergence, form and dtype, over short rows or long ones, is one unit: it has kernels of its own, which one
    process compiles, but for those of equal forms with other numbers.
    """

    kind: str
    subject: tuple[str, ...]
    device: str
    small: bool


def run_risks(setting: Setting, record: Record) -> None:
    """Check every risk, and what it refuses."""
    _run(risk_units(setting), setting, record)


def run_losses(setting: Setting, record: Record) -> None:
    """Check the contrastive risk and, where what they need is there, the training methods."""
    units = [Unit("contrastive", (name,), setting.device, setting.small) for name in correct_losses.DIVERGENCES]
    if missing := missing_packages(*TRAINER):
        record.text("Count", f"The training methods were left out: they need {missing[0]}, see --packages.")
    else:
        record.attempt("names of the methods", lambda: units.extend(method_units(setting)))
    _run(units, setting, record)


def _run(units: list[Unit], setting: Setting, record: Record) -> None:
    """Check units in as many processes as there are cores for."""
    record.text(
        "Checks",
        "Largest differences from the CPU in float64 on the same input: of value and gap in units of the range of the "
        "losses, of weights and of the gradient (times n) in units of the largest, or of 1.",
    )
    workers = max(1, min(_WORKERS, (os.cpu_count() or 2) - 1))
    seconds = 10 * _SECONDS if setting.small else _SECONDS
    worst: defaultdict[tuple[str, str, str], dict[str, Any]] = defaultdict(dict)
    count = failures = 0
    for unit, checks, problem in outcomes(work, units, workers, seconds):
        if problem:
            failures += 1
            record.fail(f"{unit.kind}: {', '.join(unit.subject)}", problem)
            continue
        count += len(checks)
        for check in checks:
            _keep_worst(worst[check.kind, check.subject, check.dtype], check)
            if check.problem:
                failures += 1
                record.fail(f"{check.kind}: {check.case}", check.problem)
    for (kind, subject, dtype), row in sorted(worst.items()):
        record.row("Checks", kind=kind, subject=subject, dtype=dtype, **row)
    record.row("Count", checks=count, failures=failures)


def _keep_worst(row: dict[str, Any], check: Check) -> None:
    row["checks"] = row.get("checks", 0) + 1
    for name, error in check.errors.items():
        row[name] = max(row.get(name, 0.0), error)


def risk_units(setting: Setting) -> list[Unit]:
    """Return the units of the risks, in the order of what would be missed most if time ran out.

    A ball, a penalty and a hybrid of every divergence come before others of the same kind, whose kernels are then
    compiled already; short rows come before long ones.
    """
    place = (setting.device, setting.small)
    risks = [
        Unit("risk", (name, form, dtype_name(dtype), length), *place)
        for length in LENGTHS
        for name, divergence in DIVERGENCES.items()
        for form in forms_of(divergence)
        for dtype in DTYPES
        if shapes_of(name, dtype, length, setting.small)
    ]
    refusals = [Unit("refusal", (name,), *place) for name in ("KL", "chi-square", "CVaR .1", "a user's")]
    seen: set[tuple[str, ...]] = set()
    first, others = [], []
    for unit in risks:
        name, form, *rest = unit.subject
        kind = (name, form.split()[0], *rest)
        (others if kind in seen else first).append(unit)
        seen.add(kind)
    length_of = {unit: LENGTHS.index(unit.subject[-1]) for unit in risks}
    return [*refusals, *sorted(first, key=length_of.__getitem__), *sorted(others, key=length_of.__getitem__)]


def method_units(setting: Setting) -> list[Unit]:
    """Return the units of the training methods."""
    return [Unit("method", (name,), setting.device, setting.small) for name in correct_methods.names(setting.small)]


def work(unit: Unit) -> list[Check]:
    """Carry out a unit."""
    return list(WORKS[unit.kind](*unit.subject, unit.device, unit.small))


def shapes(small: bool) -> list[tuple[int, ...]]:
    """Return the shapes to check, those of at most `_SMALL` losses in a dry run."""
    return [shape for shape in SHAPES if not small or math.prod(shape) <= _SMALL]


def shapes_of(divergence: str, dtype: torch.dtype, length: str, small: bool) -> list[tuple[int, ...]]:
    """Return the shapes to check of a divergence in a dtype, of short rows or of long ones."""
    found = [shape for shape in shapes(small) if (shape[-1] > _SHORT) == (length == LENGTHS[1])]
    most = _USERS_MOST if divergence == _USERS else math.inf
    return [shape for shape in found if math.prod(shape) <= most and dtype in DTYPES[: SHAPES[shape]]]


def risk_checks(divergence: str, form: str, dtype_name: str, length: str, device: str, small: bool) -> Iterator[Check]:
    """Compare one risk in a dtype over shapes, and with base weights."""
    dtype = getattr(torch, dtype_name)
    for shape in shapes_of(divergence, dtype, length, small):
        yield risk_check(divergence, form, drawn(shape, dtype, "cpu"), None, device)
    if length == LENGTHS[0] and dtype in DTYPES[:2]:
        shape = (3, 257) if small else WITH_BASE
        base = torch.softmax(drawn(shape, torch.float64, "cpu", seed=1) / 4, -1)
        yield risk_check(divergence, form, drawn(shape, dtype, "cpu"), base, device)


def risk_check(divergence: str, form: str, losses: Tensor, base: Tensor | None, device: str) -> Check:
    """Compare value, weights, gradient and gap of one call; an error on both sides must be of one class."""
    risk, dtype = risk_named(divergence, form), losses.dtype
    case = f"{divergence}, {form}, {size_name(tuple(losses.shape))} {dtype_name(dtype)}{', base' * (base is not None)}"
    key = ("risk", divergence, dtype_name(dtype), case)
    wide = losses.double()
    expected, refused = _solved(lambda: risk(wide, base_weights=base))
    leaf = losses.to(device).requires_grad_()
    here = None if base is None else base.to(device)
    found, failed = _solved(lambda: risk(leaf, base_weights=here))
    if expected is None or found is None:
        return Check(*key, problem=_difference_of_errors(failed, refused))
    (gradient,) = torch.autograd.grad(found.value.sum(), leaf)
    return Check(*key).held(_errors(found, gradient, expected, wide), TOLERANCES[dtype], _wrong_type(found, leaf))


def _errors(found: RobustRisk, gradient: Tensor, expected: RobustRisk, losses: Tensor) -> dict[str, float]:
    span = (losses.amax(-1) - losses.amin(-1)).clamp(min=1e-300)
    n = losses.shape[-1]
    most = (n * expected.weights).amax(-1, keepdim=True).clamp(min=1.0) / n

    def of_weights(weights: Tensor) -> float:
        return agree(weights.cpu().double() / most, expected.weights / most)

    return {
        "value": agree(found.value.cpu().double() / span, expected.value / span),
        "weights": of_weights(found.weights.detach()),
        "gradient": of_weights(gradient),
        "gap": float((found.gap.cpu().double() / span).abs().max()),
    }


def _wrong_type(found: RobustRisk, losses: Tensor) -> str:
    """Return what is wrong with devices and dtypes of an answer, or nothing."""
    wanted = torch.promote_types(losses.dtype, torch.float32)
    for name, field in found._asdict().items():
        if field.dtype != wanted or field.device != losses.device:
            return f"{name} is {field.dtype} on {field.device}"
    return ""


def _solved(solve: Any) -> tuple[RobustRisk | None, Exception | None]:
    try:
        return solve(), None
    except Exception as error:
        return None, error


def _difference_of_errors(found: Exception | None, expected: Exception | None) -> str:
    same = type(found) is type(expected)
    return "" if same else f"here {_said(found)}, on the CPU {_said(expected)}"


def _said(error: Exception | None) -> str:
    return "an answer" if error is None else explain(error)


def refusal_checks(divergence: str, device: str, small: bool) -> Iterator[Check]:
    """Give one risk what it must refuse; the error must be of the CPU's class."""
    for shape in shapes(small):
        for what in _REFUSED:
            for dtype in DTYPES[:2]:
                losses = drawn(shape, dtype, "cpu")
                case = f"{divergence}, {what}, {size_name(shape)} {dtype_name(dtype)}"
                expected, found = (
                    _solved(partial(_refused, divergence, what, losses.to(to)))[1] for to in ("cpu", device)
                )
                problem = _difference_of_errors(found, expected)
                yield Check("refusal", divergence, dtype_name(dtype), case, problem=problem)


def _refused(divergence: str, what: str, losses: Tensor) -> RobustRisk:
    """Call a risk with something wrong, which is at the end of the last row."""
    options: dict[str, Any] = {"radius": {"radius < 0": -0.1, "radius NaN": math.nan}.get(what, 0.1)}
    if what in ("NaN", "infinite"):
        losses = losses.clone()
        losses.view(-1)[-1] = math.nan if what == "NaN" else math.inf
    elif what == "integers":
        losses = losses.to(torch.int64)
    elif what == "no losses":
        losses = losses[..., :0]
    elif what == "negative base weights":
        options["base_weights"] = torch.full_like(losses, 1 / losses.shape[-1]).neg()
    return constrained_risk(losses, DIVERGENCES[divergence], **options)


#: What carries out each kind of unit, given its subject, the device and whether the sizes are small.
WORKS: dict[str, Callable[..., Iterator[Check]]] = {
    "risk": risk_checks,
    "refusal": refusal_checks,
    "contrastive": correct_losses.checks,
    "method": correct_methods.checks,
}
