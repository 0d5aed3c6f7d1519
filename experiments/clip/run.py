"""Entry of the CLIP programs: ``python experiments/clip/run.py [COMMAND]``; without a command, the demo."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments.clip.cli.options import (
    CacheReference,
    Catalog,
    Data,
    Demo,
    Evaluate,
    GlyphTasks,
    Plan,
    Prepare,
    Train,
)
from experiments.clip.cli.parser import as_settings, parse
from experiments.clip.cli.plan import check_positive, cost_of, described, make_plan
from experiments.clip.cli.presets import PRESETS
from experiments.clip.cli.sources import reference_features
from experiments.clip.cli.terminal import console, progress_bar
from experiments.clip.cli.train import run_training
from experiments.clip.data.catalog import make_catalog, open_catalog
from experiments.clip.distributed import joined_ranks, launched
from experiments.clip.errors import UserError
from experiments.clip.evaluation.tasks import task_scores
from experiments.clip.glyphs import report
from experiments.clip.glyphs.evaluation import evaluate_model
from experiments.clip.glyphs.source import glyph_features, load_pairs, prepare
from experiments.clip.glyphs.tasks import write_glyph_tasks
from experiments.clip.io.files import write_json
from experiments.clip.models.clip import load_model
from experiments.clip.study import runner as study_runner
from experiments.clip.study.options import Study
from experiments.clip.training.trainer import Interrupted

QUICK_EPOCHS = 2


def demo(options: Demo) -> None:
    """Train the steered target and its twin on equal budgets, evaluate them and the reference, report."""
    started = time.monotonic()
    data = Data(options.captions, "small" if options.quick else "full", options.cache)
    reference = load_model(options.reference)
    console.print(f"reference  {reference.name}: its README.md says how it was made")
    trained = {
        name: run_training(demo_run(options, PRESETS[f"glyph-{name}"], data, name)) for name in ("unsteered", "steered")
    }
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


def demo_run(options: Demo, preset: Train, data: Data, name: str) -> Train:
    """Return the training that the demo does under this preset."""
    optimization = preset.optimization
    if options.quick:
        optimization = dataclasses.replace(optimization, epochs=QUICK_EPOCHS, warmup=5)
    return dataclasses.replace(
        preset,
        data=data,
        loss=dataclasses.replace(preset.loss, reference=options.reference)
        if preset.loss.needs_reference
        else preset.loss,
        optimization=optimization,
        seed=options.seed,
        out=options.out / name,
        validations=2 if options.quick else preset.validations,
    )


def evaluate_command(options: Evaluate) -> None:
    """Print the three evaluations of one model, or its scores on zero-shot tasks."""
    clip = load_model(options.model, options.weights)
    if options.tasks:
        for name, value in task_scores(clip, options.tasks):
            console.print(f"{name:<48} {value:.4f}")
        return
    manifest = prepare(options.data)
    pairs = load_pairs(manifest, options.split, clip)
    console.print(report.scores_table({clip.name: evaluate_model(clip, pairs, manifest).as_dict()}))


def cache_reference(options: CacheReference) -> None:
    """Compute the reference's features: of the embedded pairs, or of a catalog, over ranks."""
    reference = load_model(options.reference, options.reference_weights)
    if options.catalog is None:
        if launched(os.environ)[1] > 1:
            raise UserError("the embedded pairs take one process: start cache-reference without torchrun or srun")
        glyph_features(reference, prepare(options.data), options.data.cache)
        return
    with joined_ranks(options.device, options.exchange_minutes) as ranks:
        console.quiet = not ranks.leads
        reference.model.to(ranks.device)
        reference_features(
            options.out,
            reference,
            open_catalog(options.catalog),
            ranks,
            views=options.views,
            precision=options.precision,
            batch_size=options.batch_size,
            workers=options.workers,
            skip_limit=options.skip_limit,
        )


def count_samples(options: Catalog) -> None:
    """Make a catalog and say what it holds and what it left out."""
    with progress_bar("scanning") as advance:
        catalog = make_catalog(
            list(options.sources),
            options.out,
            caption_key=options.caption_key,
            workers=options.workers,
            progress=advance,
            run_pipe_commands=options.run_pipe_commands,
        )
    console.print(f"catalog    {len(catalog)} pairs in {len(catalog.shards)} shards: {catalog.folder}")
    for reason, count in catalog.left_out.items():
        console.print(f"left out   {count} for {reason}")


def plan(options: Plan) -> None:
    """Print what a run would take."""
    train, loss = options.train, options.train.loss
    check_positive(
        samples=options.samples,
        ranks=options.ranks,
        teraflops=options.teraflops,
        utilization=options.utilization,
        reference_width=options.reference_width,
    )
    made = make_plan(
        cost_of(train.model, checkpointing=train.execution.activation_checkpointing),
        samples=options.samples,
        samples_seen=(train.shards.epoch_samples or options.samples) * train.optimization.epochs,
        batch_size=train.optimization.batch_size,
        scored_per_pair=train.selection.scored_per_pair,
        accumulation=train.optimization.accumulation,
        ranks=options.ranks,
        execution=train.execution,
        teraflops=options.teraflops,
        utilization=options.utilization,
        reference_width=options.reference_width if train.needs_reference else 0,
        individual_temperatures=loss.temperature_scheme == "individual",
        running=loss.method in ("fastclip", "drrho"),
        ema=train.optimization.ema is not None,
    )
    console.print(described(made))


def run(command: Any) -> None:
    """Carry out one command."""
    if isinstance(command, Train):
        execution = command.execution
        with joined_ranks(execution.device, execution.exchange_minutes) as ranks:
            console.quiet = not ranks.leads
            trained = run_training(command, ranks)
            if ranks.leads:
                write_json(command.out / "run.json", {"options": as_settings(command), **trained.record()})
        return
    if isinstance(command, CacheReference):
        cache_reference(command)
        return
    if (count := launched(os.environ)[1]) > 1:
        raise UserError(f"this command takes one process, here are {count}: start it without torchrun or srun")
    match command:
        case Demo():
            demo(command)
        case Prepare():
            prepare(command.data)
        case Evaluate():
            evaluate_command(command)
        case Plan():
            plan(command)
        case Catalog():
            count_samples(command)
        case Study():
            study_runner.run(command)
        case GlyphTasks():
            for folder in write_glyph_tasks(prepare(command.data), command.out):
                console.print(f"task       {folder}")


def main(arguments: Sequence[str]) -> int:
    """Run a command; return its exit status.

    2 for what the user can mend, 130 after Ctrl-C, 75 (EX_TEMPFAIL: try again) after a scheduler's signal.
    """
    again = " ".join(["python experiments/clip/run.py", *arguments])
    chosen = None
    try:
        chosen = parse(arguments)
        run(chosen)
    except UserError as error:
        # What is wrong with the options is wrong on every rank: the first says so. What a rank meets later is its own.
        if chosen or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"run.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(f"run.py: {interruption}; go on with: {again}", file=sys.stderr)
        return 130 if interruption.signal == signal.SIGINT else os.EX_TEMPFAIL
    except KeyboardInterrupt:
        print(f"run.py: interrupted; what was finished is kept; go on with: {again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
