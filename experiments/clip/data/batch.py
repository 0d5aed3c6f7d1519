"""A batch of training pairs, and what a stream of batches and a reference beside it promise.

A stream and a reference are used in two places: worker processes make batches, and the training loop uses them. Both
sides know these protocols alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from experiments.clip.data.draws import Draws

#: Of images and texts, in this order.
Tensors = tuple[Tensor, Tensor]


class Batch(NamedTuple):
    """A rank's part of a global batch.

    Attributes
    ----------
    image : Tensor ``[b, 3, h, w]``
        Preprocessed images.
    text : Tensor ``[b, length]``
        Tokens.
    index : Tensor ``[b]``
        Sample indices.
    skipped : mapping
        How many samples of this part could not be used, by reason.
    reference_inputs : tuple of Tensor, optional
        What `Reference.features` computes the reference's features from.
    """

    image: Tensor
    text: Tensor
    index: Tensor
    skipped: Mapping[str, int] = MappingProxyType({})
    reference_inputs: Tensors | None = None

    def rows(self, rows: Tensor) -> Batch:
        """Return the pairs at places ``rows`` ``[k]`` of the batch, in that order; ``skipped`` stays the same."""
        inputs = None if self.reference_inputs is None else tuple(part[rows] for part in self.reference_inputs)
        return Batch(self.image[rows], self.text[rows], self.index[rows], self.skipped, inputs)


class Stream(Protocol):
    """The batches of this rank, a function of seed, epoch and step alone."""

    #: Steps of an epoch, on every rank.
    steps_per_epoch: int

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yield this rank's part of the epoch's batches, from step ``first`` of the epoch on."""
        ...

    def state_dict(self) -> dict[str, int]:
        """Return what this rank has counted so far."""
        ...

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue counting from what `state_dict` returned."""
        ...

    def close(self) -> None:
        """End the worker processes."""
        ...


class Reference(Protocol):
    """The reference model: what it asks of each pair where batches are made, and what it gives the training loop."""

    def draws(self, index: int, draws: Draws) -> Draws:
        """Return the random numbers that the target's augmentation uses, so that both models see the same."""
        ...

    def image(self, image: Image.Image, draws: Draws) -> Tensor | None:
        """Return the reference's own form of an image, where it needs one."""
        ...

    def collate(
        self, index: Tensor, draws: Sequence[Draws], images: Sequence[Tensor | None], captions: Sequence[str]
    ) -> Tensors:
        """Return the ``reference_inputs`` of a batch."""
        ...

    def empty_inputs(self) -> Tensors:
        """Return the ``reference_inputs`` of a batch without samples."""
        ...

    def features(self, inputs: Tensors, device: torch.device) -> Tensors:
        """Return the reference's unit features ``[b, d]``, image and text, in float32."""
        ...

    def margin_spread(self) -> float:
        """Return the standard deviation of the reference's margins over some pairs."""
        ...
