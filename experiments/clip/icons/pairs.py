"""The icons as training data: in memory, with their reference features, validated by naming."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.table import Table

from ..cli.options import Data, Train
from ..cli.sources import TrainingData
from ..distributed import ONE_PROCESS, Ranks
from ..errors import printable
from ..glyphs import source as glyphs
from ..glyphs.dataset import Manifest
from ..glyphs.evaluation import Evaluation, encoders_of, evaluate
from ..glyphs.source import LoadPairs, load_pairs, open_drawn
from ..glyphs.stream import PreparedPairs
from ..models.clip import Clip
from .source import dataset_settings, prepare

__all__ = ["cache_features", "dataset_settings", "evaluate_model", "open_data", "prepare", "scores"]


def evaluate_model(clip: Clip, pairs: PreparedPairs, manifest: Manifest, ranks: Ranks = ONE_PROCESS) -> Evaluation:
    """Score a model on held-out icons by naming over all distinct names of these, and by retrieval."""
    images, names = pairs.image_batches(), sorted(set(pairs.captions))
    return evaluate(*encoders_of(clip, ranks), images, pairs.captions, names, attributes_of=lambda captions: ())


def open_data(
    options: Train, clip: Clip, reference: Clip | None, ranks: Ranks, load: LoadPairs = load_pairs
) -> TrainingData:
    """Open the icons; this is a `cli.sources.DataSource`."""
    return open_drawn(options, clip, reference, ranks, load, prepare, evaluate_model)


def scores(data: Data, split: str, clip: Clip) -> tuple[dict[str, Any], Table]:
    """Return the scores of a model on a held-out split, in JSON's types and as a table."""
    manifest = prepare(data)
    found = evaluate_model(clip, load_pairs(manifest, split, clip), manifest)
    table = Table("model", "icons", "names", "top-1, %", "top-5, %", "image to text R@1, %", "text to image R@1, %")
    naming, retrieval = found.naming, found.retrieval
    shares = (naming.top1, naming.top5, retrieval.image_to_text[1], retrieval.text_to_image[1])
    table.add_row(
        printable(clip.name), str(naming.samples), str(naming.classes), *(f"{100 * share:.2f}" for share in shares)
    )
    return found.as_dict(), table


#: Compute the reference's features of the training icons, drawing them first if they are not there.
cache_features = partial(glyphs.cache_features, prepare_pairs=prepare)
