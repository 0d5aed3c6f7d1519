"""Rows on the CPU, solved by the compiled kernels (``kernels.c``): every divergence of the library.

A processor's own instructions are used where they were compiled for (``hatch_build.py``). Where there are no
kernels, as on a GPU, over ranks, or in a traced graph, torch operations do the same.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from drrho.divergences import Divergence
from drrho.solvers.problem import REFUSED, REFUSED_ALPHA, REFUSED_RANGE, Problem, Solution

#: Solves rows by torch operations: losses, radius, strength, alpha and base weights.
Portable = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Problem], Solution]

_VERSION = 2  # of what is passed and returned, as in kernels.c
_FIELDS = 8
_LOSSES, _RADIUS, _STRENGTH, _ALPHA, _BASE, _MEMORY = range(1, 7)  # why a row is refused
_DECLINED = -1
_SHARED_FROM = 2**20  # losses from which they are shared among threads
_LONG = 2**18  # losses of a row from which its passes are
_REMEDY = (
    "Risks on the CPU are solved by torch operations instead, several times slower. Install a C compiler and install "
    "drrho again with `pip install --force-reinstall --no-deps`, or `pip install --editable .` in a checkout."
)


def _load(folder: Path) -> tuple[ctypes.CDLL | None, str]:
    """Return the library of a folder for this processor, or None and why there is none."""
    capability, why = torch.backends.cpu.get_cpu_capability().lower(), f"there are none in {folder}"
    levels = ["avx512", "avx2", "default"]
    for level in levels[levels.index(capability) if capability in levels else -1 :]:
        path = folder / f"_kernels_{level}.so"
        if not path.exists():
            continue
        try:
            loaded = ctypes.CDLL(str(path))
            version = loaded.drrho_version()
        except (OSError, AttributeError) as error:
            why = f"{path} does not load: {error}"
            continue
        if version != _VERSION:
            why = f"{path} is of version {version}, not {_VERSION}: it was built from other sources"
            continue
        integer, pointer = ctypes.c_long, ctypes.c_void_p
        loaded.drrho_solve.restype = integer
        loaded.drrho_solve.argtypes = (
            [ctypes.c_int] * 3 + [ctypes.c_double] + [integer] * 4 + [pointer] * 2 + [integer] + [pointer] * 5
        )
        return loaded, ""
    return None, why


#: The loaded library; None where there is none, and why.
library, missing = _load(Path(__file__).parent)


def _warn_once() -> None:
    global missing
    if missing:
        warnings.warn(f"the compiled kernels are not in use, {missing}. {_REMEDY}", RuntimeWarning, stacklevel=2)
        missing = ""


def takes(z: Tensor, problem: Problem) -> bool:
    """Whether the kernels, if they know the problem's divergence, solve rows like these."""
    if problem.group is not None or not z.is_cpu or torch.compiler.is_compiling():
        return False
    if library is None:
        _warn_once()
    return library is not None


def solve_natively(
    z: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
    problem: Problem,
    kernel: int,
    portable: Portable,
) -> Solution:
    """Solve rows ``z`` ``[rows, n]``, or one ``[n]``, float64 or float32, computing in float64, by that kernel.

    Rows that it declines, as where ratios of a high order jump between two numbers, are solved by ``portable``.

    Raises
    ------
    ValueError
        For a loss that is not finite, a range that overflows, a negative base weight, or a parameter that is negative
        or not finite.
    """
    assert library is not None
    z = z.contiguous()
    rows, n = z.shape if z.ndim == 2 else (1, z.shape[0])
    divergence = problem.divergence
    given = radius, strength, alpha, base
    if not divergence.has_radius:
        radius = None  # it has no effect
    if divergence.tail_fraction is not None and alpha is None:
        alpha = torch.full(z.shape[:-1], float(divergence.tail_fraction), dtype=torch.float64)
    radius, strength, alpha, base = (
        None if tensor is None else _float64(tensor) for tensor in (radius, strength, alpha, base)
    )
    weights = torch.empty_like(z)
    fields = torch.empty((_FIELDS, rows) if z.ndim == 2 else _FIELDS, dtype=torch.float64)
    threads = 1 if rows * n < _SHARED_FROM else torch.get_num_threads()
    together = threads if n >= _LONG and rows < threads else 1  # a row at a time, or a thread for each part of them
    size = (kernel, z.dtype == torch.float32, together, divergence.cressie_read_order or 0.0, n, rows)
    stride = 0 if base is None or len(base) == 1 else n
    pointers = (z.data_ptr(), _pointer(base), stride, *map(_pointer, (radius, strength, alpha, weights, fields)))
    if together > 1 or threads == 1 or rows == 1:
        status = library.drrho_solve(*size, 0, rows, *pointers)
    else:
        status = _shared(library.drrho_solve, size, pointers, min(rows, threads))
    if status > 0:
        _refuse(z, radius, strength, alpha, base, divergence, *divmod(status, 16))
    if z.dtype != torch.float64:
        fields = fields.to(z.dtype)
    value, *others = fields.unbind()
    solution = Solution(value, weights, *others)
    if status == _DECLINED:
        solve_declined(solution, z, *given, problem, portable)
    return solution


def _float64(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype == torch.float64 else tensor.to(torch.float64)).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _shared(solve: Callable[..., int], size: tuple[float, ...], pointers: tuple[int | None, ...], threads: int) -> int:
    """Solve parts of the rows in threads of their own; return the first refusal, or whether rows were declined."""
    rows = int(size[-1])
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
    return next((status for status in found if status > 0), min(found))


def solve_declined(
    solution: Solution,
    z: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
    problem: Problem,
    portable: Portable,
) -> None:
    """Fill in the rows whose fields are not numbers."""
    chosen = solution.on_ball.isnan()

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[chosen].to(torch.float64)

    shared = base is not None and len(base) == 1
    found = portable(
        z[chosen].to(torch.float64), part(radius), part(strength), part(alpha), base if shared else part(base), problem
    )
    for field, solved in zip(solution, found, strict=True):
        field[chosen] = solved.to(field.dtype)


def _refuse(
    z: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
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
    if base is not None and why == _BASE:
        least = base[row if len(base) > 1 else 0].min().item()
        raise ValueError(f"base_weights must be >= 0 with rows that sum to 1, got {least}")
    if why == _LOSSES:
        raise ValueError(REFUSED_RANGE.format((z[row].max() - z[row].min()).item()))
    if why == _MEMORY:
        raise MemoryError(f"no memory for the losses around the threshold of {divergence}")
    raise RuntimeError(f"the multiplier of {divergence} did not converge in 400 iterations")
