"""What is measured: losses, problems as the library and the oracle solve them, and the yardsticks of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import drrho
from experiments.benchmarks import oracle

LOSSES = ("exponential", "narrow negative")
SEED = 0


@cache
def losses(kind: str, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return ``[n]`` seeded losses: exponential of mean 1, or negative excess losses in a narrow band around -5."""
    generator = torch.Generator().manual_seed(SEED)
    z = torch.empty(n, dtype=torch.float64)
    z = z.exponential_(generator=generator) if kind == "exponential" else z.normal_(-5, 0.01, generator=generator)
    return z.to(dtype)


@dataclass(frozen=True)
class UserHellinger(drrho.Divergence):
    """A divergence as a user writes it, from three functions: Hellinger, ``phi(t) = 2 (sqrt t - 1)^2``."""

    def phi(self, t: Tensor) -> Tensor:
        """Return ``2 (sqrt t - 1)^2``."""
        return torch.where(t < 0, torch.inf, 2 * (t.clamp(min=0).sqrt() - 1) ** 2)

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``2 s / (2 - s)`` for s < 2."""
        return torch.where(s < 2, 2 * s / (2 - s), torch.inf)

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return ``4 / (2 - s)^2`` for s < 2."""
        return torch.where(s < 2, 4 / (2 - s) ** 2, torch.inf)


@dataclass(frozen=True)
class Problem:
    """A risk with one parameter, as the library computes it and as the oracle computes its premium."""

    name: str
    parameter: str
    solve: Callable[[Any, float], Any]
    premium: Callable[[Any, float], Any]

    def exact_premium(self, kind: str, n: int, value: float, dtype: torch.dtype = torch.float64) -> Any:
        """Return the oracle's premium for seeded losses, computed once."""
        return _exact_premium(self.premium, kind, n, value, dtype)


@cache
def _exact_premium(premium: Callable[[Any, float], Any], kind: str, n: int, value: float, dtype: torch.dtype) -> Any:
    return premium(losses(kind, n, dtype).numpy(), value)


def relative_error(premium: Any, exact: Any) -> float:
    """Return ``|premium / exact - 1|``."""
    return float(abs(np.longdouble(premium) / exact - 1))


def _ball(name: str, divergence: Callable[[], drrho.Divergence], path: str) -> Problem:
    return Problem(
        f"{name} ball",
        "radius",
        lambda z, radius: drrho.constrained_risk(z, divergence(), radius),
        lambda z, radius: oracle.ball_premium(z, path, radius),
    )


CHI_SQUARE_BALL = _ball("chi-square", lambda: drrho.ChiSquare(), "chi-square")
KL_BALL = _ball("KL", lambda: drrho.KL(), "KL")
USER_BALL = _ball("user-defined Hellinger", lambda: UserHellinger(), "Hellinger")
HELLINGER_BALL = replace(  # the same problem, so the same exact premiums
    USER_BALL,
    name="CressieRead(0.5) ball",
    solve=lambda z, radius: drrho.constrained_risk(z, drrho.CressieRead(0.5), radius),
)
CVAR = Problem("CVaR", "alpha", lambda z, alpha: drrho.constrained_risk(z, drrho.CVaR(alpha)), oracle.cvar_premium)
KL_PENALTY = Problem(
    "KL penalty",
    "strength",
    lambda z, strength: drrho.penalized_risk(z, drrho.KL(), strength),
    oracle.kl_penalty_premium,
)
CHI_SQUARE_PENALTY = Problem(
    "chi-square penalty",
    "strength",
    lambda z, strength: drrho.penalized_risk(z, drrho.ChiSquare(), strength),
    lambda z, strength: oracle.power_penalty_premium(z, strength, 2),
)
POWER_PENALTY = Problem(
    "CressieRead(1.5) penalty",
    "strength",
    lambda z, strength: drrho.penalized_risk(z, drrho.CressieRead(1.5), strength),
    lambda z, strength: oracle.power_penalty_premium(z, strength, 1.5),
)


@dataclass(frozen=True)
class Yardstick:
    """An operation of torch on the same losses, and the multiple of its time that is aimed at."""

    name: str
    run: Callable[[Tensor], Any]


SORT = Yardstick("torch.sort", torch.sort)
TOPK = Yardstick("torch.topk(n/10, sorted=False)", lambda z: torch.topk(z, z.shape[-1] // 10, sorted=False))
SOFTMAX = Yardstick("torch.softmax", lambda z: torch.softmax(z, -1))


@dataclass(frozen=True)
class Race:
    """A problem at several parameters against a yardstick; ``reach`` is the largest ratio aimed at."""

    problem: Problem
    values: tuple[float, ...]
    yardstick: Yardstick
    reach: float


RADII = (1e-6, 1e-2, 0.5)
RACES = (
    Race(CHI_SQUARE_BALL, RADII, SORT, 0.25),
    Race(KL_BALL, RADII, SORT, 0.30),
    Race(CVAR, (0.1,), TOPK, 1.2),
    Race(KL_PENALTY, (0.1, 1.0, 100.0), SOFTMAX, 3.0),
    Race(USER_BALL, RADII, SORT, 2.0),
    Race(HELLINGER_BALL, RADII, SORT, 2.0),
)
