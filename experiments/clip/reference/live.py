"""The reference run beside the target: its features are computed in every step, from its own inputs of each pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from ..data.batch import Tensors
from ..data.draws import Draws
from ..models.clip import Clip
from .margins import SPREAD_PAIRS, margin_spread


class LiveReference:
    """Computes the reference's features: a `data.batch.Reference`.

    A batch carries the reference's inputs: the target's crop and caption in the reference's own preprocessing.

    Parameters
    ----------
    clip : Clip
        The reference.
    parts : int
        Number of parts in which a batch goes through the reference's towers.
    first_pairs : callable
        Returns images and captions of the first pairs, up to a number, for `margin_spread`.
    """

    def __init__(self, clip: Clip, parts: int, first_pairs: Callable[[int], Sequence[tuple[Image.Image, str]]]) -> None:
        self._clip, self._parts, self._first_pairs = clip, parts, first_pairs
        self._augment = clip.in_bytes(clip.augment)

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes only prepare inputs, for which they need no weights.
        return self.__dict__ | {"_clip": dataclasses.replace(self._clip, model=None), "_first_pairs": None}

    def draws(self, index: int, draws: Draws) -> Draws:
        """Return the draws unchanged: the reference follows the target."""
        return draws

    def image(self, image: Image.Image, draws: Draws) -> Tensor:
        """Return the target's crop in the reference's own size."""
        draws.seed_generators()
        return self._augment(image)

    def collate(
        self, index: Tensor, draws: Sequence[Draws], images: Sequence[Tensor | None], captions: Sequence[str]
    ) -> Tensors:
        """Return the images ``[b, 3, h, w]`` and the tokens ``[b, length]`` of a batch."""
        return default_collate(list(images)), self._tokens(captions)

    def empty_inputs(self) -> Tensors:
        """Return the inputs of a batch without samples: ``[0, 3, h, w]`` and ``[0, length]``."""
        return self._augment(Image.new("RGB", (64, 64)))[None][:0], self._tokens(["none"])[:0]

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        return self._clip.tokenize(captions).to(torch.int32)

    @torch.no_grad()
    def features(self, inputs: Tensors, device: torch.device) -> Tensors:
        """Compute the reference's unit features ``[b, d]``, image and text, in float32."""
        parts = max(1, min(self._parts, len(inputs[0])))
        image = torch.cat([self._clip.encode_image(part) for part in inputs[0].tensor_split(parts)])
        text = torch.cat([self._clip.encode_tokens(part) for part in inputs[1].tensor_split(parts)])
        return image.float(), text.float()

    def margin_spread(self, pairs: int) -> float:
        """Return `margin_spread` over the first ``pairs`` pairs, at most `SPREAD_PAIRS`, without augmentation."""
        return margin_spread(*self.first(min(pairs, SPREAD_PAIRS)))

    def first(self, count: int) -> Tensors:
        """Return the features of the first ``count`` pairs, without augmentation."""
        images, captions = zip(*self._first_pairs(count), strict=True)
        prepared = torch.stack([self._clip.preprocess(image) for image in images])
        return self._clip.features_in_parts(prepared, self._clip.tokenize(list(captions)))
