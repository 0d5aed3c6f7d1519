/* KL balls and penalties: weights proportional to exp(b d) (kl.py). */

#include "kernels_elementary.h"

typedef struct {
    double origin;         /* of d in the exponent */
    double mass, psi;      /* mean of exp(b (d - origin)), and its logarithm */
    double gain, variance; /* of d under the weights, gain over the mean */
    double distance, slope; /* D, and d log D / d log b */
} Path;

typedef struct {
    double rate, origin;
    double each; /* by which exponentials are multiplied that are stored; 0: none are */
} Exponents;

/* With e = exp(b y) - 1 all sums are of positive terms, that of e - b y too. */
INLINE void about_mean(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Exponents of = *(const Exponents *)in;
    reals rate = ALL(of.rate), origin = ALL(of.origin), zero = ALL(0.0), sum[3] = {zero, zero, zero};
    STRETCHES(from, to) {
        for (long pair = begin; pair < end; pair += PAIR) {
            reals y[2], m[2], at[2], power[2], e[2], beyond[2];
            BOTH y[u] = depth(kind, row, pair + u * LANES) - origin;
            BOTH m[u] = mass(kind, row, pair + u * LANES);
            BOTH at[u] = y[u] * rate;
            exponentials(at, power, e, beyond);
            if (of.each != 0) BOTH store(kind, row, pair + u * LANES, weighed(kind, row, pair + u * LANES, power[u] * of.each));
            BOTH sum[0] += beyond[u] * m[u];
            BOTH e[u] *= y[u] * m[u];
            BOTH sum[1] += e[u];
            BOTH sum[2] += e[u] * y[u];
        }
        for (int j = 0; j < 3; j++) add(&sums->of[j], sum[j]), sum[j] = zero;
    }
}

PASSES(about_mean)

INLINE void about_top(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Exponents of = *(const Exponents *)in;
    reals rate = ALL(of.rate), zero = ALL(0.0), sum[3] = {zero, zero, zero};
    STRETCHES(from, to) {
        for (long pair = begin; pair < end; pair += PAIR) {
            reals d[2], at[2], power[2], r[2], excess[2], e[2];
            BOTH d[u] = depth(kind, row, pair + u * LANES);
            BOTH at[u] = d[u] * rate;
            exponential(at, power, r, excess);
            BOTH e[u] = power[u] + power[u] * (r[u] + excess[u]);
            if (of.each != 0) BOTH store(kind, row, pair + u * LANES, weighed(kind, row, pair + u * LANES, e[u] * of.each));
            BOTH e[u] *= mass(kind, row, pair + u * LANES);
            BOTH sum[0] += e[u];
            BOTH e[u] *= d[u];
            BOTH sum[1] += e[u];
            BOTH sum[2] += e[u] * d[u];
        }
        for (int j = 0; j < 3; j++) add(&sums->of[j], sum[j]), sum[j] = zero;
    }
}

PASSES(about_top)

INLINE void roughly(int central, int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Exponents of = *(const Exponents *)in;
    const Line line = line_of(row, of.origin, 1);
    floats rate = spread((float)of.rate), zero = {0}, sum[3] = {zero, zero, zero};
    STRETCHES(from, to) {
        ROUGH_PAIRS {
            floats y[2], m[2], at[2], power[2], e[2], beyond[2];
            BOTH y[u] = on_line(kind, row, AT(u), &line);
            BOTH m[u] = rough_mass(kind, row, AT(u), LEFT(u));
            BOTH at[u] = y[u] * rate;
            exponentials_of_floats(at, power, e, beyond);
            BOTH sum[0] += (central ? beyond[u] : power[u]) * m[u];
            BOTH e[u] = (central ? e[u] : power[u]) * (y[u] * m[u]);
            BOTH sum[1] += e[u];
            BOTH sum[2] += e[u] * y[u];
        }
        for (int j = 0; j < 3; j++) add_floats(&sums->of[j], sum[j]), sum[j] = zero;
    }
}

INLINE void roughly_about_mean(int kind, const Row *row, const void *in, long from, long to, Sums *sums) {
    roughly(1, kind, row, in, from, to, sums);
}
INLINE void roughly_about_top(int kind, const Row *row, const void *in, long from, long to, Sums *sums) {
    roughly(0, kind, row, in, from, to, sums);
}

PASSES(roughly_about_mean)
PASSES(roughly_about_top)

static Pass *const *const rough_passes[2] = {roughly_about_top_passes, roughly_about_mean_passes};

INLINE int is_near(const Row *row, double b) { return b * -row->mean <= 30; }

/* Sums at b: about the mean while that is near enough to the maximum, else about that. */
static Path tilt_by(const Row *row, double b, double each) {
    int near = is_near(row, b);
    double all = row->all;
    Path path = {.origin = near ? row->mean : 0};
    Exponents of = {b, path.origin, each};
    Sums sums;
    int rough = each == 0 && (row->rough || is_narrow(row));
    over_row(row, rough ? rough_passes[near] : near ? about_mean_passes : about_top_passes, &of, &sums);
    double first = result(sums.of[0]), second = result(sums.of[1]), third = result(sums.of[2]);
    if (near) {
        path.mass = 1 + first / all;
        path.psi = log1p(first / all);
        path.gain = second / all / path.mass;
        path.variance = (third / all + row->variance) / path.mass - path.gain * path.gain;
        path.distance = b * path.gain - path.psi;
    } else {
        path.mass = first / all;
        path.psi = log(path.mass);
        double at = second / first;
        path.gain = at - row->mean;
        path.variance = third / first - at * at;
        path.distance = b * at - path.psi;
    }
    path.slope = b * b * path.variance / path.distance;
    return path;
}

/* Where `psi` is foretold well enough, the weights are right as they are stored. */
static Answer weighted(const Row *row, double b, double psi, double radius, double price) {
    Path path = tilt_by(row, b, exp(-psi) / row->all);
    double missed = log(radius) - log(path.distance), moved = missed / path.slope;
    if (price < 0 && is_narrow(row) && fabs(missed) > 1e-8 && fabs(moved) < 1e-4) {
        /* A step of b beyond what float32 has found, to first order in weights and D: the next is far below theirs. */
        double step = b * moved, at = row->mean + path.gain;
        lean(row, step, at);
        b += step, path.psi += step * (at - path.origin), path.gain += step * path.variance;
        path.distance = radius;
    }
    double strength = price >= 0 ? price : 1 / b;
    double premium = strength * path.psi + (path.origin - row->mean); /* of second order, about the mean */
    /* phi* has mean zero at the threshold, so that nothing else is in the dual value. */
    Answer answer = {price >= 0 ? premium : path.gain, premium, path.origin + strength * path.psi, strength,
                     path.distance, .exactly = NAN};
    if (price < 0) answer.dual += strength * radius;
    into_ball(row, &answer, price >= 0 ? -1 : radius, path.mass * exp(-psi));
    return answer;
}

/* Newton on log D in x = log b, which D increases with; returns whether it converged, and foretells psi at x. */
static int find_rate(const Row *row, double radius, double tolerance, int iterations, double *x, double *psi,
                     double *curvature, int *saturated) {
    const double ceiling = 0.97 * log(DBL_MAX);
    Search search = open_search(tolerance, iterations, 40, INFINITY, 10, -INFINITY, ceiling);
    search.low = 0.5 * (log(8.0) + log(radius)) - log(row->range);
    search.close = row->rough || is_narrow(row) ? 1e-5 : tolerance > 1e-7 ? 1e-6 : closeness(row);
    search.curvature = *curvature;
    *x = fmin(fmax(search.low, *x), ceiling);
    for (;;) {
        double at = *x;
        Path path = tilt_by(row, exp(at), 0);
        /* D has plateaus in b, between the gaps of close losses. */
        double value = fmax(log(radius) - log(path.distance), -INFINITY);
        int state = advance(&search, x, value, value / path.slope, 1);
        *saturated = search.saturated;
        if (state == AGAIN) continue;
        *curvature = search.curvature;
        int same = is_near(row, exp(*x)) == is_near(row, exp(at));
        *psi = same ? path.psi + (path.distance + path.psi) * (*x - at) : 0;
        return state != LOST;
    }
}

int kullback_leibler(Row *row, double radius, double price, Answer *answer) {
    double largest = -log(row->share);
    if (row->range == 0 || (price >= 0 ? price == 0 : radius >= largest))
        return *answer = at_maximum(row, largest), OK;
    if (price >= 0 ? price > 1 / DBL_MIN : radius == 0) return *answer = at_mean(row), OK;
    if (price >= 0) return *answer = weighted(row, fmin(1 / price, 1e300), 0, 0, price), OK;
    int saturated;
    double psi, curvature = NAN, x = 0.5 * (log(2 * radius) - log(row->variance));
    Row sample;
    if (take_sample(row, &sample)) {
        find_rate(&sample, radius, 1e-6, 13, &x, &psi, &curvature, &saturated);
        free((void *)sample.z);
    }
    Row rough = roughened(row);
    if (!row->single) {
        double near = x;
        if (find_rate(&rough, radius, 1e-5, 41, &near, &psi, &curvature, &saturated) && !saturated) x = near;
    }
    if (!find_rate(row, radius, tolerated(row, radius), 400, &x, &psi, &curvature, &saturated)) return NOT_CONVERGED;
    *answer = saturated ? at_maximum(row, largest) : weighted(row, exp(x), psi, radius, -1);
    return OK;
}
