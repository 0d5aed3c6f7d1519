"""Draw the study on icons: methods at one budget, budgets, and references of three qualities, at either scale."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.clip.study.grid import NEAR
from experiments.clip.study.icon_grid import (
    CORE,
    FINE_TUNED,
    GPU,
    GPU_STUDIES,
    MAIN,
    MORE,
    PUBLIC,
    RIVALS,
    STUDIES,
    Scale,
)
from experiments.clip.study.intervals import interval
from experiments.clip.study.options import RESULTS, TABLES
from experiments.clip.study.results import Row
from experiments.clip.study.settings import DIVERGENCE, TWIN
from paper_figures.study_results import (
    NAMES,
    UNSTEERED,
    Array,
    NotMeasured,
    Results,
    Seeds,
    headline_of,
    paired,
    values,
)
from paper_figures.style import BLUE, COLUMN, GRAY, GREEN, HERE, ORANGE, PAGE, VERMILION, panel, program, save, styled

TABLE, LARGE = (HERE.parent / RESULTS / TABLES[grid] for grid in ("icons", "icons-large"))
COLORS = dict(zip(MAIN, (ORANGE, VERMILION, BLUE, GREEN), strict=True))
_NATURAL = {"captions": "natural"}
#: References made of public models, the studies that steer by them, and what the claims call them.
_PUBLIC = {PUBLIC: ("public", "the public reference"), FINE_TUNED: ("fine-tuned", "the public reference, fine-tuned")}
PAGE_OF_ICONS = HERE.parent / "experiments" / "clip" / "icons" / "README.md"
BEGIN, END = "<!-- study: written by paper_figures/icons.py -->", "<!-- end of study -->"


def scale_of(results: Results) -> Scale:
    """Return the scale of a table; raise `NotMeasured` if it has nothing of either."""
    for scale in (CORE, GPU):
        if results.study(scale.study("headline")):
            return scale
    raise NotMeasured(CORE.study("headline"), "three seeds of a method on icons")


def draw_methods(axes: Axes, results: Results, scale: Scale) -> bool:
    """Draw every method's accuracy at the budget of the headline; raise `NotMeasured` if none is there."""
    rows = []
    for study, methods in (("headline", MAIN), ("headline-more", MORE), ("rivals", RIVALS)):
        for method in methods:
            if found := results.find(scale.study(study), method=method, **_NATURAL):
                rows.append((method, interval(values(found))))
    if not rows:
        raise NotMeasured(scale.study("headline"), "three seeds of a method on icons")
    rows.sort(key=lambda row: row[1].mean)
    for place, (method, found) in enumerate(rows):
        color = GRAY if method in (*UNSTEERED, "neuclip") else BLUE
        axes.errorbar(
            found.mean, place, xerr=[[found.mean - found.low], [found.high - found.mean]], fmt="o", color=color
        )
    axes.set_yticks(range(len(rows)), [NAMES[method] for method, _ in rows])
    axes.set(xlabel="naming top-1 of test icons, %", ylim=(-0.6, len(rows) - 0.4))
    return True


def draw_budgets(axes: Axes, results: Results, scale: Scale) -> bool:
    """Draw the main methods' accuracy against the pairs seen, and return whether there are two budgets."""
    drawn = False
    for method in MAIN:
        points = []
        for passes in scale.passes:
            if found := _at(results, scale, method, passes):
                seen = float(next(iter(found.values()))["samples_trained"])
                points.append((seen, interval(values(found))))
        if len(points) > 1:
            drawn = True
            seen, means = [each for each, _ in points], [each.mean for _, each in points]
            errors = [[each.mean - each.low for _, each in points], [each.high - each.mean for _, each in points]]
            axes.errorbar(seen, means, errors, fmt="o-", color=COLORS[method], capsize=2, label=NAMES[method])
    axes.set(xscale="log", xlabel="pairs seen", ylabel="naming top-1, %")
    budgets = [seen for passes in scale.passes if (seen := _seen(results, scale, passes))]
    axes.set_xticks(budgets, [f"{seen / 1000:,.0f}k" for seen in budgets])
    axes.minorticks_off()
    if drawn:
        low, high = axes.get_ylim()
        axes.set_ylim(low, low + 1.6 * (high - low))  # the legend is above the lines
        axes.legend(loc="upper left")
    return drawn


def _own_score(results: Results, scale: Scale, reference: str) -> float | None:
    """Return what a reference itself has, if it is measured."""
    rows = [row for row in results.study(scale.study("references")) if row["setting"] == reference]
    return 100 * float(rows[0]["test_top1"]) if rows else None


def draw_references(axes: Axes, results: Results, scale: Scale) -> bool:
    """Draw the steered methods' accuracy against their reference's; return whether two references are there.

    Those that were trained on icons are joined by a line; crosses are those of public models.
    """
    of_public = {name: scale.study(study) for name, (study, _) in _PUBLIC.items()} if scale is CORE else {}
    drawn = False
    for method in MAIN:
        if method == TWIN:
            if found := results.find(scale.study("headline"), method=TWIN, **_NATURAL):
                axes.axhline(values(found).mean(), color=COLORS[TWIN], linestyle=":", label=NAMES[TWIN])
            continue
        studies = {name: scale.study("reference-quality") for name in scale.references}
        studies[scale.strong] = scale.study("headline")
        points = _against_reference(results, scale, method, studies)
        style = {"color": COLORS[method], "capsize": 2}
        if len(points) > 1:
            drawn = True
            axes.errorbar(*points.T, fmt="o-", label=NAMES[method], **style)
            if len(points := _against_reference(results, scale, method, of_public)):
                axes.errorbar(*points.T, fmt="x", **style)
    axes.set(xlabel="the reference's own top-1, %", ylabel="the target's, %")
    return drawn


def _against_reference(results: Results, scale: Scale, method: str, studies: Mapping[str, str]) -> Array:
    """Return the references' own scores, a method's under them, and half-widths of its intervals, ``[points, 3]``."""
    points = []
    for reference, study in studies.items():
        labels = {"method": method, "reference": reference, "setting": f"passes={scale.passes[0]}", **_NATURAL}
        found, own = results.find(study, **labels), _own_score(results, scale, reference)
        if len(found) > 1 and own is not None:
            mean, _, high = interval(values(found))
            points.append((own, mean, high - mean))
    return np.array(points)


def draw(results: Results) -> Figure:
    """Return the figure: a panel for each part that is measured."""
    parts = ((draw_methods, "methods"), (draw_budgets, "budgets"), (draw_references, "references"))
    scale = scale_of(results)
    measured = [part for part in parts if part[0](Figure().subplots(), results, scale)]
    figure = Figure(figsize=(PAGE if len(measured) > 1 else COLUMN, 2.5), layout="constrained")
    axes = figure.subplots(1, len(measured), squeeze=False)[0]
    for letter, (part, title), one in zip("abc", measured, axes, strict=False):
        part(one, results, scale)
        panel(one, letter, title)
    return figure


def table(results: Results) -> str:
    """Return the accuracies as a Markdown table: a line for each method at each budget under each reference."""
    scale = scale_of(results)
    columns = ("method", "reference", "pairs seen", "seeds", "naming top-1, %", "above the twin, points")
    columns += ("above its reference, points",)
    lines = [columns, ("---",) * len(columns)]
    rows = {name: results.study(name) for name in (STUDIES if scale is CORE else GPU_STUDIES) if "tuning" not in name}
    twins = [row for own in rows.values() for row in own if row["method"] == TWIN and row["fraction"] == "1"]
    for study, own in rows.items():
        for labels in dict.fromkeys(map(_labels_of, own)):
            trainings = {int(row["seed"]): row for row in own if _labels_of(row) == labels}
            name = NAMES[labels.method] + (f", {labels.captions}" if labels.captions != "natural" else "")
            name += f" ({labels.setting})" if study == scale.study("references") else ""
            name += "" if labels.fraction == "1" else f", on {100 * float(labels.fraction):g} % of the pairs"
            seen = float(trainings[min(trainings)]["samples_trained"])
            twin = {int(row["seed"]): row for row in twins if _is_twin(row, labels, seen)}
            found = interval(values(trainings))
            spread = f" [{found.low:.2f}, {found.high:.2f}]" if len(trainings) > 1 else ""
            gain = "" if labels.method == TWIN else _gain(trainings, twin)
            score = _own_score(results, scale, labels.reference)
            above = "" if score is None or len(trainings) < 2 else _with_limits(*interval(values(trainings) - score))
            line = (name, labels.reference, f"{seen:,.0f}", str(len(trainings)), f"{found.mean:.2f}{spread}", gain)
            lines.append((*line, above))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def claims(glyphs: Results, icons: Results) -> str:
    """Return the main claims as a Markdown table with a column for each data set and budget."""
    scale = scale_of(icons)
    columns = [_Column("glyphs, clean captions", _on_glyphs(glyphs))]
    for passes in scale.passes:
        if seen := _seen(icons, scale, passes):
            columns.append(_Column(f"icons, {seen:,.0f} pairs seen", _on_icons(icons, scale, passes)))
    lines = [("claim, points of naming top-1", *(each.title for each in columns)), ("---",) * (len(columns) + 1)]
    lines += [(claim, *(each.cells[claim] for each in columns)) for claim in columns[0].cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class _Column(NamedTuple):
    title: str
    cells: dict[str, str]


_STEERED = {"drrho": "DRRho-CLIP", DIVERGENCE: "DRRho-CLIP, chi-square,"}
_WITHOUT = {TWIN: "its twin without reference, FastCLIP v1", "openclip": "OpenCLIP"}


def _cells(
    find: Callable[[str], Seeds], above_reference: Callable[[str], str], under_public: Callable[[str], _UnderPublic]
) -> dict[str, str]:
    """Return what is measured of each claim, given a method's trainings and what it has above its reference."""
    found: dict[str, str] = {}
    for method, name in _STEERED.items():
        for other, words in _WITHOUT.items():
            ours, theirs = paired(find(method), find(other))
            measured = _with_limits(*interval(ours - theirs)) + f", {len(ours)} seeds" if len(ours) > 1 else _MISSING
            found[f"{name} above {words}"] = measured
        found[f"{name} above its reference"] = above_reference(method)
    for reference, (_, words) in _PUBLIC.items():
        public, above = f"DRRho-CLIP, under {words}, above", under_public(reference)
        found |= {f"{public} its twin": above.above_twin, f"{public} that reference": above.above_reference}
    return found


class _UnderPublic(NamedTuple):
    """What the steered method has above its twin, and above a reference of public models."""

    above_twin: str
    above_reference: str


_MISSING, _NONE = "not measured yet", "no such reference"


def _on_glyphs(results: Results) -> dict[str, str]:
    """Return the claims at the headline's budget, and the reference's where it is little weaker than the twin."""

    def above(method: str) -> str:
        found = results.find("weak-to-strong", method=method, captions="clean")
        if not found:
            return _MISSING
        score = 100 * float(results.reference(NEAR["clean"])["test_top1"])
        return f"{_with_limits(*interval(values(found) - score))}, {len(found)} seeds of 3 times as many pairs"

    def find(method: str) -> Seeds:
        return results.find(headline_of(method), method=method, captions="clean")

    return _cells(find, above, lambda reference: _UnderPublic(_NONE, _NONE))


def _on_icons(results: Results, scale: Scale, passes: int) -> dict[str, str]:
    def above(method: str) -> str:
        found, score = find(method), _own_score(results, scale, scale.strong)
        if not found or score is None:
            return _MISSING
        return f"{_with_limits(*interval(values(found) - score))}, {len(found)} seeds"

    def find(method: str) -> Seeds:
        return _at(results, scale, method, passes)

    def under_public(reference: str) -> _UnderPublic:
        if scale is not CORE:
            return _UnderPublic(_NONE, _NONE)
        study = scale.study(_PUBLIC[reference][0])
        found = results.find(study, method="drrho", setting=f"passes={passes}", **_NATURAL)
        score, (ours, twin) = _own_score(results, scale, reference), paired(found, find(TWIN))
        if len(ours) < 2 or score is None:
            return _UnderPublic(_MISSING, _MISSING)
        seeds = f", {len(ours)} seeds"
        return _UnderPublic(*(_with_limits(*interval(ours - other)) + seeds for other in (twin, score)))

    return _cells(find, above, under_public)


def _at(results: Results, scale: Scale, method: str, passes: int) -> Seeds:
    """Return a method's trainings at a budget, under the strong reference if it has one."""
    study = scale.study(("headline" if passes == scale.passes[0] else "budgets") + "-more" * (method in MORE))
    return results.find(study, method=method, setting=f"passes={passes}", **_NATURAL)


def _seen(results: Results, scale: Scale, passes: int) -> float | None:
    """Return how many pairs a budget is, where the twin is measured there."""
    found = _at(results, scale, TWIN, passes)
    return float(next(iter(found.values()))["samples_trained"]) if found else None


class _Labels(NamedTuple):
    method: str
    reference: str
    captions: str
    setting: str
    fraction: str


def _labels_of(row: Row) -> _Labels:
    return _Labels(*(row[key] for key in _Labels._fields))


def _is_twin(row: Row, labels: _Labels, seen: float) -> bool:
    """Return whether a row of the twin saw such captions, and as many pairs but for rounding a share of them."""
    return row["captions"] == labels.captions and math.isclose(float(row["samples_trained"]), seen, rel_tol=1e-3)


def _gain(trainings: Seeds, twin: Seeds) -> str:
    """Return the mean difference from the twin of the same seeds, with its interval, and the ratio of the means."""
    ours, theirs = paired(trainings, twin)
    if len(ours) < 2:
        return ""
    mean, low, high = interval(ours - theirs)
    return f"{_with_limits(mean, low, high)}, {ours.mean() / theirs.mean():.1f} times"


def _with_limits(mean: float, low: float, high: float) -> str:
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def main() -> int:
    """Draw the figures, and write the tables into the page of the icons where they are committed."""
    status = program("icons", draw, TABLE)
    if status == 0:
        text = PAGE_OF_ICONS.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        parts = [_tables(TABLE)]
        if LARGE.exists():
            save(styled(lambda: draw(Results(LARGE))), HERE, "icons_large")
            parts.append("At the scale of a GPU (`run.py study --data icons --large`):\n\n" + _tables(LARGE))
        both = "\n\n".join(parts)
        PAGE_OF_ICONS.write_text(f"{before}{BEGIN}\n{both}\n{END}{after}")
    return status


def _tables(path: Path) -> str:
    icons = Results(path)
    return f"{claims(Results(), icons)}\n\nAll that is measured on icons:\n\n{table(icons)}"


if __name__ == "__main__":
    sys.exit(main())
