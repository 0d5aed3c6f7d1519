"""Batches of samples that stay in memory: small pictures take longer to decode than to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .batch import Batch, Reference
from .draws import Draws
from .order import RankPart
from .reader import Reader, Reason, Skip, decode

_UNKNOWN, _KEPT, _SKIPPED = 0, 1, 2


class KeptBatches:
    """Makes the batch of (epoch, step) of samples as they were at their first visit, with their first caption.

    Parameters
    ----------
    transform : callable
        Maps a PIL image to the model's input, and draws nothing.
    tokenize : callable
        Maps a list of captions to tokens ``[b, length]``.
    samples : int
        How many there are: so many images and captions are kept at most, a copy in each process.
    reference : Reference, optional
        One whose features are cached, in one view.
    """

    def __init__(
        self,
        part: RankPart,
        reader: Reader,
        transform: Callable[[Image.Image], Tensor],
        tokenize: Callable[[Sequence[str]], Tensor],
        samples: int,
        reference: Reference | None = None,
    ) -> None:
        self._part, self._reader, self._reference = part, reader, reference
        self._transform, self._tokenize = transform, tokenize
        image, text = transform(Image.new("RGB", (64, 64))), tokenize([""])[0]
        # Memory is taken where a row is written.
        self._images = image.new_empty(samples, *image.shape)
        self._texts = torch.empty(samples, *text.shape, dtype=torch.int32)
        self._state = np.full(samples, _UNKNOWN, np.uint8)
        self._reasons: dict[int, Reason] = {}

    def __call__(self, key: tuple[int, int]) -> Batch:
        """Return this rank's part of the batch."""
        visited = self._part.visits(*key).index
        self._keep(np.unique(visited[self._state[visited] == _UNKNOWN]).tolist())
        index = torch.from_numpy(visited[self._state[visited] == _KEPT].astype(np.int64))
        skipped = Counter(self._reasons[number] for number in visited[self._state[visited] == _SKIPPED].tolist())
        inputs = None
        if self._reference is not None:
            inputs = self._reference.collate(index, [Draws(0, 0, 0, 0)] * len(index), [], [])
        return Batch(self._images[index], self._texts[index], index, dict(skipped), inputs, self._part.size)

    def _keep(self, indices: list[int]) -> None:
        captions: dict[int, str] = {}
        for raw in self._reader.read_many(indices):
            pair = raw if isinstance(raw, Skip) else decode(raw)
            if isinstance(pair, Skip):
                self._state[pair.index], self._reasons[pair.index] = _SKIPPED, pair.reason
                continue
            self._images[pair.index] = self._transform(pair.image)
            captions[pair.index] = pair.caption
        if captions:
            rows = torch.tensor(list(captions))
            self._texts[rows] = self._tokenize(list(captions.values())).to(torch.int32)
            self._state[rows.numpy()] = _KEPT
