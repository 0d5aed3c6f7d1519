/* Chi-square balls and penalties: a monotone active set (chi_square.py). */

#include "kernels.h"

/* Ratios less one are (d - origin) / strength + offset, at least -1; the threshold may have no digits for that. */
typedef struct {
    double eta, nu, strength, origin, offset;
    int saturated;
} Support;

/* Moments of the losses in the support. */
typedef struct {
    double kept, dropped; /* mass in and out of it, over all */
    double mean, variance;
} Moments;

static Support supported(double radius, double price, Moments at) {
    Support found = {.origin = at.mean, .offset = at.dropped / at.kept};
    double spread = price / at.kept;
    if (price < 0) {
        double c = 2 * radius * at.kept - at.dropped;
        if (c <= 0 || at.variance <= 0) return (Support){.saturated = 1};
        spread = sqrt(at.variance / c);
    }
    found.eta = at.mean - spread, found.nu = at.mean - at.dropped * spread;
    found.strength = price >= 0 ? price : at.kept * spread;
    return found;
}

typedef struct {
    double floor, origin;
} Part;

INLINE void above(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Part part = *(const Part *)in;
    reals kept[2] = CLEARED, sum[2] = CLEARED, square[2] = CLEARED, dropped[2] = CLEARED;
    reals origin = ALL(part.origin), floor = ALL(part.floor);
    STRETCHES(from, to) {
        PAIRS {
            long i = pair + u * LANES;
            reals d = depth(kind, row, i), m = mass(kind, row, i);
            reals inside = choose(d >= floor, m, ALL(0.0));
            reals y = d - origin, weighted = y * inside;
            kept[u] += inside;
            sum[u] += weighted;
            square[u] += y * weighted;
            if (kind & BASED) dropped[u] += m - inside;
        }
        add_pair(&sums->of[0], kept), add_pair(&sums->of[1], sum), add_pair(&sums->of[2], square);
        if (kind & BASED) add_pair(&sums->of[3], dropped);
    }
}

PASSES(above)

/* Of d >= eta, summed about what is close to the mean. */
static Moments moments_above(const Row *row, double eta, double center) {
    Moments found = {.mean = center};
    for (int attempt = 0; attempt < 3; attempt++) {
        Part part = {eta, found.mean};
        Sums sums;
        over_row(row, above_passes, &part, &sums);
        double kept = result(sums.of[0]), shift = result(sums.of[1]) / kept;
        found.kept = kept / row->all;
        found.dropped = (row->base ? result(sums.of[3]) : row->all - kept) / row->all;
        found.mean += shift;
        found.variance = result(sums.of[2]) / kept - shift * shift;
        if (shift * shift <= 64 * found.variance) break;
    }
    return found;
}

typedef struct {
    Support support;
    double mean, each;
} Tilting;

INLINE void tilt(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held; /* which no store can change */
    const Tilting *tilting = in;
    double strength = tilting->support.strength;
    /* Two factors, as one might overflow; a division would take longer than all else here. */
    double power = ldexp(1.0, -(strength < 0x1p-1022 ? -1023 : ilogb(strength)));
    reals near = ALL(power), rest = ALL(1 / (strength * power));
    reals origin = ALL(tilting->support.origin), offset = ALL(tilting->support.offset);
    reals mean = ALL(tilting->mean), each = ALL(tilting->each);
    reals tilted[2] = CLEARED, gained[2] = CLEARED, squared[2] = CLEARED;
    STRETCHES(from, to) {
        PAIRS {
            long i = pair + u * LANES;
            reals d = depth(kind, row, i), m = mass(kind, row, i);
            reals t = larger((d - origin) * near * rest + offset, ALL(-1.0)), weighted = t * m;
            store(kind, row, i, weighed(kind, row, i, (t + 1.0) * each));
            tilted[u] += weighted;
            gained[u] += weighted * (d - mean);
            squared[u] += weighted * t;
        }
        add_pair(&sums->of[0], tilted), add_pair(&sums->of[1], gained), add_pair(&sums->of[2], squared);
    }
}

PASSES(tilt)

int chi_square(Row *row, double radius, double price, Answer *answer) {
    double largest = (1 / row->share - 1) / 2;
    if (row->range == 0 || largest == 0 || (price >= 0 ? price == 0 : radius >= largest))
        return *answer = at_maximum(row, largest), OK;
    if (price >= 0 ? price > 1 / DBL_MIN : radius == 0) return *answer = at_mean(row), OK;
    Moments now = {1, 0, row->mean, row->variance};
    Support support = supported(radius, price, now);
    while (support.eta > -row->range && !support.saturated) {
        double eta = fmin(support.eta, 0), before = now.dropped;
        now = moments_above(row, eta, now.mean);
        support = supported(radius, price, now);
        if (now.dropped == before) break;
        support.eta = fmax(support.eta, eta); /* it only grows, but for rounding */
    }
    if (support.saturated) return *answer = at_maximum(row, largest), OK;
    Tilting tilting = {support, row->mean, 1 / row->all};
    Sums sums;
    over_row(row, tilt_passes, &tilting, &sums);
    double surplus = result(sums.of[0]) / row->all, half_square = result(sums.of[2]) / row->all / 2;
    double gain = result(sums.of[1]) / row->all / (1 + surplus), strength = support.strength;
    double distance = fmax(half_square - surplus * surplus / 2, 0) / ((1 + surplus) * (1 + surplus)); /* of sum one */
    double dual = strength * (surplus + half_square) + ((support.origin - row->mean) - strength * support.offset);
    if (price >= 0)
        gain -= price * distance;
    else
        dual += strength * radius;
    *answer = (Answer){gain, dual, support.nu, strength, distance, .exactly = NAN};
    into_ball(row, answer, price >= 0 ? -1 : radius, 1 + surplus);
    return OK;
}
