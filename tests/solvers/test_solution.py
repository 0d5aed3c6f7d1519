"""Rows are solved in chunks, each as if alone; what cannot be solved is refused by name."""

import pytest
import torch
from families import EVERY

from drrho import CappedKL, CressieRead
from drrho.solvers.problem import Problem
from drrho.solvers.solution import solve


def solved(z, divergence, radius=None, strength=None, alpha=None):
    return solve(z, radius, strength, alpha, None, Problem(divergence, None))


def full(rows, number):
    return torch.full((rows,), number, dtype=torch.float64)


def test_chunks_are_solved_as_alone():
    z = torch.randn(40, 2**13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # two chunks
    found = solved(z, CressieRead(1.5), radius=full(40, 0.1))
    for row in (0, 31, 32, 39):
        alone = solved(z[row : row + 1], CressieRead(1.5), radius=full(1, 0.1))
        torch.testing.assert_close(found.weights[row], alone.weights[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(found.value[row], alone.value[0], rtol=1e-13, atol=0)


def test_rows_may_have_an_alpha_each():
    z = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alpha = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    found = solved(z, CappedKL(alpha), radius=full(3, 0.2), alpha=alpha)
    for row in range(3):
        alone = solved(z[row : row + 1], CappedKL(alpha[row].item()), radius=full(1, 0.2))
        assert torch.equal(found.weights[row], alone.weights[0])


@pytest.mark.parametrize("name", ["kl", "cvar", "tv", "order 0.5", "le cam"])
def test_no_rows_have_an_empty_solution(name):
    found = solved(torch.zeros(0, 5, dtype=torch.float64), EVERY[name], radius=full(0, 0.1))
    assert found.weights.shape == (0, 5)
    assert found.value.shape == (0,)


@pytest.mark.parametrize("name", ["kl", "cvar", "tv", "order 0.5", "le cam"])
def test_parameters_are_refused_by_name(name):
    z = torch.arange(4.0, dtype=torch.float64)[None]
    with pytest.raises(ValueError, match="strength must be finite and >= 0, got -1"):
        solved(z, EVERY[name], strength=full(1, -1.0))
    with pytest.raises(ValueError, match="finite range"):
        solved(z * torch.inf, EVERY[name], strength=full(1, 1.0))
