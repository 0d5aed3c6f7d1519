"""Runs the tests on the compiled CPU kernels, or with ``--portable`` on torch operations alone.

Triton's kernels are run by its interpreter on the CPU where there is no GPU; it asks for that when it is imported.
"""

import os
from multiprocessing import set_forkserver_preload

import pytest
import torch
from processes import PRELOADED

from drrho.solvers import native

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
set_forkserver_preload(PRELOADED)  # the tests of the trainer preload more


def pytest_addoption(parser):
    parser.addoption("--portable", action="store_true", help="solve without the compiled CPU kernels")


def pytest_configure(config):
    if config.getoption("--portable"):
        native.library, native.missing = None, ""
    elif native.library is None:
        raise pytest.UsageError(f"no CPU kernels, {native.missing}: install a C compiler, run make clean, then make")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skipped = pytest.mark.skip(reason="needs a GPU that torch sees")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skipped)
