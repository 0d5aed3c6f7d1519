"""Where steering paid in trainings of CLIP: every cell of the study's table that has a twin, and what its noise was."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.clip.glyphs.drawing import SWAPPED_SHARE
from experiments.clip.study.intervals import Interval, interval
from experiments.clip.study.results import Row
from experiments.clip.study.settings import TWIN
from experiments.clip.study.statistics import paired_difference
from paper_figures.study_results import FEWEST, RESULTS, TOP1, NotMeasured, Results, Seeds, paired

#: The share of mismatched pairs, by the table's name of the captions; of vague ones it is not known.
NOISE = {"clean": 0.0, "swapped": SWAPPED_SHARE}
STEERED, SELECTED, BOTH = "drrho", "jest", "jest-drrho"
_SHIPPED = "shipped"
#: Below this accuracy in percent, a few test pairs are all of it.
LEAST = 1.0


class Point(NamedTuple):
    """Trainings of equal captions, share of the pairs, model and budget.

    Attributes
    ----------
    seen : str
        Pairs that were trained on, to two digits.
    reference : str
        Its name in the study.
    reference_score : float
        Its own accuracy on the test pairs, in percent, as are all scores.
    twin, steered : dict
        Rows by seed.
    """

    captions: str
    fraction: str
    model: str
    seen: str
    reference: str
    reference_score: float
    twin: Seeds
    steered: Seeds

    @property
    def strength(self) -> float:
        """The reference's accuracy over the twin's."""
        return self.reference_score / self.mean(self.twin)

    @property
    def gain(self) -> Interval:
        """What steering adds to the accuracy, in points, seed by seed."""
        return paired_difference(*paired(self.steered, self.twin)).t

    @staticmethod
    def mean(trainings: Seeds) -> float:
        """Return the mean accuracy in percent."""
        return float(100 * np.mean([float(row[TOP1]) for row in trainings.values()]))


_Key = tuple[str, str, str, str]


def cells(rows: Iterable[Row]) -> dict[_Key, dict[tuple[str, str], Seeds]]:
    """Return trainings by captions, share, model and pairs seen; then by method and reference; then by seed.

    Trainings that tune, or try what lies past the edges of tuning, are left out. Of two settings of one method the one
    that the table has first counts.
    """
    found: dict[_Key, dict[tuple[str, str], Seeds]] = {}
    settings: dict[tuple[_Key, str, str], str] = {}
    for row in rows:
        if row["study"].startswith("tuning") or row["study"] in ("edges", "references"):
            continue
        seen = f"{float(row['samples_trained']):.2g}"
        key = row["captions"], row["fraction"], row["model"], seen
        reference = row["reference"] or (_SHIPPED if row["method"] == SELECTED else "")
        if settings.setdefault((key, row["method"], reference), row["setting"]) == row["setting"]:
            found.setdefault(key, {}).setdefault((row["method"], reference), {}).setdefault(int(row["seed"]), row)
    return found


def points(path: Path = RESULTS) -> list[Point]:
    """Return every cell in which a reference of known score steers, beside a twin that has learned something.

    Both have at least three seeds. Captions whose noise is not in `NOISE` are left out.

    Raises
    ------
    NotMeasured
        Where there is no such cell.
    """
    results, found = Results(path), []
    for (captions, fraction, model, seen), trainings in _measured(path).items():
        twin = trainings.get((TWIN, ""), {})
        for (method, reference), steered in trainings.items():
            if method != STEERED or captions not in NOISE or len(twin.keys() & steered.keys()) < FEWEST:
                continue
            with suppress(NotMeasured):
                score = 100 * float(results.reference(reference)[TOP1])
                found.append(Point(captions, fraction, model, seen, reference, score, twin, steered))
    found = [point for point in found if point.mean(point.twin) >= LEAST]
    if not found:
        raise NotMeasured("headline scaling fractions references reference-quality", "targets beside their twins")
    return sorted(found, key=lambda point: (NOISE[point.captions], point.strength))


def _measured(path: Path) -> dict[_Key, dict[tuple[str, str], Seeds]]:
    if not path.is_file():
        return {}
    with path.open() as file:
        return cells(csv.DictReader(file))


def point_table(found: list[Point]) -> str:
    """Return the points as Markdown."""
    lines = [
        "| captions | share | model | pairs seen | reference | accuracy over the twin's | twin | steered less twin |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for point in found:
        gain = f"{point.gain.mean:+.1f} [{point.gain.low:+.1f}, {point.gain.high:+.1f}]"
        seen = f"{float(point.seen):,.0f}"
        twin = f"{point.mean(point.twin):.1f}"
        lines.append(
            f"| {point.captions} | {point.fraction} | {point.model} | {seen} | {point.reference} "
            f"| {point.strength:.2f} | {twin} | {gain} |"
        )
    return "\n".join(lines)


def selection_table(path: Path = RESULTS) -> str:
    """Return accuracies of twin, steered, selected and both, where all four are measured, as Markdown."""
    lines = ["| captions | noise | twin | steered | selected (JEST) | both |", "|---|---|---|---|---|---|"]
    columns = ((TWIN, ""), (STEERED, _SHIPPED), (SELECTED, _SHIPPED), (BOTH, _SHIPPED))
    for (captions, fraction, *_), trainings in sorted(_measured(path).items()):
        if (
            captions not in NOISE
            or fraction != "1"
            or not all(len(trainings.get(own, {})) >= FEWEST for own in columns)
        ):
            continue
        shown = []
        for own in columns:
            scores = interval(100 * np.array([float(row[TOP1]) for row in trainings[own].values()]))
            shown.append(f"{scores.mean:.1f} [{scores.low:.1f}, {scores.high:.1f}]")
        lines.append(f"| {captions} | {100 * NOISE[captions]:.0f} % | {' | '.join(shown)} |")
    return "\n".join(lines)
