/* Selection, and the worst alpha of a row (tail.py), which CVaR and capped divergences share. */

#ifndef DRRHO_KERNELS_TAIL_H
#define DRRHO_KERNELS_TAIL_H

#include "kernels.h"

/* What tells a loss's ratio less one from where it lies to the threshold: `above`, `tied`, or -1 below it. */
typedef struct {
    double loss, depth; /* the threshold */
    double above, tied;
    double higher, equal; /* mass */
} Tail;

/* The largest loss with at least a mass at or above it, or, from below, the largest with at most a mass below it. */
int select_loss(const Row *row, double wanted, int from_below, double *found);
int tail_of(const Row *row, double alpha, Tail *tail);

#endif
