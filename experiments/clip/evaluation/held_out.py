"""A model's scores on the held-out pairs of a catalog, as open_clip's ``--val-data`` has them, over ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..catalog.catalog import Catalog
from ..data.reader import SKIPS_ALLOWED, Reader, Reason, Skip, decode
from ..errors import UserError
from .encoding import Encoder, Progress
from .metrics import RECALL_AT, ranks_of_first_right

LOSS = "loss"
_SIDES = ("image_to_text", "text_to_image")


class PairScores(NamedTuple):
    """The scores of the pairs that can be used, and how many cannot, by reason."""

    samples: int
    metrics: dict[str, float]
    skipped: dict[str, int]


def pair_metrics(samples: int) -> list[str]:
    """Return the metrics of a catalog of that many pairs."""
    by_side = ["mean_rank", "median_rank", *(f"R@{k}" for k in RECALL_AT if k <= samples)]
    return [LOSS, *(f"{side}_{name}" for side in _SIDES for name in by_side)]


def evaluate_pairs(
    encoder: Encoder, catalog: Catalog, skip_limit: float = 0.1, progress: Progress | None = None
) -> PairScores:
    """Score a model on a catalog's pairs, in evaluation mode (collective).

    ``loss`` is the contrastive loss at the model's own logit scale, the mean over batches of the encoder's size, in the
    catalog's order, weighted by their pairs. ``image_to_text_R@k`` is the share of images whose own caption is among
    the top k of all captions; ``mean_rank`` and ``median_rank`` are of the own caption, 1 the best; and the same from
    text to image. A sample has its first caption. All features are kept and compared in tiles.

    Raises
    ------
    UserError
        If the storage fails, features are not finite, no pair can be used, or more than ``skip_limit`` of them cannot.
    """
    read = _PairBatches(catalog, encoder)
    clip, device = encoder.clip, encoder.clip.device
    scale = _logit_scale(clip.model)
    losses = torch.zeros(len(read), dtype=torch.float64, device=device)
    used = torch.zeros(len(catalog), dtype=torch.bool, device=device)
    features: list[Tensor] = []
    skipped: Counter[str] = Counter()
    with encoder.evaluating():
        for number, batch in encoder.own_batches(read, len(read)):
            image = encoder.images(None if batch is None else batch.images)
            text = encoder.texts([] if batch is None else batch.captions)
            features = features or [torch.zeros(len(catalog), image.shape[1], device=device) for _ in _SIDES]
            if batch is not None:
                rows = torch.tensor(batch.rows, dtype=torch.int64, device=device)
                features[0][rows], features[1][rows], used[rows] = image, text, True
                losses[number] = _loss_sum(image, text, scale)
                skipped.update(batch.skipped)
            if progress is not None:
                done = number - encoder.ranks.rank + encoder.ranks.count
                progress(min(done * encoder.batch_size, len(catalog)), len(catalog))
        return _scores(encoder, [encoder.ranks.sum(part) for part in features], used, losses, skipped, skip_limit)


class _PairBatch(NamedTuple):
    images: Tensor | None  # [b, 3, h, w]
    captions: list[str]
    rows: list[int]
    skipped: dict[str, int]


class _PairBatches:
    """Reads the batches of a catalog by number."""

    def __init__(self, catalog: Catalog, encoder: Encoder) -> None:
        self._reader, self._samples, self._size = Reader(catalog), len(catalog), encoder.batch_size
        self._preprocess: Callable[[Image.Image], Tensor] = encoder.clip.in_bytes(encoder.clip.preprocess)

    def __len__(self) -> int:
        return -(-self._samples // self._size)

    def __call__(self, number: int) -> _PairBatch:
        rows = range(number * self._size, min((number + 1) * self._size, self._samples))
        images: list[Tensor] = []
        captions: list[str] = []
        indices: list[int] = []
        skipped: Counter[str] = Counter()
        for raw in self._reader.read_many(rows):
            pair = raw if isinstance(raw, Skip) else decode(raw)
            if isinstance(pair, Skip):
                skipped[pair.reason] += 1
                continue
            images.append(self._preprocess(pair.image))
            captions.append(pair.caption)
            indices.append(pair.index)
        return _PairBatch(torch.stack(images) if images else None, captions, indices, dict(skipped))


@torch.no_grad()
def _logit_scale(model: torch.nn.Module) -> Tensor:
    scale = model.get_parameter("logit_scale")
    return (scale.full_tensor() if isinstance(scale, DTensor) else scale).float().exp().reshape(())


def _loss_sum(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:  # [b, d], [b, d], []
    """Return the sum of the contrastive losses of a batch's pairs, the mean of both directions."""
    logits = scale * image @ text.T
    own = torch.arange(len(image), device=image.device)
    both = [F.cross_entropy(side, own, reduction="sum") for side in (logits, logits.T)]
    return (both[0].double() + both[1].double()) / 2


def _scores(
    encoder: Encoder, features: list[Tensor], used: Tensor, losses: Tensor, skipped: Counter[str], skip_limit: float
) -> PairScores:
    ranks = encoder.ranks
    used = ranks.sum(used.to(torch.int32)).bool()
    samples, total = int(used.sum()), len(used)
    lost = _over_ranks(encoder, skipped)
    if not samples or sum(lost.values()) > max(SKIPS_ALLOWED, skip_limit * total):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in lost.items())
        raise UserError(
            f"{sum(lost.values())} of the {total} held-out pairs cannot be used ({reasons}): correct the data, or "
            f"raise --skip-limit {skip_limit:g}"
        )
    image, text = (part[used] for part in features)
    numbers = torch.arange(samples, device=image.device)
    metrics = {LOSS: (ranks.sum(losses).sum() / samples).item()}
    for side, queries, items in zip(_SIDES, (image, text), (text, image), strict=True):
        ahead = ranks_of_first_right(queries, items, numbers, numbers, ranks).cpu().numpy()
        metrics[f"{side}_mean_rank"] = float(ahead.mean()) + 1
        metrics[f"{side}_median_rank"] = float(np.floor(np.median(ahead))) + 1
        metrics |= {f"{side}_R@{k}": float((ahead < k).mean()) for k in RECALL_AT if k <= samples}
    return PairScores(samples, metrics, lost)


def _over_ranks(encoder: Encoder, counts: Counter[str]) -> dict[str, int]:
    """Return counts by reason over all ranks."""
    reasons = sorted(get_args(Reason))
    own = torch.tensor([counts[reason] for reason in reasons], device=encoder.clip.device)
    summed = encoder.ranks.sum(own).tolist()
    return {reason: count for reason, count in zip(reasons, summed, strict=True) if count}
