"""Training methods: one class each, from a batch's features to a loss.

A new method is a class here, with the options that it takes, and a line in `METHODS`; its name and its options are
fields of `training.options.Loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drrho import KL, Divergence
from drrho.coefficient import AdaptiveCoefficient, MovingCoefficient, ScheduledCoefficient
from drrho.contrastive import contrastive_risk, info_nce, two_level_risk
from drrho.distillation import distillation_loss
from drrho.gist import guided_info_nce
from drrho.mixture import separate_references
from drrho.normalizer import NormalizerNetwork, Prediction
from drrho.ranks import gathered_with_gradient
from drrho.routes import BatchIndex
from drrho.running import RunningEstimates, RunningThresholds, cosine_gamma
from drrho.temperature import GlobalTemperature, IndividualTemperatures

from ..distributed import ONE_PROCESS, Ranks
from .options import Loss, TemperatureSchedule

Features = tuple[Tensor, Tensor]  # of images and texts, unit vectors ``[b, d]``
Group = dist.ProcessGroup | None
#: One for all samples, or one for each sample and direction.
Temperatures = Tensor | tuple[Tensor, Tensor]

# FastCLIP v3 divides the temperature's learning rate by 3 below this temperature (Wei et al., 2024, arXiv:2407.01445).
_LATE_TEMPERATURE, _LATE_RATE = 0.03, 1 / 3


class RankSum(NamedTuple):
    """A number to log of which every rank has a part: ``finish`` of the sum of the parts over ranks."""

    part: Tensor
    finish: Callable[[float], float]


#: A number to log: one that the host knows, or one that the device will have computed.
Number = float | Tensor | RankSum


class Pending(NamedTuple):
    """What a method changes once its loss is known to be finite: see `Method.step`.

    ``temperatures`` are those that are learned, ``estimates`` the running ones after the step, ``moments`` those of the
    estimated coefficient before it. With a ``prediction`` of the normalizers, ``estimates`` are those of the batch.
    """

    batch: BatchIndex
    temperatures: Temperatures | None
    estimates: tuple[Tensor, Tensor]
    moments: Tensor | None
    prediction: Prediction | None = None


class MethodLoss(NamedTuple):
    """A scalar to minimize, the numbers to log beside it, and what the method's own state becomes."""

    value: Tensor
    log: dict[str, Number]
    pending: Pending | None = None


class Outcome(NamedTuple):
    """Whether a step is taken: booleans on the device.

    ``is_finite``: features and loss are finite, and the gradient unless its overflow lowers the loss scale.
    ``has_gradient``: the gradient is finite too.
    """

    is_finite: Tensor
    has_gradient: Tensor


class Head(NamedTuple):
    """The model's own logit scale, ``exp(logit_scale)``, and bias, if it has one."""

    scale: Tensor
    bias: Tensor | None = None


class Context(NamedTuple):
    """What a method is built for, beside its options: sizes of the run, the resolved temperature, the ranks.

    ``widths`` are those of several references' features.
    """

    samples: int
    epochs: int
    temperature: float
    ranks: Ranks = ONE_PROCESS
    widths: tuple[int, ...] = ()


class Method(Protocol):
    """What the training loop asks of a method."""

    #: Whether the model's own learnable temperature takes part, and its logit bias.
    learns_scale: bool
    learns_bias: bool

    def loss(self, own: Features, batch: BatchIndex, head: Head, epoch: int, reference: Features | None) -> MethodLoss:
        """Return the loss of the target's features of a batch's samples, given the reference's if there is one."""
        ...

    def observe(self, own: Features, reference: Features) -> None:
        """Receive features of held-out pairs, the same on all ranks: the target's as it stands, and the reference's."""
        ...

    def logits_at(self, head: Head) -> tuple[float | Tensor, float | Tensor]:
        """Return the temperature and the bias of its logits as they stand, without a gradient."""
        ...

    def step(self, loss: MethodLoss, scale: float | Tensor, rate: float, outcome: Outcome) -> dict[str, Number]:
        """Update what the method itself keeps, after a backward pass of ``scale`` times the loss; return what to log.

        ``rate`` is the model's learning rate in units of its peak. Nothing changes without ``outcome.is_finite``, and
        nothing that is learned by its gradient without ``outcome.has_gradient``.
        """
        ...

    def learned_temperature(self) -> Tensor | None:
        """Return the one temperature of all samples, if the method itself learns it."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold."""
        ...

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Load a checkpoint's state: what `state_dict` returned on every rank that wrote it, in order."""
        ...


class MethodClass(Protocol):
    """A method that can be chosen by name."""

    @property
    def takes(self) -> frozenset[str]:
        """The options of `Loss` that it takes, beside those of distillation and of the reference."""
        ...

    def from_options(self, options: Loss, context: Context) -> Method:
        """Build the method."""
        ...


class _Stateless:
    """A method that learns nothing of its own: what is learned is the model's."""

    learns_bias = False

    def observe(self, own: Features, reference: Features) -> None:
        """Do nothing: nothing depends on held-out pairs."""

    def learned_temperature(self) -> None:
        """Return None: there is none of its own."""

    def step(self, loss: MethodLoss, scale: float | Tensor, rate: float, outcome: Outcome) -> dict[str, Number]:
        """Return no numbers: there is nothing to update."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Load an empty state."""


class OpenCLIP(_Stateless):
    """InfoNCE over the batch with the model's learnable temperature, as open_clip trains."""

    takes: ClassVar[frozenset[str]] = frozenset()
    learns_scale = True

    def __init__(self, group: Group = None) -> None:
        self._group = group

    @classmethod
    def from_options(cls, options: Loss, context: Context) -> OpenCLIP:
        """Build the method."""
        return cls(context.ranks.group)

    def loss(self, own: Features, batch: BatchIndex, head: Head, epoch: int, reference: Features | None) -> MethodLoss:
        """Return InfoNCE at the model's temperature."""
        tau = 1 / head.scale
        return MethodLoss(info_nce(*own, tau, group=self._group, counts=batch.counts), {"temperature": tau})

    def logits_at(self, head: Head) -> tuple[float | Tensor, float | Tensor]:
        """Return the model's temperature."""
        return 1 / head.scale.detach(), 0.0


class SigLIP(_Stateless):
    """The pairwise sigmoid loss with the model's learnable scale and bias, as open_clip's ``SigLipLoss``."""

    takes: ClassVar[frozenset[str]] = frozenset()
    learns_scale = learns_bias = True

    def __init__(self, group: Group = None) -> None:
        self._group = group

    @classmethod
    def from_options(cls, options: Loss, context: Context) -> SigLIP:
        """Build the method."""
        return cls(context.ranks.group)

    def loss(self, own: Features, batch: BatchIndex, head: Head, epoch: int, reference: Features | None) -> MethodLoss:
        """Return the sigmoid loss of the batch of all ranks; each rank compares its images with all texts."""
        with torch.autocast(own[0].device.type, enabled=False):
            part = sigmoid_loss(*own, head, batch.counts, self._group)
        total = part.detach().clone()
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return MethodLoss(part + (total - part.detach()), {"temperature": 1 / head.scale})

    def logits_at(self, head: Head) -> tuple[float | Tensor, float | Tensor]:
        """Return the model's temperature and bias."""
        return 1 / head.scale.detach(), 0.0 if head.bias is None else head.bias.detach()


def sigmoid_loss(image: Tensor, text: Tensor, head: Head, counts: Sequence[int], group: Group) -> Tensor:
    """Return this rank's part of ``-1/b sum_ij log sigmoid(z_ij (scale s_ij + bias))``, z_ii = 1 and else -1 (SigLIP).

    Of n ranks, ``counts`` are the rows of each, b of them together; the parts of all add up to the loss.
    """
    rank = 0 if group is None else dist.get_rank(group)
    image, text = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (image, text))
    rows = gathered_with_gradient(text, counts, group).split(list(counts))

    def against(texts: Tensor, *, own: bool) -> Tensor:
        logits = head.scale * image @ texts.T
        logits = logits if head.bias is None else logits + head.bias
        labels = 2 * torch.eye(*logits.shape, device=logits.device, dtype=logits.dtype) - 1 if own else -1
        return -nn.functional.logsigmoid(labels * logits).sum() / sum(counts)

    if group is None:
        return against(text, own=True)
    # The logits of one rank's texts are in memory at a time, and computed again in the backward pass.
    again = partial(checkpoint, against, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([again(texts, own=number == rank) for number, texts in enumerate(rows)]).sum()  # pyright: ignore[reportArgumentType, reportCallIssue]


class GIST(OpenCLIP):
    """InfoNCE at the model's temperature without the negatives that the reference finds closer than the pair itself."""

    def loss(self, own: Features, batch: BatchIndex, head: Head, epoch: int, reference: Features | None) -> MethodLoss:
        """Return the loss of the batch of all ranks; each rank compares its anchors with all candidates."""
        assert reference is not None  # options without one are refused
        tau, pairs = 1 / head.scale, sum(batch.counts)
        found = guided_info_nce(own, reference, tau, counts=batch.counts, group=self._group)
        total = found.part.detach().clone()
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        share = RankSum(found.left_out, lambda count: count / max(1, 2 * pairs * (pairs - 1)))
        log: dict[str, Number] = {"temperature": tau, "negatives_left_out": share}
        return MethodLoss(found.part + (total - found.part.detach()), log)


class ConstantTemperature:
    """One temperature that is not learned, with the methods of those that are."""

    def __init__(self, value: float) -> None:
        self._value = value

    def lookup(self, index: BatchIndex) -> float:
        """Return the temperature."""
        return self._value

    def state_dict(self) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load an empty state."""


LearnedTemperature = GlobalTemperature | IndividualTemperatures
# What has a row for each sample, and loads its rows from all ranks' states.
_BY_SAMPLE = (RunningEstimates, RunningThresholds, IndividualTemperatures)


class GlobalContrastive:
    """The global contrastive risk, of any divergence, with or without a reference.

    Parameters
    ----------
    samples : int
        Size of the training split, which is the size of the running state.
    gamma_epochs : int
        The epoch, counted from 0, in which gamma arrives at ``final_gamma``, by a cosine from 1 in the first.
    temperature : ConstantTemperature, or GlobalTemperature or IndividualTemperatures of `drrho.temperature`
        FastCLIP v1, v3 (v0 with ``per_temperature``) and v2.
    coefficient : float, AdaptiveCoefficient or ScheduledCoefficient
        How much of the reference's margins to subtract.
    final_gamma, log_step, eps, divergence, rho, per_temperature, published_temperature_gradient, group
        As in `drrho.contrastive.contrastive_risk`; with ``log_step`` gamma plays no part.
    normalizer : NormalizerNetwork, optional
        Predicts the normalizers, instead of running estimates; of KL, at its own, constant temperature.
    worst_of : sequence of int
        Widths of several references' features, of whose margins the smallest is subtracted; otherwise their mean is.
    is_steered : bool
        Whether a reference that is given takes part: FastCLIP has none, though distillation or a selection may use one.
    temperature_schedule : "constant", "model" or "threshold"
        How the learning rate of a learned temperature changes: constant; proportional to the model's; divided by three
        below a temperature of 0.03.
    device : torch.device or str
        Where the running state is kept and its rows are sent.
    """

    learns_scale = learns_bias = False

    def __init__(
        self,
        samples: int,
        gamma_epochs: int,
        temperature: ConstantTemperature | LearnedTemperature,
        *,
        is_steered: bool = True,
        normalizer: NormalizerNetwork | None = None,
        worst_of: Sequence[int] = (),
        coefficient: float | MovingCoefficient = 1.0,
        final_gamma: float = 1.0,
        log_step: float | None = None,
        eps: float = 0.0,
        divergence: Divergence | None = None,
        rho: float = 0.0,
        per_temperature: bool = False,
        published_temperature_gradient: bool = False,
        temperature_schedule: TemperatureSchedule = "constant",
        group: Group = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._temperature, self._coefficient = temperature, coefficient
        self._schedule, self._is_steered, self._worst_of = temperature_schedule, is_steered, worst_of
        self._gamma_epochs, self._final_gamma = gamma_epochs, final_gamma
        divergence = KL() if divergence is None else divergence
        # KL's dual variable has a closed form, a log-normalizer, which has options of its own.
        self._is_kl = divergence.has_exponential_weights
        running = RunningEstimates if self._is_kl else RunningThresholds
        self._running = running(samples, device, group) if normalizer is None else normalizer
        for_kl: dict[str, Any] = {
            "log_step": log_step,
            "eps": eps,
            "per_temperature": per_temperature,
            "published_temperature_gradient": published_temperature_gradient,
        }
        self._options: dict[str, Any] = {
            "divergence": divergence,
            "rho": rho,
            "group": group,
            **(for_kl if self._is_kl else {}),
        }
        self._group = group

    def loss(self, own: Features, batch: BatchIndex, head: Head, epoch: int, reference: Features | None) -> MethodLoss:
        """Return the contrastive risk of these samples."""
        gamma, log = self._gamma(epoch)
        options: dict[str, Any] = {**self._options, "gamma": gamma, "counts": batch.counts}
        moments = None
        if self._is_steered and reference is not None:
            guides = separate_references(reference, self._worst_of) if self._worst_of else reference
            options |= {"reference": guides, "coefficient": self._coefficient}
            if isinstance(self._coefficient, MovingCoefficient):
                moments = self._coefficient.moments
                options["coefficient"] = self._coefficient.update(
                    *own, reference=reference, group=self._group, counts=batch.counts
                )
                log["coefficient"] = options["coefficient"]
        temperature = self._temperature.lookup(batch)
        prediction = None
        if isinstance(self._running, NormalizerNetwork):
            given = {key: options[key] for key in ("reference", "coefficient", "counts") if key in options}
            prediction = self._running.predict(*own, **given)
            options["log_u"] = prediction.log_u
        else:
            options["log_u" if self._is_kl else "threshold"] = self._running.lookup(batch)
        step = contrastive_risk(*own, temperature, **options)
        estimates = step.log_u if self._is_kl else step.threshold
        assert estimates is not None
        pairs = sum(batch.counts)
        if prediction is not None:
            assert isinstance(temperature, float)
            estimates = step.risks[0] / temperature, step.risks[1] / temperature
            errors = torch.cat(estimates) - torch.cat(prediction.log_u)
            log["normalizer_error"] = RankSum(errors.abs().sum(dtype=torch.float64), lambda total: total / (2 * pairs))
        shares = torch.exp(-torch.cat(step.distances)).sum(dtype=torch.float64)
        log["effective_negatives"] = RankSum(shares, lambda total: (pairs - 1) * total / (2 * pairs))
        learned = temperature if isinstance(temperature, Tensor | tuple) else None
        return MethodLoss(step.value, log, Pending(batch, learned, estimates, moments, prediction))

    def observe(self, own: Features, reference: Features) -> None:
        """Measure how far the reference is ahead, on which the scheduled coefficient depends."""
        if isinstance(self._coefficient, ScheduledCoefficient):
            self._coefficient.observe(*own, reference=reference, group=self._group)

    def _gamma(self, epoch: int) -> tuple[float, dict[str, Number]]:
        """Return the rate of the running estimates, and what to log of it."""
        if self._options.get("log_step") is not None:
            return 1.0, {}
        last = self._gamma_epochs
        gamma = cosine_gamma(min(epoch, last), last + 1, self._final_gamma)
        return gamma, {"gamma": gamma}

    def logits_at(self, head: Head) -> tuple[float | Tensor, float | Tensor]:
        """Return the one temperature of all samples: there must not be one for each."""
        tau = self._temperature.lookup(BatchIndex([np.empty(0, np.int64)]))
        assert not isinstance(tau, tuple)
        return tau.detach() if isinstance(tau, Tensor) else tau, 0.0

    def step(self, loss: MethodLoss, scale: float | Tensor, rate: float, outcome: Outcome) -> dict[str, Number]:
        """Update running state and learned temperatures; log their mean over the batch, and how many met a bound."""
        assert loss.pending is not None
        (batch, taus, (image, text), moments, prediction), (finite, has_gradient) = loss.pending, outcome
        if isinstance(self._running, NormalizerNetwork):
            assert prediction is not None
            self._running.update(prediction, (image, text), finite, batch.counts)
        else:
            # An estimate or a gradient that is NaN changes nothing.
            self._running.update(batch, (torch.where(finite, image, torch.nan), torch.where(finite, text, torch.nan)))
        if moments is not None and isinstance(self._coefficient, MovingCoefficient):
            after = self._coefficient.moments
            self._coefficient.moments = torch.where(finite, after, moments.to(after.device))
        if taus is None or isinstance(self._temperature, ConstantTemperature):
            return {}
        both = taus if isinstance(taus, tuple) else (taus,)
        for tau in both:
            assert tau.grad is not None
            tau.grad = torch.where(has_gradient, tau.grad / scale, torch.nan)
        mean = torch.cat([tau.detach().reshape(-1) for tau in both]).mean()
        factor: float | Tensor = rate if self._schedule == "model" else 1.0
        if self._schedule == "threshold":
            factor = torch.where(mean < _LATE_TEMPERATURE, _LATE_RATE, 1.0)
        bounded = self._temperature.step(batch, taus, factor)  # pyright: ignore[reportArgumentType]
        return {"temperature": mean, "temperatures_bounded": bounded}

    def learned_temperature(self) -> Tensor | None:
        """Return the learned temperature, unless each sample has its own."""
        return self._temperature.lookup([]).detach() if isinstance(self._temperature, GlobalTemperature) else None

    def state_dict(self) -> dict[str, Tensor]:
        """Return running state, learned temperatures and the estimated coefficient."""
        return {
            f"{name}.{key}": value for name, part in self._parts().items() for key, value in part.state_dict().items()
        }

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Load the state: rows of samples from all ranks' states, what ranks share from the first."""
        for name, part in self._parts().items():
            prefix = f"{name}."
            own = [
                {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                for state in states
            ]
            part.load_state_dict(own if isinstance(part, _BY_SAMPLE) else own[0])

    def _parts(self) -> dict[str, Any]:
        first = "normalizer" if isinstance(self._running, NormalizerNetwork) else "running"
        parts = {first: self._running, "temperature": self._temperature}
        if isinstance(self._coefficient, MovingCoefficient):
            parts["coefficient"] = self._coefficient
        return parts


class FastCLIP(GlobalContrastive):
    """The global contrastive risk without a reference: FastCLIP v0 to v3."""

    takes: ClassVar[frozenset[str]] = frozenset(
        "temperature temperature_scheme rho temperature_lr temperature_lr_schedule published_temperature_gradient "
        "temperature_bounds divergence level final_gamma gamma_epochs log_step eps "
        "normalizer normalizer_prototypes normalizer_lr normalizer_steps".split()
    )
    #: Whether the reference's margins are subtracted.
    steered = False

    @classmethod
    def from_options(cls, options: Loss, context: Context) -> FastCLIP:
        """Build the method."""
        place = {"group": context.ranks.group, "device": context.ranks.device}
        return cls(
            context.samples,
            context.epochs - 1 if options.gamma_epochs is None else options.gamma_epochs,
            _temperature(options, context),
            is_steered=cls.steered,
            normalizer=_normalizer(options, context),
            worst_of=context.widths if options.combine == "worst" else (),
            coefficient=_coefficient(options),
            final_gamma=options.final_gamma,
            log_step=options.log_step,
            eps=options.eps,
            divergence=options.build_divergence(),
            rho=options.rho,
            per_temperature=options.temperature_scheme == "per-temperature",
            published_temperature_gradient=options.published_temperature_gradient,
            temperature_schedule=options.temperature_lr_schedule,
            **place,
        )


_ESTIMATED: dict[str, Callable[[], MovingCoefficient]] = {
    "adaptive": AdaptiveCoefficient,
    "scheduled": ScheduledCoefficient,
}


def _coefficient(options: Loss) -> float | MovingCoefficient:
    given = options.coefficient
    return _ESTIMATED[given]() if isinstance(given, str) else given


class DRRhoCLIP(FastCLIP):
    """The same of the pair losses in excess of the reference's."""

    takes: ClassVar[frozenset[str]] = FastCLIP.takes | {"coefficient"}
    steered = True


def _normalizer(options: Loss, context: Context) -> NormalizerNetwork | None:
    if options.normalizer is None:
        return None
    given: dict[str, Any] = {
        "prototypes": options.normalizer_prototypes,
        "learning_rate": options.normalizer_lr,
        "steps": options.normalizer_steps,
    }
    given = {key: value for key, value in given.items() if value is not None}
    return NormalizerNetwork(context.temperature, group=context.ranks.group, **given)


def _temperature(options: Loss, context: Context) -> ConstantTemperature | LearnedTemperature:
    if not options.learns_temperature:
        return ConstantTemperature(context.temperature)
    low, high = options.temperature_bounds
    learning = {"learning_rate": options.temperature_lr, "low": low, "high": high}
    place = {"group": context.ranks.group, "device": context.ranks.device}
    if options.temperature_scheme == "individual":
        return IndividualTemperatures(context.samples, context.temperature, **learning, **place)
    return GlobalTemperature(context.temperature, **learning, **place)


class TwoLevel(_Stateless):
    """The DRRho risk over samples: weights from each sample's own contrastive risk in excess of the reference's."""

    takes: ClassVar[frozenset[str]] = frozenset({"temperature", "divergence", "level", "strength"})
    learns_scale = False

    def __init__(self, temperature: float, outer: Divergence, strength: float, group: Group = None) -> None:
        self._temperature, self._outer, self._group = temperature, outer, group
        self._strength = strength if outer.has_radius else None

    @classmethod
    def from_options(cls, options: Loss, context: Context) -> TwoLevel:
        """Build the method."""
        return cls(context.temperature, options.build_divergence(), options.strength, context.ranks.group)

    def loss(self, own: Features, batch: BatchIndex, head: Head, epoch: int, reference: Features | None) -> MethodLoss:
        """Return the outer risk over the batch."""
        assert reference is not None  # options without one are refused
        risk = two_level_risk(
            *own,
            self._temperature,
            self._outer,
            reference=reference,
            strength=self._strength,
            group=self._group,
            counts=batch.counts,
        )
        squares = risk.weights.detach().square().sum()
        return MethodLoss(risk.value, {"effective_samples": RankSum(squares, lambda total: 1 / total)})

    def logits_at(self, head: Head) -> tuple[float | Tensor, float | Tensor]:
        """Return the method's temperature."""
        return self._temperature, 0.0


#: The methods by the name that chooses them.
METHODS: dict[str, MethodClass] = {
    "openclip": OpenCLIP,
    "siglip": SigLIP,
    "fastclip": FastCLIP,
    "drrho": DRRhoCLIP,
    "two-level": TwoLevel,
    "gist": GIST,
}


class Distilled:
    """Another method's loss plus a multiple of the distillation of the reference's similarities.

    Parameters
    ----------
    temperature : float
        Temperature of the reference's softmax, and of the target's, unless ``own`` gives that the method's temperature.
    """

    def __init__(
        self, method: Method, weight: float, temperature: float, *, own: bool = False, group: Group = None
    ) -> None:
        self._method, self._weight, self._temperature, self._own, self._group = method, weight, temperature, own, group
        self.learns_scale, self.learns_bias = method.learns_scale, method.learns_bias

    def loss(self, own: Features, batch: BatchIndex, head: Head, epoch: int, reference: Features | None) -> MethodLoss:
        """Return the sum of both."""
        assert reference is not None  # options without one are refused
        first = self._method.loss(own, batch, head, epoch, reference)
        tau: Tensor | float = self._temperature
        if self._own:
            tau = 1 / head.scale if self.learns_scale else self._method.logits_at(head)[0]
        others = {"reference": reference, "reference_temperature": self._temperature}
        distilled = distillation_loss(*own, tau, **others, group=self._group, counts=batch.counts)
        log = {**first.log, "distillation": distilled}
        return first._replace(value=first.value + self._weight * distilled, log=log)

    def observe(self, own: Features, reference: Features) -> None:
        """Let the other method see the held-out pairs."""
        self._method.observe(own, reference)

    def logits_at(self, head: Head) -> tuple[float | Tensor, float | Tensor]:
        """Return what the other method returns."""
        return self._method.logits_at(head)

    def step(self, loss: MethodLoss, scale: float | Tensor, rate: float, outcome: Outcome) -> dict[str, Number]:
        """Update what the other method keeps."""
        return self._method.step(loss, scale, rate, outcome)

    def learned_temperature(self) -> Tensor | None:
        """Return what the other method returns."""
        return self._method.learned_temperature()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the other method returns."""
        return self._method.state_dict()

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Load the other method's state."""
        self._method.load_state_dict(states)
