"""A test is found by the name of what it tests: every module of the library and of the trainer has a test file."""

import pkgutil
from pathlib import Path

import pytest

import drrho

TESTS = Path(__file__).parent
HOUSE = TESTS.parent / "experiments" / "clip"
MODULES = [module.name.split(".")[1:] for module in pkgutil.walk_packages(drrho.__path__, "drrho.") if not module.ispkg]
TRAINER = [path.relative_to(HOUSE).with_suffix("").parts for path in HOUSE.rglob("*.py")]
#: Options, which test_ranges.py and cli/test_options.py go through.
WITHOUT = {("__init__",), ("glyphs", "options"), ("icons", "options"), ("study", "options"), ("training", "options")}


@pytest.mark.parametrize("module", [path for path in MODULES if not path[-1].startswith("_")], ids=".".join)
def test_every_module_has_a_test_file_of_its_name(module):
    *folders, name = module
    assert TESTS.joinpath(*folders, f"test_{name}.py").is_file()


@pytest.mark.parametrize("module", [path for path in TRAINER if path not in WITHOUT], ids="/".join)
def test_every_module_of_the_trainer_has_a_test_file_of_its_name(module):
    *folders, name = module
    assert TESTS.joinpath("clip", *folders, f"test_{name}.py").is_file()
