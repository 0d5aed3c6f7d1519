"""Steering in your own training loop: the losses of a batch go in, the loss to minimize and weights come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drrho.accumulation import accumulate
from drrho.divergences import Divergence, check_divergence
from drrho.integrations.reference_losses import ReferenceLosses
from drrho.ranks import Group
from drrho.reference import excess_losses
from drrho.risk import RobustRisk, constrained_risk, drrho_risk, hybrid_risk, penalized_risk
from drrho.validation import ArrayLike, as_row, entries

__all__ = ["Steering", "SteeringStep"]

Part = TypeVar("Part")


class SteeringStep(NamedTuple):
    """What a batch's losses give.

    ``loss`` is the scalar to call ``backward`` on: the value times the number of ranks, because wrappers such as
    DistributedDataParallel average gradients over ranks, where those of a risk over all of them have to be added up.
    ``value`` is the robust risk of the excess losses of all ranks' samples: what to log. ``weights`` and ``excess``,
    ``losses - coefficient * reference_losses``, are of this rank's samples ``[..., n]``, detached; the weights of all
    ranks sum to one.

    Examples
    --------
    >>> import torch
    >>> from drrho import CVaR
    >>> from drrho.integrations import Steering
    >>> step = Steering(CVaR(0.5))(torch.tensor([2.0, 2.0, 3.0, 1.0]), [0.1, 1.0, 4.0, 1.0])
    >>> step.weights.tolist(), [round(excess, 3) for excess in step.excess.tolist()]
    ([0.5, 0.5, 0.0, 0.0], [1.9, 1.0, -1.0, 0.0])
    """

    loss: Tensor
    value: Tensor
    weights: Tensor
    excess: Tensor


class Steering:
    """Minimize a robust risk of the excess losses over a reference model, not the mean loss.

    Parameters
    ----------
    divergence : Divergence
        ``KL()``, ``ChiSquare()``, ``CVaR(alpha)`` or any other.
    radius, strength, rho : float, optional
        ``radius`` bounds the divergence (`drrho.constrained_risk`), ``strength`` is its price (`drrho.penalized_risk`),
        both give `drrho.hybrid_risk`, and ``rho`` is n times the radius, n the samples of all ranks. CVaR needs none.
    reference : ReferenceLosses, tensor, array or sequence ``[N]``, optional
        The reference's losses by sample index; else each call is given them.
    coefficient : float
        How much of the reference's losses to subtract.
    group : "all", ProcessGroup or None
        The ranks over which a batch is spread: those of torch.distributed, where that is initialized; a process group;
        or, with None, this process alone, so that every rank weighs its own samples.

    Examples
    --------
    >>> from drrho import KL
    >>> steering = Steering(KL(), strength=1.0)
    >>> losses = torch.tensor([2.0, 2.0, 2.0], requires_grad=True)
    >>> step = steering(losses, [0.1, 1.0, 4.0])  # the third is hard for the reference, too
    >>> [round(weight, 3) for weight in step.weights.tolist()]
    [0.701, 0.285, 0.014]
    """

    def __init__(
        self,
        divergence: Divergence,
        *,
        radius: float | None = None,
        strength: float | None = None,
        rho: float | None = None,
        reference: ReferenceLosses | ArrayLike | None = None,
        coefficient: float = 1.0,
        group: Group | Literal["all"] = "all",
    ) -> None:
        check_divergence(divergence)
        if isinstance(group, str) and group != "all":
            raise ValueError(f"group must be 'all', a process group or None, got {group!r}")
        every = {"radius": radius, "strength": strength, "rho": rho}
        given = {name: value for name, value in every.items() if value is not None}
        for name, value in given.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if ("rho" in given and len(given) > 1) or (not given and divergence.has_radius):
            raise ValueError(f"give radius, strength, both of these, or rho, got {' and '.join(given) or 'none'}")
        if not abs(coefficient) < math.inf:
            raise ValueError(f"coefficient must be finite, got {coefficient}")
        if reference is not None and not isinstance(reference, ReferenceLosses):
            reference = as_row(reference, "reference").detach()
        self.divergence, self.reference, self.coefficient = divergence, reference, coefficient
        self._radius, self._strength, self._rho, self._group = radius, strength, rho, group

    def __call__(
        self,
        losses: Tensor,
        reference_losses: ArrayLike | None = None,
        *,
        index: ArrayLike | None = None,
        base_weights: ArrayLike | None = None,
    ) -> SteeringStep:
        """Return the loss of a batch, with its weights.

        ``losses`` ``[..., n]`` are of this rank's samples, with their graph; leading dimensions are separate batches,
        over which ``loss`` is the mean. Either ``reference_losses`` of the same shape are given, or ``index`` ``[b]``,
        which samples these are, where the reference's losses are stored (of sequences, one after another).
        ``base_weights`` are the weights without steering, as for `drrho.constrained_risk`.

        Raises
        ------
        ValueError, TypeError
            For losses or reference losses that are NaN, infinite or of different shapes, and for a batch of fewer than
            two samples. Over ranks all of them raise, so that none waits for another.
        """
        group = self.group
        try:
            reference = self._reference_losses(reference_losses, index, losses.device)
            found: Tensor | Exception = excess_losses(losses, reference, self.coefficient)
        except Exception as error:  # also of a file system: the other ranks are told
            found = error
        excess = _agreed(found, losses.device, group)
        risk = self._risk(excess, base_weights, group)
        return SteeringStep(risk.value.mean() * self.ranks, risk.value, risk.weights.detach(), excess.detach())

    @property
    def ranks(self) -> int:
        """How many ranks a batch is spread over."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def accumulate(
        self,
        model: nn.Module,
        losses_of: Callable[[Part], Tensor | tuple[Tensor, Tensor]],
        parts: Sequence[Part],
        reference_losses: ArrayLike | None = None,
        *,
        index: ArrayLike | None = None,
        gradient_scale: float = 1.0,
    ) -> SteeringStep:
        """Add the gradient of a batch to ``.grad`` whose graph does not fit in memory, from one part after another.

        It is that of one call with the whole batch, by `drrho.accumulation.accumulate`: two or more parts are computed
        twice, first without a graph. ``losses_of`` runs ``model``, with its wrapper if it has one, on a part and
        returns its losses ``[c]``, or these and the reference's. ``reference_losses`` or ``index`` are of the whole
        batch, in the order of the parts; ``gradient_scale`` multiplies gradients, as does ``GradScaler.get_scale()``.
        """

        def outputs(part: Part) -> tuple[Tensor, ...]:
            return (found,) if isinstance(found := losses_of(part), Tensor) else found

        def step(losses: Tensor, live: ArrayLike | None = reference_losses) -> SteeringStep:
            return self(losses, live, index=index)

        return accumulate(outputs, parts, step, model=model, gradient_scale=gradient_scale * self.ranks)

    @property
    def group(self) -> Group:
        """The ranks over which a batch is spread now."""
        if not isinstance(self._group, str):
            return self._group
        is_one = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        return None if is_one else dist.group.WORLD

    def _reference_losses(self, given: ArrayLike | None, index: ArrayLike | None, device: torch.device) -> ArrayLike:
        if (given is None) == (index is None):
            raise ValueError("give reference_losses, or index with Steering(reference=...): exactly one of both")
        if index is None:
            return given.to(device) if isinstance(given, Tensor) else given  # pyright: ignore[reportReturnType]
        if self.reference is None:
            raise ValueError("index needs Steering(reference=...): the reference's losses by sample index")
        if isinstance(self.reference, ReferenceLosses):
            return self.reference.lookup(index).to(device)
        return entries(self.reference, index, "reference").to(device)

    def _risk(self, excess: Tensor, base_weights: ArrayLike | None, group: Group) -> RobustRisk:
        how: Any = {"base_weights": base_weights, "group": group}
        if self._rho is not None:
            return drrho_risk(excess, torch.zeros_like(excess), self.divergence, rho=self._rho, **how)
        if self._strength is None:
            return constrained_risk(excess, self.divergence, self._radius or 0.0, **how)
        if self._radius is not None:
            return hybrid_risk(excess, self.divergence, self._radius, self._strength, **how)
        return penalized_risk(excess, self.divergence, self._strength, **how)


def _agreed(found: Tensor | Exception, device: torch.device, group: Group) -> Tensor:
    """Return the excess losses; raise on all ranks what one of them has found, or that there are fewer than two."""
    count, faults = (found.shape[-1], 0) if isinstance(found, Tensor) else (0, 1)
    if group is not None:
        both = torch.tensor([count, faults], device=device)
        dist.all_reduce(both, group=group)
        count, faults = both.tolist()
    if isinstance(found, Exception):
        raise found
    if faults:
        raise ValueError(f"{faults} of the other ranks refused their losses: see the error there")
    if count < 2:
        raise ValueError(f"losses must be of at least 2 samples to compare, got {count}; data loader: drop_last=True")
    return found
