"""What the experiments share: a mean's interval over repetitions, and where an interpolated curve meets a level."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[Any]


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Array) -> Interval:
    """Return mean and Student's t interval of independent numbers."""
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, np.nan, np.nan)
    half = half_width(values)
    return Interval(mean, mean - half, mean + half)


def half_width(values: Array, level: float = 0.95) -> Any:
    """Return half of Student's t intervals, over the first dimension of at least two."""
    n = len(values)
    return stats.t.ppf((1 + level) / 2, n - 1) * values.std(0, ddof=1) / np.sqrt(n)


def crossing(numbers: Array, beyond: Array) -> float | None:
    """Return the first of ascending ``numbers`` at which ``beyond`` is not positive, by interpolation in the logarithm.

    The first number where it is not positive from the start, None where it never is.
    """
    if beyond[0] <= 0:
        return float(numbers[0])
    for i in range(1, len(numbers)):
        if beyond[i] <= 0:
            share = beyond[i - 1] / (beyond[i - 1] - beyond[i])
            return float(np.exp(np.log(numbers[i - 1]) + share * np.log(numbers[i] / numbers[i - 1])))
    return None
