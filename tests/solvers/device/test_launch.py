"""On what a compiled kernel depends, and that a launch runs it."""

import pytest
import torch
from interpreted import DEVICE

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from drrho.solvers.device.launch import _kind, launch  # noqa: E402


@triton.jit
def _add(x, out, y: tl.float64, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) + y)


def test_launched_twice():
    x = torch.arange(8, dtype=torch.float64, device=DEVICE)
    for shift in (0.25, 1e-3):
        out = torch.empty_like(x)
        launch(_add, 2, (x, out, shift), (4,), 1)
        torch.testing.assert_close(out, x + shift, rtol=0, atol=0)


def test_kinds_of_arguments():
    x = torch.zeros(9)
    assert _kind(x) == _kind(torch.ones(4)) != _kind(x[1:])
    assert _kind(x) != _kind(x.double())
    assert _kind(None) != _kind(0.5) == _kind(2.5)
    assert _kind(16) == _kind(32) != _kind(17) == _kind(18)
    assert len({_kind(1), _kind(16), _kind(17), _kind(2**40)}) == 4
