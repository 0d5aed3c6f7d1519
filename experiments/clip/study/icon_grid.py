"""What `run.py study --data icons` runs: the same questions on natural pairs, as data.

Budgets are counted in passes over the 79,593 training icons. Every method has four settings to be tuned with at the
smallest, one seed each, by naming top-1 on the validation split; steered ones under the strong reference. Other
budgets, references and noise use what was best there. References see the other pool of pairs alone. The scheduled
coefficient is tried at the settings that its twin was tuned to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product

from ..cli.options import Data, Train
from ..cli.presets import PRESETS, of_embedded_pairs
from ..training.options import CheckpointPolicy, Loss, Selection
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
    "drrho-adaptive": _over(replace(_STEERED, coefficient="adaptive"), "temperature", (0.07, 0.14)),
    DIVERGENCE: _over(replace(_STEERED, divergence="chi-square"), "temperature", (0.025, 0.05)),
}
_NETWORK = {"normalizer": "network", "normalizer_steps": 5, "final_gamma": 0.1}
# Newer methods: the reference's hard mask of negatives, normalizers that a network predicts, without and with steering,
# the target's own average as its reference, and a selection of pairs with distillation.
SETTINGS |= {
    "gist": tuple(Setting(Loss(method="gist"), lr) for lr in (5e-4, 1e-3, 2e-3, 4e-3)),
    "neuclip": _over(Loss(method="fastclip", **_NETWORK), "temperature", (0.07, 0.14)),
    "drrho-neuclip": _over(replace(_STEERED, **_NETWORK), "temperature", (0.07, 0.14)),
    "drrho-self": _over(replace(_STEERED, temperature=0.14, self_reference=0.99), "coefficient", (0.25, 0.5)),
    "aced": tuple(
        each._replace(selection=Selection("jest", candidates=2))
        for each in _over(Loss(method="openclip"), "distill", (0.5, 2.0))
    ),
}
#: What is tried under the public reference, whose similarities have less than half of the others' spread: two settings
#: more than elsewhere, added when four had been seen.
PUBLIC_SETTINGS = (
    *_over(_STEERED, "temperature", (0.03, 0.07)),
    *_over(replace(_STEERED, temperature=0.07), "coefficient", (2.0,)),
)
#: The steered method with the scheduled coefficient, at the settings of the twin.
SCHEDULED = "drrho-scheduled"
#: What is compared first, and at other budgets, under other references and noise.
MAIN = (TWIN, "drrho", SCHEDULED, DIVERGENCE)
MORE = ("openclip", "drrho-adaptive", "fastclip-chi-square")
RIVALS = ("gist", "neuclip", "drrho-neuclip", "drrho-self", "aced")
_TUNING_OF: dict[str, str] = {
    **{method: "icon-tuning-more" for method in MORE},
    **{method: "icon-tuning-rivals" for method in RIVALS},
}


def _train(model: str, passes: int, setting: Setting, seed: int = 0, noise: float = 0.0) -> Train:
    """Return a training of so many passes over all pairs, counted in backward passes."""
    return Train(
        model=model,
        data=replace(ICONS, swapped=noise),
        loss=setting.loss,
        selection=setting.selection,
        **of_embedded_pairs(
            epochs=passes * setting.selection.scored_per_pair, batch_size=BATCH, lr=setting.lr, warmup=50
        ),
        seed=seed,
        keeping=CheckpointPolicy(checkpoint_minutes=5.0),
        validations=min(4, passes),
    )


def _reference(model: str, passes: int, lr: float = 2e-3) -> Train:
    return replace(_train(model, passes, Setting(Loss(method="openclip"), lr)), split="reference")


# By what they know of held-out icons, from the weakest.
REFERENCES: dict[str, Train] = {
    "icons-weak": _reference("glyph-micro", 2),
    "icons-equal": _reference("glyph-tiny", 4),
    # Of 478,000 pairs seen, a model of glyph-small's size knows no more than the equal one.
    STRONG: _reference("glyph-tiny", 12, 1e-3),
}
#: A reference whose towers have seen no icon: `icons.public_towers` makes them of two public models.
PUBLIC = "icons-public"
REFERENCES[PUBLIC] = replace(PRESETS["icon-public"], keeping=CheckpointPolicy(checkpoint_minutes=5.0))


def _cell(
    tuned: Tuned, method: str, passes: int, seed: int, *, noise: float = 0.0, reference: str = STRONG
) -> Iterator[Cell]:
    """Yield a training of a tuned method, once it is tuned."""
    of = TWIN if method == SCHEDULED else method
    own = PUBLIC if reference == PUBLIC else _reference_of(SETTINGS[of][0], STRONG)
    study = "icon-tuning-public" if reference == PUBLIC else _tuning_of(of)
    found = tuned.get(TunedKey(study, captions_label(ICONS), of, own))
    if found is not None:
        if method == SCHEDULED:
            found = found._replace(loss=replace(found.loss, method="drrho", coefficient="scheduled"))
        train = _train("glyph-tiny", passes, found, seed, noise)
        yield Cell(method, train, f"passes={passes}", _reference_of(found, reference))


def _tuning_of(method: str) -> str:
    return _TUNING_OF.get(method, "icon-tuning")


def _reference_of(setting: Setting, reference: str) -> str:
    """Return the reference where a setting has a part for one."""
    return reference if setting.loss.needs_reference or setting.selection.is_on else ""


def _tuning(methods: Iterable[str]) -> Iterator[Cell]:
    """Yield settings at the smallest budget, one seed each."""
    for method in methods:
        for setting in SETTINGS[method]:
            yield Cell(method, _train("glyph-tiny", PASSES[0], setting), setting.name, _reference_of(setting, STRONG))


def tuning(_: Tuned) -> Iterator[Cell]:
    """Yield the settings of the main methods."""
    return _tuning(method for method in MAIN if method != SCHEDULED)


def tuning_more(_: Tuned) -> Iterator[Cell]:
    """Yield the settings of the other methods."""
    return _tuning(MORE)


def tuning_rivals(_: Tuned) -> Iterator[Cell]:
    """Yield the settings of the newer methods."""
    return _tuning(RIVALS)


def tuning_public(_: Tuned) -> Iterator[Cell]:
    """Yield the settings of the steered method under the public reference."""
    for setting in PUBLIC_SETTINGS:
        yield Cell("drrho", _train("glyph-tiny", PASSES[0], setting), setting.name, PUBLIC)


def references(_: Tuned) -> Iterator[Cell]:
    """Return the references."""
    return (reference_cell(name, train) for name, train in REFERENCES.items())


def headline(tuned: Tuned) -> Iterator[Cell]:
    """Yield the main methods at the budget at which they were tuned, five seeds each."""
    for seed, method in product(SEEDS, MAIN):
        yield from _cell(tuned, method, PASSES[0], seed)


def headline_more(tuned: Tuned) -> Iterator[Cell]:
    """Yield the other methods, tuned, five seeds each."""
    for seed, method in product(SEEDS, MORE):
        yield from _cell(tuned, method, PASSES[0], seed)


def budgets(tuned: Tuned) -> Iterator[Cell]:
    """Yield the main methods at larger budgets."""
    for passes, seed, method in product(PASSES[1:], FEWER_SEEDS, MAIN):
        yield from _cell(tuned, method, passes, seed)


def reference_quality(tuned: Tuned) -> Iterator[Cell]:
    """Yield the steered methods under weaker references, at two budgets."""
    weaker = [name for name in REFERENCES if name not in (STRONG, PUBLIC)]
    steered = [method for method in MAIN if method != TWIN]
    for seed, passes, reference, method in product(FEWER_SEEDS, PASSES[:2], weaker, steered):
        yield from _cell(tuned, method, passes, seed, reference=reference)


def public(tuned: Tuned) -> Iterator[Cell]:
    """Yield the steered method under the public reference, for which it is tuned, at two budgets."""
    for passes, seeds in ((PASSES[1], FEWER_SEEDS), (PASSES[0], SEEDS)):
        for seed in seeds:
            yield from _cell(tuned, "drrho", passes, seed, reference=PUBLIC)


def noise(tuned: Tuned) -> Iterator[Cell]:
    """Yield the same methods where a share of the training icons have each other's names."""
    for seed, share, method in product(FEWER_SEEDS, reversed(NOISE), MAIN):
        yield from _cell(tuned, method, PASSES[0], seed, noise=share)


def rivals(tuned: Tuned) -> Iterator[Cell]:
    """Yield the newer methods, tuned, beside the headline's."""
    for seed, method in product(FEWER_SEEDS, RIVALS):
        yield from _cell(tuned, method, PASSES[0], seed)


#: In the order in which they run; a training in several is run once.
STUDIES: dict[str, Callable[[Tuned], Iterable[Cell]]] = {
    "icon-tuning": tuning,
    "icon-headline": headline,
    "icon-tuning-more": tuning_more,
    "icon-budgets": budgets,
    "icon-reference-quality": reference_quality,
    "icon-noise": noise,
    "icon-headline-more": headline_more,
    "icon-tuning-rivals": tuning_rivals,
    "icon-rivals": rivals,
    "icon-tuning-public": tuning_public,
    "icon-public": public,
    # Those that steer are trained before. The public one needs its towers, so that it comes last.
    "icon-references": references,
}
TUNING_STUDIES = ("icon-tuning", "icon-tuning-more", "icon-tuning-rivals", "icon-tuning-public")
