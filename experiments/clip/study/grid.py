"""What `run.py study` runs: named studies, each a function that yields its trainings, as data.

Every training sees `PAIRS_SEEN` pairs in backward passes unless its study is about that; methods that select pairs are
also given that many to choose from. Every method has six settings to be tuned with on each kind of captions (eight of
CVaR, nine where a temperature is learned and of two levels, ten of chi-square, twelve of FastCLIP v3, sixteen with
distillation), one seed each, by naming top-1 on the validation split: `SETTINGS`. The study `tuning` or `tuning-more`
says which one is best; other studies use it where they have not tuned for themselves (`tuning-scored`,
`tuning-references`, `tuning-longer`). A study is given the settings that are tuned by now, and yields the trainings
that use these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

from ..cli.options import Captions, Data, Train
from ..cli.presets import PRESETS, of_embedded_pairs
from ..training.options import CheckpointPolicy
from .cells import Cell, Tuned, TunedKey, reference_cell
from .settings import (
    DIVERGENCE,
    LONGER_SETTINGS,
    PAST_EDGES,
    REFERENCE_SETTINGS,
    SETTINGS,
    TWIN,
    Setting,
    settings_of,
)

SEEDS = range(1, 6)  # seed 0 is for tuning, and is not counted
FEWER_SEEDS = SEEDS[:3]
ADDED_SEEDS = range(6, 11)  # of `ADDED`, on clean captions: added when the first five had been seen
ADDED = ("openclip", "fastclip-v1", "drrho")
HALF = 0.5
FRACTIONS = (0.125, 0.25, HALF)
LEVELS = {"glyph-micro": (1, 2, 5, 10), "glyph-tiny": (1, 2, 5, 10), "glyph-small": (2, 5, 10, 20)}  # passes
CAPTIONS: tuple[Captions, ...] = ("clean", "vague", "swapped")
_CLEAN_AND_SWAPPED: tuple[Captions, ...] = ("clean", "swapped")
_LONGER_CAPTIONS: Captions = "swapped"  # of `tuning_longer`
LONGER = 3  # times as many pairs seen
BUDGETS = (2, 5, 10, 15)  # passes, of `scheduled`
#: What tables call the steered method with the scheduled coefficient.
SCHEDULED = "drrho-scheduled"
# Of `scheduled`: added when the first three seeds had been seen, at the budgets and references (the shipped one has no
# name) where the constant coefficient gained and three seeds could not tell whether the scheduled one does.
_MORE_SEEDS, _UNDECIDED = range(4, 7), ((5, 10), ("equal", ""))
EPOCHS = 5  # over all pairs; of a share of them, as many as make the same number of pairs seen
PAIRS_SEEN = 23_635 * EPOCHS
BATCH = 128
VALIDATIONS = 4
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
#: The best of all in tuning: the reference selects pairs, and weighs the negatives among the selected.
BEST = "jest-drrho"
#: The methods that are trained on `HALF` of the pairs, and on no smaller share, by captions.
ON_HALF: dict[Captions, tuple[str, ...]] = {"clean": (BEST, DIVERGENCE), "swapped": (DIVERGENCE,)}
#: Methods that are not of the first comparisons, but of the next: five seeds.
LATER = ("fastclip-v3", "drrho-learned", "jest-drrho", "drrho-chi-square", "fastclip-chi-square")
#: The methods of the first comparisons; the others follow.
MAIN = ("openclip", "fastclip-v1", "drrho", "drrho-c", "jest", "distillation", "drrho-distillation")

# Trained on the reference's own pairs with clean captions. The shipped one, a larger model, is the strong one.
REFERENCES: dict[str, Train] = {
    "weak": dataclasses.replace(
        PRESETS["glyph-reference"],
        model="glyph-micro",
        **of_embedded_pairs(epochs=20, batch_size=BATCH),
    ),
    "equal": dataclasses.replace(
        PRESETS["glyph-reference"],
        model="glyph-tiny",
        **of_embedded_pairs(epochs=15, batch_size=BATCH),
    ),
}


def training(
    setting: Setting,
    captions: Captions,
    *,
    epochs: float = EPOCHS,
    seed: int = 0,
    fraction: float = 1.0,
    model: str = "glyph-tiny",
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
        model=model,
        fraction=fraction,
        data=Data(captions),
        loss=setting.loss,
        selection=setting.selection,
        **of_embedded_pairs(epochs=passes, batch_size=BATCH, lr=setting.lr),
        seed=seed,
        keeping=CheckpointPolicy(checkpoint_minutes=5.0),
        validations=VALIDATIONS,
    )


def tuning_of(method: str) -> str:
    """Return the study that tunes a method."""
    return "tuning" if method in MAIN else "tuning-more"


def usual_setting(tuned: Tuned, method: str, captions: Captions) -> Setting | None:
    """Return what a method was tuned to at the usual budget, under the shipped reference if any; None until then."""
    return tuned.get(TunedKey(tuning_of(method), captions, method))


def longer_setting(tuned: Tuned, method: str, captions: Captions, reference: str = "") -> Setting | None:
    """Return the setting for `LONGER` times the budget: that tuned for it where `tuning_longer` does so, or the usual.

    None until the study that decides is done.
    """
    if captions == _LONGER_CAPTIONS and (method, reference) in LONGER_SETTINGS:
        study = "tuning-longer"
    else:
        study = "tuning-references" if reference else tuning_of(method)
    return tuned.get(TunedKey(study, captions, method, reference))


def _longer_cell(
    setting: Setting, method: str, captions: Captions, seed: int, label: str = "", reference: str = ""
) -> Cell:
    """Return a training of `LONGER` times the budget."""
    train = training(setting, captions, seed=seed, epochs=LONGER * EPOCHS)
    return Cell(method, train, label or setting.name, reference)


def references(_: Tuned) -> Iterator[Cell]:
    """Return the references of other quality than the shipped one's."""
    return (reference_cell(name, train) for name, train in REFERENCES.items())


def _tuning(methods: Iterable[str]) -> Iterator[Cell]:
    for method in methods:
        for captions in reversed(CAPTIONS):
            for setting in SETTINGS[method]:
                yield Cell(method, training(setting, captions), setting.name)


def tuning(_: Tuned) -> Iterator[Cell]:
    """Yield the settings of the main methods, one seed each."""
    return _tuning(MAIN)


def tuning_more(_: Tuned) -> Iterator[Cell]:
    """Yield the settings of the other methods."""
    return _tuning(method for method in SETTINGS if method not in MAIN)


def edges(tuned: Tuned) -> Iterator[Cell]:
    """Yield settings one step past those that tuning prefers at an edge of what it tried: one seed each."""
    for method, (option, steps) in PAST_EDGES.items():
        for captions, own in steps.items():
            if (tried := usual_setting(tuned, method, captions)) is not None:
                for value, lr in own:
                    setting = tried.moved(option, value, lr)
                    yield Cell(method, training(setting, captions), setting.name)


def _headline(tuned: Tuned, methods: Sequence[str], seeds: Iterable[int]) -> Iterator[Cell]:
    for seed in seeds:
        for method in methods:
            for captions in reversed(CAPTIONS):
                if (setting := usual_setting(tuned, method, captions)) is not None:
                    yield Cell(method, training(setting, captions, seed=seed), setting.name)


def headline(tuned: Tuned) -> Iterator[Cell]:
    """Yield the main methods, tuned, on all kinds of captions, five seeds each, and some on clean ones ten."""
    yield from _headline(tuned, MAIN, SEEDS)
    yield from (cell for cell in _headline(tuned, ADDED, ADDED_SEEDS) if cell.train.data.captions == "clean")


def headline_more(tuned: Tuned) -> Iterator[Cell]:
    """Yield the other methods, tuned, on all kinds of captions, three seeds each, and five of `LATER`."""
    yield from _headline(tuned, [method for method in SETTINGS if method not in MAIN], FEWER_SEEDS)
    yield from _headline(tuned, LATER, SEEDS[len(FEWER_SEEDS) :])


def _of_scored(setting: Setting, captions: Captions, seed: int = 0) -> Train:
    """Return a training that is given `PAIRS_SEEN` pairs to choose from, and trains on one in so many."""
    return training(setting, captions, seed=seed, epochs=EPOCHS / setting.selection.scored_per_pair)


def tuning_scored(_: Tuned) -> Iterator[Cell]:
    """Yield the settings of selections at the number of pairs scored that others train on, one seed each."""
    for method in SELECTING:
        for captions in reversed(CAPTIONS):
            for setting in SETTINGS[method]:
                yield Cell(method, _of_scored(setting, captions), setting.name)


def scored(tuned: Tuned) -> Iterator[Cell]:
    """Yield the same, tuned, five seeds each."""
    for seed in SEEDS:
        for method in SELECTING:
            for captions in reversed(CAPTIONS):
                if (setting := tuned.get(TunedKey("tuning-scored", captions, method))) is not None:
                    yield Cell(method, _of_scored(setting, captions, seed), setting.name)


def longer(tuned: Tuned) -> Iterator[Cell]:
    """Yield `AT_LONGER` at three times the budget: what steering pays may change with it."""
    for captions, methods in AT_LONGER.items():
        for seed, method in product(FEWER_SEEDS, methods):
            if (setting := longer_setting(tuned, method, captions)) is not None:
                yield _longer_cell(setting, method, captions, seed, f"epochs={LONGER * EPOCHS}")


def tuning_longer(_: Tuned) -> Iterator[Cell]:
    """Yield settings at three times the budget, one seed each, on swapped captions, where most depends on it.

    Of methods without reference, and of the targets of `weak_to_strong`.
    """
    for (method, reference), settings in LONGER_SETTINGS.items():
        for setting in settings:
            yield _longer_cell(setting, method, _LONGER_CAPTIONS, 0, reference=reference)


def fractions(tuned: Tuned) -> Iterator[Cell]:
    """Yield the twins on shares of the pairs, at an equal number of pairs seen; all pairs are the headline's.

    `ON_HALF` are there on half of them: `BEST` chooses from five times as many and takes as much longer.
    """
    for methods in ((TWIN, "drrho"), (WITH_DISTILLATION,)):
        for seed, fraction, captions in product(FEWER_SEEDS, reversed(FRACTIONS), _CLEAN_AND_SWAPPED):
            for method in methods:
                if (setting := usual_setting(tuned, method, captions)) is not None:
                    yield Cell(method, training(setting, captions, seed=seed, fraction=fraction))
    for captions, methods in ON_HALF.items():
        for seed, method in product(FEWER_SEEDS, methods):
            if (setting := usual_setting(tuned, method, captions)) is not None:
                yield Cell(method, training(setting, captions, seed=seed, fraction=HALF))


def scaling(tuned: Tuned) -> Iterator[Cell]:
    """Yield OpenCLIP's method, DRRho-CLIP and its twin over sizes of the model and budgets, on clean captions."""
    for methods in (("openclip", "drrho"), (WITH_DISTILLATION,), (TWIN,)):
        for seed, (model, budgets) in product(FEWER_SEEDS, LEVELS.items()):
            for epochs in budgets:
                for method in methods:
                    if (setting := usual_setting(tuned, method, "clean")) is not None:
                        train = training(setting, "clean", seed=seed, epochs=epochs, model=model)
                        yield Cell(method, train, f"epochs={epochs}")


def tuning_references(_: Tuned) -> Iterator[Cell]:
    """Yield the steered methods' settings under the references that the study trains, one seed each.

    `DIVERGENCE` only under the references `NEAR`.
    """
    for reference, captions in product(REFERENCES, _CLEAN_AND_SWAPPED):
        for method in ("drrho", DIVERGENCE) if NEAR[captions] == reference else ("drrho",):
            for setting in settings_of(method, reference):
                yield Cell(method, training(setting, captions), setting.name, reference)


def reference_quality(tuned: Tuned) -> Iterator[Cell]:
    """Yield DRRho-CLIP, tuned, under the references that the study trains; the headline has the shipped one."""
    for seed, reference, captions in product(SEEDS, REFERENCES, _CLEAN_AND_SWAPPED):
        if (setting := tuned.get(TunedKey("tuning-references", captions, "drrho", reference))) is not None:
            yield Cell("drrho", training(setting, captions, seed=seed), setting.name, reference)


def weak_to_strong(tuned: Tuned) -> Iterator[Cell]:
    """Yield the twin and steered methods where the reference is little weaker than the twin, as in the publication.

    The references `NEAR`: on clean captions that of the target's own size, trained for as long on other pairs.
    """
    for seed, (captions, near) in product(SEEDS, NEAR.items()):
        for method, reference in ((TWIN, ""), *((method, near) for method in REFERENCE_SETTINGS)):
            if (setting := longer_setting(tuned, method, captions, reference)) is not None:
                yield _longer_cell(setting, method, captions, seed, reference=reference)


def scheduled(tuned: Tuned) -> Iterator[Cell]:
    """Yield the scheduled coefficient at the settings of the twin, and the tuned constant one, on clean captions.

    Under three references at four budgets, at which other studies have the twin: below by a reference that the target
    overtakes, a constant coefficient costs points.
    """
    twin, constant = usual_setting(tuned, TWIN, "clean"), usual_setting(tuned, "drrho", "clean")
    if twin is None or constant is None:
        return
    own = twin._replace(loss=dataclasses.replace(twin.loss, method="drrho", coefficient="scheduled"))
    cells = [*product(FEWER_SEEDS, BUDGETS, (*REFERENCES, "")), *product(_MORE_SEEDS, *_UNDECIDED)]
    for seed, epochs, reference in cells:
        yield Cell(SCHEDULED, training(own, "clean", seed=seed, epochs=epochs), f"epochs={epochs}", reference)
    for seed, epochs, reference in cells:
        known = TunedKey("tuning-references", "clean", "drrho", reference)
        if (setting := tuned.get(known) if reference else constant) is not None:
            yield Cell("drrho", training(setting, "clean", seed=seed, epochs=epochs), f"epochs={epochs}", reference)
    for seed, epochs in dict.fromkeys((seed, epochs) for seed, epochs, _ in cells):
        yield Cell(TWIN, training(twin, "clean", seed=seed, epochs=epochs), f"epochs={epochs}")


#: In the order in which they run; a training in several is run once.
STUDIES: dict[str, Callable[[Tuned], Iterable[Cell]]] = {
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
    "scheduled": scheduled,
}
#: The studies that choose settings; they use no tuned setting themselves.
TUNING_STUDIES = ("tuning", "tuning-more", "tuning-references", "tuning-scored", "tuning-longer")
