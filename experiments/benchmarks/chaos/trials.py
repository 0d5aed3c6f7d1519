"""What trials have in common: runs that were left alone, folders, and the comparison of a run that was resumed."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from experiments.benchmarks.chaos.ends import (
    End,
    Samples,
    Verdict,
    close,
    end_of,
    loads,
    same,
    same_samples,
    samples_of,
)
from experiments.benchmarks.chaos.runs import PAIRS, STAGES, STEPS, Run
from experiments.clip.glyphs.drawing import glyph_splits
from experiments.clip.training.checkpoint import latest_checkpoint, step_folders, step_number


class Trials:
    """Trials against runs that were left alone.

    Parameters
    ----------
    scratch : Path
        Where runs have their folders.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.random = scratch, random.Random(0)
        records = {name: found[:PAIRS] for name, found in glyph_splits("swapped", 32, ("stixgeneral",)).items()}
        self.splits = {"train": records["train"]}
        self.number = 0
        self.seconds: dict[str, float] = {}
        self._ends: dict[int, End] = {}
        self._first, self._ends[1] = self._first_alone()
        self.samples: Samples = samples_of(self._first)

    def _first_alone(self) -> tuple[Path, End]:
        folder = self.folder(prepared=False)
        begun = Run(folder, self.splits)
        starts: list[float] = []
        for name in STAGES:
            begun.wait_for(lambda name=name: begun.stage() == name)
            starts.append(time.monotonic())
        self._refuse_failure(begun)
        starts.append(time.monotonic())
        self.seconds = {name: starts[k + 1] - starts[k] for k, name in enumerate(STAGES)}
        return folder, end_of(folder)

    def _refuse_failure(self, begun: Run) -> None:
        statuses = begun.finish()
        if any(statuses):
            raise RuntimeError(f"the run that was left alone ended with {statuses}: {begun.said()}")

    def end(self, ranks: int) -> End:
        """Return the end of a run that was left alone on so many ranks."""
        if ranks not in self._ends:
            folder = self.folder()
            self._refuse_failure(Run(folder, self.splits, ranks))
            self._ends[ranks] = end_of(folder)
            shutil.rmtree(folder)
        return self._ends[ranks]

    def folder(self, *, prepared: bool = True) -> Path:
        """Return a new folder; with data, catalog and features of the first run, unless these are to be made."""
        self.number += 1
        folder = self.scratch / f"{self.number:03d}"
        folder.mkdir()
        for name in STAGES[:3] if prepared else ():
            shutil.copytree(self._first / name, folder / name, copy_function=os.link)
        return folder

    # --- breaking -------------------------------------------------------------------------------------------------

    def in_training(self, ranks: int = 1, sabotage: Callable[[], None] | None = None, checkpoints: int = 1) -> Run:
        """Return a run that is at a random step of its training, after its first checkpoints."""
        folder = self.folder()
        begun = Run(folder, self.splits, ranks, sabotage)
        step = self.random.randrange(3, STEPS // 2)
        begun.wait_for(
            lambda: begun.steps() >= step and len(step_folders(folder / "out" / "checkpoints")) >= checkpoints
        )
        return begun

    # --- comparing ------------------------------------------------------------------------------------------------

    def resumed(self, folder: Path, ended_in: str, ranks: int = 1, before: int | None = None) -> Verdict:
        """Give the command again, and compare the end; ``before`` is another number of ranks of the broken run."""
        good = loads(folder)
        begun = Run(folder, self.splits, ranks)
        if any(statuses := begun.finish()):
            return Verdict(f"{ended_in}; NOT RESUMED: {statuses} {begun.said()[-1:]}", False, False, good)
        return self.compared(folder, ended_in, ranks, good=good, before=before)

    def compared(
        self, folder: Path, ended_in: str, ranks: int = 1, *, good: bool = True, before: int | None = None
    ) -> Verdict:
        """Compare a run that has ended."""
        if before is None:
            is_same = same(self.end(ranks).tensors, end_of(folder).tensors)
        else:
            is_same = close(end_of(folder), self.end(1))
        are_same = same_samples(folder, self.samples, sorted({ranks, before or ranks}))
        if is_same and are_same:
            shutil.rmtree(folder)
        return Verdict(ended_in, is_same, are_same, good)

    def told(self, begun: Run, status: int, message: str, rank: int = 0, ranks: int = 1) -> Verdict:
        """Expect a broken run to end with this status and message, then resume it."""
        return self.resumed(begun.folder, said_clearly(begun, status, message, rank), ranks)

    def last_two(self, folder: Path) -> tuple[Path, Path]:
        """Return the last checkpoint but one, and the last."""
        before, last = sorted(step_folders(folder / "out" / "checkpoints"), key=step_number)[-2:]
        return before, last

    def has_checkpoint(self, folder: Path) -> bool:
        """Whether there is a checkpoint to resume from."""
        return latest_checkpoint(folder / "out" / "checkpoints") is not None


def said_clearly(begun: Run, status: int, message: str, rank: int = 0) -> str:
    """Return how a run ended: with this status and one line that has the message, or not clearly."""
    statuses = begun.finish()
    said = [line for line in begun.said(rank) if message in line]
    if statuses[rank] == status and len(said) == 1 and not any("Traceback" in line for line in begun.said(rank)):
        return f"status {status}, one line"
    return f"NOT CLEAR: {statuses} {begun.said(rank)[-1:]}"
