"""What the advisor is fitted to and chooses among, and the features of pairs by which it judges a reference."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drrho.advice import Advisor, Intervention, Knowledge, log_odds

from ..catalog.catalog import Catalog
from ..data.batch import Tensors
from ..data.reader import Reader, Skip, decode
from ..errors import UserError
from ..models.clip import Clip
from .cache import CachedReference

#: Written by ``python -m experiments.benchmarks.advice`` from the results of the studies.
FITTED = Path(__file__).with_name("advice.json")
# What is advised on: settings that the studies have tried, with temperatures in units of a reference's spread.
_MENU = (
    Intervention(1.0, 0.5, "kl"),
    Intervention(0.5, 0.6, "kl"),
    Intervention(1.0, 0.1, "chi-square"),
    Intervention(1.0, 0.2, "chi-square"),
    Intervention(select="jest", candidates=5),
    Intervention(select="jest-top-k", candidates=5),
    Intervention(1.0, 0.6, "kl", "jest", 5),
)
_BATCH = 256


def menu_of(reference: Knowledge) -> list[Intervention]:
    """Return what is advised on under a reference."""
    return [how._replace(temperature=float(f"{how.temperature * reference.spread:.2g}")) for how in _MENU]


class Scale(NamedTuple):
    """From a share in a metric, such as naming top-1, to a level: ``intercept + slope x``, x being its log odds."""

    intercept: float
    slope: float

    def level(self, share: float) -> float:
        """Return the level of a model of this share."""
        return self.intercept + self.slope * log_odds(share)

    def share(self, level: float) -> float:
        """Return the share of a model of this level."""
        return 1 / (1 + math.exp(-(level - self.intercept) / self.slope))


def scale_by(scores: Sequence[float], levels: Sequence[float], slope: float = 1.0) -> Scale:
    """Return the line through references' levels against the log odds of their scores, least squares.

    ``slope`` is that where the scores do not tell one.
    """
    x, y = np.array([log_odds(score) for score in scores]), np.array(levels)
    spread = float(((x - x.mean()) ** 2).sum())
    fitted = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 0 else 0.0
    slope = fitted if fitted > 0 else slope
    return Scale(float(y.mean() - slope * x.mean()), slope)


class Fitted(NamedTuple):
    """What `FITTED` holds.

    Attributes
    ----------
    curve : list of (pairs, level)
        The course of an unsteered run, for `drrho.advice.extrapolated_level`.
    scale : Scale
        Of naming top-1 over 7,144 names, and of captions that are right.
    select_level : float
        How far a reference was at least above the unsteered run in trainings with a selection.
    """

    advisor: Advisor
    curve: list[tuple[float, float]]
    scale: Scale
    select_level: float


def read_fitted(path: Path = FITTED) -> Fitted:
    """Return what the advisor was fitted to."""
    stored = json.loads(path.read_text())
    return Fitted(
        Advisor(stored["weights"], stored["half_widths"], stored["most_unrecognized"], stored["least_level"]),
        [(pairs, level) for pairs, level in stored["curve"]],
        Scale(stored["intercept"], stored["slope"]),
        stored["select_level"],
    )


def cached_sample(features: CachedReference, count: int) -> Tensors:
    """Return the cached features ``[m, d]`` of at least ``count`` pairs, if there are so many."""
    images, texts, found = [], [], 0
    for _, image, text in features.parts():
        images.append(image)
        texts.append(text)
        found += len(image)
        if found >= count:
            break
    return torch.cat(images)[:count], torch.cat(texts)[:count]


@torch.no_grad()
def sample_features(clip: Clip, catalog: Catalog, indices: Sequence[int]) -> Tensors:
    """Return a model's features ``[m, d]`` of some pairs of a catalog; pairs that cannot be used are left out.

    Raises
    ------
    UserError
        If none can be used.
    """
    images: list[Tensor] = []
    texts: list[Tensor] = []
    for some in _batches(catalog, indices):
        pictures, captions = zip(*some, strict=True)
        images.append(clip.encode_image(torch.stack([clip.preprocess(each) for each in pictures])).float().cpu())
        texts.append(clip.encode_text(captions).float().cpu())
    if not images:
        raise UserError(f"none of {len(indices)} pairs of {catalog.folder} can be used: check the shards")
    return torch.cat(images), torch.cat(texts)


def _batches(catalog: Catalog, indices: Sequence[int]) -> Iterator[list[tuple[Image.Image, str]]]:
    batch: list[tuple[Image.Image, str]] = []
    for raw in Reader(catalog).read_many(indices):
        pair = raw if isinstance(raw, Skip) else decode(raw)
        if not isinstance(pair, Skip):
            batch.append((pair.image, pair.caption))
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
