"""Measure what resuming and checkpointing cost on the demo's data and model.

``python experiments/benchmarks/resuming.py`` kills a steered training run (``kill -9``) at random moments after its
first checkpoint, gives the same command again and takes the time to the next finished step: start of Python, imports,
data, reference features and checkpoint included. Then it trains with a checkpoint every 10 steps and without any, in
turns: the difference of the times of steps, over the number of checkpoints, is what one holds the training up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.benchmarks.measure import ROOT, provenance, within, write_page
from experiments.clip.training.checkpoint import latest_checkpoint

REACH_SECONDS = 10.0
REACH_SHARE = 0.02
EVERY_SECONDS = 300.0  # between checkpoints, for the share of time
STEPS_BETWEEN = 10
PATIENCE = 600.0  # seconds


@dataclass(frozen=True)
class Row:
    """A median over rounds, and what it is to stay below."""

    measured: str
    median: float
    rounds: str
    unit: str
    reach: float
    met: str


class Training:
    """The demo's steered run in a process of its own, a line of the log for every step."""

    def __init__(self, cache: Path, out: Path, *options: str) -> None:
        command = [sys.executable, str(ROOT / "experiments" / "clip" / "run.py"), "train", "--preset", "glyph-steered"]
        words = ["--cache", str(cache), "--out", str(out), "--log-every", "1", "--logs", "jsonl", *options]
        self._log = out / "log.jsonl"
        self._process = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, cwd=ROOT)

    def steps(self) -> int:
        """Return the number of lines that are logged."""
        return self._log.read_bytes().count(b"\n") if self._log.exists() else 0

    def wait_for_steps(self, number: int) -> None:
        """Wait until the log has so many lines."""
        deadline = time.monotonic() + PATIENCE
        while self.steps() < number:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run ended or hangs, with {self.steps()} of {number} lines in {self._log}")
            time.sleep(0.01)

    def kill(self) -> None:
        """End it as a loss of power does."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def finish(self) -> None:
        """Wait for the end."""
        if status := self._process.wait():
            raise RuntimeError(f"the run ended with status {status}")


def resume_seconds(cache: Path, folder: Path, rounds: int, seed: int) -> list[float]:
    """Return the time from each start after a kill to its first finished step."""
    draws, found = random.Random(seed), list[float]()
    running = Training(cache, folder, "--checkpoint-steps", "2")
    running.wait_for_steps(1)
    for _ in range(rounds):
        running.wait_for_steps(running.steps() + 6)
        time.sleep(draws.uniform(0, 1))
        running.kill()
        if latest_checkpoint(folder / "checkpoints") is None:
            raise RuntimeError(f"no checkpoint is in {folder}")
        before, start = running.steps(), time.monotonic()
        running = Training(cache, folder, "--checkpoint-steps", "2")
        running.wait_for_steps(before + 1)
        found.append(time.monotonic() - start)
    running.kill()
    return found


def training_seconds(cache: Path, folder: Path, *options: str) -> tuple[int, float]:
    """Train for an epoch; return the number of steps, and the time of all but the first few."""
    running = Training(cache, folder, "--epochs", "1", "--validations", "1", *options)
    running.finish()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "pairs_per_second_per_rank" in line]
    pairs = 23_635 / len(steps)
    return len(steps), sum(pairs / line["pairs_per_second_per_rank"] for line in steps[STEPS_BETWEEN:])


def main(arguments: Sequence[str]) -> int:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--cache", type=Path, default=ROOT / "cache", help="folder of the drawn data")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "resuming.md")
    options = parser.parse_args(arguments)
    record = provenance(shlex.join(["python", "experiments/benchmarks/resuming.py", *arguments]))
    with tempfile.TemporaryDirectory() as scratch:
        seconds = resume_seconds(options.cache, Path(scratch) / "resumed", options.rounds, options.seed)
        held: list[float] = []
        for number in range(options.rounds):
            _, without = training_seconds(options.cache, Path(scratch) / f"without-{number}")
            every = ("--checkpoint-steps", str(STEPS_BETWEEN))
            steps, checkpointed = training_seconds(options.cache, Path(scratch) / f"every-{number}", *every)
            held.append((checkpointed - without) / ((steps - STEPS_BETWEEN) // STEPS_BETWEEN))
    share = statistics.median(held) / EVERY_SECONDS
    rows = [
        Row(
            "time from the command given again to its first finished step",
            statistics.median(seconds),
            ", ".join(f"{value:.1f}" for value in seconds),
            "s",
            REACH_SECONDS,
            within(statistics.median(seconds), REACH_SECONDS),
        ),
        Row(
            "time that a checkpoint holds training up, of one every 5 minutes",
            100 * share,
            ", ".join(f"{100 * value / EVERY_SECONDS:.3f}" for value in held),
            "%",
            100 * REACH_SHARE,
            within(share, REACH_SHARE),
        ),
    ]
    about = (
        f"glyph-small on 23,635 pairs, batch 512, steered, {os.cpu_count()} threads. Data and reference features are "
        "there, as after any first run."
    )
    write_page(options.output, "Resuming and checkpointing", record, about, rows)
    return int(any(row.met == "NO" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
