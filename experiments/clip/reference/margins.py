"""The spread of a model's margins, relative to which the temperature of a steered run is chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Largest number of pairs over which the spread is computed.
SPREAD_PAIRS = 1024


def margin_spread(image: Tensor, text: Tensor) -> float:
    """Return the standard deviation of a model's margins ``r_ij - r_ii``, j != i, over pairs of features ``[b, d]``.

    The temperature of a steered run is chosen relative to it: early in training the excess pair loss is the
    reference's margin, and weights ``exp(-margin / temperature)`` at a much smaller temperature concentrate on the
    reference's easiest negatives.
    """
    return spread_of_margins([(image, text)], worst=False)


def spread_of_margins(models: Sequence[tuple[Tensor, Tensor]], *, worst: bool) -> float:
    """Return the same of several models' margins: of their mean, or of the smallest for each pair."""
    margins = []
    for image, text in models:
        similarity = image.float() @ text.float().T
        margins.append(similarity - similarity.diagonal()[:, None])
    joint = torch.stack(margins)
    found = joint.amin(0) if worst else joint.mean(0)
    return found[~torch.eye(len(found), dtype=torch.bool, device=found.device)].std().item()
