"""Entry of the CLIP programs: ``python experiments/clip/run.py [COMMAND]``; without a command, the demo."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip import get_model_preprocess_cfg
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from drrho import KL, ChiSquare, CVaR
from drrho.coefficient import AdaptiveCoefficient
from drrho.temperature import GlobalTemperature, IndividualTemperatures
from experiments.clip import report
from experiments.clip.benchmark_tasks import evaluate_task, write_glyph_tasks
from experiments.clip.catalog import make_catalog, open_catalog
from experiments.clip.checkpoint import latest_checkpoint
from experiments.clip.config import (
    PRESETS,
    CacheReference,
    Catalog,
    Data,
    Demo,
    Evaluate,
    GlyphTasks,
    Loss,
    Plan,
    Prepare,
    Train,
    as_settings,
    parse,
)
from experiments.clip.distributed import Ranks, joined_ranks, launched
from experiments.clip.errors import UserError
from experiments.clip.evaluate import Evaluation, evaluate
from experiments.clip.export import export_checkpoint, export_model
from experiments.clip.feature_cache import FeatureCache, cache_features, open_features
from experiments.clip.files import ensure_writable, write_json
from experiments.clip.glyphs import faces, glyph_splits
from experiments.clip.loader import Loader
from experiments.clip.logs import Logs
from experiments.clip.methods import (
    ConstantTemperature,
    Distilled,
    GlobalContrastive,
    Method,
    OpenCLIP,
    SigLIP,
    TwoLevel,
)
from experiments.clip.models import Clip, load_model, new_model
from experiments.clip.plan import check_positive, cost_of, described, make_plan
from experiments.clip.shards import Manifest, open_dataset, write_dataset
from experiments.clip.sources import parse_weights
from experiments.clip.stream import MemoryStream, Pairs
from experiments.clip.train import Interrupted, Record, Stream, train, whole

console = Console(highlight=False, soft_wrap=True)
ALONE = Ranks()

PIXELS = 32
SMALL_FACES = ("dejavusans", "dejavusansmono", "dejavuserif", "stixgeneral")
QUICK_EPOCHS = 2
SPREAD_SHARE = 0.3  # of the spread of the reference's margins: the temperature that "auto" stands for


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[..., None]]:
    """Show a bar with the time left; yields a function of how much is done, of how much, and a note."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=None, note="")

        def advance(done: int, total: int, note: str = "") -> None:
            bars.update(task, completed=done, total=total, note=note)

        yield advance


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that training stops between two steps; a second one is at once.

    Yields the function that tells whether to stop.
    """
    asked = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def leader_first(ranks: Ranks) -> Iterator[None]:
    """Have the leading rank do something before the others, which then find it done."""
    if not ranks.leads:
        ranks.wait()
    yield
    if ranks.leads:
        ranks.wait()


def prepare(data: Data) -> Manifest:
    """Return the shards of the glyph-name pairs, drawing and writing them if they are not there yet."""
    folder = data.cache / f"glyphs-{data.captions}-{data.size}"
    settings = {
        "captions": data.captions,
        "size": data.size,
        "pixels": PIXELS,
        "unicode": unicodedata.unidata_version,
    }
    if (manifest := open_dataset(folder, settings)) is not None:
        console.print(f"data       reusing {folder}")
        return manifest
    chosen = faces() if data.size == "full" else SMALL_FACES
    with console.status("drawing the glyphs"):
        splits = glyph_splits(data.captions, PIXELS, chosen)
    total = sum(len(records) for records in splits.values())
    vocabulary = sorted({record.meta["name"] for records in splits.values() for record in records})
    with progress_bar("writing shards") as advance:
        manifest = write_dataset(
            folder, splits, settings, vocabulary=vocabulary, progress=lambda done: advance(done, total)
        )
    sizes = ", ".join(f"{split.name} {split.samples}" for split in manifest.splits.values())
    console.print(f"data       wrote {total} pairs to {folder} ({sizes})")
    return manifest


def load_pairs(manifest: Manifest, split: str, clip: Clip) -> Pairs:
    """Decode a split into memory."""
    total = manifest.splits[split].samples
    with progress_bar(f"reading {split} pairs") as advance:
        return Pairs(manifest, split, clip, lambda done: advance(done, total))


def reference_features(reference: Clip, manifest: Manifest, data: Data) -> FeatureCache:
    """Return the reference's features of the training pairs, computing what is not there yet."""
    folder = data.cache / f"features-{manifest.fingerprint[:12]}-{reference.fingerprint[:12]}"
    total = manifest.splits["train"].samples
    with progress_bar("reference features") as advance:
        computed = cache_features(reference, manifest, "train", folder, lambda done: advance(done, total))
    console.print(f"features   {f'computed {computed} rows into' if computed else 'reusing'} {folder}")
    return open_features(reference, manifest, "train", folder)


def evaluate_model(clip: Clip, pairs: Pairs, manifest: Manifest, ranks: Ranks = ALONE) -> Evaluation:
    """Score a model on held-out pairs: naming over all names, attributes, retrieval; ranks share the encoding."""
    clip.model.eval()
    encode_image, encode_text = ranks.sharing(clip.encode_image), ranks.sharing(clip.encode_text)
    return evaluate(encode_image, encode_text, pairs.image_batches(), pairs.captions, manifest.vocabulary)


def build_method(
    loss: Loss,
    epochs: int,
    samples: int,
    reference: Clip | None,
    features: FeatureCache | None,
    ranks: Ranks = ALONE,
) -> tuple[Method, dict[str, Any]]:
    """Return the method and the numbers it was resolved to."""
    chosen: dict[str, Any] = {key: value for key, value in as_settings(loss).items() if key != "reference"}
    if features is not None:
        spread = features.spread()
        console.print(f"reference  margins r_ij - r_ii of different pairs have standard deviation {spread:.3f}")
        if loss.temperature == "auto":
            chosen["temperature"] = tau = round(SPREAD_SHARE * spread, 3)
            low, high = loss.temperature_bounds if loss.temperature_scheme != "constant" else (0.0, math.inf)
            if not low <= tau <= high:
                raise UserError(
                    f"--temperature auto is {tau} here, outside --temperature-bounds {low} {high}: widen them"
                )
    place = {"group": ranks.group, "device": ranks.device}
    method = _method(loss, epochs, samples, chosen["temperature"], features, place)
    if reference is not None and features is not None and loss.distill > 0:
        if loss.distill_temperature == "auto":
            chosen["distill_temperature"] = round(1 / reference.model.logit_scale.exp().item(), 6)
        method = Distilled(method, loss.distill, chosen["distill_temperature"], features, **place)
    return method, chosen


def _method(
    loss: Loss, epochs: int, samples: int, tau: Any, features: FeatureCache | None, place: dict[str, Any]
) -> Method:
    divergence = {"kl": KL, "chi-square": ChiSquare, "cvar": partial(CVaR, loss.level)}[loss.divergence]()
    if loss.method == "openclip":
        return OpenCLIP(place["group"])
    if loss.method == "siglip":
        return SigLIP(place["group"])
    if loss.method == "two-level" and features is not None:
        return TwoLevel(tau, divergence, loss.strength, features, **place)
    low, high = loss.temperature_bounds
    learning = {"learning_rate": loss.temperature_lr, "low": low, "high": high, **place}
    if loss.temperature_scheme == "constant":
        temperature = ConstantTemperature(tau)
    elif loss.temperature_scheme == "individual":
        temperature = IndividualTemperatures(samples, tau, **learning)
    else:
        temperature = GlobalTemperature(tau, **learning)
    return GlobalContrastive(
        samples,
        epochs,
        temperature,
        features=features if loss.method == "drrho" else None,
        coefficient=AdaptiveCoefficient() if loss.coefficient == "adaptive" else loss.coefficient,
        final_gamma=loss.final_gamma,
        log_step=loss.log_step,
        eps=loss.eps,
        divergence=divergence,
        rho=loss.rho,
        per_temperature=loss.temperature_scheme == "per-temperature",
        **place,
    )


def _check_ranks(options: Train, ranks: Ranks) -> None:
    """Refuse what cannot be spread over that many ranks."""
    batch = options.optimization.batch_size
    if batch < ranks.count:
        raise UserError(f"--batch-size {batch} is less than the {ranks.count} ranks: every rank needs a pair")
    if options.loss.method == "siglip" and ranks.count > 1:
        raise UserError("--method siglip runs in one process: open_clip's loss needs ranks with equal numbers of pairs")


class Trained(NamedTuple):
    """A trained model, one record per validation, and what identifies the run."""

    clip: Clip
    history: list[Record]
    identity: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Return what ``run.json`` keeps of it."""
        return {"settings": self.identity, "history": self.history}


class Material(NamedTuple):
    """What a run trains and is validated on: a stream, its number of samples and identity, scores of the model."""

    stream: Stream
    samples: int
    identity: dict[str, Any]
    validate: Callable[[], Record]
    features: FeatureCache | None = None


def glyph_material(options: Train, clip: Clip, reference: Clip | None, ranks: Ranks) -> Material:
    """Return the embedded pairs, in memory, with the reference's features."""
    with leader_first(ranks):
        manifest = prepare(options.data)
        features = reference_features(reference, manifest, options.data) if reference is not None else None
    pairs = load_pairs(manifest, options.split, clip)
    held_out = load_pairs(manifest, "validation", clip)

    def validate() -> Record:
        naming = evaluate_model(clip, held_out, manifest, ranks).naming
        clip.model.train()
        return {"naming_top1": naming.top1, "naming_top5": naming.top5}

    stream = MemoryStream(pairs, options.optimization.batch_size, options.seed, ranks.rank, ranks.count)
    identity = {"data": manifest.fingerprint, "split": options.split}
    return Material(stream, len(pairs), identity, validate, features)


def catalog_material(options: Train, clip: Clip, folder: Path, ranks: Ranks) -> Material:
    """Return the pairs of a catalog, read while training, and the zero-shot tasks to validate on."""
    shards = options.shards
    for task in shards.tasks:
        if not task.is_dir():
            raise UserError(f"--tasks {task} is no folder: name folders in CLIP_benchmark's layout")
    catalog = open_catalog(folder)
    weights = None if shards.source_weights is None else parse_weights(shards.source_weights, len(catalog.sources))
    chosen = {
        "resampled": shards.resampled,
        "epoch_samples": shards.epoch_samples,
        "block_shards": shards.block_shards,
    }
    loader = Loader(
        catalog,
        clip.preprocess if clip.augment is None else clip.augment,
        clip.tokenize,
        batch_size=options.optimization.batch_size,
        seed=options.seed,
        workers=shards.workers,
        rank=ranks.rank,
        ranks=ranks.count,
        weights=weights,
        skip_limit=shards.skip_limit,
        pin_memory=ranks.device.type == "cuda",
        **chosen,
    )
    console.print(f"data       {len(catalog)} pairs of {folder}, {loader.steps_per_epoch} steps an epoch")

    def validate() -> Record:
        return dict(task_scores(clip, shards.tasks, ranks))

    return Material(loader, len(catalog), {"data": catalog.fingerprint, "weights": weights, **chosen}, validate)


def task_scores(clip: Clip, tasks: Sequence[Path], ranks: Ranks = ALONE) -> Iterator[tuple[str, float]]:
    """Yield the name and value of every metric of these tasks."""
    for folder in tasks:
        scores = evaluate_task(clip, folder, group=ranks.group)
        for metric, value in scores.metrics.items():
            yield f"{scores.name}/{metric}", value


def run_training(options: Train, ranks: Ranks = ALONE) -> Trained:
    """Train as the options say, going on from a checkpoint in ``options.out``; export the model."""
    sharded = ranks.group is not None and options.execution.parallel == "fsdp"
    clip = new_model(
        options.model, options.seed, sigmoid=options.loss.method == "siglip", nonscalar_logit_scale=sharded
    )
    reference = load_model(options.loss.reference) if options.loss.needs_reference else None
    if reference is not None and options.split != "train":
        raise UserError(f"--split {options.split} has no cached reference features: steered runs use --split train")
    _check_ranks(options, ranks)
    with leader_first(ranks):
        ensure_writable(options.out)
    folder = options.shards.catalog
    if folder is None:
        material = glyph_material(options, clip, reference, ranks)
    else:
        material = catalog_material(options, clip, folder, ranks)
    method, chosen = build_method(
        options.loss, options.optimization.epochs, material.samples, reference, material.features, ranks
    )
    identity = {
        "model": options.model,
        **material.identity,
        "reference": reference.fingerprint if reference is not None else "",
        "seed": options.seed,
        "validations": options.validations,
        "precision": options.execution.precision,
        **as_settings(options.optimization),
        **chosen,
    }
    checkpoints = options.out / "checkpoints"
    if (found := latest_checkpoint(checkpoints)) is not None:
        console.print(f"training   going on from {found}")
    logs = Logs(options.out, options.logs, identity) if ranks.leads else None
    title = f"training {options.out.name}"
    with closing(material.stream), stop_on_signal() as stop, progress_bar(title) as advance:
        history, average = train(
            clip,
            method,
            material.stream,
            options.optimization,
            ranks=ranks,
            execution=options.execution,
            seed=options.seed,
            checkpoints=checkpoints,
            checkpoint_seconds=60 * options.checkpoint_minutes,
            settings=identity,
            validate=material.validate,
            validations=options.validations,
            logs=logs,
            log_every=options.log_every,
            on_step=lambda step, total, log: advance(step, total, f"loss {log['loss']:.4f}"),
            stop=stop,
        )
    if logs is not None:
        logs.close()
    weights = {key: whole(value) for key, value in clip.model.state_dict().items()}
    if ranks.leads:
        write_exports(options, clip, weights, average)
    return Trained(clip, history, identity)


def write_exports(options: Train, clip: Clip, weights: dict[str, Tensor], average: dict[str, Tensor]) -> None:
    """Write the trained model, and the moving average of its weights, for open_clip and CLIP_benchmark."""
    dtype, epoch = getattr(torch, options.weights), options.optimization.epochs
    preprocess = get_model_preprocess_cfg(clip.model)
    for name, state in (("model", weights), ("model-ema", average)):
        if state:
            export_model(clip, options.out / name, dtype, state)
            path = options.out / f"epoch_{epoch}{name.removeprefix('model')}.pt"
            export_checkpoint(clip.name, state, preprocess, path, epoch=epoch, dtype=dtype)
    console.print(f"training   {options.out / 'model'} holds the model in open_clip's local-dir layout")


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
    clip = load_model(options.model)
    if options.tasks:
        for name, value in task_scores(clip, options.tasks):
            console.print(f"{name:<48} {value:.4f}")
        return
    manifest = prepare(options.data)
    pairs = load_pairs(manifest, options.split, clip)
    console.print(report.scores_table({clip.name: evaluate_model(clip, pairs, manifest).as_dict()}))


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
        samples_seen=options.samples * train.optimization.epochs,
        batch_size=train.optimization.batch_size,
        accumulation=train.optimization.accumulation,
        ranks=options.ranks,
        execution=train.execution,
        teraflops=options.teraflops,
        utilization=options.utilization,
        reference_width=options.reference_width if loss.needs_reference else 0,
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
    if (count := launched(os.environ)[1]) > 1:
        raise UserError(f"only train runs on several ranks, here are {count}: start this command in one process")
    match command:
        case Demo():
            demo(command)
        case Prepare():
            prepare(command.data)
        case CacheReference():
            reference_features(load_model(command.reference), prepare(command.data), command.data)
        case Evaluate():
            evaluate_command(command)
        case Plan():
            plan(command)
        case Catalog():
            count_samples(command)
        case GlyphTasks():
            for folder in write_glyph_tasks(prepare(command.data), command.out):
                console.print(f"task       {folder}")


def main(arguments: Sequence[str]) -> int:
    """Run a command; return its exit status: 2 for what the user can mend, 130 after Ctrl-C."""
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
        return 130
    except KeyboardInterrupt:
        print(f"run.py: interrupted; what was finished is kept; go on with: {again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
