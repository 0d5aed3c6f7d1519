"""The commands `evaluate`, `cache-reference`, `advise`, `catalog` and `export`: each carries out its options."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch

from drrho.advice import BATCH, Advice, Knowledge, extrapolated_level, knowledge, with_least_unrecognized

from ..catalog.catalog import CAPTION_KEYS, IMAGE_KEYS, make_catalog
from ..catalog.sources import parse_sources, with_columns
from ..catalog.subset import open_subset
from ..distributed import Ranks, joined_ranks, launched, set_float32_products
from ..errors import UserError
from ..evaluation.datacomp import averages
from ..evaluation.encoding import Encoder
from ..evaluation.held_out import evaluate_pairs
from ..evaluation.tasks import TaskScores, check_datacomp, evaluate_task
from ..io.files import ensure_writable, write_json
from ..io.workers import usual_workers
from ..models.clip import Clip, load_model
from ..models.config import CONFIG_FILE
from ..models.export import export_model
from ..models.sources import register_models
from ..reference.advice import (
    Fitted,
    cached_sample,
    menu_of,
    read_fitted,
    sample_features,
    scale_by,
)
from ..reference.cache import open_features
from ..training.checkpoint import MODEL, Checkpoint, Damaged, check_sound, chosen_checkpoint
from ..training.options import SHIPPED_REFERENCE, Execution, Loss, Optimization
from ..training.probe import run_probe
from ..training.state import EMA
from .building import build_target, say_notes
from .options import Advise, CacheReference, Evaluate, Export, MakeCatalog, Shards, Train
from .parser import as_settings, load_config
from .presets import EMBEDDED
from .sources import (
    HELD_OUT,
    Validation,
    embedded_pairs,
    open_shared_catalog,
    open_training_data,
    open_validation,
    reference_features,
)
from .terminal import console, progress_bar

_SHOWN = 5  # damaged shards
_CANNOT_TELL = (
    "cannot tell: give --expected PERCENT, what the unsteered run is expected to reach, or plan a longer run, whose "
    "probe is longer"
)


def evaluate(options: Evaluate) -> None:
    """Print the scores of one model, and write them: on tasks and held-out pairs, or on the embedded pairs."""
    if not options.tasks and options.val_data is None:
        _evaluate_embedded(options)
        return
    with joined_ranks(options.device, options.exchange_minutes) as ranks:
        console.quiet = not ranks.leads
        with ranks.leader_first():
            if ranks.leads and options.out is not None:
                ensure_writable(options.out.absolute().parent)
        validation = open_validation(options.tasks, options.val_data, ranks)
        if options.datacomp:
            check_datacomp(validation.tasks)
        clip = load_model(options.model, options.weights)
        clip.model.to(ranks.device)
        set_float32_products(ranks.device, full=True)
        workers = usual_workers() if options.workers is None else options.workers
        encoder = Encoder(clip, ranks, options.batch_size, workers, options.precision)
        results = _Results(options, clip, ranks)
        _score(validation, options.skip_limit, encoder, results)
        if ranks.leads:
            results.show(validation, options.datacomp)


def _score(validation: Validation, skip_limit: float, encoder: Encoder, results: _Results) -> None:
    """Score what has no scores yet."""
    for task in validation.tasks:
        if not results.has(task.name, task.fingerprint):
            with progress_bar(task.name) as advance:
                scores = evaluate_task(encoder, task, advance)
            results.add(task.fingerprint, scores)
    pairs = validation.held_out
    if pairs is not None and not results.has(HELD_OUT, pairs.fingerprint):
        with progress_bar(HELD_OUT) as advance:
            found = evaluate_pairs(encoder, pairs, skip_limit, advance)
        skipped = {f"skipped/{reason}": float(count) for reason, count in found.skipped.items()}
        results.add(pairs.fingerprint, TaskScores(HELD_OUT, HELD_OUT, found.samples, found.metrics, skipped, None))


class _Found(NamedTuple):
    """The scores of a task, and the fingerprint of its data."""

    fingerprint: str
    scores: TaskScores


def _found(row: Mapping[str, Any]) -> _Found:
    """Return what a row of the file holds; it raises if that is something else."""
    scores = TaskScores(*(row[name] for name in TaskScores._fields))
    if not scores.metrics or not all(isinstance(value, float) for value in scores.metrics.values()):
        raise ValueError("no scores")
    return _Found(row["fingerprint"], scores)


class _Results:
    """The scores so far, of which the leading rank keeps a file."""

    def __init__(self, options: Evaluate, clip: Clip, ranks: Ranks) -> None:
        self._ranks, self._path = ranks, options.out
        self._settings = {
            "model": clip.fingerprint,
            "precision": options.precision,
            "batch_size": options.batch_size,
            "skip_limit": options.skip_limit,
        }
        self._found = ranks.run_on_all_or_fail(lambda: self._stored() if ranks.leads else {})

    def _stored(self) -> dict[str, _Found]:
        """Return what an earlier command has written; refuse the scores of another model, or of other settings."""
        if self._path is None or not self._path.exists():
            return {}
        try:
            stored = json.loads(self._path.read_bytes())
            settings, found = dict(stored["settings"]), [_found(row) for row in stored["results"]]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"--out {self._path} is there and holds no scores: choose another file") from error
        for key, value in self._settings.items():
            if settings.get(key) != value:
                raise UserError(
                    f"--out {self._path} has scores with {key}={settings.get(key)}, now it is {value}: choose another "
                    "file, or delete it"
                )
        return {each.scores.name: each for each in found}

    def has(self, name: str, fingerprint: str) -> bool:
        """Whether the scores of a task, as it is now, are there (collective)."""
        own = name in self._found and self._found[name].fingerprint == fingerprint
        known = bool(self._ranks.max_over_ranks(int(own)))
        if known:
            console.print(f"evaluate   {name}: reusing the scores in {self._path}")
        return known

    def add(self, fingerprint: str, scores: TaskScores) -> None:
        """Print and write the scores of a task."""
        if not self._ranks.leads:
            return
        numbers = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.metrics.items())
        console.print(f"evaluate   {scores.name}: {numbers}")
        self._found[scores.name] = _Found(fingerprint, scores)
        self._write({})

    def _write(self, more: dict[str, Any]) -> None:
        if self._path is not None:
            rows = [{"fingerprint": each.fingerprint, **each.scores._asdict()} for each in self._found.values()]
            write_json(self._path, {"settings": self._settings, "results": rows, **more})

    def show(self, validation: Validation, datacomp: bool) -> None:
        """Print the table, and DataComp's averages if they are wanted."""
        named = [task.name for task in validation.tasks] + ([HELD_OUT] if validation.held_out is not None else [])
        console.print("\n".join(_table([self._found[name].scores for name in named])))
        if not datacomp:
            return
        scores = {
            task.entry.key: self._found[task.name].scores.metrics[task.entry.main]
            for task in validation.tasks
            if task.entry is not None and task.entry.main is not None
        }
        found = averages(scores)
        for name, value in found.items():
            console.print(f"DataComp   {name:<22} {value:.4f}")
        self._write({"datacomp": found})


def _table(rows: Sequence[TaskScores]) -> list[str]:
    """Return the lines of a table: a task's main metric (DataComp's, or the first), then its others."""
    cells = [("task", "samples", "main metric", "score", "other metrics")]
    for row in rows:
        metrics = dict(row.metrics)
        main = row.main or next(iter(metrics))
        score = metrics.pop(main)
        others = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        cells.append((row.name, str(row.samples), main, f"{score:.4f}", others))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        f"{name:<{widths[0]}}  {samples:>{widths[1]}}  {main:<{widths[2]}}  {score:>{widths[3]}}  {others}".rstrip()
        for name, samples, main, score, others in cells
    ]


def _evaluate_embedded(options: Evaluate) -> None:
    """Score a model of the embedded pairs on those that are held out."""
    is_there = options.weights is not None or (options.model / CONFIG_FILE).is_file()
    if is_there and not _is_of_embedded_pairs(options.model, options.weights):
        raise UserError(
            f"{options.model} was not trained on the embedded pairs, whose names would say nothing of it: give --tasks "
            "FOLDER or --val-data CATALOG"
        )
    if launched(os.environ)[1] > 1:
        raise UserError("the embedded pairs take one process: start evaluate without torchrun or srun")
    clip = load_model(options.model, options.weights)
    with joined_ranks(options.device, options.exchange_minutes) as ranks:
        clip.model.to(ranks.device)
        found, table = embedded_pairs(options.data.kind).scores(options.data, options.split, clip)
    console.print(table)
    if options.out is not None:
        write_json(options.out, {"settings": {"model": clip.fingerprint, "split": options.split}, "scores": found})


def _is_of_embedded_pairs(model: Path, weights: Path | None) -> bool:
    """Whether a model has the architecture of those for the embedded pairs, and no run says that it saw others."""
    run = (model if weights is None else weights).absolute().parent
    if (_stored_json(run / "config.json").get("shards") or {}).get("catalog") is not None:
        return False
    if weights is not None:
        return str(model).startswith(EMBEDDED)
    register_models()
    own = _stored_json(model / CONFIG_FILE).get("model_cfg", {})
    known = [open_clip.get_model_config(name) for name in open_clip.list_models() if name.startswith(EMBEDDED)]
    # A logit bias has an entry of its own.
    return any(config is not None and config.items() <= own.items() for config in known)


def _stored_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one if there is none."""
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def cache_reference(options: CacheReference) -> None:
    """Compute the reference's features: of the embedded pairs, or of a catalog, over ranks."""
    reference = load_model(options.reference or SHIPPED_REFERENCE, options.reference_weights)
    say_notes(reference)
    if options.catalog is None and launched(os.environ)[1] > 1:
        raise UserError("the embedded pairs take one process: start cache-reference without torchrun or srun")
    with joined_ranks(options.device, options.exchange_minutes) as ranks:
        console.quiet = not ranks.leads
        ranks.check_same_options(as_settings(options))
        reference.model.to(ranks.device)
        if options.catalog is None:
            embedded_pairs(options.data.kind).cache_features(options.data, reference)
            return
        reference_features(
            options.out,
            reference,
            open_shared_catalog(options.catalog, ranks),
            ranks,
            views=options.views,
            precision=options.precision,
            towers=options.towers,
            batch_size=options.batch_size,
            workers=usual_workers() if options.workers is None else options.workers,
            skip_limit=options.skip_limit,
        )


def advise(options: Advise) -> None:
    """Print what each reference knows and is predicted to gain, and which to use how, if any."""
    fitted = read_fitted()
    with joined_ranks(options.device, Execution().exchange_minutes) as ranks:
        known = _known(options, ranks)
        console.print("\n".join(_knowledge_lines(known)))
        known = with_least_unrecognized(known)
        if options.expected is None:
            level = _probed(options, fitted, ranks)
            twin = None if level is None else fitted.scale.share(level)
        else:
            twin = options.expected / 100
            scores, levels = [each / 100 for each in options.reference_score], [own.level for own in known.values()]
            level = (scale_by(scores, levels, fitted.scale.slope) if scores else fitted.scale).level(twin)
    advice = None
    if level is not None and twin is not None:
        console.print(f"unsteered  expected to reach {100 * twin:.1f} %")
        judged = {name: own for name, own in known.items() if fitted.advisor.judges(own)}
        for name in known.keys() - judged.keys():
            console.print(f"left out   {name} recognizes fewer pairs than any reference of which a gain is known")
        advice = Advice.ranked(
            fitted.advisor.predict(name, how, own, twin, level)
            for name, own in judged.items()
            for how in menu_of(own)
            if how.cost <= options.most_cost and (not how.selects or own.level - level >= fitted.select_level)
        )
        console.print("\n".join(_gain_lines(advice)))
    if options.out is not None:
        predictions = () if advice is None else advice.predictions
        found = {
            "references": {name: own._asdict() for name, own in known.items()},
            "expected": twin,
            "predictions": [{**each._asdict(), "how": each.how._asdict()} for each in predictions],
            "recommended": None if advice is None else str(advice),
        }
        write_json(options.out, found)
    console.print(f"recommended: {_CANNOT_TELL if advice is None else advice}")


def _known(options: Advise, ranks: Ranks) -> dict[str, Knowledge]:
    """Return what each reference knows of the training pairs, by a name that tells it from the others."""
    found: dict[str, Knowledge] = {}
    pairs = None if options.catalog is None else open_shared_catalog(options.catalog, ranks)
    for number, path in enumerate(options.reference or (SHIPPED_REFERENCE,)):
        clip = load_model(path)
        say_notes(clip)
        clip.model.to(ranks.device)
        if pairs is None:
            features = cached_sample(
                embedded_pairs(options.data.kind).cache_features(options.data, clip), options.pairs
            )
        elif options.reference_features:
            cached = open_features(clip, pairs, options.reference_features[number], ranks)
            features = cached_sample(cached, options.pairs)
        else:
            chosen = np.random.default_rng(options.seed).permutation(len(pairs))[: options.pairs]
            features = sample_features(clip, pairs, np.sort(chosen).tolist())
        if len(features[0]) < BATCH:
            raise UserError(f"{len(features[0])} training pairs can be used: a reference is judged on at least {BATCH}")
        name = path.parent.name if path.name == "model" else path.name
        found[str(path) if name in found else name] = knowledge(*features, seed=options.seed)
    return found


def _probed(options: Advise, fitted: Fitted, ranks: Ranks) -> float | None:
    """Return the level that the unsteered run is predicted to reach; None, having said so, if the probe cannot tell."""
    optimization = Optimization(epochs=options.epochs, batch_size=BATCH, lr=options.lr)
    train = Train(
        model=options.model,
        data=options.data,
        shards=Shards(catalog=options.catalog),
        loss=Loss(method="openclip"),
        optimization=optimization,
        seed=options.seed,
    )
    clip = build_target(train)
    clip.model.to(ranks.device)
    pairs = open_training_data(train, clip, None, ranks)
    budget, stream = options.epochs * pairs.samples, pairs.stream
    steps = min(int(options.probe_share * budget / BATCH), stream.steps_per_epoch)
    if steps < 1:
        console.print(f"probe      {100 * options.probe_share:g} % of {budget} pairs is not a step of {BATCH}")
        return None
    with closing(stream), progress_bar("probing") as advance:
        probe = run_probe(clip, stream.batches(0, 0), steps, optimization, advance)
    console.print(
        f"probe      {steps} steps: {probe.hits} of {probe.scored} new pairs are told apart from {BATCH - 1} others, "
        f"{probe.scored / BATCH:.0f} by chance"
    )
    level = extrapolated_level(probe.hits, probe.scored, probe.seen, budget, fitted.curve)
    if level is None:
        console.print("probe      too short to tell what the unsteered run will reach")
    return level


def _knowledge_lines(known: Mapping[str, Knowledge]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("reference", "pairs", f"told apart of {BATCH}, %", "unrecognized, %", "equal captions, %")
    ]
    for name, own in known.items():
        shares = (own.accuracy, own.unrecognized, own.duplicates)
        rows.append((name, str(own.pairs), *(f"{100 * share:.1f}" for share in shares)))
    return _aligned(rows)


def _gain_lines(advice: Advice) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("reference", "c", "tau", "divergence", "select", "operations", "gain, points", "95 %")
    ]
    for each in advice.predictions:
        how = each.how
        steered = (f"{how.coefficient:g}", f"{how.temperature:g}", how.divergence) if how.coefficient else ("", "", "")
        select = f"{how.select}, 1 in {how.candidates}" if how.selects else ""
        interval = f"{each.low:+.1f} to {each.high:+.1f}"
        rows.append((each.reference, *steered, select, f"x {how.cost:.1f}", f"{each.points:+.1f}", interval))
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def catalog(options: MakeCatalog) -> None:
    """Make a catalog, and say what it holds and what it left out."""
    with progress_bar("scanning") as advance:
        made = make_catalog(
            with_columns(parse_sources(options.sources), options.image_key, options.caption_key, options.separator),
            options.out,
            image_keys=options.image_key or IMAGE_KEYS,
            caption_key=options.caption_key or CAPTION_KEYS,
            workers=options.workers,
            progress=advance,
            run_pipe_commands=options.run_pipe_commands,
            subset=None if options.uids is None else open_subset(options.uids, options.uid_key),
            checksums=options.checksums,
        )
    console.print(f"catalog    {len(made)} pairs in {len(made.shards)} shards: {made.folder}")
    for reason, count in made.left_out.items():
        console.print(f"left out   {count} for {reason}")
    for line in made.damaged[:_SHOWN]:
        console.print(f"damaged    {line}")
    if len(made.damaged) > _SHOWN:
        console.print(f"damaged    {len(made.damaged) - _SHOWN} more shards")
    incomplete = sum(made.left_out.get(reason, 0) for reason in ("no image", "no caption", "URL"))
    if incomplete > len(made) and (hint := made.hint()):
        console.print(f"left out   more than there is: {hint}", markup=False)


def export(options: Export) -> None:
    """Write the model of a run at one of its checkpoints; the run may be going on."""
    path = chosen_checkpoint(options.run, "RUN_OR_CHECKPOINT")
    run = path.parent.parent
    out = options.out or run / "exports" / f"{path.name}{'-ema' if options.ema else ''}"
    ensure_writable(out)
    config = load_config(run / "config.json")
    clip = build_target(config)
    checkpoint = _sound(path)
    if checkpoint.settings["model"] != config.model:
        raise UserError(
            f"{path} is of {checkpoint.settings['model']}, {run / 'config.json'} says {config.model}: name another run"
        )
    if options.ema and not checkpoint.has(EMA):
        raise UserError(f"{path} has no moving average: leave out --ema, or train with --ema DECAY")
    state = checkpoint.full_tensors(EMA if options.ema else MODEL)
    state.pop("steps", None)
    export_model(clip, out, getattr(torch, options.weights), state)
    console.print(f"export     {out} holds the model after {checkpoint.progress['step']} steps")


def _sound(path: Path) -> Checkpoint:
    """Open a checkpoint whose files are as they were written; a run that goes on may have removed it meanwhile."""
    try:
        check_sound(path)
        return Checkpoint(path)
    except Damaged as error:
        if path.is_dir():
            raise
        raise UserError(f"{path} is no longer kept by its run: export again, or raise --keep") from error
