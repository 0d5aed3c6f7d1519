"""Excess losses: what a target loses beyond a frozen reference model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drrho.validation import as_losses


def excess_losses(losses: Any, reference_losses: Any, coefficient: float = 1.0) -> Tensor:
    """Return ``losses - coefficient * reference_losses``, the RHO losses of Wei et al. (ICML 2025).

    Parameters
    ----------
    losses : tensor, array or sequence, ``[..., n]``
        Losses of the target model; derivatives flow through these.
    reference_losses : the same shape
        Losses of the reference model on the same samples, in the same order. The reference is frozen: they
        are detached.
    coefficient : float
        Control-variate coefficient; 1 is the paper's excess loss, 0 ignores the reference.

    Raises
    ------
    ValueError
        If the shapes differ (nothing is broadcast: a shifted or transposed reference must not pass), a loss is
        NaN or infinite, or the coefficient is not finite.
    TypeError
        For integer tensors.
    """
    target = as_losses(losses, "losses")
    reference = as_losses(reference_losses, "reference_losses").detach()
    if target.shape != reference.shape:
        raise ValueError(
            f"reference_losses must have the shape of losses, {list(target.shape)}, got {list(reference.shape)}"
        )
    if not abs(coefficient) < float("inf"):
        raise ValueError(f"coefficient must be finite, got {coefficient}")
    return target - coefficient * reference
