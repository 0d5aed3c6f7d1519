"""Divergences as functions on the device, in forms that keep their digits: the mathematics that all kernels share.

All act elementwise on tensors or scalars, in float64 or, where that is said, in the dtype of what they are given. The
forms are those of ``kernels_elementary.h`` and of the C kernels beside it: differences near one and zero are taken
from the parts of which a power is made, so that a small tilt has as many digits as a large one.
"""

# Triton's language is checked by its compiler:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl

# --- elementary functions -------------------------------------------------------------------------------------------


@triton.jit
def exponential_parts(x, SHORT: tl.constexpr = False):
    """Return power, r and excess with ``exp(x) = power * (1 + r + excess)``, float64 or float32; 0 on underflow.

    Where that is to be short, float64 is good to 1e-11, which is enough for losses that are narrower.
    """
    if x.dtype == tl.float64:
        held = tl.maximum(x, -708.0)
        shifted = held * 1.4426950408889634 + 6755399441055744.0  # 1.5 * 2^52: the integer is left in the low bits
        k = shifted - 6755399441055744.0
        r = held - k * 6.93147180369123816490e-01
        r = r - k * 1.90821492927058770002e-10
        square = r * r
        fourth = square * square
        low = (0.5 + r * (1 / 6)) + square * (1 / 24 + r * (1 / 120))
        middle = (1 / 720 + r * (1 / 5040)) + square * (1 / 40320 + r * (1 / 362880))
        if not SHORT:
            high = (1 / 3628800 + r * (1 / 39916800)) + square * (
                1 / 479001600 + r * (1 / 6227020800) + square * (1 / 87178291200)
            )
            middle += fourth * high
        excess = square * (low + fourth * middle)
        power = ((shifted.to(tl.int64, bitcast=True) << 52) + 0x3FF0000000000000).to(tl.float64, bitcast=True)
        power = tl.where(x < -708.0, 0.0, power)
    else:
        held = tl.maximum(x, -87.0)
        shifted = held * 1.4426950408889634 + 12582912.0
        k = shifted - 12582912.0
        r = held - k * 0.693359375
        r = r + k * 2.12194440e-4
        square = r * r
        low = (0.5 + r * (1 / 6)) + square * (1 / 24 + r * (1 / 120))
        excess = square * (low + square * square * (1 / 720 + r * (1 / 5040)))
        power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
        power = tl.where(x < -87.0, 0.0, power)
    return power, r, excess


@triton.jit
def exponentials(x, SHORT: tl.constexpr = False):
    """Return ``exp(x)``, ``exp(x) - 1`` and ``exp(x) - 1 - x`` for x below the overflow, float64 or float32."""
    power, r, excess = exponential_parts(x, SHORT)
    grown = power * (r + excess)
    return power + grown, grown + (power - 1.0), power * excess + ((power * r + (power - 1.0)) - x)


@triton.jit
def rough_exponentials(x):
    """Return the same of float32, by the processor's own power: to a few units of 1e-7, next to one of 1e-6."""
    ratio = tl.exp2(x * 1.4426950408889634)
    excess = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))
    near = tl.abs(x) < 0.5
    return ratio, tl.where(near, x + excess, ratio - 1.0), tl.where(near, excess, (ratio - 1.0) - x)


@triton.jit
def logarithms(y):
    """Return ``log(1 + y)``, ``log(1 + y) - y`` and ``1 / (1 + y)`` of float64 ``y > -1``, by one division."""
    g = y + 1.0
    # g = 2^e m, m between the square roots of 1/2 and 2
    g_bits = g.to(tl.int64, bitcast=True)
    top = g_bits - 0x3FE6A09E667F3BCD
    e_bits = (top >> 52) << 52
    m = (g_bits - e_bits).to(tl.float64, bitcast=True)
    e = (top >> 52).to(tl.float64)
    dropped = tl.where(y > 1.0, 1.0 - (g - y), y - (g - 1.0))  # by the rounding of g
    inverse_power = (0x3FF0000000000000 - e_bits).to(tl.float64, bitcast=True)
    f = tl.where(e_bits == 0, y, (m - 1.0) + dropped * inverse_power)
    both = 1.0 / ((f + 2.0) * g)
    s = f * (both * g)
    z = s * s
    w = z * z
    odd = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01))
    even = z * (
        6.666666666666735130e-01
        + w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01))
    )
    half = 0.5 * f * f
    bend = s * (half + (odd + even)) - half
    high, low = e * 6.93147180369123816490e-01, e * 1.90821492927058770002e-10
    return high + (f + (bend + low)), bend + ((high + (f - y)) + low), both * (f + 2.0)


@triton.jit
def expm1(x):
    """Return ``exp(x) - 1``."""
    _, beyond_one, _ = exponentials(x)
    return beyond_one


@triton.jit
def log1p(y):
    """Return ``log(1 + y)`` of float64 ``y > -1``."""
    logarithm, _, _ = logarithms(y)
    return logarithm


# --- divergences: at s = (d - threshold) / strength, the ratio phi*'(s), the tilt, which is that less one, the cost
# --- phi of the ratio, the bend phi*(s) - s, and the curvature phi*''(s) ----------------------------------------------


@triton.jit
def kl(s):
    """Return ratio, tilt, cost, bend and curvature of KL, float64 or float32."""
    ratio, tilt, beyond = exponentials(s)
    return ratio, tilt, s * tilt - beyond, beyond, ratio


@triton.jit
def chi_square(s):
    """Return ratio, tilt, cost, bend and curvature of chi-square, float64 or float32."""
    tilt = tl.maximum(s, -1.0)
    cost = 0.5 * tilt * tilt
    return tilt + 1.0, tilt, cost, (tilt - s) + cost, tl.where(s > -1.0, 1.0, 0.0).to(s.dtype)


@triton.jit
def capped_kl(s, limit, cap):
    """Return ratio, tilt, cost, bend and curvature of KL with ratios up to ``1 + cap = exp(limit)``."""
    c = tl.minimum(s, limit)
    ratio, tilt, beyond = exponentials(c)
    bend = beyond + (s - c) * cap
    return ratio, tilt, c * tilt - beyond, bend, tl.where(s < limit, ratio, 0.0)


@triton.jit
def power(y, p):
    """Return ``g^p``, ``g^p - 1``, ``g^p - 1 - p y`` and ``g^(p - 1)`` for ``g = (1 + y)_+``, float64.

    Ratios of a Cressie-Read divergence of order k are proportional to that, with ``p = 1 / (k - 1)``.
    """
    outside = y <= -1.0
    u, bent, reciprocal = logarithms(tl.where(outside, 0.0, y))
    ratio, beyond_one, beyond_line = exponentials(u * p)
    beyond_line = beyond_line + bent * p
    slope = ratio * reciprocal
    ratio, slope = tl.where(outside, 0.0, ratio), tl.where(outside, 0.0, slope)
    return ratio, tl.where(outside, -1.0, beyond_one), tl.where(outside, -1.0 - p * y, beyond_line), slope


# --- order of losses --------------------------------------------------------------------------------------------------


@triton.jit
def key_of(z):
    """Return integers that are ordered like float32 or float64 numbers, equal only where those are; -0 is 0."""
    z = z + 0.0
    if z.dtype == tl.float64:
        bits = z.to(tl.int64, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        bits = z.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return key


@triton.jit
def number_of(key):
    """Return the number of a key."""
    if key.dtype == tl.int64:
        number = tl.where(key < 0, key ^ 0x7FFFFFFFFFFFFFFF, key).to(tl.float64, bitcast=True)
    else:
        number = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
    return number
