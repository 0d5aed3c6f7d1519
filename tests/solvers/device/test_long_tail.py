"""The tail means of long rows on the device, beside the CPU's."""

import numpy as np
import pytest
import torch
from interpreted import DEVICE
from long_rows_cases import N, agree, compile_family, losses_like, of_any_shape, solved

from drrho import CVaR, constrained_risk

pytest.importorskip("triton")
from drrho.solvers.device.long import solve_long_rows


@of_any_shape
@pytest.mark.parametrize("alpha", [1e-4, 0.1, 0.7])
def test_tail_means_are_those_of_the_cpu(alpha, name):
    z = torch.tensor(losses_like(name), dtype=torch.float32)
    found, failed = solved(z, CVaR(alpha))
    assert not failed
    expected = constrained_risk(z.double(), CVaR(alpha))
    assert found.threshold.item() == expected.threshold.item()
    agree(found, expected, torch.float32)


def test_tail_mean_in_float64():
    z = torch.tensor(losses_like("normal"))
    found, failed = solved(z, CVaR(0.1))
    assert not failed
    agree(found, constrained_risk(z, CVaR(0.1)), torch.float64)


def test_tail_fractions_that_are_refused():
    z = torch.tensor(losses_like("normal"), device=DEVICE)
    for alpha in (0.0, 1.5, np.nan):
        failed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        fraction = torch.tensor(alpha, dtype=torch.float64, device=DEVICE)
        with np.errstate(all="ignore"):
            _, fields = solve_long_rows(z, None, None, fraction, None, failed, 2, 0.0)
        assert failed.item() == 1
        assert fields.isnan().all()


def test_a_sample_that_misses_the_threshold():
    # Losses at equal distances, of which the sample is made, all lie below the tail.
    z = np.zeros(N)
    step = N // 4096
    z[np.arange(N) % step != step // 2] = 1 + np.random.default_rng(0).random(N - len(z[step // 2 :: step]))
    found, failed = solved(z, CVaR(0.4))
    assert not failed
    agree(found, constrained_risk(torch.tensor(z), CVaR(0.4)), torch.float64)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_without_spills():
    compile_family(2)
