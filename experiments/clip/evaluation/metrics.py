"""Zero-shot metrics as pure functions of features and labels, and the collectors that encode images and texts.

A query is answered within the top k when fewer than k wrong items score at
least as high as its best right item. Ties therefore count against the model, and a model whose features
have collapsed to one point scores zero instead of one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RECALL_AT = (1, 5, 10)

# A matrix product may round equal rows differently at the edge of a block, so cosines this close are ties.
_TIE = 1e-6
_QUERIES, _ITEMS = 1024, 4096  # a tile of cosines
_BLOCK = 2**14  # rows


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


def zero_shot_classifier(
    encode_text: Callable[[list[str]], Tensor],  # b prompts -> [b, d]
    classes: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 512,
) -> Tensor:  # [c, d]
    """Return one unit vector per class: the normalized mean of its prompts' normalized text features.

    Parameters
    ----------
    encode_text
        Maps a list of prompts to their text features.
    classes
        The class names.
    templates
        Prompts with ``{}`` where the class name goes.
    batch_size
        Number of prompts per call of ``encode_text``.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"templates has {template!r}; mark the place of the class name with {{}}")
    if not classes or not templates:
        raise ValueError(f"classes ({len(classes)}) and templates ({len(templates)}) must both be non-empty")
    prompts = [template.format(name) for name in classes for template in templates]
    features = encode_texts(encode_text, prompts, batch_size)
    return F.normalize(features.unflatten(0, (len(classes), len(templates))).mean(dim=1), dim=-1)


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
    images = _checked("image_features", image_features)
    texts = _checked("text_features", text_features)
    image_labels = _labels("image_labels", image_labels, images)
    text_labels = _labels("text_labels", text_labels, texts)
    for name, own, other in (
        ("image_labels", image_labels, text_labels),
        ("text_labels", text_labels, image_labels),
    ):
        alone = own[~torch.isin(own, other)]
        if len(alone):
            raise ValueError(f"{name} has {alone[0].item()}, which the other side lacks; drop it")
    to_text = _ranks(images, texts, image_labels, text_labels, chunk)
    to_image = _ranks(texts, images, text_labels, image_labels, chunk)
    return Retrieval(*({k: _recall(ranks, k) for k in RECALL_AT} for ranks in (to_text, to_image)))


def predictions(
    image_features: Tensor,  # [n, d]
    caption_features: Tensor,  # [c, d]
    k: int,
) -> tuple[Tensor, Tensor]:  # [n, k], [n, k]
    """Return the k highest cosines of each image, best first, and the positions of their captions."""
    images, captions = _checked("image_features", image_features), _unit("caption_features", caption_features)
    if not 1 <= k <= len(captions):
        raise ValueError(f"k is {k}; choose it from 1 to the number of captions, {len(captions)}")
    best = [(F.normalize(some, dim=-1) @ captions.T).topk(k) for some in images.split(_QUERIES)]
    return torch.cat([some.values for some in best]), torch.cat([some.indices for some in best])


@torch.no_grad()
def encode_images(
    encode_image: Callable[[Tensor], Tensor],  # [b, 3, h, w] -> [b, d]
    image_batches: Iterable[Tensor],  # each [b, 3, h, w]
) -> Tensor:  # [n, d]
    """Return the unit-length float32 features of all images."""
    features = Rows()
    for batch in image_batches:
        features.add(_unit("image_features", encode_image(batch)))
    if not len(features):
        raise ValueError("image_batches is empty; pass at least one batch")
    return features.joined()


@torch.no_grad()
def encode_texts(
    encode_text: Callable[[list[str]], Tensor],  # b texts -> [b, d]
    texts: Sequence[str],
    batch_size: int = 512,
) -> Tensor:  # [n, d]
    """Return the unit-length float32 features of all texts, ``batch_size`` texts per call."""
    features = Rows()
    for start in range(0, len(texts), batch_size):
        features.add(_unit("text_features", encode_text(list(texts[start : start + batch_size]))))
    if not len(features):
        raise ValueError("texts is empty; pass at least one text")
    return features.joined()


class Rows:
    """Rows that arrive in batches, kept in blocks.

    Many small tensors that stay, among larger ones that go, leave holes in the heap of several times their size.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, rows: Tensor) -> None:
        """Copy some rows behind those there are."""
        while len(rows):
            place = self._count % _BLOCK
            if place == 0:
                self._blocks.append(rows.new_empty(_BLOCK, *rows.shape[1:]))
            some, rows = rows[: _BLOCK - place], rows[_BLOCK - place :]
            self._blocks[-1][place : place + len(some)] = some
            self._count += len(some)

    def take(self) -> Iterator[Tensor]:
        """Return all rows, a block after the other; each goes when the next is asked for."""
        left, self._count = self._count, 0
        while left:
            block = self._blocks.pop(0)[:left]
            left -= len(block)
            yield block

    def joined(self) -> Tensor:
        """Return all rows in one tensor, and keep none."""
        whole = self._blocks[0].new_empty(self._count, *self._blocks[0].shape[1:])
        start = 0
        for block in self.take():
            whole[start : start + len(block)] = block
            start += len(block)
        return whole


def _unit(name: str, features: Tensor) -> Tensor:  # [n, d] -> [n, d]
    return F.normalize(_checked(name, features), dim=-1)


def _checked(name: str, features: Tensor) -> Tensor:  # [n, d] -> [n, d]
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
    images, classifier = _checked("image_features", image_features), _checked(classifier_name, classifier)
    labels = _labels("labels", labels, images)
    classes = torch.arange(len(classifier), device=images.device)
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise ValueError(f"labels has {outside[0].item()}; keep labels from 0 to {len(classes) - 1}")
    return _ranks(images, classifier, labels, classes, chunk)


def _ranks(
    queries: Tensor,  # [n, d]
    items: Tensor,  # [m, d]
    query_labels: Tensor,  # [n]
    item_labels: Tensor,  # [m]
    chunk: int,
) -> Tensor:  # [n]
    """Count, for each query, the wrong items that score at least as high as its best right item.

    Takes memory for ``chunk`` queries by `_ITEMS` items.
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
    """Yield the cosines of some items after the other, and which of them are right."""
    for some, labels in zip(items.split(_ITEMS), item_labels.split(_ITEMS), strict=True):
        yield queries @ F.normalize(some, dim=-1).T, query_labels[:, None] == labels


def _recall(ranks: Tensor, k: int) -> float:  # [n]
    return (ranks < k).double().mean().item()
