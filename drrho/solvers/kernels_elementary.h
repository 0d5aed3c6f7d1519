/* Exponentials and logarithms of vectors, in parts from which differences are taken without cancellation. */

#ifndef DRRHO_KERNELS_ELEMENTARY_H
#define DRRHO_KERNELS_ELEMENTARY_H

#include "kernels.h"

/* exp(x) = power * (1 + r + excess), for x <= 700; what underflows is zero. */
INLINE void exponential(reals x, reals *power, reals *r, reals *excess) {
    const reals least = ALL(-708.0);
    const reals magic = ALL(6755399441055744.0); /* 1.5 * 2^52: the integer is left in the low bits */
    reals held = choose(x < least, least, x);
    reals shifted = held * 1.4426950408889634 + magic;
    reals k = shifted - magic;
    reals rest = held - k * 0x1.62e42fefa39efp-1;
    rest -= k * 0x1.abc9e3b39803fp-56;
    reals square = rest * rest, fourth = square * square;
    /* sum of rest^j / (j + 2)! */
    reals low = (ALL(1.0 / 2) + rest * (1.0 / 6)) + square * (ALL(1.0 / 24) + rest * (1.0 / 120));
    reals middle = (ALL(1.0 / 720) + rest * (1.0 / 5040)) + square * (ALL(1.0 / 40320) + rest * (1.0 / 362880));
    reals high = (ALL(1.0 / 3628800) + rest * (1.0 / 39916800)) +
                 square * (ALL(1.0 / 479001600) + rest * (1.0 / 6227020800) + square * (1.0 / 87178291200));
    bits exponent = ((bits)shifted << 52) + 0x3ff0000000000000LL;
    *power = choose(x < least, ALL(0.0), (reals)exponent);
    *r = rest;
    *excess = square * (low + fourth * (middle + fourth * high));
}

/* exp(x), exp(x) - 1 and exp(x) - 1 - x. */
INLINE void exponentials(reals x, reals *all, reals *beyond_one, reals *beyond_line) {
    reals power, r, excess;
    exponential(x, &power, &r, &excess);
    reals grown = power * (r + excess);
    *all = power + grown;
    *beyond_one = grown + (power - 1.0);
    *beyond_line = power * excess + ((power * r + (power - 1.0)) - x);
}

/* The same to the digits of float32, for x <= 88. */
INLINE void exponentials_of_floats(floats x, floats *all, floats *beyond_one, floats *beyond_line) {
    const floats least = spread(-87.0f), magic = spread(12582912.0f); /* 1.5 * 2^23 */
    floats held = larger_floats(x, least);
    floats shifted = held * 1.44269504f + magic;
    floats k = shifted - magic;
    floats rest = held - k * 0.693359375f;
    rest += k * 2.12194440e-4f;
    floats square = rest * rest;
    /* sum of rest^j / (j + 2)! */
    floats low = 1.0f / 2 + rest * (1.0f / 6), middle = 1.0f / 24 + rest * (1.0f / 120);
    floats high = 1.0f / 720 + rest * (1.0f / 5040);
    floats excess = square * (low + square * (middle + square * high));
    float_bits exponent = ((float_bits)shifted << 23) + 0x3f800000;
    floats power = (floats)(exponent & (float_bits)(x >= least)), more = power - 1.0f;
    floats grown = power * (rest + excess);
    *all = power + grown;
    *beyond_one = grown + more;
    *beyond_line = power * excess + ((power * rest + more) - x);
}

/* log(1 + y), log(1 + y) - y and 1 / (1 + y), for y > -1, by one division. */
INLINE void logarithms(reals y, reals *all, reals *beyond_line, reals *reciprocal) {
    const double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
    reals g = y + 1.0;
    /* g = 2^e m, m between the square roots of 1/2 and 2 */
    bits top = (bits)g - 0x3fe6a09e667f3bcdLL, e_bits = top & (int64_t)0xfff0000000000000ULL;
    reals m = (reals)((bits)g - e_bits);
    plain_bits biased = (plain_bits)(top + 0x3ff0000000000000LL) >> 52;
    reals e = (reals)(biased | 0x4330000000000000ULL) - (0x1p52 + 1023);
    reals dropped = choose(y > 1.0, 1.0 - (g - y), y - (g - 1.0)); /* by the rounding of g */
    reals f = choose(e_bits == 0, y, (m - 1.0) + dropped * (reals)(0x3ff0000000000000LL - e_bits));
    reals both = 1.0 / ((f + 2.0) * g), s = f * (both * g), z = s * s, w = z * z;
    *reciprocal = both * (f + 2.0);
    reals odd = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    reals even = z * (6.666666666666735130e-01 +
                      w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    reals half = 0.5 * f * f, bend = s * (half + (odd + even)) - half;
    *all = e * ln2_high + (f + (bend + e * ln2_low));
    *beyond_line = bend + ((e * ln2_high + (f - y)) + e * ln2_low);
}

#endif
