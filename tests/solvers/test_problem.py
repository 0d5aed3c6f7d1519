"""The first look at the losses."""

import pytest
import torch
from problems import tensor

from drrho import CappedKL, CVaR
from drrho.solvers.problem import extremes_of, fraction_of, sample_count

LOSSES = tensor([[3.0, -1.0, 9.0], [0.0, 5.0, 2.0]])


def test_extremes_are_of_the_losses_with_base_weight():
    assert extremes_of(LOSSES, None, None).tolist() == [[9.0, 5.0], [-1.0, 0.0]]
    assert extremes_of(LOSSES, tensor([[0.5, 0.5, 0.0]]), None).tolist() == [[3.0, 5.0], [-1.0, 0.0]]


def test_losses_without_base_weight_must_be_finite_too():
    with pytest.raises(ValueError, match="losses must be finite"):
        extremes_of(tensor([[1.0, torch.inf]]), tensor([[1.0, 0.0]]), None)


def test_count_and_fraction():
    assert sample_count(LOSSES, None) == 3
    assert fraction_of(CVaR(0.25)) == fraction_of(CappedKL(torch.tensor(0.25))) == 0.25
