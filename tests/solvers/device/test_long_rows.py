"""What all kernels of long rows have in common: the first look at the losses, and the fields of the answer."""

import pytest
import torch
from interpreted import DEVICE
from long_rows_cases import N, losses_like, solved

from drrho import KL, ChiSquare, CVaR

pytest.importorskip("triton")


@pytest.mark.parametrize("divergence", [ChiSquare(), KL(), CVaR(0.1)], ids=str)
@pytest.mark.parametrize("place", [0, N // 2, N - 1])
def test_the_first_look_sees_every_loss(divergence, place):
    z = torch.tensor(losses_like("normal"), device=DEVICE)
    z[place] = torch.nan
    found, failed = solved(z, divergence, 0.1)
    assert failed
    assert found.value.isnan().all()
    z[place] = 100.0
    found, failed = solved(z, divergence, 1e9)
    assert not failed
    assert found.weights[place] == found.weights.max()
