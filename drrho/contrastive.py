"""The contrastive robust risk: one penalized risk over negatives per anchor, in both directions.

With similarities ``s``, a reference model's similarities ``r`` and the positive of anchor i at ``ii``, the excess
pair losses are ``l_ij = (s_ij - s_ii) - c (r_ij - r_ii)`` over the negatives ``j != i``, and the anchor's risk is
``F_i = max_p <p, l_i> - tau D_phi(p || uniform)``; for KL, ``tau log mean_{j != i} exp(l_ij / tau)``. Without a
reference this is the global contrastive loss of SogCLR and FastCLIP; with it (c = 1), that of DRRho-CLIP (Wei et al.,
ICML 2025). `anchor_risks` computes it from the definition; `contrastive_risk` computes the same in memory linear in
the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from drrho.divergences import KL, Divergence, check_divergence
from drrho.negatives import WorstCase, excess_pair_losses, robust_anchors
from drrho.ranks import Group, mean_over_ranks, row_counts
from drrho.reference import excess_losses
from drrho.risk import RobustRisk, constrained_risk, hybrid_risk, penalized_risk
from drrho.running import adaptive_log_rates, moving_average
from drrho.tiles import Anchors, Pairs, TensorPair, kl_anchors, not_compiled
from drrho.validation import ArrayLike, Checks, as_numbers, checks_are_deferred

__all__ = [
    "ContrastiveStep",
    "anchor_risks",
    "anchor_values",
    "contrastive_risk",
    "info_nce",
    "project_temperature",
    "two_level_risk",
]

_KL = KL()

#: One temperature for all anchors, or one for each image and each text anchor.
Temperature: TypeAlias = "float | Tensor | TensorPair"


class ContrastiveStep(NamedTuple):
    """The result of `contrastive_risk` for one batch; pairs are of image and text anchors, ``[b]`` each.

    Attributes
    ----------
    value : Tensor, scalar
        Mean of F_i over all anchors, averaged over the two directions (the published loss is twice this), plus
        ``rho`` times the mean temperature; with ``per_temperature``, the mean of ``F_i / tau``. Its gradient is the
        running-estimate estimator of the full-data gradient.
    log_u : (Tensor, Tensor) or None
        Running estimates after the step; None for divergences other than KL.
    threshold : (Tensor, Tensor) or None
        The running dual variables of other divergences, in units of similarity; None for KL.
    risks : (Tensor, Tensor)
        F_i of the batch, detached.
    distances : (Tensor, Tensor)
        D of the anchors' weights from uniform, detached; for KL, ``exp(-D)`` times the number of negatives is the
        effective number of negatives.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.contrastive import contrastive_risk
    >>> features = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> image, text, ref_image, ref_text = normalize(features, dim=-1)
    >>> step = contrastive_risk(image, text, temperature=0.1)
    >>> round(step.value.item(), 4), step.log_u[0].shape, step.threshold is None
    (0.1679, torch.Size([8]), True)
    >>> torch.allclose(step.value, (step.risks[0].mean() + step.risks[1].mean()) / 2)
    True
    """

    value: Tensor
    log_u: TensorPair | None
    threshold: TensorPair | None
    risks: TensorPair
    distances: TensorPair


@not_compiled
def contrastive_risk(
    image: Tensor,
    text: Tensor,
    temperature: Temperature,
    *,
    reference: TensorPair | list[TensorPair] | None = None,
    log_u: TensorPair | None = None,
    gamma: float = 1.0,
    log_step: float | None = None,
    eps: float = 0.0,
    divergence: Divergence = _KL,
    threshold: TensorPair | None = None,
    coefficient: float | Tensor = 1.0,
    include_positive: bool = False,
    rho: float = 0.0,
    per_temperature: bool = False,
    published_temperature_gradient: bool = False,
    group: Group = None,
    counts: Sequence[int] | None = None,
) -> ContrastiveStep:
    """Compute the batch's ``mean_i F_i``, with an estimate of the full-data objective's gradient.

    For KL, ``u_i <- (1 - gamma) u_i + gamma g_i`` tracks ``g_i = mean_{j != i} exp(l_ij / tau)``, and the gradient
    is ``mean_i [g_i / (eps + u_i)] grad F_i``. With ``gamma = 1`` and ``eps = 0`` it is the gradient of the batch's
    value. The similarity matrix is not kept: its tiles are computed in the forward pass, and again in the backward
    pass. (On a GPU, a matrix that is a single tile is kept.)

    Parameters
    ----------
    image, text : Tensor ``[b, d]``
        Unit-norm features of the target, b >= 2; row i of both is one pair. Similarities are computed in float32 or
        wider, also under autocast; on a GPU their products are as precise as `torch.set_float32_matmul_precision` says.
    temperature : float, scalar tensor, or pair of tensors ``[b]``
        tau > 0, in units of similarity: one for all, or one for each image and each text anchor. The gradient with
        respect to it is that of ``F_i + rho tau``, which is ``rho - D_i`` without running estimates, and is taken at
        running estimates held fixed.
    reference : (Tensor, Tensor), or list of such pairs, optional
        Unit-norm features ``[b, d_ref]`` of the reference for the same pairs; detached. Of a list, one for each of
        several references, the largest excess counts: ``l_ij = (s_ij - s_ii) - min_k c (r^k_ij - r^k_ii)``, the worst
        case (for their mean, or a mixture: `drrho.mixture.mixed_references`).
    log_u : (Tensor, Tensor), optional
        Running estimates of these anchors before the step, ``-inf`` for those never visited. KL only.
    gamma : float
        Inner rate in (0, 1].
    log_step : float, optional
        Use SCENT's rate ``sigmoid(log u_i + log_step)`` of each anchor instead of gamma. KL only.
    eps : float
        Constant >= 0, added to u in the denominator of the gradient.
    divergence : Divergence
        Divergence of the weights over negatives; KL by default.
    threshold : (Tensor, Tensor), optional
        Running dual variables of the anchors, NaN for those never visited, for divergences other than KL. With
        gamma < 1 they lag as u does; the value is then the dual objective, an upper bound on the batch's risk. An
        anchor for which that is infinite (phi* has a pole for orders below 1) takes the batch's threshold.
    coefficient : float or scalar tensor
        Factor c of the reference's margins: 1 is DRRho-CLIP, 0 ignores the reference.
    include_positive : bool
        Whether an anchor's own pair (of loss 0) counts among its negatives.
    rho : float
        Radius of the constrained form ``min_tau F_i + rho tau`` (here a bound on KL itself, as in FastCLIP v3).
    per_temperature : bool
        Minimize ``F_i / tau`` instead, as SogCLR and FastCLIP v0 do, whose learned temperature needs no radius. KL
        only, and without rho.
    published_temperature_gradient : bool
        Count the similarity part of the temperature's gradient twice, as the published code does (its values of rho
        assume it).
    group : torch.distributed.ProcessGroup, optional
        Ranks over which the batch is spread, any number of pairs each: every rank passes its own pairs, which
        are compared with all ranks' negatives. ``value`` is that of the batch of all ranks; gradients are those of
        this one value with respect to this rank's features. Every rank must call the function, and backward.
    counts : sequence of int, optional
        The number of pairs of every rank, where the caller knows them; otherwise they are exchanged.

    Raises
    ------
    ValueError
        For mismatched shapes, fewer than two pairs, non-finite features, a coefficient without a reference, or a
        parameter out of range. All values are checked with one read of the device; with
        `drrho.validation.deferred_checks`, with none.
    TypeError
        For features that are no floating tensors, or a reference that is no pair of them.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.contrastive import contrastive_risk
    >>> features = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> image, text, ref_image, ref_text = normalize(features, dim=-1)
    >>> image = image.requires_grad_()
    >>> step = contrastive_risk(image, text, 0.1, reference=(ref_image, ref_text))
    >>> step.value.backward()  # and keep step.log_u for the next epoch: `drrho.running.RunningEstimates`
    >>> round(step.value.item(), 4), image.grad.shape
    (0.3128, torch.Size([8, 16]))
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
    check_divergence(divergence)
    if log_step is not None and not (gamma == 1.0 and divergence.has_exponential_weights and abs(log_step) < math.inf):
        raise ValueError(f"log_step must be finite and stand alone, for KL, got {log_step} with gamma={gamma}")
    for number, name in ((eps, "eps"), (rho, "rho")):
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {number}")
    is_kl = divergence.has_exponential_weights
    if log_u is not None and not is_kl:
        raise ValueError(f"log_u needs divergence=KL(), got {divergence}: it tracks the KL normalizer; use threshold")
    if per_temperature and not (is_kl and rho == 0):
        raise ValueError(f"per_temperature needs divergence=KL() and rho=0, got {divergence} and rho={rho}")
    if threshold is not None and is_kl:
        raise ValueError("threshold is the state of divergences other than KL; pass log_u for KL")
    checks = Checks()
    before = None if log_u is None else _visited(log_u, image, text, checks)
    first, guides = _guides(reference, len(image), group, checks)
    taus, pairs = _prepared(image, text, temperature, first, coefficient, include_positive, group, counts, checks)
    worst = WorstCase(guides, coefficient) if guides else None
    pairs = pairs if worst is None else pairs._replace(reference=None, coefficient=1.0)
    with torch.autocast(image.device.type, enabled=False):
        if is_kl:
            anchors, tau = kl_anchors(pairs) if worst is None else _worst_anchors(pairs, taus, worst), _stacked(taus)
            slopes = 2 if published_temperature_gradient else 1
            terms, after = _running_terms(*anchors, tau, before, gamma, log_step, eps, slopes, per_temperature)
            log_g = anchors.log_g.detach()
            risks, distances = tau.detach() * log_g, anchors.mean_exponent - log_g
            state = {"log_u": (after[0], after[1]), "threshold": None}
        else:
            both, after, distances = robust_anchors(pairs, taus, divergence, threshold, gamma, worst)
            terms = torch.stack(both)
            risks = terms.detach()
            state = {"log_u": None, "threshold": after}
    if rho > 0:
        terms = terms + rho * _stacked(taus)
    value = mean_over_ranks(terms.flatten(), group)
    return ContrastiveStep(value=value, risks=(risks[0], risks[1]), distances=(distances[0], distances[1]), **state)


@not_compiled
def info_nce(
    image: Tensor,
    text: Tensor,
    temperature: Temperature,
    *,
    reference: TensorPair | None = None,
    coefficient: float | Tensor = 1.0,
    group: Group = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Compute CLIP's loss, the cross-entropy of the pairs in the batch: ``mean_i log sum_j exp(l_ij / tau)``.

    It is the contrastive risk with the positive among the negatives, ``F_i / tau + log b``, averaged over both
    directions; unlike F_i, its temperature can be learned without a radius. With a reference, the pair losses are
    those in excess of the reference.

    Parameters
    ----------
    temperature : float or scalar tensor
        tau = 1 / logit scale; it may require a gradient.
    image, text, reference, coefficient, group, counts
        As for `contrastive_risk`.

    Returns
    -------
    Tensor
        The loss in nats, differentiable once.

    Raises
    ------
    ValueError
        As for `contrastive_risk`.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.contrastive import info_nce
    >>> features = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> image, text, ref_image, ref_text = normalize(features, dim=-1)
    >>> loss = info_nce(image, text, 0.1)
    >>> logits, labels = image @ text.T / 0.1, torch.arange(8)
    >>> cross_entropy = torch.nn.functional.cross_entropy
    >>> torch.allclose(loss, (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2)
    True
    """
    if counts is None:  # what is no tensor has no device, and is refused below
        counts = [len(image)] if group is None else row_counts(len(image), group, image.device)
    step = contrastive_risk(
        image,
        text,
        temperature,
        reference=reference,
        coefficient=coefficient,
        include_positive=True,
        per_temperature=True,
        group=group,
        counts=counts,
    )
    return step.value + math.log(sum(counts))


@not_compiled
def anchor_values(
    image: Tensor,
    text: Tensor,
    temperature: Temperature,
    *,
    reference: TensorPair | None = None,
    coefficient: float | Tensor = 1.0,
    include_positive: bool = False,
    group: Group = None,
    counts: Sequence[int] | None = None,
) -> TensorPair:
    """Return the KL risks F_i of image and text anchors, ``[b]`` each, in memory linear in the batch.

    They are differentiable once with respect to the features, for example to be weighted; `contrastive_risk` is their
    mean. Parameters and errors are those of `contrastive_risk`; the temperature is a constant here.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.contrastive import anchor_values
    >>> features = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> image, text, ref_image, ref_text = normalize(features, dim=-1)
    >>> of_images, of_texts = anchor_values(image, text, 0.1)
    >>> hardest = of_images.argmax()  # the image whose own text is hardest to tell from the others
    >>> round(of_images[hardest].item(), 3), of_texts.shape
    (0.758, torch.Size([8]))
    """
    taus, pairs = _prepared(image, text, temperature, reference, coefficient, include_positive, group, counts, Checks())
    with torch.autocast(image.device.type, enabled=False):
        log_g = kl_anchors(pairs).log_g
    return taus[0].detach() * log_g[0], taus[1].detach() * log_g[1]


def two_level_risk(
    image: Tensor,
    text: Tensor,
    temperature: Temperature,
    outer: Divergence,
    *,
    reference: TensorPair,
    radius: ArrayLike | None = None,
    strength: ArrayLike | None = None,
    reference_temperature: Temperature | None = None,
    include_positive: bool = False,
    group: Group = None,
    counts: Sequence[int] | None = None,
) -> RobustRisk:
    """Maximize ``sum_i p_i e_i`` over weights of samples, where ``e_i`` is the excess of a sample's contrastive risk.

    ``e_i`` is ``(F_i^image + F_i^text) / 2`` of the target minus that of the reference, both without steering. A
    mismatched pair has a high loss under the reference and gets little weight; a pair that can still be learned gets
    much weight. The outer risk is `constrained_risk` (``radius``), `penalized_risk` (``strength``) or, with both,
    `hybrid_risk`; CVaR selects the top of the batch, as RHO selection does.

    Parameters
    ----------
    outer : Divergence
        Divergence of the weights over samples.
    reference : (Tensor, Tensor)
        Unit-norm features of the reference for the same pairs.
    radius, strength : float, optional
        At least one must be given, except for CVaR, which needs neither.
    reference_temperature : float, optional
        Temperature of the reference; by default that of the target.
    image, text, temperature, include_positive, group, counts
        As for `contrastive_risk`. The returned weights are those of this rank's samples; the divergence is that of all
        ranks' weights.

    Returns
    -------
    RobustRisk
        ``value`` is differentiable once with respect to image and text.

    Raises
    ------
    ValueError
        As for `contrastive_risk`, or if neither radius nor strength is given.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho import CVaR
    >>> from drrho.contrastive import two_level_risk
    >>> features = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> image, text, ref_image, ref_text = normalize(features, dim=-1)
    >>> risk = two_level_risk(image, text, 0.1, CVaR(0.25), reference=(ref_image, ref_text))
    >>> round(risk.value.item(), 4), int((risk.weights > 0).sum())  # a quarter of the eight pairs
    (0.3506, 2)
    """
    if radius is None and strength is None and outer.has_radius:
        raise ValueError("give radius, strength or both: without either the weights are not bounded")
    counts = row_counts(len(image), group, image.device) if counts is None else counts
    options = {"include_positive": include_positive, "group": group, "counts": counts}
    own = anchor_values(image, text, temperature, **options)
    with torch.no_grad():
        reference_tau = temperature if reference_temperature is None else reference_temperature
        theirs = anchor_values(*reference, reference_tau, **options)
    target, other = (own[0] + own[1]) / 2, ((theirs[0] + theirs[1]) / 2).to(own[0])
    base = None
    if min(counts) == 0:  # a row of losses has a part on every rank: one without pairs adds a loss of no weight
        target, other = (nn.functional.pad(mean, (0, len(mean) == 0)) for mean in (target, other))
        base = torch.full_like(target, float(len(image) > 0), dtype=torch.float64) / sum(counts)
    excess = excess_losses(target, other)
    if strength is None:
        risk = constrained_risk(excess, outer, 0.0 if radius is None else radius, base_weights=base, group=group)
    elif radius is None:
        risk = penalized_risk(excess, outer, strength, base_weights=base, group=group)
    else:
        risk = hybrid_risk(excess, outer, radius, strength, base_weights=base, group=group)
    return risk._replace(weights=risk.weights[: len(image)])


def anchor_risks(
    image: Tensor,
    text: Tensor,
    temperature: Temperature,
    *,
    reference: TensorPair | list[TensorPair] | None = None,
    divergence: Divergence = _KL,
    coefficient: float = 1.0,
    include_positive: bool = False,
) -> tuple[RobustRisk, RobustRisk]:
    """Return each anchor's `penalized_risk` over its negatives, image to text and text to image, from the definition.

    The matrices of losses and weights ``[b, b - 1]`` are kept, so that weights and certificates can be inspected and
    derivatives of any order computed. The value of `contrastive_risk` is the mean of both directions' values.

    Parameters and errors are those of `contrastive_risk`.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.contrastive import anchor_risks, anchor_values
    >>> features = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> image, text, ref_image, ref_text = normalize(features, dim=-1)
    >>> of_images, of_texts = anchor_risks(image, text, 0.1)
    >>> torch.allclose(of_images.value, anchor_values(image, text, 0.1)[0])
    True
    >>> of_images.weights.shape  # over the seven negatives of each image
    torch.Size([8, 7])
    """
    checks = Checks()
    first, guides = _guides(reference, len(image), None, checks)
    first = _checked_features(image, text, first, coefficient, checks, alone=True)
    taus = checks.close(*_temperatures(temperature, image, checks))
    references = guides or ([] if first is None else [first])
    both = excess_pair_losses(image, text, references, coefficient, include_positive)
    first, second = (penalized_risk(losses, divergence, tau) for losses, tau in zip(both, taus, strict=True))
    return first, second


def project_temperature(temperature: Tensor, low: float, high: float) -> int | Tensor:
    """Project a learned temperature to ``[low, high]`` in place, and return how many entries were changed.

    In a block of `drrho.validation.deferred_checks` the number is a tensor, and NaN stays NaN.

    Raises
    ------
    ValueError
        Unless ``0 < low <= high``, or if an entry is NaN.

    Examples
    --------
    >>> import torch
    >>> from drrho.contrastive import project_temperature
    >>> temperature = torch.tensor([0.001, 0.05, 2.0])
    >>> int(project_temperature(temperature, 0.01, 1.0))
    2
    >>> [round(value, 2) for value in temperature.tolist()]
    [0.01, 0.05, 1.0]
    """
    if not 0 < low <= high:
        raise ValueError(f"low and high must satisfy 0 < low <= high, got {low} and {high}")
    values = temperature.detach()
    moved = ((values < low) | (values > high)).sum()
    if not checks_are_deferred():
        moved, invalid = torch.stack([moved, torch.isnan(values).sum()]).tolist()
        if invalid:
            raise ValueError("temperature must not be NaN: its optimizer has diverged")
    values.clamp_(low, high)
    return moved


def _prepared(
    image: Tensor,
    text: Tensor,
    temperature: Temperature,
    reference: TensorPair | None,
    coefficient: float | Tensor,
    include_positive: bool,
    group: Group,
    counts: Sequence[int] | None,
    checks: Checks,
) -> tuple[TensorPair, Pairs]:
    """Check the arguments and return temperatures and pairs."""
    reference = _checked_features(image, text, reference, coefficient, checks, alone=group is None)
    if reference is not None and isinstance(coefficient, Tensor):
        wide = torch.promote_types(reference[0].dtype, torch.float32)
        # A factor of the features, as products of matrices take numbers alone.
        reference = reference[0].to(wide) * coefficient, reference[1]
    first, second = _temperatures(temperature, image, checks)
    is_one = first is second  # tiles know a rate that all anchors share by being one tensor
    first, second = checks.close(first, second)
    second = first if is_one else second
    rate = first.detach().reciprocal()
    rates = rate, rate if is_one else second.detach().reciprocal()
    factor = 1.0 if isinstance(coefficient, Tensor) else coefficient
    return (first, second), Pairs(image, text, rates, reference, factor, include_positive, group, counts)


def _guides(
    reference: TensorPair | list[TensorPair] | None, count: int, group: Group, checks: Checks
) -> tuple[TensorPair | None, list[TensorPair]]:
    """Return the reference, or the first of a list and all of them, which are checked with the other arguments.

    A list of two tensors is a pair like any other.
    """
    if not isinstance(reference, list):
        return reference, []
    features = [part for part in reference if isinstance(part, Tensor)]
    if len(features) == len(reference) == 2:
        return (features[0], features[1]), []
    if not reference:
        raise ValueError("reference must hold at least one pair of features, got an empty list: leave it out")
    found = [checked_reference(each, count, checks, alone=group is None) for each in reference]
    return found[0], found


def _worst_anchors(pairs: Pairs, taus: TensorPair, worst: WorstCase) -> Anchors:
    """Return the KL anchors in excess of the worst of several references."""
    fixed = taus[0].detach(), taus[1].detach()
    risks, _, distances = robust_anchors(pairs, fixed, _KL, None, 1.0, worst)
    log_g = torch.stack([risk / tau for risk, tau in zip(risks, fixed, strict=True)])
    return Anchors(log_g, torch.stack(distances) + log_g.detach())


def _running_terms(
    log_g: Tensor,
    mean_exponent: Tensor,
    tau: Tensor,
    log_u: Tensor | None,
    gamma: float,
    log_step: float | None,
    eps: float,
    slopes: int,
    per_temperature: bool,
) -> tuple[Tensor, Tensor]:
    """Return the anchors' risks ``[2, b]`` with the estimator's gradient, and log u after the step.

    The gradient with respect to features is ``g / (eps + u)`` times that of the risk; with respect to the temperature
    it is ``log(eps + u) - g / (eps + u) E_p[l / tau]``, without the logarithm for the risk per temperature.
    """
    value = log_g.detach()
    after = value if log_u is None else _averaged(log_u, value, gamma, log_step)
    smoothed = after if eps == 0 else torch.logaddexp(after, after.new_full((), math.log(eps)))
    scale = torch.exp(value - smoothed)  # at most 1 / rate, since u >= rate * g
    terms = value + scale * (log_g - value)
    fixed = tau.detach()
    if not per_temperature:
        terms = fixed * terms
    if not tau.requires_grad:
        return terms, after
    by_similarity = slopes * scale * mean_exponent
    if per_temperature:
        return terms - (tau / fixed - 1) * by_similarity, after
    return terms + (tau - fixed) * (smoothed - by_similarity), after


def _stacked(pair: TensorPair) -> Tensor:
    """Return the temperatures of both directions, one for all or ``[2, b]``."""
    first, second = pair
    return first if first is second else torch.stack(torch.broadcast_tensors(first, second))


def _temperatures(temperature: Temperature, image: Tensor, checks: Checks) -> TensorPair:
    """Return the temperatures of image and text anchors, scalars or ``[b]``."""
    given = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    if len(given) != 2:
        raise ValueError(
            f"temperature must be a pair of image and text anchors' temperatures, got {len(given)} of them"
        )
    first = temperature_of(given[0], image, checks)
    return first, first if given[0] is given[1] else temperature_of(given[1], image, checks)


def temperature_of(values: float | Tensor, image: Tensor, checks: Checks) -> Tensor:
    """Return a temperature as a tensor, a scalar or ``[b]``, in float32 or wider; it is checked with the others."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    if isinstance(values, (float, int)):  # checked here; filled on the device, as a copy to it would wait
        if not 0 < values < math.inf:
            raise ValueError(f"temperature must be finite and > 0, got {values}")
        return torch.full((), values, dtype=dtype, device=image.device)
    tau = as_numbers(values, "temperature").to(image.device, dtype)
    if tau.numel() == 1:
        tau = tau.reshape(())
    elif tau.shape != image.shape[:1]:
        raise ValueError(f"temperature must be one number or have shape [{len(image)}], got {list(tau.shape)}")
    checks.refuse(~((tau > 0) & (tau < math.inf)), tau, "temperature must be finite and > 0, got {}")
    return tau


def _checked_features(
    image: Tensor,
    text: Tensor,
    reference: TensorPair | None,
    coefficient: float | Tensor,
    checks: Checks,
    *,
    alone: bool,
) -> TensorPair | None:
    """Check features and coefficient, and return the reference's features, detached."""
    if isinstance(coefficient, Tensor):
        checks.refuse(~(coefficient.abs() < math.inf), coefficient, "coefficient must be finite, got {}")
    elif not isinstance(coefficient, Real):
        raise TypeError(f"coefficient must be a number or a scalar tensor, got {coefficient!r}")
    elif not abs(coefficient) < math.inf:
        raise ValueError(f"coefficient must be finite, got {coefficient}")
    check_pairs(image, text, "image", "text", checks, alone=alone)
    if reference is not None:
        return checked_reference(reference, len(image), checks, alone=alone)
    if isinstance(coefficient, Tensor) or coefficient not in (0, 1):
        raise ValueError(f"coefficient={coefficient} needs a reference, whose margins it multiplies, got None")
    return None


def check_pairs(image: Tensor, text: Tensor, image_name: str, text_name: str, checks: Checks, *, alone: bool) -> None:
    """Raise an error unless the features are pairs ``[b, d]``, and check with the others that they are finite.

    ``alone``: there are no other ranks.
    """
    for features, name in ((image, image_name), (text, text_name)):
        if not isinstance(features, Tensor):
            raise TypeError(f"{name} must be a tensor [b, d], got {type(features).__name__}")
        if not features.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {features.dtype}")
    least = 2 if alone else 0
    if image.ndim != 2 or image.shape != text.shape or len(image) < least:
        raise ValueError(
            f"{image_name} and {text_name} must both have shape [b, d] with b >= {least} (an anchor needs a negative), "
            f"got {list(image.shape)} and {list(text.shape)}"
        )
    total = image.detach().sum() + text.detach().sum()
    checks.refuse(total * 0 != 0, total, f"{image_name} and {text_name} must be finite, but their sums are not")


def checked_reference(reference: TensorPair, count: int, checks: Checks, *, alone: bool) -> TensorPair:
    """Return the reference's features of ``count`` pairs, detached; `check_pairs` says what else they must be."""
    if isinstance(reference, Tensor) or len(reference) != 2:
        got = "one tensor" if isinstance(reference, Tensor) else f"{len(reference)} entries"
        raise TypeError(f"reference must be a pair of image and text features, got {got}")
    check_pairs(*reference, "reference[0]", "reference[1]", checks, alone=alone)
    if len(reference[0]) != count:
        raise ValueError(f"reference must hold {count} pairs like image and text, got {len(reference[0])}")
    return reference[0].detach(), reference[1].detach()


def _visited(log_u: TensorPair, image: Tensor, text: Tensor, checks: Checks) -> Tensor:
    """Return the running estimates before the step, ``[2, b]``, in the dtype of the result; they are checked too."""
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    found = []
    for side, given in enumerate(log_u):
        name = f"log_u[{side}]"
        if given.shape != image.shape[:1]:
            raise ValueError(
                f"{name} must have shape {list(image.shape[:1])}, one entry per pair, got {list(given.shape)}"
            )
        old = given.to(image.device, dtype)
        message = f"{name} must be finite, or -inf where never visited; it holds NaN or +inf"
        checks.refuse(~(old < torch.inf), old, message)
        found.append(old)
    return torch.stack(found)


def _averaged(old: Tensor, log_g: Tensor, gamma: float, log_step: float | None) -> Tensor:
    if log_step is not None:
        return moving_average(old, log_g, *adaptive_log_rates(old, log_step))
    return moving_average(old, log_g, math.log(gamma), math.log1p(-gamma) if gamma < 1 else -math.inf)
