"""Runs the grids of study_grid.py: each training once, over any number of processes, a line of results for each.

A training is known by the hash of its options. A process claims it by a lock that the kernel drops when the process
ends, however it ends; the next to take it goes on from its checkpoint. Its line is written under a lock and synced, and
is what says that it is done; its folder is then removed. References stay: they are trained when the first training
that they steer is due.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import random
import shlex
import shutil
import signal
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from scipy import stats

from experiments.clip.cli.options import Data, Study, Train
from experiments.clip.cli.parser import as_settings, as_words
from experiments.clip.cli.plan import cost_of
from experiments.clip.cli.terminal import console, stop_on_signal
from experiments.clip.cli.train import Trained, build_models, train_model
from experiments.clip.distributed import joined_ranks
from experiments.clip.errors import UserError
from experiments.clip.glyphs.dataset import Manifest
from experiments.clip.glyphs.drawing import Captions
from experiments.clip.glyphs.evaluation import Evaluation, evaluate_model
from experiments.clip.glyphs.source import dataset_settings, load_pairs, open_data, prepare, share
from experiments.clip.glyphs.stream import PreparedPairs
from experiments.clip.io.files import append_durably, claimed, ensure_writable, locked
from experiments.clip.models.clip import CONFIG_FILE, Clip, fingerprint_of
from experiments.clip.models.export import export_model
from experiments.clip.study.grid import STUDIES, Cell, reference_cell
from experiments.clip.training.checkpoint import latest_checkpoint
from experiments.clip.training.options import SHIPPED_REFERENCE
from experiments.clip.training.trainer import Interrupted, Record

VARIANCES = tuple(
    f"{name}{side}"
    for name in ("variance_of_losses", "variance_of_excess", "correlation_with_reference")
    for side in ("", "/image", "/text")
)
FIELDS = (
    *("study", "hash", "captions", "fraction", "model", "method", "reference", "seed", "setting"),
    "samples_scored",  # pairs that the target's towers saw in training, those that were not chosen included
    "samples_trained",
    "learning_rate",
    "temperature",  # at the end
    "gflops",  # 10^9 operations of training: three forward passes of a pair trained on, and one of a pair scored
    *("validation_top1", "validation_top5", "test_top1", "test_top5"),
    *("test_image_to_text_r1", "test_text_to_image_r1", "test_script_balanced"),
    *VARIANCES,  # over the negatives of the last batch
    "seconds",  # of training and evaluation; none of a training that was interrupted
    "options",  # of `run.py train`, which repeats it
)
CURVE_FIELDS = ("hash", "step", "samples_trained", "validation_top1", *VARIANCES)

_FORMAT = 1
_REFERENCES = "references"  # the study whose models are kept
# What the trained model does not depend on.
_WITHOUT_EFFECT = ("out", "keeping", "logs", "log_every")
_GFLOPS_PER_SECOND = 40.0  # of one core, of small models: expected where nothing of a model's size has been timed
_TIME_OVER = signal.SIGALRM
_CHECKED = ("validation_top1", "test_top1")
_HELD_SPLITS = 8

Row = dict[str, str]


class Planned(NamedTuple):
    """A cell, its study, the hash of its options, and that of all but the seed."""

    study: str
    cell: Cell
    hash: str
    group: str

    def __str__(self) -> str:
        cell = self.cell
        labels = (
            self.study,
            cell.train.data.captions,
            cell.train.model,
            cell.method,
            cell.setting,
            cell.reference,
            f"seed {cell.train.seed}",
        )
        return f"{self.hash} ({', '.join(label for label in labels if label)})"


def planned(names: Iterable[str]) -> list[Planned]:
    """Return the cells of these studies, each training once."""
    found: dict[str, Planned] = {}
    for name in names:
        for each in (_planned(name, cell) for cell in STUDIES[name]()):
            found.setdefault(each.hash, each)
    return list(found.values())


def _planned(study: str, cell: Cell) -> Planned:
    alike = dataclasses.replace(cell, train=dataclasses.replace(cell.train, seed=0))
    return Planned(study, cell, cell_hash(cell), cell_hash(alike))


def cell_hash(cell: Cell) -> str:
    """Return what identifies the result of a training: a hash of all options that it depends on.

    Options that are off (None, False, nothing) are left out, so that one that is added later, and off, changes nothing.
    """
    settings = {key: value for key, value in as_settings(cell.train).items() if key not in _WITHOUT_EFFECT}
    settings["data"] = dataset_settings(cell.train.data)
    del settings["execution"]["exchange_minutes"]
    loss = cell.train.loss
    if cell.reference:
        settings["loss"]["reference"] = {"trained": cell_hash(reference_cell(cell.reference))}
    else:
        settings["loss"]["reference"] = _fingerprint(loss.reference) if loss.needs_reference else None
    text = json.dumps([_FORMAT, _without_off(settings)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_fingerprint = cache(fingerprint_of)
_cost_of = cache(cost_of)


def _without_off(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _without_off(v) for k, v in value.items() if v is not None and v is not False and v != [] and v != ""}


def run_study(options: Study) -> None:
    """Run what is left, say what is left, or check one training."""
    study = _Study(options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # processes share the cores, and sums add up alike on any number of them
    try:
        if options.dry_run:
            console.print(study.outlook())
        elif options.check:
            study.check(options.seed)
        else:
            study.run(math.inf if options.seconds is None else options.seconds)
    finally:
        torch.set_num_threads(threads)


class _Study:
    def __init__(self, options: Study) -> None:
        self._results, self._out, self._cache = options.results, options.out, options.cache
        self._cells = planned(options.only or STUDIES)
        self._load = PairsInMemory()
        self._manifests = cache(self._prepared)

    def run(self, seconds: float) -> None:
        """Train what no other process has, until nothing is left."""
        ensure_writable(self._out)
        ensure_writable(self._results.parent)
        self._remove_leavings()
        end, waits = time.monotonic() + seconds, False
        with stop_on_signal() as asked:

            def stop() -> int:
                return asked() or (_TIME_OVER if time.monotonic() > end else 0)

            try:
                while left := self._left():
                    _go_on(stop)
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
        console.print(f"study      nothing is left of {len(self._cells)} trainings: {self._results}")

    def outlook(self) -> Table:
        """Return what is done and left of each study, and how long it takes one process."""
        rows, cells = read_rows(self._results), self._cells
        table = Table(title=f"{self._results}, and one process's time for what is left", title_justify="left")
        for column in ("study", "trainings", "done", "left", "hours left"):
            table.add_column(column, justify="left" if column == "study" else "right")
        total = 0.0
        for name in dict.fromkeys(each.study for each in cells):
            own = [each for each in cells if each.study == name]
            left = [each for each in own if each.hash not in rows]
            hours = sum(self._expected_seconds(each.cell.train, rows.values()) for each in left) / 3600
            total += hours
            table.add_row(name, str(len(own)), str(len(own) - len(left)), str(len(left)), f"{hours:.2f}")
        done = sum(each.hash in rows for each in cells)
        table.add_row("all", str(len(cells)), str(done), str(len(cells) - done), f"{total:.2f}")
        if stale := rows.keys() - {each.hash for each in planned(STUDIES)}:
            table.add_row("stale", "", str(len(stale)), "", "")
            table.caption = "stale: lines of trainings that are no longer in the grid, which statistics leave out"
        return table

    def check(self, seed: int) -> None:
        """Run one finished training again; raise a `UserError` if its scores are others than chance explains."""
        rows = read_rows(self._results)
        done = [each for each in self._cells if each.hash in rows]
        if not done:
            raise UserError(f"{self._results} has no finished training to check: run `run.py study` first")
        each = random.Random(seed).choice(done)
        console.print(f"check      {each}, chosen by --seed {seed}")
        ensure_writable(self._out)
        with stop_on_signal() as stop, tempfile.TemporaryDirectory(prefix="check-", dir=self._out) as folder:
            while not self._reference_is_there(each.cell, stop):
                _go_on(stop)
                time.sleep(1.0)
            trained, evaluation = self._train(each.cell, Path(folder), stop)
        again = self._row(each, trained, evaluation, None)
        group = {other.hash for other in self._cells if other.group == each.group}
        outside = []
        for name in _CHECKED:
            values = [float(rows[own][name]) for own in group & rows.keys()]
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

    def _left(self) -> list[Planned]:
        rows = read_rows(self._results)
        return [each for each in self._cells if each.hash not in rows]

    def _take(self, each: Planned, stop: Callable[[], int]) -> bool:
        """Run a cell, or the reference that it needs; return False if another process has it."""
        with claimed(self._claim(each.hash)) as mine:
            if not mine or each.hash in read_rows(self._results):
                return False
            if each.study == _REFERENCES:
                self._run_reference(each, stop)
                return True
            if not self._reference_is_there(each.cell, stop):
                return False
            folder = self._out / "cells" / each.hash
            self._run(each, folder, stop)
            shutil.rmtree(folder)
            return True

    def _reference_is_there(self, cell: Cell, stop: Callable[[], int]) -> bool:
        """Return whether a cell's reference is trained, training it unless another process does."""
        if not cell.reference or (self._model(cell.reference) / CONFIG_FILE).is_file():
            return True
        each = _planned(_REFERENCES, reference_cell(cell.reference))
        with claimed(self._claim(each.hash)) as mine:
            if mine and not (self._model(cell.reference) / CONFIG_FILE).is_file():
                self._run_reference(each, stop)
            return mine

    def _run_reference(self, each: Planned, stop: Callable[[], int]) -> None:
        model = self._model(each.cell.setting)
        self._run(each, model.parent, stop, model)
        shutil.rmtree(model.parent / "checkpoints")

    def _claim(self, own: str) -> Path:
        return self._out / "claims" / own

    def _model(self, reference: str) -> Path:
        """Return where a trained reference is."""
        return self._out / "references" / f"{reference}-{cell_hash(reference_cell(reference))}" / "model"

    def _run(self, each: Planned, folder: Path, stop: Callable[[], int], model: Path | None = None) -> None:
        """Train a cell, going on from its checkpoint, and write its line; ``model`` is where its weights are kept."""
        goes_on = latest_checkpoint(folder / "checkpoints") is not None
        console.print(f"training   {each}{', from its checkpoint' if goes_on else ''}")
        started = time.monotonic()
        try:
            trained, evaluation = self._train(each.cell, folder, stop)
        except UserError as error:
            raise UserError(f"training {each}: {error}") from error
        seconds = time.monotonic() - started
        if model is not None:
            export_model(trained.clip, model, getattr(torch, each.cell.train.weights))
        row = self._row(each, trained, evaluation, None if goes_on else seconds)
        self._write(row, _curve(row, trained.history))
        top1 = 100 * float(row["validation_top1"])
        console.print(f"trained    {each}: validation top-1 {top1:.2f} %, {seconds:.0f} s")

    def _train(self, cell: Cell, folder: Path, stop: Callable[[], int]) -> tuple[Trained, Evaluation]:
        """Train a cell in a folder and score it on the test split."""
        data = dataclasses.replace(cell.train.data, cache=self._cache)
        options = dataclasses.replace(self._steered(cell), data=data, out=folder, logs=())
        execution = options.execution
        with _quiet_console(), joined_ranks(execution.device, execution.exchange_minutes) as ranks:
            trained = train_model(
                options, build_models(options, ranks), ranks, stop, partial(open_data, load=self._load)
            )
            manifest = self._manifest(cell.train.data)
            return trained, evaluate_model(trained.clip, self._load(manifest, "test", trained.clip), manifest)

    def _steered(self, cell: Cell) -> Train:
        """Return a cell's options, with the reference that the study trained for it."""
        if not cell.reference:
            return cell.train
        loss = dataclasses.replace(cell.train.loss, reference=self._model(cell.reference))
        return dataclasses.replace(cell.train, loss=loss)

    def _row(self, each: Planned, trained: Trained, evaluation: Evaluation, seconds: float | None) -> Row:
        cell, train, last = each.cell, each.cell.train, trained.history[-1]
        samples = last.get("samples_trained", self._samples(train))
        scored = last.get("samples_scored", samples)
        script = evaluation.attributes.get("script")
        shipped = "shipped" if train.loss.reference == SHIPPED_REFERENCE else train.loss.reference.name
        values = {
            "study": each.study,
            "hash": each.hash,
            "captions": train.data.captions,
            "fraction": train.fraction,
            "model": train.model,
            "method": cell.method,
            "reference": cell.reference or (shipped if train.loss.needs_reference else ""),
            "seed": train.seed,
            "setting": cell.setting,
            "samples_scored": scored,
            "samples_trained": samples,
            "learning_rate": train.optimization.lr,
            "temperature": last.get("temperature", trained.identity["temperature"]),
            "gflops": _cost_of(train.model).flops * (3 * samples + scored * train.selection.is_on) / 1e9,
            "validation_top1": last["naming_top1"],
            "validation_top5": last["naming_top5"],
            "test_top1": evaluation.naming.top1,
            "test_top5": evaluation.naming.top5,
            "test_image_to_text_r1": evaluation.retrieval.image_to_text[1],
            "test_text_to_image_r1": evaluation.retrieval.text_to_image[1],
            "test_script_balanced": None if script is None else script.balanced,
            **{name: last.get(name) for name in VARIANCES},
            "seconds": None if seconds is None else round(seconds, 1),
            "options": shlex.join(
                as_words(dataclasses.replace(self._steered(cell), out=Train().out, logs=Train().logs))
            ),
        }
        return {name: _text(values[name]) for name in FIELDS}

    def _write(self, row: Row, curve: list[Row]) -> None:
        """Append a training's lines; the one in the table is last, and says that the training is done."""
        with locked(self._results.with_name(f".{self._results.name}.lock")):
            if row["hash"] not in read_rows(self._results):
                _append(curves_path(self._results), CURVE_FIELDS, curve)
                _append(self._results, FIELDS, [row])

    def _remove_leavings(self) -> None:
        """Remove folders of trainings that ended between writing their line and removing it."""
        rows = read_rows(self._results)
        for folder in self._out.glob("cells/*"):
            with claimed(self._claim(folder.name)) as mine:
                if mine and folder.name in rows:
                    shutil.rmtree(folder, ignore_errors=True)

    def _prepared(self, captions: Captions, size: Any) -> Manifest:
        with locked(self._cache / ".lock"):
            return prepare(Data(captions, size, self._cache))

    def _manifest(self, data: Data) -> Manifest:
        return self._manifests(data.captions, data.size)

    def _samples(self, train: Train) -> int:
        """Return how many pairs a training sees, counted each time."""
        return train.optimization.epochs * share(train, self._manifest(train.data))

    def _expected_seconds(self, train: Train, rows: Iterable[Row]) -> float:
        """Return the median of trainings of this model and length, else of this model, else what its size suggests."""
        samples = self._samples(train)
        timed = [
            (int(row["samples_trained"]), float(row["seconds"]))
            for row in rows
            if row["model"] == train.model and row["seconds"]
        ]
        if alike := [seconds for count, seconds in timed if count == samples]:
            return statistics.median(alike)
        if timed:
            return samples * statistics.median(seconds / count for count, seconds in timed)
        return 3 * _cost_of(train.model).flops * samples / 1e9 / _GFLOPS_PER_SECOND


class PairsInMemory:
    """Splits as models read them, kept for the trainings that follow; the last few."""

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


def curves_path(results: Path) -> Path:
    """Return where the validations of all trainings go."""
    return results.with_name(f"{results.stem}_curves.csv")


def read_rows(results: Path) -> dict[str, Row]:
    """Return the lines of finished trainings by their hash."""
    return {row["hash"]: row for row in _read(results, FIELDS)}


def read_curves(results: Path) -> dict[str, list[Row]]:
    """Return the validations of each training by its hash, in order of steps."""
    # A process may have ended between the validations and the line of a training: it is then trained again.
    found: dict[str, dict[int, Row]] = {}
    for row in _read(curves_path(results), CURVE_FIELDS):
        found.setdefault(row["hash"], {})[int(row["step"])] = row
    return {own: [steps[step] for step in sorted(steps)] for own, steps in found.items()}


def study_rows(name: str, results: Path) -> list[Row]:
    """Return the lines of a study's finished trainings, in the order of its grid, with the study's own labels."""
    rows = read_rows(results)
    return [
        rows[own] | {"study": name, "method": cell.method, "setting": cell.setting}
        for cell in STUDIES[name]()
        if (own := cell_hash(cell)) in rows
    ]


def best_settings(rows: Iterable[Row]) -> dict[tuple[str, str, str], str]:
    """Return by captions, method and reference the setting of the highest validation top-1; the first of equals."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = row["captions"], row["method"], row["reference"]
        if key not in best or float(row["validation_top1"]) > float(best[key]["validation_top1"]):
            best[key] = row
    return {key: row["setting"] for key, row in best.items()}


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


def _curve(row: Row, history: list[Record]) -> list[Row]:
    total, last = float(row["samples_trained"]), history[-1]["step"]
    return [
        {
            "hash": row["hash"],
            "step": _text(record["step"]),
            "samples_trained": _text(record.get("samples_trained", round(total * record["step"] / last))),
            "validation_top1": _text(record["naming_top1"]),
            **{name: _text(record.get(name)) for name in VARIANCES},
        }
        for record in history
    ]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _read(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """Yield the whole lines of a table; the last is none without its end."""
    text = path.read_text() if path.exists() else ""
    reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
    for number, values in enumerate(reader, 1):
        if number == 1 and values != list(fields):
            raise UserError(f"{path} has the columns of another version: move it away, or name another by --results")
        if len(values) != len(fields):
            raise UserError(f"{path} line {number} has {len(values)} fields, not {len(fields)}: remove that line")
        if number > 1:
            yield dict(zip(fields, values, strict=True))


def _append(path: Path, fields: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    lines = io.StringIO()
    writer = csv.DictWriter(lines, fields, lineterminator="\n")
    if not path.exists() or b"\n" not in path.read_bytes():
        writer.writeheader()
    writer.writerows(rows)
    append_durably(path, lines.getvalue())


def _go_on(stop: Callable[[], int]) -> None:
    if number := stop():
        raise Interrupted("stopped between two trainings", number)


@contextmanager
def _quiet_console() -> Iterator[None]:
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before
