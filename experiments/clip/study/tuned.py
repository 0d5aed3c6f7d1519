"""What tuning found: the best setting of each method, decided by the table of results and kept beside it.

`study.csv` has `study_tuned.json`: one entry for each tuning study, captions, method and trained reference, with the
options of the winning setting as values, the hash of its line and its naming top-1 on the validation split. Studies
that use tuned settings have their trainings as soon as these are decided.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..io.files import write_atomically
from .cells import Cell, TunedKey, captions_label
from .planning import cell_hash
from .results import Row, read_rows, table_lock
from .settings import Setting, find
from .studies import STUDIES, TUNING_STUDIES_OF, tried_settings


class Winner(NamedTuple):
    """The best setting, the hash of its training, and its naming top-1 on the validation split."""

    setting: Setting
    hash: str
    validation_top1: float


Winners = dict[TunedKey, Winner]


def tuned_path(results: Path) -> Path:
    """Return where the tuned settings of a table are."""
    return results.with_name(f"{results.stem}_tuned.json")


def read_tuned(results: Path) -> dict[TunedKey, Setting]:
    """Return the settings that are tuned, as the file beside a table of results says."""
    return _settings(_read(tuned_path(results)))


def tuned_by_now(results: Path) -> dict[TunedKey, Setting]:
    """Return the settings that are tuned, those included that the table decides and the file does not have yet."""
    return _settings(_read(tuned_path(results)) | winners(read_rows(results)))


def update_tuned(results: Path) -> dict[TunedKey, Setting]:
    """Write what the table decides; return all settings that are tuned.

    What the table does not decide stays as it is: a line that was removed, or a setting that was added to those to be
    tried, leaves the earlier winner until the missing trainings are done.
    """
    with table_lock(results):
        before = _read(tuned_path(results))
        after = before | winners(read_rows(results))
        if after != before:
            write_tuned(results, after)
    return _settings(after)


def write_tuned(results: Path, found: Winners) -> None:
    """Replace the tuned settings of a table, an entry a line."""
    entries = [json.dumps(_entry(key, found[key])) for key in sorted(found)]
    write_atomically(tuned_path(results), "[\n{}\n]\n".format(",\n".join(entries)).encode())


def winners(rows: Mapping[str, Row]) -> Winners:
    """Return the settings of the highest validation top-1, the first of equals, of which all trainings are done."""
    tried: dict[TunedKey, list[Cell]] = {}
    for study in chain(*TUNING_STUDIES_OF.values()):
        for cell in STUDIES[study]({}) if study in STUDIES else ():
            tried.setdefault(TunedKey(study, captions_label(cell.train.data), cell.method, cell.reference), []).append(
                cell
            )
    found: Winners = {}
    for key, cells in tried.items():
        if all(cell_hash(cell) in rows for cell in cells):
            best = max(cells, key=lambda cell: _validation_top1(rows, cell))
            (setting,) = [each for each in tried_settings(key) if each.name == best.setting]
            found[key] = Winner(setting, cell_hash(best), _validation_top1(rows, best))
    return found


def _validation_top1(rows: Mapping[str, Row], cell: Cell) -> float:
    return float(rows[cell_hash(cell)]["validation_top1"])


def _settings(found: Winners) -> dict[TunedKey, Setting]:
    return {key: winner.setting for key, winner in found.items()}


def _entry(key: TunedKey, winner: Winner) -> dict[str, object]:
    return {
        **key._asdict(),
        "options": winner.setting.values,
        "hash": winner.hash,
        "validation_top1": winner.validation_top1,
    }


def _read(path: Path) -> Winners:
    """Return the file's entries; one whose setting the grid no longer has is not tuned."""
    if not path.exists():
        return {}
    found: Winners = {}
    try:
        for entry in json.loads(path.read_bytes()):
            key = TunedKey(entry["study"], entry["captions"], entry["method"], entry["reference"])
            options, own, top1 = entry["options"], str(entry["hash"]), float(entry["validation_top1"])
            try:
                found[key] = Winner(find(tried_settings(key), **options), own, top1)
            except LookupError:
                continue
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a file of tuned settings ({error!r}): remove it, and `study` writes it"
        ) from error
    return found
