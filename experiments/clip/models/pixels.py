"""A preprocessing without its last steps, which make floats of bytes: those run where the model is.

What workers prepare, and what is copied to a device, is then a quarter as large.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor

Transform = Callable[[Image.Image], Tensor]


class Normalization(NamedTuple):
    """``(pixels / 255 - mean) / std`` of images in bytes, by channel.

    In float32 it has the bits of torchvision's ToTensor and Normalize, on a GPU too; in another dtype, these rounded.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return bytes ``[b, 3, h, w]`` normalized."""
        negative_mean, std, white = _constants(self, pixels.device)
        # Two passes over memory. White is a tensor, because a GPU multiplies by the inverse of a number.
        shifted = torch.addcdiv(negative_mean, pixels, white)
        return torch.div(shifted, std, out=torch.empty_like(shifted, dtype=dtype))


@lru_cache(maxsize=32)
def _constants(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return minus the mean and the deviation, ``[3, 1, 1]``, and the value of white, on a device."""
    mean, std = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 1).to(device) for part in normalization)
    return -mean, std, torch.full((1,), 255.0, device=device)


def cut(transform: Transform) -> tuple[Transform, Normalization | None]:
    """Return a transform that ends before its normalization, and the normalization.

    A transform that does not end with torchvision's ToTensor and Normalize, such as one that erases patches of floats,
    is returned as it is, with None.
    """
    steps: list[Any] = list(transform.transforms) if isinstance(transform, Compose) else []
    if len(steps) < 2 or not isinstance(steps[-2], ToTensor) or not isinstance(steps[-1], Normalize):
        return transform, None
    mean, std = (tuple(np.asarray(part, np.float32).tolist()) for part in (steps[-1].mean, steps[-1].std))
    return _InBytes(Compose(steps[:-2]), Compose(steps[-2:])), Normalization(mean, std)


class _InBytes:
    """First steps of a transform, and the image that they give as bytes ``[3, h, w]``.

    If they give something else than an RGB image, the last steps follow here.
    """

    def __init__(self, first: Transform, last: Transform) -> None:
        self._first, self._last = first, last

    def __call__(self, image: Image.Image) -> Tensor:
        changed: Any = self._first(image)
        if not isinstance(changed, Image.Image) or changed.mode != "RGB":
            return self._last(changed)
        return torch.from_numpy(np.ascontiguousarray(np.asarray(changed).transpose(2, 0, 1)))
