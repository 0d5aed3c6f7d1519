"""A test is found by the name of what it tests: every module of the library has a test file of its name."""

import pkgutil
from pathlib import Path

import pytest

import drrho

TESTS = Path(__file__).parent
MODULES = [module.name.split(".")[1:] for module in pkgutil.walk_packages(drrho.__path__, "drrho.") if not module.ispkg]


@pytest.mark.parametrize("module", [path for path in MODULES if not path[-1].startswith("_")], ids=".".join)
def test_every_module_has_a_test_file_of_its_name(module):
    *folders, name = module
    assert TESTS.joinpath(*folders, f"test_{name}.py").is_file()
