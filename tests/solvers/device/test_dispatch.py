"""Which rows the kernels on a GPU take."""

import torch
from interpreted import DEVICE

from drrho import KL, ChiSquare
from drrho.solvers.device import dispatch
from drrho.solvers.problem import Problem


def test_only_plain_rows_on_a_gpu_are_taken():
    z = torch.zeros(2, 5, device=DEVICE)
    assert dispatch.takes(z, Problem(KL(), None), 1) == z.is_cuda
    assert not dispatch.takes(z.cpu(), Problem(ChiSquare(), None), 0)
    assert not dispatch.takes(z, Problem(ChiSquare(), None), 4)


def test_a_failure_is_told_once():
    dispatch._failed.flag[0] = 1
    z = torch.zeros(2, 5)
    assert dispatch._failed.is_set(z)
    assert not dispatch._failed.is_set(z)
