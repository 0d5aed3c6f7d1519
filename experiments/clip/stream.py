"""Decoded pairs in memory, and the order in which an epoch visits them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from torch import Tensor

from experiments.clip.errors import UserError
from experiments.clip.feature_cache import FeatureCache
from experiments.clip.models import Clip
from experiments.clip.shards import Manifest, read_samples


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
    carried : tuple of Tensor, optional
        What `experiments.clip.guide.Guide.features` makes the reference's features from.
    """

    image: Tensor
    text: Tensor
    index: Tensor
    skipped: Mapping[str, int] = MappingProxyType({})
    carried: tuple[Tensor, Tensor] | None = None

    def rows(self, rows: Tensor) -> Batch:
        """Return the pairs at places ``rows`` ``[k]`` of the batch, in that order; what was skipped stays with them."""
        carried = None if self.carried is None else (self.carried[0][rows], self.carried[1][rows])
        return Batch(self.image[rows], self.text[rows], self.index[rows], self.skipped, carried)


class Pairs:
    """A split of the data in memory, resized for one model: bytes for the images, tokens for the captions.

    The images are what the model's own open_clip preprocessing gives, kept as bytes before normalization.
    Row i is the sample of index i.
    """

    def __init__(
        self, manifest: Manifest, split: str, clip: Clip, progress: Callable[[int], None] | None = None
    ) -> None:
        config = open_clip.get_model_preprocess_cfg(clip.model)
        resize = open_clip.image_transform(
            config["size"],
            is_train=False,
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
            resize_mode=config["resize_mode"],
            interpolation=config["interpolation"],
        )
        images: list[Tensor] = []
        self.captions: list[str] = []
        self.names: list[str] = []
        for sample in read_samples(manifest, split):
            if sample.index != len(images):
                raise UserError(
                    f"{split} yields sample {sample.index} where {len(images)} is due: prepare the data again"
                )
            images.append((resize(sample.image) * 255).round().to(torch.uint8))
            self.captions.append(sample.caption)
            self.names.append(sample.meta.get("name", sample.caption))
            if progress is not None and len(images) % 256 in (0, manifest.splits[split].samples % 256):
                progress(len(images))
        self.pixels = torch.stack(images)
        self._tokens = clip.tokenize(self.captions).to(torch.int32)
        self._mean = torch.tensor(config["mean"]).view(3, 1, 1)
        self._std = torch.tensor(config["std"]).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, index: Tensor) -> Tensor:
        """Return the normalized images ``[b, 3, h, w]`` of samples ``index`` ``[b]``."""
        return (self.pixels[index].to(torch.float32) / 255 - self._mean) / self._std

    def batch(self, index: Tensor) -> Batch:
        """Return the samples ``index`` ``[b]``."""
        return Batch(self.images(index), self._tokens[index].to(torch.int64), index)

    def image_batches(self, size: int = 512) -> Iterator[Tensor]:
        """Yield all images in order of their index."""
        for index in torch.arange(len(self)).split(size):
            yield self.images(index)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Return the number of batches of at most ``batch_size`` that hold every sample once."""
    return -(-samples // batch_size)


def epoch_order(samples: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Return an epoch's batches as sample indices: every sample once, sizes equal up to one.

    A pure function of its arguments, so that a run can go on anywhere.
    """
    order = np.random.default_rng([seed, epoch]).permutation(samples)
    return [torch.from_numpy(part) for part in np.array_split(order, steps_per_epoch(samples, batch_size))]


class MemoryStream:
    """An epoch's batches of pairs in memory; this rank has its share of each.

    Parameters
    ----------
    batch_size : int
        Pairs per step over all ranks, at most.
    rank, ranks : int
        This rank and how many there are; a batch is cut into contiguous parts, equal up to one.
    features : FeatureCache, optional
        The reference's, of these pairs.
    """

    def __init__(
        self,
        pairs: Pairs,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        features: FeatureCache | None = None,
    ) -> None:
        self._pairs, self._batch_size, self._seed, self._features = pairs, batch_size, seed, features
        self._rank, self._ranks = rank, ranks
        self.steps_per_epoch = steps_per_epoch(len(pairs), batch_size)

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yield this rank's part of the epoch's batches, from step ``first`` of the epoch on."""
        for index in epoch_order(len(self._pairs), self._batch_size, self._seed, epoch)[first:]:
            batch = self._pairs.batch(index.tensor_split(self._ranks)[self._rank])
            yield batch if self._features is None else batch._replace(carried=self._features.rows(batch.index))

    def close(self) -> None:
        """End nothing: the pairs are in memory."""
