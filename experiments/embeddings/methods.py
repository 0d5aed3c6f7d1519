"""The losses that are compared, and how the settings of each are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from drrho import KL, ChiSquare, CVaR

Setting = dict[str, Any]
Draw = Callable[[np.random.Generator], Setting]


LEARNING_RATES = (2e-3, 4e-3, 8e-3)  # every method is tried with each, by turns


def _between(generator: np.random.Generator, low: float, high: float) -> float:
    """Return a number between two others, uniform in its logarithm."""
    return round(float(np.exp(generator.uniform(math.log(low), math.log(high)))), 4)


def _shared(generator: np.random.Generator, trial: int) -> Setting:
    """Return what all methods have in a trial; ``same_kind`` adds candidates of the anchor's own kind, as GIST does."""
    return {
        "learning_rate": LEARNING_RATES[trial % len(LEARNING_RATES)],
        "scale": _between(generator, 10, 50),
        "same_kind": bool(generator.integers(2)),
    }


def _mnrl(generator: np.random.Generator) -> Setting:
    return {}


def _gist(generator: np.random.Generator) -> Setting:
    return {"margin": round(float(generator.uniform(-0.1, 0.2)), 3), "coefficient": math.inf}


def _kl(generator: np.random.Generator) -> Setting:
    return {"coefficient": round(float(generator.uniform(0.1, 1.2)), 3)}


def _soft(generator: np.random.Generator) -> Setting:
    return {"margin": round(float(generator.uniform(-0.1, 0.2)), 3), "coefficient": _between(generator, 0.3, 10)}


def _chi_square(generator: np.random.Generator) -> Setting:
    return {**_kl(generator), "scale": _between(generator, 20, 200)}


def _cvar(generator: np.random.Generator) -> Setting:
    return {**_kl(generator), "alpha": _between(generator, 0.01, 0.3)}


def _without_guide(draw: Draw) -> Draw:
    """Return a way to draw the same settings but for the guide's."""
    return lambda generator: {name: value for name, value in draw(generator).items() if name != "coefficient"}


#: How a method's settings are drawn, by its name. GIST is the loss that the tests hold equal to GISTEmbedLoss.
METHODS: dict[str, Draw] = {
    "MNRL": _mnrl,
    "GIST": _gist,
    "KL": _kl,
    "KL, soft mask": _soft,
    "chi-square": _chi_square,
    "CVaR": _cvar,
    "chi-square, no guide": _without_guide(_chi_square),
    "CVaR, no guide": _without_guide(_cvar),
}


def settings_of(method: str, count: int) -> list[Setting]:
    """Return as many settings of a method, the same in every run; what methods share is the same in each trial."""
    shared, own = (np.random.default_rng([number, 2026]) for number in (0, 1 + list(METHODS).index(method)))
    return [{**_shared(shared, trial), **METHODS[method](own)} for trial in range(count)]


def loss_options(method: str, setting: Setting) -> dict[str, Any]:
    """Return the arguments of `SteeredMultipleNegativesRankingLoss`, but for model and guide."""
    directions = ("query_to_doc", "query_to_query", "doc_to_doc") if setting["same_kind"] else ("query_to_doc",)
    divergence = {"chi-square": ChiSquare(), "CVaR": CVaR(setting.get("alpha", 1.0))}.get(method.split(",")[0], KL())
    options = {name: setting[name] for name in ("scale", "margin", "coefficient") if name in setting}
    return {"divergence": divergence, "directions": directions, **options}
