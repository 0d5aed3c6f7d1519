"""What `run.py study --data icons` runs: the same questions on natural pairs, as data, at the scale of a core or a GPU.

Budgets are counted in passes over the 79,593 training icons. Every method has four settings to be tuned with at the
smallest, one seed each, by naming top-1 on the validation split; steered ones under the strong reference. Other
budgets, references and noise use what was best there. References see the other pool of pairs alone. The scheduled
coefficient is tried at the settings that its twin was tuned to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from ..cli.options import Data, Train
from ..cli.presets import PRESETS, of_embedded_pairs
from ..training.options import CheckpointPolicy, Execution, Loss, Selection
from .cells import Cell, Tuned, TunedKey, captions_label, reference_cell
from .settings import DIVERGENCE, TWIN, Setting

SEEDS = range(1, 6)  # seed 0 is for tuning, and is not counted
FEWER_SEEDS = SEEDS[:3]
NOISE = (0.2, 0.4)
_RATES = (1e-3, 2e-3)


def _over(loss: Loss, option: str, values: Iterable[float]) -> tuple[Setting, ...]:
    return tuple(Setting(replace(loss, **{option: value}), lr, tried=(option,)) for value in values for lr in _RATES)


def _selecting(settings: Iterable[Setting]) -> tuple[Setting, ...]:
    """Return the settings where the reference chooses one pair in two."""
    return tuple(each._replace(selection=Selection("jest", candidates=2)) for each in settings)


_STEERED = Loss(method="drrho")
_LEARNED = Loss(method="fastclip", temperature=0.1, temperature_scheme="global")
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "openclip": tuple(Setting(Loss(method="openclip"), lr) for lr in (5e-4, 1e-3, 2e-3, 4e-3)),
    TWIN: _over(Loss(method="fastclip"), "temperature", (0.07, 0.14)),
    "fastclip-v3": _over(_LEARNED, "rho", (0.5, 2.0)),
    "fastclip-chi-square": _over(Loss(method="fastclip", divergence="chi-square"), "temperature", (0.05, 0.1)),
    "drrho": _over(_STEERED, "temperature", (0.07, 0.14)),
    "drrho-adaptive": _over(replace(_STEERED, coefficient="adaptive"), "temperature", (0.07, 0.14)),
    DIVERGENCE: _over(replace(_STEERED, divergence="chi-square"), "temperature", (0.025, 0.05)),
}
_NETWORK = {"normalizer": "network", "normalizer_steps": 5, "final_gamma": 0.1}
# Newer methods: the reference's hard mask of negatives, normalizers that a network predicts, without and with steering,
# the target's own average as its reference, distillation with a selection of pairs, alone and steered, and that
# selection with steering.
SETTINGS |= {
    "gist": tuple(Setting(Loss(method="gist"), lr) for lr in (5e-4, 1e-3, 2e-3, 4e-3)),
    "neuclip": _over(Loss(method="fastclip", **_NETWORK), "temperature", (0.07, 0.14)),
    "drrho-neuclip": _over(replace(_STEERED, **_NETWORK), "temperature", (0.07, 0.14)),
    "drrho-self": _over(replace(_STEERED, temperature=0.14, self_reference=0.99), "coefficient", (0.25, 0.5)),
    "aced": _selecting(_over(Loss(method="openclip"), "distill", (0.5, 2.0))),
    "jest-drrho": _selecting(_over(_STEERED, "temperature", (0.07, 0.14))),
    "distillation": _over(Loss(method="openclip"), "distill", (0.5, 2.0)),
    "drrho-distillation": _over(replace(_STEERED, temperature=0.07), "distill", (0.5, 2.0)),
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
MORE = ("openclip", "fastclip-v3", "drrho-adaptive", "fastclip-chi-square")
#: Of these, what is compared at other budgets too: methods without a reference.
_UNSTEERED = ("openclip", "fastclip-v3")
RIVALS = ("aced", "jest-drrho", "gist", "distillation", "drrho-distillation", "drrho-neuclip", "neuclip", "drrho-self")

Study = Callable[[Tuned], Iterable[Cell]]


@dataclass(frozen=True)
class Scale:
    """The grid with one size of pictures, model and budgets.

    Attributes
    ----------
    name : str
        What the names of its studies begin with.
    references : mapping
        Model, passes and learning rate of the references, from the weakest by what they know of held-out icons.
    strong : str
        The reference of all studies but those of other references.
    execution : Execution or None
        Device and precision, where they are not those of all trainings on the embedded pairs.
    """

    name: str
    model: str
    pixels: int
    batch_size: int
    passes: tuple[int, ...]
    references: Mapping[str, tuple[str, int, float]]
    strong: str
    execution: Execution | None = None

    @property
    def data(self) -> Data:
        """Its pairs."""
        return Data(kind="icons", pixels=self.pixels)

    def study(self, name: str) -> str:
        """Return what one of its studies is called."""
        return f"{self.name}-{name}"

    def tuning_of(self, method: str) -> str:
        """Return the study that tunes a method."""
        more = "-more" if method in MORE else "-rivals" if method in RIVALS else ""
        return self.study(f"tuning{more}")

    def train(self, model: str, passes: int, setting: Setting, seed: int = 0, noise: float = 0.0) -> Train:
        """Return a training of so many passes over all pairs, counted in backward passes."""
        on_core = Train(
            model=model,
            data=replace(self.data, swapped=noise),
            loss=setting.loss,
            selection=setting.selection,
            **of_embedded_pairs(
                epochs=passes * setting.selection.scored_per_pair, batch_size=self.batch_size, lr=setting.lr, warmup=50
            ),
            seed=seed,
            keeping=CheckpointPolicy(checkpoint_minutes=5.0),
            validations=min(4, passes),
        )
        return on_core if self.execution is None else replace(on_core, execution=self.execution)

    def trained_references(self) -> dict[str, Train]:
        """Return the trainings of its references, on the other pool of pairs."""
        return {
            name: replace(self.train(model, passes, Setting(Loss(method="openclip"), lr)), split="reference")
            for name, (model, passes, lr) in self.references.items()
        }

    def tuning(self, methods: Iterable[str]) -> Iterator[Cell]:
        """Yield settings at the smallest budget, one seed each."""
        for method in methods:
            for setting in SETTINGS[method]:
                train = self.train(self.model, self.passes[0], setting)
                yield Cell(method, train, setting.name, _reference_of(setting, self.strong))

    def cell(
        self, tuned: Tuned, method: str, passes: int, seed: int, *, noise: float = 0.0, reference: str = ""
    ) -> Iterator[Cell]:
        """Yield a training of a tuned method, once it is tuned; under the strong reference if no other is named."""
        of = TWIN if method == SCHEDULED else method
        key = TunedKey(self.tuning_of(of), captions_label(self.data), of, _reference_of(SETTINGS[of][0], self.strong))
        if reference in TUNED_FOR:
            key = key._replace(study=TUNED_FOR[reference], reference=reference)
        found = tuned.get(key)
        if found is not None:
            if method == SCHEDULED:
                found = found._replace(loss=replace(found.loss, method="drrho", coefficient="scheduled"))
            train = self.train(self.model, passes, found, seed, noise)
            yield Cell(method, train, f"passes={passes}", _reference_of(found, reference or self.strong))

    def headline(self, methods: Iterable[str], seeds: Iterable[int], passes: Iterable[int]) -> Study:
        """Return the study of tuned methods at some budgets."""

        def cells(tuned: Tuned) -> Iterator[Cell]:
            for count, seed, method in product(passes, seeds, methods):
                yield from self.cell(tuned, method, count, seed)

        return cells

    def reference_quality(self, tuned: Tuned) -> Iterator[Cell]:
        """Yield the steered methods under weaker references, at two budgets."""
        weaker = [name for name in self.references if name != self.strong]
        steered = [method for method in MAIN if method != TWIN]
        for seed, passes, reference, method in product(FEWER_SEEDS, self.passes[:2], weaker, steered):
            yield from self.cell(tuned, method, passes, seed, reference=reference)

    def noise(self, tuned: Tuned) -> Iterator[Cell]:
        """Yield the same methods where a share of the training icons have each other's names."""
        for seed, share, method in product(FEWER_SEEDS, reversed(NOISE), MAIN):
            yield from self.cell(tuned, method, self.passes[0], seed, noise=share)

    def half(self, tuned: Tuned) -> Iterator[Cell]:
        """Yield the steered methods on half of the pairs, each seen twice as often as at the middle budget."""
        passes = self.passes[1]
        for seed, method in product(FEWER_SEEDS, ("drrho", DIVERGENCE)):
            for cell in self.cell(tuned, method, 2 * passes, seed):
                yield replace(cell, train=replace(cell.train, fraction=0.5))

    def studies(self) -> dict[str, Study]:
        """Return its studies by name, in the order in which they run; a training in several is run once."""
        smallest, larger = self.passes[:1], self.passes[1:]
        return {
            self.study("tuning"): lambda _: self.tuning(method for method in MAIN if method != SCHEDULED),
            self.study("headline"): self.headline(MAIN, SEEDS, smallest),
            self.study("tuning-more"): lambda _: self.tuning(MORE),
            self.study("budgets"): self.headline(MAIN, FEWER_SEEDS, larger),
            self.study("reference-quality"): self.reference_quality,
            self.study("noise"): self.noise,
            self.study("headline-more"): self.headline(MORE, SEEDS, smallest),
            self.study("budgets-more"): self.headline(_UNSTEERED, FEWER_SEEDS, larger),
            self.study("half"): self.half,
            self.study("tuning-rivals"): lambda _: self.tuning(RIVALS),
            self.study("rivals"): self.headline(RIVALS, FEWER_SEEDS, smallest),
        }


#: 159,000, 478,000 and 955,000 pairs seen.
CORE = Scale(
    name="icon",
    model="glyph-tiny",
    pixels=32,
    batch_size=128,
    passes=(2, 6, 12),
    references={
        "icons-weak": ("glyph-micro", 2, 2e-3),
        "icons-equal": ("glyph-tiny", 4, 2e-3),
        # Of 478,000 pairs seen, a model of glyph-small's size knows no more than the equal one.
        "icons-strong": ("glyph-tiny", 12, 1e-3),
    },
    strong="icons-strong",
)
#: 955,000, 3.2 and 10 million pairs seen by a model of 13.6 million parameters, which takes 75 times the operations of
#: the other's, of pictures with four times the pixels: a span of 4,700 times the computation with both.
GPU = Scale(
    name="gpu-icon",
    model="icon-large",
    pixels=64,
    batch_size=1024,
    passes=(12, 40, 126),
    references={
        "gpu-weak": ("icon-base", 12, 2e-3),
        "gpu-equal": ("icon-large", 12, 2e-3),
        "gpu-strong": ("icon-large", 40, 1e-3),
    },
    strong="gpu-strong",
    execution=Execution(device="cuda", precision="bfloat16"),
)
#: A reference whose towers have seen no icon: `icons.public_towers` makes them of two public models.
PUBLIC = "icons-public"
#: The same, of which the other pool of icons trains all layers, and not the heads alone, for one pass and not two: that
#: takes a core three times as long.
FINE_TUNED = "icons-fine-tuned"
#: References for which the steered method is tuned, and the studies that do it.
TUNED_FOR = {PUBLIC: "icon-tuning-public", FINE_TUNED: "icon-tuning-fine-tuned"}


def tuning_public(_: Tuned) -> Iterator[Cell]:
    """Yield the settings of the steered method under the public reference."""
    for setting in PUBLIC_SETTINGS:
        yield Cell("drrho", CORE.train(CORE.model, CORE.passes[0], setting), setting.name, PUBLIC)


def public(tuned: Tuned) -> Iterator[Cell]:
    """Yield the steered method under the public reference, for which it is tuned, at two budgets."""
    for passes, seeds in ((CORE.passes[1], FEWER_SEEDS), (CORE.passes[0], SEEDS)):
        for seed in seeds:
            yield from CORE.cell(tuned, "drrho", passes, seed, reference=PUBLIC)


def tuning_fine_tuned(_: Tuned) -> Iterator[Cell]:
    """Yield the same four settings under the fine-tuned reference as under the strong one."""
    for setting in SETTINGS["drrho"]:
        yield Cell("drrho", CORE.train(CORE.model, CORE.passes[0], setting), setting.name, FINE_TUNED)


def fine_tuned(tuned: Tuned) -> Iterator[Cell]:
    """Yield the steered method under the fine-tuned reference, for which it is tuned, at all budgets."""
    for passes, seed in product(CORE.passes, FEWER_SEEDS):
        yield from CORE.cell(tuned, "drrho", passes, seed, reference=FINE_TUNED)


def _reference_of(setting: Setting, reference: str) -> str:
    """Return the reference where a setting has a part for one."""
    return reference if setting.loss.needs_reference or setting.selection.is_on else ""


def _of(references: Mapping[str, Train]) -> Study:
    return lambda _: (reference_cell(name, train) for name, train in references.items())


_KEPT = CheckpointPolicy(checkpoint_minutes=5.0)
_LOCKED = replace(PRESETS["icon-public"], keeping=_KEPT)
REFERENCES = CORE.trained_references() | {
    PUBLIC: _LOCKED,
    FINE_TUNED: replace(
        _LOCKED, lock=(), unlocked_text_groups=None, optimization=replace(_LOCKED.optimization, epochs=1), validations=1
    ),
}
GPU_REFERENCES = GPU.trained_references()
STUDIES: dict[str, Study] = {
    **CORE.studies(),
    "icon-tuning-public": tuning_public,
    "icon-public": public,
    "icon-tuning-fine-tuned": tuning_fine_tuned,
    "icon-fine-tuned": fine_tuned,
    # Those that steer are trained before. Two need the towers of public models, so that they come last.
    "icon-references": _of(REFERENCES),
}
GPU_STUDIES: dict[str, Study] = {**GPU.studies(), "gpu-icon-references": _of(GPU_REFERENCES)}
TUNING_STUDIES = ("icon-tuning", "icon-tuning-more", "icon-tuning-rivals", *TUNED_FOR.values())
GPU_TUNING_STUDIES = tuple(GPU.study(name) for name in ("tuning", "tuning-more", "tuning-rivals"))
