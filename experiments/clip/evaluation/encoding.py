"""Encoding all images or texts of an evaluation, on one process or many, and the class vectors of prompt templates."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..distributed import ONE_PROCESS, Ranks
from ..errors import UserError
from ..io.workers import Workers
from ..models.clip import Clip
from .metrics import unit_features

Precision = Literal["float32", "bfloat16", "float16"]
#: Called with how many of the samples are done, and how many there are.
Progress = Callable[[int, int], None]
Batch = TypeVar("Batch")
Inputs = TypeVar("Inputs", Tensor, list[str])

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


@dataclass(frozen=True)
class Encoder:
    """A model as it is evaluated.

    Parameters
    ----------
    clip
        The model, on the device of ``ranks``.
    ranks
        Processes that share the work; all of them must call what is collective.
    batch_size
        Images, or texts, per call of the model. The features depend on it, not on the number of ranks or workers.
    workers
        Processes of a rank that read and decode; 0 decodes in this one.
    precision
        Of the towers, by autocast; features are float32.
    tf32
        Whether a GPU's towers may multiply float32 in TF32, as in training; scores are always multiplied in full.
    """

    clip: Clip
    ranks: Ranks = ONE_PROCESS
    batch_size: int = 64
    workers: int = 0
    precision: Precision = "float32"
    tf32: bool = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the block in evaluation mode and without gradients; leave the model as it was."""
        was_training = self.clip.model.training
        self.clip.model.eval()
        try:
            with torch.no_grad(), _products(tf32=False):
                yield
        finally:
            self.clip.model.train(was_training)

    def own_batches(self, read: Callable[[int], Batch], count: int) -> Iterator[tuple[int, Batch | None]]:
        """Yield this rank's batches of ``count`` with their numbers, in rounds of one batch for each rank (collective).

        All ranks have as many rounds, because a sharded model needs all of them for each call: in the last one, a rank
        may have None. A `UserError` of ``read`` on one rank is raised on all.
        """
        ranks, pins = self.ranks, self.clip.device.type == "cuda"
        own = ranks.own_indices(count)
        workers: Workers[int, Batch] = Workers(read, self.workers, pin_memory=pins)
        with closing(workers):
            batches = workers.map(own)
            for turn in range(ranks.rounds(count)):
                has_one = turn < len(own)
                batch = ranks.run_on_all_or_fail(lambda has_one=has_one: next(batches) if has_one else None)
                yield turn * ranks.count + ranks.rank, batch

    def images(self, images: Tensor | None) -> Tensor:  # [b, 3, h, w] -> [b, d]
        """Return the unit features of images, any number on each rank; none for None (collective)."""
        blank = self.clip.preprocess(Image.new("RGB", (8, 8)))[None]
        return self._in_calls(blank[:0] if images is None else images, blank, self.clip.encode_image, "image")

    def texts(self, texts: Sequence[str]) -> Tensor:  # b texts -> [b, d]
        """Return the unit features of texts, any number on each rank (collective)."""
        return self._in_calls(list(texts), [""], self.clip.encode_text, "text")

    def _in_calls(self, inputs: Inputs, blank: Inputs, encode: Callable[[Inputs], Tensor], what: str) -> Tensor:
        """Encode ``batch_size`` inputs at a time, in as many calls on every rank; ``blank`` fills one without any."""
        size = self.batch_size
        calls = max(1, self.ranks.max_over_ranks(-(-len(inputs) // size)))
        parts = [inputs[start * size : (start + 1) * size] for start in range(calls)]
        encoded = [self._features(encode, part if len(part) else blank, what)[: len(part)] for part in parts]
        return torch.cat(encoded)

    def _features(self, encode: Callable[[Inputs], Tensor], inputs: Inputs, what: str) -> Tensor:
        dtype = getattr(torch, self.precision)
        autocast = torch.autocast(self.clip.device.type, dtype, enabled=dtype != torch.float32)
        with _products(self.tf32), autocast:
            features = encode(inputs).float()
        bad = int((~features.isfinite()).any(dim=1).sum())
        problem = (
            f"the model gives {bad} of {len(features)} {what} features that are not finite: take an earlier checkpoint"
        )
        self.ranks.raise_on_all(UserError(problem) if bad else None)
        return F.normalize(features, dim=-1)


@contextmanager
def _products(tf32: bool) -> Iterator[None]:
    """Choose how a GPU multiplies matrices of float32 during the block."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = before


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
