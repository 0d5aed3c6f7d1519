"""Divergences for the tests of conic programs, a user's Jensen-Shannon with its expressions among them."""

import cvxpy as cp
import numpy as np
from families import JensenShannon

from drrho import KL, CappedKL, ChiSquare, CressieRead, CVaR, TotalVariation
from drrho.convex import Formulation, conjugate_expression, divergence_expression

SOLVER = 1e-6  # accuracy of a solver, relative to the range of the losses


@divergence_expression.register
def _(divergence: JensenShannon, p, q) -> Formulation:
    t = cp.multiply(1 / q, p)
    middle = (1 + t) / 2
    return Formulation(q @ (cp.rel_entr(t, middle) + cp.rel_entr(np.ones(len(q)), middle)), [])


@conjugate_expression.register
def _(divergence: JensenShannon, scores, strength, q) -> Formulation:
    bound, left, right = (cp.Variable(len(q)) for _ in range(3))  # exp(s / strength) + exp(-bound / strength) <= 2
    width = strength * np.ones(len(q))
    cones = [cp.ExpCone(scores, width, left), cp.ExpCone(-bound, width, right), left + right <= 2 * width]
    return Formulation(q @ bound, cones)


CRESSIE_READ = [CressieRead(order) for order in (3, 1.5, 1.37, 0.5, 0, -1, -0.5)]
WITH_RADIUS = [KL(), ChiSquare(), TotalVariation(), CappedKL(0.3), JensenShannon(), CressieRead(1), CressieRead(2)]
WITH_RADIUS += CRESSIE_READ
ALL = [*WITH_RADIUS, CVaR(0.23)]


def name(value):
    return value.__class__.__name__ + "".join(f"-{part}" for part in vars(value).values())


def base_weights(n, seed=1):
    return np.random.default_rng(seed).dirichlet(np.full(n, 3.0))
