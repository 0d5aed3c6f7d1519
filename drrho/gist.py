"""InfoNCE without the negatives that a guide finds closer than the pair itself (GISTEmbed: Solatorio, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drrho.contrastive import check_pairs, checked_reference, temperature_of
from drrho.ranks import Group, first_row, gathered_together, gathered_with_gradient
from drrho.validation import Checks

__all__ = ["guided_info_nce"]


class Guided(NamedTuple):
    """A rank's parts of the loss and of the number of negatives that are left out: over ranks they add up to both."""

    part: Tensor
    left_out: Tensor


def guided_info_nce(
    own: tuple[Tensor, Tensor],  # [b, d], [b, d]
    reference: tuple[Tensor, Tensor],  # [b, e], [b, e]
    temperature: Tensor | float,
    *,
    counts: Sequence[int] | None = None,
    group: Group = None,
) -> Guided:
    """Return ``-log exp(s_ii / tau) / sum_{j: r_ij <= r_ii} exp(s_ij / tau)``, the mean over anchors and directions.

    A negative j takes part for anchor i if the guide finds it at most as similar as the anchor's own positive. That is
    the steered risk of KL's divergence whose coefficient of ``max(0, r_ij - r_ii)`` is infinite. Memory is that of this
    rank's anchors times all pairs.

    Parameters
    ----------
    own, reference : (Tensor, Tensor)
        Unit features ``[b, d]`` and ``[b, e]`` of images and texts, of the target and of the guide. They are compared
        in float32 or wider, also under autocast.
    temperature : float or Tensor
        tau, positive, in units of similarity.
    counts : sequence of int, optional
        The rows of each rank of ``group``; needed with one.

    Raises
    ------
    ValueError
        If target and guide have features of other numbers of pairs, features are not finite, the temperature is not
        positive, or a group comes without counts.

    Notes
    -----
    Source: arXiv:2402.16829, equations 2 to 5, of which the similarities between anchor and candidate; those between
    two anchors, or two candidates, are left out, as CLIP's loss has none.

    Examples
    --------
    >>> import torch
    >>> from drrho.gist import guided_info_nce
    >>> image = text = torch.eye(4)
    >>> guide = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> found = guided_info_nce((image, text), (guide, guide), 0.1)
    >>> int(found.left_out)  # of 24: no negative is closer than the pair itself
    0
    """
    rows = {len(part) for part in (*own, *reference)}
    if len(rows) > 1:
        raise ValueError(f"own and reference must hold the same pairs, got {', '.join(map(str, sorted(rows)))} rows")
    if counts is None:
        if group is not None:
            raise ValueError("counts must say how many rows each rank of group has, got None")
        counts = [len(own[0])]
    checks = Checks()
    check_pairs(*own, "own[0]", "own[1]", checks, alone=group is None)
    reference = checked_reference(reference, len(own[0]), checks, alone=group is None)
    tau = temperature_of(temperature, own[0], checks)
    if tau.ndim:
        raise ValueError(f"temperature must be a single number, got {list(tau.shape)}")
    (tau,) = checks.close(tau)
    with torch.autocast(own[0].device.type, enabled=False):
        own, reference = _widened(own), _widened(reference)
        guides = gathered_together(reference, counts, group)
        parts = []
        for anchor, other in ((0, 1), (1, 0)):
            logits = own[anchor] @ gathered_with_gradient(own[other], counts, group).T / tau
            parts.append(_one_way(logits, reference[anchor] @ guides[other].T, first_row(counts, group)))
        loss, left_out = (torch.stack(each).sum() for each in zip(*parts, strict=True))
        return Guided(loss / (2 * sum(counts)), left_out)


def _widened(features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    image, text = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in features)
    return image, text


def _one_way(logits: Tensor, similar: Tensor, first: int) -> tuple[Tensor, Tensor]:  # [b, n], [b, n]
    """Return the sum over anchors, of which number i has its positive in column ``first + i``."""
    own = first + torch.arange(len(logits), device=logits.device)
    closer = similar > similar.gather(1, own[:, None])
    return F.cross_entropy(logits.masked_fill(closer, -torch.inf), own, reduction="sum"), closer.sum(
        dtype=torch.float64
    )
