"""The passes over a long row on the device."""

import pytest
import torch
from interpreted import DEVICE
from long_rows_cases import compile_family, losses_like, solved

from drrho import KL, ChiSquare

pytest.importorskip("triton")


@pytest.mark.parametrize("divergence", [ChiSquare(), KL()], ids=str)
def test_the_passes_have_the_same_bits_each_time(divergence):
    z = torch.tensor(losses_like("log-normal"), dtype=torch.float32, device=DEVICE)
    (first, _), (second, _) = (solved(z, divergence, 0.3) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("family", [0, 1])
def test_kernels_compile_for_a_gpu_without_spills(family):
    compile_family(family)
