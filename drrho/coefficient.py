"""How much of the reference to subtract, estimated during training: by least variance, or by what it still adds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from drrho.ranks import Group
from drrho.validation import checks_are_deferred

__all__ = ["AdaptiveCoefficient", "MovingCoefficient", "ScheduledCoefficient"]

Features = tuple[Tensor, Tensor]  # of images and texts, ``[b, d]``


class MovingCoefficient:
    """A coefficient c that is estimated during training, a function of moving averages over batches.

    Parameters
    ----------
    rate : float
        Weight of a batch in the moving averages, in (0, 1]; the first batch has weight 1.

    Examples
    --------
    >>> from drrho.coefficient import AdaptiveCoefficient, MovingCoefficient, ScheduledCoefficient
    >>> all(issubclass(each, MovingCoefficient) for each in (AdaptiveCoefficient, ScheduledCoefficient))
    True
    >>> ScheduledCoefficient().value  # before the first batch
    0.0
    """

    #: How many moving averages there are, and what they are.
    _COUNT, _NAMES = 2, ""

    def __init__(self, rate: float = 0.1) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"rate must lie in (0, 1], got {rate}")
        self._rate = rate
        #: The moving averages, float64; NaN before the first batch.
        self.moments = torch.full((self._COUNT,), math.nan, dtype=torch.float64)

    def update(
        self,
        image: Tensor,
        text: Tensor,
        *,
        reference: Features,
        group: Group = None,
        counts: Sequence[int] | None = None,
    ) -> float | Tensor:
        """Update the moving averages with a batch and return c, to be passed as ``coefficient``.

        In a block of `drrho.validation.deferred_checks` c is a tensor, NaN if the features are not finite, and no value
        is read.

        Parameters
        ----------
        image, text : Tensor ``[b, d]``
            Unit-norm features of the target.
        reference : (Tensor, Tensor)
            Unit-norm features ``[b, d_ref]`` of the reference.
        group : torch.distributed.ProcessGroup, optional
            Ranks over which the batch is spread; each passes its own pairs, and all get the same c.
        counts : sequence of int, optional
            Rows of each rank, which are asked for where they are needed and not given.

        Raises
        ------
        ValueError
            For fewer than two pairs over all ranks, or features that are not finite; the estimate does not change.
        """
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            dtype = torch.promote_types(torch.promote_types(image.dtype, reference[0].dtype), torch.float32)
            own = image.to(dtype), text.to(dtype)
            theirs = reference[0].to(dtype), reference[1].to(dtype)
            return self._moved(self._measured(own, theirs, group, counts))

    def _measured(self, own: Features, theirs: Features, group: Group, counts: Sequence[int] | None) -> Tensor:
        """Return what a batch has of the averages."""
        raise NotImplementedError

    @property
    def value(self) -> float:
        """The current coefficient."""
        return self._of(self.moments).item()

    def _of(self, moments: Tensor) -> Tensor:
        """Return the coefficient of the averages, in [0, 1]."""
        raise NotImplementedError

    def _moved(self, found: Tensor) -> float | Tensor:
        """Move the averages by what a batch has, and return the coefficient; NaN in deferred checks if not finite."""
        before = self.moments.to(found.device)
        finite = torch.isfinite(found).all()
        if not checks_are_deferred() and not bool(finite):
            values = ", ".join(map(str, found.tolist()))
            raise ValueError(f"image, text and reference must be finite, but {self._NAMES} are {values}")
        moved = torch.where(torch.isnan(before), found, before + self._rate * (found - before))
        self.moments = torch.where(finite, moved, before)
        if not checks_are_deferred():
            return self.value
        return torch.where(finite, self._of(self.moments), torch.nan)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moving averages, NaN before the first batch."""
        return {"moments": self.moments.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the moving averages that `state_dict` returned.

        Raises
        ------
        ValueError
            If it does not hold as many ``moments``, all finite or all NaN.
        """
        moments, count = state.get("moments"), self._COUNT
        if moments is None or moments.shape != (count,) or not (moments.isfinite().all() or moments.isnan().all()):
            raise ValueError(f"state must hold moments, {count} numbers all finite or all NaN, got {moments}")
        self.moments = moments.to(self.moments)


class AdaptiveCoefficient(MovingCoefficient):
    """Estimate the c in [0, 1] that minimizes the variance of ``l_ij - c r_ij`` over the negatives of an anchor.

    ``l_ij`` and ``r_ij`` are the pair losses of target and reference. An anchor's weights depend on how its losses
    differ among its negatives, so covariance and variance are computed within anchors and pooled over anchors and both
    directions: ``c = sum_i Cov_i(l, r) / sum_i Var_i(r)`` of moving averages, clipped to [0, 1]. With an untrained
    target c is near 0, so that the reference is ignored at first; it grows as target and reference agree.

    Parameters
    ----------
    rate : float
        Weight of a batch in the moving averages, in (0, 1]; the first batch has weight 1.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> generator = torch.Generator().manual_seed(0)
    >>> image, text = normalize(torch.randn(2, 64, 16, generator=generator), dim=-1)
    >>> coefficient = AdaptiveCoefficient()
    >>> round(coefficient.update(image, text, reference=(image, text)), 6)
    1.0
    >>> round(AdaptiveCoefficient().update(image, text, reference=(image, -text)), 6)
    0.0
    """

    _NAMES = "covariance and variance"

    def _measured(self, own: Features, theirs: Features, group: Group, counts: Sequence[int] | None) -> Tensor:
        """Return covariance and variance: sums of products of similarities are products of the Gram matrices."""
        return covariances_within_anchors([(own, theirs), (theirs, theirs)], group).mean(1)

    def _of(self, moments: Tensor) -> Tensor:
        """Return c of covariance and variance: 0 before the first batch, and where there is no variance."""
        return _least_variance(moments)


class ScheduledCoefficient(MovingCoefficient):
    """Steer while the reference knows more than the target: a part of the coefficient of least variance, by how much.

    Let ``s_ij`` and ``r_ij`` be the similarities of target and reference. Over the candidates of a batch, the true ones
    are predicted by the softmax of maximum likelihood (stacking: Wolpert, 1992; Breiman, 1996)::

        max over (a, b) of sum_i log softmax_j(a s_ij + b r_ij)_i

    in both directions. With ``a_0`` the best a at b = 0, and ``b_0`` the best b at a = 0, the shares ``a / a_0`` and
    ``b / b_0`` say how much of its own weight each keeps beside the other: 1 where the other adds nothing, 0 where it
    adds nothing itself. The reference's lead is ``b / b_0 - a / a_0``, and the coefficient ``largest`` times that of
    `AdaptiveCoefficient`, times twice the lead, clipped to [0, 1], all of moving averages. It starts at 0, where an
    untrained target would follow nothing but the reference, rises as they agree, falls once the lead is less than a
    half, and is 0 from where both know as much: the run goes on as its unsteered twin, whatever its budget. A constant
    coefficient cannot do so: it minimizes the risk where ``s = c r + tau log(density ratio)``, with c times the
    reference's mistakes.

    The lead is measured on the pairs of training. Where the reference knows other pairs, and helps the target with
    those, c falls too early: on icons whose names it had never seen, a constant 1 steered well, and this not at all.

    Parameters
    ----------
    rate : float
        Weight of a batch in the moving averages, in (0, 1]; the first batch has weight 1.
    largest : float
        The coefficient of full agreement and full lead. In trials on glyphs, of one seed, half was better than all
        under a weak and a strong reference.
    anchors : int
        How many pairs of a batch, its first, are compared with each other; at least 2.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> generator = torch.Generator().manual_seed(0)
    >>> truth, noise = torch.randn(2, 64, 16, generator=generator)
    >>> knowing = normalize(truth, dim=-1), normalize(truth + 0.3 * noise, dim=-1)
    >>> learning = knowing[0], normalize(truth + 2 * noise, dim=-1)
    >>> ScheduledCoefficient().update(*learning, reference=knowing) > 0.1  # the reference knows more
    True
    >>> ScheduledCoefficient().update(*knowing, reference=learning)  # the target does
    0.0
    """

    _COUNT, _NAMES = 4, "covariance, variance and the shares of target and reference"

    def __init__(self, rate: float = 0.1, largest: float = 0.5, anchors: int = 256) -> None:
        super().__init__(rate)
        if not 0 < largest <= 1:
            raise ValueError(f"largest must lie in (0, 1], got {largest}")
        if anchors < 2:
            raise ValueError(f"anchors must be at least 2, got {anchors}: a pair is compared with others")
        self._largest, self._anchors = largest, anchors

    def _measured(self, own: Features, theirs: Features, group: Group, counts: Sequence[int] | None) -> Tensor:
        """Return covariance, variance and the shares of target and reference."""
        moments = covariances_within_anchors([(own, theirs), (theirs, theirs)], group).mean(1)
        rows = [part.double() for part in _first_rows([*own, *theirs], self._anchors, group, counts)]
        shares = _shares(torch.stack([rows[0] @ rows[1].T, rows[2] @ rows[3].T]))
        return torch.cat([moments, shares])

    def _of(self, moments: Tensor) -> Tensor:
        """Return c of the moments and the shares; 0 before the first batch."""
        target, reference = moments[2:].unbind()
        lead = torch.where(torch.isnan(reference), 0.0, reference - target)
        return self._largest * _least_variance(moments[:2]) * (2 * lead).clamp(0, 1)


def _least_variance(moments: Tensor) -> Tensor:
    """Return covariance over variance in [0, 1]; 0 where there is no variance, or no batch yet."""
    covariance, variance = moments.unbind()
    return torch.where(variance > 0, (covariance / variance).clamp(0, 1), 0.0)


def _first_rows(parts: list[Tensor], most: int, group: Group, counts: Sequence[int] | None) -> list[Tensor]:
    """Return the first rows of the batch of all ranks, at most so many, on every rank."""
    own, rank = len(parts[0]), 0
    if group is None:
        return [part[:most] for part in parts]
    if counts is None:
        sizes: list[int] = [0] * dist.get_world_size(group)
        dist.all_gather_object(sizes, own, group=group)
        counts = sizes
    rank = dist.get_rank(group)
    first, rows = sum(counts[:rank]), min(most, sum(counts))
    together = torch.cat(parts, 1)
    # Ranks fill in their own rows; the others' are zero.
    filled = together.new_zeros(rows, together.shape[1])
    filled[first : first + own] = together[: max(0, rows - first)]
    dist.all_reduce(filled, group=group)
    return list(filled.split([part.shape[1] for part in parts], 1))


_STEPS = 10
_LONGEST_STEP = 3.0  # of a weight, in units of the inverse spread of similarities
_LEAST_WEIGHT = 0.1  # a weight in these units; of 512 anchors it is two standard errors
_PRIOR = 1e-3  # precision of a weight in these units, for each anchor: where pairs are told apart without error


def _shares(similarities: Tensor) -> Tensor:
    """Return the shares of target and reference, of their similarities ``[2, m, m]``."""
    both = torch.cat([similarities, similarities.mT], 1)  # [2, 2 m, m]: anchors are images, then texts
    centered = both - both.mean(-1, keepdim=True)
    spread = centered.square().mean((1, 2)).sqrt()
    scaled = torch.where(spread[:, None, None] > 0, centered / spread[:, None, None], 0.0)
    beside = _softmax_weights(scaled)
    alone = torch.cat([_softmax_weights(each[None]) for each in scaled])
    # What a batch cannot tell from noise knows nothing: the ratio of its weights would be anything.
    found = torch.where(alone > 0, beside / alone.clamp(min=_LEAST_WEIGHT), 0.0)
    return torch.where(torch.isfinite(similarities).all(), found, torch.nan)


def _softmax_weights(scores: Tensor) -> Tensor:
    """Return the weights ``[k]`` of scores ``[k, 2 m, m]``, k <= 2, of maximum likelihood, by Newton's method."""
    k, anchors, m = scores.shape
    true = torch.arange(anchors, device=scores.device) % m
    right = scores.gather(2, true.expand(k, anchors)[..., None]).sum((1, 2))
    prior = _PRIOR * anchors
    weights = scores.new_zeros(k)
    for _ in range(_STEPS):
        shares = torch.softmax(torch.einsum("k,kam->am", weights, scores), -1)
        means = (shares * scores).sum(-1)  # [k, anchors]
        slope = right - means.sum(1) - prior * weights
        curvature = torch.einsum("am,kam,lam->kl", shares, scores, scores) - means @ means.T
        curvature = curvature + prior * torch.eye(k, dtype=scores.dtype, device=scores.device)
        if k == 1:
            step = slope / curvature[0]
        else:  # of 2 x 2, without a call that waits for the device
            (p, q), (_, r) = curvature
            step = torch.stack([r * slope[0] - q * slope[1], p * slope[1] - q * slope[0]]) / (p * r - q * q)
        weights = weights + step.clamp(-_LONGEST_STEP, _LONGEST_STEP)
    return weights


def within_anchors(a: Features, b: Features, group: Group = None) -> tuple[float, float]:
    """Return the covariance of two models' similarities over an image's negative texts and a text's negative images.

    Each is the mean over all anchors of its side. The covariance of a model with itself is its variance.
    """
    image, text = covariances_within_anchors([(a, b)], group)[0].tolist()
    return image, text


def covariances_within_anchors(models: Sequence[tuple[Features, Features]], group: Group = None) -> Tensor:
    """Return the covariances of `within_anchors` for pairs of models, float64 ``[pairs, 2]``.

    When the features of the other side are centered, ``sum_j s_ij = 0``. Row i without its positive, over m - 1
    negatives, then contributes ``sum_{j != i} s_ij r_ij - (s_ii r_ii) / (m - 1)``, and the sum over i and all j is
    ``<A_image' B_image, A_text' B_text>``, where one of the two Gram matrices is of centered features. They are
    centered before they are multiplied: features of an untrained model lie so close together that in float32 the
    difference of the products would be rounding alone.

    Raises
    ------
    ValueError
        For fewer than two pairs over all ranks; where `checks_are_deferred` the result is then NaN.
    """
    distinct = list({id(model): model for pair in models for model in pair}.values())
    sides = [features for model in distinct for features in model]
    size = torch.full((1,), len(sides[0]), dtype=torch.float64, device=sides[0].device)
    count, *sums = _summed_over_ranks([size, *(x.double().sum(0) for x in sides)], group)
    if group is None or not checks_are_deferred():
        known = len(sides[0]) if group is None else int(count)
        if known < 2:
            raise ValueError(f"image and text must hold at least 2 pairs over all ranks, got {known}")
    means = [total / count for total in sums]
    centered = [_centered(x, mean) for x, mean in zip(sides, means, strict=True)]
    place = {id(model): 2 * k for k, model in enumerate(distinct)}
    terms, total = [], []
    for first, second in models:
        a, b = place[id(first)], place[id(second)]
        terms += [(centered[a + side].T @ centered[b + side]).double() for side in (0, 1)]
        own = [
            ((sides[a + side] * centered[a + 1 - side]).sum(1) * (sides[b + side] * centered[b + 1 - side]).sum(1))
            for side in (0, 1)
        ]
        terms.append(torch.stack(own).sum(1, dtype=torch.float64))
    terms = _summed_over_ranks(terms, group)
    negatives = count - 1
    for k, (first, second) in enumerate(models):
        a, b = place[id(first)], place[id(second)]
        *grams, own = terms[3 * k : 3 * k + 3]
        products = [
            ((grams[side] + count * torch.outer(means[a + side], means[b + side])) * grams[1 - side]).sum()
            for side in (0, 1)
        ]
        total.append((torch.stack(products) - own * (count / negatives)) / (count * negatives))
    return torch.stack(total)


def _centered(features: Tensor, mean: Tensor) -> Tensor:
    """Return the features minus their mean, 0 where that is its rounding: equal features have no variance."""
    deviation = features - mean
    rounding = 8 * torch.finfo(torch.float64).eps * mean.abs()
    return torch.where(deviation.abs() > rounding, deviation, 0.0).to(features.dtype)


def _summed_over_ranks(parts: list[Tensor], group: Group) -> list[Tensor]:
    if group is None:
        return parts
    together = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(together, group=group)
    split = together.split([part.numel() for part in parts])
    return [summed.view_as(part) for summed, part in zip(split, parts, strict=True)]
