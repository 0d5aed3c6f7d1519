"""What a run trains and is validated on: pairs, the reference's view of them, and scores of the model."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from experiments.clip.cli.options import Data, Train
from experiments.clip.cli.terminal import console, progress_bar
from experiments.clip.data.catalog import Catalog, make_catalog, open_catalog
from experiments.clip.data.loader import Loader
from experiments.clip.data.reader import Reader, Skip, decode
from experiments.clip.data.sources import parse_weights
from experiments.clip.distributed import Ranks
from experiments.clip.errors import UserError
from experiments.clip.evaluation.metrics import Evaluation, evaluate
from experiments.clip.evaluation.tasks import evaluate_task
from experiments.clip.glyphs.dataset import Manifest, open_dataset, write_dataset
from experiments.clip.glyphs.drawing import faces, glyph_splits
from experiments.clip.glyphs.stream import MemoryStream, Pairs
from experiments.clip.io.files import locked
from experiments.clip.models.clip import Clip
from experiments.clip.reference.cache import FeatureCache, cache_features, open_features
from experiments.clip.reference.inputs import SPREAD_PAIRS, CachedGuide, Guide, LiveGuide
from experiments.clip.training.trainer import Record, Stream

PIXELS = 32
SMALL_FACES = ("dejavusans", "dejavusansmono", "dejavuserif", "stixgeneral")
GLYPH_BATCH = 512  # that goes through the reference at a time

ALONE = Ranks()


class Material(NamedTuple):
    """A stream, its number of samples and identity, the reference beside it, scores of the model as it stands."""

    stream: Stream
    samples: int
    identity: dict[str, Any]
    validate: Callable[[], Record]
    guide: Guide | None = None


def dataset_folder(data: Data) -> Path:
    """Return where the glyph-name pairs are, or will be."""
    return data.cache / f"glyphs-{data.captions}-{data.size}"


def dataset_settings(data: Data) -> dict[str, Any]:
    """Return all that the glyph-name pairs follow from."""
    return {
        "captions": data.captions,
        "size": data.size,
        "pixels": PIXELS,
        "unicode": unicodedata.unidata_version,
    }


def prepare(data: Data) -> Manifest:
    """Return the shards of the glyph-name pairs, drawing and writing them if they are not there yet."""
    folder = dataset_folder(data)
    settings = dataset_settings(data)
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


LoadPairs = Callable[[Manifest, str, Clip], Pairs]  # of a split, for a model


def glyph_features(reference: Clip, manifest: Manifest, cache: Path) -> FeatureCache:
    """Return the reference's features of the training pairs, computing what is not there yet."""
    shards = [str(manifest.folder / shard.name) for shard in manifest.splits["train"].shards]
    catalog = make_catalog(shards, cache / f"catalog-{manifest.fingerprint[:12]}")
    folder = cache / f"features-{catalog.fingerprint[:12]}-{reference.fingerprint[:12]}"
    return features_in(folder, reference, catalog, batch_size=GLYPH_BATCH)


def features_in(folder: Path, reference: Clip, catalog: Catalog, ranks: Ranks = ALONE, **options: Any) -> FeatureCache:
    """Return the reference's features of a catalog, all ranks computing what is not there yet."""
    with progress_bar("reference features") as advance:
        computed = ranks.agreed(
            lambda: cache_features(reference, catalog, folder, ranks=ranks, progress=advance, **options)
        )
    console.print(f"features   {f'computed {computed} rows into' if computed else 'reusing'} {folder}")
    return open_features(reference, catalog, folder)


def evaluate_model(clip: Clip, pairs: Pairs, manifest: Manifest, ranks: Ranks = ALONE) -> Evaluation:
    """Score a model on held-out pairs: naming over all names, attributes, retrieval; ranks share the encoding."""
    clip.model.eval()

    def encode(captions: Sequence[str]) -> Tensor:
        return clip.encode_tokens(_tokens(clip.tokenize, tuple(captions)))

    encode_image, encode_text = ranks.sharing(clip.encode_image), ranks.sharing(encode)
    return evaluate(encode_image, encode_text, pairs.image_batches(), pairs.captions, manifest.vocabulary)


@lru_cache(maxsize=64)
def _tokens(tokenize: Callable[[Sequence[str]], Tensor], captions: tuple[str, ...]) -> Tensor:
    """Return tokens; the names among which every validation chooses are the same."""
    return tokenize(captions)


def glyph_material(
    options: Train, clip: Clip, reference: Clip | None, ranks: Ranks, load: LoadPairs = load_pairs
) -> Material:
    """Return the embedded pairs, in memory, with the reference's features."""
    # Runs that start together find made what they share.
    with ranks.leader_first(), locked(options.data.cache / ".lock") if ranks.leads else nullcontext():
        manifest = prepare(options.data)
        features = None if reference is None else glyph_features(reference, manifest, options.data.cache)
    samples = share(options, manifest)
    pairs = load(manifest, options.split, clip).first(samples)
    held_out = load(manifest, "validation", clip)

    def validate() -> Record:
        naming = evaluate_model(clip, held_out, manifest, ranks).naming
        clip.model.train()
        return {"naming_top1": naming.top1, "naming_top5": naming.top5}

    stream = MemoryStream(pairs, options.pairs_per_step, options.seed, ranks.rank, ranks.count, features)
    identity = {"data": manifest.fingerprint, "split": options.split, "fraction": options.fraction}
    guide = None if features is None else CachedGuide(features, min(samples, SPREAD_PAIRS))
    return Material(stream, samples, identity, validate, guide)


def share(options: Train, manifest: Manifest) -> int:
    """Return how many of the embedded pairs a run trains on."""
    whole = manifest.splits[options.split].samples
    samples = round(options.fraction * whole)
    if samples < 2:
        raise UserError(f"--fraction {options.fraction} leaves {samples} of {whole} pairs: at least 2 are needed")
    return samples


def catalog_material(options: Train, clip: Clip, reference: Clip | None, folder: Path, ranks: Ranks) -> Material:
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
    guide: Guide | None = None
    if reference is not None and shards.reference_features is not None:
        cache = open_features(reference, catalog, shards.reference_features)
        guide = CachedGuide(cache)
        console.print(f"features   {shards.reference_features}, views of a sample: {cache.views}")
    elif reference is not None:
        reference.model.to(ranks.device)
        parts = options.optimization.accumulation * options.selection.scored_per_pair
        guide = LiveGuide(reference, parts, partial(first_pairs, catalog, SPREAD_PAIRS))
        console.print("features   computed while training: `run.py cache-reference` computes them once")
    loader = Loader(
        catalog,
        clip.augment,
        clip.tokenize,
        batch_size=options.pairs_per_step,
        seed=options.seed,
        workers=shards.workers,
        rank=ranks.rank,
        ranks=ranks.count,
        weights=weights,
        skip_limit=shards.skip_limit,
        pin_memory=ranks.device.type == "cuda",
        guide=guide,
        **chosen,
    )
    console.print(f"data       {len(catalog)} pairs of {folder}, {loader.steps_per_epoch} steps an epoch")

    def validate() -> Record:
        return dict(task_scores(clip, shards.tasks, ranks))

    identity = {"data": catalog.fingerprint, "weights": weights, **chosen}
    if reference is not None:
        identity["reference_views"] = guide.views if isinstance(guide, CachedGuide) else "live"
    return Material(loader, len(catalog), identity, validate, guide)


def first_pairs(catalog: Catalog, count: int) -> list[tuple[Image.Image, str]]:
    """Return images and captions of the first samples that can be used, among ``count``."""
    reader = Reader(catalog)
    found = [raw if isinstance(raw, Skip) else decode(raw) for raw in reader.read_many(range(min(count, len(catalog))))]
    return [(pair.image, pair.caption) for pair in found if not isinstance(pair, Skip)]


def task_scores(clip: Clip, tasks: Sequence[Path], ranks: Ranks = ALONE) -> Iterator[tuple[str, float]]:
    """Yield the name and value of every metric of these tasks."""
    for folder in tasks:
        scores = evaluate_task(clip, folder, ranks)
        for metric, value in scores.metrics.items():
            yield f"{scores.name}/{metric}", value
