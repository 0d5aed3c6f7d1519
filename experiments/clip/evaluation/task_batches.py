"""The samples of a task, read and decoded in batches, without trusting their contents."""

from __future__ import annotations

import io
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.reader import MAX_CAPTION_CHARACTERS, decode_image
from ..errors import UserError
from .shards import RawSample, Shard
from .task_files import AGAIN, CLASSES_FILE, Task

_MAX_CAPTIONS = 1000  # of one image


class Association(NamedTuple):
    """A cue, and which of a sample's images go with it."""

    cue: str
    is_right: np.ndarray  # [candidates], bool


class DecodedBatch(NamedTuple):
    """Consecutive samples, the task's rows ``first`` on.

    A label is a class, 0 or 1 per class, captions, an `Association`, or None where a task has only ``numbers``.
    """

    first: int
    images: Tensor  # [b, 3, h, w]; of associations all candidates
    labels: list[Any]
    numbers: np.ndarray | None  # [b, columns]


class TaskBatches:
    """Decodes the batches of a task by number."""

    def __init__(self, task: Task, batch_size: int, preprocess: Callable[[Image.Image], Tensor]) -> None:
        self._task, self._batch_size, self._preprocess = task, batch_size, preprocess
        self._starts = [0, *itertools.accumulate(map(len, task.shards))]

    def __len__(self) -> int:
        return -(-self._task.samples // self._batch_size)

    def end(self, number: int) -> int:
        """Return how many samples there are up to the end of a batch."""
        return min((number + 1) * self._batch_size, self._task.samples)

    def __call__(self, number: int) -> DecodedBatch:
        """Decode a batch; `UserError` is raised that names the part of it that cannot be used."""
        first = number * self._batch_size
        images: list[Tensor] = []
        labels: list[Any] = []
        numbers: list[np.ndarray] = []
        for shard, rows in self._parts(first, self.end(number)):
            raw = shard.read(rows)
            for row in rows:
                part = 0
                try:
                    sample = next(raw)
                    labels.append(_label(self._task, sample))
                    if (own := _numbers(self._task, sample)) is not None:
                        numbers.append(own)
                    part = int(sample.metadata is not None)
                    for data in sample.images:
                        part += 1
                        images.append(self._preprocess(decode_image(data)))
                # Pillow does not document what its decoders raise on damaged files.
                except Exception as error:
                    raise UserError(f"{shard.name(row, part)} is of no use ({_reason(error)}): {AGAIN}") from error
        return DecodedBatch(first, torch.stack(images), labels, np.stack(numbers) if numbers else None)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Shard, range]]:
        """Yield the shards of some samples, and the samples' rows in them."""
        while start < stop:
            number = bisect_right(self._starts, start) - 1
            end = min(stop, self._starts[number + 1])
            yield self._task.shards[number], range(start - self._starts[number], end - self._starts[number])
            start = end


def _label(task: Task, sample: RawSample) -> Any:
    if isinstance(sample.label, int):
        return sample.label
    return {
        "classification": _class,
        "multilabel": _targets,
        "retrieval": _captions,
        "association": _association,
        "objectives": lambda task, sample, data: None,
    }[task.kind](task, sample, sample.label)


def _class(task: Task, sample: RawSample, data: bytes) -> int:
    text = data.decode("ascii").strip()
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= len(task.classes):
        raise ValueError(f"class {text[:20]!r}; {CLASSES_FILE} has lines for 0 to {len(task.classes) - 1}")
    return int(text)


def _targets(task: Task, sample: RawSample, data: bytes) -> np.ndarray:
    label = _array(data)
    if label.shape != (len(task.classes),) or not np.isin(label, (0, 1)).all():
        stated = f"{CLASSES_FILE} has {len(task.classes)} lines"
        raise ValueError(f"not 0 or 1 for each class, but an array of shape {label.shape}; {stated}")
    return label.astype(np.uint8)


def _captions(task: Task, sample: RawSample, data: bytes) -> list[str]:
    captions = data.decode("utf-8").splitlines()
    if not 1 <= len(captions) <= _MAX_CAPTIONS:
        raise ValueError(f"{len(captions)} captions, not 1 to {_MAX_CAPTIONS}" if captions else "no caption")
    _check_length(max(captions, key=len))
    return captions


def _association(task: Task, sample: RawSample, data: bytes) -> Association:
    stored = json.loads(data)
    cue, candidates, associations = (stored[name] for name in ("cue", "candidates", "associations"))
    if not isinstance(cue, str) or not cue:
        raise ValueError("the cue is no word")
    if not (isinstance(candidates, list) and isinstance(associations, list)):
        raise ValueError("candidates and associations are no lists")
    if len(candidates) != len(sample.images):
        raise ValueError(f"{len(candidates)} candidates, but {len(sample.images)} images")
    is_right = np.array([name in associations for name in candidates])
    if not is_right.any():
        raise ValueError("none of the candidates is associated with the cue")
    _check_length(cue)
    return Association(cue, is_right)


def _check_length(text: str) -> None:
    if len(text) > MAX_CAPTION_CHARACTERS:
        raise ValueError(f"a text of {len(text)} characters, more than {MAX_CAPTION_CHARACTERS}")


def _numbers(task: Task, sample: RawSample) -> np.ndarray | None:
    """Return the numbers about a sample that the task's metrics use."""
    data = sample.label if task.kind == "objectives" else sample.metadata
    if task.entry is None or not isinstance(data, bytes):
        return None
    numbers, used = _array(data), task.entry.columns
    if numbers.ndim != 1 or len(numbers) < used or numbers.dtype.kind not in "iuf":
        raise ValueError(f"not a row of {used} numbers or more, but an array of shape {numbers.shape}")
    if not (np.isfinite(numbers[:used]).all() and (numbers[:used] == np.rint(numbers[:used])).all()):
        raise ValueError("numbers that are not whole")
    return numbers[:used].astype(np.int64)


def _array(data: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
