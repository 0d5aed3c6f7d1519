"""The demo's report: a table, learning curves, a sheet of predictions, and the page that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from ..evaluation.encoding import encode_images, encode_texts
from ..evaluation.metrics import predictions
from ..io.files import write_atomically
from ..models.clip import Clip
from .stream import PreparedPairs

# Okabe & Ito's colors, told apart with any color vision.
COLORS = {"reference": "#999999", "unsteered": "#D55E00", "steered": "#0072B2"}
_SHEET = (4, 3)  # rows and columns of the prediction sheet


@dataclass(frozen=True)
class DemoResult:
    """The demo's results, as ``results.json`` holds them."""

    options: dict[str, Any]
    scores: dict[str, dict[str, Any]]
    runs: dict[str, dict[str, Any]]
    pairs: int
    seconds: float


def rows(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of one evaluation that the table shows, as fractions."""
    naming, retrieval = scores["naming"], scores["retrieval"]
    shown = {"naming top-1": naming["top1"], "naming top-5": naming["top5"]}
    shown |= {f"{name} (balanced)": task["balanced"] for name, task in scores["attributes"].items()}
    for direction, title in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
        shown |= {f"{title} R@{k}": value for k, value in retrieval[direction].items() if k in ("1", "5", "10")}
    return shown


def chances(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the chance levels that are known for the rows of the table."""
    naming = scores["naming"]
    known = {"naming top-1": naming["chance"], "naming top-5": 5 * naming["chance"]}
    return known | {f"{name} (balanced)": task["chance"] for name, task in scores["attributes"].items()}


def scores_table(scores: Mapping[str, Mapping[str, Any]], title: str | None = None) -> Table:
    """Return a table with one row per measure and one column per model, in percent."""
    table = Table(title=title, title_justify="left")
    table.add_column("held-out pairs, %")
    for name in scores:
        table.add_column(name, justify="right")
    table.add_column("chance", justify="right")
    shown = {name: rows(score) for name, score in scores.items()}
    chance = chances(next(iter(scores.values())))
    for measure in next(iter(shown.values())):
        level = f"{100 * chance[measure]:.3g}" if measure in chance else ""
        table.add_row(measure, *(f"{100 * values[measure]:.1f}" for values in shown.values()), level)
    return table


def demo_table(result: DemoResult) -> Table:
    """Return the demo's table: the scores, then the settings in which the two trainings differ."""
    small = f", a small run: {_size(result)}" if result.options["quick"] else ""
    table = scores_table(result.scores, f"Trained on {result.options['captions']} captions{small}")
    table.add_section()
    for option, values in differing_settings(result.runs).items():
        table.add_row(option, *(values.get(name, "") for name in result.scores), "")
    return table


def differing_settings(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return what the trainings were given differently: for every such setting, the value of each training.

    A setting that a training does not have is a dash; ``reference`` is told by whether there is one, not by its hash.
    """
    settings = {name: run["settings"] for name, run in runs.items()}
    options = dict.fromkeys(option for own in settings.values() for option in own)
    differing = {}
    for option in options:
        values = {name: str(own.get(option, "-")) for name, own in settings.items()}
        if len(set(values.values())) > 1:
            if option == "reference":
                values = {name: "yes" if value else "none" for name, value in values.items()}
            differing[option] = values
    return differing


def _size(result: DemoResult) -> str:
    epochs = next(iter(result.runs.values()))["settings"]["epochs"]
    return f"{result.pairs} pairs, {epochs} epochs"


def write_demo(
    folder: Path,
    result: DemoResult,
    clips: Mapping[str, Clip],
    held_out: Mapping[str, PreparedPairs],
    vocabulary: Sequence[str],
) -> None:
    """Write ``curves.png``, ``predictions.png`` and ``report.md``."""
    _save(draw_curves(result), folder / "curves.png")
    _save(draw_predictions(clips, held_out, vocabulary), folder / "predictions.png")
    write_atomically(folder / "report.md", page(result).encode())


def draw_curves(result: DemoResult) -> Figure:
    """Draw naming accuracy on the validation pairs and training loss against pairs seen."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    draw_accuracy(accuracy, result)
    for name, run in result.runs.items():
        values = [record["loss"] for record in run["history"]]
        loss.plot(_seen(result, run), values, **_line(name))
    loss.set(xlabel="pairs seen, thousands", ylabel="contrastive risk (each its own)")
    loss.legend(frameon=False, fontsize=8)
    return figure


def draw_accuracy(axes: Axes, result: DemoResult) -> None:
    """Draw naming accuracy on the validation pairs against pairs seen, one line per trained model."""
    for name, run in result.runs.items():
        values = [100 * record["naming_top1"] for record in run["history"]]
        axes.plot(_seen(result, run), values, **_line(name))
    level = 100 * result.scores["reference"]["naming"]["top1"]
    axes.axhline(level, color=COLORS["reference"], linestyle="--", label="reference (test pairs)")
    axes.set(xlabel="pairs seen, thousands", ylabel="naming top-1, validation, %", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)


def _seen(result: DemoResult, run: Mapping[str, Any]) -> list[float]:
    total = run["history"][-1]["step"]
    return [record["step"] / total * run["settings"]["epochs"] * result.pairs / 1000 for record in run["history"]]


def _line(name: str) -> dict[str, Any]:
    return {"color": COLORS[name], "marker": "o", "markersize": 3, "label": name}


@torch.no_grad()
def draw_predictions(
    clips: Mapping[str, Clip], held_out: Mapping[str, PreparedPairs], vocabulary: Sequence[str]
) -> Figure:
    """Draw held-out glyphs, evenly spaced in the test split, with their name and what each model calls them."""
    height, width = _SHEET
    some = next(iter(held_out.values()))
    chosen = torch.linspace(0, len(some) - 1, height * width).round().long()
    called: dict[str, list[str]] = {}
    for name, clip in clips.items():
        image = encode_images(clip.encode_image, [held_out[name].pixels[chosen]])
        _, best = predictions(image, encode_texts(clip.encode_text, vocabulary), 1)
        called[name] = [vocabulary[int(k)] for k in best[:, 0]]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, position, number in zip(
        figure.subplots(height, width).flat, chosen.tolist(), range(len(chosen)), strict=True
    ):
        pixels = some.pixels[position]
        axes.imshow(pixels.permute(1, 2, 0).numpy(), extent=(0, 1, 0, 1))
        axes.set(xlim=(0, 4.2), ylim=(0, 1), aspect="equal")
        axes.axis("off")
        truth = some.captions[position]
        axes.text(1.1, 0.86, _wrapped(truth), fontsize=7.5, weight="bold", va="center")
        for line, (name, captions) in enumerate(called.items()):
            right = captions[number] == truth
            text = f"{'✓' if right else '✗'} {name}: {_wrapped(captions[number])}"
            axes.text(1.1, 0.58 - 0.24 * line, text, fontsize=6.5, color=COLORS[name], va="center")
    return figure


def _wrapped(caption: str, width: int = 46) -> str:
    return caption if len(caption) <= width else caption[: width - 1] + "…"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(path, dpi=150)


def page(result: DemoResult) -> str:
    """Return the report as Markdown."""
    shown = {name: rows(score) for name, score in result.scores.items()}
    chance = chances(result.scores["reference"])
    small = [
        f"A small run, {_size(result)}: its scores are those of short trainings, `run.py demo` has longer ones.",
        "",
    ]
    lines = [
        "# A steered model beside its twin",
        "",
        *(small if result.options["quick"] else ()),
        f"Training captions: {result.options['captions']}; {result.pairs} training pairs; "
        f"this command took {result.seconds / 60:.1f} minutes. All numbers are measured on held-out test pairs with "
        "clean captions.",
        "",
        "| % | " + " | ".join(shown) + " | chance |",
        "|---|" + "---:|" * (len(shown) + 1),
    ]
    for measure in shown["reference"]:
        level = f"{100 * chance[measure]:.3g}" if measure in chance else ""
        values = " | ".join(f"{100 * values[measure]:.1f}" for values in shown.values())
        lines.append(f"| {measure} | {values} | {level} |")
    lines += [
        "",
        "![learning curves](curves.png)",
        "",
        "![predictions](predictions.png)",
        "",
        "The settings in which the two trainings differ. Temperature and learning rate are those that were best for",
        "each method in the demo's full length (`experiments/clip/README.md`, what was tried). "
        f"All settings: {', '.join(f'`{name}/config.json`' for name in result.runs)}.",
        "",
        "| setting | " + " | ".join(result.runs) + " |",
        "|---" * (1 + len(result.runs)) + "|",
    ]
    lines += [
        f"| `{option}` | {' | '.join(values.values())} |" for option, values in differing_settings(result.runs).items()
    ]
    return "\n".join(lines) + "\n"
