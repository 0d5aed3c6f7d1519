"""Measure the risks: time against torch's own operations, peak memory, accuracy against an oracle, other packages.

``python experiments/benchmarks/core.py`` prints the tables and writes them as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.benchmarks import oracle, peers
from experiments.benchmarks.measure import explain, markdown, median_seconds, peak_arrays, provenance, within
from experiments.benchmarks.memory import CHECK
from experiments.benchmarks.problems import (
    CHI_SQUARE_BALL,
    CVAR,
    HELLINGER_BALL,
    KL_BALL,
    KL_PENALTY,
    LOSSES,
    RACES,
    USER_BALL,
    Problem,
    Race,
    losses,
    relative_error,
)

RESULTS = Path(__file__).parent / "results" / "core.json"
ORACLE_RADII = (1e-8, 1e-6, 1e-4, 1e-2, 0.5, 2.0)
ACCURACY_RADII = (1e-8, 1e-6, 1e-4, 1e-2, 0.5, 5.0)
ACCURACY_REACH = {torch.float64: 1e-11, torch.float32: 1e-5}
MEMORY_REACH = 4.0
MEMORY_FLOOR = 4_000_000  # losses, below which an array drowns in the process's own memory
BATCH = (4096, 1024)
BATCH_REACH = 1 / 50
LOOPED_ROWS = 256
CALL_SIZE = 100
CALL_REACH_US = 150.0
CALL_BLOCK = 100
DEVICE_SIZE = 100_000_000
DEVICE_REACH = 15.0
PEER_SIZES = (1000, 10_000, 100_000)


class Section(NamedTuple):
    """One table with what to read before it."""

    title: str
    text: str
    rows: Sequence[Any]


# --- time -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimeRow:
    """One call on n losses against an operation of torch on the same losses, and the answer's accuracy."""

    problem: str
    losses: str
    parameter: str
    time_ms: float | None = None
    yardstick: str = ""
    yardstick_ms: float | None = None
    ratio: float | None = None
    reach: float | None = None
    met: str = ""
    premium_error: float | None = None
    note: str = ""


def time_table(n: int, repeats: int) -> Section:
    """Race every problem against its yardstick."""
    rows = [_time_row(race, kind, value, n, repeats) for race in RACES for kind in LOSSES for value in race.values]
    text = f"n = {n:,}, float64, no gradient; weights, dual variables and gap included. Medians of {repeats}."
    return Section("Time", text, rows)


def _time_row(race: Race, kind: str, value: float, n: int, repeats: int) -> TimeRow:
    problem, z = race.problem, losses(kind, n)
    key = (problem.name, kind, f"{problem.parameter} {value:g}")
    try:
        time, yardstick = median_seconds([lambda: problem.solve(z, value), lambda: race.yardstick.run(z)], repeats)
        error = relative_error(problem.solve(z, value).premium.item(), problem.exact_premium(kind, n, value))
    except Exception as failure:  # the other rows are still worth having
        return TimeRow(*key, note=explain(failure))
    ratio = time / yardstick
    return TimeRow(
        *key,
        time_ms=1e3 * time,
        yardstick=race.yardstick.name,
        yardstick_ms=1e3 * yardstick,
        ratio=ratio,
        reach=race.reach,
        met=within(ratio, race.reach),
        premium_error=error,
    )


# --- batch ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchRow:
    """One call on all rows against a Python loop over them, and against a copy, which writes as much."""

    radius: float
    batch_ms: float | None = None
    loop_ms: float | None = None
    ratio: float | None = None
    reach: float | None = None
    met: str = ""
    ratio_to_loop_of_aimed_calls: float | None = None
    clone_ms: float | None = None
    ratio_to_clone: float | None = None
    premium_error: float | None = None
    note: str = ""


def batch_table(repeats: int) -> Section:
    """Time the chi-square ball on many rows at once."""
    rows, n = BATCH
    z = losses("exponential", rows * n).reshape(rows, n)
    text = (
        f"Chi-square ball, {rows} rows of {n} exponential losses: one call against a loop of calls over the rows, "
        f"timed on {LOOPED_ROWS} of them and scaled. The faster single calls are, the harder that ratio: beside it "
        f"stand the ratio to a loop whose calls take the {CALL_REACH_US:g} us that are aimed at, and the time of "
        "z.clone(), which reads the losses once and writes as much new memory as the weights take. The premium error "
        "is the largest of 8 rows."
    )
    return Section("Batch", text, [_batch_row(z, radius, repeats) for radius in (1 / n, 1e-2, 0.5)])


def _batch_row(z: Tensor, radius: float, repeats: int) -> BatchRow:
    def batch() -> Any:
        return CHI_SQUARE_BALL.solve(z, radius)

    def loop() -> None:
        for row in z[:LOOPED_ROWS]:
            CHI_SQUARE_BALL.solve(row, radius)

    try:
        together, apart, copied = median_seconds([batch, loop, z.clone], repeats)
        premiums = batch().premium
        checked = range(0, len(z), len(z) // 8)
        errors = [
            relative_error(premiums[row].item(), CHI_SQUARE_BALL.premium(z[row].numpy(), radius)) for row in checked
        ]
    except Exception as failure:
        return BatchRow(radius, note=explain(failure))
    apart *= len(z) / LOOPED_ROWS
    ratio = together / apart
    return BatchRow(
        radius=radius,
        batch_ms=1e3 * together,
        loop_ms=1e3 * apart,
        ratio=ratio,
        reach=BATCH_REACH,
        met=within(ratio, BATCH_REACH),
        ratio_to_loop_of_aimed_calls=together / (1e-6 * CALL_REACH_US * len(z)),
        clone_ms=1e3 * copied,
        ratio_to_clone=together / copied,
        premium_error=max(errors),
    )


# --- one small call -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallRow:
    """What a call costs when there is almost nothing to compute."""

    problem: str
    parameter: str
    gradient: str
    time_us: float | None = None
    reach: float | None = None
    met: str = ""
    note: str = ""


def call_table(repeats: int) -> Section:
    """Time single small calls, without and with what autograd adds."""
    tasks = ((CHI_SQUARE_BALL, 1e-2), (KL_BALL, 1e-2), (CVAR, 0.1), (KL_PENALTY, 1.0))
    rows = [_call_row(problem, value, gradient, repeats) for problem, value in tasks for gradient in GRADIENTS]
    text = f"One row of {CALL_SIZE} exponential losses; medians of {repeats} blocks of {CALL_BLOCK} calls."
    return Section("Call overhead", text, rows)


def _plain(problem: Problem, value: float) -> Callable[[], Any]:
    z = losses("exponential", CALL_SIZE)
    return lambda: problem.solve(z, value)


def _tracked(problem: Problem, value: float) -> Callable[[], Any]:
    z = losses("exponential", CALL_SIZE).clone().requires_grad_()
    return lambda: problem.solve(z, value)


def _backward(problem: Problem, value: float) -> Callable[[], Any]:
    z = losses("exponential", CALL_SIZE).clone().requires_grad_()
    return lambda: torch.autograd.grad(problem.solve(z, value).value, z)


#: What is timed, and the reach in microseconds.
GRADIENTS: dict[str, tuple[Callable[[Problem, float], Callable[[], Any]], float | None]] = {
    "none": (_plain, CALL_REACH_US),
    "tracked": (_tracked, CALL_REACH_US),
    "tracked, and backward": (_backward, None),
}


def _call_row(problem: Problem, value: float, gradient: str, repeats: int) -> CallRow:
    key = (problem.name, f"{problem.parameter} {value:g}", gradient)
    prepare, reach = GRADIENTS[gradient]
    call = prepare(problem, value)

    def block() -> None:
        for _ in range(CALL_BLOCK):
            call()

    try:
        (time,) = median_seconds([block], repeats)
    except Exception as failure:
        return CallRow(*key, note=explain(failure))
    time *= 1e6 / CALL_BLOCK
    return CallRow(*key, time, reach, within(time, reach))


# --- memory ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory beyond the losses, in arrays as large as they are."""

    problem: str
    arrays: float | None = None
    reach: float | None = None
    met: str = ""
    note: str = ""


def memory_table(n: int) -> Section:
    """Measure the high-water mark of every problem, and first that of three arrays, which must read 3."""
    text = (
        f"n = {n:,}, float64, no gradient: peak resident memory beyond the losses, the answer's weights included, in "
        f"arrays of n; the highest over the parameters of the time table, each problem in a fresh process. "
        f"The first row allocates three arrays, as a check of the method."
    )
    if n < MEMORY_FLOOR:
        return Section(
            "Memory", f"Skipped: it needs n >= {MEMORY_FLOOR // 10:,} to be told from the process's own.", []
        )
    return Section("Memory", text, [_memory_row(CHECK, n), *(_memory_row(race.problem.name, n) for race in RACES)])


def _memory_row(name: str, n: int) -> MemoryRow:
    try:
        arrays = peak_arrays(name, n)
    except Exception as failure:
        return MemoryRow(name, note=explain(failure))
    reach = None if name == CHECK else MEMORY_REACH
    return MemoryRow(name, arrays, reach, within(arrays, reach))


# --- accuracy -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AccuracyRow:
    """Relative premium errors of a ball over radii."""

    problem: str
    losses: str
    n: int
    dtype: str
    errors: dict[str, float] = field(default_factory=dict)
    worst: float | None = None
    reach: float | None = None
    met: str = ""
    note: str = ""


def accuracy_table(n: int) -> Section:
    """Hold the balls' premiums against the oracle's."""
    kinds_of_input = ((n // 10, torch.float64), (n, torch.float64), (n // 10, torch.float32))
    rows = [
        _accuracy_row(problem, kind, size, dtype)
        for problem in (CHI_SQUARE_BALL, KL_BALL, USER_BALL, HELLINGER_BALL)
        for kind in LOSSES
        for size, dtype in kinds_of_input
    ]
    check = max(oracle.disagreement(losses(kind, 40).numpy(), ORACLE_RADII) for kind in LOSSES)
    text = (
        "|premium / exact premium - 1|, premium = risk - mean, by radius; `beyond` is 2 n, above the maximal ones. The "
        f"oracle differs from mpmath's dual by at most {check:.1e} (n = 40, {len(ORACLE_RADII)} radii, three balls)."
    )
    return Section("Accuracy", text, rows)


def _accuracy_row(problem: Problem, kind: str, n: int, dtype: torch.dtype) -> AccuracyRow:
    key = (problem.name, kind, n, str(dtype).removeprefix("torch."))
    try:
        errors = {
            name: relative_error(
                problem.solve(losses(kind, n, dtype), radius).premium.item(),
                problem.exact_premium(kind, n, radius, dtype),
            )
            for name, radius in (*((f"{radius:g}", radius) for radius in ACCURACY_RADII), ("beyond", 2.0 * n))
        }
    except Exception as failure:
        return AccuracyRow(*key, note=explain(failure))
    worst, reach = max(errors.values()), ACCURACY_REACH[dtype]
    return AccuracyRow(*key, errors, worst, reach, within(worst, reach))


# --- GPU ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceRow:
    """The chi-square ball on a GPU, in passes over the losses at the bandwidth of a copy."""

    radius: float
    time_ms: float | None = None
    pass_ms: float | None = None
    passes: float | None = None
    reach: float | None = None
    met: str = ""
    relative_gap: float | None = None
    memory_arrays: float | None = None
    note: str = ""


def device_table(device: str, n: int, repeats: int) -> Section:
    """Time the chi-square ball where memory bandwidth is the limit."""
    generator = torch.Generator(device).manual_seed(0)
    z = torch.empty(n, dtype=torch.float32, device=device).exponential_(generator=generator)
    one_pass = _copy_seconds(z, repeats) / 2
    text = (
        f"Chi-square ball, {n:,} exponential float32 losses on the device; a pass is half the time of a copy, which "
        "reads them once and writes them once. Memory: peak beyond the losses, in float32 arrays of n."
    )
    return Section("GPU", text, [_device_row(z, radius, one_pass, repeats) for radius in (1e-6, 1e-2, 0.5)])


def _copy_seconds(z: Tensor, repeats: int) -> float:
    target = torch.empty_like(z)
    return median_seconds([lambda: target.copy_(z)], repeats)[0]


def _device_row(z: Tensor, radius: float, one_pass: float, repeats: int) -> DeviceRow:
    def call() -> Any:
        return CHI_SQUARE_BALL.solve(z, radius)

    try:
        (time,) = median_seconds([call], repeats)
        arrays = _device_arrays(z, call)
        risk = call()
    except Exception as failure:
        return DeviceRow(radius, note=explain(failure))
    passes = time / one_pass
    return DeviceRow(
        radius,
        1e3 * time,
        1e3 * one_pass,
        passes,
        DEVICE_REACH,
        within(passes, DEVICE_REACH),
        (risk.gap / risk.premium).item(),
        arrays,
    )


def _device_arrays(z: Tensor, call: Callable[[], Any]) -> float | None:
    """Return the peak of a call beyond what is allocated before it, in arrays like the losses."""
    if not z.is_cuda:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / (z.element_size() * len(z))


# --- the command ----------------------------------------------------------------------------------------------


def peer_table(n: int, repeats: int) -> Section:
    """Put other packages beside the library."""
    text = (
        "Time and relative premium error of other packages on the same losses, each at its best setting; those that "
        "solve cone programs only up to n = 10,000. A failure or a warning is a note."
    )
    sizes = tuple(sorted({min(size, n) for size in PEER_SIZES}))
    return Section("Other packages", f"{text} {peers.missing()}".strip(), peers.compare(sizes, repeats))


def sections(n: int, repeats: int, skip_peers: bool) -> Iterator[Section]:
    """Yield the tables, each as soon as it is measured."""
    yield time_table(n, repeats)
    yield batch_table(repeats)
    yield call_table(repeats)
    yield memory_table(10 * n)
    yield accuracy_table(n)
    if torch.cuda.is_available():
        yield device_table("cuda", DEVICE_SIZE, repeats)
    if not skip_peers:
        yield peer_table(n, repeats)


def summary(measured: Sequence[Section]) -> Section:
    """Return how many figures are where they are aimed at."""
    lines = []
    for section in measured:
        aimed = [row for row in section.rows if getattr(row, "met", "")]
        failed = [row for row in section.rows if hasattr(row, "met") and row.note]
        if aimed or failed:
            met = sum(row.met == "yes" for row in aimed)
            failures = f", {len(failed)} could not be measured" if failed else ""
            lines.append(f"- {section.title}: {met} of {len(aimed)} figures within reach{failures}")
    return Section("Summary", "\n".join(lines), [])


def as_text(section: Section) -> str:
    """Return a section as Markdown."""
    parts = [f"## {section.title}", section.text, markdown(section.rows) if section.rows else ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(output: Path, record: dict[str, Any], measured: Sequence[Section]) -> None:
    """Write the tables as JSON, and as Markdown beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    tables = {
        section.title: {"text": section.text, "rows": [asdict(row) for row in section.rows]} for section in measured
    }
    output.write_text(json.dumps({"provenance": record, "tables": tables}, indent=1) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    heading = (
        f"# Core benchmarks\n\n`{record['command']}`, {record['date']}. {record['machine']}; GPU: {record['gpu']}; "
        f"{record['threads']} thread, load at the start {record['load']}. {versions}.\n"
    )
    output.with_suffix(".md").write_text("\n".join([heading, *map(as_text, measured)]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1_000_000, help="losses of the time table (default: 1000000)")
    parser.add_argument("--repeats", type=int, default=5, help="timings per figure, of which the median (default: 5)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file; the Markdown goes beside it")
    parser.add_argument("--skip-peers", action="store_true", help="leave the other packages out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given = sys.argv[1:] if arguments is None else arguments
    record = provenance(shlex.join(["python", "experiments/benchmarks/core.py", *given]))
    measured = []
    for section in sections(options.n, options.repeats, options.skip_peers):
        print(as_text(section), flush=True)
        measured.append(section)
    measured.append(summary(measured))
    print(as_text(measured[-1]))
    write(options.output, record, measured)
    print(f"Written to {options.output} and {options.output.with_suffix('.md').name}.")


if __name__ == "__main__":
    main()
