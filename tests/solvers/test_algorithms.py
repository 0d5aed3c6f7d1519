"""Which algorithm solves what, and that each solves the same problem as the generic one."""

import numpy as np
import pytest
from families import EVERY, JensenShannon, UserHellinger
from problems import normalized_rows

from drrho import KL, CappedKL, ChiSquare, CressieRead, CVaR, TotalVariation
from drrho.solvers.algorithms import Algorithm, algorithm_of
from drrho.solvers.generic import generic_ball, generic_penalty

LOSSES = np.random.default_rng(0).exponential(size=(3, 40))


@pytest.mark.parametrize(
    "divergence", [JensenShannon(), UserHellinger(), CappedKL(0.3)], ids=lambda divergence: type(divergence).__name__
)
def test_what_is_not_registered_is_solved_by_the_generic_algorithm(divergence):
    assert algorithm_of(divergence)._replace(kernel=None) == Algorithm()


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.2), TotalVariation(), CressieRead(0.5)], ids=repr)
def test_a_subclass_has_the_algorithm_of_its_parent_but_no_kernel(divergence):
    kind = type(divergence)
    derived = type("Derived", (kind,), {})(*vars(divergence).values())
    assert algorithm_of(derived) == algorithm_of(divergence)._replace(kernel=None)


def test_kernels_and_closed_forms():
    known = ChiSquare(), KL(), CVaR(0.2), TotalVariation(), CappedKL(0.2), CressieRead(0.5)
    assert [algorithm_of(divergence).kernel for divergence in known] == [0, 1, 2, 3, 4, 5]
    assert algorithm_of(JensenShannon()).kernel is None
    assert algorithm_of(CVaR(0.2)).closed_ball is not None
    assert algorithm_of(KL()).closed_penalty is not None
    assert algorithm_of(KL()).closed_ball is None
    # The closed form answers in the losses' own dtype, this class in float64 at first.
    assert algorithm_of(CressieRead(1)).closed_penalty is None


SMOOTH = ["kl", "chi2", "order 3", "order 1.5", "order 0.5", "order 0", "order -1"]


@pytest.mark.parametrize("name", SMOOTH)
def test_ball_and_penalty_are_those_of_the_generic_algorithm(name):
    divergence, rows = EVERY[name], normalized_rows(LOSSES)
    algorithm = algorithm_of(divergence)
    for own, generic, parameter in (
        (algorithm.ball, generic_ball, np.array([1e-4, 0.02, 0.3])),
        (algorithm.penalty, generic_penalty, np.array([0.2, 1.0, 30.0])),
    ):
        found, expected = own(divergence, rows, parameter), generic(divergence, rows, parameter)
        np.testing.assert_allclose(found.dual.strength, expected.dual.strength, rtol=1e-9)
        np.testing.assert_allclose(found.dual.threshold, expected.dual.threshold, rtol=1e-9, atol=1e-10)
