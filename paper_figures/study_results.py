"""The study's committed results as figures and claims read them: seed by seed, in percent points."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.clip.study.grid import FEWER_SEEDS, FRACTIONS, LEVELS, MAIN, Tuned
from experiments.clip.study.intervals import half_width
from experiments.clip.study.results import Row, read_curves, study_rows
from experiments.clip.study.statistics import PowerLaw, Rule, power_law_fit
from experiments.clip.study.tuned import read_tuned

FOLDER = Path(__file__).parent / "results"
RESULTS = Path(__file__).parents[1] / "experiments" / "clip" / "study" / "results" / "study.csv"
_PROGRAM = "python experiments/clip/run.py study"
COMMAND = f"{_PROGRAM} --only"  # of studies on glyphs
_GRID: dict[str, str] = {"icon": " --data icons", "gpu": " --data icons --large"}  # by how a study's name begins
FEWEST = len(FEWER_SEEDS)  # seeds, of all that is compared
TOP1 = "test_top1"

ALL_FRACTIONS = (*FRACTIONS, 1.0)

Array = NDArray[Any]
Seeds = dict[int, Row]

#: What figures and tables call the methods.
NAMES = {
    "openclip": "OpenCLIP",
    "siglip": "SigLIP",
    "fastclip-v1": "FastCLIP v1",
    "fastclip-v3": "FastCLIP v3",
    "fastclip-chi-square": "FastCLIP, chi-square",
    "jest": "JEST",
    "jest-top-k": "JEST top-k",
    "rho-top-k": "RHO top-k",
    "distillation": "distillation",
    "drrho": "DRRho-CLIP",
    "drrho-distillation": "DRRho-CLIP + distillation",
    "drrho-learned": "DRRho-CLIP, learned temperature",
    "drrho-c": "DRRho-CLIP, coefficient c",
    "drrho-adaptive": "DRRho-CLIP, adaptive c",
    "drrho-scheduled": "DRRho-CLIP, scheduled c",
    "drrho-chi-square": "DRRho-CLIP, chi-square",
    "drrho-cvar": "DRRho-CLIP, CVaR",
    "jest-drrho": "JEST + DRRho-CLIP",
    "two-level": "two-level DRRho",
    "gist": "GIST",
    "neuclip": "NeuCLIP",
    "drrho-neuclip": "NeuCLIP, steered",
    "drrho-self": "DRRho-CLIP, its own average as reference",
    "aced": "ACED",
}
UNSTEERED = ("openclip", "siglip", "fastclip-v1", "fastclip-v3", "fastclip-chi-square")
OURS = (
    *("drrho-learned", "drrho-c", "drrho-adaptive", "drrho-chi-square", "drrho-cvar", "jest-drrho", "two-level"),
    "drrho-distillation",
)
#: All that the reference has a part in.
STEERED = ("drrho", *OURS, "jest", "jest-top-k", "rho-top-k", "distillation")
#: The references by the names that the study gives them, from the weakest.
REFERENCES = {"weak": "weak (glyph-micro)", "equal": "equal (glyph-tiny)", "shipped": "strong (glyph-base)"}


class NotMeasured(Exception):
    """Results that a study, or several of one grid, has not yet; the message names the command that measures them."""

    def __init__(self, study: str, what: str) -> None:
        grid = _GRID.get(study.partition("-")[0], "")
        super().__init__(f"not measured yet: {what}; run {_PROGRAM}{grid} --only {study}")


class Curve(NamedTuple):
    """Means over seeds along training, and the ends of their 95 % intervals (Student's t)."""

    samples: Array
    mean: Array
    low: Array
    high: Array


class Results:
    """Finished trainings of a table of results.

    All functions that return trainings return them by seed; those of fewer than three seeds count as not there.
    """

    def __init__(self, path: Path = RESULTS) -> None:
        self.path = path
        self._studies: dict[str, list[Row]] = {}
        self._power_laws: dict[tuple[bytes, bytes, Rule], PowerLaw] = {}

    @cached_property
    def tuned(self) -> Tuned:
        """The settings that tuning found best, as the file beside the table says."""
        return read_tuned(self.path)

    def study(self, name: str) -> list[Row]:
        """Return a study's rows."""
        if name not in self._studies:
            self._studies[name] = study_rows(name, self.path, self.tuned)
        return self._studies[name]

    def find(self, study: str, **labels: str) -> Seeds:
        """Return the trainings of these labels, by seed; nothing where they are fewer than three."""
        found = {int(row["seed"]): row for row in self.study(study) if all(row[k] == v for k, v in labels.items())}
        return found if len(found) >= FEWEST else {}

    def need(self, study: str, **labels: str) -> Seeds:
        """Return the same, or raise `NotMeasured`."""
        if found := self.find(study, **labels):
            return found
        raise NotMeasured(study, ", ".join(labels.values()))

    def one(self, study: str, **labels: str) -> Row:
        """Return the training of these labels, or raise `NotMeasured`."""
        for row in self.study(study):
            if all(row[key] == value for key, value in labels.items()):
                return row
        raise NotMeasured(study, ", ".join(labels.values()))

    def method(self, method: str, captions: str) -> Seeds:
        """Return a tuned method on all pairs, under the shipped reference if it has one."""
        return self.need(headline_of(method), method=method, captions=captions)

    def scored(self, method: str, captions: str) -> Seeds:
        """Return a tuned selection that scored as many pairs as the others train on."""
        return self.need("scored", method=method, captions=captions)

    def share(self, method: str, captions: str, fraction: float) -> Seeds:
        """Return a tuned method on a share of the pairs, as many seen as of all."""
        if fraction == 1:
            return self.method(method, captions)
        return self.need("fractions", method=method, captions=captions, fraction=f"{fraction:g}")

    def steered(self, reference: str, captions: str) -> Seeds:
        """Return DRRho-CLIP under a reference of `REFERENCES`: as published, or, where the study trained it, as tuned.

        A weaker reference may have been tuned to a smaller coefficient than the published 1.
        """
        if reference == "shipped":
            return self.method("drrho", captions)
        return self.need("reference-quality", method="drrho", captions=captions, reference=reference)

    def near(self, method: str, captions: str) -> Seeds:
        """Return the twin, or a steered method under the reference `NEAR`, which is little weaker than the twin."""
        return self.need("weak-to-strong", method=method, captions=captions)

    def reference(self, name: str) -> Row:
        """Return the scores of a reference itself, under the names of the study's columns."""
        if name == "shipped":
            scores = json.loads((FOLDER / "reference.json").read_text())["scores"]
            return {key: str(value) for key, value in scores.items()}
        return self.one("references", setting=name)

    def scaling(self, methods: Sequence[str]) -> tuple[dict[str, Array], dict[str, Array], list[tuple[str, str]]]:
        """Return operations [k] in GFLOP and errors [k, seeds] of each method, at the levels that all have measured."""
        found: dict[tuple[str, str], dict[str, Seeds]] = {}
        for model, budgets in LEVELS.items():
            for budget in budgets:
                labels = {"model": model, "setting": f"epochs={budget}"}
                cells = {method: self.find("scaling", method=method, **labels) for method in methods}
                if all(cells.values()):
                    found[model, labels["setting"]] = cells
        if len(found) < 2:
            raise NotMeasured("scaling", f"two levels of compute of {' and '.join(methods)}")
        seeds = sorted(set.intersection(*(set(cell) for cells in found.values() for cell in cells.values())))
        compute = {m: np.array([float(cells[m][seeds[0]]["gflops"]) for cells in found.values()]) for m in methods}
        errors = {
            m: np.array([[1 - float(cells[m][seed][TOP1]) for seed in seeds] for cells in found.values()])
            for m in methods
        }
        return compute, errors, list(found)

    def power_law(self, compute: Array, errors: Array, rule: Rule) -> PowerLaw:
        """Return the power law of errors [k, seeds] against compute [k]; claims and figures share one bootstrap."""
        key = compute.tobytes(), errors.tobytes(), rule
        if key not in self._power_laws:
            self._power_laws[key] = power_law_fit(compute, errors, rule)
        return self._power_laws[key]

    @cached_property
    def _curves(self) -> dict[str, list[Row]]:
        return read_curves(self.path)

    def curve(self, trainings: Seeds, *fields: str, percent: bool = False) -> list[Curve]:
        """Return what the validations of these trainings say, averaged over seeds."""
        lines = [self._curves[row["hash"]] for row in trainings.values()]
        samples = np.array([float(line["samples_trained"]) for line in lines[0]])
        scale = 100 if percent else 1
        curves = []
        for field in fields:
            values = scale * np.array([[float(line[field]) for line in own] for own in lines])
            half = half_width(values)
            mean = values.mean(0)
            curves.append(Curve(samples, mean, mean - half, mean + half))
        return curves


def headline_of(method: str) -> str:
    """Return the study that compares a method with the others."""
    return "headline" if method in MAIN else "headline-more"


def values(trainings: Mapping[int, Row], field: str = TOP1, percent: bool = True) -> Array:
    """Return a score of each seed, in percent points."""
    return (100 if percent else 1) * np.array([float(trainings[seed][field]) for seed in sorted(trainings)])


def paired(a: Seeds, b: Seeds, field: str = TOP1) -> tuple[Array, Array]:
    """Return a score of both, in percent points, at the seeds that both have."""
    common = a.keys() & b.keys()
    return values({seed: a[seed] for seed in common}, field), values({seed: b[seed] for seed in common}, field)


def published() -> dict[str, Any]:
    """Return the published results."""
    return json.loads((FOLDER / "published.json").read_text())
