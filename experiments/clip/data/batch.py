"""A batch of training pairs, and the protocols of a stream of batches and of the reference beside it.

Worker processes make batches and the training loop uses them; both know streams and references only by these protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from .draws import Draws

#: A tensor about images and one about texts, in this order.
Tensors = tuple[Tensor, Tensor]


class Batch(NamedTuple):
    """A rank's part of a global batch.

    Attributes
    ----------
    image : Tensor ``[b, 3, h, w]``
        Preprocessed images: in bytes, before the normalization, or as floats, after it.
    text : Tensor ``[b, length]``
        Tokens of the captions, in 32 bits.
    index : Tensor ``[b]``
        Sample indices, on the host.
    skipped : mapping
        Number of samples of this part that could not be used, by reason.
    reference_inputs : tuple of Tensor, optional
        The input of `Reference.features`: a tensor about images and one about texts for each reference.
    size : int
        Largest b of the stream, of which this part lacks skipped samples or one of an uneven cut; 0 where there is
        none. Towers are given so many rows, because other shapes would be compiled, tuned and allocated anew.
    """

    image: Tensor
    text: Tensor
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride] (a field, not tuple.index)
    skipped: Mapping[str, int] = MappingProxyType({})
    reference_inputs: tuple[Tensor, ...] | None = None
    size: int = 0

    def rows(self, rows: Tensor, on_host: Tensor) -> Batch:
        """Return the pairs in rows ``rows`` ``[k]`` of the batch, in that order; ``skipped`` stays the same.

        They are given where the inputs are, and on the host, where the indices are.
        """
        return self.of_each(lambda part: part[rows])._replace(index=self.index[on_host], size=0)

    def of_each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with each tensor changed that is an input of a model; the indices stay on the host."""
        inputs = None
        if self.reference_inputs is not None:
            inputs = tuple(map(change, self.reference_inputs))
        return self._replace(image=change(self.image), text=change(self.text), reference_inputs=inputs)


class HeldOut(NamedTuple):
    """Held-out pairs, by which a method measures how far the reference is ahead of the target.

    Attributes
    ----------
    image, text : Tensor
        As in `Batch`, prepared as for validation.
    reference : (Tensor, Tensor)
        The reference's unit features, image and text, as `Reference.features` returns them.
    """

    image: Tensor
    text: Tensor
    reference: Tensors


class Stream(Protocol):
    """The batches of this rank, determined by seed, epoch and step alone."""

    #: Steps of an epoch, the same on every rank.
    steps_per_epoch: int

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yield this rank's part of each batch of the epoch, beginning with step ``first``."""
        ...

    def state_dict(self) -> dict[str, int]:
        """Return this rank's counts so far."""
        ...

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load the counts that `state_dict` returned, and continue from them."""
        ...

    def close(self) -> None:
        """End the worker processes."""
        ...


class Reference(Protocol):
    """The reference model: its inputs are prepared where batches are made, its features used in the training loop."""

    def draws(self, index: int, draws: Draws) -> Draws:
        """Return the draws to use for the target, so that both models see the same crop and caption."""
        ...

    def image(self, image: Image.Image, draws: Draws) -> Any:
        """Return the image as the reference's preprocessing gives it, or None if the reference needs no image."""
        ...

    def collate(
        self, index: Tensor, draws: Sequence[Draws], images: Sequence[Any], captions: Sequence[str]
    ) -> tuple[Tensor, ...]:
        """Return the ``reference_inputs`` of a batch; ``images`` are what `image` returned."""
        ...

    def empty_inputs(self) -> tuple[Tensor, ...]:
        """Return the ``reference_inputs`` of a batch without samples."""
        ...

    def features(self, inputs: Any, device: torch.device) -> Tensors:
        """Return the reference's unit features ``[b, d]``, image and text, in float32."""
        ...

    def margin_spread(self, pairs: int) -> float:
        """Return the standard deviation of the reference's margins over the first ``pairs`` pairs, or fewer of them."""
        ...
