"""Launches of Triton kernels that are already compiled, without looking at all arguments again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Compiled kernels by device, function, constants, warps, and the kinds of the arguments.
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    function: Any,
    programs: int,
    arguments: tuple[Tensor | int | float | None, ...],
    constants: tuple[int, ...],
    warps: int,
    registers: int | None = None,
) -> None:
    """Run ``function[(programs,)](*arguments, *constants, num_warps=warps)`` on the device of the first argument.

    ``registers`` limits those of a thread, so that more programs run at a time. Triton's own look at the arguments and
    at all global constants takes several times as long as the launch.
    """
    first = arguments[0]
    assert isinstance(first, Tensor)
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return launch(function, programs, arguments, constants, warps, registers)
    key = (first.device, function, constants, warps, registers, *map(_kind, arguments))
    kernel = _compiled.get(key)
    if kernel is None:
        _compiled[key] = function[(programs,)](*arguments, *constants, num_warps=warps, maxnreg=registers)
    else:
        kernel[(programs, 1, 1)](*arguments, *constants)


def _kind(argument: Tensor | int | float | None) -> object:
    """Return what a compiled kernel depends on: types, the alignment of pointers, and what divides numbers."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if argument is None or isinstance(argument, float):
        return type(argument)
    return argument == 1, argument % 16 == 0, argument >= 2**31
