"""Clocks, peak memory, the record of the machine, and tables."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

PATIENCE = 2.0  # seconds
ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "numpy", "scipy", "mpmath", "cvxpy", "clarabel", "dro", "entmax", "skfolio")


def seconds(call: Callable[[], Any]) -> float:
    """Return the time of one call, what is queued on a GPU included."""
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def median_seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Return each call's median time after one warm-up; the calls take turns, so that all see the same machine.

    Where the warm-up shows that a round takes longer than `PATIENCE`, there is one round.
    """
    warm_up = sum(seconds(call) for call in calls)
    rounds = [[seconds(call) for call in calls] for _ in range(repeats if warm_up < PATIENCE else 1)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_arrays(name: str, n: int) -> float:
    """Return the peak memory of a problem beyond its losses, in float64 arrays of n, from a fresh process."""
    # Fixed thresholds make glibc hand every freed array back: the high-water mark is that of live arrays.
    settings = {"MALLOC_MMAP_THRESHOLD_": str(2**22), "MALLOC_TRIM_THRESHOLD_": str(2**26), "OMP_NUM_THREADS": "1"}
    environment = os.environ | settings
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "experiments.benchmarks.memory", name, str(n)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return float(done.stdout)


def provenance(command: str, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the figures."""
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "load": _load(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in ("drrho", *packages)},
        "oracle_digits": int(np.finfo(np.longdouble).precision),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _load() -> float | None:
    """Return how many processes were running over the last minute, where the system says."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def explain(error: BaseException) -> str:
    """Return a failure as one short line of text."""
    return first_sentence(f"{type(error).__name__}: {error}")


def first_sentence(text: str) -> str:
    """Return the beginning of a message, on one line."""
    sentence = " ".join(text.split()).split(". ")[0].rstrip(".")
    return sentence if len(sentence) <= 120 else f"{sentence[:117]}..."


def within(measured: float | None, reach: float | None) -> str:
    """Return whether a figure is where it is aimed at; empty where there is none."""
    if measured is None or reach is None:
        return ""
    return "yes" if measured <= reach else "NO"


def markdown(rows: Iterable[Any]) -> str:
    """Return rows of one dataclass as a table; a field that is a mapping spreads over columns."""
    return table([_spread(asdict(row)) for row in rows])


def write_page(path: Path, title: str, record: Mapping[str, Any], about: str, rows: Iterable[Any]) -> None:
    """Print and write a page of one table, whose first line says what was measured where."""
    text = (
        f"# {title}\n\n`{record['command']}`, {record['date']}. {record['machine']}, load {record['load']} at the "
        f"start, torch {record['versions']['torch']}. {about}\n\n{markdown(rows)}\n"
    )
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def table(flat: Sequence[Mapping[str, Any]]) -> str:
    """Return rows by the names of their columns as a table; columns that are empty in every row go."""
    names = dict.fromkeys(name for row in flat for name in row)
    columns = [column for column in names if any(_cell(row.get(column)) for row in flat)]
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in flat)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat.update(value if isinstance(value, dict) else {key.replace("_", " "): value})
    return flat


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value).replace("|", "/")
    return f"{value:.3g}" if abs(value) < 1e3 or abs(value) >= 1e6 else f"{value:.0f}"
