"""Distillation of a reference model's similarities: the baseline to which steering by weights is compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from drrho.contrastive import check_pairs, checked_reference, temperature_of
from drrho.ranks import Group, sum_to_owners
from drrho.tiles import Pairs, SimilarityTiles, TensorPair, not_compiled
from drrho.validation import Checks

__all__ = ["distillation_loss"]


@not_compiled
def distillation_loss(
    image: Tensor,
    text: Tensor,
    temperature: float | Tensor,
    *,
    reference: TensorPair,
    reference_temperature: float | Tensor | None = None,
    group: Group = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Minimize the cross-entropy ``-mean_i sum_j q_ij log p_ij``, averaged over image and text anchors.

    ``p_i`` is the softmax of the target's similarities ``s_ij / tau`` over all pairs j of the batch, ``q_i`` that of
    the reference's. Memory is linear in the batch. To distill and steer at once, add a multiple of this loss to
    `drrho.contrastive.contrastive_risk` or `drrho.contrastive.info_nce`.

    Parameters
    ----------
    image, text : Tensor ``[b, d]``
        Unit-norm features of the target; row i of both is one pair.
    temperature : float or scalar tensor
        Temperature tau > 0 of the target, in units of similarity; it may require a gradient.
    reference : (Tensor, Tensor)
        Unit-norm features ``[b, d_ref]`` of the reference for the same pairs; detached.
    reference_temperature : float or scalar tensor, optional
        Temperature of the reference; by default that of the target, as a constant.
    group, counts : optional
        As for `drrho.contrastive.contrastive_risk`: this rank's pairs are compared with those of all ranks.

    Returns
    -------
    Tensor
        The loss in nats, differentiable once; its minimum is the mean entropy of the ``q_i``.

    Raises
    ------
    ValueError
        For mismatched shapes, fewer than two pairs, non-finite features, or a temperature that is not > 0.

    Notes
    -----
    Sources: CLIP-KD (Yang et al., 2024), contrastive relational distillation; MobileCLIP (Vasu et al., 2024).

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import normalize
    >>> from drrho.distillation import distillation_loss
    >>> features = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> image, text, ref_image, ref_text = normalize(features, dim=-1)
    >>> loss = distillation_loss(image, text, 0.1, reference=(ref_image, ref_text))
    >>> least = distillation_loss(ref_image, ref_text, 0.1, reference=(ref_image, ref_text))
    >>> round(loss.item(), 3), round(least.item(), 3)  # at least the entropy of the reference
    (3.606, 1.128)
    """
    checks = Checks()
    check_pairs(image, text, "image", "text", checks, alone=group is None)
    reference = checked_reference(reference, len(image), checks, alone=group is None)
    tau = temperature_of(temperature, image, checks)
    reference_tau = tau if reference_temperature is None else temperature_of(reference_temperature, image, checks)
    tau, reference_tau = checks.close(tau, reference_tau)
    reference_rate = 1 / reference_tau.detach()
    if tau.ndim or reference_tau.ndim:
        raise ValueError("temperature and reference_temperature must be single numbers, got one per anchor")
    with torch.autocast(image.device.type, enabled=False):
        return _CrossEntropy.apply(image, text, 1 / tau, *reference, reference_rate, group, counts)  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, rate, reference_image, reference_text, reference_rate, group, counts):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the loss; its gradients are computed in the same pass, where the weights are available."""
        target, reference = (
            SimilarityTiles(
                Pairs(*features, rates=(own_rate, own_rate), include_positive=True, group=group, counts=counts)
            )
            for *features, own_rate in ((image, text, rate), (reference_image, reference_text, reference_rate))
        )
        own = [log_sum for m in (target, reference) for log_sum in m.sums().log_sum]
        row, reference_row = own[0], own[2]
        column, reference_column = target.gathered(own[1], own[3])
        wanted = any(ctx.needs_input_grad[:3])
        to_image, to_text = torch.empty_like(target.image), torch.zeros_like(target.text)
        scores, slope = target.image.new_zeros(2).unbind()
        for (place, (x, p), _), (_, (y, q), _) in zip(target.tiles(2), reference.tiles(2), strict=True):
            x.mul_(rate)
            y.mul_(reference_rate)
            torch.sub(y, reference_row[place, None], out=q).exp_().add_(y.sub_(reference_column).exp_())
            scores += (torch.mul(q, x, out=y)).sum()
            if wanted:
                torch.sub(x, row[place, None], out=p).exp_().sub_(q)
                p.add_(torch.sub(x, column, out=q).exp_())
                slope += torch.mul(p, x, out=x).sum()
                torch.mm(p, target.text, out=to_image[place])
                to_text.addmm_(p.T, target.image[place])
        first = slice(target.first, target.first + len(image))
        totals = torch.stack([row.sum() + column[first].sum() - scores, slope])
        if group is not None:
            dist.all_reduce(totals[:1], group=group)
        scale = 1 / (2 * target.count)
        by_feature = scale * rate
        ctx.save_for_backward(
            (to_image * by_feature).to(image.dtype),
            (sum_to_owners(to_text, target.counts, group) * by_feature).to(text.dtype),
            totals[1] * scale / rate,
        )
        return totals[0] * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scale the gradients of the forward pass."""
        return *(grad * part for part in ctx.saved_tensors), *[None] * 5
