/* Cressie-Read balls and penalties: ratios on a path of powers (cressie_read.py).
 *
 * Ratios are proportional to (1 + y)_+^p, p = 1 / (k - 1), where y = (d - origin) / unit for orders k > 1, and minus
 * that below. About the mean, the power less 1 + p y is summed, which is of second order and of one sign.
 */

#include "kernels_elementary.h"

/* How powers are taken: those of the orders 1.5, 3, 0.5 and -1 by a few operations. LOGARITHMIC: of small orders, whose
 * D is a difference of logarithms. */
enum { SQUARE, ROOT, INVERSE_SQUARE, INVERSE_ROOT, GENERAL, LOGARITHMIC, FORMS };

typedef struct {
    double order, power, inverse_order;
    double origin, rate; /* y = (d - origin) rate */
    double each; /* by which ratios are multiplied that are stored; 0: none are */
    int near_one;
} Powers;

/* The ratio (1 + y)_+^p, the same less 1, less 1 + p y, over (1 + y), and what is summed for small orders. */
typedef struct {
    reals ratio, beyond_one, beyond_line, reciprocal, quotient;
} Power;

INLINE Power power_of(int form, int central, const Powers *of, reals y) {
    Power at;
    const reals zero = ALL(0.0);
    bits outside = y <= -1.0;
    if (form == SQUARE) {
        reals g = larger(y + 1.0, zero);
        at.ratio = g * g, at.reciprocal = g;
        at.beyond_one = choose(outside, ALL(-1.0), y * (y + 2.0));
        at.beyond_line = choose(outside, -1.0 - 2.0 * y, y * y);
    } else if (form == ROOT) {
        reals s = root(larger(y + 1.0, zero)), both = 1.0 / (s * (1.0 + s)), curve = y * (both * s);
        at.ratio = s, at.reciprocal = choose(outside, zero, both * (1.0 + s));
        at.beyond_one = choose(outside, ALL(-1.0), curve);
        at.beyond_line = choose(outside, -1.0 - 0.5 * y, -0.5 * curve * curve);
    } else if (form == INVERSE_SQUARE) {
        reals inverse = 1.0 / (y + 1.0);
        at.ratio = inverse * inverse, at.reciprocal = at.ratio * inverse;
        at.beyond_one = -y * (y + 2.0) * at.ratio;
        at.beyond_line = y * y * (2.0 * y + 3.0) * at.ratio;
    } else if (form == INVERSE_ROOT) {
        reals s = root(y + 1.0), both = 1.0 / (s * (1.0 + s)), inverse = both * (1.0 + s), share = both * s;
        at.ratio = inverse, at.reciprocal = inverse * inverse * inverse;
        at.beyond_one = -y * both;
        at.beyond_line = 0.5 * y * y * (s + 2.0) * both * share;
    } else {
        reals u, bent, beyond_line, reciprocal;
        reals held = of->power > 0 ? choose(outside, zero, y) : y;
        logarithms(held, &u, &bent, &reciprocal);
        exponentials(u * of->power, &at.ratio, &at.beyond_one, &beyond_line);
        at.beyond_line = beyond_line + bent * of->power;
        at.reciprocal = at.ratio * reciprocal;
        if (form == LOGARITHMIC) {
            reals all, beyond, curved;
            exponentials(u * (of->power * of->order), &all, &beyond, &curved);
            at.quotient = curved * of->inverse_order + of->power * (central ? bent : u);
        } else if (of->power > 0) {
            at.ratio = choose(outside, zero, at.ratio), at.reciprocal = choose(outside, zero, at.reciprocal);
            at.beyond_one = choose(outside, ALL(-1.0), at.beyond_one);
            at.beyond_line = choose(outside, -1.0 - of->power * y, at.beyond_line);
        }
    }
    return at;
}

INLINE void sum_powers(int form, int central, int kind, const Row *from_row, const void *in, long from, long to,
                       Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Powers of = *(const Powers *)in;
    reals rate = ALL(of.rate), origin = ALL(of.origin), zero = ALL(0.0), sum[4] = {zero, zero, zero, zero};
    STRETCHES(from, to) {
        VECTORS {
            reals y = (depth(kind, row, i) - origin) * rate, m = mass(kind, row, i);
            Power at = power_of(form, central, &of, y);
            if (of.each != 0) store(kind, row, i, weighed(kind, row, i, at.ratio * of.each));
            reals ym = y * m;
            sum[0] += (central ? at.beyond_line : at.ratio) * m;
            sum[1] += (central ? at.beyond_one : at.ratio) * ym;
            sum[2] += central || of.near_one ? at.reciprocal * y * ym : at.reciprocal * m;
            if (form == LOGARITHMIC) sum[3] += at.quotient * m;
        }
        for (int j = 0; j < (form == LOGARITHMIC ? 4 : 3); j++) add(&sums->of[j], sum[j]), sum[j] = zero;
    }
}

#define BOTH_ORIGINS(form)                                                                                     \
    INLINE void form##_central(int kind, const Row *row, const void *in, long from, long to, Sums *sums) {    \
        sum_powers(form, 1, kind, row, in, from, to, sums);                                                   \
    }                                                                                                          \
    INLINE void form##_at_top(int kind, const Row *row, const void *in, long from, long to, Sums *sums) {     \
        sum_powers(form, 0, kind, row, in, from, to, sums);                                                   \
    }                                                                                                          \
    PASSES(form##_central)                                                                                     \
    PASSES(form##_at_top)

BOTH_ORIGINS(SQUARE)
BOTH_ORIGINS(ROOT)
BOTH_ORIGINS(INVERSE_SQUARE)
BOTH_ORIGINS(INVERSE_ROOT)
BOTH_ORIGINS(GENERAL)
BOTH_ORIGINS(LOGARITHMIC)

static Pass *const *const POWER_PASSES[FORMS][2] = {
    {SQUARE_at_top_passes, SQUARE_central_passes},
    {ROOT_at_top_passes, ROOT_central_passes},
    {INVERSE_SQUARE_at_top_passes, INVERSE_SQUARE_central_passes},
    {INVERSE_ROOT_at_top_passes, INVERSE_ROOT_central_passes},
    {GENERAL_at_top_passes, GENERAL_central_passes},
    {LOGARITHMIC_at_top_passes, LOGARITHMIC_central_passes},
};

/* In float32 the forms that are a few operations: the same terms, of a row without base weights. */
INLINE void sum_roughly(int form, int central, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Powers of = *(const Powers *)in;
    long pairs = to < row->whole ? to : row->whole;
    floats rate = spread((float)(of.rate * row->scale)), zero = {0}, sum[3] = {zero, zero, zero};
    Split origin = split(row->top + of.origin / row->scale);
    STRETCHES(from, pairs) {
        for (long i = begin; i < end; i += PAIR) {
            floats y = less(load_floats(row, i), origin) * rate, ratio, beyond_one, beyond_line, reciprocal;
            if (form == SQUARE) {
                floats g = larger_floats(y + 1.0f, zero);
                ratio = g * g, reciprocal = g;
                beyond_line = choose_floats(y <= -1.0f, -1.0f - 2.0f * y, y * y);
                beyond_one = choose_floats(y <= -1.0f, spread(-1.0f), y * (y + 2.0f));
            } else {
                floats inverse = 1.0f / (y + 1.0f);
                ratio = inverse * inverse, reciprocal = ratio * inverse;
                beyond_one = -y * (y + 2.0f) * ratio, beyond_line = y * y * (2.0f * y + 3.0f) * ratio;
            }
            sum[0] += central ? beyond_line : ratio;
            sum[1] += (central ? beyond_one : ratio) * y;
            sum[2] += central ? reciprocal * y * y : reciprocal;
        }
        for (int j = 0; j < 3; j++) add_floats(&sums->of[j], sum[j]), sum[j] = zero;
    }
    if (pairs < to) sum_powers(form, central, SINGLE, row, in, pairs, to, sums);
}

#define ROUGHLY(form)                                                                                          \
    static void form##_roughly_central(const Row *row, const void *in, long from, long to, Sums *sums) {      \
        sum_roughly(form, 1, row, in, from, to, sums);                                                        \
    }                                                                                                          \
    static void form##_roughly_at_top(const Row *row, const void *in, long from, long to, Sums *sums) {       \
        sum_roughly(form, 0, row, in, from, to, sums);                                                        \
    }

ROUGHLY(SQUARE)
ROUGHLY(INVERSE_SQUARE)

static Passes ROUGH_PASSES[FORMS][2] = {
    [SQUARE] = {{NULL, NULL, SQUARE_roughly_at_top, NULL}, {NULL, NULL, SQUARE_roughly_central, NULL}},
    [INVERSE_SQUARE] = {{NULL, NULL, INVERSE_SQUARE_roughly_at_top, NULL},
                        {NULL, NULL, INVERSE_SQUARE_roughly_central, NULL}},
};

INLINE int form_of(double k) {
    if (k == 1.5) return SQUARE;
    if (k == 3) return ROOT;
    if (k == 0.5) return INVERSE_SQUARE;
    if (k == -1) return INVERSE_ROOT;
    return fabs(k) < 0.25 ? LOGARITHMIC : GENERAL;
}

/* At a distance v of the maximum from the pole, or from the edge of the support. */
typedef struct {
    double origin, unit;              /* of d, and v there */
    double log_total, gain;           /* of the mean power; mean of (d - origin) under the weights */
    double distance, slope;           /* D, and d log D / d log v */
    double mean_slope, total_slope;   /* of (k - 1) log(mean power of v), and of log_total, also over log v */
} Path;

static Path path_at(const Row *row, double k, double v, double each) {
    double sign = k < 1 ? 1 : -1, far = 30, all = row->all, about_mean = v - sign * row->mean;
    int central = k < 1 ? v > 1e-3 * about_mean : about_mean > -0.3 * row->mean;
    central = central && log(v / about_mean) / (k - 1) <= far;
    Path path = {.origin = central ? row->mean : 0, .unit = central ? about_mean : v};
    int near_one = fabs(k - 1) < 0.1;
    Powers of = {k, 1 / (k - 1), fabs(k) < 1e-20 ? 0 : 1 / k, path.origin, -sign / path.unit, each, near_one};
    Sums sums;
    int form = form_of(k);
    over_row(row, row->rough ? ROUGH_PASSES[form][central] : POWER_PASSES[form][central], &of, &sums);
    double first = result(sums.of[0]) / all, third = result(sums.of[2]) / all, quotient = result(sums.of[3]) / all;
    path.log_total = central ? log1p(first) : log(first);
    double total = exp(path.log_total), y = result(sums.of[1]) / all / total, rate = exp((1 - k) * path.log_total);
    double w_mean = 1 + y, curved = third / total, h_mean, spread;
    path.gain = -sign * path.unit * y;
    if (central || near_one) { /* the sum is of y^2 / (1 + y), and 1 / (1 + y) = 1 - y + y^2 / (1 + y) */
        h_mean = 1 - y + curved;
        spread = curved * w_mean - y * y;
    } else {
        h_mean = curved;
        spread = w_mean * h_mean - 1;
    }
    if (fabs(k) < 0.25) {
        double log_rate = -k * path.log_total;
        path.distance = (exp(log_rate) * quotient + (k ? expm1(log_rate) / k : -path.log_total)) / (k - 1);
    } else {
        path.distance = (expm1((1 - k) * path.log_total) + rate * y) / (k * (k - 1));
    }
    path.slope = -v * rate / path.unit * spread / ((k - 1) * (k - 1)) / path.distance;
    path.mean_slope = v * h_mean / path.unit;
    path.total_slope = (path.mean_slope - v / path.unit) / (k - 1);
    return path;
}

/* What is zero at the solution of a ball or, where there is a unit, of a penalty. */
static double residual(const Path *path, double k, double radius, double unit) {
    return unit ? log(unit / path->unit) - (k - 1) * path->log_total : log(path->distance) - log(radius);
}

/* In x = log v, of a ball or, where there is a unit, which is price / |k - 1|, of a penalty. Foretells log_total at x. */
static int find_pole(const Row *row, double k, double radius, double unit, double tolerance, int iterations, double *x,
                     double *log_total, double curvature, int to_the_end, Search *search) {
    const double longest = 10;
    *search = open_search(tolerance, iterations, 50, longest, longest, log(1e-290), log(1e290));
    search->from_above = 1, search->curvature = curvature;
    search->close = to_the_end ? 0 : tolerance > 1e-7 ? 1e-6 : closeness(row);
    for (;;) {
        double at = *x;
        Path path = path_at(row, k, exp(at), 0);
        double value = residual(&path, k, radius, unit);
        double slope = unit ? -path.mean_slope : path.slope;
        int state = advance(search, x, fmax(value, -INFINITY), -value / slope, 1);
        *log_total = path.log_total + path.total_slope * (*x - at);
        if (state != AGAIN) return state != LOST;
    }
}

static double starting_point(const Row *row, double k, double unit) {
    double sign = k < 1 ? 1 : -1;
    return log(fmax(unit + sign * row->mean, 1e-3 * unit));
}

static double maximal_radius(const Row *row, double k) {
    if (k <= 0) return row->share < 1 ? INFINITY : 0;
    return expm1(-(k - 1) * log(row->share)) / (k * (k - 1));
}

int powers(Row *row, double k, double radius, double price, Answer *answer) {
    double largest = row->range == 0 ? 0 : maximal_radius(row, k), x, foretold, curvature = NAN;
    if (row->range == 0 || (price >= 0 ? price == 0 || largest == 0 : radius >= largest))
        return *answer = at_maximum(row, largest), OK;
    if (price >= 0 ? price > 1e280 : radius == 0) return *answer = at_mean(row), OK;
    double unit = price >= 0 ? price / fabs(k - 1) : 0, away = fabs(k - 1) * sqrt(2 * radius);
    double tolerance = price < 0 ? tolerated(row, radius) : 450 * DBL_EPSILON;
    Row sample;
    Search search;
    x = starting_point(row, k, unit ? unit : sqrt(row->variance) / away);
    if (take_sample(row, &sample)) {
        find_pole(&sample, k, radius, unit, 1e-6, 41, &x, &foretold, NAN, k > 2, &search);
        curvature = search.curvature;
        free((void *)sample.z);
    }
    Row rough = roughened(row);
    if (rough.rough && (form_of(k) == SQUARE || form_of(k) == INVERSE_SQUARE)) {
        double near = x;
        if (find_pole(&rough, k, radius, unit, 1e-5, 41, &near, &foretold, curvature, 0, &search) && !search.saturated)
            x = near, curvature = search.curvature;
    }
    Path path;
    for (int to_the_end = k > 2;; to_the_end = 1) { /* above order 2 no slope tells of losses that come in */
        if (!find_pole(row, k, radius, unit, tolerance, 400, &x, &foretold, curvature, to_the_end, &search))
            return DECLINED;
        if (search.saturated && price < 0 && k < 1) { /* weights of 1e-290 beside the maximum's may be in the ball */
            if (!(fabs(foretold) < 600)) foretold = 0;
            path = path_at(row, k, exp(x), exp(-foretold) / row->all);
            if (path.distance <= radius) break;
        }
        if (search.saturated) { /* where the maximum is not in the ball, or has a price, rounding has no say */
            if (price >= 0 || !(radius >= largest * (1 - 1e-8))) return DECLINED;
            return *answer = at_maximum(row, largest), OK;
        }
        if (search.missed && k > 2) return DECLINED; /* the ratios jump between two numbers, and are to be mixed */
        if (!(fabs(foretold) < 600)) foretold = 0;
        path = path_at(row, k, exp(x), exp(-foretold) / row->all);
        /* A slope that has cancelled, as next to a far outlier, may have misled the last step. */
        if (to_the_end || search.missed || fabs(residual(&path, k, radius, unit)) <= 8 * tolerance) break;
    }
    /* t^(k - 1) = exp(log_total)^(1 - k) (1 + y) = 1 + (k - 1) s, and mean phi*(s) = (k - 1) D where mean t = 1. */
    double shift = expm1((1 - k) * path.log_total) / (k - 1);
    double strength = price >= 0 ? price : fabs(k - 1) * exp((k - 1) * path.log_total) * path.unit;
    double threshold = path.origin - strength * shift, gain = path.gain + (path.origin - row->mean);
    double dual = strength * ((k - 1) * path.distance - shift) + (path.origin - row->mean);
    *answer = (Answer){gain, dual, threshold, strength, path.distance, .exactly = NAN};
    if (price >= 0)
        answer->gain -= price * path.distance;
    else
        answer->dual += strength * radius;
    into_ball(row, answer, price >= 0 ? -1 : radius, exp(path.log_total - foretold));
    return OK;
}
