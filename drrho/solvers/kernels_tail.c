/* Piecewise linear divergences by selection: CVaR and total variation (tail.py). */

#include "kernels_tail.h"

/* --- selection ---------------------------------------------------------------------------------------------- */

#define BUCKETS 2048
#define SORTED_BY_INSERTION 40

typedef struct {
    double key, mass;
} Entry;

static int descending(const void *a, const void *b) {
    double x = ((const Entry *)a)->key, y = ((const Entry *)b)->key;
    return (x < y) - (x > y);
}

static void sort_few(Entry *entries, long n) {
    for (long i = 1; i < n; i++) {
        Entry moved = entries[i];
        long j = i;
        for (; j > 0 && entries[j - 1].key < moved.key; j--) entries[j] = entries[j - 1];
        entries[j] = moved;
    }
}

/* The first key in descending order whose mass, with that of what precedes it, reaches what is wanted. */
static double first_to_reach(Entry *entries, long n, double wanted, int strictly) {
    for (int round = 0; n > SORTED_BY_INSERTION && round < 4; round++) {
        double high = entries[0].key, low = high;
        for (long i = 1; i < n; i++) {
            high = entries[i].key > high ? entries[i].key : high;
            low = entries[i].key < low ? entries[i].key : low;
        }
        if (high == low) return high;
        int buckets = n < BUCKETS ? 128 : BUCKETS, last = 0, bucket = 0;
        double unit = (buckets - 1) / (high / 2 - low / 2), held[BUCKETS];
        if (!isfinite(unit)) break;
        memset(held, 0, buckets * sizeof(double));
        for (long i = 0; i < n; i++) {
            int at = (int)((high / 2 - entries[i].key / 2) * unit);
            held[at] += entries[i].mass;
            last = at > last ? at : last;
        }
        while (bucket < last && (strictly ? held[bucket] <= wanted : held[bucket] < wanted)) wanted -= held[bucket++];
        while (held[bucket] == 0) bucket--; /* rounding has asked for more than there is */
        long kept = 0;
        for (long i = 0; i < n; i++)
            if ((int)((high / 2 - entries[i].key / 2) * unit) == bucket) entries[kept++] = entries[i];
        n = kept;
    }
    if (n <= SORTED_BY_INSERTION)
        sort_few(entries, n);
    else
        qsort(entries, n, sizeof(Entry), descending);
    long i = 0;
    while (i + 1 < n && (strictly ? entries[i].mass <= wanted : entries[i].mass < wanted)) wanted -= entries[i++].mass;
    return entries[i].key;
}

/* Buckets of equal width, from the maximum down. */
INLINE counts bucket_of(int kind, const Row *row, long i, double unit) {
    return __builtin_convertvector(depth(kind, row, i) * unit, counts);
}

typedef struct {
    const Row *row;
    double unit, sign;
    double *held; /* mass [pieces, BUCKETS] */
    int32_t chosen;
    long *kept; /* entries of the chosen bucket [pieces] */
    Entry *entries;
} Selection;

INLINE void bounds_of(const Row *row, long piece, long *from, long *to) {
    *from = piece * row->piece, *to = *from + row->piece < row->n ? *from + row->piece : row->n;
}

INLINE void fill_buckets(int kind, const Selection *of, long piece) {
    const Row *row = of->row;
    long from, to;
    bounds_of(row, piece, &from, &to);
    double *held = of->held + piece * BUCKETS;
    int32_t numbers[4][BUCKETS];
    if (!(kind & BASED)) memset(numbers, 0, sizeof numbers);
    for (long i = from; i < to; i += LANES) {
        counts at = bucket_of(kind, row, i, of->unit);
        if (kind & BASED) {
            reals m = mass(kind, row, i);
            for (int j = 0; j < LANES; j++) held[at[j]] += m[j];
        } else if (to - i >= LANES) {
            for (int j = 0; j < LANES; j++) numbers[j & 3][at[j]]++;
        } else {
            for (int j = 0; j < to - i; j++) numbers[j & 3][at[j]]++;
        }
    }
    for (int j = 0; j < BUCKETS && !(kind & BASED); j++)
        held[j] = (double)numbers[0][j] + numbers[1][j] + numbers[2][j] + numbers[3][j];
}

/* The same of float32 losses, in float32: buckets still follow each other as the losses do. */
INLINE float_bits buckets_of_floats(const Row *row, floats z, double unit) {
    return __builtin_convertvector((z - (float)row->top) * (float)(unit * row->scale), float_bits);
}

/* Losses from i on, of which some may be padding. */
INLINE floats floats_from(const Row *row, long i) {
    if (i < row->whole) return load_floats(row, i);
    floats z;
    for (int j = 0; j < PAIR; j++) z[j] = (float)row->tail[j];
    return z;
}

static void fill_narrow(const Selection *of, long piece) {
    long from, to;
    bounds_of(of->row, piece, &from, &to);
    double *held = of->held + piece * BUCKETS;
    int32_t numbers[4][BUCKETS];
    memset(numbers, 0, sizeof numbers);
    for (long i = from; i < to; i += PAIR) {
        float_bits buckets = buckets_of_floats(of->row, floats_from(of->row, i), of->unit);
        int32_t at[PAIR];
        memcpy(at, &buckets, sizeof at); /* faster than to take it apart */
        int count = to - i < PAIR ? (int)(to - i) : PAIR;
        if (count == PAIR) {
            for (int j = 0; j < PAIR; j++) numbers[j & 3][at[j]]++;
        } else {
            for (int j = 0; j < count; j++) numbers[j & 3][at[j]]++;
        }
    }
    for (int j = 0; j < BUCKETS; j++) held[j] = (double)numbers[0][j] + numbers[1][j] + numbers[2][j] + numbers[3][j];
}

static void keep_narrow(const Selection *of, long piece) {
    long from, to, kept = piece ? of->kept[piece - 1] : 0;
    bounds_of(of->row, piece, &from, &to);
    for (long i = from; i < to; i += PAIR) {
        floats z = floats_from(of->row, i);
        float_bits same = buckets_of_floats(of->row, z, of->unit) == of->chosen;
        if (!any_floats(same)) continue;
        for (int j = 0; j < PAIR && i + j < to; j++)
            if (same[j]) of->entries[kept++] = (Entry){of->sign * z[j], 1};
    }
}

static void fill(const void *in, long piece) {
    const Selection *of = in;
    if (is_narrow(of->row)) {
        fill_narrow(of, piece);
        return;
    }
    switch (kind_of(of->row)) {
        case 0: fill_buckets(0, of, piece); break;
        case BASED: fill_buckets(BASED, of, piece); break;
        case SINGLE: fill_buckets(SINGLE, of, piece); break;
        default: fill_buckets(BASED | SINGLE, of, piece);
    }
}

/* Keeps what is in the chosen bucket; without room for it, counts it. */
INLINE void keep_entries(int kind, const Selection *of, long piece) {
    const Row *row = of->row;
    long from, to, kept = of->entries && piece ? of->kept[piece - 1] : 0;
    bounds_of(row, piece, &from, &to);
    for (long i = from; i < to; i += LANES) {
        counts same = bucket_of(kind, row, i, of->unit) == of->chosen;
        if (!any(__builtin_convertvector(same, bits))) continue;
        reals z = load(kind, row, i), m = mass(kind, row, i);
        for (int j = 0; j < LANES; j++) {
            if (!same[j] || m[j] == 0) continue;
            if (of->entries) of->entries[kept] = (Entry){of->sign * z[j], m[j]};
            kept++;
        }
    }
    if (!of->entries) of->kept[piece] = kept;
}

static void keep(const void *in, long piece) {
    const Selection *of = in;
    if (is_narrow(of->row)) {
        keep_narrow(of, piece);
        return;
    }
    switch (kind_of(of->row)) {
        case 0: keep_entries(0, of, piece); break;
        case BASED: keep_entries(BASED, of, piece); break;
        case SINGLE: keep_entries(SINGLE, of, piece); break;
        default: keep_entries(BASED | SINGLE, of, piece);
    }
}

static int select_bucketed(const Row *row, double wanted, int from_below, double *found) {
    long pieces = (row->n + row->piece - 1) / row->piece, kept[PIECES];
    Selection of = {.row = row, .unit = -(BUCKETS - 1) / row->range, .sign = from_below ? -1 : 1, .kept = kept};
    of.held = calloc(pieces * BUCKETS, sizeof(double));
    if (!of.held) return NO_MEMORY;
    over_pieces(row, fill, &of);
    long step = from_below ? -1 : 1, bucket = from_below ? BUCKETS - 1 : 0, fullest = bucket;
    for (long j = 0; j < BUCKETS; j++, bucket += step) {
        Total held = {0, 0};
        for (long piece = 0; piece < pieces; piece++) add_number(&held, of.held[piece * BUCKETS + bucket]);
        double here = result(held);
        if (here > 0) fullest = bucket;
        if (here > 0 && (from_below ? here > wanted : here >= wanted)) break;
        wanted -= here;
    }
    of.chosen = (int32_t)fullest; /* rounding may have asked for more than there is: then the last */
    for (long piece = 0; piece < pieces; piece++) kept[piece] = (long)of.held[piece * BUCKETS + fullest];
    free(of.held);
    if (row->base) over_pieces(row, keep, &of);
    for (long piece = 1; piece < pieces; piece++) kept[piece] += kept[piece - 1];
    of.entries = malloc(kept[pieces - 1] * sizeof(Entry));
    if (!of.entries) return NO_MEMORY;
    over_pieces(row, keep, &of);
    *found = of.sign * first_to_reach(of.entries, kept[pieces - 1], wanted, from_below);
    free(of.entries);
    return OK;
}

int select_loss(const Row *row, double wanted, int from_below, double *found) {
    if (row->n > 1024) return select_bucketed(row, wanted, from_below, found);
    Entry entries[1024];
    double sign = from_below ? -1 : 1;
    const int kind = kind_of(row);
    long count = 0;
    for (long i = 0; i < row->n; i += LANES) {
        reals z = load(kind, row, i), m = mass(kind, row, i);
        for (int j = 0; j < LANES; j++)
            if (m[j] != 0) entries[count++] = (Entry){sign * z[j], m[j]};
    }
    *found = sign * first_to_reach(entries, count, wanted, from_below);
    return OK;
}

typedef struct {
    double at;
    int of_losses;
} Edge;

INLINE void around(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Edge edge = *(const Edge *)in;
    reals at = ALL(edge.at), none = ALL(0.0);
    reals higher[2] = CLEARED, lower[2] = CLEARED, equal[2] = CLEARED;
    STRETCHES(from, to) {
        PAIRS {
            long i = pair + u * LANES;
            reals x = edge.of_losses ? load(kind, row, i) : depth(kind, row, i), m = mass(kind, row, i);
            higher[u] += choose(x > at, m, none);
            lower[u] += choose(x < at, m, none);
            equal[u] += choose(x == at, m, none);
        }
        add_pair(&sums->of[0], higher), add_pair(&sums->of[1], lower), add_pair(&sums->of[2], equal);
    }
}

PASSES(around)

/* Of float32 losses, of which each counts one. */
static void around_floats(const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    floats at = spread((float)((const Edge *)in)->at);
    float_bits higher = {0}, lower = {0};
    long pairs = to < row->whole ? to : row->whole;
    for (long i = from; i < pairs; i += PAIR) {
        floats z = load_floats(row, i);
        higher -= z > at, lower -= z < at;
    }
    for (int j = 0; j < PAIR; j++) sums->of[0].sum += higher[j], sums->of[1].sum += lower[j];
    sums->of[2].sum = (double)(pairs - from) - sums->of[0].sum - sums->of[1].sum;
    if (pairs < to) around(SINGLE, row, in, pairs, to, sums);
}

static Passes around_floats_passes = {NULL, NULL, around_floats, NULL};

/* The mass of what lies above an edge, below it and at it. */
static void masses_around(const Row *row, Edge edge, double *higher, double *lower, double *equal) {
    Sums sums;
    over_row(row, is_narrow(row) && edge.of_losses ? around_floats_passes : around_passes, &edge, &sums);
    *higher = result(sums.of[0]), *lower = result(sums.of[1]), *equal = result(sums.of[2]);
}

/* --- CVaR --------------------------------------------------------------------------------------------------- */

int tail_of(const Row *row, double alpha, Tail *tail) {
    double all = row->all, wanted = alpha * all, lower;
    if (!row->base) wanted = fmin(fmax(ceil(wanted), 1), all);
    tail->loss = row->top;
    if (row->range > 0 && row->share * all < wanted) {
        if (!row->base && wanted == all) {
            tail->loss = row->low;
        } else {
            int status = select_loss(row, wanted, 0, &tail->loss);
            if (status != OK) return status;
        }
    }
    tail->depth = (tail->loss - row->top) * row->scale;
    masses_around(row, (Edge){tail->loss, 1}, &tail->higher, &lower, &tail->equal);
    /* The same number twice; near alpha = 1 the second form would cancel. */
    double left_over = alpha > 0.5 ? lower - (1 - alpha) * (all - tail->equal)
                                   : alpha * all - tail->higher - tail->equal * alpha;
    tail->above = (1 - alpha) / alpha;
    tail->tied = fmax(fmin(left_over / (tail->equal * alpha), tail->above), -1);
    return OK;
}

typedef struct {
    Tail tail;
    double mean, each;
} Tailed;

INLINE void tail_weights(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Tailed of = *(const Tailed *)in;
    reals at = ALL(of.tail.loss), top = ALL(row->top), low = ALL(row->low), high = ALL(of.tail.above), level = ALL(of.tail.tied), none = ALL(-1.0);
    reals each = ALL(of.each), zero = ALL(0.0), tilted = zero, gained = zero, exceeded = zero;
    STRETCHES(from, to) {
        VECTORS {
            /* Losses close to the threshold need not differ in depth. */
            reals z = load(kind, row, i), m = mass(kind, row, i);
            if (kind & BASED) z = larger(smaller(z, top), low); /* those without base weight */
            reals tilt = choose(z > at, high, choose(z == at, level, none));
            store(kind, row, i, weighed(kind, row, i, (tilt + 1.0) * each));
            reals beyond = (z - at) * row->scale * m;
            tilted += tilt * m;
            gained += tilt * beyond;
            exceeded += larger(beyond, zero);
        }
        add(&sums->of[0], tilted), add(&sums->of[1], gained), add(&sums->of[2], exceeded);
        tilted = gained = exceeded = zero;
    }
}

PASSES(tail_weights)

int tail_mean(Row *row, double alpha, Answer *answer) {
    Tailed of = {.mean = row->mean, .each = 1 / row->all};
    int status = tail_of(row, alpha, &of.tail);
    if (status != OK) return status;
    Sums sums;
    over_row(row, tail_weights_passes, &of, &sums);
    double surplus = result(sums.of[0]) / row->all, beyond = result(sums.of[2]) / row->all;
    double from_mean = of.tail.depth - row->mean;
    double gain = result(sums.of[1]) / row->all + from_mean * surplus; /* as if taken about the mean */
    *answer = (Answer){gain, from_mean + beyond / alpha, of.tail.depth, 0, 0, -beyond / (alpha * alpha),
                       of.tail.depth == 0, of.tail.loss};
    return OK;
}

/* --- total variation: what lies low is moved to the maximum --------------------------------------------------- */

typedef struct {
    double depth, tied, at_top, mean, each;
    double edge; /* the depth, or its loss where losses are compared */
    int of_losses;
} Moved;

INLINE void move(int kind, const Row *from_row, const void *in, long from, long to, Sums *sums) {
    const Row held = *from_row, *row = &held;
    const Moved of = *(const Moved *)in;
    reals at = ALL(of.depth), level = ALL(of.tied), received = ALL(of.at_top), none = ALL(-1.0), zero = ALL(0.0);
    reals edge = ALL(of.edge);
    reals mean = ALL(of.mean), each = ALL(of.each), tilted = zero, gained = zero, moved = zero, missed = zero;
    STRETCHES(from, to) {
        VECTORS {
            reals d = depth(kind, row, i), m = mass(kind, row, i), x = of.of_losses ? load(kind, row, i) : d;
            reals tilt = choose(x < edge, none, choose(x == edge, level, choose(d == 0.0, received, zero)));
            store(kind, row, i, weighed(kind, row, i, (tilt + 1.0) * each));
            reals weighted = tilt * m;
            tilted += weighted;
            gained += weighted * (d - mean);
            moved += larger(weighted, -weighted);
            missed += larger(at - d, zero) * m;
        }
        add(&sums->of[0], tilted), add(&sums->of[1], gained), add(&sums->of[2], moved), add(&sums->of[3], missed);
        tilted = gained = moved = missed = zero;
    }
}

PASSES(move)

int total_variation(Row *row, double radius, double price, Answer *answer) {
    double largest = 1 - row->share, all = row->all, higher, lower, equal, loss;
    if (row->range == 0 || (price >= 0 ? price == 0 || largest == 0 : radius >= largest))
        return *answer = at_maximum(row, largest), OK;
    if (price >= 0 ? price > 1e280 : radius == 0) return *answer = at_mean(row), OK;
    Moved of = {.depth = -price, .mean = row->mean, .each = 1 / all};
    if (price < 0) {
        int status = select_loss(row, radius * all, 1, &loss);
        if (status != OK) return status;
        of.depth = (loss - row->top) * row->scale;
    }
    of.of_losses = price < 0 && is_narrow(row), of.edge = of.of_losses ? loss : of.depth;
    masses_around(row, (Edge){of.edge, of.of_losses}, &higher, &lower, &equal);
    /* Counted from below: a small radius has digits that 1 - radius does not keep. */
    if (price < 0) of.tied = fmin(fmax((lower - radius * all) / equal, -1), 0);
    of.at_top = (lower - of.tied * equal) / (row->share * all);
    Sums sums;
    over_row(row, move_passes, &of, &sums);
    double surplus = result(sums.of[0]) / all, distance = result(sums.of[2]) / all / 2;
    double gain = result(sums.of[1]) / all / (1 + surplus), dual = result(sums.of[3]) / all;
    double strength = -of.depth;
    if (price >= 0)
        gain -= price * distance;
    else
        dual += strength * radius;
    *answer = (Answer){gain, dual, -fmin(strength, row->range) / 2, strength, distance, .exactly = NAN};
    into_ball(row, answer, price >= 0 ? -1 : radius, 1 + surplus);
    return OK;
}
