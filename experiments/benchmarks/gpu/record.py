"""What a part has measured, kept as JSON from the first row on: what was measured outlives a crash."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmarks.measure import explain, within

RUNNING, FINISHED, LEFT_OUT, FAILED = "running", "finished", "left out", "failed"


class Record:
    """The rows, aims and failures of one part; every change is written to its file and printed.

    Attributes
    ----------
    kept : dict
        What the file holds: ``part``, ``state`` and ``reason``, ``seconds``, ``provenance``, ``tables`` (by title, a
        text and rows), ``aims`` (figures to reach), ``failures``.
    """

    def __init__(self, path: Path, kept: dict[str, Any]) -> None:
        self.path, self.kept = path, kept
        self._started = time.monotonic() - kept.get("seconds", 0.0)

    @classmethod
    def new(cls, folder: Path, part: str, provenance: dict[str, Any]) -> Record:
        """Start the record of a part anew, in the file of its name."""
        folder.mkdir(parents=True, exist_ok=True)
        empty = {"tables": {}, "aims": [], "failures": []}
        record = cls(
            path_of(folder, part), {"part": part, "state": RUNNING, "reason": "", "provenance": provenance, **empty}
        )
        record._write()
        return record

    @classmethod
    def load(cls, folder: Path, part: str) -> Record | None:
        """Return the record of a part as it was left, or None if there is none that can be read."""
        try:
            return cls(path_of(folder, part), json.loads(path_of(folder, part).read_text()))
        except (OSError, ValueError):
            return None

    def text(self, title: str, text: str) -> None:
        """Say what to read before a table."""
        self._table(title)["text"] = text
        self._write()

    def row(self, title: str, **fields: Any) -> None:
        """Add a row to a table."""
        self._table(title)["rows"].append(fields)
        self._say(title, fields)

    def aim(self, what: str, measured: float | None, reach: float, *, at_least: bool = False, unit: str = "") -> str:
        """Add a figure to reach, at most ``reach`` or at least that much; return whether it is reached."""
        met = within(reach, measured) if at_least else within(measured, reach)
        aimed = f"{'>=' if at_least else '<='} {reach:g} {unit}".strip()
        fields = {"what": what, "measured": measured, "to reach": aimed, "met": met or "not measured"}
        self.kept["aims"].append(fields)
        self._say("aim", fields)
        return met

    def fail(self, case: str, problem: str) -> None:
        """Add a check that did not hold, or a case that could not be measured."""
        self.kept["failures"].append({"case": case, "problem": problem})
        self._say("FAILED", self.kept["failures"][-1])

    def attempt(self, case: str, measure: Callable[[], None]) -> None:
        """Measure, or write down in a line why that was not possible, so that the cases after it are reached."""
        try:
            measure()
        except Exception as error:
            self.fail(case, explain(error))

    def end(self, state: str, reason: str = "") -> None:
        """Say how the part has ended."""
        self.kept |= {"state": state, "reason": reason}
        self._say(state, {"reason": reason, "seconds": round(time.monotonic() - self._started, 1)})

    @property
    def is_good(self) -> bool:
        """Whether the part has ended, and nothing failed in it."""
        return self.kept["state"] in (FINISHED, LEFT_OUT) and not self.kept["failures"]

    def _table(self, title: str) -> dict[str, Any]:
        return self.kept["tables"].setdefault(title, {"text": "", "rows": []})

    def _say(self, title: str, fields: dict[str, Any]) -> None:
        self._write()
        shown = (f"{key} {_short(value)}" for key, value in fields.items() if value not in (None, ""))
        print(f"[{self.kept['part']}] {title}: {', '.join(shown)}", flush=True)

    def _write(self) -> None:
        self.kept["seconds"] = round(time.monotonic() - self._started, 1)
        beside = self.path.with_suffix(".json.part")
        beside.write_text(json.dumps(self.kept, indent=1) + "\n")
        os.replace(beside, self.path)


def path_of(folder: Path, part: str) -> Path:
    """Return the file of a part."""
    return folder / f"{part}.json"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
