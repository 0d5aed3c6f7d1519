"""The examples in docstrings run as printed."""

import doctest
import importlib
import pkgutil

import pytest

import drrho

MODULES = [
    module.name
    for module in pkgutil.walk_packages(drrho.__path__, "drrho.")
    if "._kernels" not in module.name  # compiled, and not for Python
]
SLOW = {"drrho.accumulation", "drrho.stochastic"}  # whose examples train


def imported(name):
    """A module, unless it adapts a package that is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if "drrho[integrations]" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODULES]
)
def test_examples(name):
    failed, _ = doctest.testmod(imported(name))
    assert failed == 0


def test_there_are_examples():
    core = [name for name in MODULES if "integrations" not in name]
    found = [test for name in core for test in doctest.DocTestFinder().find(importlib.import_module(name))]
    assert sum(bool(test.examples) for test in found) >= 20
