"""Rows of losses as the solvers see them: normalized, with sums that reach over all ranks.

What has one entry per loss stays a tensor on its device. What has one entry per row (multipliers, brackets,
moments) is a NumPy array on the host, where an iteration decides how to go on: a step on a handful of numbers
costs a tenth of what it costs as device operations, and each pass over the losses synchronizes just once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Term = Tensor | tuple[Tensor, Tensor]


class Rows(NamedTuple):
    """Rows ``d`` ``[rows, n]`` with ``-1 <= d <= 0``: losses minus their row's maximum, divided by their row's range.

    ``base`` ``[rows or 1, n]`` holds base weights (None: uniform); with a ``group`` every rank holds a part of
    the last dimension, and ``count`` is n over all of them.
    """

    d: Tensor
    base: Tensor | None
    group: Any
    count: int

    def means(self, *terms: Term) -> Tensor:
        """Return base-weighted means over the last dimension, ``[terms, rows]``; a pair means its product."""
        sums = []
        for term in terms:
            first, second = term if isinstance(term, tuple) else (term, None)
            if self.base is not None:
                first = first * self.base
            sums.append(first.sum(-1) if second is None else inner(first, second))
        return self.total(torch.stack(sums)) / (1 if self.base is not None else self.count)

    def host_means(self, *terms: Term) -> np.ndarray:
        """Return `means` as float64 on the host."""
        return self.means(*terms).cpu().numpy()

    def total(self, part: Tensor) -> Tensor:
        """Return the sum of every rank's part."""
        if self.group is not None:
            dist.all_reduce(part, group=self.group)
        return part

    def column(self, per_row: np.ndarray) -> float | Tensor:
        """Return what broadcasts one host number per row against ``d``."""
        if len(per_row) == 1:
            return float(per_row[0])
        return torch.from_numpy(per_row).to(self.d.device)[:, None]

    def select(self, chosen: np.ndarray) -> Rows:
        """Return the chosen rows only."""
        if chosen.all():
            return self
        mask = torch.from_numpy(chosen).to(self.d.device)
        base = self.base if self.base is None or len(self.base) == 1 else self.base[mask]
        return self._replace(d=self.d[mask], base=base)

    def sample(self, stride: int) -> Rows | None:
        """Return every stride-th loss of long uniform rows on one rank, to start an iteration from; else None."""
        if self.base is not None or self.group is not None or self.count < 4096 * stride:
            return None
        d = self.d[:, ::stride].contiguous()
        return self._replace(d=d, count=d.shape[-1])


class Dual(NamedTuple):
    """Multipliers of rows in units of ``d``, float64 ``[rows]`` on the host.

    ``distance`` is D at them where the solver knows it better than a sum over the weights would, else None;
    ``saturated`` marks rows that rounding has put at the hard maximum.
    """

    threshold: np.ndarray
    strength: np.ndarray
    distance: np.ndarray | None
    saturated: np.ndarray


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Return ``sum_i first_i second_i`` of each row."""
    if len(first) == 1 and len(second) == 1:
        return torch.mv(first, second[0])
    return (first * second).sum(-1)
