/* KL with capped ratios: balls and penalties (generic.py solves them from phi* alone).
 *
 * Ratios are exp(min(s, limit)), s = (d - origin) / strength + offset, limit = log(1 / alpha). The origin is the mean,
 * or, where the strength is small, the loss at which the worst alpha ends: the ratios of that need all digits of s.
 */

#include "kernels_elementary.h"
#include "kernels_tail.h"

typedef struct {
    double rate, origin, offset, limit;
    double mean, cap; /* of the row; ratio at the limit, less one */
} Capped;

/* With e the ratio less one and c = min(s, limit): sums of e, of phi = c e - (exp(c) - 1 - c), and below the limit of
 * h = exp(c), h c and h c^2. */
INLINE void capped_moments(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Capped of = *(const Capped *)in;
    reals rate = ALL(of.rate), origin = ALL(of.origin), offset = ALL(of.offset), limit = ALL(of.limit);
    reals zero = ALL(0.0), sum[5] = {zero, zero, zero, zero, zero};
    STRETCHES(from, to) {
        for (long pair = begin; pair < end; pair += PAIR) {
            reals s[2], m[2], c[2], ratio[2], e[2], beyond[2], h[2];
            BOTH s[u] = (depth(kind, row, pair + u * LANES) - origin) * rate + offset;
            BOTH m[u] = mass(kind, row, pair + u * LANES);
            BOTH c[u] = smaller(s[u], limit);
            exponentials(c, ratio, e, beyond);
            BOTH h[u] = choose(s[u] < limit, ratio[u] * m[u], zero);
            BOTH sum[0] += e[u] * m[u];
            BOTH sum[1] += (c[u] * e[u] - beyond[u]) * m[u];
            BOTH sum[2] += h[u];
            BOTH h[u] *= c[u];
            BOTH sum[3] += h[u];
            BOTH sum[4] += h[u] * c[u];
        }
        for (int j = 0; j < 5; j++) add(&sums->of[j], sum[j]), sum[j] = zero;
    }
}

PASSES(capped_moments)

INLINE void capped_roughly(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Capped of = *(const Capped *)in;
    const Line line = line_of(row, of.origin, of.rate);
    floats offset = spread((float)of.offset), limit = spread((float)of.limit), zero = {0};
    floats sum[5] = {zero, zero, zero, zero, zero};
    STRETCHES(from, to) {
        ROUGH_PAIRS {
            floats s[2], m[2], c[2], ratio[2], e[2], beyond[2], h[2];
            BOTH s[u] = on_line(kind, row, AT(u), &line) + offset;
            BOTH m[u] = rough_mass(kind, row, AT(u), LEFT(u));
            BOTH c[u] = smaller_floats(s[u], limit);
            exponentials_of_floats(c, ratio, e, beyond);
            BOTH h[u] = choose_floats(s[u] < limit, ratio[u] * m[u], zero);
            BOTH sum[0] += e[u] * m[u];
            BOTH sum[1] += (c[u] * e[u] - beyond[u]) * m[u];
            BOTH sum[2] += h[u];
            BOTH h[u] *= c[u];
            BOTH sum[3] += h[u];
            BOTH sum[4] += h[u] * c[u];
        }
        for (int j = 0; j < 5; j++) add_floats(&sums->of[j], sum[j]), sum[j] = zero;
    }
}

PASSES(capped_roughly)

/* Stores ratios; sums of e, e (d - mean), phi, of phi*(s) - s, and of s - limit where it is positive. */
INLINE void capped_weights(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Capped of = *(const Capped *)in;
    reals rate = ALL(of.rate), origin = ALL(of.origin), offset = ALL(of.offset), limit = ALL(of.limit);
    reals mean = ALL(of.mean), cap = ALL(of.cap), each = ALL(1 / row->all);
    reals zero = ALL(0.0), sum[5] = {zero, zero, zero, zero, zero};
    STRETCHES(from, to) {
        for (long pair = begin; pair < end; pair += PAIR) {
            reals d[2], s[2], m[2], c[2], ratio[2], e[2], beyond[2], over[2];
            BOTH d[u] = depth(kind, row, pair + u * LANES);
            BOTH s[u] = (d[u] - origin) * rate + offset;
            BOTH m[u] = mass(kind, row, pair + u * LANES);
            BOTH c[u] = smaller(s[u], limit);
            exponentials(c, ratio, e, beyond);
            BOTH store(kind, row, pair + u * LANES, weighed(kind, row, pair + u * LANES, ratio[u] * each));
            BOTH over[u] = (s[u] - c[u]) * m[u];
            BOTH sum[0] += e[u] * m[u];
            BOTH sum[1] += e[u] * (d[u] - mean) * m[u];
            BOTH sum[2] += (c[u] * e[u] - beyond[u]) * m[u];
            BOTH sum[3] += beyond[u] * m[u] + over[u] * cap;
            BOTH sum[4] += over[u];
        }
        for (int j = 0; j < 5; j++) add(&sums->of[j], sum[j]), sum[j] = zero;
    }
}

PASSES(capped_weights)

/* phi(1 + e), near e = 0 by its series. */
static double phi(double e) {
    if (fabs(e) > 0.1) return e <= -1 ? 1 : (1 + e) * log1p(e) - e;
    double total = 0, power = e * e;
    for (int j = 2; j < 20; j++, power *= -e) total += power / (j * (j - 1.0));
    return total;
}

/* At one strength: the offset that makes the ratios' mean one, by Newton on it as a function of exp(offset), which is
 * concave: from below it stays below. */
typedef struct {
    double offset, low, high; /* bounds of the offset at this strength */
    double surplus, distance, h, hs, hss, step;
    int tries;
} Balance;

static void measure(const Row *row, const Capped *of, Balance *at) {
    Sums sums;
    over_row(row, row->rough ? capped_roughly_passes : capped_moments_passes, of, &sums);
    double all = row->all;
    at->surplus = result(sums.of[0]) / all, at->distance = result(sums.of[1]) / all, at->h = result(sums.of[2]) / all;
    at->hs = result(sums.of[3]) / all, at->hss = result(sums.of[4]) / all;
    at->step = log1p(-at->surplus / at->h);
    if (at->surplus > 0)
        at->high = fmin(at->high, of->offset);
    else
        at->low = fmax(at->low, of->offset);
}

static void bound_offset(const Row *row, double origin, double rate, Balance *at) {
    /* Some ratio is at least one, and some at most. */
    at->low = rate * origin, at->high = rate * (row->range + origin), at->tries = 0;
    at->low -= 1e-12 * (1 + fabs(at->low)), at->high += 1e-12 * (1 + at->high);
}

/* Whether the offset is so near to where the ratios' mean is one that Newton's step leads there. */
INLINE int balanced(const Balance *at, double enough) {
    double least = 8 * DBL_EPSILON * fmax(fabs(at->offset), 1e-2);
    return at->high - at->low <= least || (isfinite(at->step) && at->h > 0 && fabs(at->step) <= fmax(enough, least));
}

static int collapsed(const Balance *at) {
    return at->high - at->low <= 8 * DBL_EPSILON * fmax(fabs(at->offset), 1e-2);
}

/* In x = log strength; a penalty (radius < 0) only balances the offset. */
static int find_multipliers(const Row *row, double radius, double limit, double tolerance, int iterations,
                            double least, double origin, int to_the_end, double *x, double *offset, int *saturated) {
    const double longest = 4;
    Search search = open_search(tolerance, iterations, 60, longest, longest, log(least), log(1e290));
    Balance at = {.offset = *offset};
    search.close = to_the_end ? 0 : tolerance > 1e-7 ? 1e-6 : closeness(row), *saturated = 0;
    bound_offset(row, origin, exp(-*x), &at);
    at.offset = fmin(fmax(at.offset, at.low), at.high);
    for (int iteration = 0; iteration < iterations; iteration++) {
        double rate = exp(-*x), unit = fmin(1, sqrt(row->variance) * rate), enough = (row->rough ? 1e-5 : 1e-7) * unit;
        measure(row, &(Capped){rate, origin, at.offset, limit, 0, 0}, &at);
        double step = isfinite(at.step) && !collapsed(&at) ? at.step : 0;
        double distance = at.distance + at.hs * step; /* at the offset that the step leads to */
        double value = log(distance > 0 ? distance : at.distance) - log(radius), mean_s = at.hs / at.h;
        /* D is off by the square of what the offset is: enough to tell on which side of the radius it is, unless that
         * leaves nothing of D. */
        double felt = row->rough ? 0.2 * sqrt(fmin(fabs(value), 1)) : fmin(fabs(value), 0.1) * fmin(1, sqrt(radius));
        if (radius >= 0 && distance > 0) enough = fmax(enough, felt * unit);
        if (balanced(&at, enough)) {
            *offset = at.offset + step;
            if (radius < 0) return 1;
            double newton = value * distance / (at.hss - at.hs * mean_s), before = *x;
            if (!isfinite(newton)) newton = value > 0 ? longest : -longest;
            int state = advance(&search, x, value, fmin(fmax(newton, -longest), longest), 1);
            *saturated = search.saturated;
            if (state == LOST) return 0;
            /* So that E_h[s] stays: d offset / d log strength = E_h[s] - offset. */
            double moved = *x - before, followed = *offset - (mean_s - *offset) * expm1(-moved);
            if (moved != 0 && isfinite(followed)) *offset = followed;
            if (state != AGAIN) return 1;
            bound_offset(row, origin, exp(-*x), &at);
            at.offset = fmin(fmax(*offset, at.low), at.high);
            continue;
        }
        double proposal = at.offset + at.step;
        int trusted = proposal > at.low && proposal < at.high && ++at.tries < 40;
        at.offset = trusted ? proposal : (at.low + at.high) / 2;
    }
    return 0;
}

/* What balances the ratios, and lies in the ball, at a strength of no less; returns whether there is such a thing. */
static int balance(const Row *row, double alpha, double radius, double price, double least, double origin,
                   int to_the_end, double *x, double *offset) {
    double limit = -log(alpha), tolerance = price < 0 ? tolerated(row, radius) : 450 * DBL_EPSILON;
    int saturated = 0;
    *x = price >= 0 ? log(price) : fmax(0.5 * log(row->variance / (2 * radius)), log(least));
    /* Without a cap, were the losses normal; or from below; or, where the strength is small, next to the origin. */
    double rate = exp(-*x);
    *offset = origin != row->mean ? 0 : rate * -origin > 4 ? rate * origin : -0.5 * row->variance * rate * rate;
    if (price >= 0) radius = -1;
    Row sample;
    if (take_sample(row, &sample)) {
        double rough_x = *x, rough = *offset;
        int found = find_multipliers(&sample, radius, limit, 1e-5, 60, least, origin, 0, &rough_x, &rough, &saturated);
        if (found && !saturated) *x = rough_x, *offset = rough;
        free((void *)sample.z);
    }
    Row rough_row = roughened(row);
    if (rough_row.rough) {
        double rough_x = *x, rough = *offset;
        int found = find_multipliers(&rough_row, radius, limit, 1e-5, 60, least, origin, 0, &rough_x, &rough, &saturated);
        if (found && !saturated) *x = rough_x, *offset = rough;
    }
    return find_multipliers(row, radius, limit, tolerance, 400, least, origin, to_the_end, x, offset, &saturated) &&
           !saturated;
}

static int capped_to(Row *row, double alpha, double radius, double price, int to_the_end, Answer *answer) {
    const double least = 1e-290, usual = 1e-4; /* strengths */
    double limit = -log(alpha), all = row->all, origin = row->mean, x, offset;
    int hard = row->range == 0 || alpha == 1 || (price >= 0 && price < least), found = 0;
    if (!hard && (price >= 0 ? price > 1e280 : radius == 0)) return *answer = at_mean(row), OK;
    if (!hard && (price < 0 || price >= usual)) found = balance(row, alpha, radius, price, usual, origin, to_the_end, &x, &offset);
    if (!found) { /* the maximum under the cap, or next to it */
        Tail tail = {0};
        int status = tail_of(row, alpha, &tail);
        if (status != OK) return status;
        double lower = fmax(all - tail.higher - tail.equal, 0);
        double largest = (tail.higher * phi(tail.above) + tail.equal * phi(tail.tied) + lower) / all;
        if (hard || (price < 0 && radius >= largest)) {
            status = tail_mean(row, alpha, answer);
            if (status == OK) answer->distance = largest;
            return status;
        }
        origin = tail.depth;
        if (!balance(row, alpha, radius, price, least, origin, to_the_end, &x, &offset)) return DECLINED;
    }
    double strength = price >= 0 ? price : exp(x);
    Capped of = {price >= 0 ? 1 / price : exp(-x), origin, offset, limit, row->mean, (1 - alpha) / alpha};
    Sums sums;
    over_row(row, capped_weights_passes, &of, &sums);
    double surplus = result(sums.of[0]) / all;
    double gain = result(sums.of[1]) / all / (1 + surplus), over = result(sums.of[4]) / all;
    double distance = result(sums.of[2]) / all, dual = strength * (result(sums.of[3]) / all);
    if (fabs(surplus) > 4 * DBL_EPSILON) distance = fmax(distance - surplus * ((row->mean + gain - origin) / strength + offset), 0);
    if (price < 0 && !to_the_end && !(fabs(log(distance) - log(radius)) <= 8 * tolerated(row, radius)))
        return capped_to(row, alpha, radius, price, 1, answer); /* its last step was misled */
    if (price >= 0)
        gain -= price * distance;
    else
        dual += strength * radius;
    *answer = (Answer){gain, dual, origin - strength * offset, strength, distance,
                       -strength * over / (alpha * alpha), .exactly = NAN};
    into_ball(row, answer, price >= 0 ? -1 : radius, 1 + surplus);
    return OK;
}

int capped(Row *row, double alpha, double radius, double price, Answer *answer) {
    return capped_to(row, alpha, radius, price, 0, answer);
}
