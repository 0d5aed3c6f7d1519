"""A network that predicts every anchor's log-normalizer from its features, instead of an estimate for each sample.

For an anchor i of the contrastive risk, ``log g_i = log mean_{j != i} exp(x_ij - x_ii)`` with the excess similarities
``x_ij = (s_ij - c r_ij) / tau``. As the logarithm's conjugate says,

    log g_i = min_a  mean_{j != i} exp(x_ij - x_ii - a) + a - 1

so that over anchors the best function a of their features is the log-normalizer, and a batch gives unbiased gradients
of the objective. Running estimates (`drrho.running`) minimize it for each sample on its own and learn of a sample once
an epoch; a network learns of all samples from each.

Source: NeuCLIP (Wei, Lin & Yang, 2025, arXiv:2511.08417); here also in excess of a reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from drrho.ranks import Group, gathered_together
from drrho.tiles import TensorPair

__all__ = ["NormalizerNetwork", "Prediction"]

_BETAS, _EPS = (0.9, 0.999), 1e-8
_NOISE = 0.01  # relative size of what tells apart prototypes that start at the same pair
_LARGEST = 5.0  # of a prediction that is too small by more, the gradient is as of one by this


class Prediction(NamedTuple):
    """What `NormalizerNetwork.predict` gives, both directions stacked.

    Attributes
    ----------
    log_u : (Tensor, Tensor)
        Predicted log-normalizers of image and text anchors ``[b]``, to be passed to `contrastive_risk` as ``log_u``.
    anchors : Tensor ``[2, b, d]``
        The features that they are a function of.
    positives : Tensor ``[b]``
        ``x_ii``.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.normalizer import NormalizerNetwork
    >>> image, text = normalize(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    >>> prediction = NormalizerNetwork(0.1).predict(image, text)
    >>> prediction.log_u[0].shape, prediction.anchors.shape
    (torch.Size([8]), torch.Size([2, 8, 16]))
    """

    log_u: TensorPair
    anchors: Tensor
    positives: Tensor


class NormalizerNetwork:
    """Predict ``log g_i`` as ``log sum_k exp(<h_i, w_k> / tau + b_k) - x_ii`` with learned prototypes w and weights b.

    ``h_i`` are the anchor's features, with a reference ``[e_i, -c f_i]``, whose products with a pair's are its excess
    similarities: the prototypes stand for the pairs of the data set, some for image and some for text anchors. They
    start at the pairs of the first batch, and Adam minimizes the mean over anchors of ``exp(log g_i - a_i) + a_i``.
    They are the same on all ranks, over which gradients are averaged: with a group, `predict` and `update` are
    collective.

    Parameters
    ----------
    temperature : float
        tau > 0, in units of similarity; constant.
    prototypes : int
        Their number for each direction, >= 1.
    learning_rate : float
        Of Adam, > 0, in units of features.
    steps : int
        Of Adam on a batch, >= 1.
    group : torch.distributed.ProcessGroup, optional
        Ranks over which batches are spread.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.contrastive import contrastive_risk
    >>> image, text = normalize(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    >>> network = NormalizerNetwork(0.1, prototypes=32)
    >>> errors = []
    >>> for _ in range(50):
    ...     prediction = network.predict(image, text)
    ...     step = contrastive_risk(image, text, 0.1, log_u=prediction.log_u, gamma=0.1)
    ...     log_g = step.risks[0] / 0.1, step.risks[1] / 0.1
    ...     errors.append((prediction.log_u[0] - log_g[0]).abs().mean().item())
    ...     network.update(prediction, log_g, torch.tensor(True))
    >>> errors[-1] < errors[0] / 2
    True
    """

    def __init__(
        self,
        temperature: float,
        *,
        prototypes: int = 256,
        learning_rate: float = 1e-2,
        steps: int = 1,
        group: Group = None,
    ) -> None:
        for name, value in (("temperature", temperature), ("learning_rate", learning_rate)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        for name, count in (("prototypes", prototypes), ("steps", steps)):
            if count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        self._tau, self._prototypes, self._rate, self._steps = temperature, prototypes, learning_rate, steps
        self._group = group
        #: Prototypes with their log weights in the last column, and Adam's moments: ``[3, 2, prototypes, d + 1]``.
        self._state: Tensor | None = None
        self._count = torch.zeros((), dtype=torch.float32)

    @torch.no_grad()
    def predict(
        self,
        image: Tensor,
        text: Tensor,
        *,
        reference: TensorPair | None = None,
        coefficient: float | Tensor = 1.0,
        counts: Sequence[int] | None = None,
    ) -> Prediction:
        """Predict the log-normalizers of a batch's anchors, in float32 and without a gradient.

        Parameters
        ----------
        image, text : Tensor ``[b, d]``
            Unit-norm features of the target.
        reference : (Tensor, Tensor), optional
            Unit-norm features ``[b, d_ref]`` of the reference.
        coefficient : float or scalar tensor
            Factor c of the reference's margins.
        counts : sequence of int, optional
            The number of pairs of every rank; needed with a group.

        Raises
        ------
        ValueError
            If the features have another width than those of earlier batches.
        """
        own, guides = (image, text), reference or ()
        with torch.autocast(image.device.type, enabled=False):
            others = torch.stack([torch.cat([x, *guides[k : k + 1]], 1).float() for k, x in enumerate(own)])
            anchors = torch.stack(
                [torch.cat([x, *(-coefficient * f for f in guides[k : k + 1])], 1).float() for k, x in enumerate(own)]
            )
            if self._state is None:
                self._begin(others.flip(0), counts)
            assert self._state is not None
            if self._state.shape[-1] != anchors.shape[-1] + 1:
                raise ValueError(
                    f"image, text and reference must have {self._state.shape[-1] - 1} features together, as before, "
                    f"got {anchors.shape[-1]}"
                )
            self._state, self._count = self._state.to(image.device), self._count.to(image.device)
            positives = (anchors[0] * others[1]).sum(1) / self._tau
            image_side, text_side = self._log_sums(self._state[0], anchors)[0] - positives
        return Prediction((image_side, text_side), anchors, positives)

    @torch.no_grad()
    def update(
        self, prediction: Prediction, log_g: TensorPair, is_finite: Tensor, counts: Sequence[int] | None = None
    ) -> None:
        """Take steps towards a batch's normalizers.

        Parameters
        ----------
        prediction : Prediction
            Of this batch.
        log_g : (Tensor, Tensor), each ``[b]``
            ``log g_i`` over the batch: ``risks / tau`` of `contrastive_risk`.
        is_finite : Tensor
            A boolean on the device: nothing changes without it, or with a gradient that is not finite.
        counts : sequence of int, optional
            The number of pairs of every rank; needed with a group.
        """
        state, total = self._state, len(prediction.positives) if counts is None else sum(counts)
        assert state is not None
        goals = torch.stack([side.to(state) for side in log_g]) + prediction.positives
        with torch.autocast(state.device.type, enabled=False):
            for _ in range(self._steps):
                predicted, shares = self._log_sums(state[0], prediction.anchors)
                # The derivative of exp(log g - a) + a, of the mean over anchors.
                slopes = (1 - torch.exp((goals - predicted).clamp(max=_LARGEST))) / total
                by_logit = shares * slopes[..., None]
                gradient = torch.cat([by_logit.mT @ prediction.anchors / self._tau, by_logit.sum(1)[..., None]], 2)
                if self._group is not None:
                    dist.all_reduce(gradient, group=self._group)
                state = self._stepped(state, gradient, is_finite)
        self._state = state

    def _log_sums(self, parameters: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log of the sums over prototypes ``[2, b]``, and each prototype's share ``[2, b, prototypes]``."""
        logits = anchors @ parameters[..., :-1].mT / self._tau + parameters[..., None, :, -1]
        found = torch.logsumexp(logits, 2)
        return found, torch.exp(logits - found[..., None])

    def _stepped(self, state: Tensor, gradient: Tensor, is_finite: Tensor) -> Tensor:
        """Return the state after a step of Adam, or as it is."""
        wanted = is_finite & torch.isfinite(gradient).all()
        count = self._count + 1
        parameters, first, second = state
        first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
        second = _BETAS[1] * second + (1 - _BETAS[1]) * gradient.square()
        root = (second / (1 - _BETAS[1] ** count)).sqrt() + _EPS
        parameters = parameters - self._rate * first / (1 - _BETAS[0] ** count) / root
        self._count = torch.where(wanted, count, self._count)
        return torch.where(wanted, torch.stack([parameters, first, second]), state)

    def _begin(self, others: Tensor, counts: Sequence[int] | None) -> None:
        """Let the prototypes start at the pairs of a batch, by turns, each with the same weight."""
        width = others.shape[-1]
        noise = torch.randn(2, self._prototypes, width, generator=torch.Generator().manual_seed(0)) / math.sqrt(width)
        noise = noise.to(others)
        pairs = others.transpose(0, 1)
        if self._group is not None:
            assert counts is not None
            (pairs,) = gathered_together([pairs.contiguous()], counts, self._group)
        rows = torch.arange(self._prototypes, device=others.device) % len(pairs)
        start = pairs[rows].transpose(0, 1)
        # Without a batch that is finite, directions by chance.
        start = torch.where(torch.isfinite(start).all(), start + _NOISE * noise, noise)
        weights = start.new_full((2, self._prototypes, 1), -math.log(self._prototypes))
        parameters = torch.cat([start, weights], 2)
        self._state = torch.stack([parameters, *torch.zeros(2, *parameters.shape).to(parameters)])

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``network`` ``[3, 2, prototypes, d + 1]`` and how many ``steps``; nothing before the first batch."""
        if self._state is None:
            return {}
        return {"network": self._state.clone(), "steps": self._count.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned.

        Raises
        ------
        ValueError
            If it is of another number of prototypes, or not finite.
        """
        if not state:
            self._state = None
            return
        network, steps = state.get("network"), state.get("steps")
        expected = f"[3, 2, {self._prototypes}, d + 1]"
        if network is None or steps is None or network.shape[:3] != (3, 2, self._prototypes):
            shape = None if network is None else list(network.shape)
            raise ValueError(f"state must hold network {expected} and steps, got {shape}")
        if not bool(torch.isfinite(network).all() & torch.isfinite(steps)):
            raise ValueError("state must hold finite numbers: the network has diverged")
        self._state, self._count = network.clone(), steps.clone()
