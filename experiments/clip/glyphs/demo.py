"""The demo: a steered model and its unsteered twin, trained on equal budgets and scored beside their reference."""

from __future__ import annotations

import dataclasses
import time

from ..cli.options import Data, Train
from ..cli.parser import as_settings
from ..cli.presets import PRESETS
from ..cli.terminal import console
from ..cli.train import run_training
from ..distributed import joined_ranks
from ..io.files import write_json
from ..models.clip import load_model
from .evaluation import evaluate_model
from .options import Demo
from .source import load_pairs, prepare

# On the pairs of the whole demo, which finds them drawn: the study's model, a fifth of the operations, and its batch.
QUICK_MODEL, QUICK_EPOCHS, QUICK_BATCH = "glyph-tiny", 2, 128


def run(options: Demo) -> None:
    """Train both models, score them and the reference on the test pairs, and write ``results.json`` and a report."""
    from . import report  # matplotlib, which only this command draws with

    started = time.monotonic()
    data = Data(options.captions, cache=options.cache)
    reference = load_model(options.reference)
    console.print(f"reference  {reference.name}: its README.md says how it was made")
    with joined_ranks(options.device) as ranks:
        trained = {
            name: run_training(training_options(options, data, name), ranks) for name in ("unsteered", "steered")
        }
    reference.model.to(ranks.device)
    manifest = prepare(data)
    clips = {"reference": reference} | {name: run.clip for name, run in trained.items()}
    held_out = {name: load_pairs(manifest, "test", clip) for name, clip in clips.items()}
    scores = {name: evaluate_model(clip, held_out[name], manifest) for name, clip in clips.items()}
    result = report.DemoResult(
        options=as_settings(options),
        scores={name: score.as_dict() for name, score in scores.items()},
        runs={name: run.record() for name, run in trained.items()},
        pairs=manifest.splits["train"].samples,
        seconds=time.monotonic() - started,
    )
    write_json(options.out / "results.json", dataclasses.asdict(result))
    report.write_demo(options.out, result, clips, held_out, manifest.vocabulary)
    console.print(report.demo_table(result))
    console.print(f"report     {options.out / 'report.md'} with curves.png and predictions.png")


def training_options(options: Demo, data: Data, name: str) -> Train:
    """Return the options of one of the demo's trainings: those of the preset ``glyph-NAME``, changed as needed."""
    preset = PRESETS[f"glyph-{name}"]
    loss, optimization = preset.loss, preset.optimization
    if loss.needs_reference:
        loss = dataclasses.replace(loss, reference=options.reference)
    if options.quick:
        optimization = dataclasses.replace(optimization, epochs=QUICK_EPOCHS, batch_size=QUICK_BATCH)
    return dataclasses.replace(
        preset,
        model=QUICK_MODEL if options.quick else preset.model,
        data=data,
        loss=loss,
        optimization=optimization,
        seed=options.seed,
        out=options.out / name,
        validations=2 if options.quick else preset.validations,
    )
