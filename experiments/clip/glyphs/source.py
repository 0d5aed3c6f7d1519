"""The embedded pairs as training data: drawn once, kept in memory, with their reference features."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..catalog.catalog import CAPTION_KEYS, Catalog, make_catalog
from ..cli.options import Data, Train
from ..cli.sources import (
    TrainingData,
    held_out_as_seen,
    identity_of_others,
    models_of,
    reference_features,
    spaced,
    with_others,
)
from ..cli.terminal import console, progress_bar
from ..data.batch import Tensors
from ..distributed import Ranks
from ..errors import UserError, printable
from ..io.files import locked
from ..io.workers import spare_cores
from ..models.clip import Clip
from ..reference.cache import CachedReference
from ..reference.live import LiveReference
from .dataset import Manifest, open_dataset, write_dataset
from .drawing import faces, glyph_splits
from .evaluation import Evaluation, evaluate_model
from .stream import MemoryStream, PreparedPairs

PIXELS = 32
SMALL_FACES = ("dejavusans", "dejavusansmono", "dejavuserif", "stixgeneral")
#: The scores of a validation.
METRICS = ("naming_top1", "naming_top5")
#: Held within a cache while pairs are drawn, or counted.
LOCK = ".lock"
GLYPH_BATCH = 512  # glyphs that go through the reference at a time

LoadPairs = Callable[[Manifest, str, Clip], PreparedPairs]  # decodes a split for a model
EvaluatePairs = Callable[[Clip, PreparedPairs, Manifest, Ranks], Evaluation]  # scores a model on a held-out split


def dataset_folder(data: Data) -> Path:
    """Return where the glyph-name pairs are, or will be."""
    return data.cache / f"glyphs-{data.captions}-{data.size}"


def dataset_settings(data: Data) -> dict[str, Any]:
    """Return everything that determines the glyph-name pairs."""
    return {
        "captions": data.captions,
        "size": data.size,
        "pixels": PIXELS,
        "unicode": unicodedata.unidata_version,
    }


def prepare(data: Data) -> Manifest:
    """Return the manifest of the glyph-name pairs, after drawing and writing them if they are not there."""
    folder = dataset_folder(data)
    settings = dataset_settings(data)
    if (manifest := open_dataset(folder, settings)) is not None:
        console.print(f"data       reusing {folder}")
        return manifest
    chosen = faces() if data.size == "full" else SMALL_FACES
    with console.status("drawing the glyphs"):
        splits = glyph_splits(data.captions, PIXELS, chosen)
    total = sum(len(pairs) for pairs in splits.values())
    vocabulary = sorted({pair.meta["name"] for pairs in splits.values() for pair in pairs})
    with progress_bar("writing shards") as advance:
        manifest = write_dataset(
            folder, splits, settings, vocabulary=vocabulary, progress=lambda done: advance(done, total)
        )
    sizes = ", ".join(f"{split.name} {split.samples}" for split in manifest.splits.values())
    console.print(f"data       wrote {total} pairs to {folder} ({sizes})")
    return manifest


def load_pairs(manifest: Manifest, split: str, clip: Clip) -> PreparedPairs:
    """Decode a split into memory."""
    total = manifest.splits[split].samples
    with progress_bar(f"reading {split} pairs") as advance:
        return PreparedPairs(manifest, split, clip, lambda done: advance(done, total))


def glyph_features(reference: Clip, manifest: Manifest, cache: Path) -> CachedReference:
    """Return the reference's features of the training pairs, after computing those that are missing."""
    with locked(cache / LOCK):
        catalog = catalog_of(manifest, ("train",), cache / f"catalog-{manifest.fingerprint[:12]}")
    return features_of(reference, catalog, cache)


def catalog_of(
    manifest: Manifest, splits: Sequence[str], folder: Path, caption_key: Sequence[str] = CAPTION_KEYS
) -> Catalog:
    """Return the catalog of some splits, after writing it into ``folder`` if it is not there."""
    shards = [str(manifest.folder / shard.name) for split in splits for shard in manifest.splits[split].shards]
    return make_catalog(shards, folder, caption_key=caption_key)


def features_of(reference: Clip, catalog: Catalog, cache: Path) -> CachedReference:
    """Return a model's features of a catalog of small pictures, kept within ``cache``, computing what is missing."""
    folder = cache / f"features-{catalog.fingerprint[:12]}-{reference.fingerprint[:12]}"
    with locked(cache / f".{folder.name}.lock"):  # runs that start together share them, and wait for no others
        return reference_features(folder, reference, catalog, batch_size=GLYPH_BATCH, workers=spare_cores())


def cache_features(data: Data, reference: Clip, prepare_pairs: Callable[[Data], Manifest] = prepare) -> CachedReference:
    """Return the reference's features of the training pairs, drawing the pairs first if they are not there."""
    return glyph_features(reference, prepare_pairs(data), data.cache)


def scores(data: Data, split: str, clip: Clip) -> tuple[dict[str, Any], Table]:
    """Return the scores of a model on a held-out split, in JSON's types and as a table."""
    from . import report  # loads matplotlib

    manifest = prepare(data)
    found = evaluate_model(clip, load_pairs(manifest, split, clip), manifest).as_dict()
    return found, report.scores_table({printable(clip.name): found})


def open_data(
    options: Train, clip: Clip, reference: Clip | None, ranks: Ranks, load: LoadPairs = load_pairs
) -> TrainingData:
    """Open the embedded pairs; this is a `cli.sources.DataSource`.

    ``load`` decodes a split into memory.
    """
    return open_drawn(options, clip, reference, ranks, load, prepare, evaluate_model)


def open_drawn(
    options: Train,
    clip: Clip,
    reference: Clip | None,
    ranks: Ranks,
    load: LoadPairs,
    prepare_pairs: Callable[[Data], Manifest],
    evaluate_pairs: EvaluatePairs,
) -> TrainingData:
    """Open pairs that the program draws: ``prepare_pairs`` does so, ``evaluate_pairs`` scores a model."""
    # Runs that start together share what one of them has prepared.
    with ranks.leader_first():
        with locked(options.data.cache / LOCK):
            manifest = prepare_pairs(options.data)
        features = None
        if reference is not None:
            reference.model.to(ranks.device)
            first = glyph_features(reference, manifest, options.data.cache)
            cached = partial(glyph_features, manifest=manifest, cache=options.data.cache)
            features = with_others(options, first, reference, ranks, cached)
    samples = share(options, manifest)
    pairs = load(manifest, options.split, clip).first(samples)
    held_out = load(manifest, "validation", clip)
    assert not isinstance(features, LiveReference)  # glyphs are small: their features are always cached
    stream = MemoryStream(pairs, options.pairs_per_step, options.seed, ranks.rank, ranks.count, features)
    identity = {"data": manifest.fingerprint, "split": options.split, "fraction": options.fraction}
    identity |= identity_of_others(features)

    def validate() -> dict[str, float]:
        naming = evaluate_pairs(clip, held_out, manifest, ranks).naming
        clip.model.train()
        return dict(zip(METRICS, (naming.top1, naming.top5), strict=True))

    shown = None
    if options.loss.coefficient == "scheduled":
        assert reference is not None and features is not None  # options without one are refused
        numbers = torch.tensor(spaced(len(held_out)))

        def prepared(model: Clip) -> Tensors:
            batch = load(manifest, "validation", model).batch(numbers)
            return batch.image, batch.text

        shown = held_out_as_seen(clip, models_of(features, reference), prepared, ranks)
    return TrainingData(stream, samples, identity, validate, METRICS, features, shown)


def share(options: Train, manifest: Manifest) -> int:
    """Return how many of the embedded pairs a run trains on."""
    total = manifest.splits[options.split].samples
    samples = round(options.fraction * total)
    if samples < 2:
        raise UserError(f"--fraction {options.fraction} leaves {samples} of {total} pairs: at least 2 are needed")
    return samples
