/* Exponentials and logarithms of vectors, in parts from which differences are taken without cancellation. */

#ifndef DRRHO_KERNELS_ELEMENTARY_H
#define DRRHO_KERNELS_ELEMENTARY_H

#include "kernels.h"

/* exp(x) = power * (1 + r + excess), for x <= 700; what underflows is zero. */
INLINE void exponential(const reals x[2], reals power[2], reals r[2], reals excess[2]) {
    const reals least = ALL(-708.0);
    const reals magic = ALL(6755399441055744.0); /* 1.5 * 2^52: the integer is left in the low bits */
    reals held[2], shifted[2], k[2], square[2], fourth[2], low[2], middle[2], high[2];
    BOTH held[u] = choose(x[u] < least, least, x[u]);
    BOTH shifted[u] = held[u] * 1.4426950408889634 + magic;
    BOTH k[u] = shifted[u] - magic;
    BOTH r[u] = held[u] - k[u] * 0x1.62e42fefa39efp-1;
    BOTH r[u] -= k[u] * 0x1.abc9e3b39803fp-56;
    BOTH square[u] = r[u] * r[u];
    /* sum of r^j / (j + 2)! */
    BOTH high[u] = ALL(1.0 / 479001600) + r[u] * (1.0 / 6227020800) + square[u] * (1.0 / 87178291200);
    BOTH high[u] = (ALL(1.0 / 3628800) + r[u] * (1.0 / 39916800)) + square[u] * high[u];
    BOTH middle[u] = ALL(1.0 / 40320) + r[u] * (1.0 / 362880);
    BOTH middle[u] = (ALL(1.0 / 720) + r[u] * (1.0 / 5040)) + square[u] * middle[u];
    BOTH fourth[u] = square[u] * square[u];
    BOTH low[u] = ALL(1.0 / 24) + r[u] * (1.0 / 120);
    BOTH low[u] = (ALL(1.0 / 2) + r[u] * (1.0 / 6)) + square[u] * low[u];
    BOTH excess[u] = square[u] * (low[u] + fourth[u] * (middle[u] + fourth[u] * high[u]));
    BOTH power[u] = choose(x[u] < least, ALL(0.0), (reals)(((bits)shifted[u] << 52) + 0x3ff0000000000000LL));
}

/* exp(x), exp(x) - 1 and exp(x) - 1 - x. */
INLINE void exponentials(const reals x[2], reals all[2], reals beyond_one[2], reals beyond_line[2]) {
    reals power[2], r[2], excess[2], grown[2], more[2];
    exponential(x, power, r, excess);
    BOTH grown[u] = power[u] * (r[u] + excess[u]);
    BOTH more[u] = power[u] - 1.0;
    BOTH all[u] = power[u] + grown[u];
    BOTH beyond_one[u] = grown[u] + more[u];
    BOTH beyond_line[u] = power[u] * excess[u] + ((power[u] * r[u] + more[u]) - x[u]);
}

/* The same to the digits of float32, for x <= 88. */
INLINE void exponentials_of_floats(const floats x[2], floats all[2], floats beyond_one[2], floats beyond_line[2]) {
    const floats least = spread(-87.0f), magic = spread(12582912.0f); /* 1.5 * 2^23 */
    floats shifted[2], k[2], r[2], square[2], low[2], middle[2], high[2], excess[2], power[2], grown[2], more[2];
    BOTH r[u] = larger_floats(x[u], least);
    BOTH shifted[u] = r[u] * 1.44269504f + magic;
    BOTH k[u] = shifted[u] - magic;
    BOTH r[u] = r[u] - k[u] * 0.693359375f;
    BOTH r[u] += k[u] * 2.12194440e-4f;
    BOTH square[u] = r[u] * r[u];
    /* sum of r^j / (j + 2)! */
    BOTH high[u] = 1.0f / 720 + r[u] * (1.0f / 5040);
    BOTH middle[u] = (1.0f / 24 + r[u] * (1.0f / 120)) + square[u] * high[u];
    BOTH low[u] = 1.0f / 2 + r[u] * (1.0f / 6);
    BOTH excess[u] = square[u] * (low[u] + square[u] * middle[u]);
    BOTH power[u] = (floats)((((float_bits)shifted[u] << 23) + 0x3f800000) & (float_bits)(x[u] >= least));
    BOTH more[u] = power[u] - 1.0f;
    BOTH grown[u] = power[u] * (r[u] + excess[u]);
    BOTH all[u] = power[u] + grown[u];
    BOTH beyond_one[u] = grown[u] + more[u];
    BOTH beyond_line[u] = power[u] * excess[u] + ((power[u] * r[u] + more[u]) - x[u]);
}

/* log(1 + y), log(1 + y) - y and 1 / (1 + y), for y > -1, by one division. */
INLINE void logarithms(const reals y[2], reals all[2], reals beyond_line[2], reals reciprocal[2]) {
    const double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
    reals g[2], e[2], f[2], both[2], s[2], z[2], w[2], odd[2], even[2], half[2], bend[2], dropped[2];
    bits top[2], e_bits[2];
    BOTH g[u] = y[u] + 1.0;
    /* g = 2^e m, m between the square roots of 1/2 and 2 */
    BOTH top[u] = (bits)g[u] - 0x3fe6a09e667f3bcdLL;
    BOTH e_bits[u] = top[u] & (int64_t)0xfff0000000000000ULL;
    BOTH f[u] = (reals)((bits)g[u] - e_bits[u]) - 1.0;
    BOTH dropped[u] = choose(y[u] > 1.0, 1.0 - (g[u] - y[u]), y[u] - (g[u] - 1.0)); /* by the rounding of g */
    BOTH f[u] = choose(e_bits[u] == 0, y[u], f[u] + dropped[u] * (reals)(0x3ff0000000000000LL - e_bits[u]));
    BOTH e[u] = (reals)(((plain_bits)(top[u] + 0x3ff0000000000000LL) >> 52) | 0x4330000000000000ULL);
    BOTH e[u] -= 0x1p52 + 1023;
    BOTH both[u] = 1.0 / ((f[u] + 2.0) * g[u]);
    BOTH half[u] = 0.5 * f[u] * f[u];
    BOTH s[u] = f[u] * (both[u] * g[u]);
    BOTH reciprocal[u] = both[u] * (f[u] + 2.0);
    BOTH z[u] = s[u] * s[u];
    BOTH w[u] = z[u] * z[u];
    BOTH odd[u] = w[u] * (3.999999999940941908e-01 + w[u] * (2.222219843214978396e-01 + w[u] * 1.531383769920937332e-01));
    BOTH even[u] = 1.818357216161805012e-01 + w[u] * 1.479819860511658591e-01;
    BOTH even[u] = z[u] * (6.666666666666735130e-01 + w[u] * (2.857142874366239149e-01 + w[u] * even[u]));
    BOTH bend[u] = s[u] * (half[u] + (odd[u] + even[u])) - half[u];
    BOTH all[u] = e[u] * ln2_high + (f[u] + (bend[u] + e[u] * ln2_low));
    BOTH beyond_line[u] = bend[u] + ((e[u] * ln2_high + (f[u] - y[u])) + e[u] * ln2_low);
}

/* The same to the digits of float32. */
INLINE void logarithms_of_floats(const floats y[2], floats all[2], floats beyond_line[2], floats reciprocal[2]) {
    const float ln2 = 0.693147181f;
    floats g[2], e[2], f[2], both[2], s[2], z[2], w[2], curve[2], half[2], bend[2];
    float_bits top[2], e_bits[2];
    BOTH g[u] = y[u] + 1.0f;
    BOTH top[u] = (float_bits)g[u] - 0x3f3504f3;
    BOTH e_bits[u] = top[u] & (int32_t)0xff800000;
    BOTH f[u] = choose_floats(e_bits[u] == 0, y[u], (floats)((float_bits)g[u] - e_bits[u]) - 1.0f);
    BOTH e[u] = __builtin_convertvector(top[u] >> 23, floats);
    BOTH both[u] = 1.0f / ((f[u] + 2.0f) * g[u]);
    BOTH half[u] = 0.5f * f[u] * f[u];
    BOTH s[u] = f[u] * (both[u] * g[u]);
    BOTH reciprocal[u] = both[u] * (f[u] + 2.0f);
    BOTH z[u] = s[u] * s[u];
    BOTH w[u] = z[u] * z[u];
    BOTH curve[u] = z[u] * (0.666666627f + w[u] * 0.284987867f) + w[u] * (0.400009725f + w[u] * 0.242790788f);
    BOTH bend[u] = s[u] * (half[u] + curve[u]) - half[u];
    BOTH all[u] = e[u] * ln2 + (f[u] + bend[u]);
    BOTH beyond_line[u] = bend[u] + (e[u] * ln2 + (f[u] - y[u]));
}

#endif
