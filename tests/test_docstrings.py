"""Every public name has an example in its docstring, and the examples run as printed.

Public are the names that a module lists in ``__all__``; a module without it is internal.
"""

import ast
import doctest
import importlib
import pkgutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import drrho

MODULES = [
    module.name
    for module in pkgutil.walk_packages(drrho.__path__, "drrho.")
    if "._kernels" not in module.name  # compiled, and not for Python
]
SLOW = {"drrho.accumulation", "drrho.stochastic"}  # whose examples train
#: The packages whose training is steered, which are not all installed; `make test-integrations` has them.
HOSTS = {"guide_embeddings": "sentence_transformers", "open_clip": "open_clip", "trainer": "transformers"}
HOSTS |= {"sentence_transformers": "sentence_transformers", "guides": "sentence_transformers"}


@cache
def tree_of(name):
    path = Path(drrho.__path__[0], *name.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text())


def public_names(name):
    """Return what a module lists in ``__all__``, without importing it."""
    for node in tree_of(name).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def definitions(name):
    found = {}
    for node in tree_of(name).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_docstring(node) or ""
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("drrho."):
            inner = {alias.asname or alias.name: alias.name for alias in node.names} if public_names(name) else {}
            kept = set(inner) & set(public_names(name))
            found |= {own: definitions(node.module)[inner[own]] for own in kept}
    return found


PUBLIC = {name: public_names(name) for name in ("drrho", *MODULES) if public_names(name)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODULES]
)
def test_examples(name):
    host = HOSTS.get(name.rpartition(".")[2]) if "integrations" in name else None
    if host and not find_spec(host):
        pytest.skip(f"needs {host} (make test-integrations)")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_examples(name):
    described = definitions(name)
    assert [each for each in PUBLIC[name] if each not in described] == []
    for each in PUBLIC[name]:
        text = described[each] or getattr(importlib.import_module(name), each).__doc__
        assert ">>>" in text, each


def test_how_many_names_are_public():
    """CONTRIBUTING lists the modules; a name that is offered by two of them is counted once."""
    names = {each for listed in PUBLIC.values() for each in listed}
    assert len(names) >= 90
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    assert [name for name in PUBLIC if f"`{name}`" not in text] == []
