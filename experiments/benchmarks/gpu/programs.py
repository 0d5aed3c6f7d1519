"""Programs that a part starts, each in a process group of its own, which ends with the part."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.measure import ROOT, first_sentence

_END = "-- ended --"
_BETWEEN_LOOKS = 0.1  # seconds


def run_until(command: Sequence[str], log: Path, is_done: Callable[[str], bool], patience: float) -> float:
    """Run a program until it ends, or ``is_done`` of what it has printed; return its seconds.

    Raises
    ------
    RuntimeError
        With the last line that it printed, if it ends otherwise, or not within ``patience`` seconds.
    """
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None and not is_done(_printed(log)) and time.monotonic() - start < patience:
                time.sleep(_BETWEEN_LOOKS)
        finally:
            ended = process.returncode
            end_group(process)
    seconds = time.monotonic() - start
    if not is_done(_printed(log)):
        how = f"did not get there in {seconds:.0f} s" if ended is None else f"ended with status {ended}"
        lines = _printed(log).strip().splitlines() or ["it printed nothing"]
        raise RuntimeError(f"it {how}: {first_sentence(lines[-1])}")
    return seconds


def call(command: Sequence[str], log: Path, patience: float, *, may_fail: bool = False) -> float:
    """Run a program to its end; return its seconds.

    Raises
    ------
    RuntimeError
        As `run_until` does, also for a status other than 0, unless it ``may_fail``.
    """
    script = f'"$@"{";" if may_fail else " &&"} echo "{_END}"'
    return run_until(["/bin/sh", "-c", script, "sh", *command], log, lambda text: text.endswith(f"{_END}\n"), patience)


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a program with the processes that it has started; what it would still save is not wanted."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def flags(arguments: dict[str, Any]) -> list[str]:
    """Return options as words of a command line."""
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))]


def _printed(log: Path) -> str:
    return log.read_text(errors="replace")
