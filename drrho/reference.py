"""Excess losses: the losses of a target model minus those of a frozen reference model."""

from __future__ import annotations

from torch import Tensor

from drrho.validation import ArrayLike, as_losses

__all__ = ["excess_losses"]


def excess_losses(losses: ArrayLike, reference_losses: ArrayLike, coefficient: float = 1.0) -> Tensor:
    """Return ``losses - coefficient * reference_losses``, the RHO losses of Wei et al. (ICML 2025).

    Parameters
    ----------
    losses : tensor, array or sequence, ``[..., n]``
        Losses of the target model; derivatives flow through these.
    reference_losses : the same shape
        Losses of the reference model on the same samples, in the same order; detached, since the reference is frozen.
    coefficient : float
        Coefficient of the control variate; 1 is the paper's excess loss, 0 ignores the reference.

    Raises
    ------
    ValueError
        If the shapes differ (nothing is broadcast, so that a transposed reference is noticed), a loss is NaN or
        infinite, or the coefficient is not finite.
    TypeError
        For integer tensors.

    Examples
    --------
    >>> from drrho import excess_losses
    >>> excess_losses([2.0, 2.0, 2.0], [0.5, 1.0, 4.0]).tolist()  # the third sample is hard for the reference, too
    [1.5, 1.0, -2.0]
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
