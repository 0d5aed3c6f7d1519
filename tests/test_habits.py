"""The pages and files for contributors: their code runs, their commands exist, their fields are what readers expect."""

import datetime
import re
import sys
from pathlib import Path

import pytest
import yaml

import drrho
from experiments.clip.training import methods

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / f"{name}.md").read_text() for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")}
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.slow
def test_what_is_added_as_contributing_says_works(monkeypatch):
    """A divergence, a training method and a source of data, each as the page adds it."""
    monkeypatch.setattr(methods, "METHODS", methods.METHODS.copy())
    blocks = re.findall(r"```python\n(.*?)```", PAGES["CONTRIBUTING"], re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {"__name__": "contributing"})
    assert "triplet" in methods.METHODS


def test_pages_point_to_what_exists():
    for name, text in PAGES.items():
        for path in re.findall(r"\]\(((?!https?:)[^)#]+)", text):
            assert (ROOT / path).exists(), f"{name}: {path}"
        headings = {
            re.sub(r"[^a-z -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)", text, re.M)
        }
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_the_changelog_keeps_its_format():
    releases = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d{2}-\d{2}))?$", PAGES["CHANGELOG"], re.M)
    assert [version for version, _ in releases] == ["Unreleased", "0.2.0", "0.1.0"]
    dates = [datetime.date.fromisoformat(date) for _, date in releases[1:]]
    assert dates == sorted(dates, reverse=True)
    kinds = set(re.findall(r"^### (.*)$", PAGES["CHANGELOG"], re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_has_what_its_schema_asks_for():
    """Citation File Format 1.2.0: the required keys, and the types and values that it allows for the others."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    known = {"abstract", "type", "version", "date-released", "license", "keywords", "preferred-citation"}
    assert set(citation) <= {"cff-version", "message", "title", "authors"} | known
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == drrho.__version__ and citation["license"] == PROJECT["license"]
    assert isinstance(citation["date-released"], datetime.date)
    assert f"[{drrho.__version__}] - {citation['date-released']}" in PAGES["CHANGELOG"]
    assert citation["authors"] == PROJECT["authors"]
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper) and paper["type"] == "conference-paper"
    assert set(paper["conference"]) >= {"name"} and isinstance(paper["year"], int)
    assert all(
        {"type", "value"} <= set(each) and each["type"] in ("doi", "url", "swh", "other")
        for each in paper["identifiers"]
    )
    assert paper["title"] in (ROOT / "README.md").read_text()


def test_workflows_run_what_the_makefile_has():
    assert set(WORKFLOWS) == {"check", "nightly"}
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            commands = [step["run"] for step in job["steps"] if step.get("run", "").startswith("make ")]
            assert len(commands) == 1 and commands[0].removeprefix("make ") in targets
    events = WORKFLOWS["check"][True]  # YAML 1.1 reads the key `on` so
    assert "push" in events and "schedule" in WORKFLOWS["nightly"][True]
    pythons = WORKFLOWS["check"]["jobs"]["check"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]
    assert [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if "Python :: 3." in each] == pythons
    assert PROJECT["requires-python"] == f">={pythons[0]}"


def test_issue_templates_and_hooks_have_their_fields():
    for name in ("bug", "feature"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
        assert {"name", "description", "body"} <= set(form)
        assert all({"type", "id", "attributes"} <= set(part) for part in form["body"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].split()[0] for hook in hooks] == [".venv/bin/ruff"] * 2


def test_commands_of_the_page_are_targets():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    assert set(re.findall(r"^make ([a-z-]+)", PAGES["CONTRIBUTING"], re.M)) <= targets
