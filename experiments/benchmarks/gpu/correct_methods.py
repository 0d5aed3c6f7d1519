"""Two steps of every training method on the device against the CPU in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.benchmarks.gpu.agreement import Check, relative
from experiments.benchmarks.gpu.cases import unit_features

PAIRS, WIDTH, REFERENCE_WIDTH, SAMPLES = 256, 128, 96, 1000
TEMPERATURE = 0.1
STEPS = 2
#: Largest differences of the losses, gradients and state, relative to their norms.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}  # running state and temperatures are kept in float32
_FASTCLIP: dict[str, Any] = {"method": "fastclip", "temperature": TEMPERATURE}
_LEARNED: dict[str, Any] = {**_FASTCLIP, "rho": 0.5}


def _options() -> dict[str, dict[str, Any]]:
    """Return options of `experiments.clip.training.options.Loss` by the name of what they make."""
    steered = {"method": "drrho", "temperature": TEMPERATURE}
    distilled = {"distill": 0.5, "distill_temperature": 0.07}
    return {
        "openclip": {"method": "openclip"},
        "siglip": {"method": "siglip"},
        "fastclip v0": {**_FASTCLIP, "temperature_scheme": "per-temperature"},
        "fastclip v1": _FASTCLIP,
        "fastclip v2": {**_LEARNED, "temperature_scheme": "individual"},
        "fastclip v3": {**_LEARNED, "temperature_scheme": "global"},
        "fastclip, chi-square": {**_FASTCLIP, "divergence": "chi-square"},
        "fastclip, CVaR": {**_FASTCLIP, "divergence": "cvar", "level": 0.2},
        "scent": {**_FASTCLIP, "log_step": 0.5},
        "drrho": steered,
        "drrho, adaptive": {**steered, "coefficient": "adaptive"},
        "drrho, distilled": {**steered, **distilled},
        "openclip, distilled": {"method": "openclip", **distilled, "distill_own_temperature": True},
        "two levels": {"method": "two-level", "temperature": TEMPERATURE},
    }


def names() -> list[str]:
    """Return the names of the methods."""
    return list(_options())


class Result(NamedTuple):
    """Losses of the steps, their gradients of the features, and the state afterwards."""

    losses: Tensor
    gradients: Tensor
    state: Tensor


def checks(name: str, device: str, small: bool) -> Iterator[Check]:
    """Compare a method in float64 and float32."""
    pairs = 24 if small else PAIRS
    for dtype, tolerance in TOLERANCES.items():
        features = unit_features(pairs, (WIDTH, WIDTH, REFERENCE_WIDTH, REFERENCE_WIDTH), dtype, "cpu")
        expected = _steps(name, [part.double() for part in features], "cpu")
        found = _steps(name, features, device)
        errors = {
            field: relative(one, other)
            for field, one, other in zip(Result._fields, found, expected, strict=True)
            if other.numel()
        }
        short = str(dtype).removeprefix("torch.")
        yield Check("method", name, short, f"{name}, {short}").held(errors, dict.fromkeys(errors, tolerance))


def _steps(name: str, features: list[Tensor], device: str) -> Result:
    """Take steps on the same features, whose samples overlap from step to step."""
    from experiments.clip.training.methods import Head

    method, is_steered = _method(name, device)
    image, text, *reference = (part.to(device) for part in features)
    scale, bias = (torch.tensor(value, dtype=image.dtype, device=device) for value in (10.0, -10.0))
    losses, gradients = [], []
    for step in range(STEPS):
        leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
        index = torch.arange(len(image)) + step * len(image) // 2
        beside = (reference[0], reference[1]) if is_steered else None
        # The second step's epoch is the last, in which gamma is smallest.
        loss = method.loss((leaves[0], leaves[1]), index, Head(scale, bias), step, beside)
        loss.value.backward()
        method.step(loss, 1.0, 1.0)
        losses.append(loss.value.detach().double().cpu().reshape(1))
        gradients += [leaf.grad.double().cpu().reshape(-1) for leaf in leaves if leaf.grad is not None]
    state = [_finite(value) for value in method.state_dict().values()]
    return Result(torch.cat(losses), torch.cat(gradients), torch.cat(state) if state else torch.empty(0))


def _finite(value: Tensor) -> Tensor:
    """Return what a state holds, with one number for what was never visited."""
    return value.detach().double().cpu().reshape(-1).nan_to_num(-99.0, -99.0, -99.0)


def _method(name: str, device: str) -> tuple[Any, bool]:
    """Build a method; say whether it needs the reference."""
    from experiments.clip.distributed import Ranks
    from experiments.clip.training.methods import METHODS, Context, Distilled
    from experiments.clip.training.options import Loss

    options = Loss(**_options()[name])
    place = Context(SAMPLES, STEPS, TEMPERATURE, Ranks(device=torch.device(device)))
    method = METHODS[options.method].from_options(options, place)
    if options.distill:
        assert options.distill_temperature != "auto"
        method = Distilled(method, options.distill, options.distill_temperature, own=options.distill_own_temperature)
    return method, options.needs_reference
