"""The part ``tests``: the tests that need CUDA."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from xml.etree import ElementTree

from drrho.solvers import native
from experiments.benchmarks.gpu.cases import Setting, missing_packages
from experiments.benchmarks.gpu.programs import call
from experiments.benchmarks.gpu.record import Record
from experiments.benchmarks.measure import ROOT, first_sentence

_TESTS, _MARK = ROOT / "tests", "mark.gpu"
_PATIENCE = 100.0
_PROCESSES = 4
_HOW = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
_COUNTS = ("tests", "failures", "errors", "skipped")


def run(setting: Setting, record: Record) -> None:
    """Run ``pytest -m gpu``; the tests that fail are failures of the part."""
    report, log = setting.scratch / "tests.xml", setting.scratch / "tests.log"
    command = [
        sys.executable,
        "-u",  # what is printed is there when time runs out
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "-v",
        f"--junitxml={report}",
    ]
    if not missing_packages("xdist"):
        command += ["--numprocesses", str(min(_PROCESSES, os.cpu_count() or 1)), "--dist", "load"]
    if native.library is None:  # as in a plain checkout
        command.append("--portable")
    # Other files may need packages that are not here. Where there is no GPU, all tests are skipped.
    command += [str(path) for path in sorted(_TESTS.rglob("test_*.py")) if _MARK in path.read_text()]
    try:
        seconds = call(command, log, _PATIENCE * (1 + setting.small), may_fail=True)
    except RuntimeError as error:  # out of time: what is done by then counts
        counts, failed = outcomes_in(log.read_text(errors="replace"))
        record.row("Tests", seconds=_PATIENCE, **counts)
        for name in failed:
            record.fail(name, "it failed, and time ran out before pytest said how")
        raise error
    if not report.exists():
        raise RuntimeError(first_sentence((log.read_text().strip().splitlines() or [""])[-2:][0]))
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    record.row("Tests", seconds=seconds, **{name: int(suite.get(name, 0)) for name in _COUNTS})
    for case in suite.iter("testcase"):
        for problem in (*case.findall("failure"), *case.findall("error")):
            record.fail(f"{case.get('classname')}::{case.get('name')}", first_sentence(problem.get("message", "")))


def outcomes_in(log: str) -> tuple[dict[str, int], list[str]]:
    """Return how many tests have ended how, by what pytest has printed with ``-v``, and the names of those that failed.

    With several processes a line is ``[gw0] [ 12%] PASSED tests/...``, else ``tests/... PASSED [ 12%]``.
    """
    found = re.findall(
        rf"^(?:\[gw\d+\] \[ *\d+%\] ({_HOW}) (tests/.*)|(tests/.*?) ({_HOW})(?: .*)?\[ *\d+%\])$", log, re.M
    )
    ended = [(a or d, b or c) for a, b, c, d in found]
    counts = Counter(how for how, _ in ended)
    names = {"tests": len(ended), "failures": counts["FAILED"], "errors": counts["ERROR"], "skipped": counts["SKIPPED"]}
    return names, [name.strip() for how, name in ended if how in ("FAILED", "ERROR")]
