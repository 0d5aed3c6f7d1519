"""Training methods: one small class each, from a batch's features to a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from open_clip.loss import SigLipLoss
from torch import Tensor

from drrho import KL, Divergence
from drrho.coefficient import AdaptiveCoefficient
from drrho.contrastive import contrastive_risk, info_nce, two_level_risk
from drrho.distillation import distillation_loss
from drrho.ranks import mean_over_ranks, row_counts
from drrho.running import RunningEstimates, RunningThresholds, cosine_gamma
from drrho.temperature import IndividualTemperatures

Features = tuple[Tensor, Tensor]  # of images and texts, unit vectors ``[b, d]``


TemperatureSchedule = Literal["constant", "model", "threshold"]
# Of "threshold", as FastCLIP-v3 has it (Wei et al., 2024, arXiv:2407.01445).
_LATE_TEMPERATURE, _LATE_RATE = 0.03, 1 / 3


class Loss(NamedTuple):
    """A scalar to minimize and the numbers worth logging beside it."""

    value: Tensor
    log: dict[str, float]


class Head(NamedTuple):
    """The model's own logit scale, ``exp(logit_scale)``, and bias, if it has one."""

    scale: Tensor
    bias: Tensor | None = None


class Method(Protocol):
    """What the training loop asks of a method."""

    #: Whether the model's own learnable temperature takes part.
    learns_scale: bool

    def loss(self, own: Features, index: Tensor, head: Head, epoch: int, reference: Features | None) -> Loss:
        """Return the loss of the target's features of samples ``index``, and the reference's if it is steered."""
        ...

    def logits_at(self, head: Head) -> tuple[float, float]:
        """Return the temperature and the bias of its logits as they stand."""
        ...

    def step(self, scale: float, rate: float) -> dict[str, float]:
        """Move what the method itself learns, after a backward pass of ``scale`` times the loss; return what to log.

        ``rate`` is the model's learning rate in units of its peak.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must keep."""
        ...

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take up a checkpoint's state: what `state_dict` returned on every rank that wrote it, in order."""
        ...


class _Stateless:
    """A method that learns nothing of its own."""

    def step(self, scale: float, rate: float) -> dict[str, float]:
        """Move nothing."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: what is learned is the model's."""
        return {}

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Accept nothing."""


class OpenCLIP(_Stateless):
    """InfoNCE over the batch with the model's learnable temperature, as open_clip trains."""

    learns_scale = True

    def __init__(self, group: Any = None) -> None:
        self._group = group

    def loss(self, own: Features, index: Tensor, head: Head, epoch: int, reference: Features | None) -> Loss:
        """Return InfoNCE at the model's temperature."""
        tau = 1 / head.scale
        return Loss(info_nce(*own, tau, group=self._group), {"temperature": tau.item()})

    def logits_at(self, head: Head) -> tuple[float, float]:
        """Return the model's temperature."""
        return 1 / head.scale.item(), 0.0


class SigLIP(_Stateless):
    """The pairwise sigmoid loss with the model's learnable scale and bias: open_clip's own ``SigLipLoss``."""

    learns_scale = True

    def __init__(self, group: Any = None) -> None:
        self._group = group
        rank, self._ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._loss = SigLipLoss(rank=rank, world_size=self._ranks)

    def loss(self, own: Features, index: Tensor, head: Head, epoch: int, reference: Features | None) -> Loss:
        """Return the sigmoid loss: the mean of the ranks' own, each this rank's images against all texts."""
        part = self._loss(*own, head.scale, head.bias) / self._ranks
        total = part.detach().clone()
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return Loss(part + (total - part.detach()), {"temperature": 1 / head.scale.item()})

    def logits_at(self, head: Head) -> tuple[float, float]:
        """Return the model's temperature and bias."""
        return 1 / head.scale.item(), 0.0 if head.bias is None else head.bias.item()


class ConstantTemperature:
    """One temperature that is not learned, with the methods of those that are."""

    def __init__(self, value: float) -> None:
        self._value = value

    def lookup(self, index: Tensor) -> float:
        """Return it."""
        return self._value

    def step(self, index: Tensor, temperature: float, rate: float) -> int:
        """Move nothing."""
        return 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Accept nothing."""


_BY_SAMPLE = (RunningEstimates, RunningThresholds, IndividualTemperatures)


class GlobalContrastive:
    """The global contrastive risk: FastCLIP v0 to v3; with a reference, DRRho-CLIP; of any divergence.

    Parameters
    ----------
    samples : int
        Size of the training split; sizes the running state.
    gamma_epochs : int
        The epoch, counted from 0, in which gamma arrives at ``final_gamma``, by a cosine from 1 in the first.
    temperature : ConstantTemperature, or GlobalTemperature or IndividualTemperatures of `drrho.temperature`
        FastCLIP v1, v3 (v0 with ``per_temperature``) and v2.
    coefficient : float or AdaptiveCoefficient
        How much of the reference's margins to subtract.
    final_gamma, log_step, eps, divergence, rho, per_temperature, published_temperature_gradient, group
        As in `drrho.contrastive.contrastive_risk`; with ``log_step`` gamma plays no part.
    is_steered : bool
        Whether a reference that is there takes part: FastCLIP has none, though what is beside it may.
    temperature_schedule : "constant", "model" or "threshold"
        Of a learned temperature's rate: constant, in step with the model's, or a third below a temperature of 0.03.
    device : torch.device or str
        Where the running state is kept and its rows go.
    """

    learns_scale = False

    def __init__(
        self,
        samples: int,
        gamma_epochs: int,
        temperature: Any,
        *,
        is_steered: bool = True,
        coefficient: float | AdaptiveCoefficient = 1.0,
        final_gamma: float = 1.0,
        log_step: float | None = None,
        eps: float = 0.0,
        divergence: Divergence | None = None,
        rho: float = 0.0,
        per_temperature: bool = False,
        published_temperature_gradient: bool = False,
        temperature_schedule: TemperatureSchedule = "constant",
        group: Any = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._temperature, self._coefficient = temperature, coefficient
        self._schedule, self._is_steered = temperature_schedule, is_steered
        self._gamma_epochs, self._final_gamma = gamma_epochs, final_gamma
        divergence = KL() if divergence is None else divergence
        self._is_kl = isinstance(divergence, KL)
        self._running = (RunningEstimates if self._is_kl else RunningThresholds)(samples, device, group)
        for_kl = {
            "log_step": log_step,
            "eps": eps,
            "per_temperature": per_temperature,
            "published_temperature_gradient": published_temperature_gradient,
        }
        self._options = {"divergence": divergence, "rho": rho, "group": group, **(for_kl if self._is_kl else {})}
        self._group = group
        self._looked_up: tuple[Tensor, Any] | None = None

    def loss(self, own: Features, index: Tensor, head: Head, epoch: int, reference: Features | None) -> Loss:
        """Return the contrastive risk and move the running state of these samples."""
        adaptive = self._options.get("log_step") is not None
        last = self._gamma_epochs
        gamma = 1.0 if adaptive else cosine_gamma(min(epoch, last), last + 1, self._final_gamma)
        log = {} if adaptive else {"gamma": gamma}
        options = self._options | {"gamma": gamma}
        if self._is_steered and reference is not None:
            options |= {"reference": reference, "coefficient": self._coefficient}
            if isinstance(self._coefficient, AdaptiveCoefficient):
                options["coefficient"] = self._coefficient.update(*own, reference=reference, group=self._group)
                log["coefficient"] = options["coefficient"]
        temperature = self._temperature.lookup(index)
        self._looked_up = index, temperature
        state = self._running.lookup(index)
        step = contrastive_risk(*own, temperature, **{"log_u" if self._is_kl else "threshold": state}, **options)
        self._running.update(index, step.log_u if self._is_kl else step.threshold)  # pyright: ignore[reportArgumentType]
        share = mean_over_ranks(torch.exp(-torch.cat(step.distances)), self._group)
        negatives = sum(row_counts(len(index), self._group, own[0].device)) - 1
        return Loss(step.value, {**log, "effective_negatives": negatives * share.item()})

    def logits_at(self, head: Head) -> tuple[float, float]:
        """Return the one temperature of all samples: there must not be one for each."""
        tau = self._temperature.lookup(torch.empty(0, dtype=torch.int64))
        return tau.item() if isinstance(tau, Tensor) else tau, 0.0

    def step(self, scale: float, rate: float) -> dict[str, float]:
        """Move learned temperatures; log their mean over the batch, and how many met a bound."""
        if self._looked_up is None or isinstance(self._temperature, ConstantTemperature):
            return {}
        index, taus = self._looked_up
        both = taus if isinstance(taus, tuple) else (taus,)
        for tau in both:
            tau.grad /= scale
        mean = torch.cat([tau.detach().reshape(-1) for tau in both]).mean().item()
        if self._schedule == "constant":
            rate = 1.0
        elif self._schedule == "threshold":
            rate = _LATE_RATE if mean < _LATE_TEMPERATURE else 1.0
        return {"temperature": mean, "temperatures_bounded": self._temperature.step(index, taus, rate)}

    def state_dict(self) -> dict[str, Tensor]:
        """Return running state, learned temperatures and the adaptive coefficient."""
        return {
            f"{name}.{key}": value for name, part in self._parts().items() for key, value in part.state_dict().items()
        }

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take them up: rows of samples from all ranks' states, what ranks share from the first."""
        for name, part in self._parts().items():
            prefix = f"{name}."
            own = [
                {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                for state in states
            ]
            part.load_state_dict(own if isinstance(part, _BY_SAMPLE) else own[0])

    def _parts(self) -> dict[str, Any]:
        parts = {"running": self._running, "temperature": self._temperature}
        if isinstance(self._coefficient, AdaptiveCoefficient):
            parts["coefficient"] = self._coefficient
        return parts


class TwoLevel(_Stateless):
    """The DRRho risk over samples: weights from each sample's own contrastive risk in excess of the reference's."""

    learns_scale = False

    def __init__(
        self,
        temperature: float,
        outer: Divergence,
        strength: float,
        group: Any = None,
    ) -> None:
        self._temperature, self._outer, self._group = temperature, outer, group
        self._strength = strength if outer.has_radius else None

    def loss(self, own: Features, index: Tensor, head: Head, epoch: int, reference: Features | None) -> Loss:
        """Return the outer risk over the batch."""
        risk = two_level_risk(
            *own,
            self._temperature,
            self._outer,
            reference=reference,
            strength=self._strength,
            group=self._group,
        )
        squares = risk.weights.detach().square().sum()
        if self._group is not None:
            dist.all_reduce(squares, group=self._group)
        return Loss(risk.value, {"effective_samples": 1 / squares.item()})

    def logits_at(self, head: Head) -> tuple[float, float]:
        """Return its temperature."""
        return self._temperature, 0.0


class Distilled:
    """Another method's loss plus a multiple of the distillation of the reference's similarities.

    Parameters
    ----------
    temperature : float
        Of the reference's softmax, and of the target's unless that is ``own``: the method's, as it stands.
    """

    def __init__(
        self, method: Method, weight: float, temperature: float, *, own: bool = False, group: Any = None
    ) -> None:
        self._method, self._weight, self._temperature, self._own, self._group = method, weight, temperature, own, group
        self.learns_scale = method.learns_scale

    def loss(self, own: Features, index: Tensor, head: Head, epoch: int, reference: Features | None) -> Loss:
        """Return the sum."""
        first = self._method.loss(own, index, head, epoch, reference)
        tau: Any = self._temperature
        if self._own:
            tau = 1 / head.scale if self.learns_scale else self._method.logits_at(head)[0]
        distilled = distillation_loss(
            *own, tau, reference=reference, reference_temperature=self._temperature, group=self._group
        )
        return Loss(first.value + self._weight * distilled, {**first.log, "distillation": distilled.item()})

    def logits_at(self, head: Head) -> tuple[float, float]:
        """Return the other method's."""
        return self._method.logits_at(head)

    def step(self, scale: float, rate: float) -> dict[str, float]:
        """Move what the other method learns."""
        return self._method.step(scale, rate)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the other method's."""
        return self._method.state_dict()

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Hand it to the other method."""
        self._method.load_state_dict(states)
