"""Triton kernels on the CPU: risks solved by them there, and elementwise functions of theirs."""

import contextlib

import numpy as np
import torch

from drrho.solvers import native
from drrho.solvers.device import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def by_device_kernels():
    """Have the kernels for a GPU take rows that lie on the CPU; the interpreter warns of what a GPU does not."""
    by_processor, by_device = native.takes, dispatch.takes
    if DEVICE == "cpu":
        native.takes = lambda z, problem: False
        dispatch.takes = lambda z, problem, kernel: problem.group is None and dispatch.solves(z, kernel)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        native.takes, dispatch.takes = by_processor, by_device
