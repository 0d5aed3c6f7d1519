"""Running estimates of every anchor's normalizer, kept in log domain, and the schedule of their rate.

For anchor i, ``u_i`` estimates ``mean_j exp(l_ij / tau)`` over all negatives of the data set from the batches in
which i appeared (SogCLR, Yuan et al. 2022; FastCLIP, Wei et al. 2024):
``u_i <- (1 - gamma) u_i + gamma g_i`` with the batch mean ``g_i``, and ``u_i = g_i`` at the first visit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class RunningEstimates:
    """``log u`` for n samples and the two directions (image to text, text to image).

    A sample that was never visited holds ``-inf``, which no finite loss can produce: ``u = exp(-inf) = 0``.

    Parameters
    ----------
    samples : int
        Number of samples n; indices run from 0 to n - 1. Memory is ``8 n`` bytes.
    device : torch.device or str
        Where the estimates live.
    """

    def __init__(self, samples: int, device: torch.device | str = "cpu") -> None:
        if samples < 1:
            raise ValueError(f"samples must be >= 1, got {samples}")
        self._log_u = torch.full((2, samples), -torch.inf, dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return self._log_u.shape[1]

    @property
    def visited(self) -> int:
        """Number of samples seen at least once."""
        return int(torch.isfinite(self._log_u[0]).sum())

    def lookup(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``log u`` of the samples ``index`` ``[b]``, both directions."""
        image, text = self._log_u[:, self._checked(index)]
        return image, text

    def update(self, index: Tensor, log_u: tuple[Tensor, Tensor]) -> None:
        """Store ``log u`` ``[b]`` of both directions for the samples ``index`` ``[b]``.

        Raises
        ------
        ValueError
            If an index is out of range or occurs twice (which of its two values would count is undefined), or an
            estimate is not finite.
        """
        index = self._checked(index)
        if index.unique().numel() != index.numel():
            values, counts = index.unique(return_counts=True)
            raise ValueError(f"index must not repeat a sample, got {int(values[counts > 1][0])} more than once")
        fresh = torch.stack(log_u).to(self._log_u)
        if not bool(torch.isfinite(fresh).all()):
            column = int((~torch.isfinite(fresh)).any(0).nonzero()[0])
            raise ValueError(
                f"log_u must be finite after a step, got {fresh[:, column].tolist()} for sample {index[column]}"
            )
        self._log_u[:, index] = fresh

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as a mapping of tensors."""
        return {"log_u": self._log_u.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state for the same number of samples."""
        log_u = state["log_u"]
        if log_u.shape != self._log_u.shape:
            raise ValueError(
                f"state must hold running estimates for {len(self)} samples, got shape {list(log_u.shape)}: "
                "it belongs to other data"
            )
        self._log_u.copy_(log_u)

    def _checked(self, index: Tensor) -> Tensor:
        index = index.to(self._log_u.device)
        if index.numel() and not bool(((index >= 0) & (index < len(self))).all()):
            wrong = index[(index < 0) | (index >= len(self))][0]
            raise ValueError(f"index must lie in [0, {len(self)}), got {int(wrong)}")
        return index


def moving_average(log_u: Tensor, log_g: Tensor, log_rate: Tensor | float, log_keep: Tensor | float) -> Tensor:
    """Return ``log((1 - rate) u + rate g)`` of logarithms, ``log_g`` where u was never visited (``-inf``).

    Rate and remainder come as logarithms, since either may be too close to one to say so in the other's place.
    """
    return torch.where(log_u == -torch.inf, log_g, torch.logaddexp(log_keep + log_u, log_rate + log_g))


def cosine_gamma(epoch: int, epochs: int, final: float) -> float:
    """Return the rate of an epoch: cosine decay from 1 in the first epoch to ``final`` in the last, constant within."""
    if not 0 < final <= 1:
        raise ValueError(f"final gamma must lie in (0, 1], got {final}")
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch must lie in [0, {epochs}), got {epoch}")
    progress = epoch / max(1, epochs - 1)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def published_final_gamma(epochs: int) -> float:
    """Return the published final rate for a training of that many epochs, ``min(1, 4.177 epochs^-0.7265)``.

    Source: the DRRho-CLIP release (Wei et al., ICML 2025).
    """
    if epochs < 1:
        raise ValueError(f"epochs must be >= 1, got {epochs}")
    return min(1.0, 4.177 * epochs**-0.7265)
