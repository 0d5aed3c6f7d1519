"""Expressions of divergences and of their conjugates against the functions that they state."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from programs import ALL, SOLVER, base_weights, name

from drrho import (
    KL,
    CappedKL,
    ChiSquare,
    CressieRead,
    CVaR,
    TotalVariation,
)
from drrho.convex import conjugate_expression, divergence_expression


@pytest.mark.parametrize("divergence", ALL, ids=name)
def test_divergence_expression_is_the_divergence(divergence):
    q = base_weights(6)
    target = 0.7 * q + 0.3 * base_weights(6, seed=4)
    p = cp.Variable(6)
    distance, constraints = divergence_expression(divergence, p, q)
    problem = cp.Problem(cp.Minimize(distance), [p == target, *constraints])
    problem.solve(solver="CLARABEL")
    expected = torch.tensor(q) @ divergence.phi(torch.tensor(target / q))
    assert problem.is_dcp()
    assert abs(problem.value - expected.item()) <= SOLVER


@pytest.mark.parametrize("divergence", ALL, ids=name)
@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_conjugate_expression_is_the_conjugate(divergence, strength):
    q = base_weights(6)
    scores = strength * np.array([-3.0, -0.6, -0.1, 0.0, 0.2, 0.45])
    s = cp.Variable(6)
    lam = cp.Variable()
    mean, constraints = conjugate_expression(divergence, s, lam, q)
    problem = cp.Problem(cp.Minimize(mean), [s == scores, lam == strength, *constraints])
    problem.solve(solver="CLARABEL")
    expected = strength * torch.tensor(q) @ divergence.conjugate(torch.tensor(scores / strength))
    assert problem.is_dcp()
    assert abs(problem.value - expected.item()) <= SOLVER * strength


def test_weights_off_the_base_are_excluded():
    p = cp.Variable(3, nonneg=True)
    for divergence in [KL(), ChiSquare(), CVaR(0.2), CappedKL(0.2), TotalVariation(), CressieRead(0.5), CressieRead(3)]:
        distance, constraints = divergence_expression(divergence, p, np.array([0.5, 0.0, 0.5]))
        bounded = [distance <= 0.1] if divergence.has_radius else []
        problem = cp.Problem(cp.Maximize(p[1]), [cp.sum(p) == 1, *bounded, *constraints])
        problem.solve(solver="CLARABEL")
        assert abs(problem.value) <= SOLVER
