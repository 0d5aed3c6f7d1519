"""The examples in docstrings run as printed."""

import doctest
import importlib

import pytest

MODULES = [
    "accumulation",
    "bounds",
    "contrastive",
    "convex",
    "divergences",
    "efficiency",
    "linear",
    "reference",
    "risk",
    "running",
    "selection",
    "stochastic",
    "temperature",
    "variance",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(f"drrho.{name}"))
    assert failed == 0


def test_there_are_examples():
    found = [
        test for name in MODULES for test in doctest.DocTestFinder().find(importlib.import_module(f"drrho.{name}"))
    ]
    assert sum(bool(test.examples) for test in found) >= 4
