"""Rows of float32 numbers, one per sample of the data, sharded over ranks: read and write the rows of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from drrho.ranks import Group
from drrho.routes import BatchIndex, Route, announced, refusal, wire
from drrho.validation import ArrayLike, as_numbers, checks_are_deferred


class ShardedRows:
    """k columns of float32 for n samples.

    With a group, every rank keeps a contiguous block of ``ceil(n / ranks)`` samples (the last ranks may keep fewer),
    and a step sends the values of a batch's samples to their owners. ``total``, ``lookup``, ``collect`` and
    ``load_state_dict`` are then collective: every rank of the group calls them, with its own arguments. If the
    arguments of one rank are invalid, all ranks raise a ``ValueError``. With a `BatchIndex` in the place of an index,
    ``lookup`` and ``collect`` take one exchange each where `drrho.validation.checks_are_deferred`.

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
        return count if self._group is None else int(self.sum(torch.tensor(count)))

    def sum(self, count: Tensor) -> Tensor:
        """Return the sum of all ranks' counts on the device of the rows, without waiting for it."""
        if self._group is None:
            return count
        total = count.to(wire(self._group), copy=True)
        dist.all_reduce(total, group=self._group)
        return total.to(self.own.device)

    def batch(self, index: ArrayLike | BatchIndex) -> BatchIndex:
        """Return the samples of all ranks: those given, or after an exchange of every rank's index.

        Raises
        ------
        ValueError
            If ``index`` on some rank has another shape or dtype, or an entry outside ``[0, n)``.
        """
        batch = index if isinstance(index, BatchIndex) else BatchIndex.gathered(index, self._group)
        if len(batch.parts) != self._ranks:
            raise ValueError(f"index must be of the {self._ranks} ranks of the group, got one of {len(batch.parts)}")
        outside = [part[(part < 0) | (part >= len(self))] for part in batch.parts]
        if any(map(len, outside)):
            own = outside[batch.rank]
            message = f"index must lie in [0, {len(self)}), got {own[0]}" if len(own) else ""
            raise ValueError(message or refusal([bool(len(part)) for part in outside].index(True)))
        return batch

    def route(self, batch: BatchIndex) -> Route:
        """Return the route of a batch's rows to the ranks that keep them."""
        return batch.route(self._block, self.own.device)

    def columns(self, batch: BatchIndex, values: Sequence[ArrayLike], name: str, law: str) -> tuple[list[Tensor], str]:
        """Return values of a batch's samples as detached float32 tensors, and an error message, empty if valid."""
        try:
            found = [as_numbers(each, f"{name}[{k}]").detach().to(self.own) for k, each in enumerate(values)]
        except TypeError as error:
            return [], str(error)
        return found, fault_of_values(batch, {f"{name}[{k}]": each for k, each in enumerate(found)}, law)

    def lookup(self, index: ArrayLike | BatchIndex, columns: slice = slice(None)) -> Tensor:
        """Return columns ``[k, b]`` of the samples ``index`` ``[b]``, integers in any order and possibly repeated.

        Raises
        ------
        ValueError
            As `batch` does.
        """
        route = self.route(self.batch(index))
        return route.back(self.own[columns].index_select(1, route.rows).T).T.contiguous()

    def collect(self, index: ArrayLike | BatchIndex, values: Sequence[Tensor], fault: str) -> tuple[Route, Tensor]:
        """Return the values that all ranks pass for this rank's samples: their route, and values ``[m, c]``.

        Parameters
        ----------
        index : integers ``[b]``, or BatchIndex
            Samples.
        values : sequence of m Tensors ``[b]``
            Values of one floating dtype, returned in float64; ignored if there is a fault.
        fault : str
            Error message about the arguments, empty if they are valid.

        Raises
        ------
        ValueError
            If there is a fault on some rank; where `checks_are_deferred`, on this rank.
        """
        batch = self.batch(index)
        announced(0, fault, None if checks_are_deferred() else self._group)
        route = self.route(batch)
        wide = torch.stack(list(values), 1).to(self.own.device, torch.float64)
        return route, route.to_owners(wide).T

    def store(self, route: Route, columns: Tensor) -> None:
        """Store columns ``[k, m]`` of the distinct rows of a route.

        Where `checks_are_deferred` a row keeps what it has if a number for it is not finite.
        """
        fresh = columns.to(self.own)
        if checks_are_deferred():
            fresh = torch.where(torch.isfinite(fresh).all(0), fresh, self.own.index_select(1, route.single))
        self.own.index_copy_(1, route.single, fresh)

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
        announced(0, self._fault_of_states(states, fault_of), self._group)
        for part in states:
            mine, theirs = self._common_rows(part)
            mine.copy_(theirs)

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


def fault_of_values(batch: BatchIndex, columns: Mapping[str, Tensor], law: str, limit: float = math.inf) -> str:
    """Return an error message about values ``[b]`` of a batch's samples by name, empty if they are valid.

    They must be less than ``limit`` in magnitude, which ``law`` says in words and is not asked where
    `checks_are_deferred`. The values are read once.
    """
    for name, values in columns.items():
        if list(values.shape) != [len(batch.own)]:
            return f"{name} must have shape {[len(batch.own)]} like index, got {list(values.shape)}"
    if checks_are_deferred():
        return ""
    wrong = torch.stack([~(values.abs() < limit) for values in columns.values()])
    for (name, values), has_wrong, mask in zip(columns.items(), wrong.any(1).tolist(), wrong, strict=True):
        if has_wrong:
            [place, *_] = mask.nonzero()[:, 0].tolist()
            return f"{name} must be {law}, got {float(values[place])} for sample {batch.own[place]}"
    return ""


def mean_over_repeats(values: Tensor, route: Route) -> Tensor:
    """Return the mean ``[k, m]`` of ``values`` ``[k, c]`` over the occurrences of each distinct row of a route."""
    total = values.new_zeros(len(values), len(route.counts))
    return total.index_add_(1, route.place, values) / route.counts
