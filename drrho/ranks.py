"""Rows of a batch that is spread over ranks, any number per rank: gather them, and return gradients to their owners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

#: The ranks over which a computation is spread; None where this process holds everything.
Group: TypeAlias = "dist.ProcessGroup | None"


def row_counts(own: int, group: Group, device: torch.device) -> list[int]:
    """Return the number of rows of every rank."""
    if group is None:
        return [own]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([own], device=device), group=group)
    return [int(count) for count in counts]


def first_row(counts: Sequence[int], group: Group) -> int:
    """Return the position of this rank's first row among the rows of all ranks."""
    return 0 if group is None else sum(counts[: dist.get_rank(group)])


def gathered(own: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Return all ranks' rows in the order of ranks, without a gradient."""
    if group is None:
        return own
    padded = own.new_zeros(max(counts), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gathered_together(own: Sequence[Tensor], counts: Sequence[int], group: Group) -> list[Tensor]:
    """Return all ranks' rows of several tensors ``[b, ...]`` of one dtype, which are sent in one message."""
    if group is None:
        return list(own)
    flat = [part[:, None] if part.ndim == 1 else part.flatten(1) for part in own]
    together = gathered(torch.cat(flat, 1), counts, group).split([part.shape[1] for part in flat], 1)
    return [part.reshape(len(part), *each.shape[1:]) for part, each in zip(together, own, strict=True)]


def sum_to_owners(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Return this rank's rows summed over ranks, where every rank passes its terms for the rows of all ranks.

    It is a reduce-scatter over parts of unequal length: the terms are exchanged and added in the order of ranks, so
    that the sum is the same in every run, with half the traffic of an all-reduce.
    """
    return rows if group is None else terms_for_owners(rows, counts, group).sum(0)


def terms_for_owners(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Return every rank's terms for this rank's rows, ``[ranks, b, ...]``, of its terms for the rows of all ranks."""
    if group is None:
        return rows[None]
    own = counts[dist.get_rank(group)]
    received = rows.new_empty(len(counts), own, *rows.shape[1:])
    dist.all_to_all_single(
        received.view(len(counts) * own, *rows.shape[1:]),
        rows.contiguous(),
        [own] * len(counts),
        list(counts),
        group=group,
    )
    return received


def gathered_with_gradient(own: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Return all ranks' rows; the backward pass sums every rank's gradients of this rank's rows."""
    return own if group is None else _Gathered.apply(own, counts, group)  # pyright: ignore[reportReturnType]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, counts, group):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gather the rows."""
        ctx.counts, ctx.group = counts, group
        return gathered(own, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Sum the gradients of this rank's rows over ranks."""
        return sum_to_owners(grad, ctx.counts, ctx.group), None, None


def mean_over_ranks(terms: Tensor, group: Group) -> Tensor:
    """Return the mean of all ranks' terms, differentiable with respect to this rank's terms."""
    if group is None:
        return terms.mean()
    own = terms.detach().sum()
    both = torch.stack([own, torch.full_like(own, len(terms))])
    dist.all_reduce(both, group=group)
    own = terms.sum() / both[1]
    return own + (both[0] / both[1] - own.detach())
