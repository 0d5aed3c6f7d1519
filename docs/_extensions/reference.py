"""Pages of the API from docstrings: a page names modules, and shows all their public names.

```{modules} drrho.risk drrho.reference
```
"""

import ast
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).parents[2]
REQUEST = re.compile(r"^```\{modules\} ([\w. ]+)\n```$", re.MULTILINE)


def public_names(module: str) -> list[str]:
    """Return the functions and classes that a module defines for others, in its order, without importing it."""
    path = ROOT / module.replace(".", "/")
    body = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()).body
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name for node in body if isinstance(node, kinds) and node.name[0] != "_"]
    lists = [node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    return [name for name in names if not lists or name in ast.literal_eval(lists[0])]


def listing(module: str) -> str:
    """Return a section of a page: the module's docstring, a table of its names, and each with its docstring."""
    names = public_names(module)
    lines = [f".. automodule:: {module}", ""]
    if names:
        lines += [f".. currentmodule:: {module}", "", ".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names] + [""]
        for name in names:
            kind = "class" if name[0].isupper() else "function"
            lines += [f".. auto{kind}:: {name}", "   :members:" if kind == "class" else "", ""]
    return f"## {module}\n\n```{{eval-rst}}\n" + "\n".join(lines) + "\n```\n"


def show(app: Sphinx, name: str, source: list[str]) -> None:
    """Put the modules that a page asks for in their places."""
    source[0] = REQUEST.sub(lambda match: "\n".join(map(listing, match[1].split())), source[0])


def not_ours(app: Sphinx, what: str, name: str, member: object, *_: object) -> bool | None:
    """Leave out what is made for a class: methods with which scikit-learn routes metadata, fields of named tuples."""
    made = re.fullmatch(r"set_\w+_request", name) or type(member).__name__ == "_tuplegetter"
    return True if made else None


def as_read(app: Sphinx, name: str, template: str, context: dict[str, Any], *_: object) -> None:
    """Mend what a screen reader cannot read: signatures that are lists without terms, and headers without words."""

    def lines(match: re.Match[str]) -> str:
        inner = match[1].replace("<dd>", '<span class="sig-line">').replace("</dd>", "</span>")
        return f'<span class="sig-lines">{inner}</span>'

    if "body" in context:
        body = re.sub(r"(?<=\(</span>)\s*<dl>(.*?)</dl>", lines, context["body"], flags=re.DOTALL)
        context["body"] = re.sub(r"<th[^>]*>\s*(<p>\s*</p>)?\s*</th>", "<td></td>", body)


def by_name(app: Sphinx, what: str, name: str, item: object, options: object, signature: str, returns: str) -> Any:
    """Write type aliases by their names, where Sphinx has a placeholder of its own."""
    return tuple(each and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", each) for each in (signature, returns))


def of_the_package(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement) -> Any:
    """Resolve ``drrho.NAME``, which the package takes from one of its modules."""
    name = re.fullmatch(r"drrho\.(\w+)", node.get("reftarget", ""))
    objects = env.get_domain("py").objects
    found = [each for each in objects if name and re.fullmatch(rf"drrho\.\w+\.{name[1]}", each)]
    if len(found) != 1:
        return None
    entry = objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the pages of modules to Sphinx."""
    app.connect("autodoc-process-signature", by_name)
    app.connect("missing-reference", of_the_package)
    app.connect("html-page-context", as_read)
    app.connect("autodoc-skip-member", not_ours)
    app.connect("source-read", show)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
