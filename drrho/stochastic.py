"""Robust risks from minibatches, for data that do not fit in memory: four estimators, to be used in a training loop.

They estimate the risk of all data, ``R = max_p <p, l>`` in a ball or with a penalty (``drrho.risk``), and its
gradient, from batches of b losses:

====================  ====================================  =======================  ================================
estimator             bias of value and gradient            cost a step, in losses   state
====================  ====================================  =======================  ================================
risk of the batch     O(1 / b), value low on average        b                        none
`dual_losses`         none in (model, dual variables)       b                        threshold, strength
`Multilevel`          that of a batch of ``2^levels b``     ``(levels + 1) b``       none; more noise
`compositional_risk`  O(gamma / b), and a lag (KL penalty)  b                        ``log u``
====================  ====================================  =======================  ================================

The risk of the batch needs no function of its own: ``constrained_risk(losses, divergence, radius).value.backward()``.
A robust risk is a minimum over dual variables of an expectation, and the expected minimum over a batch is at most the
minimum of the expectation: ``E[R_batch] <= R`` for every ball and penalty, drawn with or without replacement, with
equality for radius 0. Where the dual objective ``f`` is smooth around its only minimum, the bias is
``-trace(H^-1 S) / (2 b)`` to first order, with ``H`` the Hessian of ``E f`` and ``S`` the covariance of the gradient
of ``f`` there; for the KL penalty ``-strength Var(w) / (2 b)`` with ``w = n`` times the weights. The risk of a batch
is at most the batch's maximum, which it reaches at a large radius (KL: from ``log b`` on; ``drrho/README.md`` lists the
others).

>>> import torch
>>> from drrho import KL, penalized_risk
>>> data = torch.linspace(0.0, 1.0, 10000, dtype=torch.float64)
>>> batches = data[torch.randint(10000, (100000, 8), generator=torch.Generator().manual_seed(0))]
>>> exact = penalized_risk(data, KL(), 0.5)
>>> bias = penalized_risk(batches, KL(), 0.5).value.mean() - exact.value
>>> predicted = -0.5 * (10000 * exact.weights).var() / (2 * 8)
>>> round(bias.item(), 3), round(predicted.item(), 3)
(-0.01, -0.01)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from drrho.divergences import KL, Divergence, check_divergence
from drrho.risk import penalized_risk
from drrho.running import adaptive_log_rates, moving_average
from drrho.validation import ArrayLike, as_losses, as_parameter, refuse

__all__ = ["CompositionalStep", "Multilevel", "compositional_risk", "dual_losses"]


def dual_losses(
    losses: ArrayLike,
    divergence: Divergence,
    threshold: ArrayLike,
    strength: ArrayLike | None = None,
    radius: ArrayLike = 0.0,
) -> Tensor:
    """Return ``threshold + strength * (radius + phi*((losses - threshold) / strength))``, one number per loss.

    By duality a robust risk is the minimum of an expected loss over two more parameters (Ben-Tal et al. 2013; Namkoong
    & Duchi 2016)::

        constrained_risk   min over threshold, strength > 0 of   mean dual_losses(..., threshold, strength, radius)
        penalized_risk     min over threshold of                 mean dual_losses(..., threshold, strength)
        CVaR               min over threshold of                 mean dual_losses(..., threshold)

    The mean over a batch is an unbiased estimate of the value and of its gradient with respect to losses, threshold and
    strength, at no cost beyond the losses. Over all data it is never below the risk, and equal to it at the
    ``threshold`` and ``strength`` that the exact risk returns. It is jointly convex in losses, threshold and strength
    and nondecreasing in the losses, so that with convex losses its only stationary points are exact minimizers.

    Parameters
    ----------
    losses : tensor, array or sequence ``[..., b]``
        A batch drawn uniformly from the data. The result has their dtype, float32 for 16-bit types.
    divergence : Divergence
        Where phi* is infinite from some point on (`TotalVariation`, `CressieRead` below order 1), a loss beyond that
        point is refused; the risk of a batch and `Multilevel` have no such limit.
    threshold : float or tensor broadcasting to ``losses.shape[:-1]``
        Dual variable eta of ``sum p = 1``, in units of loss.
    strength : float or tensor broadcasting to ``losses.shape[:-1]``
        Dual variable lambda > 0 of the ball (optimize its logarithm), or the given penalty. CVaR ignores it: there
        ``lambda phi*(s / lambda)`` is ``phi*(s)``.
    radius : float or tensor broadcasting to ``losses.shape[:-1]``
        Bound on D, >= 0; 0 for a penalty. CVaR ignores it.

    Returns
    -------
    Tensor ``[..., b]``
        Differentiable in all arguments but the divergence. The derivative in the loss is its density ratio
        ``phi*'((loss - threshold) / strength)``; only at the optimal dual variables do the ratios average to one.

    Raises
    ------
    ValueError, TypeError
        For non-finite losses, a strength that is missing or not positive, a negative radius, or losses outside the
        domain of phi* (or so far above the threshold that it overflows); the message names the argument.

    Notes
    -----
    Start from the dual variables of one batch's risk, as below. Its strength is 0 where the radius reaches the batch's
    maximum and infinite at radius 0; then use a larger batch or another radius. For many problems (such as one per
    anchor) keep a tensor of dual variables and pass the entries of the batch. For chi-square one variable can be
    eliminated, ``min_eta eta + sqrt((1 + 2 radius) mean (losses - eta)_+^2)``, but the root is not an expectation, so
    estimates from batches are biased.

    Examples
    --------
    >>> import torch
    >>> from drrho import ChiSquare, constrained_risk
    >>> data = torch.linspace(-1.0, 1.0, 400, dtype=torch.float64) ** 3
    >>> model = torch.zeros((), dtype=torch.float64, requires_grad=True)
    >>> start = constrained_risk((model - data[::20]).square().detach(), ChiSquare(), 0.1)
    >>> threshold, log_strength = start.threshold.requires_grad_(), start.strength.log().requires_grad_()
    >>> optimizer = torch.optim.SGD([model, threshold, log_strength], lr=0.02)
    >>> for batch in data[torch.randint(400, (500, 20), generator=torch.Generator().manual_seed(0))]:
    ...     losses = (model - batch).square()
    ...     optimizer.zero_grad()
    ...     dual_losses(losses, ChiSquare(), threshold, log_strength.exp(), 0.1).mean().backward()
    ...     optimizer.step()
    >>> risk = constrained_risk((model - data).square(), ChiSquare(), 0.1)
    >>> (threshold - risk.threshold).abs().item() < 0.05, (log_strength.exp() - risk.strength).abs().item() < 0.05
    (True, True)
    """
    check_divergence(divergence)
    z = as_losses(losses, "losses")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    eta = _per_row(threshold, "threshold", "is the dual variable of sum p = 1", z)
    refuse(~torch.isfinite(eta), eta, "threshold must be finite, got {}")
    alpha = divergence.tail_fraction
    if isinstance(alpha, Tensor) and alpha.ndim:
        divergence = divergence.with_tail_fraction(alpha.to(z)[..., None])
    if divergence.has_radius:
        if strength is None:
            raise ValueError(f"strength must be given for {divergence}, got None: it is the multiplier or price of D")
        price = _per_row(strength, "strength", "is the multiplier or price of D_phi(p || q)", z)
        remedy = "optimize its logarithm, from a batch whose risk is neither its mean nor its maximum"
        refuse(~((price > 0) & (price < torch.inf)), price, "strength must be finite and > 0, got {}: " + remedy)
        bound = _per_row(radius, "radius", "bounds D_phi(p || q)", z)
        refuse(~((bound >= 0) & (bound < torch.inf)), bound, "radius must be finite and >= 0, got {}: it bounds D")
        values = eta + price * (bound + divergence.conjugate((z - eta) / price))
    else:
        values = eta + divergence.conjugate(z - eta)
    remedy = "raise threshold, take smaller steps in it, or use Multilevel"
    message = "losses must keep (losses - threshold) / strength where phi* is finite, got a loss of {}: " + remedy
    refuse(~torch.isfinite(values), z, message)
    return values.to(z.dtype)


@dataclass(frozen=True)
class Multilevel:
    """Multilevel Monte Carlo: an unbiased estimate of the risk of ``2^levels base_size`` losses from far fewer.

    A random level J in ``1 .. levels`` with ``P(J = j) = 2^-j`` (the last level gets the remaining probability) gives
    the size ``2^J base_size`` of the batch. With R the risk, the estimate is::

        mean R(blocks of base_size) + [R(batch) - (R(first half) + R(second half)) / 2] / P(J)

    whose expectation telescopes. Drawn without replacement with ``largest_size`` equal to the number of data, it is
    unbiased for the exact risk of the data and, being linear in risks, for its gradient.

    Parameters
    ----------
    base_size : int
        Number of losses in a batch of level 0, >= 1.
    levels : int
        Number of doublings, >= 1.

    Notes
    -----
    A step costs ``(levels + 1) base_size`` losses on average. The estimate may lie outside the range of the losses, and
    its gradient may give a loss a negative weight: it trades bias for noise. Level j adds ``E[bracket^2] / P(J = j)``
    to the second moment. This decreases with the level where the bracket is O(1 / size), as with smooth duals; in the
    worst case, where the bracket is O(size^-1/2), every level adds the same amount.

    Source: Levy, Carmon, Duchi & Sidford (2020), arXiv 2010.05893, after Blanchet & Glynn (2015). They use the first
    block for level 0; the mean over all blocks has the same expectation and less noise. For 64 normal losses,
    ``base_size`` 4, 4 levels and a KL penalty of strength 0.7 the standard deviation is 0.35, and 0.58 with the first
    block; a plain batch of the same cost, 20 losses, has 0.20 and a bias of -0.03.

    Examples
    --------
    >>> import torch
    >>> from drrho import CVaR, constrained_risk
    >>> multilevel = Multilevel(base_size=10, levels=5)
    >>> multilevel.largest_size, multilevel.expected_size
    (320, 60)
    >>> data = torch.linspace(-1.0, 1.0, 320, dtype=torch.float64) ** 3
    >>> model = torch.full((), 0.5, dtype=torch.float64, requires_grad=True)
    >>> optimizer = torch.optim.SGD([model], lr=0.01)
    >>> generator = torch.Generator().manual_seed(0)
    >>> for _ in range(500):
    ...     batch = data[torch.randperm(320, generator=generator)[: multilevel.draw_size(generator)]]
    ...     losses = (model - batch).square()
    ...     optimizer.zero_grad()
    ...     multilevel.estimate(losses, lambda z: constrained_risk(z, CVaR(0.2)).value).backward()
    ...     optimizer.step()
    >>> abs(model.item()) < 0.1  # the minimizer is 0
    True
    """

    base_size: int
    levels: int

    def __post_init__(self) -> None:
        for name in ("base_size", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    @property
    def probabilities(self) -> tuple[float, ...]:
        """``P(J = j)`` for ``j = 1 .. levels``: 1/2, 1/4, ..., the last as likely as the one before."""
        return tuple(2.0 ** -min(level, self.levels - 1) for level in range(1, self.levels + 1))

    @property
    def largest_size(self) -> int:
        """Size of the batch whose expected risk is estimated, ``2^levels base_size``."""
        return self.base_size << self.levels

    @property
    def expected_size(self) -> int:
        """Expected number of losses in a step, ``(levels + 1) base_size``."""
        return (self.levels + 1) * self.base_size

    def draw_size(self, generator: torch.Generator | None = None) -> int:
        """Draw the size of the next batch, ``2^J base_size``, with a generator on the CPU."""
        chances = torch.tensor(self.probabilities, dtype=torch.float64)
        return self.base_size << (1 + int(torch.multinomial(chances, 1, generator=generator)))

    def estimate(self, losses: ArrayLike, risk: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the estimate ``[...]`` from losses ``[..., size]`` in random order, ``size`` from `draw_size`.

        Parameters
        ----------
        losses : tensor, array or sequence ``[..., size]``
            Losses of the batch; the estimate is differentiable with respect to them.
        risk : callable
            Maps losses ``[..., m]`` to risks ``[...]`` for any m, such as ``lambda z: constrained_risk(z, divergence,
            radius).value``. Blocks are passed with a new first dimension, so that a radius per row broadcasts. In a
            radius of ``rho / n``, n is the number of all data.

        Raises
        ------
        ValueError
            If the number of losses is not one that `draw_size` can return.
        """
        batch = as_losses(losses, "losses")
        size = batch.shape[-1]
        sizes = [self.base_size << level for level in range(1, self.levels + 1)]
        if size not in sizes:
            raise ValueError(f"losses must number one of {sizes}, got {size}: draw_size returns such a number")
        correction = risk(batch) - risk(_blocks(batch, size // 2)).mean(0)
        return risk(_blocks(batch, self.base_size)).mean(0) + correction / self.probabilities[sizes.index(size)]


class CompositionalStep(NamedTuple):
    """The result of `compositional_risk` for one batch.

    Attributes
    ----------
    value : Tensor ``[...]``
        ``strength * log u`` after the step, the running estimate of the risk. Its gradient is the estimator's: the
        derivative with respect to a loss is ``exp(loss / strength - log u) / b``. These sum to ``g / u``, not to one.
    log_u : Tensor ``[...]``
        The state after the step, detached: pass it to the next one, save it as a plain tensor.

    Examples
    --------
    >>> import torch
    >>> from drrho.stochastic import compositional_risk
    >>> step = compositional_risk([1.0, 2.0], torch.tensor(-torch.inf), strength=1.0, gamma=0.9)  # the first batch
    >>> round(step.value.item(), 4), round(step.log_u.item(), 4)
    (1.6201, 1.6201)
    """

    value: Tensor
    log_u: Tensor


def compositional_risk(
    losses: ArrayLike,
    log_u: Tensor,
    strength: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    log_step: ArrayLike | None = None,
) -> CompositionalStep:
    """Estimate ``strength * log mean exp(losses / strength)`` over all data, the KL-penalized risk, from a batch.

    The mean u inside the logarithm is tracked over steps, and the gradient divides by it instead of the batch's own::

        u <- (1 - gamma) u + gamma g,   g = mean over the batch of exp(losses / strength)      (u = g in the first step)
        gradient = mean over the batch of exp(losses / strength) / u * grad losses

    all in log domain. For a fixed model the bias of the value is ``gamma / (2 - gamma)`` times that of a batch's risk,
    and the bias of the gradient about ``gamma`` times; a changing model adds a lag of order (change per step) / gamma.
    One batch of all data with ``gamma = 1`` gives `penalized_risk`.

    Parameters
    ----------
    losses : tensor, array or sequence ``[..., b]``
        A batch drawn uniformly from the data; leading dimensions are separate problems.
    log_u : Tensor ``[...]``
        State, ``-inf`` before the first step. It is valid for this strength only.
    strength : float or tensor broadcasting to ``losses.shape[:-1]``
        Price of D > 0, a constant.
    gamma : float or tensor broadcasting to ``losses.shape[:-1]``
        Constant rate in (0, 1], or the value of a schedule (`drrho.running.cosine_gamma`). 1 gives the batch's risk.
    log_step : float or tensor broadcasting to ``losses.shape[:-1]``
        Use SCENT's adaptive rate ``sigmoid(log u + log_step)`` instead of ``gamma``: the proximal step of size
        ``exp(log_step)`` on the dual ``min_v E exp(losses / strength - v) + v`` in the geometry of ``exp(-v)``. Large
        u are forgotten fast, small ones slowly.

    Raises
    ------
    ValueError, TypeError
        Unless exactly one of gamma and log_step is given, for a parameter out of range, a state of another shape or not
        finite, or a u so far below g that ``g / u`` (at most 1 / rate) overflows; the message names the argument.

    Notes
    -----
    Source: SCDRO (Qi et al. 2023); SogCLR (Yuan et al. 2022), which has one such problem per anchor, as
    `contrastive_risk`; SCENT (Wei et al. 2026), arXiv 2602.02877. The gradient uses u after the step, which bounds
    ``g / u``.

    Examples
    --------
    >>> import torch
    >>> from drrho import KL, penalized_risk
    >>> data = torch.linspace(-1.0, 1.0, 400, dtype=torch.float64) ** 3
    >>> model = torch.full((), 0.5, dtype=torch.float64, requires_grad=True)
    >>> optimizer, log_u = torch.optim.SGD([model], lr=0.02), torch.tensor(-torch.inf)
    >>> for batch in data[torch.randint(400, (500, 20), generator=torch.Generator().manual_seed(0))]:
    ...     losses = (model - batch).square()
    ...     optimizer.zero_grad()
    ...     step = compositional_risk(losses, log_u, 0.2, gamma=0.1)
    ...     step.value.backward()
    ...     optimizer.step()
    ...     log_u = step.log_u
    >>> exact = penalized_risk((model - data).square(), KL(), 0.2).value
    >>> abs(model.item()) < 0.1, (step.value - exact).abs().item() < 0.05  # the minimizer is 0
    (True, True)
    """
    z = as_losses(losses, "losses")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    tau = _per_row(strength, "strength", "is the price of D_phi(p || q)", z)[..., 0].detach()
    refuse(~((tau > 0) & (tau < torch.inf)), tau, "strength must be finite and > 0, got {}: it divides the losses")
    before = log_u.detach().to(z)
    if before.shape != tau.shape:
        raise ValueError(f"log_u must have shape {list(tau.shape)}, one per row of losses, got {list(before.shape)}")
    refuse(~(before < torch.inf), before, "log_u must be finite, or -inf before the first step, got {}")
    if gamma is not None and log_step is None:
        rate = _per_row(gamma, "gamma", "is the rate of the moving average", z)[..., 0].detach()
        refuse(~((rate > 0) & (rate <= 1)), rate, "gamma must lie in (0, 1], got {}")
        log_rate, log_keep = torch.log(rate), torch.log1p(-rate)
    elif gamma is None and log_step is not None:
        proximal = _per_row(log_step, "log_step", "is the logarithm of the proximal step", z)[..., 0].detach()
        refuse(~torch.isfinite(proximal), proximal, "log_step must be finite, got {}")
        log_rate, log_keep = adaptive_log_rates(before, proximal)
    else:
        raise ValueError(f"give exactly one of gamma and log_step, got gamma={gamma} and log_step={log_step}")
    risk = penalized_risk(z, KL(), tau).value
    log_g = risk.detach() / tau
    after = moving_average(before, log_g, log_rate, log_keep)
    scale = torch.exp(log_g - after)
    message = "log_u must not lie so far below the batch that g / u overflows, got {}: raise gamma or log_step"
    refuse(~torch.isfinite(scale), before, message)
    return CompositionalStep(tau * after + scale * (risk - risk.detach()), after)


def _blocks(batch: Tensor, size: int) -> Tensor:
    """Return losses ``[..., m]`` as blocks ``[m / size, ..., size]``."""
    return batch.unflatten(-1, (-1, size)).movedim(-2, 0)


def _per_row(value: ArrayLike, name: str, meaning: str, losses: Tensor) -> Tensor:
    """Return a number of either sign per row of losses ``[..., b]``, as ``[..., 1]`` in their dtype."""
    number = torch.tensor(value, dtype=torch.float64) if isinstance(value, (float, int)) else value
    return as_parameter(number, name, meaning, losses).to(losses)[..., None]
