"""What the parts have in common: the device and sizes of a run, and the risks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import drrho
from drrho.risk import RobustRisk, hybrid_risk
from experiments.benchmarks.problems import UserHellinger


class Setting(NamedTuple):
    """What a part is measured on.

    Attributes
    ----------
    device : str
        "cuda" or "cpu".
    small : bool
        Tiny sizes, for a dry run: every line of code runs, and no figure means anything.
    scratch : Path
        A folder that is removed after the part.
    """

    device: str
    small: bool
    scratch: Path


#: Packages that the trainer needs beside torch, and more that the glyphs are drawn with.
TRAINER = ("open_clip", "tyro", "rich", "braceexpand", "ftfy", "safetensors", "xxhash", "fsspec", "webdataset", "PIL")
GLYPHS = (*TRAINER, "matplotlib", "fontTools")

#: A risk of losses ``[..., n]``.
Risk = Callable[..., RobustRisk]

DIVERGENCES: dict[str, drrho.Divergence] = {
    "KL": drrho.KL(),
    "chi-square": drrho.ChiSquare(),
    "CVaR .1": drrho.CVaR(0.1),
    "CVaR .37": drrho.CVaR(0.37),
    "Cressie-Read -1": drrho.CressieRead(-1),
    "Cressie-Read 0": drrho.CressieRead(0),
    "Cressie-Read .5": drrho.CressieRead(0.5),
    "Cressie-Read 1.5": drrho.CressieRead(1.5),
    "Cressie-Read 3": drrho.CressieRead(3),
    "total variation": drrho.TotalVariation(),
    "capped KL .1": drrho.CappedKL(0.1),
    "a user's": UserHellinger(),
}


def _ball(radius: float) -> Callable[[drrho.Divergence], Risk]:
    return lambda divergence: partial(drrho.constrained_risk, divergence=divergence, radius=radius)


def _penalty(strength: float) -> Callable[[drrho.Divergence], Risk]:
    return lambda divergence: partial(drrho.penalized_risk, divergence=divergence, strength=strength)


def _hybrid(radius: float, strength: float) -> Callable[[drrho.Divergence], Risk]:
    return lambda divergence: partial(hybrid_risk, divergence=divergence, radius=radius, strength=strength)


#: Every form of a risk, by name: from a divergence to a function of losses.
FORMS: dict[str, Callable[[drrho.Divergence], Risk]] = {
    "ball 1e-8": _ball(1e-8),
    "ball .01": _ball(0.01),
    "ball .5": _ball(0.5),
    "ball 50": _ball(50.0),
    "penalty .5": _penalty(0.5),
    "penalty 10": _penalty(10.0),
    "hybrid .01, .5": _hybrid(0.01, 0.5),
    "hybrid .5, 10": _hybrid(0.5, 10.0),
}


def forms_of(divergence: drrho.Divergence) -> list[str]:
    """Return the names of the forms that differ for a divergence: one without radius has a single risk."""
    return list(FORMS) if divergence.has_radius else ["ball .5", "penalty .5"]


def risk_named(divergence: str, form: str) -> Risk:
    """Return a risk by the names of its divergence and form."""
    return FORMS[form](DIVERGENCES[divergence])


def drawn(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Return seeded losses with a heavy tail, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (torch.empty(shape, dtype=wide, device=device).normal_(generator=generator).exp_() - 2).to(dtype)


def unit_features(pairs: int, widths: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """Return seeded unit features ``[pairs, width]``, one for each of the widths."""
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    raw = (torch.randn(pairs, width, generator=generator, dtype=wide, device=device) for width in widths)
    return [torch.nn.functional.normalize(part, dim=1).to(dtype) for part in raw]


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as users write it."""
    return str(dtype).removeprefix("torch.")


def size_name(shape: tuple[int, ...]) -> str:
    """Return a shape as a short text, like 1e+06 or 4096 x 1024."""
    return (
        f"{shape[0]:.0e}".replace("e+0", "e") if len(shape) == 1 and shape[0] >= 1000 else " x ".join(map(str, shape))
    )


def missing_packages(*names: str) -> list[str]:
    """Return which packages cannot be imported here."""
    from importlib.util import find_spec

    return [name for name in names if find_spec(name) is None]
