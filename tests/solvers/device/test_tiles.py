"""What a first look at rows finds, against NumPy."""

import numpy as np
import pytest
import torch
from interpreted import DEVICE

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from drrho.solvers.device.tiles import look  # noqa: E402


@triton.jit
def _look(z, base, out, n, ROWS: tl.constexpr, TILE: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None]
    q = None if base is None else base + at * n
    _, top, low, scale, span, all, mean, variance, share, good = look(z + at * n, q, n, ROWS, TILE)
    i = tl.arange(0, ROWS)
    tl.store(out + i, top)
    tl.store(out + ROWS + i, low)
    tl.store(out + 2 * ROWS + i, scale)
    tl.store(out + 3 * ROWS + i, span)
    tl.store(out + 4 * ROWS + i, all)
    tl.store(out + 5 * ROWS + i, mean)
    tl.store(out + 6 * ROWS + i, variance)
    tl.store(out + 7 * ROWS + i, share)
    tl.store(out + 8 * ROWS + i, good.to(tl.float64))


def looked_at(z, base=None):
    out = torch.empty(9, 2, dtype=torch.float64, device=DEVICE)
    base = base if base is None else base.to(DEVICE)
    with np.errstate(all="ignore"):
        _look[(1,)](z.to(DEVICE), base, out, z.shape[1], 2, 32)
    return out.cpu().numpy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("based", [False, True])
def test_moments(dtype, based):
    rng = np.random.default_rng(0)
    z = torch.from_numpy(1e3 + rng.normal(size=(2, 75))).to(dtype)
    z[0, 3], z[1, :5] = z[0].max() + 1, z[1].max()
    base = torch.from_numpy(rng.exponential(size=(2, 75)) * (rng.random((2, 75)) > 0.2)) if based else None
    top, low, scale, span, all, mean, variance, share, good = looked_at(z, base)
    q = np.ones((2, 75)) if base is None else base.numpy()
    held = np.where(q > 0, z.double().numpy(), np.nan)
    np.testing.assert_array_equal(top, np.nanmax(held, 1))
    np.testing.assert_array_equal(low, np.nanmin(held, 1))
    np.testing.assert_array_equal(np.log2(scale) % 1, 0)
    assert ((span >= 1) & (span < 2)).all()
    d = np.nan_to_num((held - top[:, None]) * scale[:, None])
    expected = (q * d).sum(1) / q.sum(1)
    np.testing.assert_allclose(all, q.sum(1), rtol=1e-14)
    np.testing.assert_allclose(mean, expected, rtol=1e-14)
    np.testing.assert_allclose(variance, (q * (d - expected[:, None]) ** 2).sum(1) / q.sum(1), rtol=1e-12)
    np.testing.assert_allclose(share, (q * (held == top[:, None])).sum(1) / q.sum(1), rtol=1e-14)
    assert good.all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.7e308])
def test_rows_that_cannot_be_solved(bad):
    z = torch.zeros(2, 40, dtype=torch.float64)
    z[1, 30], z[1, 31] = bad, -1.7e308
    *_, good = looked_at(z)
    assert good.tolist() == [1.0, 0.0]


def test_negative_base_weights_cannot_be_solved():
    base = torch.full((2, 40), 0.025, dtype=torch.float64)
    base[0, 7] = -0.1
    *_, good = looked_at(torch.arange(80.0, dtype=torch.float64).reshape(2, 40), base)
    assert good.tolist() == [0.0, 1.0]
