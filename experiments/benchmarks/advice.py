"""The advisor: fitted to the trainings of the studies, and held against those that were left out.

``python -m experiments.benchmarks.advice`` reads the committed rows of the studies on glyphs and on icons and what
``--measure`` has found of the references, and writes ``experiments/clip/reference/advice.json``, which `run.py advise`
reads, and ``results/advice.json`` and ``results/advice.md`` beside this file. ``--icons FILE`` names other rows of
icons.

``--measure NAME=FOLDER --score PERCENT`` measures a reference on the first training pairs of the data that ``--data``,
``--captions``, ``--pixels`` and ``--swapped`` name, and keeps the figures, with its own validation top-1, in
``results/advice_references.json``; nothing is fitted then.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from drrho.advice import (
    Advice,
    Advisor,
    Finished,
    Intervention,
    Knowledge,
    Prediction,
    knowledge,
    log_odds,
    with_least_unrecognized,
)
from experiments.benchmarks.measure import provenance, table
from experiments.clip.cli.options import Data
from experiments.clip.cli.sources import embedded_pairs
from experiments.clip.glyphs.source import catalog_of
from experiments.clip.io.files import write_json
from experiments.clip.models.clip import load_model
from experiments.clip.reference.advice import FITTED, Scale, sample_features, scale_by
from experiments.clip.study.cells import captions_label

FOLDER = Path(__file__).parent / "results"
STUDY = Path(__file__).parents[1] / "clip" / "study" / "results" / "study.csv"
ICONS = STUDY.with_name("icons.csv")
REFERENCES = FOLDER / "advice_references.json"
PAIRS = 4096
#: The reference of selections whose rows name none.
SHIPPED = "shipped"
_FEWEST_RANKED = 10  # trainings whose order says something
FEWEST = 3  # interventions of a situation in which a choice is counted
RESAMPLES = 1000
_OF_ICONS = captions_label(Data(kind="icons"))
_USUAL_SPREAD = 7e-4  # of the glyphs' scores, for rows without repetitions
_SMALL = 2e-3  # score from which on the variance over seeds is taken to be proportional to it

#: Options of trainings that the advisor says nothing of, where they are not the default.
_UNKNOWN = {"distill", "temperature-scheme", "normalizer", "self-reference", "more-references"}

Row = dict[str, str]


class Situation(NamedTuple):
    """What is given before a choice: data, captions, share of the pairs, model, thousands of pairs seen, reference."""

    captions: str
    fraction: str
    model: str
    thousands: int
    reference: str


class Cell(NamedTuple):
    """A finished training, its situation, and what the unsteered run was expected to reach: its validation score."""

    situation: Situation
    finished: Finished
    expected: float
    variance_ratio: float
    correlation: float


class _Tried(NamedTuple):
    """Trainings that differ in their seeds alone."""

    validation: float
    test: float
    seeds: int
    rows: list[Row]


def options_of(row: Row) -> dict[str, str]:
    """Return the options of a training that its row has in words, by name; others have their defaults."""
    words = shlex.split(row["options"])
    return {word[2:]: value for word, value in itertools.pairwise([*words, ""]) if word.startswith("--")}


def intervention_of(given: Mapping[str, str]) -> Intervention | None:
    """Return what a training's options use a reference for; None where the advisor knows nothing of it."""
    method, select = given.get("method", "drrho"), given.get("select", "all")
    coefficient = given.get("coefficient", "1.0")
    if method not in ("drrho", "openclip") or coefficient in ("adaptive", "scheduled"):
        return None
    if _UNKNOWN & given.keys() or given.get("divergence") == "cvar":
        return None
    chosen: dict[str, Any] = (
        {} if select == "all" else {"select": select, "candidates": int(given.get("candidates", 5))}
    )
    if method == "openclip":
        return Intervention(**chosen) if chosen else None
    divergence: Any = given.get("divergence", "kl")
    return Intervention(float(coefficient), float(given["temperature"]), divergence, **chosen)


def is_twin(given: Mapping[str, str]) -> bool:
    """Return whether a training is of FastCLIP v1: the steered objective without a reference."""
    return given["method"] == "fastclip" and not {"divergence", "select", *_UNKNOWN} & given.keys()


def _tried(rows: Sequence[Row]) -> _Tried:
    scores = [np.array([float(row[name]) for row in rows]) for name in ("validation_top1", "test_top1")]
    return _Tried(scores[0].mean(), scores[1].mean(), len(rows), list(rows))


def _best(by_rate: Mapping[Any, Sequence[Row]]) -> _Tried:
    """Return the setting of most seeds, where it has three, else the best by validation."""
    tried = [_tried(rows) for rows in by_rate.values()]
    many = [each for each in tried if each.seeds >= 3]
    return max(many or tried, key=lambda each: each.validation)


def _thousands(row: Row) -> int:
    """Return the thousands of pairs seen, to five: selections see as many as others but for uneven batches."""
    return 5 * round(float(row["samples_trained"]) / 5000)


def cells_of(rows: Sequence[Row], references: Mapping[str, Any]) -> list[Cell]:
    """Return the trainings that used a measured reference and have an unsteered twin of the same situation.

    The twin is FastCLIP v1 at the temperature and rate that were best on validation.
    """
    twins: dict[Any, dict[Any, list[Row]]] = defaultdict(lambda: defaultdict(list))
    used: dict[Any, dict[Any, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        given = options_of(row)
        where = (row["captions"], row["fraction"], row["model"], _thousands(row))
        tuned = (row["learning_rate"], given.get("temperature"))
        how = intervention_of(given)
        if how is not None:
            used[where, row["reference"] or SHIPPED, how][tuned].append(row)
        elif is_twin({"method": "drrho"} | given):
            twins[where][tuned].append(row)
    spread, known = _spread([*twins.values(), *used.values()]), known_of(references)
    scales = scales_of(references)
    found = []
    for ((captions, fraction, model, thousands), reference, how), by_rate in used.items():
        where = (captions, fraction, model, thousands)
        own_known = known.get(captions, {}).get(reference)
        if own_known is None or where not in twins:
            continue
        own, twin = _best(by_rate), _best(twins[where])
        level = scales[captions].level(twin.validation)
        error = math.sqrt(sum(spread * max(each.test, _SMALL) / each.seeds for each in (own, twin)))
        group = f"{reference}, {captions}"
        finished = Finished(group, how, own_known, level, _inner(twin.test), _inner(own.test), error)
        losses, excess, correlation = (
            float(own.rows[0][name] or math.nan)
            for name in ("variance_of_losses", "variance_of_excess", "correlation_with_reference")
        )
        found.append(
            Cell(Situation(*where, reference), finished, _inner(twin.validation), excess / losses, correlation)
        )
    return found


def _inner(share: float) -> float:
    return min(max(share, 1e-4), 1 - 1e-4)


def _spread(groups: Sequence[Mapping[Any, Sequence[Row]]]) -> float:
    """Return the variance over seeds relative to the score, pooled over settings of at least three seeds, if any."""
    relative = [
        float(np.var(scores, ddof=1) / max(scores.mean(), _SMALL))
        for by_rate in groups
        for rows in by_rate.values()
        if len(rows) >= 3 and (scores := np.array([float(row["test_top1"]) for row in rows])).size
    ]
    return float(np.mean(relative)) if relative else _USUAL_SPREAD


def known_of(references: Mapping[str, Any]) -> dict[str, dict[str, Knowledge]]:
    """Return what references know, by captions and name; the least unrecognized share counts for all."""
    found: dict[str, dict[str, Knowledge]] = defaultdict(dict)
    for place, known in references["known"].items():
        captions, _, name = place.partition("/")
        found[captions][name] = Knowledge(**known)
    return {captions: with_least_unrecognized(own) for captions, own in found.items()}


def scales_of(references: Mapping[str, Any]) -> dict[str, Scale]:
    """Return the scale of each kind of captions, by its references: their levels there against their own top-1."""
    scores = references["scores"]
    return {
        captions: scale_by([scores[name] for name in own], [each.level for each in own.values()])
        for captions, own in known_of(references).items()
    }


#: The verdict that is held against what was asked.
FIRST = "left out: reference and captions"
_LIMITS = """What this does not show. The predictors, the power .6 of the unrecognized share, the scale .7 of a lead and
the temperature that is best were chosen among some by the left-out groups of this table. Five references and four kinds
of captions are few, and selections were trained under the one that ships alone. At the budgets of the glyphs a probe of
2 % (55 steps at most) tells no more pairs apart than chance, so that the score of the unsteered run is given here; what
a probe predicts has not been held against longer runs. The score of the reference that ships is that on the test
split. The captions of icons are natural, so that the advisor of the line that leaves out captions has seen no icon."""


class Verdict(NamedTuple):
    """How predictions compare with measurements."""

    cells: int
    rank: tuple[float, float, float]
    regret: float
    largest_regret: float
    choices: int
    sign: tuple[int, int]
    worse: tuple[int, int]
    within: float
    error: float


def _rank(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return Spearman's rank correlation."""
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def judged(cells: Sequence[Cell], predicted: Sequence[Prediction], seed: int = 0) -> Verdict:
    """Hold predictions against measured gains.

    ``sign`` counts cells whose measured gain is beyond two standard errors, and for how many of them steering or not
    steering is said rightly; ``worse`` those among them in which steering cost points. The interval of the rank
    correlation is over resampled situations.
    """
    gains = np.array([cell.finished.gain for cell in cells])
    points = np.array([each.points for each in predicted])
    rank = _rank(points, gains)
    by_situation: dict[Situation, list[int]] = defaultdict(list)
    for number, cell in enumerate(cells):
        by_situation[cell.situation].append(number)
    rng, groups = np.random.default_rng(seed), list(by_situation.values())
    resampled = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([groups[k] for k in rng.integers(len(groups), size=len(groups))])
        resampled.append(_rank(points[rows], gains[rows]) if len(set(rows.tolist())) > 2 else rank)
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    regrets = []
    for rows in groups:
        if len(rows) >= FEWEST:
            best = Advice.ranked(predicted[k] for k in rows).recommended
            got = next((gains[k] for k in rows if predicted[k] is best), 0.0)
            regrets.append(max(0.0, float(gains[rows].max())) - float(got))
    sure = np.abs(gains) > 2 * 100 * np.array([cell.finished.error for cell in cells])
    right, worse = (points > 0) == (gains > 0), sure & (gains < 0)
    within = [each.low <= gain <= each.high for each, gain in zip(predicted, gains, strict=True)]
    return Verdict(
        len(cells),
        (rank, float(low), float(high)),
        float(np.mean(regrets)) if regrets else math.nan,
        float(np.max(regrets)) if regrets else math.nan,
        len(regrets),
        (int(right[sure].sum()), int(sure.sum())),
        (int(right[worse].sum()), int(worse.sum())),
        float(np.mean(within)),
        float(np.sqrt(np.mean((points - gains) ** 2))),
    )


def left_out(
    cells: Sequence[Cell], group: Callable[[Cell], str], odds: float = 1.0
) -> tuple[list[Cell], list[Prediction]]:
    """Predict each cell by an advisor, with its intervals, that was fitted to the other groups' cells.

    ``odds`` multiplies the odds of the score that the unsteered run is expected to reach. Cells whose kind of
    intervention no other group has are left out.
    """
    kept, predicted = [], []
    for own in dict.fromkeys(map(group, cells)):
        rest = [cell.finished for cell in cells if group(cell) != own]
        if len({each.group for each in rest}) < 2:
            continue
        advisor = Advisor.fitted(rest)
        kinds = {each.how.selects for each in rest}
        for cell in cells:
            if group(cell) == own and cell.finished.how.selects in kinds:
                kept.append(cell)
                predicted.append(predict(advisor, cell, odds))
    return kept, predicted


def predict(advisor: Advisor, cell: Cell, odds: float = 1.0) -> Prediction:
    """Predict a cell from what is known before it is trained."""
    own = cell.finished
    expected = odds * cell.expected / (1 + (odds - 1) * cell.expected)
    return advisor.predict(cell.situation.reference, own.how, own.reference, expected, own.level)


def read_rows(path: Path) -> list[Row]:
    """Return the trainings of a table of results, references left out."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if not row["study"].endswith("references") or row["reference"]]


def single_predictors(cells: Sequence[Cell]) -> dict[str, float]:
    """Return the rank correlation of gains with one number each, over cells that steer and do not select."""
    own = [cell for cell in cells if not cell.finished.how.selects]
    values: dict[str, list[float]] = {
        "variance of the excess over that of the losses, at the end": [cell.variance_ratio for cell in own],
        "correlation of the losses with the reference's, at the end": [cell.correlation for cell in own],
        "accuracy of the reference among 128": [cell.finished.reference.accuracy for cell in own],
        "unrecognized share": [cell.finished.reference.unrecognized for cell in own],
        "level of the reference": [cell.finished.reference.level for cell in own],
        "level of the reference less that of the twin": [
            cell.finished.reference.level - cell.finished.level for cell in own
        ],
    }
    gains = [cell.finished.gain for cell in own]
    return {name: _rank(np.array(each), np.array(gains)) for name, each in values.items()}


def repeatable(cells: Sequence[Cell], seed: int = 0) -> float:
    """Return the rank correlation of the gains with the same plus errors of their size: what no prediction surpasses.

    Measured gains have errors already, so that this is somewhat too high.
    """
    gains, errors = np.array([(cell.finished.gain, 100 * cell.finished.error) for cell in cells]).T
    draws = np.random.default_rng(seed).normal(size=(200, len(cells))) * errors
    return float(np.mean([_rank(gains, gains + draw) for draw in draws]))


#: What is left out together: a reference with captions, all of the captions, all of the reference.
GROUPS: dict[str, Callable[[Cell], str]] = {
    "reference and captions": lambda cell: cell.finished.group,
    "captions": lambda cell: cell.situation.captions,
    "reference": lambda cell: cell.situation.reference,
}


def verdicts(cells: Sequence[Cell]) -> dict[str, Verdict]:
    """Return the verdicts on what is left out: in all, of steering alone, of icons, and on wrong expectations."""
    found = {}
    for name, group in GROUPS.items():
        kept, predicted = left_out(cells, group)
        parts = {
            "": range(len(kept)),
            "; without selections": [k for k, cell in enumerate(kept) if not cell.finished.how.selects],
            "; the icons of these": [k for k, cell in enumerate(kept) if cell.situation.captions == _OF_ICONS],
        }
        for part, own in parts.items():
            if part == "" or 0 < len(own) < len(kept):
                found[f"left out: {name}{part}"] = judged([kept[k] for k in own], [predicted[k] for k in own])
    for odds in (0.5, 2.0):
        kept, predicted = left_out(cells, GROUPS["reference and captions"], odds)
        found[f"{FIRST}; expected odds {odds:g} times the true ones"] = judged(kept, predicted)
    return found


def reached(verdict: Verdict) -> str:
    """Return the line that says what was asked and reached."""
    right, worse = verdict.worse
    met = {
        "the rank correlation": verdict.rank[0] >= 0.8,
        "the regret": verdict.regret <= 1,
        "the share of losses foreseen": right >= 0.9 * worse,
    }
    return (
        "Reached, of left-out references and captions: "
        + "; ".join(f"{name} {'yes' if is_met else 'NO'}" for name, is_met in met.items())
        + "."
    )


def page(record: Mapping[str, Any]) -> str:
    """Return the tables of a record."""
    rows = []
    for name, own in record["verdicts"].items():
        verdict = Verdict(**own)
        rank, low, high = verdict.rank
        rows.append(
            {
                "trainings": name,
                "n": verdict.cells,
                "rank correlation (95 %)": f"{rank:.2f} ({low:.2f} to {high:.2f})"
                if verdict.cells >= _FEWEST_RANKED
                else "too few",
                "regret, points: mean, largest": "{:.1f}, {:.1f} of {}".format(*verdict[2:5]),
                "gain or loss rightly said": "{} of {}".format(*verdict.sign),
                "losses foreseen": "{} of {}".format(*verdict.worse),
                "within the interval": f"{100 * verdict.within:.0f} %",
            }
        )
    alone = [{"one number alone": name, "rank correlation": f"{x:.2f}"} for name, x in record["alone"].items()]
    weights = [{"predictor": name, "change in log odds": f"{x:.2f}"} for name, x in record["weights"].items()]
    known = [
        {"captions / reference": where, "told apart of 128, %": f"{100 * own['accuracy']:.1f}"}
        | {"unrecognized, %": f"{100 * own['unrecognized']:.1f}", "level": f"{Knowledge(**own).level:.2f}"}
        for where, own in record["known"].items()
    ]
    made = record["made"]
    return "\n\n".join(
        [
            "# The advisor",
            f"`{made['command']}`, {made['date']}. Gains are in points of naming top-1 on the test split over FastCLIP "
            "v1, tuned, at as many pairs trained on. The advisor knows a reference's features of 4,096 training pairs, "
            "the validation top-1 of the unsteered run, which a user has to expect, and the references' own.",
            "Asked: a rank correlation of .8, a regret of 1 point, 90 % of losses foreseen. Regret is over situations "
            f"with at least {FEWEST} interventions; gains or losses count beyond two standard errors; intervals of the "
            "correlation are over resampled situations. Measured again with other seeds, gains would correlate with "
            f"themselves at {record['repeatable']:.2f}.",
            table(rows),
            reached(Verdict(**record["verdicts"][FIRST])),
            _LIMITS,
            "The same trainings, steering alone: a number that says how gains are ordered would be far from 0.",
            table(alone),
            "What is fitted, to all of them:",
            table(weights),
            "What the references know of the training pairs:",
            table(known),
        ]
    )


def measured(name: str, folder: Path, data: Data, captions: str, score: float) -> dict[str, Any]:
    """Return the record of references with what one knows of the first training pairs of some data."""
    stored = json.loads(REFERENCES.read_text()) if REFERENCES.exists() else {"known": {}, "scores": {}}
    manifest = embedded_pairs(data.kind).prepare(data)
    catalog = catalog_of(manifest, ("train",), data.cache / f"catalog-{manifest.fingerprint[:12]}")
    clip = load_model(folder)
    found = knowledge(*sample_features(clip, catalog, range(min(PAIRS, len(catalog)))))
    stored["known"][f"{captions}/{name}"] = found._asdict()
    stored["scores"][name] = score
    return stored


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, hold against what was left out, and write; or measure a reference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--icons", type=Path, default=ICONS, help="results of the study of icons")
    parser.add_argument("--measure", metavar="NAME=FOLDER", help="a reference to measure instead")
    parser.add_argument("--score", type=float, help="its own validation top-1, in percent")
    parser.add_argument("--data", choices=("glyphs", "icons"), default="glyphs", help="what it is measured on")
    parser.add_argument("--captions", choices=("clean", "vague", "swapped"), default="clean", help="of the glyphs")
    parser.add_argument("--pixels", type=int, default=64, help="width of the icons")
    parser.add_argument("--swapped", type=float, default=0.0, help="share of the icons' names that are exchanged")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="folder of the data")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the tables")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.measure is not None:
        name, _, folder = given.measure.partition("=")
        if not folder or given.score is None:
            parser.error("--measure takes NAME=FOLDER, and --score the reference's own validation top-1 in percent")
        icons = {"pixels": given.pixels, "swapped": given.swapped} if given.data == "icons" else {}
        data = Data(given.captions if given.data == "glyphs" else "swapped", "full", given.cache, given.data, **icons)
        write_json(REFERENCES, measured(name, Path(folder), data, captions_label(data), given.score / 100))
        return 0
    references = json.loads(REFERENCES.read_text())
    cells = [cell for path in (STUDY, given.icons) for cell in cells_of(read_rows(path), references)]
    advisor = Advisor.fitted([cell.finished for cell in cells])
    made = provenance("python -m experiments.benchmarks.advice" + (" --icons FILE" if given.icons != ICONS else ""))
    gaps = [cell.finished.reference.level - cell.finished.level for cell in cells if cell.finished.how.selects]
    scale = scales_of(references)["clean"]
    fitted = {
        "weights": dict(advisor.weights),
        "half_widths": dict(advisor.half_widths),
        "most_unrecognized": advisor.most_unrecognized,
        "least_level": advisor.least_level,
        "curve": course(cells, scale, references["probe"]),
        **scale._asdict(),
        "select_level": min(gaps),
        "made": {"trainings": len(cells), "rows": [STUDY.name, given.icons.name], **made},
    }
    record = {
        "made": made,
        "verdicts": {name: own._asdict() for name, own in verdicts(cells).items()},
        "alone": single_predictors(cells),
        "repeatable": repeatable(cells),
        "weights": fitted["weights"],
        "known": references["known"],
        "trainings": [
            {**cell.situation._asdict(), **cell.finished.how._asdict(), "measured": round(cell.finished.gain, 2)}
            | {"error": round(100 * cell.finished.error, 2), "predicted": round(each.points, 2)}
            for kept in [left_out(cells, GROUPS["reference and captions"])]
            for cell, each in zip(*kept, strict=True)
        ],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "advice.json", record)
    (given.out / "advice.md").write_text(page(json.loads(json.dumps(record))) + "\n")
    if given.out == FOLDER:
        write_json(FITTED, fitted)
    print(page(record))
    return 0


def course(cells: Sequence[Cell], scale: Scale, probe: Mapping[str, float]) -> list[tuple[float, float]]:
    """Return the course of the unsteered glyph-tiny on all clean pairs, from a probe on: pairs seen and its level."""
    points = {probe["seen"]: log_odds(probe["hits"] / probe["scored"])} | {
        1000.0 * cell.situation.thousands: scale.level(cell.expected)
        for cell in cells
        if cell.situation[:3] == ("clean", "1", "glyph-tiny")
    }
    return sorted(points.items())


if __name__ == "__main__":
    sys.exit(main())
