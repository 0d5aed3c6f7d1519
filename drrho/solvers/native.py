"""Rows on the CPU, solved by the compiled kernels (``kernels.c``): KL, chi-square and CVaR with uniform base weights.

A processor's own instructions are used where they were compiled for (``hatch_build.py``). Where there are no
kernels, as on a GPU, over ranks, with base weights, or in a traced graph, torch operations do the same.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from drrho.divergences import Divergence
from drrho.solvers.problem import REFUSED, REFUSED_ALPHA, REFUSED_RANGE, Problem, Solution

_FIELDS = 8
_LOSSES, _RADIUS, _STRENGTH, _ALPHA, _MEMORY, _ITERATIONS = range(1, 7)  # why a row is refused
_SHARED_FROM = 2**20  # losses from which rows are shared among threads


def _load() -> ctypes.CDLL | None:
    here, capability = Path(__file__).parent, torch.backends.cpu.get_cpu_capability().lower()
    for level in (capability, "default"):
        library = here / f"_kernels_{level}.so"
        if library.exists():
            loaded = ctypes.CDLL(str(library))
            integer, pointer = ctypes.c_long, ctypes.c_void_p
            loaded.drrho_solve.restype = integer
            loaded.drrho_solve.argtypes = [ctypes.c_int] * 2 + [integer] * 4 + [pointer] * 6
            return loaded
    return None


#: The loaded library; None where it was not built.
library = _load()


def takes(z: Tensor, base: Tensor | None, problem: Problem) -> bool:
    """Whether the kernels, which know the problem's divergence, solve this one."""
    return (
        library is not None
        and base is None
        and problem.group is None
        and z.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


def solve_natively(
    z: Tensor, radius: Tensor | None, strength: Tensor | None, alpha: Tensor | None, divergence: Divergence, kernel: int
) -> Solution:
    """Solve rows ``z`` ``[rows, n]``, or one ``[n]``, float64 or float32, computing in float64, by that kernel.

    Raises
    ------
    ValueError
        For a loss that is not finite, a range that overflows, or a parameter that is negative or not finite.
    """
    assert library is not None
    z = z.contiguous()
    rows, n = z.shape if z.ndim == 2 else (1, len(z))
    if not divergence.has_radius:
        radius = None  # it has no effect
    if divergence.tail_fraction is not None and alpha is None:
        alpha = torch.full(z.shape[:-1], float(divergence.tail_fraction), dtype=torch.float64)
    given = [None if tensor is None else _float64(tensor) for tensor in (radius, strength, alpha)]
    weights = torch.empty_like(z)
    fields = torch.empty(_FIELDS, *z.shape[:-1], dtype=torch.float64)
    solve = library.drrho_solve
    pointers = [tensor if tensor is None else tensor.data_ptr() for tensor in (z, *given, weights, fields)]
    size = (kernel, z.dtype == torch.float32, n, rows)
    threads = 1 if rows == 1 or rows * n < _SHARED_FROM else min(rows, torch.get_num_threads())
    if threads == 1:
        status = solve(*size, 0, rows, *pointers)
    else:
        status = _shared(solve, size, pointers, threads)
    if status:
        _refuse(z, radius, strength, alpha, divergence, *divmod(status, 8))
    if z.dtype != torch.float64:
        fields = fields.to(z.dtype)
    value, *others = fields.unbind()
    return Solution(value, weights, *others)


def _float64(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype == torch.float64 else tensor.to(torch.float64)).contiguous()


def _shared(solve: Callable[..., int], size: tuple[int, ...], pointers: list[int | None], threads: int) -> int:
    """Solve parts of the rows in threads of their own; return the first refusal."""
    rows = size[-1]
    edges = [rows * part // threads for part in range(threads + 1)]
    found = [0] * threads

    def part(index: int) -> None:
        found[index] = solve(*size, edges[index], edges[index + 1], *pointers)

    others = [threading.Thread(target=part, args=(index,)) for index in range(1, threads)]
    for thread in others:
        thread.start()
    part(0)
    for thread in others:
        thread.join()
    return next((status for status in found if status), 0)


def _refuse(
    z: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    divergence: Divergence,
    row: int,
    why: int,
) -> None:
    z = z.view(-1, z.shape[-1])
    for tensor, number, message in (
        (radius, _RADIUS, REFUSED["radius"]),
        (strength, _STRENGTH, REFUSED["strength"]),
        (alpha, _ALPHA, REFUSED_ALPHA),
    ):
        if tensor is not None and why == number:
            raise ValueError(message.format(tensor.view(-1)[row].item()))
    if why == _LOSSES:
        raise ValueError(REFUSED_RANGE.format((z[row].max() - z[row].min()).item()))
    if why == _MEMORY:
        raise MemoryError(f"no memory for the losses around the threshold of {divergence}")
    raise RuntimeError(f"the multiplier of {divergence} did not converge in 400 iterations")
