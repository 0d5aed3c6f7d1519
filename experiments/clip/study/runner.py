"""Runs the studies of grid.py: each training once, over any number of processes, a line of results for each.

A training is known by the hash of its options. A process claims it by a lock that the kernel drops when the process
ends, however it ends; the next to take it resumes from its checkpoint. Its line is written under a lock and synced, and
is what says that it is done; its folder is then removed. References stay: they are trained when the first training
that they steer is due. When the last training of a tuning is done, its best setting is written, and the trainings that
use it are due.
"""

from __future__ import annotations

import dataclasses
import math
import random
import shlex
import shutil
import signal
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from rich.table import Table
from scipy import stats

from ..cli.building import build_models
from ..cli.options import Data, Train
from ..cli.parser import as_words
from ..cli.sources import embedded_pairs
from ..cli.terminal import console
from ..cli.train import Trained, train_model
from ..distributed import joined_ranks
from ..errors import PROGRAM, Interrupted, UserError
from ..glyphs.dataset import Manifest
from ..glyphs.evaluation import Evaluation
from ..glyphs.source import LOCK, load_pairs, share
from ..glyphs.stream import PreparedPairs
from ..io.files import claimed, ensure_writable, locked
from ..models.clip import Clip
from ..models.config import CONFIG_FILE
from ..models.export import export_model
from ..signals import asked
from ..training.checkpoint import latest_checkpoint
from .cells import Cell, Tuned, reference_cell
from .options import Study
from .planning import (
    PlannedTraining,
    cell_hash,
    differ_in_seed_alone,
    expected_seconds,
    planned_training,
    planned_trainings,
)
from .results import Row, curve_of, read_rows, row_of, write_training
from .studies import REFERENCE_STUDY_OF, REFERENCES, STUDIES_OF, TUNING_STUDIES_OF
from .tuned import tuned_by_now, update_tuned

_TIME_OVER = signal.SIGALRM
_CHECKED = ("validation_top1", "test_top1")
_HELD_SPLITS = 8

Stop = Callable[[], int]  # the number of the signal that asks to stop, 0 if none does


def run(options: Study) -> None:
    """Run what is left, say what is left, or check one training."""
    if unknown := [name for name in options.only if name not in STUDIES_OF[options.grid]]:
        known, large = ", ".join(STUDIES_OF[options.grid]), " --large" * options.large
        raise UserError(f"--only {unknown[0]} is no study of --data {options.kind}{large}: choose of {known}")
    runner = _StudyRunner(options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # processes share the cores, and sums add up alike on any number of them
    try:
        if options.dry_run:
            console.print(runner.outlook())
        elif options.check:
            runner.check(options.seed)
        else:
            runner.run(math.inf if options.seconds is None else options.seconds)
    finally:
        torch.set_num_threads(threads)


class _StudyRunner:
    def __init__(self, options: Study) -> None:
        self._results, self._out, self._cache = options.table, options.out, options.cache
        self._studies, self._pairs = STUDIES_OF[options.grid], embedded_pairs(options.kind)
        self._names, self._kept = options.only or tuple(self._studies), REFERENCE_STUDY_OF[options.grid]
        self._plan(tuned_by_now(self._results))
        if not self._trainings:
            raise UserError(
                f"--only {' '.join(self._names)} uses tuned settings, of which {self._results} has none yet: run "
                f"`{PROGRAM} study --only {' '.join(TUNING_STUDIES_OF[options.grid])}` first"
            )
        self._load = PairsInMemory()
        self._manifests = cache(self._prepared)

    def run(self, seconds: float) -> None:
        """Train what no other process has, until nothing is left."""
        ensure_writable(self._out)
        ensure_writable(self._results.parent)
        self._remove_finished_folders()
        end, waits = time.monotonic() + seconds, False

        def stop() -> int:
            return asked() or (_TIME_OVER if time.monotonic() > end else 0)

        try:
            while left := self._left():
                _raise_if_stopped(stop)
                if any(self._take(each, stop) for each in left):
                    waits = False
                    continue
                if not waits:
                    console.print(f"study      waiting for the {len(left)} that other processes have")
                waits = True
                time.sleep(1.0)
        except Interrupted as interruption:
            if interruption.signal != _TIME_OVER:
                raise
            console.print(f"study      the {seconds:g} seconds are over, {len(self._left())} trainings left")
            return
        console.print(f"study      nothing is left of {len(self._trainings)} trainings: {self._results}")

    def outlook(self) -> Table:
        """Return what is done and left of each study, and how long it takes one process."""
        rows, trainings = read_rows(self._results), self._trainings
        table = Table(title=f"{self._results}, and one process's time for what is left", title_justify="left")
        for column in ("study", "trainings", "done", "left", "hours left"):
            table.add_column(column, justify="left" if column == "study" else "right")
        total = 0.0
        for name in dict.fromkeys(each.study for each in trainings):
            own = [each for each in trainings if each.study == name]
            left = [each.cell.train for each in own if each.hash not in rows]
            hours = sum(expected_seconds(train, self._samples(train), rows.values()) for train in left) / 3600
            total += hours
            table.add_row(name, str(len(own)), str(len(own) - len(left)), str(len(left)), f"{hours:.2f}")
        done = sum(each.hash in rows for each in trainings)
        table.add_row("all", str(len(trainings)), str(done), str(len(trainings) - done), f"{total:.2f}")
        notes = []
        if untuned := [name for name in self._names if not any(True for _ in self._studies[name](self._tuned))]:
            notes.append(f"not counted, as their settings are not tuned yet: {', '.join(untuned)}")
        if stale := rows.keys() - {each.hash for each in planned_trainings(self._studies, self._tuned)}:
            table.add_row("stale", "", str(len(stale)), "", "")
            notes.append("stale: lines of trainings that are no longer in the grid, which statistics leave out")
        table.caption = "\n".join(notes) or None
        return table

    def check(self, seed: int) -> None:
        """Run one finished training again; raise a `UserError` if its scores are others than chance explains."""
        rows = read_rows(self._results)
        done = [each for each in self._trainings if each.hash in rows]
        if not done:
            raise UserError(f"{self._results} has no finished training to check: run `{PROGRAM} study` first")
        each = random.Random(seed).choice(done)
        console.print(f"check      {each}, chosen by --seed {seed}")
        ensure_writable(self._out)
        with tempfile.TemporaryDirectory(prefix="check-", dir=self._out) as folder:
            while not self._ensure_reference(each.cell, asked):
                _raise_if_stopped(asked)
                time.sleep(1.0)
            trained, evaluation = self._train(each.cell, Path(folder), asked)
        again = self._row(each, trained, evaluation, None)
        alike = [rows[other.hash] for other in done if differ_in_seed_alone(other.cell, each.cell)]
        outside = []
        for name in _CHECKED:
            values = [float(row[name]) for row in alike]
            samples = self._manifest(each.cell.train.data).splits[name.partition("_")[0]].samples
            there, here = float(rows[each.hash][name]), float(again[name])
            half, source = largest_difference(there, values, samples)
            verdict = "within" if abs(here - there) <= half else "outside"
            line = f"{name} {here:.4f} here, {there:.4f} there: {verdict} ±{half:.4f}, by {source}"
            console.print(f"check      {line}")
            if verdict == "outside":
                outside.append(line)
        if outside:
            raise UserError(f"--check {each}: {'; '.join(outside)}: line, program, data or machine have changed")

    def _plan(self, tuned: Tuned) -> None:
        self._tuned = tuned
        self._trainings = planned_trainings(self._names, tuned)

    def _left(self) -> list[PlannedTraining]:
        """Return the trainings that have no line, those included that are due since a tuning was done."""
        if (tuned := update_tuned(self._results)) != self._tuned:
            self._plan(tuned)
        rows = read_rows(self._results)
        return [each for each in self._trainings if each.hash not in rows]

    def _take(self, each: PlannedTraining, stop: Stop) -> bool:
        """Run a training, or the reference that it needs; return False if another process has it."""
        with claimed(self._claim(each.hash)) as mine:
            if not mine or each.hash in read_rows(self._results):
                return False
            if each.study == self._kept:
                self._run_reference(each, stop)
                return True
            if not self._ensure_reference(each.cell, stop):
                return False
            folder = self._out / "cells" / each.hash
            self._run(each, folder, stop)
            shutil.rmtree(folder)
            return True

    def _ensure_reference(self, cell: Cell, stop: Stop) -> bool:
        """Train a training's reference unless it is there; return False if another process is training it."""
        if not cell.reference or (self._model(cell.reference) / CONFIG_FILE).is_file():
            return True
        each = planned_training(self._kept, _reference_cell(cell.reference))
        with claimed(self._claim(each.hash)) as mine:
            if mine and not (self._model(cell.reference) / CONFIG_FILE).is_file():
                self._run_reference(each, stop)
            return mine

    def _run_reference(self, each: PlannedTraining, stop: Stop) -> None:
        model = self._model(each.cell.setting)
        self._run(each, model.parent, stop, model)
        shutil.rmtree(model.parent / "checkpoints")

    def _claim(self, own: str) -> Path:
        return self._out / "claims" / own

    def _model(self, reference: str) -> Path:
        """Return where a trained reference is."""
        return self._out / "references" / f"{reference}-{cell_hash(_reference_cell(reference))}" / "model"

    def _run(self, each: PlannedTraining, folder: Path, stop: Stop, model: Path | None = None) -> None:
        """Train, resuming from a checkpoint, and write the line; ``model`` is where the weights are kept."""
        resumed = latest_checkpoint(folder / "checkpoints") is not None
        console.print(f"training   {each}{', from its checkpoint' if resumed else ''}")
        started = time.monotonic()
        try:
            trained, evaluation = self._train(each.cell, folder, stop)
        except UserError as error:
            raise UserError(f"training {each}: {error}") from error
        seconds = time.monotonic() - started
        if model is not None:
            export_model(trained.clip, model, getattr(torch, each.cell.train.weights))
        row = self._row(each, trained, evaluation, None if resumed else seconds)
        write_training(self._results, row, curve_of(row, trained.history))
        top1 = 100 * float(row["validation_top1"])
        console.print(f"trained    {each}: validation top-1 {top1:.2f} %, {seconds:.0f} s")

    def _train(self, cell: Cell, folder: Path, stop: Stop) -> tuple[Trained, Evaluation]:
        """Train a cell in a folder and score it on the test split."""
        data = dataclasses.replace(cell.train.data, cache=self._cache)
        options = dataclasses.replace(self._with_trained_reference(cell), data=data, out=folder, logs=())
        execution = options.execution
        with _quiet_console(), joined_ranks(execution.device, execution.exchange_minutes) as ranks:
            trained = train_model(
                options, build_models(options, ranks), ranks, stop, partial(self._pairs.open_data, load=self._load)
            )
            manifest = self._manifest(cell.train.data)
            held_out = self._load(manifest, "test", trained.clip)
            return trained, self._pairs.evaluate_model(trained.clip, held_out, manifest)

    def _with_trained_reference(self, cell: Cell) -> Train:
        """Return a cell's options, with the reference that the study trained for it."""
        if not cell.reference:
            return cell.train
        loss = dataclasses.replace(cell.train.loss, reference=self._model(cell.reference))
        return dataclasses.replace(cell.train, loss=loss)

    def _row(self, each: PlannedTraining, trained: Trained, evaluation: Evaluation, seconds: float | None) -> Row:
        options = dataclasses.replace(self._with_trained_reference(each.cell), out=Train().out, logs=Train().logs)
        return row_of(
            each,
            trained,
            evaluation,
            samples=self._samples(each.cell.train),
            seconds=seconds,
            options=shlex.join(as_words(options)),
        )

    def _remove_finished_folders(self) -> None:
        """Remove the folders of trainings whose process ended between writing the line and removing the folder."""
        rows = read_rows(self._results)
        for folder in self._out.glob("cells/*"):
            with claimed(self._claim(folder.name)) as mine:
                if mine and folder.name in rows:
                    shutil.rmtree(folder, ignore_errors=True)

    def _prepared(self, data: Data) -> Manifest:
        with locked(self._cache / LOCK):
            return self._pairs.prepare(data)

    def _manifest(self, data: Data) -> Manifest:
        return self._manifests(dataclasses.replace(data, cache=self._cache))

    def _samples(self, train: Train) -> int:
        """Return how many pairs a training sees, counted each time."""
        # As many as before names are exchanged, so that an outlook writes no pairs.
        manifest = self._manifest(dataclasses.replace(train.data, swapped=0.0))
        return train.optimization.epochs * share(train, manifest)


class PairsInMemory:
    """Splits as models read them; the last few are kept in memory for the trainings that follow."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, str, str], PreparedPairs] = OrderedDict()

    def __call__(self, manifest: Manifest, split: str, clip: Clip) -> PreparedPairs:
        """Return a split for a registered model."""
        key = manifest.fingerprint, split, clip.name
        if key not in self._held:
            while len(self._held) >= _HELD_SPLITS:
                self._held.popitem(last=False)
            self._held[key] = load_pairs(manifest, split, clip)
        self._held.move_to_end(key)
        return self._held[key]


def largest_difference(value: float, values: Sequence[float], samples: int) -> tuple[float, str]:
    """Return how far a training's repetition may be from its share ``value``, at 95 %, and what says so.

    The larger of two: of shares among so many samples, by their binomial variance, and of trainings that differ in
    their seed, whose shares are ``values``.
    """
    share_of_one = (value * samples + 1) / (samples + 2)  # not 0 or 1, whose variance would be none
    binomial = 1.96 * math.sqrt(2 * share_of_one * (1 - share_of_one) / samples)
    if len(values) > 1:
        spread = float(stats.t.ppf(0.975, len(values) - 1)) * math.sqrt(2) * statistics.stdev(values)
        if spread > binomial:
            return spread, f"the spread over {len(values)} seeds"
    return binomial, f"the binomial variance of {samples} samples"


def _reference_cell(name: str) -> Cell:
    return reference_cell(name, REFERENCES[name])


def _raise_if_stopped(stop: Stop) -> None:
    if number := stop():
        raise Interrupted("stopped between two trainings", number)


@contextmanager
def _quiet_console() -> Iterator[None]:
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before
