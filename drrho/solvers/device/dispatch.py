"""Which rows the kernels on a GPU take, and their answers: one launch, of which the host reads one number."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from drrho.solvers.native import Portable, solve_declined
from drrho.solvers.problem import Problem, Solution
from drrho.validation import values_are_readable

_DIVERGENCES = (0, 1, 2)  # that there are kernels for, by their numbers in kernels.c
_LONGEST = 2**17  # losses of a row that one program solves


@functools.cache
def _is_there() -> bool:
    return importlib.util.find_spec("triton") is not None


def takes(z: Tensor, problem: Problem, kernel: int) -> bool:
    """Whether the kernels solve rows like these, of the divergence with that number."""
    if not z.is_cuda or problem.group is not None or torch.compiler.is_compiling():
        return False
    return solves(z, kernel) and _is_there()


def solves(z: Tensor, kernel: int) -> bool:
    """Whether there are kernels for rows of that length, and the divergence with that number."""
    return kernel in _DIVERGENCES and z.shape[-1] <= _LONGEST


def solve_on_device(
    z: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
    problem: Problem,
    kernel: int,
    portable: Portable,
) -> Solution:
    """Solve rows ``z`` ``[rows, n]``, or one ``[n]``, of any floating dtype, by that kernel.

    Narrow losses have their multipliers and certificate in float64, and weights and fields in float32. Rows that are
    refused or declined are NaN, and solved or refused by ``portable`` unless values cannot be read, as while a graph
    is captured.

    Raises
    ------
    ValueError
        For a loss that is not finite, a range that overflows, a negative base weight, or a parameter that is negative
        or not finite.
    """
    from drrho.solvers.device.rows import solve_rows

    divergence = problem.divergence
    order = divergence.cressie_read_order or 0.0
    if divergence.tail_fraction is not None and alpha is None:
        order = float(divergence.tail_fraction)
    readable = values_are_readable() and not (z.is_cuda and torch.cuda.is_current_stream_capturing())
    failed = torch.zeros(1, dtype=torch.int32, device=z.device) if readable else None
    weights, fields = solve_rows(
        z.contiguous(),
        _float64(radius) if divergence.has_radius else None,
        *map(_float64, (strength, alpha, base)),
        failed,
        kernel,
        order,
    )
    value, *others = fields.unbind()
    solution = Solution(value, weights, *others)
    if failed is not None and failed.item():
        solve_declined(solution, z, radius, strength, alpha, base, problem, portable)
    return solution


def _float64(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float64).contiguous()
