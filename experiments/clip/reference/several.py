"""Several references of one training, cached or beside the target, as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from drrho.mixture import mixed_references

from ..data.batch import Tensors
from ..data.draws import Draws
from ..errors import UserError
from ..models.clip import Clip
from .cache import CachedReference
from .live import LiveReference
from .margins import SPREAD_PAIRS, spread_of_margins

_IMAGES = 2  # of a batch's inputs, each reference has those of images and those of texts


class SeveralReferences:
    """References that are asked together: a `data.batch.Reference`, whose similarities are the mean of theirs.

    Its features are theirs side by side, each divided by the root of their number; methods that combine them otherwise
    take them apart again (`drrho.mixture.separate_references`).

    Parameters
    ----------
    parts : sequence of CachedReference or LiveReference
        Cached ones must have equal numbers of views.
    clips : sequence of Clip
        Their models, in the same order.
    combine : "mean", "worst" or "learned"
        What is done with their margins, on which `margin_spread` depends.

    Attributes
    ----------
    clips : list of Clip
        The references' models.
    widths : tuple of int
        Of each reference's features.
    fingerprints : list of str
        Of their models.
    scales : list of float
        Each reference's own logit scale.
    views : int
        Cached views of a sample, 1 if none is cached.

    Raises
    ------
    UserError
        If cached features differ in their numbers of views.
    """

    def __init__(
        self,
        parts: Sequence[CachedReference | LiveReference],
        clips: Sequence[Clip],
        combine: Literal["mean", "worst", "learned"],
    ) -> None:
        views = {part.views for part in parts if isinstance(part, CachedReference)}
        if len(views) > 1:
            raise UserError(
                f"the references' cached features have {' and '.join(map(str, sorted(views)))} views of a sample, of "
                "which a target sees one: cache the same number for all"
            )
        self.views = max(views, default=1)
        self._parts, self._combine = list(parts), combine
        # The one whose views the target is shown.
        self._leads = next((part for part in parts if isinstance(part, CachedReference)), parts[0])
        self.clips, self.fingerprints = list(clips), [clip.fingerprint for clip in clips]
        self.scales = [clip.model.logit_scale.exp().item() for clip in clips]
        empty = [part.features(part.empty_inputs(), clip.device) for part, clip in zip(parts, clips, strict=True)]
        self.widths = tuple(image.shape[1] for image, _ in empty)

    def draws(self, index: int, draws: Draws) -> Draws:
        """Return the draws of the first reference with cached features, which the target and the others follow."""
        return self._leads.draws(index, draws)

    def image(self, image: Image.Image, draws: Draws) -> tuple[Tensor | None, ...]:
        """Return the image as each reference takes it."""
        return tuple(part.image(image, draws) for part in self._parts)

    def collate(
        self, index: Tensor, draws: Sequence[Draws], images: Sequence[Any], captions: Sequence[str]
    ) -> tuple[Tensor, ...]:
        """Return the inputs of the first reference, then those of the second, and so on."""
        found: list[Tensor] = []
        for k, part in enumerate(self._parts):
            found += part.collate(index, draws, [each[k] for each in images], captions)
        return tuple(found)

    def rows(self, index: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs of samples ``index`` ``[b]``, of references that are all cached."""
        return self.collate(index, [Draws(0, 0, 0, 0)] * len(index), [], [])

    def empty_inputs(self) -> tuple[Tensor, ...]:
        """Return the inputs of a batch without samples."""
        return tuple(part for each in self._parts for part in each.empty_inputs())

    def features(self, inputs: Sequence[Tensor], device: torch.device) -> Tensors:
        """Return unit features ``[b, sum of widths]``, image and text, in float32."""
        found: list[Tensors] = []
        for k, part in enumerate(self._parts):
            image, text = inputs[_IMAGES * k : _IMAGES * (k + 1)]
            found.append(part.features((image, text), device))
        return mixed_references(found)

    def margin_spread(self, pairs: int) -> float:
        """Return the standard deviation of the combined margins, a mixture being the mean at first."""
        firsts = [part.first(min(pairs, SPREAD_PAIRS)) for part in self._parts]
        count = min(len(image) for image, _ in firsts)  # of cached ones no more than one file has
        firsts = [(image[:count].cpu(), text[:count].cpu()) for image, text in firsts]
        return spread_of_margins(firsts, worst=self._combine == "worst")
