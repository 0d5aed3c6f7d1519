"""Draw figure 1: target against reference and twin, as published and under references of three qualities."""

import sys
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.clip.cli.options import Captions
from experiments.clip.study.grid import LONGER, NEAR
from experiments.clip.study.intervals import Interval, interval
from experiments.clip.study.settings import TWIN
from paper_figures.study_results import NAMES, REFERENCES, TOP1, NotMeasured, Results, Seeds, published, values
from paper_figures.style import BLUE, GRAY, PAGE, VERMILION, not_measured, panel, program

BARS = {
    "reference": (GRAY, ""),
    f"unsteered twin ({NAMES[TWIN]})": (VERMILION, "//"),
    "steered target (DRRho-CLIP)": (BLUE, ""),
}
MEASURES = {
    TOP1: "naming\ntop-1",
    "test_top5": "naming\ntop-5",
    "test_image_to_text_r1": "image to\ntext R@1",
    "test_text_to_image_r1": "text to\nimage R@1",
    "test_script_balanced": "script,\nbalanced",
}
Group = tuple[Interval, Interval, Interval]


def groups(results: Results, captions: Captions) -> dict[str, Group | None]:
    """Return reference, twin and target by reference: naming top-1 in percent, None where it is not measured yet."""
    found = {
        title.replace("(glyph-", "\n("): _if_measured(
            lambda name=name: _group(
                results, name, results.method(TWIN, captions), results.steered(name, captions), TOP1
            )
        )
        for name, title in REFERENCES.items()
    }
    longer = f"{NEAR[captions]},\n{LONGER}x seen"
    found[longer] = _if_measured(lambda: _near(results, captions, TOP1))
    return found


def _if_measured(group: Callable[[], Group]) -> Group | None:
    try:
        return group()
    except NotMeasured:
        return None


def measures(results: Results, captions: Captions) -> dict[str, Group | None]:
    """Return reference, twin and target by measure, where the reference is little weaker than the twin."""
    return {title: _near(results, captions, field) for field, title in MEASURES.items()}


def _near(results: Results, captions: Captions, field: str) -> Group:
    return _group(results, NEAR[captions], results.near(TWIN, captions), results.near("drrho", captions), field)


def _group(results: Results, reference: str, twin: Seeds, steered: Seeds, field: str) -> Group:
    own = 100 * float(results.reference(reference)[field])
    return Interval(own, own, own), interval(values(twin, field)), interval(values(steered, field))


def draw_bars(axes: Axes, found: dict[str, Group | None]) -> None:
    """Draw a group of three bars for each entry, with intervals."""
    for number, group in enumerate(found.values()):
        if group is None:
            axes.text(number, 0, "not\nmeasured\nyet", ha="center", va="bottom", color=GRAY, size=6)
            continue
        for place, bar, (color, hatch) in zip(
            (number - 0.27, number, number + 0.27), group, BARS.values(), strict=True
        ):
            axes.bar(place, bar.mean, 0.25, color=color, hatch=hatch, edgecolor="white", linewidth=0)
            axes.plot([place, place], [bar.low, bar.high], color="k", linewidth=0.8)
            axes.annotate(
                f"{bar.mean:.1f}",
                (place, bar.high),
                (0, 3),
                textcoords="offset points",
                ha="center",
                size=5.5,
                rotation=90 if len(found) > 1 else 0,
            )
    axes.set_xlim(-0.5, len(found) - 0.5)
    axes.set_xticks(range(len(found)), list(found), fontsize=6.5)
    axes.margins(y=0.18)


def draw(results: Results) -> Figure:
    """Return the figure: the published teaser, ours on clean and on swapped captions, and five measures of both."""
    figure = Figure(figsize=(PAGE, 4.4), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    theirs, clean, swapped = above.subplots(1, 3, width_ratios=(1, 2.4, 2.4))
    table = published()["table_1"]["imagenet_top1"]
    numbers = [table[name][0] for name in ("reference", "fastclip", "drrho_clip")]
    reference, twin, target = (Interval(value, value, value) for value in numbers)
    draw_bars(theirs, {"ViT-B/32 to B/16\n(twin: FastCLIP v3)": (reference, twin, target)})
    theirs.set(ylabel="ImageNet top-1, %")
    theirs.set_ylim(0, 80)
    panel(theirs, "a", "published")
    left, right = below.subplots(1, 2)
    parts = {
        "b": (clean, lambda: groups(results, "clean"), "ours, clean captions"),
        "c": (swapped, lambda: groups(results, "swapped"), "ours, swapped captions"),
        "d": (left, lambda: measures(results, "clean"), f"{NEAR['clean']} reference, clean, {LONGER}x pairs seen"),
        "e": (
            right,
            lambda: measures(results, "swapped"),
            f"{NEAR['swapped']} reference, swapped, {LONGER}x pairs seen",
        ),
    }
    measured = False
    for letter, (axes, find, title) in parts.items():
        try:
            found = find()
        except NotMeasured:
            found = {}
        if any(found.values()):
            draw_bars(axes, found)
            measured = True
        else:
            not_measured(axes)
            axes.set(xticks=(), yticks=())
        panel(axes, letter, title)
        axes.set_ylabel("test pairs, top-1, %" if letter in "bc" else "test pairs, %")
    if not measured:
        raise NotMeasured("headline references reference-quality weak-to-strong", "targets under the references")
    handles = [
        Patch(facecolor=color, hatch=hatch, edgecolor="white", label=label) for label, (color, hatch) in BARS.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


if __name__ == "__main__":
    sys.exit(program("weak_to_strong", draw))
