"""The random numbers of a visit of a sample: they choose its augmentation, and among its captions or cached views."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch


class Draws(NamedTuple):
    """Random 64-bit numbers of one visit.

    ``choice`` chooses among captions and cached views; the others seed the global generators that augmentation uses.
    """

    for_torch: int
    for_numpy: int
    for_python: int
    choice: int

    def seed_generators(self) -> None:
        """Seed the global generators, so that the next augmentation is that of this visit."""
        torch.default_generator.manual_seed(self.for_torch)
        np.random.seed(self.for_numpy % 2**32)  # noqa: NPY002 (timm draws from the global generator)
        random.seed(self.for_python)


def visit_draws(seed: int, epoch: int, index: int, occurrence: int) -> Draws:
    """Return the draws of one visit in training."""
    return _digested(struct.pack("<4Q", seed, epoch, index, occurrence))


def view_draws(shard: int, row: int, view: int) -> Draws:
    """Return the draws of a cached view of a sample, the same for all training runs; ``choice`` is the view.

    ``shard`` is a number of 64 bits that stands for the sample's shard, whatever its place in a catalog.
    """
    return _digested(struct.pack("<3Q", shard, row, view))._replace(choice=view)


def _digested(place: bytes) -> Draws:
    return Draws(*struct.unpack("<4Q", blake2b(place, digest_size=32).digest()))


@contextmanager
def random_state_restored() -> Iterator[None]:
    """Restore the states of the global generators at the end of the block."""
    before = torch.default_generator.get_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])
