"""The samples of a batch on every rank, and the routes of their rows to the ranks that keep them and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from drrho.ranks import Group, row_counts
from drrho.validation import ArrayLike, as_index

__all__ = ["BatchIndex"]


class BatchIndex:
    """The samples of a batch, those of every rank, as the host of each rank knows them.

    `drrho.running` and `drrho.temperature` take it in the place of an index. Samples and their number are then not
    exchanged again with every call, and no call waits for the device to learn them: a training step makes one.

    Parameters
    ----------
    parts : sequence of integer arrays ``[b_k]``
        The indices of rank k's samples, the same on every rank.
    group : torch.distributed.ProcessGroup, optional
        The ranks; by default this process is the only one.

    Attributes
    ----------
    counts : list of int
        The number of samples of every rank, as `drrho.contrastive.contrastive_risk` takes them.
    rank : int
        This process's place in the group.
    own : array ``[b]``
        The indices of this rank's samples.

    Examples
    --------
    >>> import torch
    >>> from drrho.running import RunningEstimates
    >>> estimates, batch = RunningEstimates(4), BatchIndex.gathered([2, 0])
    >>> estimates.update(batch, (torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.0])))
    >>> estimates.lookup(batch)[0].tolist(), batch.counts
    ([0.5, -1.0], [2])
    """

    def __init__(self, parts: Sequence[np.ndarray], group: Group = None) -> None:
        self.group, self.parts = group, parts
        self.counts = [len(part) for part in parts]
        self.rank = 0 if group is None else dist.get_rank(group)
        self.own = parts[self.rank]
        self._routes: dict[tuple[int, torch.device], Route] = {}

    @classmethod
    def gathered(cls, index: ArrayLike, group: Group = None) -> BatchIndex:
        """Exchange the indices of every rank's samples, which may be tensors on a device (collective).

        Raises
        ------
        ValueError
            If the index of some rank has not the shape ``[b]`` or is not of integers.
        """
        own, fault = np.empty(0, np.int64), ""
        try:
            own = as_index(index, "index").to("cpu", torch.int64).numpy()
        except ValueError as error:
            fault = str(error)
        counts = announced(len(own), fault, group)
        if group is None:
            return cls([own])
        padded = torch.zeros(max(counts), dtype=torch.int64)
        padded[: len(own)] = torch.from_numpy(own)
        parts = [torch.empty_like(padded, device=wire(group)) for _ in counts]
        dist.all_gather(parts, padded.to(wire(group)), group=group)
        return cls([part[:count].cpu().numpy() for part, count in zip(parts, counts, strict=True)], group)

    def route(self, block: int, device: torch.device) -> Route:
        """Return the route to the ranks of which each keeps ``block`` samples on a device."""
        key = block, device
        if key not in self._routes:
            self._routes[key] = Route(self, block, device)
        return self._routes[key]


class Route:
    """The route of a batch's rows to their owners and back, for blocks of ``block`` samples a rank.

    Attributes
    ----------
    rows : Tensor ``[c]``
        Rows of this rank's block that the batch has, as they arrive: in the order of ranks.
    single, place, counts : Tensor ``[m]``, ``[c]``, ``[m]``
        The distinct rows, the position of each of ``rows`` among them, and how often they occur.
    repeats : bool
        Whether a row occurs more than once.
    """

    def __init__(self, batch: BatchIndex, block: int, device: torch.device) -> None:
        self._group = batch.group
        owners = [part // block for part in batch.parts]
        order = np.argsort(owners[batch.rank], kind="stable")
        self._give = np.bincount(owners[batch.rank], minlength=len(owners)).tolist()
        own = [part[owner == batch.rank] for part, owner in zip(batch.parts, owners, strict=True)]
        self._take = [len(part) for part in own]
        rows = np.concatenate(own) - batch.rank * block
        single, place, counts = np.unique(rows, return_inverse=True, return_counts=True)
        self.repeats = len(single) < len(rows)
        parts = [rows, order, single, place, counts]
        on_device = uploaded(np.concatenate(parts), device).split([len(part) for part in parts])
        self.rows, self._order, self.single, self.place, self.counts = on_device

    def to_owners(self, rows: Tensor) -> Tensor:
        """Send every row of ``rows`` ``[b, ...]`` to its owner; return those received, in the order of `rows`."""
        return rows if self._group is None else _exchange(rows[self._order], self._give, self._take, self._group)

    def back(self, answers: Tensor) -> Tensor:
        """Send ``answers``, in the order of `rows`, back; return those to this rank's rows, in their order."""
        if self._group is None:
            return answers
        received = _exchange(answers, self._take, self._give, self._group)
        return torch.empty_like(received).index_copy_(0, self._order, received)


def announced(number: int, fault: str, group: Group) -> list[int]:
    """Return all ranks' numbers, >= 0; raise a ``ValueError`` on every rank if one has a fault."""
    numbers = [number] if group is None else row_counts(-1 if fault else number, group, torch.device(wire(group)))
    if fault:
        raise ValueError(fault)
    if -1 in numbers:
        raise ValueError(refusal(numbers.index(-1)))
    return numbers


def refusal(rank: int) -> str:
    """Return the error message for the arguments of another rank."""
    return f"every rank must pass valid arguments, but those of rank {rank} are refused: see the message of that rank"


def uploaded(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on the device, without waiting for it."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def wire(group: Group) -> str:
    """Return the device whose memory the group's backend exchanges."""
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"


def _exchange(rows: Tensor, give: list[int], take: list[int], group: Group) -> Tensor:
    """Send the first ``give[0]`` rows to rank 0, the next to rank 1, ...; return the ``take[k]`` of every rank k."""
    sent = rows.to(wire(group)).contiguous()
    received = sent.new_empty((sum(take), *sent.shape[1:]))
    dist.all_to_all_single(received, sent, take, give, group=group)
    return received.to(rows.device)
