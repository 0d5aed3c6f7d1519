/* Exact solutions of plain CPU rows: chi-square and KL balls, penalties and both, and CVaR.
 *
 * The algorithms are those of chi_square.py, kl.py and closed.py, whose comments give the mathematics; here a pass
 * over a row is one loop, with nothing stored but the weights. Losses are read as d = (z - maximum) * 2^j, with the
 * range of d in [1, 2). Sums run in the lanes of a register over stretches of 512 losses, which are added with
 * compensation. A row's last, partial vectors go through the same instructions as all others, so that tied losses get weights that
 * are equal in every bit.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

/* As many lanes as a register has: compilers split wider vectors badly. */
#if defined(__AVX512F__)
#define LANES 8
#define ALL(x) ((reals){x, x, x, x, x, x, x, x})
#elif defined(__AVX__)
#define LANES 4
#define ALL(x) ((reals){x, x, x, x})
#else
#define LANES 2
#define ALL(x) ((reals){x, x})
#endif

typedef double reals __attribute__((vector_size(8 * LANES)));
typedef double reals_at_any __attribute__((vector_size(8 * LANES), aligned(8), may_alias));
typedef float singles __attribute__((vector_size(4 * LANES)));
typedef float singles_at_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int64_t bits __attribute__((vector_size(8 * LANES)));
typedef int32_t counts __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#define PAIR (2 * LANES)
#define STRETCH 512

enum { OK, BAD_LOSSES, BAD_RADIUS, BAD_STRENGTH, BAD_ALPHA, NO_MEMORY, NOT_CONVERGED };
enum { CHI_SQUARE, KULLBACK_LEIBLER, TAIL };
/* What is returned for each row beside the weights, in this order. */
enum { VALUE, PREMIUM, THRESHOLD, STRENGTH, GAP, DISTANCE, ALPHA_SLOPE, ON_BALL, FIELDS };

/* A number with what rounding has dropped from it (Neumaier). */
typedef struct {
    double sum, dropped;
} Total;

INLINE void add(Total *total, reals lanes) {
    double x = lanes[0];
    for (int j = 1; j < LANES; j++) x += lanes[j];
    double sum = total->sum + x;
    total->dropped += fabs(total->sum) >= fabs(x) ? (total->sum - sum) + x : (x - sum) + total->sum;
    total->sum = sum;
}

INLINE double result(Total total) {
    double all = total.sum + total.dropped;
    return isfinite(all) ? all : total.sum; /* compensation of an overflow is not a number */
}

/* One row, and its last, partial pair of vectors padded by the maximum. */
typedef struct {
    const char *z;
    int single; /* float32 */
    long n, whole; /* whole: in complete pairs of vectors */
    double top, low, scale, range; /* range: of d */
    double mean, variance, share;  /* of d; share: of the losses tied at the maximum */
    double tail[PAIR], tail_mask[PAIR];
} Row;

typedef struct {
    char *at;
    int single;
    double tail[PAIR];
} Weights;

static const double ONES[8] = {1, 1, 1, 1, 1, 1, 1, 1};

INLINE reals load(const Row *row, long i) {
    if (i >= row->whole) return *(const reals_at_any *)(row->tail + (i - row->whole));
    if (row->single) return __builtin_convertvector(*(const singles_at_any *)(row->z + 4 * i), reals);
    return *(const reals_at_any *)(row->z + 8 * i);
}

/* 1 for losses of the row, 0 for what pads it. */
INLINE reals mask(const Row *row, long i) {
    return *(const reals_at_any *)(i >= row->whole ? row->tail_mask + (i - row->whole) : ONES);
}

INLINE void store(const Row *row, Weights *weights, long i, reals values) {
    if (i >= row->whole)
        *(reals_at_any *)(weights->tail + (i - row->whole)) = values;
    else if (weights->single)
        *(singles_at_any *)(weights->at + 4 * i) = __builtin_convertvector(values, singles);
    else
        *(reals_at_any *)(weights->at + 8 * i) = values;
}

INLINE void store_tail(const Row *row, Weights *weights) {
    for (long i = row->whole; i < row->n; i++) {
        if (weights->single)
            ((float *)weights->at)[i] = (float)weights->tail[i - row->whole];
        else
            ((double *)weights->at)[i] = weights->tail[i - row->whole];
    }
}

INLINE reals choose(bits where, reals one, reals other) {
    return (reals)(((bits)one & where) | ((bits)other & ~where));
}

#if defined(__AVX512F__)
INLINE reals larger(reals a, reals b) { return (reals)_mm512_max_pd((__m512d)a, (__m512d)b); }
INLINE reals smaller(reals a, reals b) { return (reals)_mm512_min_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX__)
INLINE reals larger(reals a, reals b) { return (reals)_mm256_max_pd((__m256d)a, (__m256d)b); }
INLINE reals smaller(reals a, reals b) { return (reals)_mm256_min_pd((__m256d)a, (__m256d)b); }
#else
INLINE reals larger(reals a, reals b) { return choose(a > b, a, b); }
INLINE reals smaller(reals a, reals b) { return choose(a < b, a, b); }
#endif

/* Runs what follows for every stretch of a row, and inside it for every LANES losses from i. */
#define STRETCHES(row) \
    for (long begin = 0, end; begin < (row)->n && (end = begin + STRETCH < (row)->n ? begin + STRETCH : (row)->n, 1); \
         begin = end)
#define VECTORS for (long i = begin; i < end; i += LANES)
/* The same in pairs, whose sums [2] do not wait for each other. */
#define PAIRS                                         \
    for (long pair = begin; pair < end; pair += PAIR) \
        _Pragma("GCC unroll 2") for (int u = 0; u < 2; u++)
#define CLEARED {ALL(0.0), ALL(0.0)}

INLINE void add_pair(Total *total, reals sums[2]) {
    add(total, sums[0] + sums[1]);
    sums[0] = sums[1] = ALL(0.0);
}

/* --- a first look ------------------------------------------------------------------------------------------- */

static int look(Row *row, const char *z, int single, long n) {
    row->z = z, row->single = single, row->n = n, row->whole = n / PAIR * PAIR;
    double origin = single ? ((const float *)z)[0] : ((const double *)z)[0];
    for (int j = 0; j < PAIR; j++) {
        long i = row->whole + j;
        row->tail_mask[j] = i < n;
        row->tail[j] = i >= n ? origin : single ? ((const float *)z)[i] : ((const double *)z)[i];
    }
    reals start = ALL(origin), high[2] = {start, start}, low[2] = {start, start}, odd[2] = CLEARED, sum[2] = CLEARED;
    Total total = {0, 0};
    STRETCHES(row) {
        PAIRS {
            reals x = load(row, pair + u * LANES);
            high[u] = larger(x, high[u]);
            low[u] = smaller(x, low[u]);
            odd[u] += x * 0.0; /* NaN for what is not finite */
            sum[u] += x - start;
        }
        add_pair(&total, sum);
    }
    high[0] = larger(high[0], high[1]), low[0] = smaller(low[0], low[1]), odd[0] += odd[1];
    row->top = row->low = origin;
    double not_finite = 0;
    for (int j = 0; j < LANES; j++) {
        if (high[0][j] > row->top) row->top = high[0][j];
        if (low[0][j] < row->low) row->low = low[0][j];
        not_finite += odd[0][j];
    }
    double span = row->top - row->low;
    if (not_finite != 0 || !isfinite(span)) return BAD_LOSSES;
    for (int j = 0; j < PAIR; j++)
        if (row->tail_mask[j] == 0) row->tail[j] = row->top;
    int exponent = span > 0 ? ilogb(span) : 0;
    row->scale = ldexp(1.0, exponent < -1023 ? 1023 : -exponent);
    row->range = span * row->scale;
    double mean = (result(total) / n + (origin - row->top)) * row->scale;
    row->mean = mean <= 0 && mean >= -row->range ? mean : -0.5 * row->range;
    return OK;
}

INLINE reals depth(const Row *row, long i) { return (load(row, i) - row->top) * row->scale; }

/* Mean and variance of d, about a mean that is nearly right, and the share of ties at the maximum. */
static void spread_out(Row *row) {
    for (int attempt = 0; attempt < 2; attempt++) {
        Total first = {0, 0}, second = {0, 0}, ties = {0, 0};
        reals sum[2] = CLEARED, square[2] = CLEARED, tied[2] = CLEARED, center = ALL(row->mean);
        STRETCHES(row) {
            PAIRS {
                reals d = depth(row, pair + u * LANES), m = mask(row, pair + u * LANES);
                reals y = (d - center) * m;
                sum[u] += y;
                square[u] += y * y;
                tied[u] += choose(d == 0.0, m, ALL(0.0));
            }
            add_pair(&first, sum), add_pair(&second, square), add_pair(&ties, tied);
        }
        double shift = result(first) / row->n;
        row->variance = result(second) / row->n - shift * shift;
        row->mean += shift;
        row->share = result(ties) / row->n;
        if (shift * shift <= row->variance / 16) return; /* else the square has canceled */
    }
}

/* --- the ends of the parameter range -------------------------------------------------------------------------- */

typedef struct {
    double mean, gain, threshold, strength, bound, distance; /* in units of d; bound: the dual value */
} Answer;

/* Uniform weights on the ties: the least divergent weights that reach the maximum. */
static Answer at_maximum(const Row *row, Weights *weights, double distance) {
    double weight = 1 / (row->share * row->n);
    for (long i = 0; i < row->n; i += LANES) store(row, weights, i, choose(load(row, i) == row->top, ALL(weight), ALL(0.0)));
    store_tail(row, weights);
    return (Answer){row->mean, -row->mean, 0, 0, 0, distance};
}

/* The base weights. */
static Answer at_mean(const Row *row, Weights *weights) {
    for (long i = 0; i < row->n; i += LANES) store(row, weights, i, ALL(1.0 / row->n));
    store_tail(row, weights);
    return (Answer){row->mean, 0, row->mean, INFINITY, row->mean, 0};
}

/* Replaces each weight w by factor w + shift. */
static void rescale(const Row *row, Weights *weights, double factor, double shift) {
    const Row stored = {.z = weights->at, .single = weights->single, .n = row->n, .whole = row->whole};
    for (long i = 0; i < row->whole; i += LANES) store(&stored, weights, i, load(&stored, i) * factor + shift);
    for (int j = 0; j < PAIR; j++) weights->tail[j] = weights->tail[j] * factor + shift;
    store_tail(row, weights);
}

/* How much of the weights is kept, the rest being the base weights, so that their D lies in the ball: D is convex, and
 * zero at the base weights. */
static double kept_in_ball(double radius, double distance) {
    return distance > radius * (1 + 2 * DBL_EPSILON) ? radius / distance : 1;
}

/* --- chi-square: a monotone active set ------------------------------------------------------------------------ */

typedef struct {
    double eta, nu, strength;
    int saturated;
} Support;

/* Of a ball (price < 0) or a penalty, with a support of that share, mean and variance. */
INLINE Support supported(double radius, double price, double kept, double dropped, double mean, double variance) {
    if (price >= 0) {
        double spread = price / kept;
        return (Support){mean - spread, mean - dropped * spread, price, 0};
    }
    double c = 2 * radius * kept - dropped;
    if (c <= 0 || variance <= 0) return (Support){0, 0, 0, 1};
    double spread = sqrt(variance / c);
    return (Support){mean - spread, mean - dropped * spread, kept * spread, 0};
}

typedef struct {
    long kept;
    double mean, variance;
} Moments;

/* Count, mean and variance of d >= eta, summed about what is close to the mean. */
static Moments moments_above(const Row *row, double eta, double center) {
    Moments found = {0, center, 0};
    for (int attempt = 0; attempt < 3; attempt++) {
        Total count = {0, 0}, first = {0, 0}, second = {0, 0};
        reals kept[2] = CLEARED, sum[2] = CLEARED, square[2] = CLEARED, origin = ALL(found.mean), floor = ALL(eta);
        STRETCHES(row) {
            PAIRS {
                reals d = depth(row, pair + u * LANES);
                reals inside = choose(d >= floor, mask(row, pair + u * LANES), ALL(0.0));
                reals y = (d - origin) * inside;
                kept[u] += inside;
                sum[u] += y;
                square[u] += y * y;
            }
            add_pair(&count, kept), add_pair(&first, sum), add_pair(&second, square);
        }
        double n = result(count), shift = result(first) / n;
        found.kept = (long)n;
        found.mean += shift;
        found.variance = result(second) / n - shift * shift;
        if (shift * shift <= 64 * found.variance) break;
    }
    return found;
}

static Answer chi_square(const Row *row, Weights *weights, double radius, double price) {
    double all = row->n, largest = (1 / row->share - 1) / 2;
    if (row->range == 0 || largest == 0 || (price >= 0 ? price == 0 : radius >= largest))
        return at_maximum(row, weights, largest);
    if (price >= 0 ? price > 1 / DBL_MIN : radius == 0) return at_mean(row, weights);
    Moments now = {row->n, row->mean, row->variance};
    Support support = supported(radius, price, 1, 0, now.mean, now.variance);
    while (support.eta > -row->range && !support.saturated) {
        double eta = fmin(support.eta, 0);
        long before = now.kept;
        now = moments_above(row, eta, now.mean);
        support = supported(radius, price, now.kept / all, (all - now.kept) / all, now.mean, now.variance);
        if (now.kept == before) break;
        support.eta = fmax(support.eta, eta); /* it only grows, but for rounding */
    }
    if (support.saturated) return at_maximum(row, weights, largest);

    Total tilts = {0, 0}, gains = {0, 0}, squares = {0, 0};
    reals tilted[2] = CLEARED, gained[2] = CLEARED, squared[2] = CLEARED;
    /* Two factors, as one might overflow; a division would take longer than all else here. */
    double power = ldexp(1.0, -(support.strength < 0x1p-1022 ? -1023 : ilogb(support.strength)));
    reals near = ALL(power), rest = ALL(1 / (support.strength * power));
    reals nu = ALL(support.nu), mean = ALL(row->mean), each = ALL(1 / all);
    const Row held = *row; /* which no store can change */
    STRETCHES(&held) {
        PAIRS {
            long i = pair + u * LANES;
            reals d = depth(&held, i), m = mask(&held, i);
            reals tilt = larger((d - nu) * near * rest, ALL(-1.0));
            store(&held, weights, i, (tilt + 1.0) * each);
            tilt *= m;
            tilted[u] += tilt;
            gained[u] += tilt * (d - mean);
            squared[u] += tilt * tilt;
        }
        add_pair(&tilts, tilted), add_pair(&gains, gained), add_pair(&squares, squared);
    }
    store_tail(row, weights);
    double surplus = result(tilts) / all, distance = result(squares) / all / 2, mass = 1 + surplus;
    double gain = result(gains) / all / mass, kept = 1;
    double bound = support.strength * (surplus + distance) + support.nu;
    distance = fmax(distance - surplus * surplus / 2, 0) / (mass * mass); /* of the weights that sum to one */
    if (price < 0) {
        kept = kept_in_ball(radius, distance);
        gain *= kept;
        distance = fmin(distance, radius);
        bound += support.strength * radius;
    }
    if (fabs(surplus) > 4 * DBL_EPSILON || kept < 1) rescale(row, weights, kept / mass, (1 - kept) / all);
    if (price >= 0) gain -= price * distance;
    return (Answer){row->mean, gain, support.nu, support.strength, bound, distance};
}

/* --- KL: weights proportional to exp(b d) --------------------------------------------------------------------- */

/* exp(x) = power * (1 + q), q = r + excess, for x <= 700; what underflows is zero. */
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

typedef struct {
    double origin;               /* of d in the exponent */
    double mass, psi;            /* mean of exp(b (d - origin)), and its logarithm */
    double gain, variance;       /* of d under the weights, gain over the mean */
    double distance, slope;      /* D, and d log D / d log b */
} Path;

/* Sums at b: about the mean while that is near enough to the maximum, else about that. Stores the exponentials. */
INLINE Path tilt_by(const Row *row, double b, Weights *weights) {
    int near = b * -row->mean <= 30;
    double all = row->n;
    Path path = {.origin = near ? row->mean : 0};
    reals rate = ALL(b), origin = ALL(path.origin);
    Total totals[3] = {{0, 0}, {0, 0}, {0, 0}};
    reals zero = ALL(0.0), sums[3] = {zero, zero, zero};
    if (near) {
        /* With e = exp(b y) - 1 all sums are of positive terms, that of e - b y too. */
        STRETCHES(row) {
            VECTORS {
                reals y = depth(row, i) - origin, m = mask(row, i), power, r, excess;
                reals x = y * rate;
                exponential(x, &power, &r, &excess);
                reals grown = power * (r + excess);
                reals e = (grown + (power - 1.0)) * m;
                if (weights) store(row, weights, i, power + grown);
                reals beyond = power * excess + ((power * r + (power - 1.0)) - x);
                reals ye = y * e;
                sums[0] += beyond * m;
                sums[1] += ye;
                sums[2] += ye * y;
            }
            for (int j = 0; j < 3; j++) add(&totals[j], sums[j]), sums[j] = zero;
        }
        double beyond = result(totals[0]) / all;
        path.mass = 1 + beyond;
        path.psi = log1p(beyond);
        path.gain = result(totals[1]) / all / path.mass;
        path.variance = (result(totals[2]) / all + row->variance) / path.mass - path.gain * path.gain;
        path.distance = b * path.gain - path.psi;
    } else {
        STRETCHES(row) {
            VECTORS {
                reals d = depth(row, i), power, r, excess;
                exponential(d * rate, &power, &r, &excess);
                reals e = power + power * (r + excess);
                if (weights) store(row, weights, i, e);
                e *= mask(row, i);
                reals de = d * e;
                sums[0] += e;
                sums[1] += de;
                sums[2] += de * d;
            }
            for (int j = 0; j < 3; j++) add(&totals[j], sums[j]), sums[j] = zero;
        }
        path.mass = result(totals[0]) / all;
        path.psi = log(path.mass);
        double at = result(totals[1]) / result(totals[0]);
        path.gain = at - row->mean;
        path.variance = result(totals[2]) / result(totals[0]) - at * at;
        path.distance = b * at - path.psi;
    }
    path.slope = b * b * path.variance / path.distance;
    return path;
}

static Path on_path(const Row *row, double b) { return tilt_by(row, b, NULL); }

static Answer weighted(const Row *row, Weights *weights, double b, double radius, double price) {
    Path path = tilt_by(row, b, weights);
    store_tail(row, weights);
    double strength = price >= 0 ? price : 1 / b, kept = price >= 0 ? 1 : kept_in_ball(radius, path.distance);
    rescale(row, weights, kept / (path.mass * row->n), (1 - kept) / row->n);
    double threshold = path.origin + strength * path.psi;
    /* About the mean, where the strength may be large, psi has more digits than a mean of exponentials near one. */
    double bound = threshold + (path.origin == 0 ? strength * (path.mass * exp(-path.psi) - 1) : 0);
    double gain = kept * path.gain;
    if (price >= 0) {
        gain = strength * path.psi + (path.origin - row->mean); /* of second order, about the mean */
    } else {
        bound += strength * radius;
        path.distance = fmin(path.distance, radius);
    }
    return (Answer){row->mean, gain, threshold, strength, bound, path.distance};
}

/* Safeguarded Newton on log D in x = log b. */
static int kullback_leibler_ball(const Row *row, Weights *weights, double radius, Answer *answer) {
    const double ceiling = 0.97 * log(DBL_MAX), longest = 10, far = 40;
    double largest = -log(row->share);
    if (row->range == 0 || radius >= largest) return *answer = at_maximum(row, weights, largest), OK;
    if (radius == 0) return *answer = at_mean(row, weights), OK;
    double target = log(radius), low = 0.5 * (log(8.0) + target) - log(row->range), high = INFINITY;
    double x = fmin(fmax(low, 0.5 * (log(2.0) + target) - 0.5 * log(row->variance)), ceiling);
    double tolerated = 450 * DBL_EPSILON + 2 * DBL_EPSILON / fmax(sqrt(radius), 1e-3);
    for (int iteration = 0; iteration < 400; iteration++) {
        Path path = on_path(row, exp(x));
        double residual = log(path.distance) - target, newton = x - residual / path.slope;
        if (x >= ceiling) return *answer = at_maximum(row, weights, largest), OK;
        if (residual < 0)
            low = x;
        else
            high = x;
        if (fabs(residual) > tolerated && fabs(newton - x) <= 1e-8 && newton > low && newton < high) {
            x = newton; /* where the error is the square of this step */
            residual = 0;
        }
        if (fabs(residual) <= tolerated || high - low <= 4 * DBL_EPSILON * fmax(fabs(x), 1))
            return *answer = weighted(row, weights, exp(x), radius, -1), OK;
        /* D has plateaus in b, between the gaps of close losses: a flat slope must not throw x out of reach, and
         * rounding there can let Newton creep, while halving the bracket cannot. */
        int trusted = newton > low && newton < fmin(high, x + longest) && iteration < far;
        x = fmin(trusted ? newton : high < INFINITY ? (low + fmin(high, ceiling)) / 2 : x + longest, ceiling);
    }
    return NOT_CONVERGED;
}

static Answer kullback_leibler_penalty(const Row *row, Weights *weights, double price) {
    if (row->range == 0 || price == 0) return at_maximum(row, weights, -log(row->share));
    if (price > 1 / DBL_MIN) return at_mean(row, weights);
    return weighted(row, weights, fmin(1 / price, 1e300), 0, price);
}

/* --- CVaR: selection ------------------------------------------------------------------------------------------ */

#define BUCKETS 2048

static int descending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

/* The rank-th largest (from 1) of numbers, which are reordered. */
static double largest_of(double *values, long n, long rank) {
    for (int round = 0; n > 48 && round < 4; round++) {
        double high = values[0], low = high;
        for (long i = 1; i < n; i++) {
            high = values[i] > high ? values[i] : high;
            low = values[i] < low ? values[i] : low;
        }
        if (high == low) return high;
        double unit = (BUCKETS - 1) / (high / 2 - low / 2);
        if (!isfinite(unit)) break;
        long held[BUCKETS] = {0}, bucket = 0;
        for (long i = 0; i < n; i++) held[(int)((high / 2 - values[i] / 2) * unit)]++;
        while (held[bucket] < rank) rank -= held[bucket++];
        long kept = 0;
        for (long i = 0; i < n; i++)
            if ((int)((high / 2 - values[i] / 2) * unit) == bucket) values[kept++] = values[i];
        n = kept;
    }
    qsort(values, n, sizeof(double), descending);
    return values[rank - 1];
}

INLINE counts bucket_of(const Row *row, long i, double unit) {
    return __builtin_convertvector((load(row, i) - row->top) * row->scale * unit, counts);
}

/* The rank-th largest loss: by buckets of equal width, then among the losses of one bucket. */
static int largest_loss(const Row *row, long rank, double *found) {
    long n = row->n, chosen = n, bucket = 0;
    double unit = -(BUCKETS - 1) / row->range;
    int bucketed = n > 256;
    if (bucketed) {
        int32_t held[4][BUCKETS];
        memset(held, 0, sizeof held);
        for (long i = 0; i < n; i += LANES) {
            counts at = bucket_of(row, i, unit);
            long width = n - i < LANES ? n - i : LANES;
            if (width == LANES)
                for (int j = 0; j < LANES; j++) held[j & 3][at[j]]++;
            else
                for (int j = 0; j < width; j++) held[j & 3][at[j]]++;
        }
        for (;; bucket++) {
            chosen = (long)held[0][bucket] + held[1][bucket] + held[2][bucket] + held[3][bucket];
            if (chosen >= rank) break;
            rank -= chosen;
        }
    }
    double *values = malloc(chosen * sizeof(double));
    if (!values) return NO_MEMORY;
    long kept = 0;
    for (long i = 0; i < n; i += LANES) {
        reals z = load(row, i);
        long width = n - i < LANES ? n - i : LANES;
        if (!bucketed) {
            for (int j = 0; j < width; j++) values[kept++] = z[j];
            continue;
        }
        counts same = bucket_of(row, i, unit) == (int32_t)bucket;
        int any = 0;
        for (int j = 0; j < LANES; j++) any |= same[j];
        if (any)
            for (int j = 0; j < width; j++)
                if (same[j]) values[kept++] = z[j];
    }
    *found = largest_of(values, chosen, rank);
    free(values);
    return OK;
}

static int tail_mean(const Row *row, Weights *weights, double alpha, Answer *answer, double *slope,
                     double *at_threshold) {
    double all = row->n;
    long rank = (long)ceil(alpha * all);
    rank = rank < 1 ? 1 : rank > row->n ? row->n : rank;
    double threshold = row->top;
    if (row->range > 0 && rank < row->n && row->share * all + 0.5 < rank) {
        int status = largest_loss(row, rank, &threshold);
        if (status != OK) return status;
    } else if (row->range > 0 && rank == row->n) {
        threshold = row->low;
    }
    reals at = ALL(threshold);
    double higher = 0, equal = 0;
    reals over = ALL(0.0), same = over;
    for (long i = 0; i < row->n; i += LANES) { /* whole numbers: exact */
        reals z = load(row, i), m = mask(row, i);
        over += choose(z > at, m, ALL(0.0));
        same += choose(z == at, m, ALL(0.0));
    }
    for (int j = 0; j < LANES; j++) higher += over[j], equal += same[j];
    /* The same number twice; near alpha = 1 the second form would cancel. */
    double left_over = alpha > 0.5 ? (all - higher - equal) - (1 - alpha) * (all - equal)
                                   : alpha * all - higher - equal * alpha;
    double above = (1 - alpha) / alpha, tied = fmin(left_over / (equal * alpha), above);

    Total tilts = {0, 0}, gains = {0, 0}, excesses = {0, 0};
    reals tilted = ALL(0.0), gained = tilted, exceeded = tilted;
    reals high = ALL(above), level = ALL(tied), none = ALL(-1.0), each = ALL(1 / all);
    STRETCHES(row) {
        VECTORS {
            reals z = load(row, i), m = mask(row, i);
            reals tilt = choose(z > at, high, choose(z == at, level, none));
            store(row, weights, i, (tilt + 1.0) * each);
            reals beyond = (z - at) * row->scale * m;
            tilted += tilt * m;
            gained += tilt * beyond;
            exceeded += larger(beyond, ALL(0.0));
        }
        add(&tilts, tilted), add(&gains, gained), add(&excesses, exceeded);
        tilted = gained = exceeded = ALL(0.0);
    }
    store_tail(row, weights);
    double surplus = result(tilts) / all, beyond = result(excesses) / all;
    double depth = (threshold - row->top) * row->scale;
    double gain = result(gains) / all - (row->mean - depth) * surplus; /* as if taken about the mean */
    *answer = (Answer){row->mean, gain, depth, 0, depth + beyond / alpha, 0};
    *slope = -beyond / (alpha * alpha);
    *at_threshold = threshold;
    return OK;
}

/* --- rows ------------------------------------------------------------------------------------------------------ */

/* Whether a parameter may be what it is; absent ones are NULL. */
INLINE int refused(const double *parameter) { return parameter && !(*parameter >= 0 && *parameter < INFINITY); }

static int solve(int kind, Row *row, Weights *weights, const double *radius, const double *strength, double alpha,
                 double *field) {
    Answer answer;
    double slope = 0, threshold = NAN, scale = row->scale, price = strength ? *strength * scale : -1;
    int on_ball = strength == NULL, status = OK;
    spread_out(row);
    if (kind == TAIL) {
        status = tail_mean(row, weights, alpha, &answer, &slope, &threshold);
    } else {
        if (strength) {
            answer = kind == CHI_SQUARE ? chi_square(row, weights, 0, price)
                                        : kullback_leibler_penalty(row, weights, price);
            on_ball = radius && answer.distance > *radius;
        }
        if (on_ball) {
            if (kind == CHI_SQUARE)
                answer = chi_square(row, weights, *radius, -1);
            else
                status = kullback_leibler_ball(row, weights, *radius, &answer);
        }
    }
    if (status != OK) return status;
    double middle = answer.mean + answer.gain, paid = strength && on_ball ? price * answer.distance : 0;
    int highest = kind == TAIL ? answer.threshold == 0 : (answer.strength == 0 && (on_ball || price == 0));
    field[VALUE] = row->range == 0 || highest ? row->top - paid / scale : row->top + (middle - paid) / scale;
    field[PREMIUM] = (answer.gain - paid) / scale;
    field[THRESHOLD] = kind == TAIL ? threshold : row->top + answer.threshold / scale;
    field[STRENGTH] = strength && (!on_ball || kind == TAIL) ? *strength : answer.strength / scale;
    field[GAP] = isinf(answer.strength) ? 0 : (answer.bound - middle) / scale;
    field[DISTANCE] = answer.distance;
    field[ALPHA_SLOPE] = slope / scale;
    field[ON_BALL] = on_ball;
    return OK;
}

/* Ask for large pages where weights of many megabytes are written for the first time. */
static void expect_pages(char *at, long bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21;
    uintptr_t first = ((uintptr_t)at + page - 1) & ~(page - 1), last = ((uintptr_t)at + bytes) & ~(page - 1);
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)at, (void)bytes;
#endif
}

/* Solves rows [count, n] of contiguous float64 or float32 losses; radius, strength and alpha, one a row, may be NULL.
 *
 * Writes weights like the losses and fields [FIELDS, count], of which rows from `first` to `last` are this call's.
 * Returns 0, or 8 * row + why the row is refused.
 */
__attribute__((visibility("default"))) long drrho_solve(int kind, int single, long n, long count, long first, long last,
                                                        const char *z, const double *radius, const double *strength,
                                                        const double *alpha, char *weights, double *fields) {
    long width = n * (single ? 4 : 8);
    expect_pages(weights + first * width, (last - first) * width);
    for (long i = first; i < last; i++) {
        Row row;
        Weights to = {.at = weights + i * width, .single = single}; /* the rest is zero */
        double field[FIELDS];
        const double *r = radius ? radius + i : NULL, *s = strength ? strength + i : NULL;
        int status = look(&row, z + i * width, single, n);
        if (status == OK && refused(r)) status = BAD_RADIUS;
        if (status == OK && refused(s)) status = BAD_STRENGTH;
        if (status == OK && kind == TAIL && !(alpha[i] > 0 && alpha[i] <= 1)) status = BAD_ALPHA;
        if (status == OK) status = solve(kind, &row, &to, r, s, alpha ? alpha[i] : 0, field);
        if (status != OK) return 8 * i + status;
        for (int j = 0; j < FIELDS; j++) fields[j * count + i] = field[j];
    }
    return 0;
}
