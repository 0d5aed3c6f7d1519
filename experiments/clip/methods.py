"""Training methods: one small class each, from a batch's features to a loss."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import open_clip
import torch
from torch import Tensor

from drrho.contrastive import contrastive_risk
from drrho.running import RunningEstimates, cosine_gamma
from experiments.clip.feature_cache import FeatureCache


class Loss(NamedTuple):
    """A scalar to minimize and the numbers worth logging beside it."""

    value: Tensor
    log: dict[str, float]


class Method(Protocol):
    """What the training loop asks of a method."""

    #: Whether the model's own learnable temperature takes part.
    learns_temperature: bool

    def loss(self, image: Tensor, text: Tensor, index: Tensor, scale: Tensor, epoch: int) -> Loss:
        """Return the loss of unit features ``[b, d]`` of samples ``index``; ``scale`` is exp(logit_scale)."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must keep."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a checkpoint's state."""
        ...


class OpenCLIP:
    """InfoNCE over the batch with a learnable temperature: open_clip's own ``ClipLoss``."""

    learns_temperature = True

    def __init__(self) -> None:
        self._loss = open_clip.ClipLoss()

    def loss(self, image: Tensor, text: Tensor, index: Tensor, scale: Tensor, epoch: int) -> Loss:
        """Return InfoNCE at the model's temperature."""
        return Loss(self._loss(image, text, scale), {"temperature": 1 / scale.item()})

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: the temperature is the model's."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Accept nothing."""


class FastCLIP:
    """The global contrastive risk at a constant temperature with running estimates (FastCLIP v1).

    Parameters
    ----------
    samples : int
        Size of the training split; sizes the running estimates.
    epochs : int
        Length of the training, over which gamma decays from 1 to ``final_gamma``.
    temperature, final_gamma, eps : float
        As in `drrho.contrastive.contrastive_risk`.
    """

    learns_temperature = False

    def __init__(self, samples: int, epochs: int, temperature: float, final_gamma: float, eps: float) -> None:
        self.temperature = temperature
        self._epochs = epochs
        self._final_gamma = final_gamma
        self._eps = eps
        self._estimates = RunningEstimates(samples)

    def reference(self, index: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the reference's features of these samples; this method has none."""
        return None

    def loss(self, image: Tensor, text: Tensor, index: Tensor, scale: Tensor, epoch: int) -> Loss:
        """Return the contrastive risk and move the running estimates of these samples."""
        gamma = cosine_gamma(epoch, self._epochs, self._final_gamma)
        step = contrastive_risk(
            image,
            text,
            self.temperature,
            reference=self.reference(index),
            log_u=self._estimates.lookup(index),
            gamma=gamma,
            eps=self._eps,
        )
        self._estimates.update(index, step.log_u)
        effective = (len(index) - 1) * torch.exp(-torch.cat(step.distances)).mean()
        return Loss(step.value, {"gamma": gamma, "effective_negatives": effective.item()})

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running estimates."""
        return self._estimates.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the running estimates."""
        self._estimates.load_state_dict(state)


class DRRhoCLIP(FastCLIP):
    """FastCLIP steered by a reference model: the risk of the excess pair losses (Wei et al., ICML 2025)."""

    def __init__(
        self,
        samples: int,
        epochs: int,
        temperature: float,
        final_gamma: float,
        eps: float,
        features: FeatureCache,
    ) -> None:
        super().__init__(samples, epochs, temperature, final_gamma, eps)
        self._features = features

    def reference(self, index: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the reference's cached features of these samples."""
        return self._features.rows(index)
