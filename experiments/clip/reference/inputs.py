"""The reference beside the target: for each pair of a batch its features, looked up or computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from experiments.clip.data.batch import Tensors
from experiments.clip.data.draws import Draws
from experiments.clip.models.clip import Clip
from experiments.clip.reference.cache import FeatureCache

SPREAD_PAIRS = 1024  # over which the spread of the reference's margins is taken
_SPREAD_PART = 64  # of them go through the reference at a time


class CachedReference:
    """Looks the features up; a batch carries them.

    Parameters
    ----------
    cache : FeatureCache
        The features.
    spread_pairs : int
        How many of the first pairs `spread` is taken over, at most.
    """

    def __init__(self, cache: FeatureCache, spread_pairs: int = SPREAD_PAIRS) -> None:
        self._cache, self._spread_pairs = cache, spread_pairs

    @property
    def views(self) -> int:
        """Cached views of each sample."""
        return self._cache.views

    def draws(self, index: int, draws: Draws) -> Draws:
        """Return the draws of the view that is looked up."""
        return self._cache.draws(index, draws)

    def image(self, image: Image.Image, draws: Draws) -> None:
        """Need nothing."""

    def collate(
        self, index: Tensor, draws: Sequence[Draws], images: Sequence[Tensor | None], captions: Sequence[str]
    ) -> Tensors:
        """Return the features, as stored."""
        return self._cache.rows(index, torch.tensor([own.choice for own in draws], dtype=torch.int64))

    def empty_inputs(self) -> Tensors:
        """Return no features, of the right width."""
        return self._cache.rows(torch.empty(0, dtype=torch.int64))

    def features(self, inputs: Tensors, device: torch.device) -> Tensors:
        """Return them in float32."""
        image, text = (part.to(device, non_blocking=True).float() for part in inputs)
        return image, text

    def margin_spread(self) -> float:
        """Return the spread over the first samples."""
        return margin_spread(*self._cache.first(self._spread_pairs))


class LiveReference:
    """Runs the reference; a batch carries its inputs: the target's crop and caption, in the reference's own form.

    Parameters
    ----------
    clip : Clip
        The reference.
    parts : int
        In how many parts a batch goes through its towers.
    first : callable
        Returns images and captions of some pairs, for `spread`.
    """

    def __init__(self, clip: Clip, parts: int, first: Callable[[], Sequence[tuple[Image.Image, str]]]) -> None:
        self._clip, self._parts, self._first = clip, parts, first

    def __getstate__(self) -> dict[str, Any]:
        # Processes that read prepare inputs: they need no weights.
        return self.__dict__ | {"_clip": dataclasses.replace(self._clip, model=None), "_first": None}

    def draws(self, index: int, draws: Draws) -> Draws:
        """Return them as they are."""
        return draws

    def image(self, image: Image.Image, draws: Draws) -> Tensor:
        """Return the same crop as the target's, of the reference's own size and normalization."""
        draws.seed_generators()
        return self._clip.augment(image)

    def collate(
        self, index: Tensor, draws: Sequence[Draws], images: Sequence[Tensor | None], captions: Sequence[str]
    ) -> Tensors:
        """Return images and tokens."""
        return default_collate(list(images)), self._clip.tokenize(captions)

    def empty_inputs(self) -> Tensors:
        """Return no images and no tokens, of the right shapes."""
        return self._clip.augment(Image.new("RGB", (64, 64)))[None][:0], self._clip.tokenize(["none"])[:0]

    @torch.no_grad()
    def features(self, inputs: Tensors, device: torch.device) -> Tensors:
        """Return the features that the reference gives."""
        parts = max(1, min(self._parts, len(inputs[0])))
        image = torch.cat([self._clip.encode_image(part) for part in inputs[0].tensor_split(parts)])
        text = torch.cat([self._clip.encode_tokens(part) for part in inputs[1].tensor_split(parts)])
        return image.float(), text.float()

    @torch.no_grad()
    def margin_spread(self) -> float:
        """Return the spread over those pairs, in the reference's evaluation preprocessing."""
        images, captions = zip(*self._first(), strict=True)
        parts = range(0, len(images), _SPREAD_PART)
        prepare = self._clip.preprocess
        prepared = (torch.stack([prepare(image) for image in images[k : k + _SPREAD_PART]]) for k in parts)
        image = torch.cat([self._clip.encode_image(part) for part in prepared])
        text = torch.cat([self._clip.encode_text(captions[k : k + _SPREAD_PART]) for k in parts])
        return margin_spread(image, text)


def margin_spread(image: Tensor, text: Tensor) -> float:
    """Return the standard deviation of a model's margins ``r_ij - r_ii``, j != i, over pairs of features ``[b, d]``.

    The temperature of a steered run is chosen relative to it: early in training the excess pair loss is the
    reference's margin, and weights ``exp(-margin / temperature)`` at a much smaller temperature sit on the
    reference's easiest negatives.
    """
    similarity = image.float() @ text.float().T
    margins = similarity - similarity.diagonal()[:, None]
    return margins[~torch.eye(len(margins), dtype=torch.bool, device=margins.device)].std().item()
