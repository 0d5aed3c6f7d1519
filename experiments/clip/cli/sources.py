"""Where training pairs come from: the one place through which data enter a training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from drrho.mixture import mixed_references

from ..catalog.catalog import Catalog, check_shards, open_catalog
from ..catalog.sources import parse_weights
from ..data.batch import HeldOut, Reference, Stream, Tensors
from ..data.loader import Loader
from ..data.reader import MAX_IMAGE_BYTES, Reader, Skip, decode, decode_image, first_pairs, pairs_at
from ..distributed import ONE_PROCESS, Ranks
from ..errors import PROGRAM, UserError
from ..evaluation.encoding import Encoder
from ..evaluation.held_out import evaluate_pairs, pair_metrics
from ..evaluation.task_files import Task
from ..evaluation.tasks import evaluate_task, metric_names, open_tasks
from ..io.storage import refuse_without_ranges
from ..io.workers import usual_workers
from ..models.clip import Clip, load_model
from ..models.options import geometry
from ..ranges import refuse_if_given
from ..reference.cache import CachedReference, cache_features, open_features
from ..reference.live import LiveReference
from ..reference.several import SeveralReferences
from .options import SOURCES, Check, Data, DataName, Reading, Shards, Train
from .terminal import console, progress_bar

#: What stands before the names of the scores of held-out pairs.
HELD_OUT = "held_out"
VALIDATION_BATCH = 64
_TRIED_PAIRS = 16  # held-out pairs that are read before the first step
_HELD_OUT_PAIRS = 512  # that a scheduled coefficient is measured on


class TrainingData(NamedTuple):
    """What a run trains on, and how it is validated.

    Attributes
    ----------
    samples : int
        Distinct samples that the stream visits.
    identity : dict
        What the weights depend on, in JSON's types.
    validate : callable
        Scores the model as it stands.
    metrics : sequence of str
        The names of those scores.
    reference : Reference, optional
        Gives the reference's features of a batch.
    held_out : HeldOut, optional
        The pairs that a scheduled coefficient is measured on.
    """

    stream: Stream
    samples: int
    identity: dict[str, Any]
    validate: Callable[[], dict[str, float]]
    metrics: Sequence[str]
    reference: Reference | None = None
    held_out: HeldOut | None = None


class DataSource(Protocol):
    """Opens the pairs that the options name, for the model that is trained and the reference beside it."""

    def __call__(self, options: Train, clip: Clip, reference: Clip | None, ranks: Ranks) -> TrainingData:
        """Open them; see `TrainingData`."""
        ...


class Validation(NamedTuple):
    """What a model is scored on, opened: zero-shot tasks, and the catalog of held-out pairs if there is one."""

    tasks: list[Task]
    held_out: Catalog | None

    def metrics(self) -> list[str]:
        """Return the names of all scores: ``TASK/METRIC``, and ``held_out/METRIC``."""
        names = [f"{task.name}/{metric}" for task in self.tasks for metric in metric_names(task)]
        pairs = pair_metrics(len(self.held_out)) if self.held_out is not None else []
        return names + [f"{HELD_OUT}/{metric}" for metric in pairs]

    def scores(self, encoder: Encoder, skip_limit: float) -> dict[str, float]:
        """Return all scores by name (collective)."""
        found: dict[str, float] = {}
        for task in self.tasks:
            of_task = evaluate_task(encoder, task)
            found |= {f"{task.name}/{metric}": value for metric, value in of_task.metrics.items()}
        if self.held_out is not None:
            of_pairs = evaluate_pairs(encoder, self.held_out, skip_limit)
            found |= {f"{HELD_OUT}/{metric}": value for metric, value in of_pairs.metrics.items()}
        return found


def open_validation(tasks: Sequence[Path], val_data: Path | None, ranks: Ranks = ONE_PROCESS) -> Validation:
    """Open tasks and held-out pairs, so that what is wrong with them is said before any work (collective)."""
    opened = ranks.run_on_all_or_fail(lambda: open_tasks(tasks))
    if val_data is not None and any(task.name == HELD_OUT for task in opened):
        raise UserError(f"--tasks has a folder called {HELD_OUT}, as the scores of --val-data are: rename it")
    if val_data is None:
        return Validation(opened, None)
    held_out = open_shared_catalog(val_data, ranks)

    def try_some() -> None:
        if not first_pairs(held_out, _TRIED_PAIRS):
            raise UserError(
                f"none of the first {min(_TRIED_PAIRS, len(held_out))} pairs of --val-data {val_data} can be used: "
                "make its catalog again, from images that are there"
            )

    ranks.run_on_all_or_fail(try_some)
    return Validation(opened, held_out)


def open_shared_catalog(
    folder: Path, ranks: Ranks, reading: Reading | None = None, check: Check | None = None
) -> Catalog:
    """Open a catalog on all ranks, of whose shards each looks at a share (collective)."""
    catalog = ranks.run_on_all_or_fail(lambda: open_catalog(folder, verify=False))
    own = ranks.own_indices(len(catalog.shards))

    def look() -> None:
        check_shards(catalog, own, check)
        if reading != "shards":
            urls = [catalog.shards[number].path for number in own if catalog.shards.remote[number]]
            for url in {urlsplit(url)[:2]: url for url in urls}.values():
                refuse_without_ranges(url)

    ranks.run_on_all_or_fail(look)
    return catalog


def _order_options(shards: Shards, catalog: Catalog) -> dict[str, Any]:
    """Return what the order of the samples depends on, beside their weights."""
    reading = shards.reading or ("blocks" if catalog.shards.remote.any() else "random")
    drawn = {"resampled": shards.resampled, "epoch_samples": shards.epoch_samples}
    if reading == "random":
        refuse_if_given(shards, "block_folder", "--reading blocks or shards, as remote shards are")
        return {**drawn, "block_shards": shards.block_shards}
    refuse_if_given(shards, "block_shards", "--reading random, as local shards are")
    return {**drawn, "reading": reading}


class EmbeddedPairs(Protocol):
    """What the module of pairs that the program draws itself offers, beside what takes these pairs' own types."""

    #: These take and return types of the room of glyphs, which stands above this one.
    prepare: Callable[..., Any]
    open_data: Callable[..., TrainingData]
    evaluate_model: Callable[..., Any]

    def dataset_settings(self, data: Data) -> dict[str, Any]:
        """Return what determines the pairs."""
        ...

    def scores(self, data: Data, split: str, clip: Clip) -> tuple[dict[str, Any], Table]:
        """Return the scores of a model on a held-out split, in JSON's types and as a table."""
        ...

    def cache_features(self, data: Data, reference: Clip) -> CachedReference:
        """Return the reference's features of the training pairs, computing what is missing."""
        ...


def embedded_pairs(name: DataName) -> EmbeddedPairs:
    """Return the module of such pairs."""
    return import_module(SOURCES[name])  # pyright: ignore[reportReturnType]


def open_training_data(options: Train, clip: Clip, reference: Clip | None, ranks: Ranks) -> TrainingData:
    """Open the source that the options name."""
    source: DataSource = import_module(SOURCES[options.source]).open_data
    return source(options, clip, reference, ranks)


def open_data(options: Train, clip: Clip, reference: Clip | None, ranks: Ranks) -> TrainingData:
    """Open a catalog: its pairs are read while training, and its zero-shot tasks validate the model."""
    shards, folder = options.shards, options.shards.catalog
    assert folder is not None
    validation = open_validation(shards.tasks, shards.val_data, ranks)
    catalog = open_shared_catalog(folder, ranks, shards.reading, shards.check_shards)
    weights = None if shards.source_weights is None else parse_weights(shards.source_weights, len(catalog.sources))
    order = _order_options(shards, catalog)
    identity = {"data": catalog.fingerprint, "weights": weights, **order}
    caption_weights: list[float] = []
    if shards.caption_weights is not None:
        caption_weights = identity["caption_weights"] = catalog.caption_weights(shards.caption_weights)
    beside: Reference | None = None
    if reference is not None:
        cached, others = shards.reference_features, iter(shards.more_reference_features)
        first, identity["reference_views"] = _beside(options, catalog, reference, cached, ranks)
        beside = with_others(
            options, first, reference, ranks, lambda clip: _beside(options, catalog, clip, next(others, None), ranks)[0]
        )
        identity |= identity_of_others(beside)
    workers = usual_workers() if shards.workers is None else shards.workers
    if shards.in_memory:
        workers, identity["in_memory"] = 0, True
        _check_in_memory(order, beside)
    loader = Loader(
        catalog,
        clip.in_bytes(clip.preprocess if shards.in_memory else clip.augment),
        clip.tokenize,
        batch_size=options.pairs_per_step,
        seed=options.seed,
        workers=workers,
        rank=ranks.rank,
        ranks=ranks.count,
        weights=weights,
        copies=shards.block_folder,
        skip_limit=shards.skip_limit,
        pin_memory=ranks.device.type == "cuda",
        reference=beside,
        caption_weights=caption_weights,
        in_memory=shards.in_memory,
        **order,
    )
    how = f", read in {order['reading']}" if "reading" in order else ""
    steps = loader.steps_per_epoch
    console.print(f"data       {len(catalog)} pairs of {folder}, {steps} steps an epoch, {workers} workers a rank{how}")
    encoder = Encoder(
        clip,
        ranks,
        shards.validation_batch_size or VALIDATION_BATCH,
        workers,
        options.execution.precision or "float32",
        tf32=not options.execution.full_float32,
    )
    validate = partial(validation.scores, encoder, shards.skip_limit)
    shown = None
    if options.loss.coefficient == "scheduled":
        assert beside is not None and reference is not None and validation.held_out is not None  # others are refused
        shown = _held_out_of(validation.held_out, clip, models_of(beside, reference), ranks)
        identity["held_out"] = validation.held_out.fingerprint
    return TrainingData(loader, len(catalog), identity, validate, validation.metrics(), beside, shown)


def _held_out_of(catalog: Catalog, clip: Clip, references: Sequence[Clip], ranks: Ranks) -> HeldOut:
    """Return pairs of a catalog of held-out ones, evenly spaced over it."""
    pairs = ranks.run_on_all_or_fail(lambda: pairs_at(catalog, spaced(len(catalog))))
    if len(pairs) < 2:
        raise UserError(
            f"--coefficient scheduled compares held-out pairs, of which {catalog.folder} has {len(pairs)} that can be "
            "used: give more as --val-data"
        )
    images, captions = zip(*pairs, strict=True)

    def prepared(model: Clip) -> Tensors:
        preprocess: Callable[[Image.Image], Tensor] = model.in_bytes(model.preprocess)
        return torch.stack(list(map(preprocess, images))), model.tokenize(list(captions))

    return held_out_as_seen(clip, references, prepared, ranks)


def spaced(count: int) -> list[int]:
    """Return the numbers of the held-out pairs, of so many, that a scheduled coefficient is measured on."""
    return np.linspace(0, count - 1, min(count, _HELD_OUT_PAIRS)).round().astype(int).tolist()


def models_of(beside: Reference, reference: Clip) -> list[Clip]:
    """Return the models of a run's reference, or of all where it has several."""
    return beside.clips if isinstance(beside, SeveralReferences) else [reference]


def held_out_as_seen(
    clip: Clip, references: Sequence[Clip], prepared: Callable[[Clip], Tensors], ranks: Ranks
) -> HeldOut:
    """Return held-out pairs as the target takes them, with the features of its reference, or of several.

    ``prepared`` returns images and tokens of these pairs for a model.
    """
    found = []
    for each in references:
        home = each.device  # where it stays: one whose features are cached takes no memory of the device
        each.model.to(ranks.device)
        found.append(each.features_in_parts(*prepared(each)))
        each.model.to(home)
    image, text = prepared(clip)
    return HeldOut(image, text, found[0] if len(found) == 1 else mixed_references(found))


def _check_in_memory(order: Mapping[str, Any], beside: Reference | None) -> None:
    """Refuse remote shards, and features of several views, for pairs that are kept as they are at their first visit."""
    if "reading" in order:
        raise UserError("--in-memory reads local shards, here are remote ones: copy them, or leave it out")
    if isinstance(beside, CachedReference | SeveralReferences) and beside.views > 1:
        raise UserError(f"--in-memory shows one view of a pair, the features have {beside.views}: cache one view")


Opened = CachedReference | LiveReference


def with_others(
    options: Train, first: Opened, reference: Clip, ranks: Ranks, beside: Callable[[Clip], Opened]
) -> Opened | SeveralReferences:
    """Return a run's reference, or all of them where it has several; ``beside`` opens the features of one.

    Models are loaded as `building.build_models` loads the first.
    """
    loss = options.loss
    if not loss.more_references:
        return first
    crops = {"aug_cfg": geometry(options.inputs.aug_cfg) or None}
    clips = [load_model(path, None, crops) for path in loss.more_references]
    for clip in clips:
        clip.model.to(ranks.device)
    parts = [first, *map(beside, clips)]
    return SeveralReferences(parts, [reference, *clips], loss.combine or "mean")


def identity_of_others(reference: Reference | None) -> dict[str, Any]:
    """Return what the weights depend on of further references."""
    several = isinstance(reference, SeveralReferences)
    return {"more_references": reference.fingerprints[1:]} if several else {}


def _beside(
    options: Train, catalog: Catalog, reference: Clip, folder: Path | None, ranks: Ranks
) -> tuple[Opened, int | str]:
    """Return the reference's cached features, or the reference itself to run; and how many views are cached."""
    if folder is not None:
        cached = open_features(reference, catalog, folder, ranks)
        console.print(f"features   {folder}, views of a sample: {cached.views}")
        if cached.views > 1 and options.inputs.aug_cfg:
            raise UserError(
                f"--aug-cfg does not fit {folder}: its {cached.views} crops of an image are the reference's own, which "
                "the target is shown too; leave it out, or the reference features"
            )
        return cached, cached.views
    reference.model.to(ranks.device)
    if options.execution.compile:
        reference.compile()
    parts = options.optimization.accumulation * options.selection.scored_per_pair
    console.print(f"features   computed while training: `{PROGRAM} cache-reference` computes them once")
    return LiveReference(reference, parts, partial(first_pairs, catalog)), "live"


def reference_features(
    folder: Path, reference: Clip, catalog: Catalog, ranks: Ranks = ONE_PROCESS, **options: Any
) -> CachedReference:
    """Return the reference's features of a catalog; all ranks compute what is missing."""
    with progress_bar("reference features") as advance:
        computed = ranks.run_on_all_or_fail(
            lambda: cache_features(reference, catalog, folder, ranks=ranks, progress=advance, **options)
        )
    console.print(f"features   {f'computed {computed} rows into' if computed else 'reusing'} {folder}")
    return open_features(reference, catalog, folder, ranks)


class Shown(NamedTuple):
    """A sample to be shown: ``details`` is what its member ``json`` holds, where the catalog reads a field of it."""

    image: Image.Image
    caption: str
    details: dict[str, Any]


def shown_samples(catalog: Catalog, indices: Sequence[int]) -> list[Shown]:
    """Return the pictures of some samples, with their first caption.

    Raises
    ------
    UserError
        If one of them can no longer be decoded.
    """
    found = []
    for raw in Reader(catalog).read_many(indices):
        pair = raw if isinstance(raw, Skip) else decode(raw)
        if isinstance(raw, Skip) or isinstance(pair, Skip):
            raise UserError(f"the sample {raw.index} of {catalog.folder} cannot be shown: make the catalog again")
        members = [json.loads(data) for data, field in raw.captions if field is not None]
        found.append(Shown(pair.image, pair.caption, dict(members[0]) if members else {}))
    return found


def read_image(path: Path) -> Image.Image:
    """Return the picture in a file, as RGB.

    Raises
    ------
    UserError
        If the file cannot be read, or is no JPEG, PNG or WebP.
    """
    try:
        with path.open("rb") as file:
            return decode_image(file.read(MAX_IMAGE_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a picture") from error
    except ValueError as error:
        raise UserError(f"{path} is no picture in JPEG, PNG or WebP ({error}): name another") from error
