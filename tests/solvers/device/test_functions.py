"""Elementary functions of the kernels, against mpmath."""

import mpmath as mp
import pytest
import torch
from interpreted import DEVICE

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from drrho.solvers.device.functions import (  # noqa: E402
    exponentials,
    key_of,
    logarithms,
    number_of,
    power,
    rough_exponentials,
)

ABOUT_ZERO = [0.0, 1e-12, -1e-8, 1e-4, -1e-3, 0.01, -0.1, 0.3, -0.34, 0.36, 0.7, -0.9, 2.5]


@triton.jit
def _exponentials(x, out, N: tl.constexpr, ROUGH: tl.constexpr):
    i = tl.arange(0, N)
    if ROUGH:
        all, beyond_one, beyond_line = rough_exponentials(tl.load(x + i))
    else:
        all, beyond_one, beyond_line = exponentials(tl.load(x + i))
    tl.store(out + i, all)
    tl.store(out + N + i, beyond_one)
    tl.store(out + 2 * N + i, beyond_line)


@triton.jit
def _logarithms(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    all, beyond_line, reciprocal = logarithms(tl.load(x + i))
    tl.store(out + i, all)
    tl.store(out + N + i, beyond_line)
    tl.store(out + 2 * N + i, reciprocal)


@triton.jit
def _power(x, out, p: tl.float64, N: tl.constexpr):
    i = tl.arange(0, N)
    ratio, beyond_one, beyond_line, slope = power(tl.load(x + i), p)
    tl.store(out + i, ratio)
    tl.store(out + N + i, beyond_one)
    tl.store(out + 2 * N + i, beyond_line)
    tl.store(out + 3 * N + i, slope)


@triton.jit
def _keys(x, keys, again, N: tl.constexpr):
    i = tl.arange(0, N)
    key = key_of(tl.load(x + i))
    tl.store(keys + i, key)
    tl.store(again + i, number_of(key))


def evaluated(function, points, count, dtype, *constants):
    """Return what a kernel stores at the points, and the points as they are in the dtype."""
    padded = points + [points[-1]] * (16 - len(points))
    x = torch.tensor(padded, dtype=dtype, device=DEVICE)
    out = torch.empty(count, 16, dtype=dtype, device=DEVICE)
    function[(1,)](x, out, *constants)
    return out[:, : len(points)].double().cpu().tolist(), x[: len(points)].double().tolist()


def assert_near(found, points, functions, tolerance):
    with mp.workdps(40):
        for values, exact in zip(found, functions, strict=True):
            for value, point in zip(values, points, strict=True):
                expected = exact(mp.mpf(point))
                assert abs(value - expected) <= tolerance * abs(expected), (point, value)


EXPONENTIALS = [mp.exp, mp.expm1, lambda x: mp.expm1(x) - x]


@pytest.mark.parametrize(
    "rough, dtype, tolerance", [(0, torch.float64, 1e-15), (0, torch.float32, 3e-7), (1, torch.float32, 4e-6)]
)
def test_exponentials(rough, dtype, tolerance):
    found, points = evaluated(_exponentials, [*ABOUT_ZERO, -20.0, 30.0], 3, dtype, 16, rough)
    assert_near(found, points, EXPONENTIALS, tolerance)


def test_exponential_underflows_to_zero():
    (all, *_), _ = evaluated(_exponentials, [-800.0, -1e300], 3, torch.float64, 16, 0)
    assert all == [0.0, 0.0]


def test_logarithms():
    found, points = evaluated(_logarithms, [*ABOUT_ZERO, -0.999999, 1e6], 3, torch.float64, 16)
    assert_near(found, points, [mp.log1p, lambda y: mp.log1p(y) - y, lambda y: 1 / (1 + y)], 1e-15)


@pytest.mark.parametrize("p", [-0.7, 2.3, 5.0])
def test_power(p):
    found, points = evaluated(_power, ABOUT_ZERO, 4, torch.float64, p, 16)
    exact = mp.mpf(p)
    functions = [
        lambda y: (1 + y) ** exact,
        lambda y: (1 + y) ** exact - 1,
        lambda y: (1 + y) ** exact - 1 - exact * y,
        lambda y: (1 + y) ** (exact - 1),
    ]
    assert_near(found, points, functions, 1e-14)


@pytest.mark.parametrize("dtype, integer", [(torch.float64, torch.int64), (torch.float32, torch.int32)], ids=str)
def test_keys_are_ordered_like_numbers(dtype, integer):
    numbers = [
        -torch.inf,
        -3e30,
        -1.0,
        -1e-30,
        -0.0,
        0.0,
        1e-40,
        1e-30,
        0.5,
        1.0,
        1.5,
        2.0,
        7.0,
        3e30,
        3.1e30,
        torch.inf,
    ]
    x = torch.tensor(numbers, dtype=dtype, device=DEVICE)
    keys, again = torch.empty(16, dtype=integer, device=DEVICE), torch.empty_like(x)
    _keys[(1,)](x, keys, again, 16)
    assert (again == x).all()
    assert ((keys.diff() > 0) == (x.diff() > 0)).all()
