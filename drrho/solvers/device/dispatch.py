"""Which rows the kernels on a GPU take, and their answers, of which the host reads one number."""

from __future__ import annotations

import functools
import importlib.util
import threading

import numpy as np
import torch
from torch import Tensor

from drrho.solvers.native import Portable, solve_declined
from drrho.solvers.problem import Problem, Solution
from drrho.validation import values_are_readable

_DIVERGENCES = (0, 1, 2, 3, 5)  # that there are kernels for, by their numbers in kernels.c
_LONG_OF = (0, 1, 2)  # the same for rows that all programs share
_LONGEST = 2**22  # losses of a row that one program solves
_LONG = 2**17  # losses of a row from which all programs share it
_TOO_LONG, _TOO_MANY = 2**31, 2**16  # losses of a long row, and long rows, that kernels cannot count
_FEW, _LONG_OF_FEW = 16, 2**15  # the same where rows are so few that programs would be idle


class _Failed(threading.local):
    """A number in the memory of the host, which kernels set where a row is not solved: one for each thread."""

    @functools.cached_property
    def _both(self) -> Tensor:  # at once, since nothing may be allocated while a graph is captured
        return torch.zeros(8, dtype=torch.int32, pin_memory=torch.cuda.is_available())

    @property
    def flag(self) -> Tensor:
        """The number, ``[1]``."""
        return self._both[:1]

    @property
    def unread(self) -> Tensor:
        """A number that nobody reads, as far in memory as kernels that are compiled already take it to be: 16 bytes."""
        return self._both[4:5]

    @functools.cached_property
    def seen(self) -> np.ndarray:
        """The same as it lies in memory."""
        return self.flag.numpy()

    def is_set(self, z: Tensor) -> bool:
        """Wait for the device of a tensor, and return whether the number was set; it is cleared."""
        if z.is_cuda:
            torch.cuda.current_stream(z.device).synchronize()
        failed = bool(self.seen[0])
        if failed:
            self.seen[0] = 0
        return failed


_failed = _Failed()


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
    return kernel in _LONG_OF or (kernel in _DIVERGENCES and z.shape[-1] <= _LONGEST)


def _is_long(z: Tensor, kernel: int, base: Tensor | None) -> bool:
    n = z.shape[-1]
    long = n >= _LONG or (n >= _LONG_OF_FEW and z.numel() <= _FEW * n)
    countable = n < _TOO_LONG and z.numel() < _TOO_MANY * n
    return long and countable and base is None and kernel in _LONG_OF


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
    from drrho.solvers.device.long import solve_long_rows
    from drrho.solvers.device.rows import solve_rows

    divergence = problem.divergence
    radius = radius if divergence.has_radius else None
    is_long = _is_long(z, kernel, base)
    if not is_long and z.shape[-1] > _LONGEST:
        return _by_operations(z, radius, strength, alpha, base, problem, portable)
    order = divergence.cressie_read_order or 0.0
    if divergence.tail_fraction is not None and alpha is None:
        order = float(divergence.tail_fraction)
    readable = values_are_readable() and not (z.is_cuda and torch.cuda.is_current_stream_capturing())
    z, failed = z.contiguous(), _failed.flag if readable else _failed.unread
    given = _float64(radius), _float64(strength), _float64(alpha), _float64(base)
    if is_long:
        weights, fields = solve_long_rows(z, *given, failed, kernel, order, thorough=not readable)
    else:
        weights, fields = solve_rows(z, *given, failed, kernel, order)
    declined = readable and _failed.is_set(z)
    if declined and is_long:
        weights, fields = solve_long_rows(z, *given, failed, kernel, order)
        declined = _failed.is_set(z)
    value, *others = fields.unbind()
    solution = Solution(value, weights, *others)
    if declined:
        solve_declined(solution, z, radius, strength, alpha, base, problem, portable)
    return solution


def _by_operations(
    z: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
    problem: Problem,
    portable: Portable,
) -> Solution:
    """Solve rows that there is no kernel for in float64, and answer in float32 where they are narrower."""
    given = _float64(radius), _float64(strength), _float64(alpha), _float64(base)
    found = portable(z.to(torch.float64), *given, problem)
    answer = torch.float64 if z.dtype == torch.float64 else torch.float32
    return Solution(*(field.to(answer) for field in found))


def _float64(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float64).contiguous()
