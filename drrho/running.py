"""Running estimates of every anchor's normalizer, kept in log domain and spread over ranks, and their rates.

For anchor i, ``u_i`` estimates ``mean_j exp(l_ij / tau)`` over all negatives of the data set from the batches in
which i appeared (SogCLR, Yuan et al. 2022; FastCLIP, Wei et al. 2024):
``u_i <- (1 - gamma) u_i + gamma g_i`` with the batch mean ``g_i``, and ``u_i = g_i`` at the first visit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid


class RunningEstimates:
    """``log u`` for n samples and the two directions (image to text, text to image).

    A sample that was never visited holds ``-inf``, which no finite loss can produce: ``u = exp(-inf) = 0``.
    Estimates are kept in float32: one of size s comes back within ``2^-24 |s|``.

    With a group, every rank keeps a contiguous block of ``ceil(n / ranks)`` samples, the last ones what is left, and
    a step sends the rows of its batch to their owners and back. Then ``lookup``, ``update``, ``load_state_dict`` and
    ``visited`` are collective: every rank of the group calls them, with arguments of its own. What one rank refuses,
    all refuse, each with a ``ValueError``, and nothing changes anywhere.

    Parameters
    ----------
    samples : int
        Number of samples n over all ranks, >= 1; indices run from 0 to n - 1. A rank keeps ``8 ceil(n / ranks)`` bytes.
    device : torch.device or str
        Where this rank's estimates live; any backend of the group goes with any device.
    group : torch.distributed.ProcessGroup, optional
        Ranks that share the samples; by default this process keeps all.

    Examples
    --------
    >>> import torch
    >>> estimates = RunningEstimates(4)
    >>> estimates.update(torch.tensor([2, 0]), (torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.0])))
    >>> image, text = estimates.lookup(torch.tensor([0, 1, 2]))
    >>> image.tolist(), text.tolist()
    ([-1.0, -inf, 0.5], [0.0, -inf, 2.0])
    """

    def __init__(self, samples: int, device: torch.device | str = "cpu", group: Any = None) -> None:
        if samples < 1:
            raise ValueError(f"samples must be >= 1, got {samples}")
        self._samples, self._group = samples, group
        self._ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        self._block = math.ceil(samples / self._ranks)
        self._start, self._stop = (min(k * self._block, samples) for k in (rank, rank + 1))
        rows = self._stop - self._start
        self._log_u = torch.full((2, rows), -torch.inf, dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return self._samples

    @property
    def visited(self) -> int:
        """Number of samples seen at least once, over all ranks."""
        parts = self._log_u[0].split(2**24)  # a mask of all rows at once would be an eighth of the state
        here = sum(int(torch.count_nonzero(part > -torch.inf)) for part in parts)
        if self._group is None:
            return here
        count = torch.tensor(here, device=_wire(self._group))
        dist.all_reduce(count, group=self._group)
        return int(count)

    def lookup(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``log u`` of the samples ``index``, both directions, each ``[b]`` on the device of the estimates.

        Parameters
        ----------
        index : Tensor ``[b]`` of integers
            Samples of all data, in any order, also repeated; b >= 0 may differ from rank to rank.

        Raises
        ------
        ValueError
            If ``index`` on some rank has another shape or dtype, or an entry outside ``[0, n)``.
        """
        index, fault = self._checked(index)
        route = self._route(index, fault)
        rows = route.to_owners(index) - self._start
        image, text = route.back(self._log_u.index_select(1, rows).T).T.contiguous()
        return image, text

    def update(self, index: Tensor, log_u: tuple[Tensor, Tensor]) -> None:
        """Store ``log u`` ``[b]`` of both directions for the samples ``index`` ``[b]``.

        A sample that occurs several times, on one rank or on several, gets the mean of its u (not of their
        logarithms). With estimates that were looked up before the step that is one step by the mean of its ``g_i``::

            mean_k [(1 - gamma) u + gamma g_k] = (1 - gamma) u + gamma mean_k g_k

        whatever the order and the rank of its occurrences, but for rounding of a float64 sum.

        Parameters
        ----------
        index : Tensor ``[b]`` of integers
            As in `lookup`.
        log_u : (Tensor, Tensor), each ``[b]``
            Estimates after the step, finite in float32; detached.

        Raises
        ------
        ValueError
            If on some rank ``index`` is refused by `lookup`, ``log_u`` has another shape than ``index``, or an
            estimate is not finite.
        """
        index, fault = self._checked(index)
        directions = [values.detach().to(self._log_u) for values in log_u]
        route = self._route(index, fault or _fault_of_estimates(index, directions))
        pairs = torch.stack(directions, 1).view(torch.int64)  # the bits of two float32, to travel with their index
        index, pairs = route.to_owners(torch.cat([index[:, None], pairs], 1)).split(1, 1)
        rows, fresh = _averaged_over_repeats(index[:, 0] - self._start, pairs.contiguous().view(torch.float32).T)
        self._log_u.index_copy_(1, rows, fresh.to(self._log_u))

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of this rank's rows, and which they are.

        Returns
        -------
        dict of Tensor
            ``log_u`` ``[2, rows]``, float32; ``offset``, the sample of the first row; ``samples``, n. Not collective.
        """
        place = {"offset": torch.tensor(self._start), "samples": torch.tensor(len(self))}
        return {"log_u": self._log_u.clone(), **place}

    def load_state_dict(self, state: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> None:
        """Take over the rows of states of any number of ranks, bit for bit.

        Parameters
        ----------
        state : mapping, or sequence of mappings
            What `state_dict` returned, on one rank or on several, in any order; of memory-mapped tensors only this
            rank's rows are read. Without ``offset`` and ``samples`` a state starts at sample 0 and is all there is.

        Raises
        ------
        ValueError
            If on some rank the states do not cover the samples it keeps, overlap, belong to another number of samples,
            or hold NaN or ``inf``.
        """
        states = [state] if isinstance(state, Mapping) else state
        self._announce(self._fault_of_states(states), [0] * self._ranks)
        for part in states:
            mine, theirs = self._common_rows(part)
            mine.copy_(theirs)

    def _checked(self, index: Tensor) -> tuple[Tensor, str]:
        """Return the index in int64, where the estimates live, and what is wrong with it, if anything."""
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            return index, f"index must have shape [b] and an integer dtype, got {list(index.shape)} and {index.dtype}"
        index = index.to(self._log_u.device, torch.int64)
        outside = (index < 0) | (index >= len(self))
        wrong = f"index must lie in [0, {len(self)}), got {int(index[outside][0])}" if bool(outside.any()) else ""
        return index, wrong

    def _route(self, index: Tensor, fault: str) -> _Route:
        """Return the way of a batch to the owners of its rows, or raise on every rank if one has a fault."""
        if self._group is None or fault:
            order, give = index, [0] * self._ranks
        else:
            index, order = index.sort()
            give = torch.bincount(index // self._block, minlength=self._ranks).tolist()
        return _Route(order, give, self._announce(fault, give), self._group)

    def _announce(self, fault: str, give: list[int]) -> list[int]:
        """Return how many rows come from each rank, given how many go there; raise on every rank if one has a fault."""
        take = give
        if self._group is not None:
            ones = [1] * self._ranks
            numbers = torch.tensor([-1] * self._ranks if fault else give, device=_wire(self._group))
            take = _exchange(numbers, ones, ones, self._group).tolist()
        if fault:
            raise ValueError(fault)
        if -1 in take:
            raise ValueError(
                f"every rank must give arguments that are accepted, but those of rank {take.index(-1)} are refused "
                "there: see its message"
            )
        return take

    def _common_rows(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the part of the own rows that a state holds, and the same part of the state, both ``[2, rows]``."""
        start, stop = _span(state)
        first = max(start, self._start)
        last = max(first, min(stop, self._stop))
        return self._log_u[:, first - self._start : last - self._start], state["log_u"][:, first - start : last - start]

    def _fault_of_states(self, states: Sequence[Mapping[str, Tensor]]) -> str:
        for state in states:
            shape = list(state["log_u"].shape)
            if len(shape) != 2 or shape[0] != 2:
                return f"state must hold log_u of shape [2, rows], got {shape}"
            samples = int(state.get("samples", shape[1]))
            if samples != len(self):
                return f"state must hold running estimates for {len(self)} samples, got {samples}: it is of other data"
            start, stop = _span(state)
            if start < 0 or stop > samples:
                return f"state must hold samples of [0, {samples}), got [{start}, {stop})"
            for values in self._common_rows(state)[1]:
                if values.numel() and not float(values.max()) < math.inf:
                    return f"state must be finite, or -inf where never visited, got a maximum of {float(values.max())}"
        reached = self._start
        end = 0
        for start, stop in sorted(map(_span, states)):
            if start < end:
                return f"states must not overlap, got samples [{start}, {min(end, stop)}) twice"
            if reached < start < self._stop:
                return f"states must cover all samples, but [{reached}, {start}) are missing"
            end, reached = stop, max(reached, stop)
        if reached < self._stop:
            return f"states must cover all samples, but [{reached}, {self._stop}) are missing"
        return ""


class _Route(NamedTuple):
    """The way of a batch's rows to their owners and back; without a group they stay where and as they are.

    ``order`` ``[b]`` sorts the rows by owner; ``give[k]`` of them go to rank k, which sends ``take[k]`` of its own.
    """

    order: Tensor
    give: list[int]
    take: list[int]
    group: Any

    def to_owners(self, rows: Tensor) -> Tensor:
        """Return what the ranks send here of their ``rows`` ``[b, ...]``, in the order of ranks."""
        return rows if self.group is None else _exchange(rows[self.order], self.give, self.take, self.group)

    def back(self, answers: Tensor) -> Tensor:
        """Return the answers to this rank's rows, in their own order, from answers in the order of `to_owners`."""
        if self.group is None:
            return answers
        received = _exchange(answers, self.take, self.give, self.group)
        return torch.empty_like(received).index_copy_(0, self.order, received)


def _exchange(rows: Tensor, give: list[int], take: list[int], group: Any) -> Tensor:
    """Send the first ``give[0]`` rows to rank 0, the next to rank 1, ...; return the ``take[k]`` of every rank k."""
    sent = rows.to(_wire(group)).contiguous()
    received = sent.new_empty((sum(take), *sent.shape[1:]))
    dist.all_to_all_single(received, sent, take, give, group=group)
    return received.to(rows.device)


def _wire(group: Any) -> str:
    """Return the device whose memory the group exchanges."""
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"


def _fault_of_estimates(index: Tensor, log_u: Sequence[Tensor]) -> str:
    for direction, values in enumerate(log_u):
        if values.shape != index.shape:
            return f"log_u[{direction}] must have shape {list(index.shape)} like index, got {list(values.shape)}"
        wrong = ~torch.isfinite(values)
        if bool(wrong.any()):
            return (
                f"log_u[{direction}] must be finite in float32 after a step, got {float(values[wrong][0])} "
                f"for sample {int(index[wrong][0])}"
            )
    return ""


def _averaged_over_repeats(index: Tensor, log_u: Tensor) -> tuple[Tensor, Tensor]:
    """Return each entry of ``index`` ``[b]`` once, and the log of the mean of its u, from ``log_u`` ``[2, b]``."""
    single, place, counts = index.unique(return_inverse=True, return_counts=True)
    if len(single) == len(index):
        return index, log_u
    values, place = log_u.double(), place.expand(2, -1)
    peak = values.new_full((2, len(single)), -torch.inf).scatter_reduce(1, place, values, "amax")
    total = torch.zeros_like(peak).scatter_add(1, place, torch.exp(values - peak.gather(1, place)))
    return single, peak + torch.log(total / counts)


def _span(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the first sample of a state and the one after its last."""
    start = int(state.get("offset", 0))
    return start, start + state["log_u"].shape[1]


def moving_average(log_u: Tensor, log_g: Tensor, log_rate: Tensor | float, log_keep: Tensor | float) -> Tensor:
    """Return ``log((1 - rate) u + rate g)`` of logarithms, ``log_g`` where u was never visited (``-inf``).

    Rate and remainder come as logarithms, since either may be too close to one to say so in the other's place.
    """
    return torch.where(log_u == -torch.inf, log_g, torch.logaddexp(log_keep + log_u, log_rate + log_g))


def adaptive_log_rates(log_u: Tensor, log_step: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the logarithms of SCENT's rate ``sigmoid(log u + log_step)`` and of one minus it, for `moving_average`.

    With ``alpha = exp(log_step)`` the update is ``u <- (u + alpha u g) / (1 + alpha u)``, the proximal step of size
    alpha on the dual ``min_v E exp(l / tau - v) + v`` in the geometry of ``exp(-v)``: large u are forgotten fast, small
    ones slowly. Both logarithms keep their digits where rate or remainder is near one. Where u was never visited
    (``-inf``) the rate is one: 0 and ``-inf``.

    Source: Wei et al. (2026), arXiv 2602.02877.
    """
    never = log_u == -torch.inf
    log_rate = logsigmoid(log_u + log_step).masked_fill(never, 0.0)
    return log_rate, logsigmoid(-log_u - log_step).masked_fill(never, -torch.inf)


def cosine_gamma(epoch: int, epochs: int, final: float) -> float:
    """Return the rate of an epoch: cosine decay from 1 in the first epoch to ``final`` in the last, constant within."""
    if not 0 < final <= 1:
        raise ValueError(f"final gamma must lie in (0, 1], got {final}")
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch must lie in [0, {epochs}), got {epoch}")
    progress = epoch / max(1, epochs - 1)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def published_final_gamma(epochs: int) -> float:
    """Return the published final rate for a training of that many epochs, ``min(1, 4.177 epochs^-0.7265)``.

    Source: the DRRho-CLIP release (Wei et al., ICML 2025).
    """
    if epochs < 1:
        raise ValueError(f"epochs must be >= 1, got {epochs}")
    return min(1.0, 4.177 * epochs**-0.7265)
