/* Exact solutions of plain CPU rows: the entry of the library, and what all its answers share. */

#include "kernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#define EXPORTED __attribute__((visibility("default")))
#define VERSION 2 /* of what is passed and returned, which native.py asks for */

/* What is returned for each row beside the weights, in this order. */
enum { VALUE, PREMIUM, THRESHOLD, STRENGTH, GAP, DISTANCE, ALPHA_SLOPE, ON_BALL, FIELDS };

Team *gather(int threads);
void dismiss(Team *team);

/* Whether a parameter may not be what it is; absent ones are NULL. */
INLINE int refused(const double *parameter) { return parameter && !(*parameter >= 0 && *parameter < INFINITY); }

static int solve_one(int kind, Row *row, double order, double alpha, double radius, double price, Answer *answer) {
    switch (kind) {
        case CHI_SQUARE: return chi_square(row, radius, price, answer);
        case KULLBACK_LEIBLER: return kullback_leibler(row, radius, price, answer);
        case TAIL: return tail_mean(row, alpha, answer);
        case TOTAL_VARIATION: return total_variation(row, radius, price, answer);
        case CAPPED: return capped(row, alpha, radius, price, answer);
        default: return powers(row, order, radius, price, answer);
    }
}

static int solve(int kind, Row *row, double order, double alpha, const double *radius, const double *strength,
                 double *field) {
    Answer answer;
    double scale = row->scale, price = strength ? *strength * scale : -1;
    int on_ball = strength == NULL, status = OK;
    spread_out(row);
    if (strength || kind == TAIL) status = solve_one(kind, row, order, alpha, 0, price, &answer);
    if (strength && radius && kind != TAIL && status == OK) on_ball = answer.distance > *radius;
    if (on_ball && kind != TAIL) status = solve_one(kind, row, order, alpha, *radius, -1, &answer);
    if (status != OK) return status;
    double gap = isinf(answer.strength) ? 0 : answer.dual - answer.gain;
    double allowed = (row->single ? 1e-7 : 1e-9) * fabs(answer.gain) + 64 * DBL_EPSILON * row->range;
    if (!(fabs(gap) <= allowed) || isinf(allowed)) return DECLINED;
    /* Weak duality forbids a negative gap: it is rounding, of D where large terms cancel, and may be had smaller. */
    double size = row->range + scale * fabs(row->top);
    if (gap < -4 * (row->single ? FLT_EPSILON : DBL_EPSILON) * size) return DECLINED;
    double paid = strength && on_ball ? price * answer.distance : 0;
    int highest = row->range == 0 || (answer.highest && (on_ball || price == 0 || kind == TAIL));
    field[VALUE] = highest ? row->top - paid / scale : row->top + (row->mean + (answer.gain - paid)) / scale;
    field[PREMIUM] = (answer.gain - paid) / scale;
    field[THRESHOLD] = isnan(answer.exactly) ? row->top + answer.threshold / scale : answer.exactly;
    field[STRENGTH] = strength && (!on_ball || kind == TAIL) ? *strength : answer.strength / scale;
    field[GAP] = gap / scale;
    field[DISTANCE] = answer.distance;
    field[ALPHA_SLOPE] = answer.slope / scale;
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

EXPORTED int drrho_version(void) { return VERSION; }

/* Solves rows [count, n] of contiguous float64 or float32 losses; base (float64, `stride` from row to row, in numbers),
 * and radius, strength and alpha, one a row, may be NULL.
 *
 * Writes weights like the losses and fields [FIELDS, count], of which rows from `first` to `last` are this call's; the
 * passes over a long row are shared among so many threads. Returns 0, or 16 * row + why the row is refused, or -1 if
 * there are rows whose fields are NaN, because they are better solved otherwise.
 */
EXPORTED long drrho_solve(int kind, int single, int threads, double order, long n, long count, long first, long last,
                          const char *z, const double *base, long stride, const double *radius,
                          const double *strength, const double *alpha, char *weights, double *fields) {
    long width = n * (single ? 4 : 8), declined = 0, failed = 0;
    expect_pages(weights + first * width, (last - first) * width);
    Team *team = threads > 1 ? gather(threads) : NULL;
    for (long i = first; i < last && !failed; i++) {
        Row row = {.z = z + i * width, .base = (const char *)(base ? base + i * stride : NULL),
                   .weights = weights + i * width, .single = single, .n = n, .team = team};
        double field[FIELDS] = {0};
        const double *r = radius ? radius + i : NULL, *s = strength ? strength + i : NULL;
        int status = look(&row);
        if (status == OK && refused(r)) status = BAD_RADIUS;
        if (status == OK && refused(s)) status = BAD_STRENGTH;
        if (status == OK && alpha && !(alpha[i] > 0 && alpha[i] <= 1)) status = BAD_ALPHA;
        if (status == OK) status = solve(kind, &row, order, alpha ? alpha[i] : 0, r, s, field);
        if (status == DECLINED) {
            declined = -1;
            for (int j = 0; j < FIELDS; j++) field[j] = NAN;
        } else if (status != OK) {
            failed = 16 * i + status;
        }
        for (int j = 0; j < FIELDS; j++) fields[j * count + i] = field[j];
    }
    dismiss(team);
    return failed ? failed : declined;
}
