"""What `run.py study` runs: named studies, each a function that yields its trainings, as data.

Every training sees `PAIRS_SEEN` pairs in backward passes unless its study is about that; methods that select pairs are
also given that many to choose from. Every method has six settings to be tuned with on each kind of captions (eight of
CVaR, nine where a temperature is learned and of two levels, ten of chi-square, twelve of FastCLIP v3, sixteen with
distillation), one seed each, by naming top-1 on the validation split: `SETTINGS`. `TUNED` says which one was best;
other studies use it where they have not tuned for themselves (`TUNED_SCORED`, `TUNED_LONGER`, `TUNED_REFERENCES`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from experiments.clip.cli.options import Data, Loss, Train
from experiments.clip.cli.presets import PRESETS
from experiments.clip.glyphs.drawing import Captions
from experiments.clip.training.optimization import Optimization
from experiments.clip.training.selection import Selection
from experiments.clip.training.trainer import CheckpointPolicy


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


class Setting(NamedTuple):
    """What a method is tuned over."""

    name: str
    loss: Loss
    lr: float
    selection: Selection = Selection()


SEEDS = range(1, 6)  # seed 0 is for tuning, and is not counted
FEWER_SEEDS = SEEDS[:3]
ADDED_SEEDS = range(6, 11)  # of `ADDED`, on clean captions: added when the first five had been seen
ADDED = ("openclip", "fastclip-v1", "drrho")
HALF = 0.5
FRACTIONS = (0.125, 0.25, HALF)
LEVELS = {"glyph-micro": (1, 2, 5, 10), "glyph-tiny": (1, 2, 5, 10), "glyph-small": (2, 5, 10)}  # passes
CAPTIONS: tuple[Captions, ...] = ("clean", "vague", "swapped")
LONGER = 3  # times as many pairs seen
EPOCHS = 5  # over all pairs; of a share of them, as many as make the same number of pairs seen
PAIRS_SEEN = 23_635 * EPOCHS
RATES = (5e-4, 1e-3, 2e-3)
BATCH = 128
VALIDATIONS = 4
_SHORT = {"temperature": "tau", "coefficient": "c"}  # names of options in names of settings


def _over_rates(key: str, values: Iterable[Any], rates: Iterable[float] = RATES, **loss: Any) -> dict[str, Setting]:
    """Return the settings of values of an option of the loss at all learning rates."""
    found = [
        Setting(f"{_SHORT.get(key, key)}={value} lr={lr:g}", Loss(**{key: value}, **loss), lr)
        for value in values
        for lr in rates
    ]
    return {each.name: each for each in found}


def _rates_alone(**loss: Any) -> dict[str, Setting]:
    return {f"lr={lr:g}": Setting(f"lr={lr:g}", Loss(**loss), lr) for lr in (*RATES, 7e-4, 1.4e-3, 4e-3)}


def _selecting(rule: Any, **loss: Any) -> dict[str, Setting]:
    """Return the settings of a selection: one pair in two or in five, at three learning rates."""
    found = [
        Setting(f"candidates={count} lr={lr:g}", Loss(**loss), lr, Selection(rule, count))
        for count in (2, 5)
        for lr in RATES
    ]
    return {each.name: each for each in found}


def _distilling(**loss: Any) -> dict[str, Setting]:
    """Return the settings of a distillation: both softmaxes at the reference's temperature, or each at its own.

    The first six were as many as others have. Smaller weights were added when 1 was better than 4, own temperatures
    when DRRho-CLIP was worse with distillation than without: the reference's is a seventh of its own.
    """
    at_reference = _over_rates("distill", (1.0, 4.0), **loss) | _over_rates("distill", (0.03, 0.2), RATES[1:], **loss)
    at_own = _over_rates("distill", (0.2, 1.0), distill_own_temperature=True, **loss).values()
    return at_reference | {f"own {each.name}": each._replace(name=f"own {each.name}") for each in at_own}


def _learning(*more: float, **loss: Any) -> dict[str, Setting]:
    """Return the settings of a method that learns one temperature by the radius rho.

    The first six, rho = 0.5 and 2, were as many as others have. The radius between was added when FastCLIP v3's
    temperature had ended at its lower bound, 0.01, with 2, and above 0.3 with 0.5, on vague captions.
    """
    return _over_rates("rho", (0.5, 2.0, 1.0, *more), **loss, temperature_scheme="global")


_DRRHO = {"method": "drrho", "temperature": 0.15}
# 0.05, of either, and 0.025: added when one step past the edge, on clean captions, had been better than all before.
_CHI_SQUARE = {"method": "drrho", "divergence": "chi-square"}
_CVAR = {"method": "drrho", "divergence": "cvar"}
SETTINGS: dict[str, dict[str, Setting]] = {
    "openclip": _rates_alone(method="openclip"),
    "fastclip-v1": _over_rates("temperature", (0.1, 0.2), method="fastclip"),
    "drrho": _over_rates("temperature", (0.125, 0.2), method="drrho"),
    "drrho-c": _over_rates("coefficient", (0.5, 1.5), **_DRRHO),
    "jest": _selecting("jest", method="openclip"),
    "distillation": _distilling(method="openclip"),
    "drrho-distillation": _distilling(**_DRRHO),
    "jest-drrho": _selecting("jest", **_DRRHO),
    "siglip": _rates_alone(method="siglip"),
    # 0.25: added when one step past the edge, on swapped captions, had been better than all before.
    "fastclip-v3": _learning(0.25, method="fastclip", temperature=0.1),
    "drrho-learned": _learning(**_DRRHO),
    "jest-top-k": _selecting("jest-top-k", method="openclip"),
    "drrho-adaptive": _over_rates("temperature", (0.1, 0.15), method="drrho", coefficient="adaptive"),
    "drrho-chi-square": _over_rates("temperature", (0.1, 0.3), **_CHI_SQUARE)
    | _over_rates("temperature", (0.05, 0.025), RATES[1:], **_CHI_SQUARE),
    "drrho-cvar": _over_rates("level", (0.1, 0.3), **_CVAR) | _over_rates("level", (0.05,), RATES[1:], **_CVAR),
    # 1: added when the smaller ones had learned little or next to nothing of swapped captions.
    "two-level": _over_rates("strength", (0.05, 0.2, 1.0), method="two-level", temperature=0.15),
    "rho-top-k": _selecting("rho-top-k", method="openclip"),
    # The twin of chi-square without a reference, over the temperatures that were best with one.
    "fastclip-chi-square": _over_rates(
        "temperature", (0.025, 0.05, 0.1), RATES[1:], method="fastclip", divergence="chi-square"
    ),
}
#: DRRho-CLIP with a divergence that is not the published one.
DIVERGENCE = "drrho-chi-square"
# Six again: a weaker reference may need a smaller coefficient, and none of the methods does best at the lowest rate.
REFERENCE_SETTINGS: dict[str, dict[str, Setting]] = {
    "drrho": {
        name: setting
        for name, setting in (SETTINGS["drrho"] | SETTINGS["drrho-c"]).items()
        if setting.lr in RATES[1:] and not name.startswith("c=1.5")
    },
    DIVERGENCE: {
        name: setting
        for name, setting in SETTINGS[DIVERGENCE].items()
        if setting.lr in RATES[1:] and not name.startswith("tau=0.3")
    },
}
# Where tuning prefers an edge of what was tried, one step past it: by method, the option, and by captions its
# values and learning rates. The methods without reference that headline comparisons are with come first.
_PAST_EDGES: dict[str, tuple[str, dict[Captions, tuple[tuple[Any, float], ...]]]] = {
    "fastclip-v1": (
        "temperature",
        {"clean": ((0.06, 1e-3), (0.06, 2e-3)), "vague": ((0.4, 1e-3),), "swapped": ((0.4, 1e-3),)},
    ),
    "fastclip-v3": (
        "rho",
        {"clean": ((4.0, 2e-3), (2.0, 4e-3)), "vague": ((1.0, 4e-3),), "swapped": ((0.125, 1e-3),)},
    ),
    "drrho": (
        "temperature",
        {"clean": ((0.08, 2e-3), (0.125, 4e-3)), "vague": ((0.08, 1e-3),), "swapped": ((0.08, 1e-3),)},
    ),
    "drrho-learned": (
        "rho",
        {"clean": ((4.0, 2e-3), (2.0, 4e-3)), "vague": ((4.0, 2e-3), (2.0, 4e-3)), "swapped": ((4.0, 1e-3),)},
    ),
    "drrho-adaptive": (
        "temperature",
        {"clean": ((0.06, 2e-3), (0.1, 4e-3)), "vague": ((0.06, 1e-3),), "swapped": ((0.06, 1e-3),)},
    ),
    "drrho-cvar": ("level", {"clean": ((0.025, 2e-3),), "vague": ((0.025, 1e-3),)}),
    "drrho-chi-square": (
        "temperature",
        {
            "clean": ((0.0125, 2e-3),),
            "vague": ((0.0125, 1e-3), (0.025, 5e-4)),
            "swapped": ((0.0125, 1e-3), (0.025, 5e-4)),
        },
    ),
    "fastclip-chi-square": (
        "temperature",
        {
            "clean": ((0.0125, 1e-3), (0.025, 5e-4)),
            "vague": ((0.05, 5e-4),),
            "swapped": ((0.2, 1e-3), (0.1, 5e-4)),
        },
    ),
    "distillation": (
        "distill",
        {"clean": ((0.06, 2e-3),), "vague": ((4.0, 1e-3),), "swapped": ((1.0, 4e-3),)},
    ),
    "drrho-distillation": (
        "distill",
        {"clean": ((0.06, 2e-3),), "vague": ((0.06, 1e-3),), "swapped": ((0.06, 2e-3),)},
    ),
    # Of selections alone, where it has the highest means: twice as many candidates take 1.6 times the operations.
    "jest-top-k": ("candidates", {"clean": ((10, 2e-3),), "swapped": ((10, 2e-3),)}),
}
#: The unsteered twin of the steered method: the same objective without a reference.
TWIN = "fastclip-v1"
#: By captions, the reference that is weaker than a twin of `LONGER` times the budget, but not by far.
NEAR: dict[Captions, str] = {"clean": "equal", "swapped": "weak"}
#: The methods that are also compared at as many pairs scored, which published trainings of selections count.
SELECTING = ("jest", "jest-top-k", "jest-drrho")
#: The published combination: also tried on shares, over sizes and for longer.
WITH_DISTILLATION = "drrho-distillation"
#: The methods without a selection that are also trained for longer, by captions.
AT_LONGER: dict[Captions, tuple[str, ...]] = {
    "swapped": ("drrho", "openclip", WITH_DISTILLATION, TWIN, DIVERGENCE, "fastclip-v3"),
    "clean": ("drrho", TWIN, DIVERGENCE, "fastclip-v3"),
}
# On swapped captions, the tuned setting and others, tried at `LONGER`: by method, and the reference `NEAR` of some.
_LONGER_SETTINGS: dict[tuple[str, str], tuple[str, ...]] = {
    ("openclip", ""): ("lr=0.001", "lr=0.002"),
    (TWIN, ""): ("tau=0.2 lr=0.001", "tau=0.2 lr=0.002", "tau=0.1 lr=0.001"),
    ("fastclip-v3", ""): (
        *("rho=0.25 lr=0.001", "rho=0.25 lr=0.002"),
        *("rho=0.5 lr=0.001", "rho=1.0 lr=0.001", "rho=2.0 lr=0.001"),
    ),
    ("drrho", "weak"): ("tau=0.125 lr=0.001", "c=0.5 lr=0.001"),
    (DIVERGENCE, "weak"): ("tau=0.025 lr=0.002", "tau=0.025 lr=0.001", "tau=0.05 lr=0.001"),
}
#: The best of all in tuning: the reference selects pairs, and weighs the negatives among the selected.
BEST = "jest-drrho"
#: The methods that are trained on `HALF` of the pairs, and on no smaller share, by captions.
ON_HALF: dict[Captions, tuple[str, ...]] = {"clean": (BEST, DIVERGENCE), "swapped": (DIVERGENCE,)}
#: Methods that are not of the first comparisons, but of the next: five seeds.
LATER = ("fastclip-v3", "drrho-learned", "jest-drrho", "drrho-chi-square", "fastclip-chi-square")
#: The methods of the first comparisons; the others follow.
MAIN = ("openclip", "fastclip-v1", "drrho", "drrho-c", "jest", "distillation", "drrho-distillation")

# By captions and method, the setting of the highest validation top-1 of the studies "tuning" and "tuning-more".
TUNED: dict[tuple[Captions, str], str] = {
    ("swapped", "openclip"): "lr=0.001",
    ("vague", "openclip"): "lr=0.0014",
    ("clean", "openclip"): "lr=0.0014",
    ("swapped", "fastclip-v1"): "tau=0.2 lr=0.001",
    ("vague", "fastclip-v1"): "tau=0.2 lr=0.001",
    ("clean", "fastclip-v1"): "tau=0.1 lr=0.001",
    ("swapped", "drrho"): "tau=0.125 lr=0.001",
    ("vague", "drrho"): "tau=0.125 lr=0.001",
    ("clean", "drrho"): "tau=0.125 lr=0.002",
    ("swapped", "drrho-c"): "c=1.5 lr=0.001",
    ("vague", "drrho-c"): "c=0.5 lr=0.001",
    ("clean", "drrho-c"): "c=0.5 lr=0.002",
    ("swapped", "jest"): "candidates=5 lr=0.002",
    ("vague", "jest"): "candidates=5 lr=0.002",
    ("clean", "jest"): "candidates=2 lr=0.002",
    ("swapped", "distillation"): "distill=1.0 lr=0.002",
    ("vague", "distillation"): "own distill=1.0 lr=0.001",
    ("clean", "distillation"): "own distill=0.2 lr=0.002",
    ("swapped", "drrho-distillation"): "own distill=0.2 lr=0.002",
    ("vague", "drrho-distillation"): "own distill=0.2 lr=0.001",
    ("clean", "drrho-distillation"): "own distill=0.2 lr=0.002",
    ("swapped", "jest-drrho"): "candidates=5 lr=0.002",
    ("vague", "jest-drrho"): "candidates=5 lr=0.002",
    ("clean", "jest-drrho"): "candidates=5 lr=0.002",
    ("swapped", "siglip"): "lr=0.0014",
    ("vague", "siglip"): "lr=0.002",
    ("clean", "siglip"): "lr=0.002",
    ("swapped", "fastclip-v3"): "rho=0.25 lr=0.001",
    ("vague", "fastclip-v3"): "rho=1.0 lr=0.002",
    ("clean", "fastclip-v3"): "rho=2.0 lr=0.002",
    ("swapped", "drrho-learned"): "rho=2.0 lr=0.001",
    ("vague", "drrho-learned"): "rho=2.0 lr=0.002",
    ("clean", "drrho-learned"): "rho=2.0 lr=0.002",
    ("swapped", "jest-top-k"): "candidates=5 lr=0.002",
    ("vague", "jest-top-k"): "candidates=5 lr=0.001",
    ("clean", "jest-top-k"): "candidates=5 lr=0.002",
    ("swapped", "drrho-adaptive"): "tau=0.1 lr=0.001",
    ("vague", "drrho-adaptive"): "tau=0.1 lr=0.001",
    ("clean", "drrho-adaptive"): "tau=0.1 lr=0.002",
    ("swapped", "drrho-chi-square"): "tau=0.025 lr=0.001",
    ("vague", "drrho-chi-square"): "tau=0.025 lr=0.001",
    ("clean", "drrho-chi-square"): "tau=0.025 lr=0.002",
    ("swapped", "drrho-cvar"): "level=0.1 lr=0.001",
    ("vague", "drrho-cvar"): "level=0.05 lr=0.001",
    ("clean", "drrho-cvar"): "level=0.05 lr=0.002",
    ("swapped", "two-level"): "strength=1.0 lr=0.001",
    ("vague", "two-level"): "strength=1.0 lr=0.001",
    ("clean", "two-level"): "strength=1.0 lr=0.002",
    ("swapped", "rho-top-k"): "candidates=5 lr=0.002",
    ("vague", "rho-top-k"): "candidates=5 lr=0.002",
    ("clean", "rho-top-k"): "candidates=2 lr=0.002",
    ("swapped", "fastclip-chi-square"): "tau=0.1 lr=0.001",
    ("vague", "fastclip-chi-square"): "tau=0.05 lr=0.001",
    ("clean", "fastclip-chi-square"): "tau=0.025 lr=0.001",
}
# By captions and method, the same of "tuning-scored".
TUNED_SCORED: dict[tuple[Captions, str], str] = {
    ("swapped", "jest"): "candidates=2 lr=0.001",
    ("vague", "jest"): "candidates=2 lr=0.002",
    ("clean", "jest"): "candidates=2 lr=0.002",
    ("swapped", "jest-top-k"): "candidates=2 lr=0.001",
    ("vague", "jest-top-k"): "candidates=2 lr=0.001",
    ("clean", "jest-top-k"): "candidates=2 lr=0.001",
    ("swapped", "jest-drrho"): "candidates=2 lr=0.002",
    ("vague", "jest-drrho"): "candidates=2 lr=0.002",
    ("clean", "jest-drrho"): "candidates=2 lr=0.002",
}
# By captions, method and reference, the same of "tuning-references".
TUNED_REFERENCES: dict[tuple[Captions, str, str], str] = {
    ("clean", "drrho", "weak"): "c=0.5 lr=0.002",
    ("swapped", "drrho", "weak"): "tau=0.125 lr=0.001",
    ("clean", "drrho", "equal"): "c=0.5 lr=0.002",
    ("swapped", "drrho", "equal"): "tau=0.125 lr=0.002",
    ("clean", DIVERGENCE, "equal"): "tau=0.025 lr=0.002",
    ("swapped", DIVERGENCE, "weak"): "tau=0.025 lr=0.002",
}
# By captions, method and reference, "" where there is none, the same of "tuning-longer".
TUNED_LONGER: dict[tuple[Captions, str, str], str] = {
    ("swapped", "openclip", ""): "lr=0.001",
    ("swapped", TWIN, ""): "tau=0.1 lr=0.001",
    ("swapped", "fastclip-v3", ""): "rho=1.0 lr=0.001",
    ("swapped", "drrho", "weak"): "c=0.5 lr=0.001",
    ("swapped", DIVERGENCE, "weak"): "tau=0.025 lr=0.002",
}

# Trained on the reference's own pairs with clean captions. The shipped one, a larger model, is the strong one.
REFERENCES: dict[str, Train] = {
    "weak": dataclasses.replace(
        PRESETS["glyph-reference"],
        model="glyph-micro",
        optimization=Optimization(epochs=20, batch_size=BATCH),
    ),
    "equal": dataclasses.replace(
        PRESETS["glyph-reference"],
        model="glyph-tiny",
        optimization=Optimization(epochs=15, batch_size=BATCH),
    ),
}


def training(
    setting: Setting,
    captions: Captions,
    *,
    epochs: float = EPOCHS,
    seed: int = 0,
    fraction: float = 1.0,
    **options: Any,
) -> Train:
    """Return a training on so many passes over all pairs, counted in backward passes, or as many pairs of a share.

    Raises
    ------
    ValueError
        If these are not whole passes over what the training is given.
    """
    exact = epochs * setting.selection.scored_per_pair / fraction
    passes = round(exact)
    if abs(passes - exact) > 1e-9 * exact:
        raise ValueError(f"epochs={epochs:g} of {setting.name} on a share {fraction:g} are {exact:g} passes, not whole")
    return Train(
        model=options.pop("model", "glyph-tiny"),
        fraction=fraction,
        data=Data(captions),
        loss=setting.loss,
        selection=setting.selection,
        optimization=Optimization(epochs=passes, batch_size=BATCH, lr=setting.lr),
        seed=seed,
        keeping=CheckpointPolicy(checkpoint_minutes=5.0),
        validations=VALIDATIONS,
        **options,
    )


def tuned(method: str, captions: Captions, **options: Any) -> Train:
    """Return a training with the method's tuned setting."""
    return training(SETTINGS[method][TUNED[captions, method]], captions, **options)


def longer_cell(method: str, captions: Captions, seed: int, label: str = "", reference: str = "") -> Cell:
    """Return a training of `LONGER` times the budget, with the setting that was tuned for that, if any was."""
    usual = TUNED_REFERENCES[captions, method, reference] if reference else TUNED[captions, method]
    name = TUNED_LONGER.get((captions, method, reference), usual)
    return _longer_with(name, method, captions, seed, label or name, reference)


def _longer_with(name: str, method: str, captions: Captions, seed: int, label: str, reference: str) -> Cell:
    setting = (REFERENCE_SETTINGS if reference else SETTINGS)[method][name]
    return Cell(method, training(setting, captions, seed=seed, epochs=LONGER * EPOCHS), label, reference)


def references() -> Iterator[Cell]:
    """Return the references of other quality than the shipped one's."""
    return map(reference_cell, REFERENCES)


def reference_cell(name: str) -> Cell:
    """Return the training of a reference, by its name."""
    return Cell(REFERENCES[name].loss.method, REFERENCES[name], name)


def _tuning(methods: Iterable[str]) -> Iterator[Cell]:
    for method in methods:
        for captions in reversed(CAPTIONS):
            for setting in SETTINGS[method].values():
                yield Cell(method, training(setting, captions), setting.name)


def tuning() -> Iterator[Cell]:
    """Yield the settings of the main methods, one seed each."""
    return _tuning(MAIN)


def tuning_more() -> Iterator[Cell]:
    """Yield the settings of the other methods."""
    return _tuning(method for method in SETTINGS if method not in MAIN)


def edges() -> Iterator[Cell]:
    """Yield settings one step past those that tuning prefers at an edge of what it tried: one seed each."""
    for method, (option, steps) in _PAST_EDGES.items():
        part = "selection" if hasattr(Selection, option) else "loss"
        for captions, own in steps.items():
            tried = SETTINGS[method][TUNED[captions, method]]
            for value, lr in own:
                name = f"{tried.name.partition('=')[0]}={value} lr={lr:g}"
                past = {part: dataclasses.replace(getattr(tried, part), **{option: value})}
                yield Cell(method, training(tried._replace(name=name, lr=lr, **past), captions), name)


def _headline(methods: Sequence[str], seeds: Iterable[int]) -> Iterator[Cell]:
    for seed in seeds:
        for method in methods:
            for captions in reversed(CAPTIONS):
                if (captions, method) in TUNED:
                    yield Cell(method, tuned(method, captions, seed=seed), TUNED[captions, method])


def headline() -> Iterator[Cell]:
    """Yield the main methods, tuned, on all kinds of captions, five seeds each, and some on clean ones ten."""
    yield from _headline(MAIN, SEEDS)
    yield from (cell for cell in _headline(ADDED, ADDED_SEEDS) if cell.train.data.captions == "clean")


def headline_more() -> Iterator[Cell]:
    """Yield the other methods, tuned, on all kinds of captions, three seeds each, and five of `LATER`."""
    yield from _headline([method for method in SETTINGS if method not in MAIN], FEWER_SEEDS)
    yield from _headline(LATER, SEEDS[len(FEWER_SEEDS) :])


def _of_scored(setting: Setting, captions: Captions, seed: int = 0) -> Train:
    """Return a training that is given `PAIRS_SEEN` pairs to choose from, and trains on one in so many."""
    return training(setting, captions, seed=seed, epochs=EPOCHS / setting.selection.scored_per_pair)


def tuning_scored() -> Iterator[Cell]:
    """Yield the settings of selections at the number of pairs scored that others train on, one seed each."""
    for method in SELECTING:
        for captions in reversed(CAPTIONS):
            for setting in SETTINGS[method].values():
                yield Cell(method, _of_scored(setting, captions), setting.name)


def scored() -> Iterator[Cell]:
    """Yield the same, tuned, five seeds each."""
    for seed in SEEDS:
        for method in SELECTING:
            for captions in reversed(CAPTIONS):
                if name := TUNED_SCORED.get((captions, method)):
                    yield Cell(method, _of_scored(SETTINGS[method][name], captions, seed), name)


def longer() -> Iterator[Cell]:
    """Yield `AT_LONGER` at three times the budget: what steering pays may change with it."""
    for captions, methods in AT_LONGER.items():
        for seed, method in product(FEWER_SEEDS, methods):
            if (captions, method) in TUNED:
                yield longer_cell(method, captions, seed, f"epochs={LONGER * EPOCHS}")


def tuning_longer() -> Iterator[Cell]:
    """Yield settings at three times the budget, one seed each, on swapped captions, where most depends on it.

    Of methods without reference, and of the targets of `weak_to_strong`.
    """
    for (method, reference), names in _LONGER_SETTINGS.items():
        for name in names:
            yield _longer_with(name, method, "swapped", 0, name, reference)


def fractions() -> Iterator[Cell]:
    """Yield the twins on shares of the pairs, at an equal number of pairs seen; all pairs are the headline's.

    `ON_HALF` are there on half of them: `BEST` chooses from five times as many and takes as much longer.
    """
    for methods in ((TWIN, "drrho"), (WITH_DISTILLATION,)):
        for seed, fraction, captions in product(FEWER_SEEDS, reversed(FRACTIONS), ("clean", "swapped")):
            for method in methods:
                if (captions, method) in TUNED:
                    yield Cell(method, tuned(method, captions, seed=seed, fraction=fraction))
    for captions, methods in ON_HALF.items():
        for seed, method in product(FEWER_SEEDS, methods):
            if (captions, method) in TUNED:
                yield Cell(method, tuned(method, captions, seed=seed, fraction=HALF))


def scaling() -> Iterator[Cell]:
    """Yield OpenCLIP's method, DRRho-CLIP and its twin over sizes of the model and budgets, on clean captions."""
    for methods in (("openclip", "drrho"), (WITH_DISTILLATION,), (TWIN,)):
        for seed, (model, budgets) in product(FEWER_SEEDS, LEVELS.items()):
            for epochs, method in product(budgets, methods):
                if ("clean", method) in TUNED:
                    train = tuned(method, "clean", seed=seed, epochs=epochs, model=model)
                    yield Cell(method, train, f"epochs={epochs}")


def tuning_references() -> Iterator[Cell]:
    """Yield the steered methods' settings under the references that the study trains, one seed each.

    `DIVERGENCE` only under the references `NEAR`.
    """
    for reference, captions in product(REFERENCES, ("clean", "swapped")):
        for method in ("drrho", DIVERGENCE) if NEAR[captions] == reference else ("drrho",):
            for setting in REFERENCE_SETTINGS[method].values():
                yield Cell(method, training(setting, captions), setting.name, reference)


def reference_quality() -> Iterator[Cell]:
    """Yield DRRho-CLIP, tuned, under the references that the study trains; the headline has the shipped one."""
    for seed, reference, captions in product(SEEDS, REFERENCES, ("clean", "swapped")):
        if name := TUNED_REFERENCES.get((captions, "drrho", reference)):
            train = training(REFERENCE_SETTINGS["drrho"][name], captions, seed=seed)
            yield Cell("drrho", train, name, reference)


def weak_to_strong() -> Iterator[Cell]:
    """Yield the twin and steered methods where the reference is little weaker than the twin, as in the publication.

    The references `NEAR`: on clean captions that of the target's own size, trained for as long on other pairs.
    """
    for seed, (captions, reference) in product(SEEDS, NEAR.items()):
        if (captions, TWIN) in TUNED:
            yield longer_cell(TWIN, captions, seed)
        for method in REFERENCE_SETTINGS:
            if (captions, method, reference) in TUNED_REFERENCES:
                yield longer_cell(method, captions, seed, reference=reference)


#: In the order in which they run; a training in several is run once.
STUDIES: dict[str, Callable[[], Iterable[Cell]]] = {
    "tuning": tuning,
    "headline": headline,
    "tuning-more": tuning_more,
    "references": references,
    "tuning-references": tuning_references,
    "fractions": fractions,
    "reference-quality": reference_quality,
    "scaling": scaling,
    "longer": longer,
    "weak-to-strong": weak_to_strong,
    "headline-more": headline_more,
    "tuning-scored": tuning_scored,
    "scored": scored,
    "edges": edges,
    "tuning-longer": tuning_longer,
}
