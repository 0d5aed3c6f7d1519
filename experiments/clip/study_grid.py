"""What `run.py study` runs: named studies, each a function that yields its trainings, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from experiments.clip.options import Loss, MethodName, Train
from experiments.clip.presets import PRESETS


@dataclass(frozen=True)
class Cell:
    """One training, with all its options, and the labels of its row.

    Attributes
    ----------
    method : str
        What tables call its training method.
    train : Train
        Its options; --out, --cache and --logs are the study's.
    setting : str
        What else tells it from its neighbors, like ``tau=0.1``.
    reference : str
        A name in `REFERENCES`: that model, which the study trains, steers instead of ``train.loss.reference``.
    """

    method: str
    train: Train
    setting: str = ""
    reference: str = ""


SEEDS = range(5)
FRACTIONS = (0.125, 0.25, 0.5, 1.0)
MODELS = ("glyph-tiny", "glyph-small", "glyph-base")
EPOCHS = 12  # over all pairs; of a share of them, as many as make the same number of pairs seen

# Tuned on the validation split by the study "tuning", and README.md's table: loss and peak learning rate.
METHODS: dict[str, tuple[Loss, float]] = {
    "openclip": (Loss(method="openclip"), 2e-3),
    "fastclip-v1": (Loss(method="fastclip", temperature=0.2), 1e-3),
    "drrho": (Loss(), 2e-3),
    "drrho-adaptive": (Loss(coefficient="adaptive"), 2e-3),
    "distillation": (Loss(method="openclip", distill=1.0), 2e-3),
}
TWINS = ("fastclip-v1", "drrho")

# Trained on the reference's own pairs.
REFERENCES: dict[str, Train] = {
    f"share-{fraction}": dataclasses.replace(PRESETS["glyph-reference"], model="glyph-small", fraction=fraction)
    for fraction in (0.1, 0.3)
}


def training(loss: Loss, lr: float, *, epochs: float = EPOCHS, seed: int = 0, **options: Any) -> Train:
    """Return a training for so many passes over all pairs, or over as many pairs of ``fraction`` of them."""
    start = PRESETS["glyph-steered"]
    passes = round(epochs / options.get("fraction", 1.0))
    optimization = dataclasses.replace(start.optimization, lr=lr, epochs=passes)
    return dataclasses.replace(start, loss=loss, optimization=optimization, seed=seed, **options)


def references() -> Iterator[Cell]:
    """Return the references of other quality than the shipped one's."""
    return map(reference_cell, REFERENCES)


def reference_cell(name: str) -> Cell:
    """Return the training of a reference, by its name."""
    return Cell(REFERENCES[name].loss.method, REFERENCES[name], name)


def tuning() -> Iterator[Cell]:
    """Yield learning rates and temperatures of the twins, one seed each."""
    grid: tuple[tuple[str, MethodName, tuple[Any, ...]], ...] = (
        ("fastclip-v1", "fastclip", (0.1, 0.2, 0.3)),
        ("drrho", "drrho", (0.1, "auto", 0.2)),
    )
    for name, method, temperatures in grid:
        for lr in (1e-3, 2e-3, 4e-3):
            for tau in temperatures:
                loss = Loss(method=method, temperature=tau)
                yield Cell(name, training(loss, lr, model="glyph-tiny"), f"lr={lr} tau={tau}")


def headline() -> Iterator[Cell]:
    """Yield all methods on all pairs."""
    for name, (loss, lr) in METHODS.items():
        for seed in SEEDS:
            yield Cell(name, training(loss, lr, seed=seed))


def fractions() -> Iterator[Cell]:
    """Yield the twins on shares of the pairs, at an equal number of pairs seen."""
    for fraction in FRACTIONS:
        for name in TWINS:
            for seed in SEEDS:
                yield Cell(name, training(*METHODS[name], seed=seed, fraction=fraction))


def scaling() -> Iterator[Cell]:
    """Yield the twins over sizes of the model and budgets."""
    for model in MODELS:
        for epochs in (3, 6, 12, 24):
            for name in TWINS:
                for seed in SEEDS:
                    train = training(*METHODS[name], epochs=epochs, seed=seed, model=model)
                    yield Cell(name, train, f"epochs={epochs}")


def reference_quality() -> Iterator[Cell]:
    """Yield the steered training under each reference."""
    for name in REFERENCES:
        for seed in SEEDS:
            yield Cell("drrho", training(*METHODS["drrho"], seed=seed), reference=name)


#: In the order in which they run; a training in several is run once.
STUDIES: dict[str, Callable[[], Iterable[Cell]]] = {
    "references": references,
    "tuning": tuning,
    "headline": headline,
    "fractions": fractions,
    "scaling": scaling,
    "reference-quality": reference_quality,
}
