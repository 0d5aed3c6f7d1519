"""What `run.py study --data icons` runs: the same questions on natural pairs, as data.

Budgets are counted in passes over the 79,593 training icons. Every method has four settings to be tuned with at the
smallest, one seed each, by naming top-1 on the validation split; steered ones under the strong reference. Other
budgets, references and noise use what was best there. References see the other pool of pairs alone. The scheduled
coefficient has no setting of its own: it takes what its constant one was tuned to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product

from ..cli.options import Data, Train
from ..cli.presets import of_embedded_pairs
from ..training.options import CheckpointPolicy, Loss
from .cells import Cell, Tuned, TunedKey, captions_label, reference_cell
from .settings import DIVERGENCE, TWIN, Setting

BATCH = 128
SEEDS = range(1, 6)  # seed 0 is for tuning, and is not counted
FEWER_SEEDS = SEEDS[:3]
PASSES = (2, 6, 12)  # the budgets: 159,000, 478,000 and 955,000 pairs seen
NOISE = (0.2, 0.4)
STRONG = "icons-strong"
ICONS = Data(kind="icons", pixels=32)
_RATES = (1e-3, 2e-3)


def _over(loss: Loss, option: str, values: Iterable[float]) -> tuple[Setting, ...]:
    return tuple(Setting(replace(loss, **{option: value}), lr, tried=(option,)) for value in values for lr in _RATES)


_STEERED = Loss(method="drrho")
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "openclip": tuple(Setting(Loss(method="openclip"), lr) for lr in (5e-4, 1e-3, 2e-3, 4e-3)),
    TWIN: _over(Loss(method="fastclip"), "temperature", (0.07, 0.14)),
    "fastclip-chi-square": _over(Loss(method="fastclip", divergence="chi-square"), "temperature", (0.05, 0.1)),
    "drrho": _over(_STEERED, "temperature", (0.07, 0.14)),
    DIVERGENCE: _over(replace(_STEERED, divergence="chi-square"), "temperature", (0.025, 0.05)),
}
#: Methods that take the settings of another: the same with the scheduled coefficient.
SCHEDULED = {"drrho-scheduled": "drrho", f"{DIVERGENCE}-scheduled": DIVERGENCE}
METHODS = (TWIN, "drrho", *SCHEDULED, DIVERGENCE, "fastclip-chi-square", "openclip")
#: What is compared at larger budgets, under other references and noise.
FEWER_METHODS = (TWIN, "drrho", "drrho-scheduled", DIVERGENCE, f"{DIVERGENCE}-scheduled")


def _train(model: str, passes: int, setting: Setting, seed: int = 0, noise: float = 0.0) -> Train:
    return Train(
        model=model,
        data=replace(ICONS, swapped=noise),
        loss=setting.loss,
        **of_embedded_pairs(epochs=passes, batch_size=BATCH, lr=setting.lr, warmup=50),
        seed=seed,
        keeping=CheckpointPolicy(checkpoint_minutes=5.0),
        validations=min(4, passes),
    )


def _reference(model: str, passes: int) -> Train:
    return replace(_train(model, passes, Setting(Loss(method="openclip"), 2e-3)), split="reference")


# By what they know of held-out icons, from the weakest.
REFERENCES: dict[str, Train] = {
    "icons-weak": _reference("glyph-micro", 2),
    "icons-equal": _reference("glyph-tiny", 4),
    STRONG: _reference("glyph-small", 6),
}


def _cell(
    tuned: Tuned, method: str, passes: int, seed: int, *, noise: float = 0.0, reference: str = STRONG
) -> Iterator[Cell]:
    """Yield a training of a tuned method, once it is tuned."""
    of = SCHEDULED.get(method, method)
    steered = SETTINGS[of][0].loss.needs_reference
    found = tuned.get(TunedKey("icon-tuning", captions_label(ICONS), of, STRONG if steered else ""))
    if found is not None:
        setting = found if method == of else found._replace(loss=replace(found.loss, coefficient="scheduled"))
        train = _train("glyph-tiny", passes, setting, seed, noise)
        yield Cell(method, train, f"passes={passes}", reference if steered else "")


def tuning(_: Tuned) -> Iterator[Cell]:
    """Yield the settings of all methods at the smallest budget, one seed each."""
    for method, settings in SETTINGS.items():
        for setting in settings:
            reference = STRONG if setting.loss.needs_reference else ""
            yield Cell(method, _train("glyph-tiny", PASSES[0], setting), setting.name, reference)


def references(_: Tuned) -> Iterator[Cell]:
    """Return the references."""
    return (reference_cell(name, train) for name, train in REFERENCES.items())


def headline(tuned: Tuned) -> Iterator[Cell]:
    """Yield all methods, tuned, at the budget at which they were, five seeds each."""
    for seed, method in product(SEEDS, METHODS):
        yield from _cell(tuned, method, PASSES[0], seed)


def budgets(tuned: Tuned) -> Iterator[Cell]:
    """Yield the twin and steered methods, constant and scheduled, at larger budgets."""
    for seed, method in product(FEWER_SEEDS, FEWER_METHODS):
        yield from _cell(tuned, method, PASSES[1], seed)


def reference_quality(tuned: Tuned) -> Iterator[Cell]:
    """Yield the steered methods under weaker references, at two budgets."""
    weaker = [name for name in REFERENCES if name != STRONG]
    steered = [method for method in FEWER_METHODS if method != TWIN]
    for seed, passes, reference, method in product(FEWER_SEEDS, PASSES[:2], weaker, steered):
        yield from _cell(tuned, method, passes, seed, reference=reference)


def noise(tuned: Tuned) -> Iterator[Cell]:
    """Yield the same methods where a share of the training icons have each other's names."""
    for seed, share, method in product(FEWER_SEEDS, reversed(NOISE), FEWER_METHODS):
        yield from _cell(tuned, method, PASSES[0], seed, noise=share)


def largest(tuned: Tuned) -> Iterator[Cell]:
    """Yield the twin and steered methods at the largest budget."""
    for seed, method in product(FEWER_SEEDS, FEWER_METHODS):
        yield from _cell(tuned, method, PASSES[2], seed)


#: In the order in which they run; a training in several is run once.
STUDIES: dict[str, Callable[[Tuned], Iterable[Cell]]] = {
    "icon-tuning": tuning,
    "icon-headline": headline,
    "icon-budgets": budgets,
    "icon-references": references,
    "icon-reference-quality": reference_quality,
    "icon-noise": noise,
    "icon-largest": largest,
}
TUNING_STUDIES = ("icon-tuning",)
