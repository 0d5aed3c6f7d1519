"""The safeguarded Newton of the kernels on functions whose root is known."""

import numpy as np
import pytest
import torch
from interpreted import DEVICE

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from drrho.solvers.device.search import AGAIN, LOST, Limits, advance, open_search  # noqa: E402


@triton.jit
def _root(root, start, out, iterations, N: tl.constexpr):
    """Of ``exp(root - x) - 1``, which Newton overshoots from above."""
    i = tl.arange(0, N)
    at, x = tl.load(root + i), tl.load(start + i)
    search = open_search(x * 0 - float("inf"), x * 0 + float("nan"))
    limits = Limits(1e-14, 1e-15, 100, 40, 10.0, 10.0, -500.0, 500.0, 0)
    state = tl.zeros_like(x).to(tl.int32) + AGAIN
    count = tl.zeros_like(state)
    going = 1
    while going > 0:
        value = tl.exp(at - x) - 1
        search, moved, reached = advance(search, limits, x, value, -(value + 1))
        live = state == AGAIN
        count += live.to(tl.int32)
        x, state = tl.where(live, moved, x), tl.where(live, reached, state)
        going = tl.max((state == AGAIN).to(tl.int32), 0)
    tl.store(out + i, tl.where(state == LOST, float("nan"), x))
    tl.store(iterations + i, count)


def test_roots_of_several_rows():
    roots = torch.tensor([0.0, 3.0, -2.0, 40.0], dtype=torch.float64, device=DEVICE)
    start = torch.tensor([0.5, -3.0, 20.0, 41.0], dtype=torch.float64, device=DEVICE)
    out, iterations = torch.empty_like(roots), torch.empty(4, dtype=torch.int32, device=DEVICE)
    with np.errstate(all="ignore"):
        _root[(1,)](roots, start, out, iterations, 4)
    torch.testing.assert_close(out, roots, rtol=1e-14, atol=1e-14)
    assert iterations.max() < 40
