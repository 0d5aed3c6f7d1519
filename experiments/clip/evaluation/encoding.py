"""Collectors that encode all images or texts of an evaluation, and the class vectors of prompt templates."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.clip.evaluation.metrics import unit_features

_BLOCK = 2**14  # rows


@torch.no_grad()
def encode_images(
    encode_image: Callable[[Tensor], Tensor],  # [b, 3, h, w] -> [b, d]
    image_batches: Iterable[Tensor],  # each [b, 3, h, w]
) -> Tensor:  # [n, d]
    """Return the unit-length float32 features of all images."""
    features = Rows()
    for batch in image_batches:
        features.add(unit_features("image_features", encode_image(batch)))
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
        features.add(unit_features("text_features", encode_text(list(texts[start : start + batch_size]))))
    if not len(features):
        raise ValueError("texts is empty; pass at least one text")
    return features.joined()


class Rows:
    """Collects rows that arrive in batches, in large blocks.

    Many small tensors that are kept, among larger ones that are freed, would leave holes in the heap of several times
    their size.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, rows: Tensor) -> None:
        """Append a copy of these rows."""
        while len(rows):
            place = self._count % _BLOCK
            if place == 0:
                self._blocks.append(rows.new_empty(_BLOCK, *rows.shape[1:]))
            some, rows = rows[: _BLOCK - place], rows[_BLOCK - place :]
            self._blocks[-1][place : place + len(some)] = some
            self._count += len(some)

    def take(self) -> Iterator[Tensor]:
        """Yield all rows, block by block, and free each block when the next is asked for."""
        left, self._count = self._count, 0
        while left:
            block = self._blocks.pop(0)[:left]
            left -= len(block)
            yield block

    def joined(self) -> Tensor:
        """Return all rows in one tensor, and free the blocks."""
        rows = self._blocks[0].new_empty(self._count, *self._blocks[0].shape[1:])
        start = 0
        for block in self.take():
            rows[start : start + len(block)] = block
            start += len(block)
        return rows


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
