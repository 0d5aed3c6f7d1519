"""How much of the reference to subtract: the coefficient of a control variate, estimated during training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from drrho.ranks import Group
from drrho.validation import checks_are_deferred

__all__ = ["AdaptiveCoefficient"]

Features = tuple[Tensor, Tensor]  # of images and texts, ``[b, d]``


class AdaptiveCoefficient:
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

    def __init__(self, rate: float = 0.1) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"rate must lie in (0, 1], got {rate}")
        self._rate = rate
        #: Moving averages of covariance and variance, float64; NaN before the first batch.
        self.moments = torch.full((2,), math.nan, dtype=torch.float64)

    @property
    def value(self) -> float:
        """The current c; 0 before the first batch, and where the reference's losses do not vary among negatives."""
        return _coefficient_of(self.moments).item()

    def update(self, image: Tensor, text: Tensor, *, reference: Features, group: Group = None) -> float | Tensor:
        """Update the moving averages with a batch and return c, to be passed as ``coefficient``.

        In a block of `drrho.validation.deferred_checks` c is a tensor, NaN if the moments are not finite, and no value
        is read.

        No matrix of similarities is computed: sums of products of similarities are products of the features' Gram
        matrices.

        Parameters
        ----------
        image, text : Tensor ``[b, d]``
            Unit-norm features of the target.
        reference : (Tensor, Tensor)
            Unit-norm features ``[b, d_ref]`` of the reference.
        group : torch.distributed.ProcessGroup, optional
            Ranks over which the batch is spread; each passes its own pairs, and all get the same c.

        Raises
        ------
        ValueError
            If the batch's moments are not finite; the estimate does not change.
        """
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            dtype = torch.promote_types(torch.promote_types(image.dtype, reference[0].dtype), torch.float32)
            own = image.to(dtype), text.to(dtype)
            theirs = reference[0].to(dtype), reference[1].to(dtype)
            found = covariances_within_anchors([(own, theirs), (theirs, theirs)], group).mean(1)
            before = self.moments.to(found.device)
            finite = torch.isfinite(found).all()
            if not checks_are_deferred() and not bool(finite):
                covariance, variance = found.tolist()
                raise ValueError(
                    "image, text and reference must be finite, but covariance and variance are "
                    f"{covariance}, {variance}"
                )
            moved = torch.where(torch.isnan(before), found, before + self._rate * (found - before))
            self.moments = torch.where(finite, moved, before)
            if not checks_are_deferred():
                return self.value
            return torch.where(finite, _coefficient_of(self.moments), torch.nan)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moving averages, NaN before the first batch."""
        return {"moments": self.moments.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the moving averages that `state_dict` returned.

        Raises
        ------
        ValueError
            If it does not hold ``moments`` of two numbers, both finite or both NaN.
        """
        moments = state.get("moments")
        if moments is None or moments.shape != (2,) or int(torch.isfinite(moments).sum()) == 1 or moments.isinf().any():
            raise ValueError(f"state must hold moments, two numbers both finite or both NaN, got {moments}")
        self.moments = moments.to(self.moments)


def _coefficient_of(moments: Tensor) -> Tensor:
    """Return the c of covariance and variance, 0 where there is no variance."""
    covariance, variance = moments.unbind()
    return torch.where(variance > 0, (covariance / variance).clamp(0, 1), 0.0)


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
