/* What the kernels share: vectors, sums, rows and the passes over them, the ends of a parameter's range, and roots.
 *
 * The algorithms are those of the Python modules beside this file, whose comments give the mathematics; here a pass
 * over a row is one loop, with nothing stored but the weights. Losses are read as d = (z - maximum) * 2^j, with the
 * range of d in [1, 2). Sums run in the lanes of a register over stretches of 512 losses, which are added with
 * compensation, and the pieces of a long row in their order, whatever thread has summed them. A row's last, partial
 * vectors go through the same instructions as all others, so that tied losses get weights that are equal in every bit.
 */

#ifndef DRRHO_KERNELS_H
#define DRRHO_KERNELS_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
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
typedef uint64_t plain_bits __attribute__((vector_size(8 * LANES)));
typedef int32_t counts __attribute__((vector_size(4 * LANES)));
/* PAIR losses that are float32 in one register. */
typedef float floats __attribute__((vector_size(8 * LANES)));
typedef float floats_at_any __attribute__((vector_size(8 * LANES), aligned(4), may_alias));
typedef int32_t float_bits __attribute__((vector_size(8 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#define PAIR (2 * LANES)
#define STRETCH 512
#define LEAST_PIECE 65536 /* losses of a long row that one thread sums at a time */
#define PIECES 64         /* at most of a row */
#define TOTALS 6

enum { OK, BAD_LOSSES, BAD_RADIUS, BAD_STRENGTH, BAD_ALPHA, BAD_BASE, NO_MEMORY, NOT_CONVERGED, DECLINED };
enum { CHI_SQUARE, KULLBACK_LEIBLER, TAIL, TOTAL_VARIATION, CAPPED, POWER };

/* --- sums --------------------------------------------------------------------------------------------------- */

/* A number with what rounding has dropped from it (Neumaier). */
typedef struct {
    double sum, dropped;
} Total;

INLINE void add_number(Total *total, double x) {
    double sum = total->sum + x;
    total->dropped += fabs(total->sum) >= fabs(x) ? (total->sum - sum) + x : (x - sum) + total->sum;
    total->sum = sum;
}

INLINE void add(Total *total, reals lanes) {
    double x = lanes[0];
    for (int j = 1; j < LANES; j++) x += lanes[j];
    add_number(total, x);
}

INLINE double result(Total total) {
    double all = total.sum + total.dropped;
    return isfinite(all) ? all : total.sum; /* compensation of an overflow is not a number */
}

/* What a pass over a row brings. */
typedef struct {
    Total of[TOTALS];
    double high, low, tied; /* tied: how many are as high */
} Sums;

/* --- rows --------------------------------------------------------------------------------------------------- */

typedef struct Team Team;

/* One row, and its last, partial pair of vectors padded by losses without mass. */
typedef struct {
    const char *z, *base; /* base: float64, NULL for uniform weights */
    char *weights;
    int single; /* losses and weights are float32 */
    long n, whole, piece; /* whole: in complete pairs of vectors */
    Team *team;
    double top, low, scale, range; /* range: of d */
    double all;                    /* mass of all losses: n, or the sum of the base weights */
    double mean, variance, share;  /* of d; share: of the losses tied at the maximum */
    int surveyed;                  /* whether these are known */
    int rough;                     /* whether passes may be made in float32, in which it is stored */
    double tail[PAIR], tail_mass[PAIR];
} Row;

typedef void Pass(const Row *row, const void *in, long from, long to, Sums *sums);
/* How losses are stored: what a pass is compiled for. */
enum { BASED = 1, SINGLE = 2, KINDS = 4 }; /* with base weights; as float32, like the weights */
typedef Pass *const Passes[KINDS];

INLINE int kind_of(const Row *row) { return (row->base ? BASED : 0) | (row->single ? SINGLE : 0); }

void over_row(const Row *row, Passes passes, const void *in, Sums *sums);
/* Runs work(in, piece) for every piece of a row, by all threads. */
typedef void Work(const void *in, long piece);
void over_pieces(const Row *row, Work *work, const void *in);

/* Makes the passes from a function whose first argument is the kind of row. */
#define PASS(name, kind)                                                                                  \
    static void name##_##kind(const Row *row, const void *in, long from, long to, Sums *sums) {           \
        name(kind, row, in, from, to, sums);                                                              \
    }
#define PASSES(name)                                                     \
    PASS(name, 0)                                                        \
    PASS(name, 1)                                                        \
    PASS(name, 2)                                                        \
    PASS(name, 3)                                                        \
    static Passes name##_passes = {name##_0, name##_1, name##_2, name##_3};

static const double ONES[8] = {1, 1, 1, 1, 1, 1, 1, 1};

INLINE reals choose(bits where, reals one, reals other) {
    return (reals)(((bits)one & where) | ((bits)other & ~where));
}

/* All lanes, without a literal of as many numbers. */
INLINE floats spread(float x) { return x - (floats){0}; }

INLINE floats choose_floats(float_bits where, floats one, floats other) {
    return (floats)(((float_bits)one & where) | ((float_bits)other & ~where));
}

#if defined(__AVX512F__)
INLINE floats larger_floats(floats a, floats b) { return (floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE floats smaller_floats(floats a, floats b) { return (floats)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE reals larger(reals a, reals b) { return (reals)_mm512_max_pd((__m512d)a, (__m512d)b); }
INLINE reals smaller(reals a, reals b) { return (reals)_mm512_min_pd((__m512d)a, (__m512d)b); }
INLINE reals root(reals a) { return (reals)_mm512_sqrt_pd((__m512d)a); }
INLINE floats root_of_floats(floats a) { return (floats)_mm512_sqrt_ps((__m512)a); }
INLINE floats narrowed(reals a, reals b) {
    __m512d half = _mm512_castps_pd(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)a)));
    return (floats)_mm512_insertf64x4(half, _mm256_castps_pd(_mm512_cvtpd_ps((__m512d)b)), 1);
}
#elif defined(__AVX__)
INLINE floats larger_floats(floats a, floats b) { return (floats)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE floats smaller_floats(floats a, floats b) { return (floats)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE reals larger(reals a, reals b) { return (reals)_mm256_max_pd((__m256d)a, (__m256d)b); }
INLINE reals smaller(reals a, reals b) { return (reals)_mm256_min_pd((__m256d)a, (__m256d)b); }
INLINE reals root(reals a) { return (reals)_mm256_sqrt_pd((__m256d)a); }
INLINE floats root_of_floats(floats a) { return (floats)_mm256_sqrt_ps((__m256)a); }
INLINE floats narrowed(reals a, reals b) {
    return (floats)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)b), _mm256_cvtpd_ps((__m256d)a));
}
#else
INLINE floats larger_floats(floats a, floats b) { return choose_floats(a > b, a, b); }
INLINE floats smaller_floats(floats a, floats b) { return choose_floats(a < b, a, b); }
INLINE reals larger(reals a, reals b) { return choose(a > b, a, b); }
INLINE reals smaller(reals a, reals b) { return choose(a < b, a, b); }
INLINE reals root(reals a) { return (reals){sqrt(a[0]), sqrt(a[1])}; }
INLINE floats root_of_floats(floats a) { return (floats){sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }
INLINE floats narrowed(reals a, reals b) { return (floats){(float)a[0], (float)a[1], (float)b[0], (float)b[1]}; }
#endif

/* Whether a flag of any lane is set. */
#if defined(__AVX512DQ__)
INLINE int any(bits where) { return _mm512_movepi64_mask((__m512i)where) != 0; }
INLINE int any_floats(float_bits where) { return _mm512_movepi32_mask((__m512i)where) != 0; }
#elif defined(__AVX__)
INLINE int any(bits where) { return _mm256_movemask_pd((__m256d)where) != 0; }
INLINE int any_floats(float_bits where) { return _mm256_movemask_ps((__m256)where) != 0; }
#else
INLINE int any(bits where) { return (where[0] | where[1]) != 0; }
INLINE int any_floats(float_bits where) { return any((bits)where); }
#endif

INLINE floats load_floats(const Row *row, long i) { return *(const floats_at_any *)(row->z + 4 * i); }

INLINE reals load(int kind, const Row *row, long i) {
    if (i >= row->whole) return *(const reals_at_any *)(row->tail + (i - row->whole));
    if (kind & SINGLE) return __builtin_convertvector(*(const singles_at_any *)(row->z + 4 * i), reals);
    return *(const reals_at_any *)(row->z + 8 * i);
}

/* Losses that are float32 less a number in float64: in float32 relative to the difference. */
typedef struct {
    float high, low;
} Split;

INLINE Split split(double x) {
    float high = (float)x;
    return (Split){high, (float)(x - high)};
}

INLINE floats less(floats z, Split from) { return (z - from.high) - from.low; }

/* The mass of losses: 1 or their base weight, 0 for what pads the row. */
INLINE reals mass(int kind, const Row *row, long i) {
    const char *of = kind & BASED ? row->base + 8 * i : (const char *)ONES;
    return *(const reals_at_any *)(i >= row->whole ? (const char *)(row->tail_mass + (i - row->whole)) : of);
}

/* Losses without base weight may lie outside: they are moved to the nearer end. */
INLINE reals depth(int kind, const Row *row, long i) {
    reals d = (load(kind, row, i) - row->top) * row->scale;
    return kind & BASED ? larger(smaller(d, ALL(0.0)), ALL(-row->range)) : d;
}

/* Whether passes over float32 losses may be made on them as they are, without a conversion. */
INLINE int is_narrow(const Row *row) {
    return kind_of(row) == SINGLE && row->scale > 0x1p-60 && row->scale < 0x1p60;
}

/* Whether a row may be summed in float32 on the way to a root, of which no digit reaches an answer. */
INLINE Row roughened(const Row *row) {
    Row rough = *row;
    rough.rough = kind_of(row) != SINGLE || is_narrow(row);
    return rough;
}

/* (d - origin) rate of PAIR losses in float32. */
typedef struct {
    double origin, rate;
    Split from, scaled; /* the same of the losses themselves */
} Line;

INLINE Line line_of(const Row *row, double origin, double rate) {
    return (Line){origin, rate, split(row->top + origin / row->scale), split(rate * row->scale)};
}

INLINE floats on_line(int kind, const Row *row, long i, const Line *line) {
    if (kind == SINGLE && i < row->whole) {
        floats y = less(load_floats(row, i), line->from);
        return y * line->scaled.high + y * line->scaled.low;
    }
    reals first = (depth(kind, row, i) - line->origin) * line->rate;
    return narrowed(first, (depth(kind, row, i + LANES) - line->origin) * line->rate);
}

INLINE floats rough_mass(int kind, const Row *row, long i, int left) {
    if (!left) return (floats){0};
    if (!(kind & BASED) && i < row->whole) return spread(1.0f);
    return narrowed(mass(kind, row, i), mass(kind, row, i + LANES));
}

INLINE reals weighed(int kind, const Row *row, long i, reals x) { return kind & BASED ? x * mass(kind, row, i) : x; }

INLINE void store(int kind, const Row *row, long i, reals values) {
    if (i >= row->whole) {
        for (int j = 0; j < LANES && i + j < row->n; j++) {
            if (kind & SINGLE)
                ((float *)row->weights)[i + j] = (float)values[j];
            else
                ((double *)row->weights)[i + j] = values[j];
        }
    } else if (kind & SINGLE) {
        *(singles_at_any *)(row->weights + 4 * i) = __builtin_convertvector(values, singles);
    } else {
        *(reals_at_any *)(row->weights + 8 * i) = values;
    }
}

/* The weights that are stored, 0 beyond the row. */
INLINE reals load_weights(int kind, const Row *row, long i) {
    Row stored = {.z = row->weights, .whole = row->whole};
    if (i < row->whole) return load(kind, &stored, i);
    reals weights = ALL(0.0);
    for (int j = 0; j < LANES && i + j < row->n; j++)
        weights[j] = kind & SINGLE ? ((const float *)row->weights)[i + j] : ((const double *)row->weights)[i + j];
    return weights;
}

/* Runs what follows for every stretch of a piece, and inside it for every LANES losses from i. */
#define STRETCHES(from, to) \
    for (long begin = from, end; begin < to && (end = begin + STRETCH < to ? begin + STRETCH : to, 1); begin = end)
#define VECTORS for (long i = begin; i < end; i += LANES)
/* The same in pairs, whose sums [2] do not wait for each other. */
#define PAIRS                                         \
    for (long pair = begin; pair < end; pair += PAIR) \
        _Pragma("GCC unroll 2") for (int u = 0; u < 2; u++)
/* The same in pairs of vectors of float32, of which the last may be one vector, twice; only once with a mass. */
#define ROUGH_PAIRS for (long pair = begin; pair < end; pair += 2 * PAIR)
#define AT(u) (LEFT(u) ? pair + u * PAIR : pair)
#define LEFT(u) (pair + u * PAIR < end)
/* For two vectors at a time, step by step in turns: a step waits for the last of its own vector. */
#define BOTH _Pragma("GCC unroll 2") for (int u = 0; u < 2; u++)
#define CLEARED {ALL(0.0), ALL(0.0)}

INLINE void add_floats(Total *total, floats lanes) {
    double x = 0;
    for (int j = 0; j < PAIR; j++) x += lanes[j];
    add_number(total, x);
}

INLINE void add_pair(Total *total, reals sums[2]) {
    add(total, sums[0] + sums[1]);
    sums[0] = sums[1] = ALL(0.0);
}

int look(Row *row);
void spread_out(Row *row);

/* Fills a row with a weighted part of another that is long: all of its largest losses, on which the solution hangs
 * most, and every 32nd of the others. Returns whether there is one, whose `z` is to be freed. */
int take_sample(const Row *row, Row *sample);

/* --- answers ------------------------------------------------------------------------------------------------ */

typedef struct {
    double gain, dual;          /* by how much the primal and the dual value exceed the mean, in units of d */
    double threshold, strength; /* in units of d */
    double distance, slope;     /* D, and d value / d alpha, in units of d */
    int highest;                /* whether the value is the maximum itself, but for what is paid */
    double exactly;             /* the threshold in units of the losses, NaN where that is to be computed */
} Answer;

/* The least divergent weights that reach the maximum: the base weights restricted to the ties. */
Answer at_maximum(const Row *row, double distance);
/* The base weights. */
Answer at_mean(const Row *row);
/* Multiplies the stored weights by a factor, and adds a multiple of the base weights. */
void reweigh(const Row *row, double factor, double added);

/* Multiplies the stored weights of a narrow row by 1 + slope (d - center). */
void lean(const Row *row, double slope, double center);

/* Makes stored weights sum to one and lie in the ball (radius < 0: there is none), as rounding may have left D outside:
 * it is convex, and zero at the base weights. */
INLINE void into_ball(const Row *row, Answer *answer, double radius, double total) {
    double kept = 1, unfelt = row->single ? FLT_EPSILON / 4 : 4 * DBL_EPSILON;
    if (radius >= 0 && answer->distance > radius * (1 + 2 * DBL_EPSILON)) {
        /* Its slope towards them, mean (t - 1) phi'(t), is gain / strength, which no more than a little of them needs. */
        double excess = answer->distance - radius, slope = answer->gain / answer->strength;
        kept = 1 - fmin(excess / answer->distance, excess < 1e-9 * radius ? 1.001 * excess / slope : 1);
        answer->gain *= kept, answer->distance = radius;
    }
    /* By weak duality, what exceeds the bound does so by the rounding of D at the weights. */
    if (answer->gain > answer->dual && answer->gain - answer->dual <= 1e-11 * answer->gain) {
        if (radius >= 0) kept *= answer->dual / answer->gain;
        answer->gain = answer->dual;
    }
    if (fabs(total - 1) > unfelt || 1 - kept > unfelt) reweigh(row, kept / total, (1 - kept) / row->all);
}

/* How near log D has to be to its own, and with what error x may be found: float32 rows get answers with digits to
 * spare, as float64 rows do. */
INLINE double tolerated(const Row *row, double radius) {
    return (row->single ? 1e-8 : 450 * DBL_EPSILON) + 4 * DBL_EPSILON / fmax(sqrt(radius), 1e-3);
}
INLINE double closeness(const Row *row) { return row->single ? 1e-8 : 1e-16; }

/* --- roots -------------------------------------------------------------------------------------------------- */

/* A root of a function that decreases in x, by safeguarded Newton: the machine of root.py for one row. */
typedef struct {
    double tolerance, longest_down, longest_up, least, largest;
    int iterations, newton_iterations;
    double close;           /* error of x after which a step is the last; 0: the function is wanted at the root */
    double curvature;       /* second derivative, NaN where unknown */
    double x, slope;        /* of the last value */
    double low, high;       /* of x */
    double at_low, at_high; /* values there */
    double last, before;    /* sizes of the last two steps */
    int from_above; /* where no number meets the tolerance, the one above is wanted */
    int iteration, fallen, saturated, missed;
} Search;

enum { FOUND, AGAIN, LAST, LOST };

INLINE Search open_search(double tolerance, int iterations, int newton_iterations, double down, double up, double least,
                          double largest) {
    return (Search){.tolerance = tolerance, .longest_down = down, .longest_up = up, .least = least, .largest = largest,
                    .iterations = iterations, .newton_iterations = newton_iterations, .low = -INFINITY,
                    .high = INFINITY, .at_low = NAN, .at_high = NAN, .last = INFINITY, .before = INFINITY,
                    .curvature = NAN, .slope = NAN};
}

/* Moves x by what is known at it: the value, positive below the root, and Newton's step. FOUND: x is the root, and
 * was not moved; LAST: x was moved to the root, where the function is not known yet. */
int advance(Search *search, double *x, double value, double step, int ready);

/* --- families ----------------------------------------------------------------------------------------------- */

/* Each solves a ball (price < 0) or a penalty, whose price is in units of d. */
int chi_square(Row *row, double radius, double price, Answer *answer);
int kullback_leibler(Row *row, double radius, double price, Answer *answer);
int powers(Row *row, double order, double radius, double price, Answer *answer);
int total_variation(Row *row, double radius, double price, Answer *answer);
int tail_mean(Row *row, double alpha, Answer *answer);
int capped(Row *row, double alpha, double radius, double price, Answer *answer);

#endif
