"""The site: it builds without a warning, leads nowhere that does not exist, and asks no other host for anything."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from fontTools.ttLib import TTFont

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MOST_WORDS = 600
#: Folders whose Markdown files are all on the site.
SHOWN = ("drrho", "experiments", "paper_figures")
#: Lists of authors and licenses, with names that are no words.
LICENSES = "ATTRIBUTION.md"
#: Pages that Sphinx makes.
MADE = {"genindex.html", "search.html"}


def extension(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "_extensions" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


repository, reference = extension("repository"), extension("reference")


#: Elements without an end.
VOID = {"img", "input", "br", "hr", "meta", "link", "source", "wbr", "col", "area", "base", "embed", "track"}


class Page(HTMLParser):
    """What the checks need of a page: links, what is loaded, anchors, headings, pictures, words and formulas."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.ids, self.headings, self.pictures = [], [], set(), [], []
        self.words, self.formulas, self.has_table, self.language = 0, "", False, None
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link":
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])
        self.loaded += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        if tag == "html":
            self.language = values.get("lang")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "img":
            self.pictures.append(values.get("alt", ""))
        self.has_table |= tag == "table"
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "math" in self._open:
            self.formulas += data
        elif "article" in self._open and {"p", "li", "dd"} & set(self._open) and "pre" not in self._open:
            self.words += len(data.split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--doctree-dir", folder.parent / "doctrees"]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, DOCS, folder], capture_output=True, text=True, cwd=ROOT
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {
        path.relative_to(site).as_posix(): Page(path.read_text())
        for path in site.rglob("*.html")
        if "_static" not in path.parts
    }


@pytest.mark.slow
def test_every_link_leads_somewhere(site, pages):
    broken = []
    for name, page in pages.items():
        for target in page.links + page.loaded:
            if re.match(r"[a-z]+:", target):
                continue
            path, anchor = urldefrag(unquote(target))
            aim = (site / name).parent / path.partition("?")[0] if path else site / name
            if aim.is_dir():
                aim /= "index.html"
            known = pages.get(aim.resolve().relative_to(site).as_posix())
            if not aim.exists() or (known and anchor and anchor not in known.ids):
                broken.append((name, target))
    assert not broken


@pytest.mark.slow
def test_nothing_is_loaded_from_another_host(site, pages):
    assert not [(name, url) for name, page in pages.items() for url in page.loaded if re.match(r"(https?:)?//", url)]
    for sheet in site.rglob("*.css"):
        urls = re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", sheet.read_text())
        assert not [url for url in urls if re.match(r"(https?:)?//", url)], sheet


@pytest.mark.slow
def test_pages_have_a_language_one_title_ordered_headings_and_pictures_with_words(pages):
    for name, page in pages.items():
        assert page.language == "en", name
        assert page.headings.count(1) == 1, name
        order = page.headings[page.headings.index(1) :]
        assert all(below <= above + 1 for above, below in pairwise(order)), (name, order)
        assert all(len(words) > 10 for words in page.pictures), (name, page.pictures)


@pytest.mark.slow
def test_lists_begin_with_a_term_and_headers_have_words(site):
    """Sphinx writes signatures as lists without terms, and the corner of a table as a header."""
    for path in site.rglob("*.html"):
        assert not re.findall(r"<dl[^>]*>\s*<dd|<th[^>]*>\s*</th>", path.read_text()), path


@pytest.mark.slow
def test_long_pages_have_a_picture_or_a_table(pages):
    long = {name: page.words for name, page in pages.items() if not page.has_table and not page.pictures}
    assert {name: words for name, words in long.items() if words > MOST_WORDS and name not in MADE} == {}


@pytest.mark.slow
def test_every_public_name_is_documented(site):
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    known = {name for kind in ("py:class", "py:function", "py:module") for name in inventory.data[kind]}
    files = [*(ROOT / "drrho").glob("*.py"), *(ROOT / "drrho" / "integrations").glob("*.py")]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if path.stem != "__init__"]
    names = {f"{module}.{name}" for module in modules for name in reference.public_names(module)}
    assert len(names) > 150
    assert sorted((names | set(modules)) - known) == []


@pytest.mark.slow
def test_formulas_use_characters_of_the_font(pages):
    """Also as the italic letters that browsers make of single ones."""
    used = set("".join(page.formulas for page in pages.values())) - set("\n ")
    assert {"∑", "θ", "‖", "ℓ"} <= used
    italic = {chr(0x1D434 + ord(c) - ord("A")) for c in used if "A" <= c <= "Z"}
    italic |= {chr(0x1D44E + ord(c) - ord("a")) for c in used - {"h"} if "a" <= c <= "z"}
    italic |= {chr(0x1D6FC + ord(c) - ord("α")) for c in used if "α" <= c <= "ω"}
    assert used | italic <= {chr(c) for c in TTFont(DOCS / "_static" / "stix-two-math.woff").getBestCmap()}


def test_every_page_of_the_repository_is_on_the_site():
    shown = set(repository.Pages(DOCS).files)
    written = {path.relative_to(ROOT).as_posix() for folder in SHOWN for path in (ROOT / folder).rglob("*.md")}
    assert len(written) > 25
    assert {path for path in written if not path.endswith(LICENSES)} <= shown


def test_every_notebook_is_on_the_site():
    written = {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert len(written) >= 6 and written <= set(repository.Pages(DOCS).files)


def test_a_notebook_is_shown_as_it_was_executed():
    cells = [
        {"cell_type": "markdown", "source": ["# Why?\n", "\n", "So."]},
        {
            "cell_type": "code",
            "source": ["f(1)\n", "g()"],
            "outputs": [{"output_type": "stream", "text": ["2\n", "3\n"]}],
        },
        {"cell_type": "code", "source": [], "outputs": [{"data": {"image/png": "QUJD\n", "text/plain": ["<Figure>"]}}]},
        {"cell_type": "code", "source": [], "outputs": [{"data": {"text/plain": ["[1]"]}}]},
    ]
    assert repository.notebook({"cells": cells}).split("\n\n", 2)[2] == (
        "```python\nf(1)\ng()\n```\n\n```text\n2\n3\n```\n\n"
        "```python\n\n```\n\n![Why?: what the code above draws](data:image/png;base64,QUJD)\n\n"
        "```python\n\n```\n\n```text\n[1]\n```\n"
    )


def test_every_section_of_the_long_pages_is_on_the_site():
    pages = repository.Pages(DOCS)
    for path in ("drrho/README.md", "experiments/clip/README.md", "paper_figures/README.md"):
        headings = {
            repository.slug(part.title) for part in repository.sections((ROOT / path).read_text()) if part.level > 1
        }
        assert headings <= {anchor for source, anchor in pages.anchors if source == path}, path


def test_spelling():
    asked = ["git", "ls-files", "*.md", f":!*{LICENSES}", "drrho/*.py", "docs/*.py", "docs/*.css", "docs/*.mjs"]
    files = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    checked = [sys.executable, "-m", "codespell_lib", "--ignore-words", DOCS / "spelling.txt", *files]
    found = subprocess.run(checked, capture_output=True, text=True, cwd=ROOT)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.slow
def test_code_on_the_pages_runs_and_says_what_is_true(capsys):
    names = {}
    for page in ("start.md", "concepts/duals.md"):
        for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
            exec(block, names)
    scores = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(scores["steered"]) > float(scores["plain"])


def test_the_first_page_has_the_figures_of_the_demo():
    text = " ".join((DOCS / "index.md").read_text().split())
    scores = json.loads((ROOT / "paper_figures" / "results" / "glyph_demo.json").read_text())["scores"]
    for model, words in {
        "steered": "names {} % right",
        "unsteered": "without reference {} %,",
        "reference": ", {} %.",
    }.items():
        assert words.format(f"{100 * scores[model]['naming']['top1']:.1f}") in text
    assert f"{scores['steered']['naming']['samples']:,} held-out" in text


def test_sections_of_a_file():
    text = "# A\n\nfirst\n\n```\n# no heading\n```\n\n## B `c`, d!\n\nsecond\n\n### E\n\nthird\n\n## F\n"
    parts = repository.sections(text)
    assert [(part.level, part.title) for part in parts] == [(0, ""), (1, "A"), (2, "B `c`, d!"), (3, "E"), (2, "F")]
    assert repository.slug("B `c`, d!") == "b-c-d"
    assert repository.slug("[Two](x.md) words") == "two-words"


@pytest.mark.parametrize(
    ("asked", "first", "without"),
    [
        ("drrho/README.md#the-contrastive-risk", "## The contrastive risk", "## Linear models"),
        ("drrho/README.md#the-contrastive-risk body", "`contrastive_risk(", "## The contrastive risk"),
        ("experiments/clip/README.md#your-own-data alone", "## Your own data", "### Shards"),
        ("drrho/README.md#", "For one row of losses", "## Three numbers"),
        ("drrho/README.md rest", "## ", "## Other systems"),
        ("drrho/CHOOSING.md below", "## How do I choose", "# rho, by held-out losses\n\n#"),
    ],
    ids=["section", "body", "alone", "start", "rest", "below"],
)
def test_a_page_asks_for_a_part(asked, first, without):
    (found,) = repository.requests(f"```{{repository}} {asked}\n```\n", DOCS)
    assert found.text().lstrip().startswith(first)
    assert without not in found.text()


@pytest.mark.parametrize(
    ("asked", "words"),
    [("drrho/NONE.md", "is not a file of the repository"), ("drrho/README.md#none", "has no section #none: there are")],
    ids=["file", "section"],
)
def test_what_does_not_exist_is_refused(asked, words):
    with pytest.raises(repository.ExtensionError, match=re.escape(words)):
        repository.requests(f"```{{repository}} {asked}\n```\n", DOCS)


@pytest.mark.parametrize(
    ("target", "means"),
    [
        ("https://example.org/a", "https://example.org/a"),
        ("CHOOSING.md", "../choose.md"),
        ("../experiments/clip/README.md#evaluation", "evaluation.md#evaluation"),
        ("../experiments/benchmarks", "../benchmarks/programs.md"),
        ("#derivatives", "#derivatives"),
        ("#other-systems", "../conventions.md#other-systems"),
        ("risk.py", "../../drrho/risk.py"),
        ("../docs/faq.md", "../faq.md"),
        ("../notebooks/01_drrho_risk.ipynb", "../notebooks/01_drrho_risk.md"),
        ("solvers", None),
    ],
    ids=["host", "file", "section", "folder", "here", "elsewhere", "code", "site", "notebook", "unknown"],
)
def test_links_are_rewritten(target, means):
    pages = repository.Pages(DOCS)
    assert pages.link(target, "drrho/README.md", "guides/library.md") == means
    shown = f"[a `b` c]({means})" if means else "a `b` c"
    text = f"See [a `b` c]({target}).\n\n```\n[x]({target})\n```\n"
    assert pages.rewritten(text, "drrho/README.md", "guides/library.md") == text.replace(f"[a `b` c]({target})", shown)


def test_public_names_are_those_of_the_module():
    assert reference.public_names("drrho.reference") == ["excess_losses"]
    tree = ast.parse((ROOT / "drrho" / "risk.py").read_text())
    assert set(reference.public_names("drrho.risk")) <= {getattr(node, "name", None) for node in tree.body}
