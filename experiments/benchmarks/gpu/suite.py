"""The part ``tests``: the tests that need CUDA."""

from __future__ import annotations

import os
import sys
from xml.etree import ElementTree

from drrho.solvers import native
from experiments.benchmarks.gpu.cases import Setting, missing_packages
from experiments.benchmarks.gpu.programs import call
from experiments.benchmarks.gpu.record import Record
from experiments.benchmarks.measure import ROOT, first_sentence

_TESTS, _MARK = ROOT / "tests", "mark.gpu"
_PATIENCE = 100.0
_PROCESSES = 4
_COUNTS = ("tests", "failures", "errors", "skipped")


def run(setting: Setting, record: Record) -> None:
    """Run ``pytest -m gpu``; the tests that fail are failures of the part."""
    report, log = setting.scratch / "tests.xml", setting.scratch / "tests.log"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        f"--junitxml={report}",
    ]
    if not missing_packages("xdist"):
        command += ["--numprocesses", str(min(_PROCESSES, os.cpu_count() or 1)), "--dist", "load"]
    if native.library is None:  # as in a plain checkout
        command.append("--portable")
    # Other files may need packages that are not here. Where there is no GPU, all tests are skipped.
    command += [str(path) for path in sorted(_TESTS.rglob("test_*.py")) if _MARK in path.read_text()]
    seconds = call(command, log, _PATIENCE * (1 + setting.small), may_fail=True)
    if not report.exists():
        raise RuntimeError(first_sentence((log.read_text().strip().splitlines() or [""])[-2:][0]))
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    record.row("Tests", seconds=seconds, **{name: int(suite.get(name, 0)) for name in _COUNTS})
    for case in suite.iter("testcase"):
        for problem in (*case.findall("failure"), *case.findall("error")):
            record.fail(f"{case.get('classname')}::{case.get('name')}", first_sentence(problem.get("message", "")))
