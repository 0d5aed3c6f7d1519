"""Closed forms in the losses' own dtype."""

import numpy as np
import pytest
import torch

from drrho import KL, CVaR
from drrho.solvers.closed import solve_cvar, solve_kl_penalty
from drrho.solvers.problem import Problem

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def losses(dtype):
    return torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@DTYPES
def test_the_kl_penalty_is_a_logsumexp(dtype):
    z, strength = losses(dtype), torch.tensor([0.01, 0.5, 3.0, 100.0], dtype=dtype)
    found = solve_kl_penalty(z, strength, None, None, Problem(KL(), None))
    exact = z.double() / strength.double()[:, None]
    value = strength.double() * (torch.logsumexp(exact, 1) - np.log(30))
    assert found.value.dtype == dtype
    # The logarithms of the oracle cancel in units of the strength.
    assert torch.all((found.value - value).abs() <= 8 * torch.finfo(dtype).eps * (strength + value.abs()))
    torch.testing.assert_close(found.weights, torch.softmax(exact, 1).to(dtype))


@DTYPES
def test_cvar_is_the_mean_of_the_largest(dtype):
    z = losses(dtype)
    found = solve_cvar(z, None, None, None, Problem(CVaR(0.2), None))
    assert found.value.dtype == dtype
    torch.testing.assert_close(found.value, z.topk(6).values.mean(1))
    torch.testing.assert_close(found.weights.sum(1), torch.ones(4, dtype=dtype))


def test_an_alpha_for_each_row_is_that_of_the_row_alone():
    z, alpha = losses(torch.float64), torch.tensor([0.1, 0.25, 0.9, 1.0], dtype=torch.float64)
    found = solve_cvar(z, None, alpha, None, Problem(CVaR(alpha), None))
    for row in range(4):
        alone = solve_cvar(z[[row]], None, None, None, Problem(CVaR(alpha[row].item()), None))
        torch.testing.assert_close(found.value[row], alone.value[0], rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(found.weights[row], alone.weights[0], rtol=1e-13, atol=1e-16)
