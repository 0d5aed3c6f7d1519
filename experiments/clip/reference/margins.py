"""The spread of a model's margins, relative to which the temperature of a steered run is chosen."""

from __future__ import annotations

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
    similarity = image.float() @ text.float().T
    margins = similarity - similarity.diagonal()[:, None]
    return margins[~torch.eye(len(margins), dtype=torch.bool, device=margins.device)].std().item()
