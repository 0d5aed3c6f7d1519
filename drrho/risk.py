"""Distributionally robust risks over the last dimension, with weights, multipliers and a certificate.

Conventions, everywhere: ``D(p || q) = sum_i q_i phi(p_i / q_i)`` with base weights q, ``1/n`` unless given;
chi-square ``phi(t) = (t - 1)^2 / 2``; KL ``phi(t) = t log t - t + 1``; CVaR's ``alpha`` is the tail fraction;
``radius`` bounds D itself; ``rho`` is ``n * radius`` (Duchi & Namkoong, arXiv 1610.02581; Wei et al., ICML 2025,
PMLR 267). ``drrho/README.md`` translates the conventions of other systems.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drrho.divergences import Divergence, check_divergence
from drrho.optimum import dtype_read, optimum
from drrho.ranks import Group
from drrho.reference import excess_losses
from drrho.solvers.algorithms import algorithm_of
from drrho.solvers.problem import Problem, sample_count
from drrho.validation import (
    ArrayLike,
    as_base_weights,
    as_losses,
    as_parameter,
    checks_are_deferred,
    refuse_not_finite,
)

__all__ = ["RobustRisk", "constrained_risk", "drrho_risk", "hybrid_risk", "penalized_risk"]


class RobustRisk(NamedTuple):
    """A robust risk and what certifies it; every field but ``weights`` has the leading shape of the losses.

    Attributes
    ----------
    value : Tensor
        The risk. Differentiable to any order with respect to losses and radius or strength, once with respect to
        a tensor alpha; its gradient is ``weights``.
    weights : Tensor ``[..., n]``
        The worst-case distribution p on the simplex, differentiable. Where several are optimal (ties at the
        maximum or at a CVaR boundary), tied losses share equally.
    premium : Tensor
        ``value - sum_i q_i losses_i``, computed without cancellation, so that it keeps its digits when tiny.
    threshold : Tensor
        The dual variable eta of the normalization ``sum p = 1``: ``p_i = q_i phi*'((losses_i - eta) / strength)``.
        Detached.
    strength : Tensor
        The dual variable lambda of the ball, or the given penalty; for the hybrid risk their sum. 0 where the hard
        maximum is attained and for CVaR, infinite where the radius is 0. For a ball, d value / d radius.
    gap : Tensor
        Dual value at (threshold, strength) minus primal value at ``weights``: an upper bound on the error, of the
        order of rounding. Detached.

    Examples
    --------
    >>> from drrho import ChiSquare, constrained_risk
    >>> risk = constrained_risk([0.0, 1.0, 3.0], ChiSquare(), radius=0.1)
    >>> [round(getattr(risk, name).item(), 4) for name in ("value", "premium", "threshold", "strength")]
    [1.8911, 0.5578, 1.3333, 2.7889]
    >>> abs(risk.gap.item()) < 1e-12  # what the value can be wrong by
    True
    """

    value: Tensor
    weights: Tensor
    premium: Tensor
    threshold: Tensor
    strength: Tensor
    gap: Tensor


def constrained_risk(
    losses: ArrayLike,
    divergence: Divergence,
    radius: ArrayLike = 0.0,
    *,
    base_weights: ArrayLike | None = None,
    group: Group = None,
) -> RobustRisk:
    """Maximize ``<p, losses>`` over distributions p with ``D_phi(p || q) <= radius``.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[..., n]``
        The last dimension is robust, the others are batch. Losses may be negative. Tensors are solved in float64
        whatever their dtype and answered in theirs (float32 for 16-bit types); arrays and sequences give float64.
    divergence : Divergence
        ``KL()``, ``ChiSquare()``, ``CVaR(alpha)``, ``CressieRead(order)``, ``TotalVariation()``,
        ``CappedKL(alpha)``, or a subclass of your own.
    radius : float or tensor broadcasting to ``losses.shape[:-1]``
        Bound on D itself, >= 0; 0 gives the mean. CVaR ignores it.
    base_weights : tensor, array or sequence broadcasting to ``losses``, optional
        q, nonnegative with rows that sum to one; ``1/n`` by default. A sample of weight 0 takes no part.
    group : torch.distributed.ProcessGroup, optional
        Ranks over which the last dimension is spread, each passing its own part, of any length >= 1, of the same
        rows; every rank must call. All fields are those of the whole rows but ``weights``, which are this rank's,
        as are the gradients that ``value`` gives on each rank. Each pass of an iteration costs one all-reduce of a
        few numbers per row. (``torch.distributed.group.WORLD`` means all ranks.)

    Raises
    ------
    ValueError, TypeError
        Naming the argument and its value: negative or non-finite radius, NaN or infinite losses, no losses,
        integer tensors, base weights that are no distribution.
    RuntimeError
        If an iteration does not converge, which a phi that is not strictly convex can cause.

    Notes
    -----
    Primal and dual: Ben-Tal et al. (2013); Yang, opt4ml.org, propositions 2.1 and 2.2. Derivatives are those of
    the optimality conditions (Danskin), not of an iteration; forward and reverse mode, ``torch.func`` and its
    ``vmap`` work. At ties and at the hard maximum the returned weights are a subgradient.

    Examples
    --------
    >>> import torch
    >>> from drrho import ChiSquare, constrained_risk
    >>> risk = constrained_risk(torch.tensor([0.0, 1.0, 2.0, 3.0]), ChiSquare(), 0.1)
    >>> round(risk.value.item(), 4), [round(p, 4) for p in risk.weights.tolist()]
    (2.0, [0.1, 0.2, 0.3, 0.4])
    """
    rows = as_losses(losses, "losses", finite=False)
    bound = as_parameter(radius, "radius", "bounds D_phi(p || q)", rows)
    return _risk(rows, divergence, bound, None, base_weights, group, torch.float64)


def penalized_risk(
    losses: ArrayLike,
    divergence: Divergence,
    strength: ArrayLike,
    *,
    base_weights: ArrayLike | None = None,
    group: Group = None,
) -> RobustRisk:
    """Maximize ``<p, losses> - strength * D_phi(p || q)`` over distributions p.

    For ``KL()`` the value is ``strength * log mean exp(losses / strength)`` and the weights are a softmax.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[..., n]``
        As for `constrained_risk`; for ``KL()`` and ``CVaR`` float32 tensors (16-bit ones too) are solved without a
        float64 copy and without iteration, and ``torch.compile`` takes them in one graph.
    divergence : Divergence
        As for `constrained_risk`.
    strength : float or tensor broadcasting to ``losses.shape[:-1]``
        Price of D, in units of loss, >= 0; 0 gives the maximum. CVaR ignores it.
    base_weights, group
        As for `constrained_risk`.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As for `constrained_risk`.

    Examples
    --------
    >>> from drrho import KL, penalized_risk
    >>> risk = penalized_risk([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]], KL(), strength=0.5)  # two rows of losses
    >>> [round(value, 4) for value in risk.value.tolist()]
    [2.461, 2.0]
    """
    rows = as_losses(losses, "losses", finite=False)
    price = as_parameter(strength, "strength", "is the price of D_phi(p || q)", rows)
    dtype = torch.float64 if algorithm_of(divergence).closed_penalty is None else _answer_dtype(rows)
    return _risk(rows, divergence, None, price, base_weights, group, dtype)


def hybrid_risk(
    losses: ArrayLike,
    divergence: Divergence,
    radius: ArrayLike,
    strength: ArrayLike,
    *,
    base_weights: ArrayLike | None = None,
    group: Group = None,
) -> RobustRisk:
    """Maximize ``<p, losses> - strength * D_phi(p || q)`` over distributions p with ``D_phi(p || q) <= radius``.

    The penalized risk where its weights lie in the ball, else the ball's weights with the price of ``radius``
    subtracted. Its dual is ``min_{tau >= strength} penalized_risk(tau) + (tau - strength) radius``.

    Parameters
    ----------
    losses, divergence, base_weights, group
        As for `constrained_risk`.
    radius, strength : float or tensor broadcasting to ``losses.shape[:-1]``
        Bound on D and price of D, both >= 0. The returned ``strength`` is tau, the price plus the ball's multiplier.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As for `constrained_risk`.

    Notes
    -----
    KL with both is the constrained problem of Qi et al. (2023) and of Yang, opt4ml.org, section 6.5 (whose dual
    has ``tau * radius`` and so differs by the constant ``strength * radius``).

    Examples
    --------
    >>> from drrho import KL, hybrid_risk
    >>> losses = [0.0, 1.0, 3.0]
    >>> round(hybrid_risk(losses, KL(), radius=0.1, strength=0.5).value.item(), 4)  # the ball holds the weights
    1.8491
    >>> round(hybrid_risk(losses, KL(), radius=9.0, strength=0.5).value.item(), 4)  # the penalty alone does
    2.461
    """
    rows = as_losses(losses, "losses", finite=False)
    bound = as_parameter(radius, "radius", "bounds D_phi(p || q)", rows)
    price = as_parameter(strength, "strength", "is the price of D_phi(p || q)", rows)
    return _risk(rows, divergence, bound, price, base_weights, group, torch.float64)


def drrho_risk(
    losses: ArrayLike,
    reference_losses: ArrayLike,
    divergence: Divergence,
    *,
    rho: ArrayLike | None = None,
    radius: ArrayLike | None = None,
    base_weights: ArrayLike | None = None,
    group: Group = None,
) -> RobustRisk:
    """Maximize ``sum_i p_i (losses_i - reference_losses_i)`` subject to ``D_phi(p || 1/n) <= rho / n``.

    The DRRho risk of Wei et al. (ICML 2025): `constrained_risk` of `excess_losses`.

    Parameters
    ----------
    losses, reference_losses : tensor, array or sequence, ``[..., n]``
        Losses of target and reference on the same samples; the reference is detached.
    divergence : Divergence
        As for `constrained_risk`.
    rho, radius : float or tensor broadcasting to the leading dimensions
        Exactly one: ``rho``, the statistical radius (the ball has radius ``rho / n``), or ``radius``, the bound on
        D itself. A divergence without radius (CVaR) needs neither. With a ``group``, n counts all ranks' samples.
    base_weights, group
        As for `constrained_risk`.

    Raises
    ------
    ValueError, TypeError
        As for `constrained_risk` and `excess_losses`, or if not exactly one of rho and radius is given.

    Examples
    --------
    >>> from drrho import ChiSquare, drrho_risk
    >>> losses, reference_losses = [2.0, 2.0, 2.0], [0.5, 1.0, 4.0]
    >>> risk = drrho_risk(losses, reference_losses, ChiSquare(), rho=0.3)
    >>> round(risk.value.item(), 4), [round(weight, 3) for weight in risk.weights.tolist()]
    (0.8579, [0.462, 0.414, 0.124])
    """
    check_divergence(divergence)
    if (rho is None) == (radius is None) and (rho is not None or divergence.has_radius):
        raise ValueError(f"give exactly one of rho (radius * n) and radius, got rho={rho} and radius={radius}")
    excess = excess_losses(losses, reference_losses)
    if rho is not None:
        radius = as_parameter(rho, "rho", "is n times the bound on D_phi(p || q)", excess) / sample_count(excess, group)
    return constrained_risk(
        excess, divergence, 0.0 if radius is None else radius, base_weights=base_weights, group=group
    )


#: Whether autocast is on for some device; to ask for the losses' own takes a tenth of a small call.
_any_autocast = torch._C._is_any_autocast_enabled  # pyright: ignore[reportAttributeAccessIssue]


def _answer_dtype(losses: Tensor) -> torch.dtype:
    return losses.dtype if losses.dtype == torch.float64 else torch.float32


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _merged(tensor: Tensor, leading: torch.Size) -> Tensor:
    """Return a tensor ``[*leading, ...]`` with one leading dimension, or with none if it has none."""
    return tensor if len(leading) <= 1 else tensor.reshape(-1, *tensor.shape[len(leading) :])


def _unmerged(tensor: Tensor, leading: torch.Size) -> Tensor:
    """Return a tensor that `_merged` has made as ``[*leading, ...]``."""
    return tensor if len(leading) <= 1 else tensor.reshape(*leading, *tensor.shape[1:])


def _risk(
    losses: Tensor,
    divergence: Divergence,
    radius: Tensor | None,
    strength: Tensor | None,
    base_weights: ArrayLike | None,
    group: Group,
    dtype: torch.dtype,
) -> RobustRisk:
    """Solve in ``dtype``, or where that is not needed as they are, and answer in the losses' own, at least float32."""
    check_divergence(divergence)
    shape, n = losses.shape[:-1], losses.shape[-1]
    problem, precise = Problem(divergence, group), dtype
    narrow = dtype_read(losses, problem)
    if narrow != torch.float64:
        dtype, precise = narrow, torch.float64

    def per_row(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else _cast(_merged(parameter, shape), precise)

    alpha = divergence.tail_fraction
    if isinstance(alpha, Tensor):
        alpha = as_parameter(alpha, "alpha", "is the fraction of losses in the tail", losses)
    else:
        alpha = None  # the divergence has it
    base = None
    if base_weights is not None:
        base = as_base_weights(base_weights, losses, group)
        base = base.reshape(1, n) if base.numel() == n else base.expand(losses.shape).reshape(-1, n)
    inputs = (
        _cast(_merged(losses, shape), dtype),
        per_row(radius),
        per_row(strength),
        per_row(alpha),
        base if base is None else base.to(precise),
    )
    try:
        if _any_autocast() and torch.is_autocast_enabled(losses.device.type):
            with torch.autocast(losses.device.type, enabled=False):
                solution = optimum(*inputs, problem)
        else:
            solution = optimum(*inputs, problem)
    except ValueError:
        if checks_are_deferred():  # from a solver that reads values where that waits for nothing
            return _invalid(losses, _answer_dtype(losses))
        refuse_not_finite(losses.detach(), "losses")  # says where
        raise
    value, weights, premium, threshold, strength, gap, *_ = solution
    fields = (value, weights, premium, threshold.detach(), strength, gap)
    answer = _answer_dtype(losses)
    if len(shape) > 1 or answer != value.dtype:
        fields = (_cast(_unmerged(field, shape), answer) for field in fields)
    return RobustRisk(*fields)


def _invalid(losses: Tensor, dtype: torch.dtype) -> RobustRisk:
    """Return the answer for losses that are refused where no error may be raised."""
    value = _cast(losses, dtype).sum(-1) * torch.nan
    field, weights = value.detach(), _cast(losses.detach(), dtype) * torch.nan
    return RobustRisk(value, weights, field, field, field, field)
