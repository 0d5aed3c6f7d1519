"""Real tables that ship with scikit-learn, and how they are split among reference, target and test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine

Array = NDArray[Any]


@dataclass(frozen=True)
class Table:
    """A task: features, targets, whether they are classes, and sizes of the reference's and the targets' samples."""

    name: str
    load: Callable[[], tuple[Array, Array]]
    classes: bool
    reference_samples: int
    sizes: tuple[int, ...]


def _arrays(load: Callable[..., object]) -> tuple[Array, Array]:
    return cast(tuple[Array, Array], load(return_X_y=True))  # annotated as if it could return a ``Bunch`` here


def _digits() -> tuple[Array, Array]:
    x, y = _arrays(load_digits)
    return x, y % 2


TABLES = {
    table.name: table
    for table in (
        Table("diabetes", lambda: _arrays(load_diabetes), False, 160, (20, 40, 80, 120)),
        Table("breast cancer", lambda: _arrays(load_breast_cancer), True, 200, (25, 50, 100, 150)),
        Table("wine", lambda: _arrays(load_wine), True, 60, (15, 30, 60)),
        Table("digits, odd or even", _digits, True, 600, (75, 150, 300)),
    )
}


@dataclass(frozen=True)
class Split:
    """Disjoint samples of one table, scaled by the reference's means and deviations, which see no target or test."""

    reference: tuple[Array, Array]
    target: tuple[Array, Array]
    test: tuple[Array, Array]


@cache
def _loaded(name: str) -> tuple[Array, Array]:
    return TABLES[name].load()


def split(name: str, seed: int, n: int) -> Split:
    """Draw the split of a seed; the target's samples of a smaller n are the first of those of a larger one."""
    table, (x, y) = TABLES[name], _loaded(name)
    order = np.random.default_rng([seed, sum(name.encode())]).permutation(len(x))
    m, largest = table.reference_samples, max(table.sizes)
    parts = order[:m], order[m : m + n], order[m + largest :]
    center, spread = x[parts[0]].mean(0), x[parts[0]].std(0)
    x = (x - center) / np.where(spread > 0, spread, 1.0)
    if not table.classes:
        y = (y - y[parts[0]].mean()) / y[parts[0]].std()
    reference, target, test = ((x[part], y[part]) for part in parts)
    return Split(reference, target, test)
