"""The rooms of the trainer: which may import which, how large they are, and that no part of a command is misnamed."""

import ast
import importlib
from pathlib import Path

import pytest

from experiments.clip.cli.options import SOURCES
from experiments.clip.run import COMMANDS

HOUSE = Path(__file__).parents[2] / "experiments" / "clip"
#: The rooms that each room imports, from the ground up. The ground floor (files beside run.py) is open to all.
ALLOWED = {
    "io": set(),
    "models": {"io"},
    "catalog": {"io"},
    "data": {"io", "catalog"},
    "reference": {"io", "catalog", "data", "models"},
    "evaluation": {"io", "catalog", "data", "models"},
    "training": {"io", "data", "models"},
    "cli": {"io", "catalog", "data", "models", "reference", "evaluation", "training"},
    "glyphs": {"io", "catalog", "data", "models", "reference", "evaluation", "cli"},
    "icons": {"io", "models", "cli", "glyphs"},
    "study": {"io", "models", "training", "cli", "glyphs"},
}
GROUND = ("errors", "ranges", "signals", "distributed", "pulse")
MOST_FILES, MOST_ARROWS, MOST_LINES = 12, 38, 80


def imported(path):
    """Return the modules of the house that a file imports, as parts of their names; it imports them relatively."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            rooms = path.relative_to(HOUSE).parts[:-1]
            own = (*rooms[: len(rooms) + 1 - node.level], *(node.module.split(".") if node.module else ()))
            found |= {own} if node.module else {(*own, alias.name) for alias in node.names}
        names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.startswith("experiments") for name in names), f"{path}: an installation has another name"
    return found


def arrows():
    return {
        (room, target[0])
        for room in ALLOWED
        for path in (HOUSE / room).glob("*.py")
        for target in imported(path)
        if target[0] != room and target[0] not in GROUND
    }


def test_every_room_is_in_the_table_and_the_table_points_one_way():
    rooms = {path.parent.name for path in HOUSE.glob("*/*.py")}
    assert rooms == set(ALLOWED)
    above = set()
    for room in reversed(ALLOWED):  # from the top
        above.add(room)
        assert not ALLOWED[room] & above


@pytest.mark.slow
def test_rooms_import_only_what_the_table_allows():
    found = arrows()
    assert found == {(room, target) for room, targets in ALLOWED.items() for target in targets}
    assert len(found) <= MOST_ARROWS


def test_the_ground_floor_imports_no_room_and_the_entry_nothing_heavy():
    for name in GROUND:
        assert {target[0] for target in imported(HOUSE / f"{name}.py")} <= set(GROUND)
    entry = ast.parse((HOUSE / "run.py").read_text()).body
    assert {node.module for node in entry if isinstance(node, ast.ImportFrom) and node.level} == {"errors", "signals"}


def test_rooms_and_functions_are_small():
    for room in ALLOWED:
        assert len(list((HOUSE / room).glob("*.py"))) <= MOST_FILES, room
    longest = {}
    for path in (*HOUSE.rglob("*.py"), *(HOUSE.parents[1] / "drrho").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False)
                lines = node.end_lineno - node.lineno + 1 - (len(text.splitlines()) if text else 0)
                longest[f"{path.name}:{node.name}"] = lines
    assert {name: lines for name, lines in longest.items() if lines > MOST_LINES} == {}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_parts_of_a_command_are_where_the_entry_says(name):
    for place in (COMMANDS[name].options, COMMANDS[name].run):
        module, _, part = place.partition(":")
        assert callable(getattr(importlib.import_module(f"experiments.clip.{module}"), part))


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_opens_data(name):
    assert callable(importlib.import_module(SOURCES[name]).open_data)
