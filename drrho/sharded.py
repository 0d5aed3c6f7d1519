"""Rows of float32 numbers, one per sample of the data, sharded over ranks: read and write the rows of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from drrho.ranks import Group
from drrho.validation import ArrayLike, as_index, as_numbers


class ShardedRows:
    """k columns of float32 for n samples.

    With a group, every rank keeps a contiguous block of ``ceil(n / ranks)`` samples (the last ranks may keep fewer),
    and a step sends the values of a batch's samples to their owners. ``total``, ``lookup``, ``collect`` and
    ``load_state_dict`` are then collective: every rank of the group calls them, with its own arguments. If the
    arguments of one rank are invalid, all ranks raise a ``ValueError``.

    Parameters
    ----------
    samples : int
        Number of samples n over all ranks, >= 1; indices run from 0 to n - 1. A rank keeps ``4 k ceil(n / ranks)``
        bytes.
    fill : sequence of float
        Initial value of each of the k columns.
    name, noun : str
        Key of the columns in a state, and their name in error messages.
    device : torch.device or str
        Device of this rank's rows; every backend of the group works with every device.
    group : torch.distributed.ProcessGroup, optional
        Ranks that share the samples; by default this process keeps all.

    Attributes
    ----------
    own : Tensor ``[k, rows]``
        The columns of this rank's samples, to be changed in place.
    """

    def __init__(
        self,
        samples: int,
        fill: Sequence[float],
        name: str,
        noun: str,
        device: torch.device | str = "cpu",
        group: Group = None,
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples must be >= 1, got {samples}")
        self._samples, self._name, self._noun, self._group = samples, name, noun, group
        self._ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        self._block = math.ceil(samples / self._ranks)
        self._start, self._stop = (min(k * self._block, samples) for k in (rank, rank + 1))
        columns = torch.tensor(fill, dtype=torch.float32, device=device)[:, None]
        self.own = columns.repeat(1, self._stop - self._start)

    def __len__(self) -> int:
        return self._samples

    def total(self, count: int) -> int:
        """Return the sum of all ranks' counts."""
        if self._group is None:
            return count
        counts = torch.tensor(count, device=_wire(self._group))
        dist.all_reduce(counts, group=self._group)
        return int(counts)

    def checked(self, index: ArrayLike) -> tuple[Tensor, str]:
        """Return the index as int64 on the device of the rows, and an error message, empty if the index is valid."""
        try:
            index = as_index(index, "index").to(self.own.device, torch.int64)
        except ValueError as error:
            return self.own.new_empty(0), str(error)
        outside = (index < 0) | (index >= len(self))
        wrong = f"index must lie in [0, {len(self)}), got {int(index[outside][0])}" if bool(outside.any()) else ""
        return index, wrong

    def checked_values(
        self, index: Tensor, values: Sequence[ArrayLike], name: str, law: str
    ) -> tuple[list[Tensor], str]:
        """Return the values of a checked index as detached float32 tensors, and an error message as `checked` does."""
        try:
            columns = [as_numbers(each, f"{name}[{k}]").detach().to(self.own) for k, each in enumerate(values)]
        except TypeError as error:
            return [], str(error)
        faults = (fault_of_values(index, each, f"{name}[{k}]", law) for k, each in enumerate(columns))
        return columns, next(filter(None, faults), "")

    def lookup(self, index: ArrayLike, columns: slice = slice(None)) -> Tensor:
        """Return columns ``[k, b]`` of the samples ``index`` ``[b]``, integers in any order and possibly repeated.

        Raises
        ------
        ValueError
            If ``index`` on some rank has another shape or dtype, or an entry outside ``[0, n)``.
        """
        index, fault = self.checked(index)
        route = self._route(index, fault)
        rows = route.to_owners(index) - self._start
        return route.back(self.own[columns].index_select(1, rows).T).T.contiguous()

    def collect(self, index: Tensor, values: Sequence[Tensor], fault: str) -> tuple[Tensor, Tensor]:
        """Return the values that all ranks pass for this rank's samples: positions in `own` ``[c]``, values ``[m, c]``.

        Parameters
        ----------
        index : Tensor ``[b]``
            An index that `checked` returned.
        values : sequence of m Tensors ``[b]``
            Values of one floating dtype, returned in float64; ignored if there is a fault.
        fault : str
            Error message about the arguments, empty if they are valid.

        Raises
        ------
        ValueError
            If there is a fault on some rank.
        """
        route = self._route(index, fault)
        # float64 has the width of the index, so that both are sent in one message.
        wide = torch.stack(list(values), 1).to(self.own.device, torch.float64)
        index, wide = route.to_owners(torch.cat([index[:, None], wide.view(torch.int64)], 1)).tensor_split([1], 1)
        return index[:, 0] - self._start, wide.contiguous().view(torch.float64).T

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of this rank's rows, with their position among all samples.

        Returns
        -------
        dict of Tensor
            The columns under their name, ``[k, rows]``, float32; ``offset``, the sample of the first row; ``samples``,
            n. Not collective.
        """
        place = {"offset": torch.tensor(self._start), "samples": torch.tensor(len(self))}
        return {self._name: self.own.clone(), **place}

    def load_state_dict(
        self, state: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]], fault_of: Callable[[Tensor], str]
    ) -> None:
        """Load the rows from states of any number of ranks, bit for bit.

        Parameters
        ----------
        state : mapping, or sequence of mappings
            Results of `state_dict` on one rank or on several, in any order; of memory-mapped tensors only this rank's
            rows are read. A state without ``offset`` and ``samples`` holds all samples.
        fault_of : callable
            Returns an error message about columns ``[k, rows]``, rows >= 1, of a state, empty if they are valid.

        Raises
        ------
        ValueError
            If on some rank the states do not cover the samples it keeps, overlap, belong to another number of samples,
            or hold columns with a fault.
        """
        states = [state] if isinstance(state, Mapping) else state
        self._announce(self._fault_of_states(states, fault_of), [0] * self._ranks)
        for part in states:
            mine, theirs = self._common_rows(part)
            mine.copy_(theirs)

    def _route(self, index: Tensor, fault: str) -> _Route:
        """Return the route of a batch to the owners of its rows, or raise on every rank if one has a fault."""
        if self._group is None or fault:
            order, give = index, [0] * self._ranks
        else:
            index, order = index.sort()
            give = torch.bincount(index // self._block, minlength=self._ranks).tolist()
        return _Route(order, give, self._announce(fault, give), self._group)

    def _announce(self, fault: str, give: list[int]) -> list[int]:
        """Exchange the numbers of rows to be sent between ranks; raise on every rank if one has a fault."""
        take = give
        if self._group is not None:
            ones = [1] * self._ranks
            numbers = torch.tensor([-1] * self._ranks if fault else give, device=_wire(self._group))
            take = _exchange(numbers, ones, ones, self._group).tolist()
        if fault:
            raise ValueError(fault)
        if -1 in take:
            raise ValueError(
                f"every rank must pass valid arguments, but those of rank {take.index(-1)} are refused: see the "
                "message of that rank"
            )
        return take

    def _common_rows(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the rows that this rank and a state have in common, of each, both ``[k, rows]``."""
        start, stop = self._span(state)
        first = max(start, self._start)
        last = max(first, min(stop, self._stop))
        mine = self.own[:, first - self._start : last - self._start]
        return mine, state[self._name][:, first - start : last - start]

    def _span(self, state: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return the first sample of a state and the one after its last."""
        start = int(state.get("offset", 0))
        return start, start + state[self._name].shape[1]

    def _fault_of_states(self, states: Sequence[Mapping[str, Tensor]], fault_of: Callable[[Tensor], str]) -> str:
        for state in states:
            shape = list(state[self._name].shape)
            if len(shape) != 2 or shape[0] != len(self.own):
                return f"state must hold {self._name} of shape [{len(self.own)}, rows], got {shape}"
            samples = int(state.get("samples", shape[1]))
            if samples != len(self):
                return f"state must hold {self._noun} for {len(self)} samples, got {samples}: it is of other data"
            start, stop = self._span(state)
            if start < 0 or stop > samples:
                return f"state must hold samples of [0, {samples}), got [{start}, {stop})"
            theirs = self._common_rows(state)[1]
            if theirs.numel() and (fault := fault_of(theirs)):
                return fault
        reached = self._start
        end = 0
        for start, stop in sorted(map(self._span, states)):
            if start < end:
                return f"states must not overlap, got samples [{start}, {min(end, stop)}) twice"
            if reached < start < self._stop:
                return f"states must cover all samples, but [{reached}, {start}) are missing"
            end, reached = stop, max(reached, stop)
        if reached < self._stop:
            return f"states must cover all samples, but [{reached}, {self._stop}) are missing"
        return ""


def fault_of_values(index: Tensor, values: Tensor, name: str, law: str, limit: float = math.inf) -> str:
    """Return an error message about the values ``[b]`` of samples ``index`` ``[b]``, empty if they are valid.

    They must be less than ``limit`` in magnitude, which ``law`` says in words.
    """
    if values.shape != index.shape:
        return f"{name} must have shape {list(index.shape)} like index, got {list(values.shape)}"
    wrong = ~(values.abs() < limit)
    if bool(wrong.any()):
        return f"{name} must be {law}, got {float(values[wrong][0])} for sample {int(index[wrong][0])}"
    return ""


def mean_over_repeats(values: Tensor, place: Tensor, counts: Tensor) -> Tensor:
    """Return the mean ``[k, m]`` of ``values`` ``[k, c]`` over occurrences, of which ``counts[j]`` have ``place`` j."""
    return values.new_zeros(len(values), len(counts)).index_add_(1, place, values) / counts


class _Route(NamedTuple):
    """The route of a batch's rows to their owners and back; without a group the rows are returned unchanged.

    ``order`` ``[b]`` sorts the rows by owner; ``give[k]`` of them are sent to rank k, which sends ``take[k]`` rows.
    """

    order: Tensor
    give: list[int]
    take: list[int]
    group: Group

    def to_owners(self, rows: Tensor) -> Tensor:
        """Send every row of ``rows`` ``[b, ...]`` to its owner, and return the received rows in the order of ranks."""
        return rows if self.group is None else _exchange(rows[self.order], self.give, self.take, self.group)

    def back(self, answers: Tensor) -> Tensor:
        """Send ``answers``, in the order of `to_owners`, back; return those to this rank's rows, in their order."""
        if self.group is None:
            return answers
        received = _exchange(answers, self.take, self.give, self.group)
        return torch.empty_like(received).index_copy_(0, self.order, received)


def _exchange(rows: Tensor, give: list[int], take: list[int], group: Group) -> Tensor:
    """Send the first ``give[0]`` rows to rank 0, the next to rank 1, ...; return the ``take[k]`` of every rank k."""
    sent = rows.to(_wire(group)).contiguous()
    received = sent.new_empty((sum(take), *sent.shape[1:]))
    dist.all_to_all_single(received, sent, take, give, group=group)
    return received.to(rows.device)


def _wire(group: Group) -> str:
    """Return the device whose memory the group's backend exchanges."""
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"
