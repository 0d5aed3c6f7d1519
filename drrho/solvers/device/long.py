"""Long rows on the device: passes of all its programs over a row, in a fixed number of launches without the host."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from drrho.solvers.device import long_passes, long_rows, long_tail

FIELDS = 8  # value, premium, threshold, strength, gap, distance, alpha_slope, on_ball
_KL, _TAIL = 1, 2  # the numbers of KL and CVaR
_STEPS = 4, 3  # of Newton's method for chi-square and KL in float32: most rows need two or three; one more in float64
_THOROUGH = 3  # times as many, for the others
_SAMPLE = 4096
_PROGRAMS = 256  # that share a row at most: two for each multiprocessor of an H100
_ALL_PROGRAMS, _FEWEST = 1024, 8  # for all rows, and for each of many
_INTERPRETED = 3  # programs that share a row where they run one after the other
_VECTOR = 16  # bytes that a thread reads at once


#: What the launches of calls were compiled to, in their order, with the constants that follow their arguments.
_plans: dict[Hashable, list[tuple[Any, tuple[Any, ...]]]] = {}


class _Call:
    """The launches for some rows.

    Triton's own look at the arguments takes several times as long as a launch. Calls that do not differ in device and
    dtype, in the alignment of a pointer or in which arguments are None, as their ``key`` tells, launch the same
    kernels in the same order, which are looked up once a call.
    """

    def __init__(self, z: Tensor, parts: int, key: tuple[Hashable, ...]) -> None:
        self.rows, n = z.shape
        self.parts, self.single = parts, z.dtype == torch.float32
        self.aligned = self.rows == 1 or n % 16 == 0
        self.key = z.device, z.dtype, z.data_ptr() % _VECTOR == 0, self.aligned, *key
        self.stream = torch.cuda.current_stream(z.device).cuda_stream if z.is_cuda else None
        self.plan = iter(_plans.get(self.key, ()))
        self.recorded: list[tuple[Any, tuple[Any, ...]]] = []
        self.threads = 256 if z.is_cuda else 1024  # the interpreter's tiles may be larger
        self.width = self.threads * _VECTOR // z.element_size()

    def over_rows(self, kernel: Any, held: int, *arguments: Any, **constants: Any) -> None:
        """Launch a pass, whose programs are the parts of a row, and whose threads hold so many losses of a tile."""
        self._launch((self.parts, self.rows), kernel, held, arguments, constants)

    def for_rows(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Launch one program a row."""
        self._launch((1, self.rows), kernel, 0, arguments, constants)

    def _launch(
        self, grid: tuple[int, int], kernel: Any, held: int, arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        found = next(self.plan, None)
        if found is not None:
            compiled, following = found
            compiled[(*grid, 1)](*arguments, *following, stream=self.stream)
            return
        known = constants | {"ROWS": held * self.threads // self.width, "LANES": self.width, "ALIGNED": self.aligned}
        known |= {"PARTS": _PROGRAMS, "SINGLE": self.single, "BITS": 32 if self.single else 64, "SAMPLE": _SAMPLE}
        following = {name: known[name] for name in kernel.arg_names[len(arguments) :]}
        compiled = kernel[grid](*arguments, **following, num_warps=8, maxnreg=128 if held else None)
        self.recorded.append((compiled, tuple(following.values())))

    def remember(self) -> None:
        """Keep what has been compiled for the calls that follow."""
        if self.recorded and self.stream is not None:
            _plans[self.key] = self.recorded


def solve_long_rows(
    z: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    alpha: Tensor | None,
    base: Tensor | None,
    failed: Tensor | None,
    kernel: int,
    order: float,
    thorough: bool = True,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels on rows ``[rows, n]``, or one ``[n]``; return weights and fields ``[FIELDS, rows]``.

    As `solve_rows` of ``rows.py``, for rows of at least 2^15 losses, and without base weights. Few passes suffice for
    most rows; those that others need, which is ``thorough``, cost launches.
    """
    assert base is None
    answer = torch.float64 if z.dtype == torch.float64 else torch.float32
    weights = torch.empty(z.shape, dtype=answer, device=z.device)
    fields = torch.empty((FIELDS, *z.shape[:-1]), dtype=answer, device=z.device)
    z = z.view(-1, z.shape[-1]).to(answer)
    rows, n = z.shape
    parts = min(-(-n // (8 * 256)), _PROGRAMS, max(_FEWEST, _ALL_PROGRAMS // rows))
    parts = parts if z.is_cuda else _INTERPRETED
    work = torch.empty(rows * long_rows.room(parts), dtype=torch.float64, device=z.device)
    key = kernel, thorough, *(argument is None for argument in (radius, strength, alpha, failed))
    with torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext():
        call = _Call(z, parts, key)
        if kernel == _TAIL:
            _solve_tail(call, z, weights, fields, work, strength, alpha, failed, order, thorough)
        else:
            _solve(call, z, weights, fields, work, radius, strength, failed, kernel, thorough)
        call.remember()
    return weights, fields


def _solve(
    call: _Call,
    z: Tensor,
    weights: Tensor,
    fields: Tensor,
    work: Tensor,
    radius: Tensor | None,
    strength: Tensor | None,
    failed: Tensor | None,
    kernel: int,
    thorough: bool,
) -> None:
    n, parts, turn = z.shape[1], call.parts, 1
    call.over_rows(long_rows.look, 8, z, work, n)
    call.for_rows(long_passes.start, z, work, radius, strength, n, parts, FAMILY=kernel)
    steps = 1 if kernel == _KL and radius is None else _STEPS[kernel] + (not call.single)
    steps *= (_THOROUGH if thorough else 1) * (1 if radius is None or strength is None else 2)
    for _ in range(steps):
        call.over_rows(long_passes.step, 8, z, work, n, parts, turn, FAMILY=kernel)
        turn += 1
    call.over_rows(long_passes.weigh, 4 if kernel == _KL else 8, z, weights, work, n, parts, turn, FAMILY=kernel)
    turn += 1
    call.over_rows(long_passes.finish, 8, work, weights, strength, fields, failed, n, parts, turn, FAMILY=kernel)


def _solve_tail(
    call: _Call,
    z: Tensor,
    weights: Tensor,
    fields: Tensor,
    work: Tensor,
    strength: Tensor | None,
    alpha: Tensor | None,
    failed: Tensor | None,
    order: float,
    thorough: bool,
) -> None:
    n, parts = z.shape[1], call.parts
    # One over the sample's bracket, and what finds 32 or 64 bits whatever that is; less where the bracket is right.
    passes = (4 if call.single else 7) if thorough else (3 if call.single else 5)
    counts = torch.empty(call.rows * passes * long_tail.BINS, dtype=torch.int32, device=z.device)
    call.over_rows(long_rows.look, 8, z, work, n)
    call.for_rows(long_tail.start_tail, z, work, counts, alpha, strength, order, n, parts, passes)
    turn = 1
    for _ in range(passes):
        call.over_rows(long_tail.tally, 8, z, work, counts, n, parts, turn, passes)
        turn += 1
    call.over_rows(long_tail.weigh_tail, 8, z, weights, work, counts, n, parts, turn, passes)
    turn += 1
    call.over_rows(long_tail.finish_tail, 8, work, z, weights, strength, fields, failed, n, parts, turn)
