"""The contrastive robust risk: one penalized risk over negatives per anchor, in both directions.

With similarities ``s``, a reference model's similarities ``r`` and the positive of anchor i at ``ii``, the excess
pair losses are ``l_ij = (s_ij - s_ii) - (r_ij - r_ii)`` over the negatives ``j != i``, and the anchor's risk is
``F_i = max_p <p, l_i> - tau D_phi(p || uniform)``; for KL, ``tau log mean_{j != i} exp(l_ij / tau)``. Without a
reference this is the global contrastive loss of SogCLR and FastCLIP; with it, DRRho-CLIP (Wei et al., ICML 2025).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from drrho.divergences import KL, Divergence
from drrho.reference import excess_losses
from drrho.risk import RobustRisk, penalized_risk
from drrho.running import moving_average

_KL = KL()


class ContrastiveStep(NamedTuple):
    """What one batch of ``contrastive_risk`` gives.

    Attributes
    ----------
    value : Tensor, scalar
        Mean over the batch's anchors of F_i, averaged over the two directions (the published loss is twice this).
        Its gradient is the running-estimate estimator of the full-data gradient.
    log_u : (Tensor, Tensor), each ``[b]``
        Running estimates after the step, image-to-text and text-to-image; None for divergences other than KL.
    risks : (RobustRisk, RobustRisk)
        The anchors' risks over their ``b - 1`` negatives, for inspection: value, weights, certificate.
    """

    value: Tensor
    log_u: tuple[Tensor, Tensor] | None
    risks: tuple[RobustRisk, RobustRisk]


def contrastive_risk(
    image: Tensor,
    text: Tensor,
    temperature: float,
    *,
    reference: tuple[Tensor, Tensor] | None = None,
    log_u: tuple[Tensor, Tensor] | None = None,
    gamma: float = 1.0,
    eps: float = 0.0,
    divergence: Divergence = _KL,
) -> ContrastiveStep:
    """Compute the batch's ``mean_i F_i`` with the gradient of the full-data objective's estimator.

    For KL, ``u_i <- (1 - gamma) u_i + gamma g_i`` tracks ``g_i = mean_{j != i} exp(l_ij / tau)``, and the gradient
    is ``mean_i [g_i / (eps + u_i)] grad F_i``. With ``gamma = 1`` and ``eps = 0`` it is that of the batch alone.

    Parameters
    ----------
    image, text : Tensor ``[b, d]``
        Unit-norm features of the target, b >= 2; row i of both is one pair. Similarities are computed in float32 or
        wider, whatever autocast says.
    temperature : float
        tau > 0, in units of similarity.
    reference : (Tensor, Tensor), optional
        Unit-norm features ``[b, d_ref]`` of the reference for the same pairs; detached.
    log_u : (Tensor, Tensor), optional
        Running estimates of these anchors before the step, ``-inf`` where never visited. KL only.
    gamma : float
        Inner rate in (0, 1].
    eps : float
        Added to u where the gradient divides by it, >= 0.
    divergence : Divergence
        The ball over negatives; KL by default.

    Raises
    ------
    ValueError
        For mismatched shapes, fewer than two pairs, non-finite features, or a parameter out of range.
    """
    if not (0 < temperature < math.inf):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and >= 0, got {eps}")
    if log_u is not None and not isinstance(divergence, KL):
        raise ValueError(f"log_u needs divergence=KL(), got {divergence}: it tracks the KL normalizer")
    by_image, by_text = (
        penalized_risk(losses, divergence, temperature) for losses in _excess_pair_losses(image, text, reference)
    )
    if not isinstance(divergence, KL):
        return ContrastiveStep((by_image.value.mean() + by_text.value.mean()) / 2, None, (by_image, by_text))
    before = (torch.full_like(by_image.value, -torch.inf),) * 2 if log_u is None else log_u
    image_term, image_log_u = _running_term(by_image.value, before[0], temperature, gamma, eps, "log_u[0]")
    text_term, text_log_u = _running_term(by_text.value, before[1], temperature, gamma, eps, "log_u[1]")
    return ContrastiveStep((image_term + text_term) / 2, (image_log_u, text_log_u), (by_image, by_text))


def _running_term(
    risk: Tensor, log_u: Tensor, temperature: float, gamma: float, eps: float, name: str
) -> tuple[Tensor, Tensor]:
    """Return the mean of the anchors' risks ``[b]``, its gradient scaled by g / (eps + u), and log u after the step."""
    log_g = risk.detach() / temperature
    after = _averaged(log_u, log_g, gamma, name)
    smoothed = torch.logaddexp(after, torch.full_like(after, eps).log())
    estimator = torch.exp(log_g - smoothed) * risk  # the scale is at most 1 / gamma, since u >= gamma g
    return (risk.detach() + (estimator - estimator.detach())).mean(), after


def _excess_pair_losses(image: Tensor, text: Tensor, reference: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return the anchors' losses over their negatives, ``[b, b - 1]``: image to text, text to image."""
    similarity = _similarity(image, text, torch.float32, "image", "text")
    guide = None
    if reference is not None:
        guide = _similarity(*reference, similarity.dtype, "reference[0]", "reference[1]").detach().to(similarity.dtype)
        if guide.shape != similarity.shape:
            raise ValueError(f"reference must hold {len(similarity)} pairs like image and text, got {len(guide)}")
    directions = []
    for transposed in (False, True):
        losses = _over_negatives(similarity.T if transposed else similarity)
        if guide is not None:
            losses = excess_losses(losses, _over_negatives(guide.T if transposed else guide))
        directions.append(losses)
    return directions[0], directions[1]


def _similarity(image: Tensor, text: Tensor, narrowest: torch.dtype, image_name: str, text_name: str) -> Tensor:
    if image.ndim != 2 or image.shape != text.shape or len(image) < 2:
        raise ValueError(
            f"{image_name} and {text_name} must both have shape [b, d] with b >= 2 (an anchor needs a negative), "
            f"got {list(image.shape)} and {list(text.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), narrowest)
    with torch.autocast(image.device.type, enabled=False):
        similarity = image.to(dtype) @ text.to(dtype).T
    if not bool(torch.isfinite(similarity).all()):
        raise ValueError(f"{image_name} and {text_name} must be finite, but their similarities are not")
    return similarity


def _over_negatives(similarity: Tensor) -> Tensor:
    """Return ``s_ij - s_ii`` for ``j != i``, ``[b, b - 1]``, in the order of j."""
    b = len(similarity)
    losses = similarity - similarity.diagonal()[:, None]
    # After the first entry, each run of b + 1 ends with a diagonal one.
    return losses.flatten()[1:].view(b - 1, b + 1)[:, :-1].reshape(b, b - 1)


def _averaged(log_u: Tensor, log_g: Tensor, gamma: float, name: str) -> Tensor:
    if log_u.shape != log_g.shape:
        raise ValueError(f"{name} must have shape {list(log_g.shape)}, one entry per pair, got {list(log_u.shape)}")
    old = log_u.to(log_g)
    if bool((torch.isnan(old) | (old == torch.inf)).any()):
        raise ValueError(f"{name} must be finite, or -inf where never visited; it holds NaN or +inf")
    return moving_average(old, log_g, math.log(gamma), math.log1p(-gamma) if gamma < 1 else -math.inf)
