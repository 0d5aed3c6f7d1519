"""From losses of any size to a certified solution: the ends of the parameter range, normalization, certificate."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from drrho.divergences import Divergence
from drrho.solvers import native
from drrho.solvers.algorithms import algorithm_of
from drrho.solvers.certificate import Bound, certified
from drrho.solvers.device import dispatch
from drrho.solvers.dual import Found
from drrho.solvers.ends import Maximizer, ends_of_ball, ends_of_penalty, least_divergent_maximizer, with_ends
from drrho.solvers.generic import generic_ball, generic_penalty
from drrho.solvers.problem import (
    REFUSED,
    REFUSED_ALPHA,
    REFUSED_RANGE,
    Problem,
    Solution,
    by_rows,
    extremes_of,
    sample_count,
)
from drrho.solvers.rows import Rows, some
from drrho.validation import refuse

_CHUNK = 2**18  # losses of several rows solved at a time on the CPU, so that they stay in the cache


def solve(
    z: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
    problem: Problem,
) -> Solution:
    """Maximize ``<p, z> - strength * D(p || base)`` subject to ``D(p || base) <= radius``, either of them optional.

    ``z`` ``[rows, n]``, parameters ``[rows]``, or ``[n]`` and scalars; ``base`` ``[rows or 1, n]``; ``alpha`` replaces
    the divergence's where that is a tensor.

    Raises
    ------
    ValueError
        For a loss that is not finite, a range that overflows, or a parameter that is negative or not finite.
    """
    if z.shape[0] == 0:
        none = z.new_zeros(0)
        return Solution(none, torch.zeros_like(z), *(none.clone() for _ in range(7)))
    algorithm = algorithm_of(problem.divergence)
    if algorithm.kernel is not None:
        given = (z, radius, strength, alpha, base, problem, algorithm.kernel, solve_by_operations)
        if native.takes(z, problem):
            return native.solve_natively(*given)
        if dispatch.takes(z, problem, algorithm.kernel):
            return dispatch.solve_on_device(*given)
    return solve_by_operations(z, radius, strength, alpha, base, problem)


def solve_by_operations(
    z: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
    problem: Problem,
) -> Solution:
    """Solve the same without kernels."""
    algorithm = algorithm_of(problem.divergence)
    if z.ndim == 1:
        return by_rows(solve_by_operations, z, radius, strength, alpha, base, problem)
    if alpha is not None:
        refuse(~((alpha > 0) & (alpha <= 1)), alpha, REFUSED_ALPHA)
    if base is not None:
        refuse(~(base >= 0), base, "base_weights must be >= 0 with rows that sum to 1, got {}")
    closed = algorithm.closed_penalty if radius is None else algorithm.closed_ball
    if closed is not None:
        for parameter, name in ((radius, "radius"), (strength, "strength")):
            if parameter is not None:
                refuse(~((parameter >= 0) & (parameter < torch.inf)), parameter, REFUSED[name])
        return closed(z, strength, alpha, base, problem)
    return _in_chunks(z, _on_host(radius, "radius"), _on_host(strength, "strength"), alpha, base, problem)


def _in_chunks(
    z: Tensor,
    radius: np.ndarray | None,
    strength: np.ndarray | None,
    alpha: Tensor | None,
    base: Tensor | None,
    problem: Problem,
) -> Solution:
    """Solve a few rows at a time; a row with an alpha of its own has a divergence of its own."""
    if alpha is None and (len(z) == 1 or z.numel() <= _CHUNK or z.device.type != "cpu"):
        return _iterated(z, radius, strength, base, problem)
    step = 1 if alpha is not None else max(1, _CHUNK // z.shape[-1])
    solution = None
    for first in range(0, len(z), step):
        chosen, here = slice(first, first + step), problem
        if alpha is not None:
            here = problem._replace(divergence=problem.divergence.with_tail_fraction(float(alpha[first])))
        part = _iterated(
            z[chosen],
            None if radius is None else radius[chosen],
            None if strength is None else strength[chosen],
            base if base is None or len(base) == 1 else base[chosen],
            here,
        )
        if solution is None:
            solution = Solution(*(field.new_empty(len(z), *field.shape[1:]) for field in part))
        for field, solved in zip(solution, part, strict=True):
            field[chosen] = solved
    assert solution is not None
    return solution


def _on_host(parameter: Tensor | None, name: str) -> np.ndarray | None:
    if parameter is None:
        return None
    values = parameter.cpu().numpy()
    allowed = (values >= 0) & (values < np.inf)
    if some(~allowed):
        raise ValueError(REFUSED[name].format(values[~allowed][0]))
    return values


def _iterated(
    z: Tensor, radius: np.ndarray | None, strength: np.ndarray | None, base: Tensor | None, problem: Problem
) -> Solution:
    top, low = extremes_of(z, base, problem.group).cpu().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        span = top - low
    if some(~np.isfinite(span)):
        raise ValueError(REFUSED_RANGE.format(span[~np.isfinite(span)][0]))
    constant = span == 0
    scale = np.where(constant, 1.0, span) if some(constant) else span
    rows = Rows(z, base, problem.group, sample_count(z, problem.group), top, scale)
    if radius is None or strength is None:
        return _one_bound(rows, span, radius, strength, problem.divergence)
    priced = _one_bound(rows, span, None, strength, problem.divergence)
    outside = priced.distance.cpu().numpy() > radius
    if not outside.any():
        return priced
    bound = _one_bound(rows.select(outside), span[outside], radius[outside], None, problem.divergence)
    price = torch.from_numpy(strength[outside]).to(z.device) * bound.distance
    bound = bound._replace(value=bound.value - price, premium=bound.premium - price)
    if outside.all():
        return bound
    chosen = torch.from_numpy(outside).to(z.device)
    for field, solved in zip(priced, bound, strict=True):
        field[chosen] = solved
    return priced


def _refuse_unpriced(divergence: Divergence, unpriced: np.ndarray, maximizer: Maximizer) -> None:
    """Refuse the maximum as the risk without a price of D, where phi is infinite at its ratio: D forbids it still."""
    if divergence.cressie_read_order is not None or divergence.tail_fraction is not None or not unpriced.any():
        return
    tilt = maximizer.above[unpriced]
    infinite = ~np.isfinite(divergence.phi_of_tilt(torch.from_numpy(tilt)).numpy())
    if infinite.any():
        raise ValueError(
            f"strength must be > 0 for {divergence}, got 0: its phi is infinite at {1 + tilt[infinite][0]:.6g}, the "
            "ratio of weights on the maximal losses alone"
        )


def _one_bound(
    rows: Rows, span: np.ndarray, radius: np.ndarray | None, strength: np.ndarray | None, divergence: Divergence
) -> Solution:
    """Solve a ball or a penalty: rows at an end of the parameter's range at once, the others by the algorithm."""
    algorithm, maximizer = algorithm_of(divergence), least_divergent_maximizer(rows, divergence)
    if radius is not None:
        bound, solver = Bound(divergence, radius), algorithm.ball
        ends = ends_of_ball(span, radius, maximizer)
    else:
        assert strength is not None and rows.scale is not None
        with np.errstate(over="ignore"):
            bound, solver = Bound(divergence, strength / rows.scale, strength), algorithm.penalty
        ends = ends_of_penalty(span, bound.parameter, maximizer)
        _refuse_unpriced(divergence, (bound.parameter == 0) & (span > 0), maximizer)
    chosen = ends.open
    found = None
    if some(chosen):
        part, parameter = rows.select(chosen), bound.parameter[chosen]
        found = solver(divergence, part, parameter)
        generic = generic_ball if radius is not None else generic_penalty
        if found.better is None and solver is not generic and not divergence.has_kinks:
            # As where the maximum has hardly any base weight, so that a mean has no digits for the others' ratios
            found = found._replace(better=lambda: generic(divergence, part, parameter))

    def certified_solution(found: Found | None) -> Solution | None:
        everywhere, reached = found, ends
        if everywhere is None or some(~chosen) or some(everywhere.dual.saturated):
            everywhere, reached = with_ends(rows, ends, found, maximizer)
        return certified(rows, span, bound, everywhere, reached, maximizer, refuse=True)

    while True:
        solution = certified_solution(found)
        if solution is not None:
            return solution
        assert found is not None and found.better is not None
        found = found.better()
