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

INLINE Power power_of(int form, reals y) {
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
    } else {
        reals s = root(y + 1.0), both = 1.0 / (s * (1.0 + s)), inverse = both * (1.0 + s), share = both * s;
        at.ratio = inverse, at.reciprocal = inverse * inverse * inverse;
        at.beyond_one = -y * both;
        at.beyond_line = 0.5 * y * y * (s + 2.0) * both * share;
    }
    return at;
}

/* The same of all other orders, by logarithms. */
INLINE void powers_of(int form, int central, const Powers *of, const reals y[2], Power at[2]) {
    const reals zero = ALL(0.0);
    reals held[2], logs[2], bent[2], reciprocal[2], ratio[2], beyond_one[2], beyond_line[2];
    BOTH held[u] = of->power > 0 ? choose(y[u] <= -1.0, zero, y[u]) : y[u];
    logarithms(held, logs, bent, reciprocal);
    BOTH held[u] = logs[u] * of->power;
    exponentials(held, ratio, beyond_one, beyond_line);
    BOTH at[u] = (Power){ratio[u], beyond_one[u], beyond_line[u] + bent[u] * of->power, ratio[u] * reciprocal[u], zero};
    if (form == LOGARITHMIC) {
        BOTH held[u] = logs[u] * (of->power * of->order);
        exponentials(held, ratio, beyond_one, beyond_line);
        BOTH at[u].quotient = beyond_line[u] * of->inverse_order + of->power * (central ? bent[u] : logs[u]);
    } else if (of->power > 0) {
        BOTH at[u].ratio = choose(y[u] <= -1.0, zero, at[u].ratio);
        BOTH at[u].reciprocal = choose(y[u] <= -1.0, zero, at[u].reciprocal);
        BOTH at[u].beyond_one = choose(y[u] <= -1.0, ALL(-1.0), at[u].beyond_one);
        BOTH at[u].beyond_line = choose(y[u] <= -1.0, -1.0 - of->power * y[u], at[u].beyond_line);
    }
}

INLINE void add_power(int central, int near_one, const Power *at, reals y, reals m, reals sum[4]) {
    reals ym = y * m;
    sum[0] += (central ? at->beyond_line : at->ratio) * m;
    sum[1] += (central ? at->beyond_one : at->ratio) * ym;
    sum[2] += central || near_one ? at->reciprocal * y * ym : at->reciprocal * m;
}

INLINE void sum_powers(int form, int central, int kind, const Row *from_row, const void *in, long from, long to,
                       Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Powers of = *(const Powers *)in;
    reals rate = ALL(of.rate), origin = ALL(of.origin), zero = ALL(0.0), sum[4] = {zero, zero, zero, zero};
    STRETCHES(from, to) {
        if (form < GENERAL) VECTORS { /* whose roots and divisions do not gain by turns */
            reals y = (depth(kind, row, i) - origin) * rate;
            Power at = power_of(form, y);
            if (of.each != 0) store(kind, row, i, weighed(kind, row, i, at.ratio * of.each));
            add_power(central, of.near_one, &at, y, mass(kind, row, i), sum);
        } else for (long pair = begin; pair < end; pair += PAIR) {
            reals y[2];
            Power at[2];
            BOTH y[u] = (depth(kind, row, pair + u * LANES) - origin) * rate;
            powers_of(form, central, &of, y, at);
            if (of.each != 0)
                BOTH store(kind, row, pair + u * LANES, weighed(kind, row, pair + u * LANES, at[u].ratio * of.each));
            BOTH {
                reals m = mass(kind, row, pair + u * LANES);
                add_power(central, of.near_one, &at[u], y[u], m, sum);
                if (form == LOGARITHMIC) sum[3] += at[u].quotient * m;
            }
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

/* The same in float32. */
typedef struct {
    floats ratio, beyond_one, beyond_line, reciprocal;
} Rough;

INLINE Rough roughly_at(int form, floats y) {
    const floats zero = {0};
    float_bits outside = y <= -1.0f;
    Rough at;
    if (form == SQUARE) {
        floats g = larger_floats(y + 1.0f, zero);
        at.ratio = g * g, at.reciprocal = g;
        at.beyond_line = choose_floats(outside, -1.0f - 2.0f * y, y * y);
        at.beyond_one = choose_floats(outside, spread(-1.0f), y * (y + 2.0f));
    } else if (form == ROOT) {
        floats s = root_of_floats(larger_floats(y + 1.0f, zero)), both = 1.0f / (s * (1.0f + s)), curve = y * (both * s);
        at.ratio = s, at.reciprocal = choose_floats(outside, zero, both * (1.0f + s));
        at.beyond_one = choose_floats(outside, spread(-1.0f), curve);
        at.beyond_line = choose_floats(outside, -1.0f - 0.5f * y, -0.5f * curve * curve);
    } else if (form == INVERSE_SQUARE) {
        floats inverse = 1.0f / (y + 1.0f);
        at.ratio = inverse * inverse, at.reciprocal = at.ratio * inverse;
        at.beyond_one = -y * (y + 2.0f) * at.ratio, at.beyond_line = y * y * (2.0f * y + 3.0f) * at.ratio;
    } else {
        floats s = root_of_floats(y + 1.0f), both = 1.0f / (s * (1.0f + s)), inverse = both * (1.0f + s);
        at.ratio = inverse, at.reciprocal = inverse * inverse * inverse;
        at.beyond_one = -y * both, at.beyond_line = 0.5f * y * y * (s + 2.0f) * both * both * s;
    }
    return at;
}

INLINE void add_roughly(int central, int near_one, const Rough *at, floats y, floats m, floats sum[3]) {
    floats ym = y * m;
    sum[0] += (central ? at->beyond_line : at->ratio) * m;
    sum[1] += (central ? at->beyond_one : at->ratio) * ym;
    sum[2] += central || near_one ? at->reciprocal * y * ym : at->reciprocal * m;
}

/* The same sums in float32, but for those of small orders. */
INLINE void sum_roughly(int form, int central, int kind, const Row *from_row, const void *in, long from, long to,
                        Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Powers of = *(const Powers *)in;
    const Line line = line_of(row, of.origin, of.rate);
    floats zero = {0}, power = spread((float)of.power), sum[3] = {zero, zero, zero};
    STRETCHES(from, to) {
        if (form < GENERAL) for (long i = begin; i < end; i += PAIR) {
            floats y = on_line(kind, row, i, &line);
            Rough at = roughly_at(form, y);
            add_roughly(central, of.near_one, &at, y, rough_mass(kind, row, i, 1), sum);
        } else ROUGH_PAIRS {
            floats y[2], held[2], logs[2], bent[2], ratio[2], beyond_one[2], beyond_line[2], reciprocal[2];
            BOTH y[u] = on_line(kind, row, AT(u), &line);
            BOTH held[u] = of.power > 0 ? choose_floats(y[u] <= -1.0f, zero, y[u]) : y[u];
            logarithms_of_floats(held, logs, bent, reciprocal);
            BOTH held[u] = logs[u] * power;
            exponentials_of_floats(held, ratio, beyond_one, beyond_line);
            BOTH {
                Rough at = {ratio[u], beyond_one[u], beyond_line[u] + bent[u] * power, ratio[u] * reciprocal[u]};
                if (of.power > 0) {
                    float_bits outside = y[u] <= -1.0f;
                    at.ratio = choose_floats(outside, zero, at.ratio);
                    at.reciprocal = choose_floats(outside, zero, at.reciprocal);
                    at.beyond_one = choose_floats(outside, spread(-1.0f), at.beyond_one);
                    at.beyond_line = choose_floats(outside, -1.0f - power * y[u], at.beyond_line);
                }
                add_roughly(central, of.near_one, &at, y[u], rough_mass(kind, row, AT(u), LEFT(u)), sum);
            }
        }
        for (int j = 0; j < 3; j++) add_floats(&sums->of[j], sum[j]), sum[j] = zero;
    }
}

#define ROUGHLY(form)                                                                                          \
    INLINE void form##_roughly_central(int kind, const Row *row, const void *in, long from, long to, Sums *sums) { \
        sum_roughly(form, 1, kind, row, in, from, to, sums);                                                  \
    }                                                                                                          \
    INLINE void form##_roughly_at_top(int kind, const Row *row, const void *in, long from, long to, Sums *sums) { \
        sum_roughly(form, 0, kind, row, in, from, to, sums);                                                  \
    }                                                                                                          \
    PASSES(form##_roughly_central)                                                                             \
    PASSES(form##_roughly_at_top)

ROUGHLY(SQUARE)
ROUGHLY(ROOT)
ROUGHLY(INVERSE_SQUARE)
ROUGHLY(INVERSE_ROOT)
ROUGHLY(GENERAL)

static Pass *const *const ROUGH_PASSES[LOGARITHMIC][2] = {
    {SQUARE_roughly_at_top_passes, SQUARE_roughly_central_passes},
    {ROOT_roughly_at_top_passes, ROOT_roughly_central_passes},
    {INVERSE_SQUARE_roughly_at_top_passes, INVERSE_SQUARE_roughly_central_passes},
    {INVERSE_ROOT_roughly_at_top_passes, INVERSE_ROOT_roughly_central_passes},
    {GENERAL_roughly_at_top_passes, GENERAL_roughly_central_passes},
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
    double power, tilted, third, quotient; /* what is summed there, of one loss; power: the ratio, less its line about the mean */
    int central;
    double log_total, gain;           /* of the mean power; mean of (d - origin) under the weights */
    double distance, slope;           /* D, and d log D / d log v */
    double mean_slope, total_slope;   /* of (k - 1) log(mean power of v), and of log_total, also over log v */
    double stored; /* the log_total by which the ratios that are stored were divided */
} Path;

static Powers powers_at(const Path *path, double k, double each) {
    double sign = k < 1 ? 1 : -1;
    return (Powers){k, 1 / (k - 1), fabs(k) < 1e-20 ? 0 : 1 / k, path->origin, -sign / path->unit, each, fabs(k - 1) < 0.1};
}

/* Fills in what the sums tell. */
static void conclude(Path *path, double k, double v) {
    double sign = k < 1 ? 1 : -1;
    path->log_total = path->central ? log1p(path->power) : log(path->power);
    double total = path->central ? 1 + path->power : path->power, y = path->tilted / total;
    double rate_less_one = expm1((1 - k) * path->log_total);
    double rate = rate_less_one > -0.5 ? 1 + rate_less_one : exp((1 - k) * path->log_total);
    double w_mean = 1 + y, curved = path->third / total, h_mean, spread;
    path->gain = -sign * path->unit * y;
    if (path->central || fabs(k - 1) < 0.1) { /* the sum is of y^2 / (1 + y), and 1 / (1 + y) = 1 - y + y^2 / (1 + y) */
        h_mean = 1 - y + curved;
        spread = curved * w_mean - y * y;
    } else {
        h_mean = curved;
        spread = w_mean * h_mean - 1;
    }
    if (fabs(k) < 0.25) {
        double log_rate = -k * path->log_total;
        path->distance = (exp(log_rate) * path->quotient + (k ? expm1(log_rate) / k : -path->log_total)) / (k - 1);
    } else {
        path->distance = (rate_less_one + rate * y) / (k * (k - 1));
    }
    path->slope = -v * rate / path->unit * spread / ((k - 1) * (k - 1)) / path->distance;
    path->mean_slope = v * h_mean / path->unit;
    path->total_slope = (path->mean_slope - v / path->unit) / (k - 1);
}

/* Stores the ratios over exp(stored), unless that is NaN. */
static Path path_at(const Row *row, double k, double v, double stored) {
    double sign = k < 1 ? 1 : -1, far = 30, all = row->all, about_mean = v - sign * row->mean;
    int central = k < 1 ? v > 1e-3 * about_mean : about_mean > -0.3 * row->mean;
    central = central && log(v / about_mean) / (k - 1) <= far;
    if (!(fabs(stored) < 600)) stored = isnan(stored) ? NAN : 0;
    Path path = {.origin = central ? row->mean : 0, .unit = central ? about_mean : v, .central = central, .stored = stored};
    Powers of = powers_at(&path, k, isnan(stored) ? 0 : exp(-stored) / all);
    Sums sums;
    int form = form_of(k);
    over_row(row, row->rough ? ROUGH_PASSES[form][central] : POWER_PASSES[form][central], &of, &sums);
    path.power = result(sums.of[0]) / all, path.tilted = result(sums.of[1]) / all;
    path.third = result(sums.of[2]) / all, path.quotient = result(sums.of[3]) / all;
    conclude(&path, k, v);
    return path;
}

typedef struct {
    Powers powers;
    double bent, factor, held; /* -kappa; of what is stored; what of it is still linear */
    int central;
} Follow;

/* Moves stored ratios along the path: those at y to those at y (1 - kappa), which are (1 - kappa y / (1 + y))^p times
 * as large; next to the edge of the support they are computed again. Sums of what is added to them, and of it by y. */
INLINE void follow_powers(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Follow of = *(const Follow *)in;
    const double p = of.powers.power;
    reals rate = ALL(of.powers.rate), origin = ALL(of.powers.origin), one = ALL(1.0), zero = ALL(0.0);
    reals sum[2] = {zero, zero}, linear = zero;
    STRETCHES(from, to) {
        for (long pair = begin; pair < end; pair += PAIR) {
            reals y[2], m[2], stored[2], eta[2], change[2];
            bits far[2];
            BOTH y[u] = (depth(kind, row, pair + u * LANES) - origin) * rate;
            BOTH m[u] = mass(kind, row, pair + u * LANES);
            BOTH stored[u] = load_weights(kind, row, pair + u * LANES);
            BOTH eta[u] = y[u] / (y[u] + one) * of.bent;
            BOTH change[u] = 1.0 + eta[u] * ((p - 2) / 3) * (1.0 + eta[u] * ((p - 3) / 4));
            BOTH change[u] = stored[u] * (eta[u] * p) * (1.0 + eta[u] * ((p - 1) / 2) * change[u]);
            BOTH far[u] = ~((eta[u] < of.held) & (eta[u] > -of.held));
            if (any(far[0] | far[1])) {
                reals there[2];
                Power at[2];
                BOTH there[u] = y[u] + y[u] * of.bent;
                powers_of(GENERAL, 0, &of.powers, there, at);
                BOTH change[u] = choose(far[u], at[u].ratio * of.powers.each * m[u] - stored[u], change[u]);
            }
            BOTH store(kind, row, pair + u * LANES, (stored[u] + change[u]) * of.factor);
            BOTH sum[0] += change[u];
            BOTH sum[1] += change[u] * y[u];
            BOTH linear += y[u] * m[u];
        }
        add(&sums->of[0], sum[0]), add(&sums->of[1], sum[1]), add(&sums->of[2], linear);
        sum[0] = sum[1] = linear = zero;
    }
}

PASSES(follow_powers)

INLINE int is_movable(const Row *row, double k) { return form_of(k) == GENERAL && !row->single && fabs(k - 1) >= 0.1; }

/* Of log v, so that a series of four terms has all digits. */
static double longest_move(double k) { return 1e-3 * fmin(fabs(k - 1), 1); }

/* Moves the path, and its ratios that are stored, from v by a small part of log v; what tells the slope is left. */
static Path moved_by(const Row *row, double k, Path path, double v, double moved) {
    double change = v * expm1(moved), unit = path.unit + change, kappa = change / unit, each = exp(-path.stored) / row->all;
    Follow of = {powers_at(&path, k, each), -kappa, exp(-path.total_slope * moved), 2 * longest_move(k), path.central};
    Sums sums;
    over_row(row, follow_powers_passes, &of, &sums);
    double slope = path.slope, mean_slope = path.mean_slope, total_slope = path.total_slope;
    path.power += result(sums.of[0]) / each / row->all;
    if (path.central) path.power += of.powers.power * kappa * (result(sums.of[2]) / row->all);
    path.tilted = (path.tilted + result(sums.of[1]) / each / row->all) * (path.unit / unit);
    path.unit = unit, path.stored += total_slope * moved;
    conclude(&path, k, v + change);
    path.slope = slope, path.mean_slope = mean_slope, path.total_slope = total_slope;
    return path;
}

/* What is zero at the solution of a ball or, where there is a unit, of a penalty. */
static double residual(const Path *path, double k, double radius, double unit) {
    return unit ? log(unit / path->unit) - (k - 1) * path->log_total : log(path->distance / radius);
}

/* In x = log v, of a ball or, where there is a unit, which is price / |k - 1|, of a penalty. Foretells log_total at x.
 * With a path, ratios are stored at every x, and the path and those of the last are left, and that x. */
static int find_pole(const Row *row, double k, double radius, double unit, double tolerance, int iterations, double *x,
                     double *log_total, double curvature, int to_the_end, Search *search, Path *stored, double *at) {
    const double longest = 10;
    *search = open_search(tolerance, iterations, 50, longest, longest, log(1e-290), log(1e290));
    search->from_above = 1, search->curvature = curvature;
    search->close = to_the_end ? 0 : tolerance > 1e-7 ? 1e-6 : closeness(row);
    if (stored && !to_the_end && is_movable(row, k)) search->close = longest_move(k) * longest_move(k) / 8;
    for (;;) {
        *at = *x;
        Path path = path_at(row, k, exp(*at), stored ? *log_total : NAN);
        double value = residual(&path, k, radius, unit);
        double slope = unit ? -path.mean_slope : path.slope;
        if (row->rough && !isfinite(value)) return 0;
        int state = advance(search, x, fmax(value, -INFINITY), -value / slope, 1);
        *log_total = path.log_total + path.total_slope * (*x - *at);
        if (state == AGAIN) continue;
        if (stored) *stored = path;
        return state != LOST;
    }
}

/* The path at x, where ratios are stored, from what is stored at another x that is close, or else by a pass. */
static Path path_near(const Row *row, double k, double radius, double unit, double tolerance, double *x, double log_total,
                      Path path, double at) {
    double step = *x - at;
    if (step == 0) return path;
    double longest = is_movable(row, k) ? longest_move(k) : 0;
    if (!(fabs(step) <= longest)) return path_at(row, k, exp(*x), log_total);
    for (int attempt = 0; attempt < 4 && fabs(step) <= longest; attempt++) {
        path = moved_by(row, k, path, exp(at), step);
        *x = at += step;
        double value = residual(&path, k, radius, unit), slope = unit ? -path.mean_slope : path.slope;
        if (fabs(value) <= tolerance / 16) break;
        step = -value / slope;
    }
    return path;
}

static double starting_point(const Row *row, double k, double unit) {
    double sign = k < 1 ? 1 : -1;
    return log(fmax(unit + sign * row->mean, 1e-3 * unit));
}

static double maximal_radius(const Row *row, double k) {
    if (k <= 0) return row->share < 1 ? INFINITY : 0;
    return expm1(-(k - 1) * log(row->share)) / (k * (k - 1));
}

#define STORED 8192 /* losses of a row up to which ratios are stored on the way, as they stay in the cache */

/* Whether a pass in float32 costs much less than one in float64. */
static int is_costly(const Row *row, double k) {
    int form = form_of(k);
    if (form == LOGARITHMIC || fabs(k - 1) < 0.05) return 0; /* whose powers have no digits left in float32 */
    return row->single || (form != SQUARE && form != INVERSE_SQUARE);
}

int powers(Row *row, double k, double radius, double price, Answer *answer) {
    double largest = row->range == 0 ? 0 : maximal_radius(row, k), x, at, foretold = 0, curvature = NAN;
    if (row->range == 0 || (price >= 0 ? price == 0 || largest == 0 : radius >= largest))
        return *answer = at_maximum(row, largest), OK;
    if (price >= 0 ? price > 1e280 : radius == 0) return *answer = at_mean(row), OK;
    double unit = price >= 0 ? price / fabs(k - 1) : 0, away = fabs(k - 1) * sqrt(2 * radius);
    double tolerance = price < 0 ? tolerated(row, radius) : 450 * DBL_EPSILON;
    Row sample;
    Search search;
    x = starting_point(row, k, unit ? unit : sqrt(row->variance) / away);
    if (take_sample(row, &sample)) {
        find_pole(&sample, k, radius, unit, 1e-6, 41, &x, &foretold, NAN, k > 2, &search, NULL, &at);
        curvature = search.curvature;
        free((void *)sample.z);
    }
    Row rough = roughened(row);
    int known = 0; /* whether float32 may have found all digits of a row in it */
    if (rough.rough && is_costly(row, k)) {
        double near = x;
        if (find_pole(&rough, k, radius, unit, row->single ? 1e-8 : 1e-5, 41, &near, &foretold, curvature, 0, &search, NULL, &at) &&
            !search.saturated)
            x = near, curvature = search.curvature, known = row->single && k <= 2;
    }
    Path path;
    int storing = row->n <= STORED || (rough.rough && is_costly(row, k));
    for (int attempt = 0, left = known; left; attempt++) {
        path = path_at(row, k, exp(x), foretold);
        double value = residual(&path, k, radius, unit), step = value / (unit ? path.mean_slope : -path.slope);
        known = fabs(value) <= 8 * tolerance, left = !known && attempt < 2 && fabs(step) < 1e-3;
        if (!known && fabs(step) < 1e-3) x += step, foretold = path.log_total + path.total_slope * step;
    }
    for (int to_the_end = k > 2; !known; to_the_end = 1) { /* above order 2 no slope tells of losses that come in */
        if (!find_pole(row, k, radius, unit, tolerance, 400, &x, &foretold, curvature, to_the_end, &search,
                       storing ? &path : NULL, &at))
            return DECLINED;
        if (search.saturated && price < 0 && k < 1) { /* weights of 1e-290 beside the maximum's may be in the ball */
            path = path_at(row, k, exp(x), foretold);
            if (path.distance <= radius) break;
        }
        if (search.saturated) { /* where the maximum is not in the ball, or has a price, rounding has no say */
            if (price >= 0 || !(radius >= largest * (1 - 1e-8))) return DECLINED;
            return *answer = at_maximum(row, largest), OK;
        }
        if (search.missed && k > 2) return DECLINED; /* the ratios jump between two numbers, and are to be mixed */
        path = storing ? path_near(row, k, radius, unit, tolerance, &x, foretold, path, at) : path_at(row, k, exp(x), foretold);
        /* A slope that has cancelled, as next to a far outlier, may have misled the last step. */
        if (to_the_end || search.missed || fabs(residual(&path, k, radius, unit)) <= 8 * tolerance) break;
        foretold = path.log_total;
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
    into_ball(row, answer, price >= 0 ? -1 : radius, exp(path.log_total - path.stored));
    return OK;
}
