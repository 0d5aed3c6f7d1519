"""Decoded pairs in memory, and the batches in which an epoch visits them."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import open_clip
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..cli.terminal import console
from ..data.batch import Batch
from ..errors import UserError
from ..io.files import write_atomically
from ..io.workers import spread
from ..models.clip import Clip
from ..models.pixels import Transform, cut
from ..reference.cache import CachedReference
from ..reference.several import SeveralReferences
from .dataset import GlyphShard, Manifest, read_samples, read_shard

_PREPARED_FORMAT = 1
_RESIZING = ("size", "resize_mode", "interpolation")


class PreparedPairs:
    """A split in memory, prepared for one model: its images as bytes, its captions as tokens.

    The images are resized by the model's own open_clip preprocessing and kept as bytes before normalization. This is
    done once: a file beside the shards keeps them for the next run. Row i is the sample of index i.
    """

    def __init__(
        self, manifest: Manifest, split: str, clip: Clip, progress: Callable[[int], None] | None = None
    ) -> None:
        config = open_clip.get_model_preprocess_cfg(clip.model)
        path = _prepared_path(manifest, split, config)
        prepared = _load_prepared(path) if path.exists() else None
        if prepared is None:
            prepared = _prepare(manifest, split, config, progress)
            try:
                _save_prepared(path, prepared)
            except UserError as error:
                console.print(f"data       the next run prepares the pairs again: {error}")
        self.pixels, self.captions, self.names = prepared
        distinct = {caption: row for row, caption in enumerate(dict.fromkeys(self.captions))}
        tokens = clip.tokenize(list(distinct)).to(torch.int32)
        self._tokens = tokens[torch.tensor([distinct[caption] for caption in self.captions])]

    def __len__(self) -> int:
        return len(self.pixels)

    def first(self, count: int) -> PreparedPairs:
        """Return the first ``count`` pairs, in the same memory."""
        part = copy.copy(self)
        part.pixels, part._tokens = self.pixels[:count], self._tokens[:count]
        part.captions, part.names = self.captions[:count], self.names[:count]
        return part

    def batch(self, index: Tensor, size: int = 0) -> Batch:
        """Return the samples ``index`` ``[b]`` of a stream whose largest batch has ``size``."""
        pixels, tokens = (part.index_select(0, index) for part in (self.pixels, self._tokens))
        return Batch(pixels, tokens, index, size=size)

    def image_batches(self, size: int = 512) -> Iterator[Tensor]:
        """Yield all images, in bytes, in order of their index."""
        yield from self.pixels.split(size)


class _Prepared(NamedTuple):
    """Images ``[n, 3, h, w]`` as bytes, their captions, and their true names."""

    pixels: Tensor
    captions: list[str]
    names: list[str]


def _prepared_path(manifest: Manifest, split: str, config: dict[str, Any]) -> Path:
    """Return the file that keeps a split, prepared as ``config`` says."""
    made_from = json.dumps(
        [_PREPARED_FORMAT, manifest.fingerprint, [config[key] for key in _RESIZING], open_clip.__version__]
    )
    key = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    return manifest.folder / f"prepared-{split}-{key}.safetensors"


def _prepare(
    manifest: Manifest, split: str, config: dict[str, Any], progress: Callable[[int], None] | None
) -> _Prepared:
    if split not in manifest.splits:
        read_samples(manifest, split)  # which says so
    parts: list[_Prepared] = []
    done = 0
    for part in spread(_ShardDecoder(manifest, config), manifest.splits[split].shards):
        parts.append(part)
        done += len(part.captions)
        if progress is not None:
            progress(done)
    pixels, captions, names = zip(*parts, strict=True)
    return _Prepared(torch.cat(pixels), list(itertools.chain(*captions)), list(itertools.chain(*names)))


class _ShardDecoder:
    """Decodes a shard and resizes its images as ``config`` says, in this process or in another."""

    def __init__(self, manifest: Manifest, config: dict[str, Any]) -> None:
        self._manifest = manifest
        transform = open_clip.image_transform(
            config["size"],
            is_train=False,
            resize_mode=config["resize_mode"],
            interpolation=config["interpolation"],
        )
        # With is_train False it returns one transform, not the three that its annotation allows.
        self._in_bytes, _ = cut(cast(Transform, transform))

    def __call__(self, shard: GlyphShard) -> _Prepared:
        samples = list(read_shard(self._manifest, shard))
        return _Prepared(
            torch.stack([self._in_bytes(sample.image) for sample in samples]),
            [sample.caption for sample in samples],
            [sample.meta.get("name", sample.caption) for sample in samples],
        )


def _save_prepared(path: Path, prepared: _Prepared) -> None:
    texts = json.dumps([prepared.captions, prepared.names])
    metadata = {"texts": texts, "checksum": _checksum(prepared.pixels, texts)}
    write_atomically(path, save({"pixels": prepared.pixels}, metadata))


def _load_prepared(path: Path) -> _Prepared | None:
    """Return what a file holds, or None if it is damaged and must be made again."""
    try:
        with safe_open(path, "pt") as file:
            # A copy: a mapped file that another process cuts short ends this one with a bus error.
            pixels, metadata = file.get_tensor("pixels").clone(), file.metadata()
        if _checksum(pixels, metadata["texts"]) != metadata["checksum"]:
            return None
        return _Prepared(pixels, *json.loads(metadata["texts"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _checksum(pixels: Tensor, texts: str) -> str:
    return str(zlib.crc32(texts.encode(), zlib.crc32(pixels.numpy().data.cast("B"))))


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Return the number of batches of at most ``batch_size`` that hold every sample once."""
    return -(-samples // batch_size)


def epoch_order(samples: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Return an epoch's batches as sample indices: every sample once, in sizes that differ by one at most.

    It is a pure function of its arguments, so that a run can resume anywhere.
    """
    order = np.random.default_rng([seed, epoch]).permutation(samples)
    return [torch.from_numpy(part) for part in np.array_split(order, steps_per_epoch(samples, batch_size))]


class MemoryStream:
    """Gives an epoch's batches of pairs in memory, of each the part that is this rank's.

    Parameters
    ----------
    batch_size : int
        Pairs per step over all ranks, at most.
    rank, ranks : int
        This rank, and how many there are; a batch is cut into contiguous parts whose sizes differ by one at most.
    features : CachedReference or SeveralReferences, optional
        The reference's features of these pairs, in one view.
    """

    def __init__(
        self,
        pairs: PreparedPairs,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        features: CachedReference | SeveralReferences | None = None,
    ) -> None:
        self._pairs, self._batch_size, self._seed, self._features = pairs, batch_size, seed, features
        self._rank, self._ranks = rank, ranks
        self.steps_per_epoch = steps_per_epoch(len(pairs), batch_size)
        self._size = math.ceil(math.ceil(len(pairs) / self.steps_per_epoch) / ranks)

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yield this rank's part of the epoch's batches, from step ``first`` of the epoch on."""
        for index in epoch_order(len(self._pairs), self._batch_size, self._seed, epoch)[first:]:
            batch = self._pairs.batch(index.tensor_split(self._ranks)[self._rank], self._size)
            yield batch if self._features is None else batch._replace(reference_inputs=self._features.rows(batch.index))

    def state_dict(self) -> dict[str, int]:
        """Return an empty state: every pair can be used, so there is nothing to count."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load the empty state."""

    def close(self) -> None:
        """Do nothing: the pairs are in memory."""
