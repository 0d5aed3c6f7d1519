"""Write table 1, published beside ours, as Markdown and as LaTeX: ``table1.md``, ``table1.tex``."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from experiments.clip.study.grid import SELECTING
from experiments.clip.study.intervals import interval
from paper_figures.study_results import NAMES, TOP1, NotMeasured, Results, Seeds, published, values
from paper_figures.style import command

#: The rows, and the published table's names of them.
METHODS = {
    "openclip": "openclip",
    "fastclip-v1": "",
    "fastclip-v3": "fastclip",
    "fastclip-chi-square": "",
    "siglip": "",
    "jest": "jest",
    "jest-top-k": "jest_topk",
    "rho-top-k": "",
    "drrho": "drrho_clip",
    "distillation": "mobileclip_distillation",
    "drrho-distillation": "drrho_clip_distillation",
    "drrho-learned": "",
    "drrho-c": "",
    "drrho-adaptive": "",
    "drrho-chi-square": "",
    "drrho-cvar": "",
    "jest-drrho": "",
    "two-level": "",
}
COLUMNS = (
    *("B/32", "B/16", "L/14"),  # published references
    *("clean, weak", "clean, equal", "clean, strong", "vague, strong", "swapped, weak", "swapped, equal"),
    "swapped, strong",
)
REFERENCES = {"weak": "weak", "equal": "equal", "strong": "shipped"}
Line = tuple[str, list[str]]


def lines(results: Results) -> list[Line]:
    """Return a method's name and its cells, in the order of ``COLUMNS``."""
    table = published()["table_1"]["imagenet_top1"]
    ours = [tuple(column.split(", ")) for column in COLUMNS[3:]]
    found: list[Line] = [
        (
            "reference",
            [
                *(f"{value:.2f}" for value in table["reference"]),
                *(_cell(lambda name=name: _own(results, name)) for _, name in ours),
            ],
        )
    ]
    for method, name in METHODS.items():
        theirs = [f"{value:.2f}" for value in table[name]] if name else [""] * 3
        own = [_ours(results, method, *place) for place in ours]
        if method in SELECTING:  # whose published trainings count the pairs that are scored
            found.append((f"{NAMES[method]}, as many pairs scored", theirs + _scored(results, method, ours)))
            theirs = [""] * 3
        found.append((NAMES[method], theirs + own))
    if not any("±" in cell for _, cells in found for cell in cells):
        raise NotMeasured("headline headline-more", "all methods")
    return found


def _own(results: Results, name: str) -> str:
    return f"{100 * float(results.reference(REFERENCES[name])[TOP1]):.1f}"


def _ours(results: Results, method: str, captions: str, reference: str) -> str:
    if reference == "strong":
        return _cell(lambda: _mean(results.method(method, captions)))
    if method == "drrho":
        return _cell(lambda: _mean(results.steered(reference, captions)))
    return ""  # without reference, or not a part of that study


def _scored(results: Results, method: str, places: Iterable[tuple[str, ...]]) -> list[str]:
    return [
        _cell(lambda captions=captions: _mean(results.scored(method, captions))) if reference == "strong" else ""
        for captions, reference in places
    ]


def _mean(trainings: Seeds) -> str:
    mean, low, _ = interval(values(trainings))
    return f"{mean:.1f} ± {mean - low:.1f}"


def _cell(measure: Callable[[], str]) -> str:
    try:
        return measure()
    except NotMeasured:
        return "n.m."


def markdown(found: Iterable[Line]) -> str:
    """Return the table as Markdown."""
    head = [
        "Top-1 in percent. Published (Wei et al., 2025): ImageNet, target ViT-B/16, by reference, no intervals. Ours: "
        "naming of test pairs, target glyph-tiny, by training captions and reference; mean and half the 95 % interval "
        "(Student's t) over seeds, at an equal number of pairs trained on where nothing else is said; methods without "
        "reference stand under the strong one. n.m.: not measured yet.",
        "",
        f"| method | {' | '.join((*(f'published, {name}' for name in COLUMNS[:3]), *COLUMNS[3:]))} |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    return "\n".join([*head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in found)]) + "\n"


def latex(found: Iterable[Line]) -> str:
    """Return the table as LaTeX, for the package booktabs."""
    groups = (("ImageNet, published", 3), ("clean captions", 3), ("vague", 1), ("swapped captions", 3))
    spans = " & ".join(rf"\multicolumn{{{count}}}{{c}}{{{name}}}" for name, count in groups)
    names = " & ".join((*COLUMNS[:3], *(name.split(", ")[1] for name in COLUMNS[3:])))
    body = [" & ".join((name, *(cell.replace("±", r"$\pm$") for cell in cells))) + r" \\" for name, cells in found]
    top = [rf"\begin{{tabular}}{{l{'r' * len(COLUMNS)}}}", r"\toprule", rf"& {spans} \\", rf"method & {names} \\"]
    return "\n".join([*top, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def write(results: Results, folder: Path) -> list[Path]:
    """Write both files; return their paths."""
    found = lines(results)
    folder.mkdir(parents=True, exist_ok=True)
    written = {folder / "table1.md": markdown(found), folder / "table1.tex": latex(found)}
    for path, text in written.items():
        path.write_text(text)
    return list(written)


if __name__ == "__main__":
    sys.exit(command("table1", write))
