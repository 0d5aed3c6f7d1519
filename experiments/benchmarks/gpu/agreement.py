"""How far two answers are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Check(NamedTuple):
    """One comparison of an answer with that of the CPU in float64.

    Attributes
    ----------
    errors : dict
        Largest differences by what was compared.
    problem : str
        What is wrong; empty where nothing is.
    """

    kind: str
    subject: str
    dtype: str
    case: str
    errors: Mapping[str, float] = {}
    problem: str = ""

    def held(self, errors: Mapping[str, float], tolerances: Mapping[str, float], problem: str = "") -> Check:
        """Return the check with its differences, each of which must be within its tolerance."""
        beyond = [
            f"{name} differs by {error:.2g}, more than {tolerances[name]:.0e}"
            for name, error in errors.items()
            if not error <= tolerances[name]
        ]
        return self._replace(errors=dict(errors), problem="; ".join([problem] * bool(problem) + beyond))


def agree(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of entries; infinite where shapes differ, 0 of infinite entries that are equal."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    if found.shape != expected.shape:
        return math.inf
    difference = (found - expected).abs().masked_fill(found == expected, 0.0)
    return float(difference.max().nan_to_num(math.inf)) if difference.numel() else 0.0


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to that of what is expected."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    if found.shape != expected.shape:
        return math.inf
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-300))
    return error if math.isfinite(error) else math.inf
