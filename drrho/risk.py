"""Distributionally robust risks over the last dimension, with weights, multipliers and a certificate.

Conventions, everywhere: ``D(p || 1/n) = (1/n) sum_i phi(n p_i)``; chi-square ``phi(t) = (t - 1)^2 / 2``; KL
``phi(t) = t log t - t + 1``; CVaR's ``alpha`` is the tail fraction; ``radius`` bounds D itself; ``rho`` is
``n * radius`` (Duchi & Namkoong, arXiv 1610.02581; Wei et al., ICML 2025, PMLR 267).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from drrho.divergences import Divergence
from drrho.reference import excess_losses
from drrho.solvers import Dual, solve_constrained, solve_penalized
from drrho.validation import as_losses, as_parameter


class RobustRisk(NamedTuple):
    """A robust risk and what certifies it; every field but ``weights`` has the leading shape of the losses.

    Attributes
    ----------
    value : Tensor
        The risk. Differentiable twice with respect to losses and radius or strength; its gradient is ``weights``.
    weights : Tensor ``[..., n]``
        The worst-case distribution p on the simplex, differentiable once. Where several are optimal (ties at the
        maximum or at a CVaR boundary), tied losses share equally.
    premium : Tensor
        ``value - mean(losses)``, computed as ``sum_i (p_i - 1/n) losses_i`` so that it keeps its digits when tiny.
    threshold : Tensor
        The dual variable eta of the normalization ``sum p = 1``: ``n p_i = phi*'((losses_i - eta) / strength)``.
    strength : Tensor
        The dual variable lambda of the ball, or the given penalty. 0 where the hard maximum is attained and for
        CVaR, infinite where the radius is 0. Equals d value / d radius.
    gap : Tensor
        Dual value at (threshold, strength) minus primal value at ``weights``: an upper bound on the error.
    """

    value: Tensor
    weights: Tensor
    premium: Tensor
    threshold: Tensor
    strength: Tensor
    gap: Tensor


def constrained_risk(losses: Any, divergence: Divergence, radius: Any = 0.0) -> RobustRisk:
    """Maximize ``<p, losses>`` over distributions p with ``D_phi(p || 1/n) <= radius``.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[..., n]``
        The last dimension is robust, the others are batch. Losses may be negative. Tensors are solved in float64
        whatever their dtype and answered in theirs (float32 for 16-bit types); arrays and sequences give float64.
    divergence : Divergence
        ``KL()``, ``ChiSquare()``, ``CVaR(alpha)``.
    radius : float or tensor broadcasting to ``losses.shape[:-1]``
        Bound on D itself, >= 0; 0 gives the mean. CVaR ignores it.

    Raises
    ------
    ValueError, TypeError
        Naming the argument and its value: negative or non-finite radius, NaN or infinite losses, no losses,
        integer tensors.

    Notes
    -----
    Primal and dual: Ben-Tal et al. (2013); Yang, opt4ml.org, propositions 2.1 and 2.2. Derivatives are those of
    the optimality conditions (Danskin), not of an iteration.

    Examples
    --------
    >>> import torch
    >>> from drrho import ChiSquare, constrained_risk
    >>> risk = constrained_risk(torch.tensor([0.0, 1.0, 2.0, 3.0]), ChiSquare(), 0.1)
    >>> round(risk.value.item(), 4), [round(p, 4) for p in risk.weights.tolist()]
    (2.0, [0.1, 0.2, 0.3, 0.4])
    """
    rows = as_losses(losses, "losses")
    bound = as_parameter(radius, "radius", "bounds D_phi(p || 1/n)", rows)
    return _solve(rows.to(torch.float64), divergence, bound, constrained=True, dtype=_answer_dtype(rows))


def penalized_risk(losses: Any, divergence: Divergence, strength: Any) -> RobustRisk:
    """Maximize ``<p, losses> - strength * D_phi(p || 1/n)`` over distributions p.

    For ``KL()`` the value is ``strength * log mean exp(losses / strength)`` and the weights are a softmax.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[..., n]``
        As for `constrained_risk`, but float32 tensors are solved in float32 (16-bit ones too).
    divergence : Divergence
        ``KL()``, ``ChiSquare()``, ``CVaR(alpha)``.
    strength : float or tensor broadcasting to ``losses.shape[:-1]``
        Price of D, in units of loss, >= 0; 0 gives the maximum. CVaR ignores it.

    Raises
    ------
    ValueError, TypeError
        As for `constrained_risk`.
    """
    rows = as_losses(losses, "losses")
    price = as_parameter(strength, "strength", "is the price of D_phi(p || 1/n)", rows)
    dtype = _answer_dtype(rows)
    return _solve(rows.to(dtype), divergence, price.to(dtype), constrained=False, dtype=dtype)


def drrho_risk(
    losses: Any, reference_losses: Any, divergence: Divergence, *, rho: Any = None, radius: Any = None
) -> RobustRisk:
    """Maximize ``sum_i p_i (losses_i - reference_losses_i)`` subject to ``D_phi(p || 1/n) <= rho / n``.

    The DRRho risk of Wei et al. (ICML 2025): `constrained_risk` of `excess_losses`.

    Parameters
    ----------
    losses, reference_losses : tensor, array or sequence, ``[..., n]``
        Losses of target and reference on the same samples; the reference is detached.
    divergence : Divergence
        ``KL()``, ``ChiSquare()``, ``CVaR(alpha)``.
    rho, radius : float or tensor broadcasting to the leading dimensions
        Exactly one: ``rho``, the statistical radius (the ball has radius ``rho / n``), or ``radius``, the bound on
        D itself. A divergence without radius (CVaR) needs neither.

    Raises
    ------
    ValueError, TypeError
        As for `constrained_risk` and `excess_losses`, or if not exactly one of rho and radius is given.
    """
    if (rho is None) == (radius is None) and (rho is not None or divergence.has_radius):
        raise ValueError(f"give exactly one of rho (radius * n) and radius, got rho={rho} and radius={radius}")
    excess = excess_losses(losses, reference_losses)
    if rho is not None:
        radius = as_parameter(rho, "rho", "is n times the bound on D_phi(p || 1/n)", excess) / excess.shape[-1]
    return constrained_risk(excess, divergence, 0.0 if radius is None else radius)


def _answer_dtype(losses: Tensor) -> torch.dtype:
    return torch.promote_types(losses.dtype, torch.float32)


def _solve(
    losses: Tensor, divergence: Divergence, parameter: Tensor, *, constrained: bool, dtype: torch.dtype
) -> RobustRisk:
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence must be a Divergence such as KL() or ChiSquare(), got {divergence!r}")
    shape, n = losses.shape[:-1], losses.shape[-1]
    z, given = losses.reshape(-1, n), parameter.reshape(-1)
    with torch.no_grad():
        answer = _solve_rows(z.detach(), divergence, given.detach(), constrained)
    weights, slope = _Optimum.apply(
        z, given, answer.weights, answer.slope, answer.reaction, answer.exponent, constrained
    )
    value, premium = _Value.apply(z, given, weights, slope, answer.value, answer.premium)
    strength = slope if constrained else given

    def shaped(row_values: Tensor) -> Tensor:
        return row_values.reshape(shape).to(dtype)

    return RobustRisk(
        value=shaped(value),
        weights=weights.reshape(losses.shape).to(dtype),
        premium=shaped(premium),
        threshold=shaped(answer.threshold),
        strength=shaped(strength),
        gap=shaped(answer.gap),
    )


class _Answer(NamedTuple):
    """Solved rows in the units of the losses, and what their second derivatives need."""

    value: Tensor
    weights: Tensor
    premium: Tensor
    threshold: Tensor
    slope: Tensor  # d value / d parameter: lambda for a radius, -D for a strength
    gap: Tensor
    reaction: Tensor  # [rows, n]: d p_i / d losses_i with the multipliers held
    exponent: Tensor  # [rows, n]: (losses_i - eta) / lambda


def _solve_rows(z: Tensor, divergence: Divergence, parameter: Tensor, constrained: bool) -> _Answer:
    n = z.shape[-1]
    top = z.amax(-1)
    span = top - z.amin(-1)
    if not bool(torch.isfinite(span).all()):
        raise ValueError(f"losses must have a finite range, got one that overflows {z.dtype}: scale them down")
    scale = torch.where(span > 0, span, 1.0)
    d = (z - top[:, None]) / scale[:, None]
    tied = d == 0
    share = tied.sum(-1).to(z.dtype) / n
    scaled = parameter if constrained else parameter / scale
    if constrained:
        hard = scaled >= divergence.maximal_radius(share)
        flat = (scaled == 0) if divergence.has_radius else torch.zeros_like(hard)
    else:
        hard = (scaled == 0) | (divergence.maximal_radius(share) == 0)
        # 1 / scaled underflows: no weight can differ from 1/n by a rounding error
        flat = 1 / scaled < torch.finfo(z.dtype).tiny
    hard = hard | (span == 0)
    flat = flat & ~hard

    dual = _solve_open(divergence, d, scaled, ~(hard | flat), constrained)
    hard = hard | dual.saturated
    mean = d.mean(-1)
    uniform_on_ties = torch.where(tied, ((1 - share) / share)[:, None], -1.0)
    tilt = torch.where(hard[:, None], uniform_on_ties, torch.where(flat[:, None], 0.0, dual.tilt))
    threshold = torch.where(hard, 0.0, torch.where(flat, mean, dual.threshold))
    strength = torch.where(hard, 0.0, torch.where(flat, torch.inf, dual.strength))

    # Both sides of the certificate in normalized units, from the definitions of primal and dual.
    weights = (1 + tilt) / n
    distance = divergence.phi_of_tilt(tilt).mean(-1)
    gain = (tilt * (d - mean[:, None])).mean(-1)
    finite_strength = torch.where(flat, 1.0, strength)
    bound = divergence.perspective(d - threshold[:, None], finite_strength[:, None]).mean(-1) + threshold
    if constrained:
        gap = bound + finite_strength * scaled - (mean + gain)
    else:
        price = torch.where(flat | (scaled == 0), 0.0, scaled * distance)
        gain = gain - price
        gap = torch.where(scaled == 0, 0.0, bound) - (mean + gain)
    gap = torch.where(flat, 0.0, gap)

    exact_top = hard if constrained else hard & ((scaled == 0) | (span == 0) | (not divergence.has_radius))
    value = torch.where(exact_top, top, top + scale * (mean + gain))
    smooth = (~flat & (strength > 0))[:, None]
    divisor = torch.where(smooth[:, 0], finite_strength, 1.0)
    exponent = torch.where(smooth, (d - threshold[:, None]) / divisor[:, None], 0.0)
    reaction = torch.where(smooth, divergence.curvature(1 + tilt) / (n * divisor * scale)[:, None], 0.0)
    return _Answer(
        value=value,
        weights=weights,
        premium=scale * gain,
        threshold=top + scale * threshold,
        slope=scale * strength if constrained else -torch.where(flat, 0.0, distance),
        gap=scale * gap,
        reaction=reaction,
        exponent=exponent,
    )


def _solve_open(divergence: Divergence, d: Tensor, parameter: Tensor, is_open: Tensor, constrained: bool) -> Dual:
    """Solve the rows that are neither the mean nor the maximum; leave the others at a placeholder."""
    solve = solve_constrained if constrained else solve_penalized
    if bool(is_open.all()):
        return solve(divergence, d, parameter)
    dual = Dual(
        torch.zeros_like(d),
        torch.zeros_like(parameter),
        torch.zeros_like(parameter),
        torch.zeros_like(is_open),
    )
    if bool(is_open.any()):
        for field, solved in zip(dual, solve(divergence, d[is_open], parameter[is_open]), strict=True):
            field[is_open] = solved
    return dual


class _Optimum(torch.autograd.Function):
    """Weights and slope as functions of losses and parameter, differentiated through the optimality conditions.

    With ``a = (losses - eta) / lambda`` and ``h = d p / d losses`` at fixed multipliers, a change of the losses by
    dl, of eta and of lambda moves the weights by ``dp = h (dl - d eta - a d lambda)``; ``sum dp = 0`` fixes d eta,
    and either lambda is given (penalty) or ``<a, dp> = d radius`` fixes d lambda (ball).
    """

    @staticmethod
    def forward(losses, parameter, weights, slope, reaction, exponent, constrained):
        return weights.view_as(weights), slope.view_as(slope)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, reaction, exponent, constrained = inputs
        ctx.save_for_backward(reaction, exponent)
        ctx.constrained = constrained

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_weights, grad_slope = grad_outputs
        h, a = ctx.saved_tensors
        total = h.sum(-1, keepdim=True)
        safe_total = torch.where(total > 0, total, 1.0)

        def centered(v: Tensor) -> Tensor:
            return v - (h * v).sum(-1, keepdim=True) / safe_total

        a = centered(a)
        if ctx.constrained:
            v = h * centered(grad_weights)
            variance = (h * a * a).sum(-1)
            ratio = ((v * a).sum(-1) - grad_slope) / torch.where(variance > 0, variance, 1.0)
            ratio = torch.where(variance > 0, ratio, 0.0)
            return v - h * a * ratio[:, None], ratio, None, None, None, None, None
        v = h * centered(grad_weights - grad_slope[:, None] * a)
        return v, -(v * a).sum(-1), None, None, None, None, None


class _Value(torch.autograd.Function):
    """Value and premium with the envelope gradient: weights for the losses, slope for the parameter."""

    @staticmethod
    def forward(losses, parameter, weights, slope, value, premium):
        return value.view_as(value), premium.view_as(premium)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, weights, slope, *_ = inputs
        ctx.save_for_backward(weights, slope)

    @staticmethod
    def backward(ctx, *grad_outputs):
        grad_value, grad_premium = grad_outputs
        weights, slope = ctx.saved_tensors
        both = grad_value + grad_premium
        by_losses = both[:, None] * weights - grad_premium[:, None] / weights.shape[-1]
        by_parameter = torch.where(both == 0, 0.0, both * slope)
        return by_losses, by_parameter, None, None, None, None
