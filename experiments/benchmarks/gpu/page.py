"""The page that is made from the records of the parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.gpu.crew import LATE
from experiments.benchmarks.gpu.parts import PARTS
from experiments.benchmarks.gpu.record import Record
from experiments.benchmarks.measure import table

_INTRODUCTION = (
    "What `make gpu` (`python -m experiments.benchmarks.gpu`) has measured: each part in a process of its own, on the "
    "machine and at the date that the table below says. Figures of one part belong together: compare no others."
)


def records_in(folder: Path) -> list[dict[str, Any]]:
    """Return what the records of a folder keep, in the order of the parts."""
    found = (Record.load(folder, name) for name in PARTS)
    return [record.kept for record in found if record is not None]


def page(records: Sequence[dict[str, Any]]) -> str:
    """Return the page as Markdown: what is to be reached first, then every part's tables."""
    sections = ["# On a GPU", _INTRODUCTION, table([_summary(kept) for kept in records]) if records else "Nothing yet."]
    aims = [{"part": kept["part"], **aim} for kept in records for aim in kept["aims"]]
    if aims:
        met = sum(aim["met"] == "yes" for aim in aims)
        sections += ["## Figures to reach", f"{met} of {len(aims)} are met.", table(aims)]
    for kept in records:
        sections += _part(kept)
    return "\n\n".join(sections) + "\n"


def _summary(kept: dict[str, Any]) -> dict[str, Any]:
    provenance = kept["provenance"]
    versions = provenance["versions"]
    late = sum(each["problem"].startswith(LATE) for each in kept["failures"])
    return {
        "part": kept["part"],
        "state": kept["state"] + (f": {kept['reason']}" if kept["reason"] else ""),
        "wrong": len(kept["failures"]) - late,
        "not in time": late,
        "seconds": kept["seconds"],
        "machine": f"{provenance['gpu']}; {provenance['machine']}",
        "date": provenance["date"],
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number != "not installed"),
        "command": f"`{provenance['command']}`",
    }


def _part(kept: dict[str, Any]) -> list[str]:
    sections = [f"## {PARTS[kept['part']].title}"]
    if kept["failures"]:
        sections += ["**Failures**", table(kept["failures"])]
    for title, found in kept["tables"].items():
        sections += [f"### {title}", found["text"], table(found["rows"]) if found["rows"] else ""]
    return [section for section in sections if section]
