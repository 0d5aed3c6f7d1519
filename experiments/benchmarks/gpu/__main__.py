"""Measure everything that is to be measured on a GPU, one part after the other, each in a process of its own.

``make gpu``, or ``python -m experiments.benchmarks.gpu`` from the root of a checkout with torch and CUDA; no
installation is needed. Every part has a time limit and writes what it measures as JSON while it does: a part that
crashes or hangs loses neither its own rows nor the other parts. At the end a page is made from all JSON files in the
folder. Exit status: 0, 1 if a part or a check failed, 2 for what the user can correct, among it that there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.benchmarks.gpu.page import page, records_in
from experiments.benchmarks.gpu.parts import PARTS, run_part
from experiments.benchmarks.gpu.record import FAILED, FINISHED, RUNNING, Record, path_of
from experiments.benchmarks.measure import ROOT, first_sentence, provenance

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
_GRACE = 5.0  # seconds for a part to end the programs that it has started
_SHOWN = 4000  # characters of what a part that failed has said
_LEAST_SECONDS = 10  # with less left, no part is started
_SLOWER = 4  # how much longer a part may take on the CPU, on two cores


class Options(NamedTuple):
    """The command line."""

    only: list[str]
    out: Path
    device: str
    small: bool
    packages: Path | None
    minutes: float
    resume: bool
    tables: bool
    part: str | None


class UsageError(Exception):
    """What the user can correct."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message)


def parse(arguments: Sequence[str]) -> Options:
    """Turn a command line into options."""
    parser = _Parser(prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(PARTS)
    parser.add_argument("--only", nargs="+", default=list(PARTS), metavar="PART", help=f"parts to measure: {names}")
    parser.add_argument(
        "--out", type=Path, help="folder of the JSON files; the page is beside it, with .md (default: results/gpu)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only with --small")
    parser.add_argument("--small", action="store_true", help="a dry run: tiny sizes, whose figures mean nothing")
    parser.add_argument(
        "--packages",
        type=Path,
        help="folder of packages that are not installed (open_clip, open_clip_train, webdataset <= 0.2.86, ...)",
    )
    parser.add_argument("--minutes", type=float, default=7.0, help="time for all parts together (default: 7)")
    parser.add_argument("--resume", action="store_true", help="leave out the parts that are finished in --out")
    parser.add_argument("--tables", action="store_true", help="measure nothing, make the page from the JSON files")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.only) - set(PARTS))
    if unknown:
        raise UsageError(f"no part is called {unknown[0]!r}: choose among {names}")
    if given.device == "cpu" and not given.small:
        raise UsageError("--device cpu is for dry runs: give --small too")
    if given.small and given.out is None:
        raise UsageError("--small measures nothing that should be kept: give --out another folder")
    if not given.minutes > 0:
        raise UsageError(f"--minutes must be positive, got {given.minutes}")
    out = RESULTS if given.out is None else given.out
    return Options(**{**vars(given), "out": out.absolute()})


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    try:
        options = parse(arguments)
        if options.device == "cuda" and not options.tables and not torch.cuda.is_available():
            raise UsageError("torch sees no GPU here: run it where there is one, or dry with --device cpu --small")
        if options.part is not None:
            return run_part(options.part, options.device, options.small, options.out)
        status = 0 if options.tables else measure(options)
        write_page(options.out)
    except (UsageError, OSError) as error:
        print(f"gpu: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return status


def measure(options: Options) -> int:
    """Run the parts that are wanted, those in which nothing is timed first and at once; return 1 if one failed."""
    deadline = time.monotonic() + 60 * options.minutes
    wanted = [
        name for name in PARTS if name in options.only and not (options.resume and _is_finished(options.out, name))
    ]
    at_once = [name for name in wanted if PARTS[name].at_once]
    for names in (at_once, *([name] for name in wanted if name not in at_once)):
        with ThreadPoolExecutor(max(1, len(names))) as pool:
            list(pool.map(lambda name: _run(name, options, deadline), names))
    for kept in records_in(options.out):
        met = [aim["met"] for aim in kept["aims"]]
        if kept["part"] in wanted and met:
            print(f"== {kept['part']}: {met.count('yes')} of {len(met)} figures reached", flush=True)
    failed = [name for name in wanted if not _is_good(options.out, name)]
    print(f"== {'failed: ' + ', '.join(failed) if failed else 'nothing failed'}", flush=True)
    return int(bool(failed))


def _is_finished(out: Path, name: str) -> bool:
    record = Record.load(out, name)
    return record is not None and record.kept["state"] == FINISHED


def _is_good(out: Path, name: str) -> bool:
    record = Record.load(out, name)
    return record is not None and record.is_good


def _run(name: str, options: Options, deadline: float) -> None:
    """Run a part in a process; write down why it did not come to its end, if it did not."""
    print(f"== {name}: {PARTS[name].title}", flush=True)
    path_of(options.out, name).unlink(missing_ok=True)
    left = deadline - time.monotonic()
    reason = _attempt(name, options, left) if left > _LEAST_SECONDS else "there was no time left: go on with --resume"
    if reason:
        record = Record.load(options.out, name) or Record.new(
            options.out, name, provenance(f"--only {name}", ("torch",))
        )
        record.end(FAILED, reason)


def _attempt(name: str, options: Options, left: float) -> str:
    """Run a part in a process; return why it did not come to its end, or nothing."""
    limit = min(left, PARTS[name].seconds * (_SLOWER if options.device == "cpu" else 1))
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--part", name, "--out", str(options.out)]
    command += ["--device", options.device, *(["--small"] if options.small else [])]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=_environment(options), stderr=errors, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"it did not end within {limit:.0f} s"
        finally:
            _end(process)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    record = Record.load(options.out, name)
    if record is not None and record.kept["state"] != RUNNING:
        return ""
    print(said[-_SHOWN:], file=sys.stderr, flush=True)
    return f"its process ended with status {status}: {first_sentence((said.splitlines() or ['no word'])[-1])}"


def _environment(options: Options) -> dict[str, str]:
    """Return the environment of a part: what it imports is the checkout, then the folder of packages."""
    places = [ROOT, options.packages and options.packages.absolute(), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(str(place) for place in places if place)
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part's process, which then ends the programs that it has started, and all that is left of its group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one whose kernel does not end may not be ended either
        process.wait(_GRACE)


def write_page(out: Path) -> None:
    """Make the page of a folder, beside it."""
    path = out.with_name(f"{out.name}.md")
    path.write_text(page(records_in(out)))
    print(f"Written to {out} and {path}.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
