"""Long rows on the device: passes of all its programs over a row, in a fixed number of launches without the host."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drrho.solvers.device import long_passes, long_rows, long_tail

FIELDS = 8  # value, premium, threshold, strength, gap, distance, alpha_slope, on_ball
_TAIL = 2  # CVaR's number
_STEPS = 8  # of Newton's method on a row: two or three are made where a sample tells where to begin
_SAMPLE = 4096
_PROGRAMS = 256  # that share a row: two for each multiprocessor of an H100
_INTERPRETED = 3  # programs that share a row where they run one after the other
_VECTOR = 16  # bytes that a thread reads at once


#: Compiled kernels, and the constants that follow their arguments, by kernel, key of the call and options.
_compiled: dict[tuple[Hashable, ...], tuple[Any, tuple[Any, ...]]] = {}


class _Call(NamedTuple):
    """What the launches for some rows share; the grid is of passes, whose programs are the parts of a row.

    ``key`` tells apart calls that differ in device, in dtype, in the alignment of a pointer, or in which arguments are
    None; ``stream`` is None where Triton's interpreter runs the kernels.
    """

    z: Tensor
    weights: Tensor
    fields: Tensor
    failed: Tensor | None
    work: Tensor
    parts: int
    aligned: bool
    key: Hashable
    stream: int | None

    @property
    def rows(self) -> int:
        return self.z.shape[0]

    @property
    def n(self) -> int:
        return self.z.shape[1]

    @property
    def single(self) -> bool:
        return self.z.dtype == torch.float32

    def tiles(self, held: int) -> dict[str, Any]:
        """Return the options of a pass whose threads hold so many losses of a tile."""
        width = 256 * _VECTOR // self.z.element_size()
        held = held if self.z.is_cuda else 4 * held  # the interpreter's tiles may be larger
        return {"ROWS": held * 256 // width, "LANES": width, "ALIGNED": self.aligned, "num_warps": 8, "maxnreg": 128}

    def over_rows(self, kernel: Any, *arguments: Any, held: int, **options: Any) -> None:
        """Launch a pass."""
        self._launch(kernel, (self.parts, self.rows), *arguments, **options, **self.tiles(held))

    def for_rows(self, kernel: Any, *arguments: Any, **options: Any) -> None:
        """Launch one program a row."""
        self._launch(kernel, (1, self.rows), *arguments, **options, num_warps=8)

    def _launch(self, kernel: Any, grid: tuple[int, int], *arguments: Any, **options: Any) -> None:
        """Launch a kernel, the last of whose arguments are constants.

        Triton's own look at the arguments takes several times as long as the launch.
        """
        key = (kernel.fn, self.key, *options.values())
        found = _compiled.get(key)
        if found is not None:
            compiled, constants = found
            compiled[(*grid, 1)](*arguments, *constants, stream=self.stream)
            return
        compiled = kernel[grid](*arguments, **options)
        if self.stream is not None:
            constants = kernel.arg_names[len(arguments) :]
            _compiled[key] = compiled, tuple(options[name] for name in constants)


def solve_long_rows(
    z: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
    failed: Tensor | None,
    kernel: int,
    order: float,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels on rows ``[rows, n]``, or one ``[n]``; return weights and fields ``[FIELDS, rows]``.

    As `solve_rows` of ``rows.py``, for rows of at least 2^15 losses, and not for base weights or hybrids.
    """
    assert base is None
    answer = torch.float64 if z.dtype == torch.float64 else torch.float32
    rows, n = z.shape if z.ndim == 2 else (1, len(z))
    weights = torch.empty(z.shape, dtype=answer, device=z.device)
    fields = torch.empty((FIELDS, *z.shape[:-1]), dtype=answer, device=z.device)
    z = z.view(rows, n).to(answer)
    parts = min(-(-n // (8 * 256)), _PROGRAMS if z.is_cuda else _INTERPRETED)
    work = torch.empty(rows * long_rows.room(parts), dtype=torch.float64, device=z.device)
    given = tuple(argument is None for argument in (radius, strength, alpha, failed))
    key = z.device, z.dtype, z.data_ptr() % _VECTOR == 0, kernel, given
    stream = torch.cuda.current_stream(z.device).cuda_stream if z.is_cuda else None
    call = _Call(z, weights, fields, failed, work, parts, rows == 1 or n % 16 == 0, key, stream)
    if kernel == _TAIL:
        _solve_tail(call, strength, alpha, order)
    else:
        _solve(call, radius, strength, kernel)
    return weights, fields


def _solve(call: _Call, radius: Tensor | None, strength: Tensor | None, kernel: int) -> None:
    z, n, work, parts = call.z, call.n, call.work, call.parts
    parameter = strength if radius is None else radius
    known = {"FAMILY": kernel, "PARTS": _PROGRAMS}
    exact = {**known, "SINGLE": call.single}
    ball = radius is not None
    call.over_rows(long_rows.look, z, work, n, held=8)
    aligned = call.aligned
    call.for_rows(long_passes.start, z, work, parameter, n, parts, BALL=ball, SAMPLE=_SAMPLE, ALIGNED=aligned, **known)
    turn = 1
    for _ in range(_STEPS if ball or kernel == 0 else 1):
        call.over_rows(long_passes.step, z, work, n, parts, turn, held=8, **exact)
        turn += 1
    call.over_rows(long_passes.weigh, z, call.weights, work, n, parts, turn, held=4 if kernel == 1 else 8, **exact)
    turn += 1
    call.for_rows(long_passes.finish, work, parameter, call.fields, call.failed, n, parts, turn, BALL=ball, **exact)
    call.over_rows(long_rows.reweigh, call.weights, work, n, turn, held=8)


def _solve_tail(call: _Call, strength: Tensor | None, alpha: Tensor | None, order: float) -> None:
    z, n, work, parts = call.z, call.n, call.work, call.parts
    passes = 4 if call.single else 7  # one over the sample's bracket, and what finds 32 or 64 bits whatever that is
    counts = torch.empty(call.rows * passes * long_tail.BINS, dtype=torch.int32, device=z.device)
    known = {"PARTS": _PROGRAMS}
    call.over_rows(long_rows.look, z, work, n, held=8)
    call.for_rows(
        long_tail.start_tail, z, work, counts, alpha, strength, order, n, parts, passes, SAMPLE=_SAMPLE,
        BITS=32 if call.single else 64, ALIGNED=call.aligned, **known,
    )  # fmt: skip
    turn = 1
    for _ in range(passes):
        call.over_rows(long_tail.tally, z, work, counts, n, parts, turn, passes, held=8, **known)
        turn += 1
    call.over_rows(long_tail.weigh_tail, z, call.weights, work, counts, n, parts, turn, passes, held=8, **known)
    turn += 1
    call.for_rows(
        long_tail.finish_tail, work, z, strength, call.fields, call.failed, n, parts, turn, SINGLE=call.single, **known
    )
    call.over_rows(long_rows.reweigh, call.weights, work, n, turn, held=8)
