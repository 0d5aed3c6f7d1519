"""The library's collective functions over a group against the same without one, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import drrho
from drrho.contrastive import contrastive_risk, info_nce, two_level_risk
from drrho.distillation import distillation_loss
from drrho.running import RunningEstimates, RunningThresholds
from drrho.selection import top_k
from experiments.benchmarks.gpu.agreement import Check, relative
from experiments.benchmarks.gpu.cases import drawn, unit_features
from experiments.benchmarks.measure import explain

PAIRS, WIDTH, SAMPLES, LOSSES = 48, 32, 100, 1001
TEMPERATURE = 0.1
TOLERANCE = {"value": 1e-9, "gradient": 1e-9, "state": 1e-6}


class Answer(NamedTuple):
    """What a function gives: a value, what belongs to this rank's part, and a state of all samples."""

    value: Tensor
    gradient: tuple[Tensor, ...]
    state: tuple[Tensor, ...] = ()


#: A function of a rank's part: device, slice of the batch, group.
Function = Callable[[torch.device, slice, Any], Answer]


def checks(device: torch.device) -> Iterator[Check]:
    """Compare every function on this rank."""
    rank, count = dist.get_rank(), dist.get_world_size()
    for name, function in functions().items():
        try:
            yield _compared(name, function, device, rank, count)
        except Exception as error:
            yield Check("library", name, "float64", name, problem=explain(error))


def _compared(name: str, function: Function, device: torch.device, rank: int, count: int) -> Check:
    size = LOSSES if name.startswith("risk") else PAIRS
    own = slice(size * rank // count, size * (rank + 1) // count)
    expected = function(device, slice(0, size), None)
    found = function(device, own, dist.group.WORLD)
    errors = {"value": relative(found.value, expected.value)}
    parts = zip(found.gradient, expected.gradient, strict=True)
    errors["gradient"] = max(relative(one, other[own]) for one, other in parts)
    if expected.state:
        errors["state"] = max(relative(one, other) for one, other in zip(found.state, expected.state, strict=True))
    return Check("library", name, "float64", name).held(errors, TOLERANCE)


def functions() -> dict[str, Function]:
    """Return all functions by name."""
    found: dict[str, Function] = {}
    for divergence in (drrho.KL(), drrho.ChiSquare(), drrho.CVaR(0.1), drrho.CressieRead(0.5), drrho.TotalVariation()):
        found[f"risk, {divergence}"] = partial(_risk, divergence)
    found["risk, KL penalty"] = _penalty
    for divergence in (drrho.KL(), drrho.ChiSquare(), drrho.CVaR(0.1)):
        for steered in (False, True):
            found[f"contrastive, {divergence}{', steered' * steered}"] = partial(_contrastive, divergence, steered)
    return found | {
        "InfoNCE": _info_nce,
        "two levels": _two_levels,
        "distillation": _distillation,
        "the largest scores": _largest,
    }


def _leaf(part: Tensor) -> Tensor:
    return part.detach().clone().requires_grad_()


def _risk(divergence: drrho.Divergence, device: torch.device, own: slice, group: Any) -> Answer:
    losses = _leaf(drawn((LOSSES,), torch.float64, str(device))[own])
    risk = drrho.constrained_risk(losses, divergence, 0.1, group=group)
    return Answer(risk.value, (*torch.autograd.grad(risk.value, losses), risk.weights))


def _penalty(device: torch.device, own: slice, group: Any) -> Answer:
    losses = _leaf(drawn((LOSSES,), torch.float64, str(device))[own])
    risk = drrho.penalized_risk(losses, drrho.KL(), 2.0, group=group)
    return Answer(risk.value, (*torch.autograd.grad(risk.value, losses), risk.weights))


def _features(device: torch.device, own: slice) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    image, text, *reference = (part[own] for part in unit_features(PAIRS, (WIDTH,) * 4, torch.float64, str(device)))
    return (_leaf(image), _leaf(text)), (reference[0], reference[1])


def _contrastive(divergence: drrho.Divergence, steered: bool, device: torch.device, own: slice, group: Any) -> Answer:
    """Two steps with running state, which is sharded over the ranks."""
    features, reference = _features(device, own)
    is_kl = divergence.has_exponential_weights
    running = (RunningEstimates if is_kl else RunningThresholds)(SAMPLES, device, group)
    index = torch.arange(PAIRS, device=device)[own] * 2
    options: dict[str, Any] = {"divergence": divergence, "group": group, "gamma": 0.6}
    if steered:
        options["reference"] = reference

    def step() -> Tensor:
        options["log_u" if is_kl else "threshold"] = running.lookup(index)
        found = contrastive_risk(*features, TEMPERATURE, **options)
        running.update(index, found.log_u if is_kl else found.threshold)  # pyright: ignore[reportArgumentType]
        return found.value

    step()
    value = step()
    gradient = torch.autograd.grad(value, features)
    everything = running.lookup(torch.arange(0, SAMPLES, 2, device=device)[:PAIRS])
    return Answer(value, gradient, everything)


def _info_nce(device: torch.device, own: slice, group: Any) -> Answer:
    features, _ = _features(device, own)
    value = info_nce(*features, TEMPERATURE, group=group)
    return Answer(value, torch.autograd.grad(value, features))


def _two_levels(device: torch.device, own: slice, group: Any) -> Answer:
    features, reference = _features(device, own)
    risk = two_level_risk(*features, TEMPERATURE, drrho.ChiSquare(), reference=reference, strength=0.1, group=group)
    return Answer(risk.value, torch.autograd.grad(risk.value, features))


def _distillation(device: torch.device, own: slice, group: Any) -> Answer:
    features, reference = _features(device, own)
    value = distillation_loss(*features, TEMPERATURE, reference=reference, reference_temperature=0.07, group=group)
    return Answer(value, torch.autograd.grad(value, features))


def _largest(device: torch.device, own: slice, group: Any) -> Answer:
    """Mark the largest scores: this rank's part of the marks must be that of all."""
    scores = drawn((PAIRS,), torch.float64, str(device))[own]
    marks = torch.zeros_like(scores)
    marks[top_k(scores, PAIRS // 4, group=group)] = 1.0
    total = marks.sum()
    if group is not None:
        dist.all_reduce(total, group=group)
    return Answer(total, (marks,))
