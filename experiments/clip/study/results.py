"""The tables of results: a line for each finished training, and one for each of its validations."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from ..cli.train import Trained
from ..errors import UserError
from ..glyphs.evaluation import Evaluation
from ..io.files import append_durably, locked
from ..training.trainer import Record
from .cells import Tuned, captions_label
from .planning import PlannedTraining, cell_hash, gigaflops, reference_label
from .studies import STUDIES

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
    "gflops",  # of `gigaflops`
    *("validation_top1", "validation_top5", "test_top1", "test_top5"),
    *("test_image_to_text_r1", "test_text_to_image_r1", "test_script_balanced"),
    *VARIANCES,  # over the negatives of the last batch
    "seconds",  # of training and evaluation; none of a training that was interrupted
    "options",  # of `run.py train`, which repeats it
)
CURVE_FIELDS = ("hash", "step", "samples_trained", "validation_top1", *VARIANCES)

Row = dict[str, str]


def curves_path(results: Path) -> Path:
    """Return where the validations of all trainings are."""
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


def study_rows(name: str, results: Path, tuned: Tuned) -> list[Row]:
    """Return the lines of a study's finished trainings, in the order of its grid, with the study's own labels."""
    rows = read_rows(results)
    return [
        rows[own] | {"study": name, "method": cell.method, "setting": cell.setting}
        for cell in STUDIES[name](tuned)
        if (own := cell_hash(cell)) in rows
    ]


def table_lock(results: Path) -> AbstractContextManager[None]:
    """Keep other processes from changing the tables."""
    return locked(results.with_name(f".{results.name}.lock"))


def write_training(results: Path, row: Row, curve: Iterable[Row]) -> None:
    """Append a training's lines; the one in the table is last, and says that the training is done."""
    with table_lock(results):
        if row["hash"] not in read_rows(results):
            _append(curves_path(results), CURVE_FIELDS, curve)
            _append(results, FIELDS, [row])


def row_of(
    each: PlannedTraining,
    trained: Trained,
    evaluation: Evaluation,
    *,
    samples: int,
    seconds: float | None,
    options: str,
) -> Row:
    """Return the line of a finished training.

    Parameters
    ----------
    samples
        Pairs that it saw, where its last record does not say.
    seconds
        How long it took; None if it was interrupted.
    options
        Words of ``run.py train`` that repeat it.
    """
    cell, train, last = each.cell, each.cell.train, trained.history[-1]
    seen = last.get("samples_trained", samples)
    scored = last.get("samples_scored", seen)
    script = evaluation.attributes.get("script")
    values = {
        "study": each.study,
        "hash": each.hash,
        "captions": captions_label(train.data),
        "fraction": train.fraction,
        "model": train.model,
        "method": cell.method,
        "reference": reference_label(cell),
        "seed": train.seed,
        "setting": cell.setting,
        "samples_scored": scored,
        "samples_trained": seen,
        "learning_rate": train.optimization.lr,
        "temperature": last.get("temperature", trained.identity["temperature"]),
        "gflops": gigaflops(train, seen, scored),
        "validation_top1": last["naming_top1"],
        "validation_top5": last["naming_top5"],
        "test_top1": evaluation.naming.top1,
        "test_top5": evaluation.naming.top5,
        "test_image_to_text_r1": evaluation.retrieval.image_to_text[1],
        "test_text_to_image_r1": evaluation.retrieval.text_to_image[1],
        "test_script_balanced": None if script is None else script.balanced,
        **{name: last.get(name) for name in VARIANCES},
        "seconds": None if seconds is None else round(seconds, 1),
        "options": options,
    }
    return {name: _text(values[name]) for name in FIELDS}


def curve_of(row: Row, history: Sequence[Record]) -> list[Row]:
    """Return the lines of a training's validations; ``row`` is its own line."""
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


def _text(value: float | str | None) -> str:
    if value is None:
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _read(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """Yield the lines of a table; the last one does not count without its end, as a crash may leave half of it."""
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
