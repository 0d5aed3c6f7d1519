"""Which trainings a study has, what identifies each, and how long it takes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from ..cli.cost import cost_of
from ..cli.defaults import with_defaults
from ..cli.options import Train
from ..cli.parser import as_settings
from ..cli.sources import embedded_pairs
from ..models.clip import fingerprint_of
from ..models.config import registered_config
from ..models.sources import register_models
from ..training.options import SHIPPED_REFERENCE
from .cells import Cell, Tuned, captions_label, reference_cell
from .studies import REFERENCES, STUDIES

_FORMAT = 1
# What the trained model does not depend on.
_WITHOUT_EFFECT = ("out", "keeping", "logs", "log_every", "remote_sync", "remote_sync_frequency")
_PRECISION = "float32"  # of the towers on the cores that studies take, if none is given
_GFLOPS_PER_SECOND = 40.0  # of one core, of small models: expected where nothing of a model's size has been timed


class PlannedTraining(NamedTuple):
    """A cell, the first study that has it, and the hash of its options."""

    study: str
    cell: Cell
    hash: str

    def __str__(self) -> str:
        cell = self.cell
        labels = (
            self.study,
            captions_label(cell.train.data),
            cell.train.model,
            cell.method,
            cell.setting,
            cell.reference,
            f"seed {cell.train.seed}",
        )
        return f"{self.hash} ({', '.join(label for label in labels if label)})"


def planned_trainings(studies: Iterable[str], tuned: Tuned) -> list[PlannedTraining]:
    """Return the cells of these studies, each training once."""
    found: dict[str, PlannedTraining] = {}
    for name in studies:
        for each in (planned_training(name, cell) for cell in STUDIES[name](tuned)):
            found.setdefault(each.hash, each)
    return list(found.values())


def planned_training(study: str, cell: Cell) -> PlannedTraining:
    """Return a study's cell with its hash."""
    return PlannedTraining(study, cell, cell_hash(cell))


def differ_in_seed_alone(a: Cell, b: Cell) -> bool:
    """Return whether two trainings are equal but for their seeds."""
    return _hash_without_seed(a) == _hash_without_seed(b)


def _hash_without_seed(cell: Cell) -> str:
    return cell_hash(dataclasses.replace(cell, train=dataclasses.replace(cell.train, seed=0)))


@cache
def cell_hash(cell: Cell) -> str:
    """Return what identifies the result of a training: a hash of all options that it depends on.

    Options that are off (None, False, nothing) are left out, so that one that is added later, and off, changes nothing.
    """
    register_models()
    train = with_defaults(cell.train, registered_config(cell.train.model).model, _PRECISION)
    settings = {key: value for key, value in as_settings(train).items() if key not in _WITHOUT_EFFECT}
    settings["shards"]["workers"] = 0  # no part of the embedded pairs, but of hashes
    settings["patch_dropout"] = train.patch_dropout or 0.0
    settings["data"] = embedded_pairs(cell.train.data.kind).dataset_settings(cell.train.data)
    del settings["execution"]["exchange_minutes"]
    if not _without_off(settings["inputs"]):  # a group that is newer than some results, and off
        del settings["inputs"]
    loss = cell.train.loss
    if cell.reference:
        settings["loss"]["reference"] = {
            "trained": cell_hash(reference_cell(cell.reference, REFERENCES[cell.reference]))
        }
    else:
        settings["loss"]["reference"] = _fingerprint(cell.train.reference) if loss.needs_reference else None
    text = json.dumps([_FORMAT, _without_off(settings)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_fingerprint = cache(fingerprint_of)
_cost_of = cache(cost_of)


def _without_off(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _without_off(v) for k, v in value.items() if v is not None and v is not False and v != [] and v != ""}


def reference_label(cell: Cell) -> str:
    """Return what tables call the reference of a training; nothing where it has none."""
    if cell.reference or not cell.train.loss.needs_reference:
        return cell.reference
    reference = cell.train.reference
    return "shipped" if reference == SHIPPED_REFERENCE else reference.name


def gigaflops(train: Train, samples: float, scored: float) -> float:
    """Return 10^9 operations of training: three forward passes of a pair trained on, and one of a pair scored."""
    return _cost_of(train.model).flops * (3 * samples + scored * train.selection.is_on) / 1e9


def expected_seconds(train: Train, samples: int, rows: Iterable[Mapping[str, str]]) -> float:
    """Return the median of trainings of this model and length, else of this model, else what its size suggests."""
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
