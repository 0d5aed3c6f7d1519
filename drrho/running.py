"""Running estimates of every anchor's normalizer, in log domain and sharded over ranks, and their rates.

For anchor i, ``u_i`` estimates ``mean_j exp(l_ij / tau)`` over all negatives of the data set from the batches in
which i appeared (SogCLR, Yuan et al. 2022; FastCLIP, Wei et al. 2024):
``u_i <- (1 - gamma) u_i + gamma g_i`` with the batch mean ``g_i``, and ``u_i = g_i`` at the first visit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from drrho.ranks import Group
from drrho.routes import BatchIndex, Route
from drrho.sharded import ShardedRows, mean_over_repeats
from drrho.validation import ArrayLike

__all__ = [
    "RunningEstimates",
    "RunningThresholds",
    "adaptive_log_rates",
    "cosine_gamma",
    "moving_average",
    "published_final_gamma",
]


class RunningEstimates:
    """``log u`` for n samples and the two directions (image to text, text to image).

    A sample that was never visited holds ``-inf``, which no finite loss can produce: ``u = exp(-inf) = 0``.
    Estimates are kept in float32: one of size s comes back within ``2^-24 |s|``.

    With a group, every rank keeps a contiguous block of ``ceil(n / ranks)`` samples (the last ranks may keep fewer),
    and a step exchanges the rows of its batch with their owners. ``lookup``, ``update``, ``load_state_dict`` and
    ``visited`` are then collective: every rank of the group calls them, with its own arguments. If the arguments of one
    rank are invalid, all ranks raise a ``ValueError`` and no state changes. In a block of
    `drrho.validation.deferred_checks` a sample whose estimate is not finite keeps the one that it has.

    Parameters
    ----------
    samples : int
        Number of samples n over all ranks, >= 1; indices run from 0 to n - 1. A rank keeps ``8 ceil(n / ranks)`` bytes.
    device : torch.device or str
        Device of this rank's estimates; every backend of the group works with every device.
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

    def __init__(self, samples: int, device: torch.device | str = "cpu", group: Group = None) -> None:
        self._rows = ShardedRows(samples, (-torch.inf, -torch.inf), "log_u", "running estimates", device, group)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def visited(self) -> int:
        """Number of samples seen at least once, over all ranks."""
        parts = self._rows.own[0].split(2**24)  # a mask of all rows at once would take an eighth of the state's memory
        return self._rows.total(sum(int(torch.count_nonzero(part > -torch.inf)) for part in parts))

    def lookup(self, index: ArrayLike | BatchIndex) -> tuple[Tensor, Tensor]:
        """Return ``log u`` of the samples ``index``, both directions, each ``[b]`` on the device of the estimates.

        Parameters
        ----------
        index : tensor, array or sequence ``[b]`` of integers, or BatchIndex
            Samples of all data, in any order and possibly repeated; b >= 0 may differ from rank to rank.

        Raises
        ------
        ValueError
            If ``index`` on some rank has another shape or dtype, or an entry outside ``[0, n)``.
        """
        image, text = self._rows.lookup(index)
        return image, text

    def update(self, index: ArrayLike | BatchIndex, log_u: tuple[ArrayLike, ArrayLike]) -> None:
        """Store ``log u`` ``[b]`` of both directions for the samples ``index`` ``[b]``.

        A sample that occurs several times, on one rank or on several, gets the mean of its u (not of their
        logarithms). With estimates that were looked up before the step, this is one step with the mean of its
        ``g_i``::

            mean_k [(1 - gamma) u + gamma g_k] = (1 - gamma) u + gamma mean_k g_k

        independent of the order and the rank of its occurrences, up to rounding of a float64 sum.

        Parameters
        ----------
        index : tensor, array or sequence ``[b]`` of integers
            As in `lookup`.
        log_u : (Tensor, Tensor), each ``[b]``
            Estimates after the step, finite in float32; detached.

        Raises
        ------
        ValueError
            If on some rank ``index`` is refused by `lookup`, ``log_u`` has another shape than ``index``, or an
            estimate is not finite.
        """
        batch = self._rows.batch(index)
        directions, fault = self._rows.columns(batch, log_u, "log_u", "finite in float32 after a step")
        route, fresh = self._rows.collect(batch, directions, fault)
        self._rows.store(route, _averaged_over_repeats(fresh, route))

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of this rank's rows, with their position among all samples.

        Returns
        -------
        dict of Tensor
            ``log_u`` ``[2, rows]``, float32; ``offset``, the sample of the first row; ``samples``, n. Not collective.
        """
        return self._rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> None:
        """Load the rows from states of any number of ranks, bit for bit.

        Parameters
        ----------
        state : mapping, or sequence of mappings
            Results of `state_dict` on one rank or on several, in any order; of memory-mapped tensors only this rank's
            rows are read. A state without ``offset`` and ``samples`` holds all samples.

        Raises
        ------
        ValueError
            If on some rank the states do not cover the samples it keeps, overlap, belong to another number of samples,
            or hold NaN or ``inf``.
        """
        self._rows.load_state_dict(state, _fault_of_state)


def _fault_of_state(log_u: Tensor) -> str:
    for values in log_u:
        if not float(values.max()) < math.inf:
            return f"state must be finite, or -inf where never visited, got a maximum of {float(values.max())}"
    return ""


class RunningThresholds:
    """The running dual variables of divergences other than KL, for n samples and the two directions.

    `drrho.contrastive.contrastive_risk` takes and returns them as ``threshold``, in units of similarity. They are
    stored, looked up, sharded and loaded as `RunningEstimates` are. A sample that was never visited holds NaN. A
    sample that occurs several times in a batch gets the mean.

    Parameters
    ----------
    samples, device, group
        As for `RunningEstimates`.

    Examples
    --------
    >>> import torch
    >>> from drrho.running import RunningThresholds
    >>> thresholds = RunningThresholds(4)
    >>> thresholds.update([2, 0], (torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.0])))
    >>> thresholds.lookup([0, 2])[0].tolist()
    [-1.0, 0.5]
    """

    def __init__(self, samples: int, device: torch.device | str = "cpu", group: Group = None) -> None:
        self._rows = ShardedRows(samples, (math.nan, math.nan), "threshold", "running thresholds", device, group)

    def __len__(self) -> int:
        return len(self._rows)

    def lookup(self, index: ArrayLike | BatchIndex) -> tuple[Tensor, Tensor]:
        """Return the thresholds of the samples ``index`` ``[b]``; it raises as `RunningEstimates.lookup` does."""
        image, text = self._rows.lookup(index)
        return image, text

    def update(self, index: ArrayLike | BatchIndex, threshold: tuple[ArrayLike, ArrayLike]) -> None:
        """Store thresholds ``[b]`` of both directions; it raises as `RunningEstimates.update` does."""
        batch = self._rows.batch(index)
        directions, fault = self._rows.columns(batch, threshold, "threshold", "finite in float32 after a step")
        route, values = self._rows.collect(batch, directions, fault)
        self._rows.store(route, mean_over_repeats(values, route))

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of this rank's rows: ``threshold`` ``[2, rows]``, ``offset`` and ``samples``."""
        return self._rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> None:
        """Load the rows from states of any number of ranks; it raises as `RunningEstimates.load_state_dict` does."""
        self._rows.load_state_dict(
            state, lambda columns: "state must not hold infinite thresholds" if bool(columns.isinf().any()) else ""
        )


def _averaged_over_repeats(log_u: Tensor, route: Route) -> Tensor:
    """Return the log of the mean u of each distinct row of a route, from ``log_u`` ``[2, c]``."""
    values = log_u.double()
    peak = values.new_full((2, len(route.single)), -torch.inf)
    peak = peak.scatter_reduce(1, route.place.expand(2, -1), values, "amax")
    if not route.repeats:
        return peak
    return peak + torch.log(mean_over_repeats(torch.exp(values - peak[:, route.place]), route))


def moving_average(log_u: Tensor, log_g: Tensor, log_rate: Tensor | float, log_keep: Tensor | float) -> Tensor:
    """Return ``log((1 - rate) u + rate g)`` from logarithms, or ``log_g`` where u was never visited (``-inf``).

    Rate and ``1 - rate`` are both passed as logarithms, since neither can be computed from the other without loss of
    precision when it is close to zero.

    Examples
    --------
    >>> import math
    >>> import torch
    >>> from drrho.running import moving_average
    >>> log_u = torch.tensor([0.0, -torch.inf])  # the second was never visited
    >>> log_g = torch.tensor([3.0, 2.0]).log()
    >>> [round(u, 6) for u in moving_average(log_u, log_g, math.log(0.5), math.log(0.5)).exp().tolist()]
    [2.0, 2.0]
    """
    return torch.where(log_u == -torch.inf, log_g, torch.logaddexp(log_keep + log_u, log_rate + log_g))


def adaptive_log_rates(log_u: Tensor, log_step: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the logarithms of SCENT's rate ``sigmoid(log u + log_step)`` and of one minus it, for `moving_average`.

    With ``alpha = exp(log_step)`` the update is ``u <- (u + alpha u g) / (1 + alpha u)``, the proximal step of size
    alpha on the dual ``min_v E exp(l / tau - v) + v`` in the geometry of ``exp(-v)``: large u are forgotten fast, small
    ones slowly. Both logarithms are accurate where either rate is near one. Where u was never visited (``-inf``) the
    rate is one, and the logarithms are 0 and ``-inf``.

    Source: Wei et al. (2026), arXiv 2602.02877.

    Examples
    --------
    >>> import torch
    >>> from drrho.running import adaptive_log_rates
    >>> log_rate, log_keep = adaptive_log_rates(torch.tensor([0.0, 2.0]), 0.0)
    >>> [round(rate, 3) for rate in log_rate.exp().tolist()]  # a larger estimate moves faster
    [0.5, 0.881]
    """
    never = log_u == -torch.inf
    log_rate = logsigmoid(log_u + log_step).masked_fill(never, 0.0)
    return log_rate, logsigmoid(-log_u - log_step).masked_fill(never, -torch.inf)


def cosine_gamma(epoch: int, epochs: int, final: float) -> float:
    """Return the rate of an epoch: a cosine decay from 1 in the first epoch to ``final`` in the last.

    Examples
    --------
    >>> from drrho.running import cosine_gamma
    >>> [round(cosine_gamma(epoch, 5, 0.2), 2) for epoch in range(5)]
    [1.0, 0.88, 0.6, 0.32, 0.2]
    """
    if not 0 < final <= 1:
        raise ValueError(f"final gamma must lie in (0, 1], got {final}")
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch must lie in [0, {epochs}), got {epoch}")
    progress = epoch / max(1, epochs - 1)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def published_final_gamma(epochs: int) -> float:
    """Return the published final rate for training over that many epochs, ``min(1, 4.177 epochs^-0.7265)``.

    Source: the DRRho-CLIP release (Wei et al., ICML 2025).

    Examples
    --------
    >>> from drrho.running import published_final_gamma
    >>> round(published_final_gamma(30), 3)
    0.353
    """
    if epochs < 1:
        raise ValueError(f"epochs must be >= 1, got {epochs}")
    return min(1.0, 4.177 * epochs**-0.7265)
