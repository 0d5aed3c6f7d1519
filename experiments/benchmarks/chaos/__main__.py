"""Break small trainings at random moments, resume them, and compare their ends bit by bit with one left alone.

``python -m experiments.benchmarks.chaos`` prints a line per trial and writes results/chaos.md. Every trial is the
program itself: shards are written, counted (`catalog`), the reference's features are computed (`cache-reference`) and a
model is trained (`train`). Each verdict is kept in a journal at once: the command given again goes on with the trials
that are left, and the journal is removed once the table is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from experiments.benchmarks.chaos.damage import DAMAGES
from experiments.benchmarks.chaos.ends import LOSS_DIFFERENCE, TENSOR_DIFFERENCE, Verdict, is_lost, row
from experiments.benchmarks.chaos.faults import FAULTS
from experiments.benchmarks.chaos.kills import KILLS
from experiments.benchmarks.chaos.runs import PAIRS, STEPS, Run
from experiments.benchmarks.chaos.trials import Trials
from experiments.benchmarks.measure import ROOT, markdown, provenance
from experiments.clip.io.files import append_line

RESULTS = ROOT / "experiments" / "benchmarks" / "results" / "chaos.md"
Kind = Callable[[Trials], Verdict]

UNBROKEN = "the same seed again, unbroken"


def unbroken(trials: Trials) -> Verdict:
    """Run the commands once more, from nothing."""
    folder = trials.folder(prepared=False)
    (status,) = Run(folder, trials.splits).finish()
    return trials.compared(folder, "the end" if status == 0 else f"NOT CLEAR: {status}")


def wanted(kills: int, faults: int, only: str) -> Iterator[tuple[str, int, Kind]]:
    """Yield name, number and function of each trial: kinds by turns."""
    yield UNBROKEN, 0, unbroken
    for count, kinds in ((kills, KILLS), (faults, FAULTS | DAMAGES)):
        chosen = {name: kind for name, kind in kinds.items() if only in name}
        for turn, (name, kind) in itertools.islice(enumerate(itertools.cycle(chosen.items())), count * bool(chosen)):
            yield name, turn // len(chosen), kind


class Journal:
    """The verdicts so far: a line of JSON for each."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._seed = path, seed
        self.found: dict[tuple[str, int], Verdict] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:  # it was being written when the process was killed
                continue
            if record.pop("seed") == seed:
                place = record.pop("kind"), record.pop("number")
                self.found[place] = Verdict(**record)

    def add(self, kind: str, number: int, verdict: Verdict) -> None:
        """Keep a verdict."""
        self.found[kind, number] = verdict
        self._path.parent.mkdir(parents=True, exist_ok=True)
        record = {"seed": self._seed, "kind": kind, "number": number, **dataclasses.asdict(verdict)}
        append_line(self._path, json.dumps(record))


def run_trials(todo: Sequence[tuple[str, int, Kind]], journal: Journal, seed: int) -> None:
    """Run the trials that are not in the journal yet."""
    left = [each for each in todo if each[:2] not in journal.found]
    if not left:
        return
    with tempfile.TemporaryDirectory() as scratch:
        trials = Trials(Path(scratch))
        for name, number, kind in left:
            trials.random = random.Random(f"{seed}/{name}/{number}")
            start = time.monotonic()
            verdict = kind(trials)
            journal.add(name, number, verdict)
            print(f"{name} ({number}), {time.monotonic() - start:.1f} s: {verdict}", flush=True)


def page(found: Mapping[tuple[str, int], Verdict], command: str) -> str:
    """Return the table of all verdicts, and what they are of."""
    record = provenance(command)
    kinds = dict.fromkeys(kind for kind, _ in found)
    rows = [row(kind, [verdict for (name, _), verdict in found.items() if name == kind]) for kind in kinds]
    return (
        f"# Broken runs\n\n`{record['command']}`, {record['date']}. {record['machine']}, torch {torch.__version__}. "
        f"Each trial trains glyph-small on {PAIRS} pairs for {STEPS} steps, steered, with individual temperatures, a "
        "moving average of the weights, a data worker and a checkpoint every 0.12 s; it is broken at a moment drawn "
        "from the seed, and the same command is given again. Compared with a run that was left alone: every tensor of "
        "the exports and of the last checkpoint (weights, optimizer, running estimates, temperatures, averages), bit "
        "by bit, and the samples of every step. Where the number of ranks changes, sums have another order: there the "
        f"loss of every step may differ by {LOSS_DIFFERENCE:g}, an exported tensor by {TENSOR_DIFFERENCE:g} of its "
        "norm. Kills and faults hit all processes of a run unless said.\n\n"
        f"{markdown(rows)}\n"
    )


def main(arguments: Sequence[str]) -> int:
    """Run the trials; return 0 if nothing was lost in any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="trials with kill -9")
    parser.add_argument("--faults", type=int, default=40, help="trials with other faults, and with damaged files")
    parser.add_argument("--only", default="", metavar="TEXT", help="kinds whose name has this text")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table goes")
    parser.add_argument("--journal", type=Path, default=ROOT / "outputs" / "chaos.jsonl", help="verdicts so far")
    options = parser.parse_args(arguments)
    todo = list(wanted(options.kills, options.faults, options.only))
    journal = Journal(options.journal, options.seed)
    run_trials(todo, journal, options.seed)
    found = {each[:2]: journal.found[each[:2]] for each in todo}
    text = page(found, shlex.join(["python", "-m", "experiments.benchmarks.chaos", *arguments]))
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    options.journal.unlink(missing_ok=True)
    return int(any(map(is_lost, found.values())))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
