"""How much of the reference to subtract: the coefficient of a control variate, estimated during training."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from drrho.ranks import Group


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
        self._covariance = self._variance = math.nan

    @property
    def value(self) -> float:
        """The current c; 0 before the first batch, and where the reference's losses do not vary among negatives."""
        if not self._variance > 0:
            return 0.0
        return min(1.0, max(0.0, self._covariance / self._variance))

    def update(self, image: Tensor, text: Tensor, *, reference: tuple[Tensor, Tensor], group: Group = None) -> float:
        """Update the moving averages with a batch and return c, to be passed as ``coefficient``.

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
            covariance, variance = (
                sum(within_anchors(*models, group)) / 2 for models in ((own, theirs), (theirs, theirs))
            )
        if not (math.isfinite(covariance) and math.isfinite(variance)):
            raise ValueError(
                f"image, text and reference must be finite, but covariance and variance are {covariance}, {variance}"
            )
        weight = 1.0 if math.isnan(self._variance) else self._rate
        if weight == 1.0:
            self._covariance, self._variance = covariance, variance
        else:
            self._covariance += weight * (covariance - self._covariance)
            self._variance += weight * (variance - self._variance)
        return self.value

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moving averages, NaN before the first batch."""
        return {"moments": torch.tensor([self._covariance, self._variance], dtype=torch.float64)}

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
        self._covariance, self._variance = (float(number) for number in moments)


def within_anchors(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], group: Group = None) -> tuple[float, float]:
    """Return the covariance of two models' similarities over an image's negative texts and a text's negative images.

    Each is the mean over all anchors of its side. The covariance of a model with itself is its variance.

    When the features of the other side are centered, ``sum_j s_ij = 0``. Row i without its positive, over m - 1
    negatives, then contributes ``sum_{j != i} s_ij r_ij - (s_ii r_ii) / (m - 1)``, and the sum over i and all j is
    ``<A_image' B_image, A_text' B_text>``.
    """
    count = torch.tensor(float(len(a[0])), dtype=a[0].dtype, device=a[0].device)
    sums = [side.sum(0) for model in (a, b) for side in model]
    grams = [x.T @ y for x, y in zip(a, b, strict=True)]
    if group is not None:
        together = torch.cat([count[None], *sums, *(gram.flatten() for gram in grams)])
        dist.all_reduce(together, group=group)
        count, *parts = together.split([1, *map(len, sums), *(gram.numel() for gram in grams)])
        sums, grams = parts[:4], [part.view_as(gram) for part, gram in zip(parts[4:], grams, strict=True)]
    means = [total / count for total in sums]
    centered = [gram - count * torch.outer(means[side], means[2 + side]) for side, gram in enumerate(grams)]
    total, own = a[0].new_zeros(2), a[0].new_zeros(2)
    for side in (0, 1):
        other = 1 - side
        total[side] = (grams[side] * centered[other]).sum()
        first = (a[side] * (a[other] - means[other])).sum(1)
        second = (b[side] * (b[other] - means[2 + other])).sum(1)
        own[side] = (first * second).sum()
    if group is not None:
        dist.all_reduce(own, group=group)
    negatives = float(count) - 1
    if negatives < 1:
        raise ValueError(f"image and text must hold at least 2 pairs over all ranks, got {int(count)}")
    image, text = ((total - own * (count / negatives)) / (count * negatives)).tolist()
    return image, text
