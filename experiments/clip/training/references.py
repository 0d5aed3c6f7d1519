"""References that the training makes itself: the target's own moving average, and a mixture of several others."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from drrho.mixture import ReferenceMixture, mixed_references, separate_references
from drrho.routes import BatchIndex

from ..data.batch import Batch
from ..distributed import Ranks
from ..models.clip import Clip
from .methods import Features, Group, Head, Method, MethodLoss, Number, Outcome
from .optimization import MovingAverage
from .options import Execution
from .towers import Towers


class SelfReference:
    """The target as it was, on average: a copy of it whose weights follow by `MovingAverage`, in evaluation mode.

    No other model is needed. The idea is that of ssToken (Qin et al., 2025, arXiv:2510.18250), whose reference is an
    earlier state of the model or such an average. It selects by the average's loss in excess of the model's, what was
    just learned; here the average is a reference like any other, and the excess is the target's.

    Parameters
    ----------
    clip : Clip
        The target, before it is compiled or sharded.
    decay : float
        Of the average, per step, in [0, 1).

    Attributes
    ----------
    average : MovingAverage
        The copy's own weights.
    """

    def __init__(self, clip: Clip, decay: float, execution: Execution, ranks: Ranks) -> None:
        own = dataclasses.replace(clip, model=copy.deepcopy(clip.model).requires_grad_(False))
        self._towers, self._model = Towers(own, execution, ranks, learns=False), own.model
        self.average = MovingAverage(own.model.state_dict(), decay, in_place=True)

    def features(self, batch: Batch, samples: BatchIndex, parts: int) -> Features:
        """Return the average's unit features of a batch, in float32: one forward pass, in ``parts`` parts."""
        image, text, _ = self._towers.features(batch, samples, parts)
        # Sharded weights that stay gathered after a forward pass would be those of this step in the next.
        if isinstance(self._model, FSDPModule):
            self._model.reshard()
        return image.float(), text.float()


class Mixed:
    """Another method, whose reference is a mixture of several that is learned beside it (`ReferenceMixture`).

    A step uses the weights from before it.

    Parameters
    ----------
    widths : sequence of int
        Of the references' features, which are given side by side as `drrho.mixture.mixed_references` joins them.
    scales : sequence of float
        Each reference's own logit scale.
    """

    def __init__(self, method: Method, widths: Sequence[int], scales: Sequence[float], group: Group = None) -> None:
        self._method, self._widths = method, widths
        self._mixture = ReferenceMixture(scales, group=group)
        self._gradient: Tensor | None = None
        self.learns_scale, self.learns_bias = method.learns_scale, method.learns_bias

    def loss(self, own: Features, batch: BatchIndex, head: Head, epoch: int, reference: Features | None) -> MethodLoss:
        """Return the other method's loss with the mixture as its reference; log each reference's weight."""
        assert reference is not None  # options without one are refused
        guides = separate_references(reference, self._widths)
        self._gradient = self._mixture.gradient(guides, batch.counts)
        weights = self._mixture.weights
        found = self._method.loss(own, batch, head, epoch, mixed_references(guides, weights))
        log = {f"reference_weight/{k}": weight for k, weight in enumerate(weights.unbind())}
        return found._replace(log={**found.log, **log})

    def observe(self, own: Features, reference: Features) -> None:
        """Let the other method see the held-out pairs, with the mixture as it stands."""
        guides = separate_references(reference, self._widths)
        self._method.observe(own, mixed_references(guides, self._mixture.weights))

    def logits_at(self, head: Head) -> tuple[float | Tensor, float | Tensor]:
        """Return what the other method returns."""
        return self._method.logits_at(head)

    def step(self, loss: MethodLoss, scale: float | Tensor, rate: float, outcome: Outcome) -> dict[str, Number]:
        """Update the mixture, and what the other method keeps."""
        assert self._gradient is not None
        self._mixture.step(torch.where(outcome.is_finite, self._gradient, torch.nan))
        return self._method.step(loss, scale, rate, outcome)

    def learned_temperature(self) -> Tensor | None:
        """Return what the other method returns."""
        return self._method.learned_temperature()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the other method's state, and the mixture's."""
        return {**self._method.state_dict(), **self._mixture.state_dict()}

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Load both."""
        self._mixture.load_state_dict(states[0])
        self._method.load_state_dict(states)
