"""Zero-shot metrics as pure functions of features and labels.

In `naming`, `zero_shot` and `retrieval` a query is answered within the top k when fewer than k wrong items score at
least as high as its best right item. Ties therefore count against the model, and a model whose features have collapsed
to one point scores zero instead of one. `wrong_items_ahead` breaks ties by the items' order instead, as CLIP_benchmark
does: no tolerance makes the two counts one.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import Ranks

RECALL_AT = (1, 5, 10)

# A matrix product may round equal rows differently at the edge of a block, so cosines this close are ties.
_TIE = 1e-6
_QUERIES, _ITEMS = 1024, 4096  # a tile of cosines
TILE = 2048  # items of a tile that stays in a cache


class Naming(NamedTuple):
    """Image-to-caption accuracy over the whole vocabulary of captions."""

    top1: float
    top5: float
    chance: float
    samples: int
    classes: int


class ZeroShot(NamedTuple):
    """Accuracy of a prompt-template classifier; ``balanced`` is the mean recall over classes with samples."""

    top1: float
    balanced: float
    chance: float
    samples: int
    classes: int


class Retrieval(NamedTuple):
    """Share of queries with at least one right item in the top k, for each k."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def naming(
    image_features: Tensor,  # [n, d]
    caption_features: Tensor,  # [c, d]
    labels: Tensor,  # [n], positions among the captions
    chunk: int = _QUERIES,
) -> Naming:
    """Score every image against every caption of the vocabulary, ``chunk`` images at a time."""
    ranks = _classification_ranks("caption_features", image_features, caption_features, labels, chunk)
    classes = len(caption_features)
    return Naming(_recall(ranks, 1), _recall(ranks, 5), 1 / classes, len(ranks), classes)


def zero_shot(
    image_features: Tensor,  # [n, d]
    classifier: Tensor,  # [c, d]
    labels: Tensor,  # [n], positions among the classes
    chunk: int = _QUERIES,
) -> ZeroShot:
    """Score the images against the class vectors; classes without samples compete but have no recall."""
    ranks = _classification_ranks("classifier", image_features, classifier, labels, chunk)
    labels, classes = labels.cpu(), len(classifier)
    samples = labels.bincount(minlength=classes)
    correct = labels[ranks < 1].bincount(minlength=classes)
    present = samples > 0
    balanced = (correct[present].double() / samples[present]).mean().item()
    return ZeroShot(_recall(ranks, 1), balanced, 1 / classes, len(labels), classes)


def retrieval(
    image_features: Tensor,  # [n, d]
    text_features: Tensor,  # [m, d]
    image_labels: Tensor,  # [n]
    text_labels: Tensor,  # [m]
    chunk: int = _QUERIES,
) -> Retrieval:
    """Return R@k both ways, where an image and a text match when their labels are equal.

    R@k is the share of queries with at least one right item in the top k, as in CLIP_benchmark.
    """
    images = finite_features("image_features", image_features)
    texts = finite_features("text_features", text_features)
    image_labels = _labels("image_labels", image_labels, images)
    text_labels = _labels("text_labels", text_labels, texts)
    for name, own, other in (
        ("image_labels", image_labels, text_labels),
        ("text_labels", text_labels, image_labels),
    ):
        alone = own[~torch.isin(own, other)]
        if len(alone):
            raise ValueError(f"{name} has {alone[0].item()}, which the other side lacks; drop it")
    to_text = _wrong_items_not_below(images, texts, image_labels, text_labels, chunk)
    to_image = _wrong_items_not_below(texts, images, text_labels, image_labels, chunk)
    return Retrieval(*({k: _recall(ranks, k) for k in RECALL_AT} for ranks in (to_text, to_image)))


def predictions(
    image_features: Tensor,  # [n, d]
    caption_features: Tensor,  # [c, d]
    k: int,
) -> tuple[Tensor, Tensor]:  # [n, k], [n, k]
    """Return the k highest cosines of each image, best first, and the positions of their captions."""
    images, captions = (
        finite_features("image_features", image_features),
        unit_features("caption_features", caption_features),
    )
    if not 1 <= k <= len(captions):
        raise ValueError(f"k is {k}; choose it from 1 to the number of captions, {len(captions)}")
    best = [(F.normalize(some, dim=-1) @ captions.T).topk(k) for some in images.split(_QUERIES)]
    return torch.cat([some.values for some in best]), torch.cat([some.indices for some in best])


def unit_features(name: str, features: Tensor) -> Tensor:  # [n, d] -> [n, d]
    """Return the features in float32 and of unit length; refuse those that `finite_features` refuses."""
    return F.normalize(finite_features(name, features), dim=-1)


def finite_features(name: str, features: Tensor) -> Tensor:  # [n, d] -> [n, d]
    """Return the features in float32; refuse, by ``name``, none at all and those that are not finite."""
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name} has shape {tuple(features.shape)}; pass at least one feature as [n, d]")
    features = features.detach().float()
    bad = int(sum((~some.isfinite()).any(dim=1).sum() for some in features.split(_ITEMS)))
    if bad:
        raise ValueError(
            f"{name} has non-finite values in {bad} of {len(features)} rows; "
            "evaluate a checkpoint from before the model diverged"
        )
    return features


def _labels(name: str, labels: Tensor, features: Tensor) -> Tensor:  # [n], [n, d] -> [n]
    if labels.shape != features.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(labels.shape)} for {len(features)} features; pass one for each")
    return labels.to(features.device)


def _classification_ranks(
    classifier_name: str,
    image_features: Tensor,  # [n, d]
    classifier: Tensor,  # [c, d]
    labels: Tensor,  # [n]
    chunk: int,
) -> Tensor:  # [n]
    images, classifier = finite_features("image_features", image_features), finite_features(classifier_name, classifier)
    labels = _labels("labels", labels, images)
    classes = torch.arange(len(classifier), device=images.device)
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise ValueError(f"labels has {outside[0].item()}; keep labels from 0 to {len(classes) - 1}")
    return _wrong_items_not_below(images, classifier, labels, classes, chunk)


def _wrong_items_not_below(
    queries: Tensor,  # [n, d]
    items: Tensor,  # [m, d]
    query_labels: Tensor,  # [n]
    item_labels: Tensor,  # [m]
    chunk: int,
) -> Tensor:  # [n]
    """Count, for each query, the wrong items whose cosine is at least that of its best right item.

    Scores are taken for ``chunk`` queries and `_ITEMS` items at a time.
    """
    ranks = torch.zeros_like(query_labels)
    for some, labels, ahead in zip(queries.split(chunk), query_labels.split(chunk), ranks.split(chunk), strict=True):
        some = F.normalize(some, dim=-1)
        best = some.new_full((len(some), 1), -torch.inf)
        for scores, right in _scores(some, items, labels, item_labels):
            best = best.maximum(scores.masked_fill_(~right, -torch.inf).amax(dim=1, keepdim=True))
        for scores, right in _scores(some, items, labels, item_labels):
            ahead += (~right & (scores >= best - _TIE)).sum(dim=1)
    return ranks.cpu()


def _scores(
    queries: Tensor,  # [b, d]
    items: Tensor,  # [m, d]
    query_labels: Tensor,  # [b]
    item_labels: Tensor,  # [m]
) -> Iterator[tuple[Tensor, Tensor]]:  # [b, k], [b, k]
    """Yield the cosines of the items, tile by tile, and which of them are right."""
    for some, labels in zip(items.split(_ITEMS), item_labels.split(_ITEMS), strict=True):
        yield queries @ F.normalize(some, dim=-1).T, query_labels[:, None] == labels


def wrong_items_ahead(
    queries: Tensor,  # [q, d]
    items: Tensor,  # [m, d]
    query_labels: Tensor,  # [q]
    item_labels: Tensor,  # [m]
    tile: int,
) -> Tensor:  # [q]
    """Count, for each query, the wrong items ahead of its first right item in a stable sort by descending score.

    An item is right when its label is the query's. Scores are inner products, taken for ``tile`` items at a time: no
    matrix ``[q, m]`` is made.
    """
    best = queries.new_full((len(queries),), -torch.inf)
    place = torch.full((len(queries),), len(items), device=queries.device)
    ahead = torch.zeros_like(place)
    starts = range(0, len(items), tile)
    parts = list(zip(starts, items.split(tile), item_labels.split(tile), strict=True))
    low, high = query_labels.min(), query_labels.max()
    may_be_right = torch.stack([(labels.max() >= low) & (labels.min() <= high) for _, _, labels in parts]).tolist()
    for start, some, labels in itertools.compress(parts, may_be_right):
        score, position = (queries @ some.T).masked_fill_(query_labels[:, None] != labels, -torch.inf).max(dim=1)
        place = torch.where(score > best, position + start, place)
        best = best.maximum(score)
    # What is higher than the best right item, or the same and before the first such, is wrong: labels do not matter.
    at_least = best.nextafter(torch.full_like(best, -torch.inf))  # more than this
    for start, some, _ in parts:
        scores = queries @ some.T
        before = place - start  # items of this tile
        ahead += (scores > torch.where(before > 0, at_least, best)[:, None]).sum(dim=1, dtype=torch.int32)
        rows = ((before > 0) & (before < len(some))).nonzero()[:, 0]
        behind = torch.arange(len(some), device=queries.device) >= before[rows, None]
        ahead[rows] -= ((scores[rows] == best[rows, None]) & behind).sum(dim=1)
    return ahead


def recalls(
    queries: Tensor,  # [q, d]
    items: Tensor,  # [m, d]
    query_labels: Tensor,  # [q]
    item_labels: Tensor,  # [m]
    ranks: Ranks,
) -> dict[int, float]:
    """Return R@k for each k up to the number of items; ranks share the queries (collective)."""
    ahead = ranks_of_first_right(queries, items, query_labels, item_labels, ranks)
    return {k: _recall(ahead, k) for k in RECALL_AT if k <= len(items)}


def ranks_of_first_right(
    queries: Tensor,  # [q, d]
    items: Tensor,  # [m, d]
    query_labels: Tensor,  # [q]
    item_labels: Tensor,  # [m]
    ranks: Ranks,
) -> Tensor:  # [q]
    """Return `wrong_items_ahead` of all queries, which ranks share in tiles (collective)."""
    ahead = torch.zeros_like(query_labels)
    for number in ranks.own_indices(-(-len(queries) // _QUERIES)):
        rows = slice(number * _QUERIES, (number + 1) * _QUERIES)
        ahead[rows] = wrong_items_ahead(queries[rows], items, query_labels[rows], item_labels, TILE)
    return ranks.sum(ahead)


def mean_average_precision(scores: Tensor, labels: Tensor) -> float:  # [c, n], [c, n] of 0 and 1
    """Return the mean over classes of the average precision of their samples, sorted by descending score."""
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    total = 0.0
    for some, truth in zip(scores, labels, strict=True):
        sorted_truth = truth[some.argsort(descending=True, stable=True)].double()
        total += (sorted_truth.cumsum(dim=0) / places * sorted_truth).sum().item() / max(int(truth.sum()), 1)
    return total / len(scores)


def _recall(ranks: Tensor, k: int) -> float:  # [n]
    return (ranks < k).double().mean().item()
