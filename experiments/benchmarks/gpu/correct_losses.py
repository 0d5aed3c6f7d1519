"""The contrastive risk on the device against the CPU in float64: value, gradients and running state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import drrho
from drrho.contrastive import ContrastiveStep, contrastive_risk
from experiments.benchmarks.gpu.agreement import Check, agree, relative
from experiments.benchmarks.gpu.cases import unit_features

DIVERGENCES: dict[str, drrho.Divergence] = {
    "KL": drrho.KL(),
    "chi-square": drrho.ChiSquare(),
    "CVaR .1": drrho.CVaR(0.1),
}
PAIRS, WIDTH, REFERENCE_WIDTH = 777, 512, 256
TEMPERATURES = (0.01, 0.07, 1.0)
#: Largest differences of the value, and of gradients and running state relative to their norms.
TOLERANCES = {
    "float64": {"value": 1e-12, "gradient": 1e-9, "state": 1e-9},
    "float32": {"value": 1e-5, "gradient": 1e-4, "state": 1e-4},
    "TF32": {"value": 5e-3, "gradient": 5e-2, "state": 5e-2},
    "bfloat16": {"value": 1e-4, "gradient": 2e-2, "state": 1e-3},
}
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "TF32": torch.float32, "bfloat16": torch.bfloat16}
_LOWEST_OF_TF32 = 0.07  # temperature: below, the rounding of a similarity is no longer small


class Form(NamedTuple):
    """Options of the risk beside its divergence."""

    name: str
    temperature: float
    steered: bool = False
    own_temperatures: bool = False
    running: bool = False
    options: tuple[tuple[str, Any], ...] = ()


def forms(divergence: str, small: bool) -> Iterator[Form]:
    """Yield what is compared for a divergence."""
    for tau in TEMPERATURES[1:2] if small else TEMPERATURES:
        for steered in (False, True):
            yield Form(f"tau {tau:g}{', steered' * steered}", tau, steered)
    yield Form("temperatures of anchors", 0.07, True, own_temperatures=True)
    yield Form("running", 0.07, True, running=True, options=(("gamma", 0.6),))
    yield Form(
        "positive included, coefficient .5", 0.07, True, options=(("include_positive", True), ("coefficient", 0.5))
    )
    if divergence == "KL":
        yield Form("SCENT", 0.07, running=True, options=(("log_step", 0.5),))
        yield Form("radius, eps", 0.07, running=True, options=(("gamma", 0.6), ("eps", 1e-4), ("rho", 0.5)))


def checks(divergence: str, device: str, small: bool) -> Iterator[Check]:
    """Compare a divergence's contrastive risk in every form and precision."""
    pairs = 40 if small else PAIRS
    for form in forms(divergence, small):
        for precision, dtype in _DTYPES.items():
            if precision == "TF32" and form.temperature < _LOWEST_OF_TF32:
                continue
            features = unit_features(pairs, (WIDTH, WIDTH, REFERENCE_WIDTH, REFERENCE_WIDTH), dtype, "cpu")
            torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
            expected = _step(divergence, form, [part.double() for part in features], "cpu")
            found = _step(divergence, form, features, device)
            errors = {
                "value": agree(found[0].value, expected[0].value),
                "gradient": relative(_joined(found[1]), _joined(expected[1])),
                "state": relative(_joined(_state(found[0])), _joined(_state(expected[0]))),
            }
            case = f"{divergence}, {form.name}, {precision}"
            yield Check("contrastive", divergence, precision, case).held(errors, TOLERANCES[precision])
    torch.set_float32_matmul_precision("highest")


def _step(divergence: str, form: Form, features: list[Tensor], device: str) -> tuple[ContrastiveStep, list[Tensor]]:
    """Return the risk of one form, and its gradients: of the features, and of temperatures per anchor."""
    image, text, *reference = (part.to(device) for part in features)
    leaves = [image.requires_grad_(), text.requires_grad_()]
    wide = torch.promote_types(image.dtype, torch.float32)
    spread = torch.linspace(0.5, 2.0, len(image), dtype=torch.float64).to(device, wide)
    options: dict[str, Any] = {"divergence": DIVERGENCES[divergence], **dict(form.options)}
    temperature: Any = form.temperature
    if form.own_temperatures:
        temperature = tuple((form.temperature * rate).requires_grad_() for rate in (spread, spread.flip(0)))
        leaves += temperature
    if form.steered:
        options["reference"] = tuple(reference)
    if form.running:
        options |= _before(divergence, form.temperature, spread)
    step = contrastive_risk(image, text, temperature, **options)
    return step, list(torch.autograd.grad(step.value, leaves))


def _before(divergence: str, temperature: float, spread: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a running state in which some anchors were never visited."""
    if divergence == "KL":
        state = torch.log(spread)
        state[::5] = -torch.inf
        return {"log_u": (state, state.flip(0))}
    state = -temperature * spread
    state[::5] = torch.nan
    return {"threshold": (state, state.flip(0))}


def _joined(parts: Iterable[Tensor]) -> Tensor:
    """Return all entries in one vector: what is zero but for rounding is then no measure of anything."""
    return torch.cat([part.detach().double().cpu().reshape(-1) for part in parts])


def _state(step: ContrastiveStep) -> tuple[Tensor, ...]:
    return (*(step.log_u or step.threshold or ()), *step.risks, *step.distances)
