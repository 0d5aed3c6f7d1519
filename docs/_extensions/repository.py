"""Texts of the repository as pages of the site, so that each is written once.

A page asks for a Markdown file of the repository, or for one section of it, named by its anchor:

    ```{repository} drrho/README.md#speed
    ```

After the name, ``body`` leaves out the section's own heading, and ``alone`` its subsections; ``FILE#`` is what stands
before the first section, ``FILE below`` the whole as a section, and ``FILE rest`` all sections that no page asks for. A
section's heading becomes one of the second level. A notebook is shown with its code and what it put out, as committed.
Links are rewritten: to the page that shows what they lead to, to the picture, or to a copy of the file that can be
downloaded.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging

logger = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]
REQUEST = re.compile(
    r"^```\{repository\} (?P<path>[^\s#]+)(?P<anchor>#\S*)?(?P<words>( body| alone| below| rest)*)\n```$", re.MULTILINE
)
HEADING = re.compile(r"(#+) (.*)")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def read(path: Path) -> str:
    """Return a file of the repository as Markdown."""
    return notebook(json.loads(path.read_text())) if path.suffix == ".ipynb" else path.read_text()


def notebook(content: dict[str, Any]) -> str:
    """Return a notebook as Markdown: texts, code, and outputs; pictures are described by the heading above them."""
    parts, heading = [], "Notebook"
    for cell in content["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts += [f"```python\n{text}\n```", *(_output(output, heading) for output in cell["outputs"])]
        else:
            parts.append(text)
            heading = next(iter(reversed(re.findall(r"^#+ (.*)$", text, re.MULTILINE))), heading)
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any], heading: str) -> str:
    data = output.get("data", {"text/plain": output.get("text", [])})
    if "image/png" in data:
        return f"![{heading}: what the code above draws](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"


def slug(heading: str) -> str:
    """Return the anchor of a heading, as on the forges: without markup and punctuation, spaces as hyphens."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower().replace(" ", "-")


@dataclass
class Section:
    """A heading of a Markdown file with its own lines, without its subsections; level 0 is what has no heading."""

    level: int
    title: str
    lines: list[str] = field(default_factory=list)


def sections(text: str) -> list[Section]:
    """Divide a Markdown text at its headings; what looks like one in a block of code is none."""
    parts, fenced = [Section(0, "")], False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else HEADING.fullmatch(line)
        if heading:
            parts.append(Section(len(heading[1]), heading[2]))
        else:
            parts[-1].lines.append(line)
    return parts


@dataclass
class Request:
    """What a page asks for: the sections, the level that headings are raised by, whether the first heading shows."""

    path: str
    parts: list[Section]
    raised: int
    body: bool

    def anchors(self) -> list[str]:
        """Return the anchors of the headings that are shown, or whose text is."""
        return [slug(part.title) for part in self.parts if part.level]

    def text(self) -> str:
        """Return the parts as Markdown, without their links rewritten."""
        lines: list[str] = []
        for place, part in enumerate(self.parts):
            if part.level and not (self.body and place == 0):
                lines += ["", "#" * (part.level - self.raised) + " " + part.title]
            lines += part.lines
        return "\n".join(lines).strip() + "\n"


def asked_for(folder: Path, path: str) -> set[str]:
    """Return the anchors of the sections of a file that pages ask for by name."""
    named = (found for page in folder.rglob("*.md") for found in REQUEST.finditer(page.read_text()))
    return {found["anchor"][1:] for found in named if found["path"] == path and found["anchor"]}


def request(found: re.Match[str], folder: Path) -> Request:
    """Look up what a page asks for, and refuse by name what does not exist."""
    path, anchor, words = found["path"], found["anchor"], found["words"].split()
    source = ROOT / path
    if not source.is_file():
        raise ExtensionError(f"{path} is not a file of the repository")
    parts = [part for part in sections(read(source)) if part.level or any(part.lines)]
    body = "body" in words
    if "rest" in words:
        elsewhere, kept, keep = asked_for(folder, path), [], False
        for part in parts:
            keep = part.level > 1 and (keep if part.level > 2 else slug(part.title) not in elsewhere)
            kept += [part] if keep else []
        return Request(path, kept, 0, False)
    if anchor is None:
        return Request(path, parts, -1 if "below" in words else 0, body)
    if anchor == "#":
        return Request(path, parts[:1], 0, True)
    first = next((k for k, part in enumerate(parts) if part.level and slug(part.title) == anchor[1:]), None)
    if first is None:
        raise ExtensionError(f"{path} has no section {anchor}: there are {', '.join(slug(p.title) for p in parts)}")
    last = first + 1
    while "alone" not in words and last < len(parts) and parts[last].level > parts[first].level:
        last += 1
    return Request(path, parts[first:last], parts[first].level - (1 if body else 2), body)


def requests(text: str, folder: Path) -> list[Request]:
    """Return all that a page of a folder asks for, in order."""
    return [request(found, folder) for found in REQUEST.finditer(text)]


class Pages:
    """Which page of the site shows which file and section of the repository."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, str] = {}
        self.anchors: dict[tuple[str, str], str] = {}
        for page in sorted(folder.rglob("*.md")):
            name = page.relative_to(folder).as_posix()
            for asked in requests(page.read_text(), folder):
                self.files.setdefault(asked.path, name)
                for anchor in asked.anchors():
                    self.anchors.setdefault((asked.path, anchor), name)

    def link(self, target: str, origin: str, page: str) -> str | None:
        """Return what a link of a file means on a page; None where the site has nothing to link to."""
        if re.match(r"[a-z]+:", target):
            return target
        path, _, anchor = target.partition("#")
        path = normpath(f"{Path(origin).parent.as_posix()}/{path}") if path else origin
        if (ROOT / path / "README.md").is_file():
            path = f"{path}/README.md"
        if anchor and path.endswith(".md"):
            shown = self.anchors.get((path, anchor))
            if shown is None:
                return None
            return f"#{anchor}" if shown == page else f"{relpath(shown, Path(page).parent.as_posix())}#{anchor}"
        if path.startswith("docs/") and path.endswith(".md"):
            return relpath(path[len("docs/") :], Path(page).parent.as_posix())
        if path in self.files:
            return relpath(self.files[path], Path(page).parent.as_posix())
        if (ROOT / path).is_file():
            return relpath(f"../{path}", Path(page).parent.as_posix())
        return None

    def rewritten(self, text: str, origin: str, page: str) -> str:
        """Return a text with the links of ``origin`` as they are on ``page``; code stays as it is."""

        def link(match: re.Match[str]) -> str:
            picture, words, target = match.groups()
            found = self.link(target, origin, page)
            if found is None:
                if not (ROOT / Path(origin).parent / target.partition("#")[0]).exists():
                    logger.warning("%s links to %s, which does not exist", origin, target)
                return words
            return f"{picture}[{words}]({found})"

        # A link's words may be code, so that the text is not cut at inline code, which holds no links.
        blocks = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
        return "".join(block if block.startswith("```") else LINK.sub(link, block) for block in blocks)


def show(app: Sphinx, name: str, source: list[str]) -> None:
    """Put the texts that a page asks for in their places."""
    pages: Pages = app.repository_pages  # type: ignore[attr-defined]

    def text(match: re.Match[str]) -> str:
        asked = request(match, Path(app.srcdir))
        return pages.rewritten(asked.text(), asked.path, f"{name}.md")

    source[0] = REQUEST.sub(text, source[0])


def collect(app: Sphinx) -> None:
    """Look through all pages once, before the first is read."""
    app.repository_pages = Pages(Path(app.srcdir))  # type: ignore[attr-defined]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the texts of the repository to Sphinx."""
    app.connect("builder-inited", collect)
    app.connect("source-read", show)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
