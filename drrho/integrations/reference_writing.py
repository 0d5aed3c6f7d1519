"""Writing the reference's losses: what a run has computed before it was killed is not computed again.

A loss that is not computed is NaN in the file, which no loss may be. So the file itself is the record of what is done,
and samples may come in any order and in batches of any size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drrho.integrations.pages import alone, checksums_of, reserve, seal, write, write_file, write_json
from drrho.validation import ArrayLike, as_index

HEADER = "reference-losses.json"
_STARTED = "started.json"
_CHUNK = 2**20

Batch = TypeVar("Batch")


def compute(
    folder: Path,
    losses_of: Callable[[Batch], Tensor],
    batches: Iterable[tuple[ArrayLike, Batch]],
    rows: int | Sequence[int] | NDArray[np.int64],
    about: Mapping[str, Any],
    keys: NDArray[np.uint64] | None,
) -> None:
    """Write the losses of all samples as `drrho.integrations.reference_losses.ReferenceLosses.compute` says."""
    offsets = _offsets(rows)
    header = {
        "format": 1,
        "about": as_json(about),
        "rows": len(offsets) - 1,
        "values": int(offsets[-1]),
        "ragged": not isinstance(rows, int),
        "keyed": keys is not None,
        "shape": hashlib.sha256(offsets.tobytes() + (b"" if keys is None else keys.tobytes())).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "losses.f32"
    with alone(folder):
        if not (folder / _STARTED).exists():
            _start(folder, header, offsets, keys)
        _refuse_other_start(folder, header)
        descriptor = os.open(path, os.O_RDWR)
        try:
            _fill(path, descriptor, offsets, losses_of, batches)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        seal(path)
        names = [
            "losses.f32",
            *(["offsets.i64"] if header["ragged"] else []),
            *(["keys.u64"] if header["keyed"] else []),
        ]
        digests = {name: hashlib.sha256(checksums_of(folder / name).read_bytes()).hexdigest() for name in names}
        write_json(folder / HEADER, header | {"sha256": digests})
        (folder / _STARTED).unlink()


def _fill(
    path: Path,
    descriptor: int,
    offsets: NDArray[np.int64],
    losses_of: Callable[[Batch], Tensor],
    batches: Iterable[tuple[ArrayLike, Batch]],
) -> None:
    values = np.memmap(path, "<f4", "r") if offsets[-1] else np.empty(0, "<f4")
    for index, batch in batches:
        numbers = as_index(index, "index").cpu().numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(offsets) - 1:
            raise ValueError(
                f"index must lie in [0, rows = {len(offsets) - 1}), got {numbers.min()} to {numbers.max()}"
            )
        runs = [(offsets[run[0]], offsets[run[-1] + 1]) for run in _runs(numbers)]
        if not any(np.isnan(values[start:stop]).any() for start, stop in runs):
            continue
        with torch.no_grad():
            losses = _checked(losses_of(batch), numbers, offsets)
        parts = np.split(losses, np.cumsum([stop - start for start, stop in runs])[:-1])
        for (start, _), part in zip(runs, parts, strict=True):
            write(descriptor, path, part, int(start))
    for start in range(0, len(values), _CHUNK):
        absent = np.isnan(values[start : start + _CHUNK])
        if absent.any():
            row = int(np.searchsorted(offsets, start + int(absent.argmax()), side="right")) - 1
            raise ValueError(
                f"batches must hold every sample of the {len(offsets) - 1} rows, but sample {row} was in none: "
                "what is computed is kept, run it again with all of them"
            )


def _runs(numbers: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Split numbers where the next is not the following one."""
    return np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1) if len(numbers) else []


def _checked(losses: object, numbers: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the losses of a batch if they fit its samples and are finite."""
    if not isinstance(losses, Tensor) or losses.ndim != 1 or not losses.is_floating_point():
        what = f"{list(losses.shape)} and {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"losses_of must return floating losses [b], of sequences one after another, got {what}")
    lengths = offsets[numbers + 1] - offsets[numbers]
    if len(losses) != lengths.sum():
        raise ValueError(
            f"losses_of must return {lengths.sum()} losses for the {len(numbers)} samples from number {numbers[0]} on, "
            f"got {len(losses)}"
        )
    found = losses.float().cpu().numpy().astype("<f4")
    if not (finite := np.isfinite(found)).all():
        row = numbers[np.searchsorted(np.cumsum(lengths), (~finite).argmax(), side="right")]
        raise ValueError(
            f"reference losses must be finite, got {found[~finite][0]} for sample {row}: leave it out of the data, or "
            "compute in float32"
        )
    return found


def _offsets(rows: int | Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    lengths = np.ones(max(rows, 0), np.int64) if isinstance(rows, int) else np.asarray(rows)
    if lengths.ndim != 1 or len(lengths) == 0 or lengths.dtype.kind not in "iu" or lengths.min() < 0:
        raise ValueError(f"rows must be a number of samples >= 1, or the lengths of as many sequences, got {rows!r}")
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _start(
    folder: Path, header: Mapping[str, Any], offsets: NDArray[np.int64], keys: NDArray[np.uint64] | None
) -> None:
    """Reserve the files; `_STARTED` is written when all losses are NaN."""
    path = folder / "losses.f32"
    reserve(path, header["values"], 4)
    if header["ragged"]:
        write_file(folder / "offsets.i64", offsets.astype("<i8"))
    if keys is not None:
        write_file(folder / "keys.u64", _checked_keys(keys, header["rows"]).T.astype("<u8"))
    descriptor = os.open(path, os.O_RDWR)
    try:
        for start in range(0, header["values"], _CHUNK):
            write(descriptor, path, np.full(min(_CHUNK, header["values"] - start), np.nan, "<f4"), start)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    write_json(folder / _STARTED, header)


def _checked_keys(keys: NDArray[np.uint64], rows: int) -> NDArray[np.uint64]:
    if keys.shape != (rows, 2) or keys.dtype != np.uint64:
        raise ValueError(f"keys must be uint64 [{rows}, 2], got {keys.dtype} {list(keys.shape)}")
    later, earlier = keys[1:], keys[:-1]
    rising = (later[:, 0] > earlier[:, 0]) | ((later[:, 0] == earlier[:, 0]) & (later[:, 1] > earlier[:, 1]))
    if not rising.all():
        raise ValueError(
            f"keys must ascend, but key {int((~rising).argmax()) + 1} does not: sort them, without repeats"
        )
    return keys


def _refuse_other_start(folder: Path, header: Mapping[str, Any]) -> None:
    started = json.loads((folder / _STARTED).read_bytes())
    refuse_other(folder, started["about"], header["about"])
    refuse_other(folder, started, header)


def refuse_other(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` with the first key of ``here`` that ``there`` has not, or has with another value."""
    for key, value in as_json(here).items():
        if key not in there or there[key] != value:
            raise ValueError(
                f"{folder} holds losses about something else: {key!r} is {there.get(key)!r} there and {value!r} here; "
                "choose another folder, or delete this one"
            )


def as_json(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON makes of a mapping."""
    try:
        return json.loads(json.dumps(dict(about), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"about must be JSON, got {about!r}: {error}") from error
