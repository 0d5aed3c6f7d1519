/* Passes over rows by one thread or several, a first look at them, and the ends of the parameter range. */

#include "kernels.h"

#include <pthread.h>

/* --- threads ------------------------------------------------------------------------------------------------ */

/* Threads that share the pieces of a row; each pass is one task. They live as long as one call of the library. */
struct Team {
    pthread_mutex_t lock;
    pthread_cond_t begun, ended;
    pthread_t *threads;
    int size, working, over;
    long task, next, pieces;
    Work *work;
    const void *in;
};

static void take_part(Team *team) {
    for (;;) {
        long piece = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
        if (piece >= team->pieces) return;
        team->work(team->in, piece);
    }
}

static void *be_part(void *of) {
    Team *team = of;
    long done = 0;
    pthread_mutex_lock(&team->lock);
    for (;;) {
        while (!team->over && team->task == done) pthread_cond_wait(&team->begun, &team->lock);
        if (team->over) break;
        done = team->task;
        pthread_mutex_unlock(&team->lock);
        take_part(team);
        pthread_mutex_lock(&team->lock);
        if (--team->working == 0) pthread_cond_signal(&team->ended);
    }
    pthread_mutex_unlock(&team->lock);
    return NULL;
}

Team *gather(int threads) {
    Team *team = calloc(1, sizeof *team);
    if (!team) return NULL;
    team->threads = malloc(threads * sizeof *team->threads);
    pthread_mutex_init(&team->lock, NULL), pthread_cond_init(&team->begun, NULL), pthread_cond_init(&team->ended, NULL);
    while (team->threads && team->size < threads - 1) { /* as many as there are to be had */
        if (pthread_create(&team->threads[team->size], NULL, be_part, team)) break;
        team->size++;
    }
    return team;
}

void dismiss(Team *team) {
    if (!team) return;
    pthread_mutex_lock(&team->lock);
    team->over = 1;
    pthread_cond_broadcast(&team->begun);
    pthread_mutex_unlock(&team->lock);
    for (int i = 0; i < team->size; i++) pthread_join(team->threads[i], NULL);
    pthread_mutex_destroy(&team->lock), pthread_cond_destroy(&team->begun), pthread_cond_destroy(&team->ended);
    free(team->threads), free(team);
}

void over_pieces(const Row *row, Work *work, const void *in) {
    long pieces = (row->n + row->piece - 1) / row->piece;
    Team *team = row->team;
    if (!team || pieces == 1) {
        for (long piece = 0; piece < pieces; piece++) work(in, piece);
        return;
    }
    pthread_mutex_lock(&team->lock);
    team->work = work, team->in = in, team->pieces = pieces, team->next = 0;
    team->working = team->size, team->task++;
    pthread_cond_broadcast(&team->begun);
    pthread_mutex_unlock(&team->lock);
    take_part(team);
    pthread_mutex_lock(&team->lock);
    while (team->working) pthread_cond_wait(&team->ended, &team->lock);
    pthread_mutex_unlock(&team->lock);
}

typedef struct {
    const Row *row;
    Pass *pass;
    const void *in;
    Sums *parts;
} Share;

static void sum_piece(const void *in, long piece) {
    const Share *share = in;
    long from = piece * share->row->piece, to = from + share->row->piece;
    share->pass(share->row, share->in, from, to < share->row->n ? to : share->row->n, share->parts + piece);
}

void over_row(const Row *row, Passes passes, const void *in, Sums *sums) {
    Pass *pass = passes[kind_of(row)];
    memset(sums, 0, sizeof *sums);
    if (row->n <= row->piece) {
        pass(row, in, 0, row->n, sums);
        return;
    }
    Sums parts[PIECES];
    memset(parts, 0, sizeof parts);
    over_pieces(row, sum_piece, &(Share){row, pass, in, parts});
    *sums = parts[0];
    for (long piece = 1; piece * row->piece < row->n; piece++) {
        const Sums *part = parts + piece;
        for (int j = 0; j < TOTALS; j++) {
            add_number(&sums->of[j], part->of[j].sum);
            sums->of[j].dropped += part->of[j].dropped;
        }
        sums->tied = part->high > sums->high ? part->tied : sums->tied + (part->high == sums->high ? part->tied : 0);
        sums->high = part->high > sums->high ? part->high : sums->high;
        sums->low = part->low < sums->low ? part->low : sums->low;
    }
}

/* --- a first look ------------------------------------------------------------------------------------------- */

INLINE void extremes(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const double origin = *(const double *)in;
    reals none = ALL(0.0), start = ALL(origin), most = ALL(INFINITY);
    reals high[2] = {kind & BASED ? -most : start, kind & BASED ? -most : start}, low[2] = {-high[0], -high[0]};
    if (!(kind & BASED)) low[0] = low[1] = start;
    reals odd[2] = CLEARED, sum[2] = CLEARED, masses[2] = CLEARED, wrong[2] = CLEARED;
    STRETCHES(from, to) {
        PAIRS {
            long i = pair + u * LANES;
            reals x = load(kind, row, i);
            odd[u] += x * 0.0; /* NaN for what is not finite */
            if (kind & BASED) {
                reals m = mass(kind, row, i);
                high[u] = larger(choose(m > 0.0, x, -most), high[u]);
                low[u] = smaller(choose(m > 0.0, x, most), low[u]);
                sum[u] += (x - start) * m;
                masses[u] += m;
                wrong[u] += choose(m >= 0.0, none, ALL(1.0));
            } else {
                high[u] = larger(x, high[u]);
                low[u] = smaller(x, low[u]);
                sum[u] += x - start;
            }
        }
        add_pair(&sums->of[0], sum);
        if (kind & BASED) add_pair(&sums->of[1], masses), add_pair(&sums->of[3], wrong);
    }
    add_pair(&sums->of[2], odd);
    high[0] = larger(high[0], high[1]), low[0] = smaller(low[0], low[1]);
    sums->high = high[0][0], sums->low = low[0][0];
    for (int j = 1; j < LANES; j++) {
        if (high[0][j] > sums->high) sums->high = high[0][j];
        if (low[0][j] < sums->low) sums->low = low[0][j];
    }
}

PASSES(extremes)

/* Of float32 losses without base weights: the same in one pass, with their squares and ties. Squares about a loss lose
 * few digits, of which float64 sums have plenty. */
static void survey(const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const double origin = *(const double *)in;
    reals start = ALL(origin), sum[2] = CLEARED, square[2] = CLEARED;
    floats high = spread((float)origin), low = high;
    float_bits tied = {0};
    long pairs = to < row->whole ? to : row->whole;
    STRETCHES(from, pairs) {
        for (long i = begin; i < end; i += PAIR) {
            floats z = load_floats(row, i), higher = larger_floats(z, high);
            tied = (tied & (higher == high)) - (z == higher);
            high = higher, low = smaller_floats(z, low);
            _Pragma("GCC unroll 2") for (int u = 0; u < 2; u++) {
                reals y = load(SINGLE, row, i + u * LANES) - start;
                sum[u] += y;
                square[u] += y * y;
            }
        }
        add_pair(&sums->of[0], sum), add_pair(&sums->of[1], square);
    }
    sums->high = high[0], sums->low = low[0];
    for (int j = 1; j < PAIR; j++) sums->high = fmax(sums->high, high[j]), sums->low = fmin(sums->low, low[j]);
    for (int j = 0; j < PAIR; j++) sums->tied += high[j] == sums->high ? tied[j] : 0;
    for (int j = 0; j < PAIR && pairs + j < to; j++) {
        double z = row->tail[j], y = z - origin;
        sums->tied = z > sums->high ? 1 : sums->tied + (z == sums->high);
        sums->high = fmax(sums->high, z), sums->low = fmin(sums->low, z);
        add_number(&sums->of[0], y), add_number(&sums->of[1], y * y);
    }
}

static Passes survey_passes = {NULL, NULL, survey, NULL};

INLINE double loss(const Row *row, long i) {
    return row->single ? ((const float *)row->z)[i] : ((const double *)row->z)[i];
}

/* Fills in what follows from losses, base weights and n. */
int look(Row *row) {
    double origin = loss(row, 0);
    row->whole = row->n / PAIR * PAIR;
    long piece = ((row->n + PIECES - 1) / PIECES + STRETCH - 1) / STRETCH * STRETCH;
    row->piece = piece < LEAST_PIECE ? LEAST_PIECE : piece;
    for (int j = 0; j < PAIR; j++) {
        long i = row->whole + j;
        row->tail_mass[j] = i >= row->n ? 0 : row->base ? ((const double *)row->base)[i] : 1;
        row->tail[j] = i >= row->n ? origin : loss(row, i);
    }
    Sums sums;
    row->surveyed = kind_of(row) == SINGLE;
    over_row(row, row->surveyed ? survey_passes : extremes_passes, &origin, &sums);
    row->top = sums.high, row->low = sums.low;
    if (row->surveyed ? !isfinite(result(sums.of[0])) : !(result(sums.of[2]) == 0)) return BAD_LOSSES;
    if (row->base && result(sums.of[3]) != 0) return BAD_BASE;
    row->all = row->base ? result(sums.of[1]) : row->n;
    if (!(row->all > 0 && row->all < INFINITY)) return BAD_BASE;
    double span = row->top - row->low;
    if (!isfinite(span)) return BAD_LOSSES;
    for (int j = 0; j < PAIR; j++)
        if (row->whole + j >= row->n) row->tail[j] = row->top;
    int exponent = span > 0 ? ilogb(span) : 0;
    row->scale = ldexp(1.0, exponent < -1023 ? 1023 : -exponent);
    row->range = span * row->scale;
    double mean = (result(sums.of[0]) / row->all + (origin - row->top)) * row->scale;
    row->mean = mean <= 0 && mean >= -row->range ? mean : -0.5 * row->range;
    if (row->surveyed) {
        double shift = result(sums.of[0]) / row->all;
        double variance = result(sums.of[1]) / row->all - shift * shift;
        row->variance = variance * row->scale * row->scale, row->share = sums.tied / row->all;
        row->surveyed = shift * shift <= 256 * variance; /* else the square has canceled */
    }
    return OK;
}

INLINE void about_center(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    reals sum[2] = CLEARED, square[2] = CLEARED, tied[2] = CLEARED, center = ALL(*(const double *)in);
    STRETCHES(from, to) {
        PAIRS {
            reals d = depth(kind, row, pair + u * LANES), m = mass(kind, row, pair + u * LANES);
            reals y = d - center, ym = y * m;
            sum[u] += ym;
            square[u] += y * ym;
            tied[u] += choose(d == 0.0, m, ALL(0.0));
        }
        add_pair(&sums->of[0], sum), add_pair(&sums->of[1], square), add_pair(&sums->of[2], tied);
    }
}

PASSES(about_center)

/* Mean and variance of d, about a mean that is nearly right, and the share of ties at the maximum. */
void spread_out(Row *row) {
    if (row->surveyed) return;
    for (int attempt = 0; attempt < 2; attempt++) {
        double center = row->mean;
        Sums sums;
        over_row(row, about_center_passes, &center, &sums);
        double shift = result(sums.of[0]) / row->all;
        row->variance = result(sums.of[1]) / row->all - shift * shift;
        row->mean += shift;
        row->share = result(sums.of[2]) / row->all;
        if (shift * shift <= row->variance / 16) return; /* else the square has canceled */
    }
}

static int descending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

#define SAMPLED_FROM (1 << 17)
#define SORTED 1024
#define EVERY 32

/* Whether any of the PAIR losses from i is above a number. */
INLINE int reaches(const Row *row, long i, double floor) {
    if (row->single) return any_floats(load_floats(row, i) > spread((float)floor));
    return any((load(0, row, i) > floor) | (load(0, row, i + LANES) > floor));
}

int take_sample(const Row *row, Row *sample) {
    if (row->n < SAMPLED_FROM) return 0;
    double sorted[SORTED];
    long step = row->n / SORTED, room = row->n / 16, count = 0;
    for (int j = 0; j < SORTED; j++) sorted[j] = loss(row, j * step);
    qsort(sorted, SORTED, sizeof(double), descending);
    double floor = sorted[SORTED / 64];
    double *values = malloc(2 * (room + PAIR) * sizeof(double)), *masses = values + room + PAIR;
    if (!values) return 0;
    const double *base = (const double *)row->base;
    double high = 0;
    for (long pair = 0; pair < row->whole && count <= room; pair += PAIR) {
        if (!reaches(row, pair, floor)) continue;
        for (long i = pair; i < pair + PAIR; i++) {
            double z = loss(row, i);
            if (z <= floor) continue;
            values[count] = z, masses[count] = base ? base[i] : 1;
            high += masses[count++];
        }
    }
    long top_count = count;
    double low = 0;
    for (long i = 0; i < row->whole && count <= room; i += EVERY) {
        double z = loss(row, i);
        if (z > floor) continue;
        values[count] = z, masses[count] = base ? base[i] : 1;
        low += masses[count++];
    }
    if (count > room || !(low > 0) || !(row->all > high)) { /* too many to be worth it, or too few */
        free(values);
        return 0;
    }
    double factor = (row->all - high) / low;
    for (long i = top_count; i < count; i++) masses[i] *= factor;
    *sample = (Row){.z = (const char *)values, .base = (const char *)masses, .n = count};
    int status = look(sample);
    /* In the units of the row, whose maximum might have no place in its whole vectors. */
    sample->top = row->top, sample->low = row->low, sample->scale = row->scale, sample->range = row->range;
    for (int j = 0; j < PAIR; j++)
        if (sample->whole + j >= sample->n) sample->tail[j] = row->top;
    sample->mean = row->mean;
    spread_out(sample);
    if (status == OK && sample->share > 0 && sample->variance > 0) return 1;
    free(values);
    return 0;
}

/* --- the ends of the parameter range ------------------------------------------------------------------------ */

INLINE void on_ties(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    reals weight = ALL(*(const double *)in);
    (void)sums;
    for (long i = from; i < to; i += LANES)
        store(kind, row, i, weighed(kind, row, i, choose(depth(kind, row, i) == 0.0, weight, ALL(0.0))));
}

PASSES(on_ties)

Answer at_maximum(const Row *row, double distance) {
    Sums sums;
    double weight = 1 / (row->share * row->all);
    over_row(row, on_ties_passes, &weight, &sums);
    return (Answer){.gain = -row->mean, .dual = -row->mean, .distance = distance, .highest = 1, .exactly = NAN};
}

INLINE void on_all(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    reals weight = ALL(*(const double *)in);
    (void)sums;
    for (long i = from; i < to; i += LANES) store(kind, row, i, weighed(kind, row, i, weight));
}

PASSES(on_all)

Answer at_mean(const Row *row) {
    Sums sums;
    double weight = 1 / row->all;
    over_row(row, on_all_passes, &weight, &sums);
    return (Answer){.threshold = row->mean, .strength = INFINITY, .exactly = NAN};
}

INLINE void times(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const double *factors = in;
    (void)sums;
    for (long i = from; i < to; i += LANES) {
        reals weights = load_weights(kind, row, i);
        weights *= factors[0];
        if (factors[1] != 0) weights += weighed(kind, row, i, ALL(factors[1]));
        store(kind, row, i, weights);
    }
}

PASSES(times)

void reweigh(const Row *row, double factor, double added) {
    Sums sums;
    double factors[2] = {factor, added};
    over_row(row, times_passes, factors, &sums);
}

typedef struct {
    double slope, center;
} Leaning;

INLINE floats leant(const Row *row, const Leaning *of, floats z, floats weights) {
    floats y = less(z, split(row->top + of->center / row->scale));
    return weights + weights * (y * (float)(of->slope * row->scale));
}

static void lean_piece(const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Leaning of = *(const Leaning *)in;
    long pairs = to < row->whole ? to : row->whole;
    (void)sums;
    for (long i = from; i < pairs; i += PAIR) {
        floats_at_any *weights = (floats_at_any *)(row->weights + 4 * i);
        *weights = leant(row, &of, load_floats(row, i), *weights);
    }
    if (pairs == to) return;
    floats z, weights = {0};
    for (int j = 0; j < PAIR; j++) z[j] = (float)row->tail[j];
    memcpy(&weights, row->weights + 4 * pairs, 4 * (to - pairs));
    weights = leant(row, &of, z, weights);
    memcpy(row->weights + 4 * pairs, &weights, 4 * (to - pairs));
}

static Passes lean_passes = {NULL, NULL, lean_piece, NULL};

void lean(const Row *row, double slope, double center) {
    Sums sums;
    over_row(row, lean_passes, &(Leaning){slope, center}, &sums);
}

/* --- roots -------------------------------------------------------------------------------------------------- */

int advance(Search *s, double *x, double value, double step, int ready) {
    int below = ready && value > 0, above = ready && value <= 0;
    if (below && *x >= s->low) s->low = *x, s->at_low = value;
    if (above && *x <= s->high) s->high = *x, s->at_high = value;
    s->saturated = ready && (*x <= s->least || *x >= s->largest);
    int reached = fabs(value) <= s->tolerance, bounded = isfinite(s->low) && isfinite(s->high);
    int collapsed = s->high - s->low <= 4 * DBL_EPSILON * fmax(fabs(*x), 1);
    double slope = -value / step, bent = step, size = fabs(step), error = size * size;
    if (isfinite(slope) && slope < 0) {
        double between = (slope - s->slope) / (*x - s->x);
        if (isfinite(between) && ready) s->curvature = between;
        s->x = *x, s->slope = slope;
        double factor = 1 + 0.5 * step * s->curvature / slope; /* Halley's step, if the curvature is known */
        if (factor > 0.5 && factor < 2) {
            bent = step / factor;
            error = 0.1 * fabs(bent - step) + fmax(1e-3, size) * size * size;
        }
    }
    double newton = *x + bent;
    int inside = newton > s->low && newton < s->high;
    if (ready && inside && !s->saturated && (error <= s->close || (reached && s->close > 0))) {
        *x = newton;
        return LAST;
    }
    if ((ready && (reached || collapsed)) || s->saturated) {
        s->missed = !reached && bounded && !s->saturated;
        if (!s->missed || !below || !s->from_above) return FOUND;
        *x = s->high;
        return LAST;
    }
    if (++s->iteration >= s->iterations) return LOST;
    if (!ready) return AGAIN;
    int trusted = inside && bent >= -s->longest_down && bent <= s->longest_up && s->iteration <= s->newton_iterations &&
                  (2 * size <= s->before || !bounded);
    double following = newton;
    if (!trusted) { /* every other time the chord, which finds a root close to an end, as next to a plateau */
        double chord = s->low + (s->high - s->low) * (s->at_low / (s->at_low - s->at_high));
        int odd = ++s->fallen % 2 == 1;
        if (odd && chord > s->low && chord < s->high)
            following = chord;
        else
            following = bounded ? (s->low + s->high) / 2 : below ? *x + s->longest_up : *x - s->longest_up;
    }
    following = fmin(fmax(following, s->least), s->largest);
    s->before = s->last, s->last = fabs(following - *x);
    *x = following;
    return AGAIN;
}
