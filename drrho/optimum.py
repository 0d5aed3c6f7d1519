"""The solution of a robust risk as a differentiable function, through its optimality conditions.

With ``a = (z - eta) / lambda`` and ``h = q phi*''(a) / lambda``, changes dz of the losses, d eta of the threshold and
d lambda of the strength change the weights by ``dp = h (dz - d eta - a d lambda)``. ``sum dp = 0`` determines d eta.
Either lambda is given, or the ball determines it by ``<a, dp> = d radius``, since ``phi'(p / q) = a`` on the support.
The gradient of the value is given by the envelope theorem: weights, multiplier and minus D (Danskin). Every formula
consists of outputs that are differentiable themselves; this gives derivatives of any order, forward, reverse and mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from drrho.divergences import Divergence
from drrho.solvers import native
from drrho.solvers.algorithms import algorithm_of
from drrho.solvers.device import dispatch
from drrho.solvers.problem import Problem, Solution, by_rows
from drrho.solvers.solution import solve
from drrho.validation import transforms_active

_Optional = TypeVar("_Optional", Tensor, Tensor | None)
_KEPT = 6  # fields of the solution that are saved for its derivatives, of which the weights are the first


def optimum(
    losses: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
    problem: Problem,
) -> Solution:
    """Return `solve` of the tensors, as a differentiable function of all but ``base``.

    Losses ``[rows, n]`` with parameters ``[rows]``, or ``[n]`` with scalars, whose fields are then those of one row;
    ``base`` is ``[rows or 1, n]``.
    """
    inputs = (losses, radius, strength, alpha, base)
    if torch.compiler.is_compiling():
        return by_rows(Optimum.apply, *inputs, problem)
    if transforms_active() or forward_ad._current_level >= 0:
        _refuse_forward_over_forward()
        return by_rows(TransformableOptimum.apply, *inputs, problem)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        function = Optimum if dtype_read(losses, problem) == torch.float64 else NarrowOptimum
        return _solution(function.apply(*inputs, problem))
    return solve(_plain(losses), _plain(radius), _plain(strength), _plain(alpha), base, problem)


def _plain(tensor: _Optional) -> _Optional:
    """Return a tensor without its graph: itself if it has none."""
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def dtype_read(losses: Tensor, problem: Problem) -> torch.dtype:
    """Return the dtype in which losses are solved: a narrow one where kernels read that and compute in float64."""
    if losses.dtype == torch.float64 or transforms_active() or forward_ad._current_level >= 0:
        return torch.float64
    kernel = algorithm_of(problem.divergence).kernel
    if kernel is None:
        return torch.float64
    if native.takes(losses, problem):
        return torch.float32
    return losses.dtype if dispatch.takes(losses, problem, kernel) else torch.float64


def _refuse_forward_over_forward() -> None:
    levels = [str(level.key()) for level in retrieve_all_functorch_interpreters()]
    if sum(level.endswith("Jvp") for level in levels) > 1:
        raise RuntimeError(
            "forward mode over forward mode is not available for robust risks: torch gives zeros for it through any "
            "torch.autograd.Function. Use jacfwd(jacrev(f)), which is torch.func.hessian, or jacrev(jacfwd(f))"
        )


def _solution(fields: Sequence[Tensor] | None) -> Solution:
    assert fields is not None
    return Solution(*fields)


def _jumps(problem: Problem) -> bool:
    """Whether weights and multipliers jump with the radius, so that the formulas below do not hold for them."""
    return problem.divergence.has_kinks and problem.divergence.has_radius


class _Derivatives:
    """The common part of the functions below, which map their inputs to the fields of `Solution`."""

    @staticmethod
    def keep(ctx, inputs, output) -> tuple[Tensor, ...]:
        """Save what the formulas need, and return it; only losses, base and weights are of size n."""
        *tensors, problem = inputs
        solution = Solution(*output)
        ctx.mark_non_differentiable(solution.gap, solution.on_ball)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.one_row = problem, tensors[0].ndim == 1
        ctx.given = [tensor is not None for tensor in tensors]
        kept = (
            *(tensor for tensor in tensors if tensor is not None),
            solution.weights,
            solution.threshold,
            solution.strength,
            solution.distance,
            solution.alpha_slope,
            solution.on_ball,
        )
        ctx.save_for_backward(*kept)
        ctx.weights = solution.weights.detach()
        # A compiler would take the version for a number that it does not know, and must unpack what is saved.
        ctx.version = None if torch.compiler.is_compiling() else ctx.weights._version
        return kept

    @staticmethod
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Pull gradients of value, weights, premium, threshold, strength and D back to losses and parameters."""
        by_value, *others = grads
        if not any(ctx.needs_input_grad[1:]) and all(grad is None for grad in others):
            by_row = by_value if by_value is None or ctx.one_row else by_value[:, None]
            # To unpack what is saved takes longer than to multiply: it is for what is derived again, or was changed
            is_read = ctx.version is not None and not torch.is_grad_enabled()
            is_plain = is_read and ctx.weights._version == ctx.version
            weights = ctx.weights if is_plain else ctx.saved_tensors[-_KEPT]
            return by_row if by_row is None else by_row * weights, None, None, None, None, None
        if ctx.one_row:
            grads = [grad if grad is None else grad.unsqueeze(0) for grad in grads]
        pulled = _Derivatives.pulled(ctx, grads)
        if ctx.one_row:
            pulled = [grad if grad is None else grad.squeeze(0) for grad in pulled]
        return *pulled, None, None

    @staticmethod
    def pulled(ctx, grads) -> list[Tensor | None]:
        """Return the gradients of losses, radius, strength and alpha for those of a solution of rows."""
        response = _Response(ctx)
        by_value, by_weights, by_premium, by_threshold, by_strength, _, by_distance, by_alpha_slope, _ = grads
        if by_alpha_slope is not None and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the risk is differentiable only once in alpha: its second derivative is not implemented"
            )
        to_losses = to_radius = to_strength = to_alpha = None
        if by_value is not None or by_premium is not None:
            both = _sum(by_value, by_premium)
            to_losses = both[:, None] * response.weights
            if by_premium is not None:
                to_losses = to_losses - by_premium[:, None] * response.uniform()
            to_radius = response.radius_slope(both)
            to_strength = torch.where(both == 0, 0.0, -both * response.distance)
            to_alpha = both * response.alpha_slope
        if any(grad is not None for grad in (by_weights, by_threshold, by_strength, by_distance)):
            beside = any(grad is not None for grad in (by_threshold, by_strength, by_distance))
            if beside and _jumps(ctx.problem) and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"of {ctx.problem.divergence} only value and weights are differentiable: detach the multipliers, "
                    "or take a smooth divergence"
                )
            losses, radius, strength = response.pull_back(by_weights, by_threshold, by_strength, by_distance)
            to_losses, to_radius = _sum(to_losses, losses), _sum(to_radius, radius)
            to_strength = _sum(to_strength, strength)
            # Not implemented, and what else is wanted may be: never a silent zero.
            if _jumps(ctx.problem):
                to_radius = torch.full_like(to_radius, torch.nan)
            to_alpha = torch.full_like(radius, torch.nan)
        pulled = (to_losses, to_radius, to_strength, to_alpha)
        return [grad if needed else None for grad, needed in zip(pulled, ctx.needs_input_grad, strict=False)]


class Optimum(_Derivatives, torch.autograd.Function):
    """`solve` with derivatives."""

    @staticmethod
    def forward(ctx, losses, radius, strength, alpha, base, problem: Problem):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve in plain tensors; one row comes without its dimension, as a view costs as much as a product."""
        inputs = (losses, radius, strength, alpha, base, problem)
        fields = solve(*inputs)
        _Derivatives.keep(ctx, inputs, fields)
        return fields


class NarrowOptimum(torch.autograd.Function):
    """`solve` of narrow losses by the kernels, with parameters in float64 and answers in float32.

    The value's first derivative in the losses are the weights. All others are those of the same losses in float64,
    which are solved again for them.
    """

    @staticmethod
    def forward(ctx, losses, radius, strength, alpha, base, problem: Problem):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve in plain tensors, as `Optimum`."""
        fields = solve(losses, radius, strength, alpha, base, problem)
        ctx.mark_non_differentiable(fields.gap, fields.on_ball)
        ctx.set_materialize_grads(False)
        ctx.problem = problem
        ctx.save_for_backward(losses, radius, strength, alpha, base, fields.weights)
        return fields

    @staticmethod
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Pull gradients back to losses and parameters."""
        *inputs, weights = ctx.saved_tensors
        by_value, *others = grads
        is_recorded = torch.is_grad_enabled()
        if not is_recorded and not any(ctx.needs_input_grad[1:]) and all(grad is None for grad in others):
            if by_value is None:
                return None, None, None, None, None, None
            by_row = by_value if weights.ndim == 1 else by_value[:, None]
            by_losses = torch.empty_like(weights, dtype=inputs[0].dtype)
            return torch.mul(by_row, weights, out=by_losses), None, None, None, None, None
        wanted = [place for place, needed in enumerate(ctx.needs_input_grad[:4]) if needed]
        with torch.enable_grad():
            if not is_recorded:
                inputs = [tensor if tensor is None else tensor.detach() for tensor in inputs]
                for place in wanted:
                    cast(Tensor, inputs[place]).requires_grad_()
            wide = [tensor if tensor is None else tensor.to(torch.float64) for tensor in inputs]
            fields = _solution(Optimum.apply(*wide, ctx.problem))
            pulled = [(field, grad.to(field)) for field, grad in zip(fields, grads, strict=True) if grad is not None]
            found = torch.autograd.grad(
                [field for field, _ in pulled],
                [cast(Tensor, wide[place]) for place in wanted],
                [grad for _, grad in pulled],
                create_graph=is_recorded,
                allow_unused=True,
            )
        answers: list[Tensor | None] = [None] * 6
        for place, grad in zip(wanted, found, strict=True):
            answers[place] = None if grad is None else grad.to(inputs[place])
        return tuple(answers)


class TransformableOptimum(_Derivatives, torch.autograd.Function):
    """`solve` with derivatives and rules for ``torch.func`` and forward mode, which make a call 50 us slower."""

    @staticmethod
    def forward(losses, radius, strength, alpha, base, problem: Problem):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve in plain tensors."""
        fields = solve(losses, radius, strength, alpha, base, problem)
        return tuple(field.clone() if field._is_view() else field for field in fields)  # forward mode takes no views

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the same for forward mode."""
        ctx.save_for_forward(*_Derivatives.keep(ctx, inputs, output))

    @staticmethod
    def vmap(info, in_dims, *inputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Turn the mapped dimension into more rows."""
        *tensors, problem = inputs
        size = info.batch_size
        stacked = [
            None if tensor is None else tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims, strict=False)
        ]
        losses, base = stacked[0], stacked[-1]
        assert losses is not None
        rows = losses.shape[1]
        if base is not None:
            stacked[-1] = base.expand(size, rows, base.shape[-1])
        flat = [None if tensor is None else tensor.reshape(-1, *tensor.shape[2:]) for tensor in stacked]
        outputs = TransformableOptimum.apply(*flat, problem)
        return tuple(field.reshape(size, rows, *field.shape[1:]) for field in outputs), (0,) * len(outputs)

    @staticmethod
    def jvp(ctx, losses, radius, strength, alpha, base, problem):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Push tangents of losses and parameters forward."""
        response = _Response(ctx)
        dp, d_threshold, d_strength, d_distance = response.push_forward(losses, radius, strength)
        d_value = torch.zeros_like(response.distance)
        d_mean = torch.zeros_like(d_value)
        if losses is not None:
            d_value = d_value + response.total((response.weights * losses).sum(-1))
            d_mean = response.total((response.uniform() * losses).sum(-1))
        if radius is not None:
            d_value = d_value + response.radius_slope(radius)
        if strength is not None:
            d_value = d_value - response.distance * strength
        if alpha is not None:
            d_value = d_value + response.alpha_slope * alpha
            dp, d_threshold, d_strength, d_distance = (
                torch.full_like(part, torch.nan) for part in (dp, d_threshold, d_strength, d_distance)
            )
        # Not implemented, and forward mode cannot know whether it is wanted: never a silent zero.
        d_alpha_slope = torch.full_like(d_value, torch.nan)
        return d_value, dp, d_value - d_mean, d_threshold, d_strength, None, d_distance, d_alpha_slope, None


class _Response:
    """The derivatives of the solution, from the tensors that `Optimum` saves."""

    def __init__(self, ctx) -> None:
        saved = list(ctx.saved_tensors)
        if ctx.one_row:  # all but the base weights
            bases = [saved.pop(-_KEPT - 1)] if ctx.given[-1] else []
            saved = [tensor.unsqueeze(0) for tensor in saved]
            saved[len(saved) - _KEPT : len(saved) - _KEPT] = bases
        given = [saved.pop(0) if present else None for present in ctx.given]
        losses, _, self.price, self.alpha, self.base = given
        assert losses is not None
        self.losses = losses
        self.weights, self.threshold, self.strength, self.distance, self.alpha_slope, self.on_ball = saved
        self.problem: Problem = ctx.problem

    def total(self, part: Tensor) -> Tensor:
        """Sum over ranks."""
        if self.problem.group is not None:
            part = part.contiguous()
            dist.all_reduce(part, group=self.problem.group)
        return part

    def uniform(self) -> Tensor:
        """Return the base weights."""
        if self.base is not None:
            return self.base.to(self.losses.dtype)
        count = self.total(torch.full_like(self.distance, self.losses.shape[-1]))
        return torch.ones_like(self.losses) / count[:, None]

    def radius_slope(self, by: Tensor) -> Tensor:
        """Return ``by * d value / d radius``, where the slope is the ball's multiplier without a given price."""
        slope = self.strength if self.price is None else self.strength - self.price
        return torch.where((by == 0) | (self.on_ball == 0), 0.0, by * slope)

    def _sensitivity(self) -> tuple[Tensor, Tensor]:
        """Return h and the centered exponent a."""
        divergence: Divergence = self.problem.divergence
        if self.alpha is not None:
            divergence = divergence.with_tail_fraction(self.alpha[:, None])
        smooth = torch.isfinite(self.strength) & (self.strength > 0)
        strength = torch.where(smooth, self.strength, 1.0)[:, None]
        a = torch.where(smooth[:, None], (self.losses - self.threshold[:, None]) / strength, 0.0)
        if self.base is not None:  # samples without base weight may lie outside the domain of phi*
            a = torch.where(self.base > 0, a, 0.0)
        h = torch.where(smooth[:, None], divergence.curvature(a) / strength, 0.0) * self.uniform()
        return h, self._centered(h, a)

    def _expectation(self, h: Tensor, v: Tensor) -> Tensor:
        mass, weighted = self.total(torch.stack([h.sum(-1), (h * v).sum(-1)]))
        return weighted / torch.where(mass > 0, mass, 1.0)

    def _centered(self, h: Tensor, v: Tensor) -> Tensor:
        return v - self._expectation(h, v)[:, None]

    def _stiffness(self, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``sum h a^2``, or 1 where it is 0, and whether the ball determines the strength."""
        variance = self.total((h * a * a).sum(-1))
        fixed = (self.on_ball > 0) & (variance > 0)
        return torch.where(fixed, variance, 1.0), fixed

    def pull_back(
        self, weights: Tensor | None, threshold: Tensor | None, strength: Tensor | None, distance: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients for losses, radius and given strength."""
        self._refuse_further_over_ranks()
        h, a = self._sensitivity()
        mass = self.total(h.sum(-1))
        mean_a = self._uncentered_mean(h)
        v = torch.zeros_like(a) if weights is None else weights
        if distance is not None:
            v = v + distance[:, None] * a
        to_losses = h * self._centered(h, v)
        # d lambda contributes through dp, through d eta = E_h[dz] - E_h[a] d lambda, and directly.
        by_strength = -self.total((to_losses * a).sum(-1))
        if threshold is not None:
            to_losses = to_losses + (threshold / torch.where(mass > 0, mass, 1.0))[:, None] * h
            by_strength = by_strength - threshold * mean_a
        if strength is not None:
            by_strength = by_strength + strength
        variance, fixed = self._stiffness(h, a)
        ratio = torch.where(fixed, by_strength / variance, 0.0)
        to_losses = to_losses + h * a * ratio[:, None]
        return to_losses, -ratio, torch.where(self.on_ball > 0, 0.0, by_strength)

    def _refuse_further_over_ranks(self) -> None:
        if self.problem.group is not None and torch.is_grad_enabled() and self.weights.requires_grad:
            raise RuntimeError(
                "third derivatives are not available with a group: sums over ranks are not recorded. For second "
                "derivatives call grad without create_graph the second time"
            )

    def push_forward(
        self, losses: Tensor | None, radius: Tensor | None, strength: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the changes of weights, threshold, strength and D."""
        h, a = self._sensitivity()
        dz = torch.zeros_like(a) if losses is None else losses
        mean_dz = self._expectation(h, dz)
        dz = dz - mean_dz[:, None]
        variance, fixed = self._stiffness(h, a)
        d_radius = torch.zeros_like(variance) if radius is None else radius
        given = torch.zeros_like(variance) if strength is None else strength
        pushed = torch.where(fixed, (self.total((h * a * dz).sum(-1)) - d_radius) / variance, 0.0)
        d_strength = torch.where(self.on_ball > 0, pushed, given)
        dp = h * (dz - a * d_strength[:, None])
        d_threshold = mean_dz - self._uncentered_mean(h) * d_strength
        return dp, d_threshold, d_strength, self.total((a * dp).sum(-1))

    def _uncentered_mean(self, h: Tensor) -> Tensor:
        """Return ``E_h[(z - eta) / lambda]``."""
        smooth = torch.isfinite(self.strength) & (self.strength > 0)
        strength = torch.where(smooth, self.strength, 1.0)
        expected = self._expectation(h, self.losses - self.threshold[:, None])
        return torch.where(smooth, expected / strength, 0.0)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor:
    if first is None or second is None:
        present = second if first is None else first
        assert present is not None
        return present
    return first + second
