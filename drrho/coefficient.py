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
            If it does not hold as many ``moments``, finite or NaN.
        """
        moments, count = state.get("moments"), self._COUNT
        if moments is None or moments.shape != (count,) or moments.isinf().any():
            raise ValueError(f"state must hold moments, {count} numbers, finite or NaN, got {moments}")
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

    Let ``s_ij`` be a model's similarities of m held-out pairs. What the model knows of them, in nats, is how far the
    softmax of maximum likelihood predicts the true candidates better than chance, in both directions::

        K = log m + max over a of the mean over i of log softmax_j(a s_ij)_i

    With ``K`` of the target and ``K_ref`` of the reference, the lead is ``1 - K / K_ref``: 1 before the target knows
    anything, 0 where it knows as much. The coefficient is ``largest`` times that of `AdaptiveCoefficient`, times twice
    the lead, clipped to [0, 1]. It starts at 0, where an untrained target would follow nothing but the reference, rises
    as they agree, falls once the lead is less than a half, and is 0 from where both know as much: the run goes on as
    its unsteered twin, whatever its budget. A constant coefficient cannot do so: it minimizes the risk where
    ``s = c r + tau log(density ratio)``, with c times the reference's mistakes.

    The lead is measured on held-out pairs, such as those of validation, because the pairs of training are those that a
    target knows best: on icons, it soon told these apart better than a reference of other icons did, and yet that one
    named held-out icons better until the end.

    Parameters
    ----------
    rate : float
        Weight of a batch in the moving averages of covariance and variance, in (0, 1]; the first has weight 1.
    largest : float
        The coefficient of full agreement and full lead, in (0, 1].

    Raises
    ------
    ValueError
        By `update`, if no held-out pairs were observed.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> generator = torch.Generator().manual_seed(0)
    >>> truth, noise = torch.randn(2, 64, 16, generator=generator)
    >>> knowing = normalize(truth, dim=-1), normalize(truth + 0.3 * noise, dim=-1)
    >>> learning = knowing[0], normalize(truth + 2 * noise, dim=-1)
    >>> coefficient = ScheduledCoefficient()
    >>> coefficient.observe(*learning, reference=knowing)  # held-out pairs, once in a while: the reference knows more
    >>> coefficient.update(*learning, reference=knowing) > 0.1  # the batch of each step
    True
    >>> coefficient.observe(*knowing, reference=learning)  # now the target does
    >>> coefficient.value
    0.0
    """

    _COUNT, _NAMES = 4, "covariance, variance and what target and reference know"
    _has_observed = False

    def __init__(self, rate: float = 0.1, largest: float = 0.5) -> None:
        super().__init__(rate)
        if not 0 < largest <= 1:
            raise ValueError(f"largest must lie in (0, 1], got {largest}")
        self._largest = largest

    def observe(self, image: Tensor, text: Tensor, *, reference: Features, group: Group = None) -> None:
        """Measure on held-out pairs what target and reference know; over ranks it is the mean of what each finds.

        Features that are not finite change nothing; if no others were observed before, c is 0 until they are.

        Parameters
        ----------
        image, text : Tensor ``[m, d]``
            Unit-norm features of the target, of m >= 2 held-out pairs.
        reference : (Tensor, Tensor)
            Unit-norm features ``[m, d_ref]`` of the reference.
        group : torch.distributed.ProcessGroup, optional
            Ranks that all call this, with the same pairs or others.

        Raises
        ------
        ValueError
            For fewer than two pairs.
        """
        if len(image) < 2:
            raise ValueError(f"image and text must hold at least 2 pairs, which are compared, got {len(image)}")
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            found = torch.stack([_knowledge(*(side.double() for side in each)) for each in ((image, text), reference)])
            if group is not None:
                dist.all_reduce(found, group=group)
                found = found / dist.get_world_size(group)
            before = self.moments.to(found.device)
            kept = torch.nan_to_num(before[2:])  # of a reference that is not known to know anything
            self.moments = torch.cat([before[:2], torch.where(torch.isfinite(found).all(), found, kept)])
            self._has_observed = True

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned, with what was observed."""
        super().load_state_dict(state)
        self._has_observed = not bool(self.moments[2:].isnan().any())

    def _measured(self, own: Features, theirs: Features, group: Group, counts: Sequence[int] | None) -> Tensor:
        """Return covariance and variance, and what was observed."""
        if not self._has_observed:
            raise ValueError("no held-out pairs were observed, which say who knows more: call observe() before")
        moments = covariances_within_anchors([(own, theirs), (theirs, theirs)], group).mean(1)
        return torch.cat([moments, self.moments[2:].to(moments.device)])

    def _of(self, moments: Tensor) -> Tensor:
        """Return c of the moments and of what both know; 0 before either is there."""
        target, reference = moments[2:].unbind()
        lead = torch.where(reference > _LEAST_KNOWLEDGE, 1 - target / reference, 0.0)
        return self._largest * _least_variance(moments[:2]) * (2 * lead).clamp(0, 1)


def _least_variance(moments: Tensor) -> Tensor:
    """Return covariance over variance in [0, 1]; 0 where there is no variance, or no batch yet."""
    covariance, variance = moments.unbind()
    return torch.where(variance > 0, (covariance / variance).clamp(0, 1), 0.0)


_STEPS = 10
_LONGEST_STEP = 3.0  # of the weight, in units of the inverse spread of similarities
_PRIOR = 1e-3  # precision of the weight in these units, for each anchor: where pairs are told apart without error
_LEAST_KNOWLEDGE = 0.01  # in nats; a reference that knows less cannot be told from one that knows nothing


def _knowledge(image: Tensor, text: Tensor) -> Tensor:
    """Return what features ``[m, d]`` know of their pairs, in nats: 0 where they tell nothing apart."""
    similarities = image @ text.T
    both = torch.cat([similarities, similarities.T])  # [2 m, m]: anchors are images, then texts
    centered = both - both.mean(-1, keepdim=True)
    spread = centered.square().mean().sqrt()
    scores = torch.where(spread > 0, centered / spread, 0.0)
    anchors, m = scores.shape
    true = torch.arange(anchors, device=scores.device) % m
    right = scores.gather(1, true[:, None]).sum()
    weight = scores.new_zeros(())
    for _ in range(_STEPS):  # Newton's
        shares = torch.softmax(weight * scores, -1)
        means = (shares * scores).sum(-1)
        slope = right - means.sum() - _PRIOR * anchors * weight
        curvature = (shares * scores.square()).sum() - means.square().sum() + _PRIOR * anchors
        weight = weight + (slope / curvature).clamp(-_LONGEST_STEP, _LONGEST_STEP)
    likelihood = (weight * right - torch.logsumexp(weight * scores, -1).sum()) / anchors
    # A model whose similarities are turned around knows nothing that it could use.
    known = torch.where(weight > 0, (likelihood + math.log(m)).clamp(min=0), 0.0)
    return torch.where(torch.isfinite(similarities).all(), known, torch.nan)


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
