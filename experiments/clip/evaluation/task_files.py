"""A zero-shot task's folder in CLIP_benchmark's layout: opened, checked, and decoded in batches.

``clip_benchmark eval --dataset wds/NAME --dataset_root FOLDER --no_amp`` reads the same folder, with
``--task zeroshot_retrieval`` for captions, and no more ``--num_workers`` than there are shards::

    dataset_type.txt                         retrieval or multilabel; absent for classification
    classnames.txt                           one class per line (not for retrieval)
    zeroshot_classification_templates.txt    one prompt per line, with {c} where the class goes (not for retrieval)
    test/nshards.txt                         how many shards there are
    test/0.tar ...                           an image, and .cls (classification), .npy (multilabel) or .txt (captions)

Nothing is downloaded and no pickle is read.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.clip.data.reader import MAX_PIXELS
from experiments.clip.errors import UserError
from experiments.clip.io.tar import Damaged, tar_members

Kind = Literal["classification", "multilabel", "retrieval"]

# In the order in which CLIP_benchmark looks for them.
_IMAGES = ("webp", "png", "jpg", "jpeg")
LABELS: dict[Kind, str] = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
TYPE_FILE, CLASSES_FILE, TEMPLATES_FILE = "dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt"
_MAX_IMAGE, _MAX_LABEL = 2**28, 2**20  # bytes
# As webdataset splits a member's name: the type is what follows the first dot of the last part.
_MEMBER = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")
_AGAIN = "copy the task again"


class BatchSpans(NamedTuple):
    """Where the samples of one batch are: consecutive samples of one shard, rows ``first`` on of the task."""

    path: Path
    spans: np.ndarray  # [count, 4]: offset and size of the image, then of the label
    first: int


@dataclass(frozen=True)
class Task:
    """An opened task: its classes and templates (none for retrieval), and the place of every batch of samples."""

    folder: Path
    kind: Kind
    classes: list[str]
    templates: list[str]
    batches: list[BatchSpans]
    samples: int


def open_task(folder: Path, batch_size: int) -> Task:
    """Read a task's text files and the headers of its shards, and lay its samples out in batches.

    `UserError` is raised if a file is missing, damaged, or at odds with another.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: choose at least 1")
    if not folder.is_dir():
        raise UserError(f"there is no task {folder}: name a folder with {CLASSES_FILE} and test/nshards.txt")
    kind: Any = _text(folder / TYPE_FILE).strip().lower() if (folder / TYPE_FILE).exists() else "classification"
    if kind not in LABELS:
        raise UserError(f"{folder / TYPE_FILE} says {kind!r}: only {', '.join(LABELS)} are known")
    classes = _lines(folder / CLASSES_FILE) if kind != "retrieval" else []
    templates = _lines(folder / TEMPLATES_FILE) if kind != "retrieval" else []
    for template in templates:
        if "{c}" not in template or set("{}") & set(template.replace("{c}", "")):
            raise UserError(
                f"{folder / TEMPLATES_FILE} has the line {template!r}: mark the class by {{c}}, use no other brace"
            )
    batches: list[BatchSpans] = []
    samples = 0
    for path in _shard_paths(folder / "test"):
        spans = _spans(path, LABELS[kind])
        for start in range(0, len(spans), batch_size):
            batches.append(BatchSpans(path, spans[start : start + batch_size], samples + start))
        samples += len(spans)
    if not samples:
        raise UserError(f"the shards of {folder} hold no sample: {_AGAIN}")
    return Task(folder, kind, classes, templates, batches, samples)


def _shard_paths(folder: Path) -> list[Path]:
    counted = _text(folder / "nshards.txt").strip()
    if not re.fullmatch("[1-9][0-9]{0,6}", counted):
        raise UserError(f"{folder / 'nshards.txt'} says {counted[:40]!r}: write how many shards there are")
    paths = [folder / f"{number}.tar" for number in range(int(counted))]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing, one of the {counted} shards that nshards.txt counts: {_AGAIN}")
    present = {path for path in folder.glob("*.tar") if path.stem.isdecimal()}
    if more := present - set(paths):
        raise UserError(f"{min(more)} is not among the {counted} shards that nshards.txt counts: correct the number")
    return paths


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {_AGAIN}, or write it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text ({error}): {_AGAIN}") from error


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _text(path).splitlines()]
    if not all(lines) or not lines:
        line = f"line {lines.index('') + 1} of {path}" if lines else f"{path}"
        raise UserError(f"{line} is empty: {_AGAIN}, or delete the line")
    return lines


def _spans(path: Path, label: str) -> np.ndarray:  # [samples, 4]
    """Return where each sample's image and label are; the members of a sample must be adjacent."""
    rows: list[tuple[int, ...]] = []
    try:
        with path.open("rb") as file:
            for key, members in itertools.groupby(_members(file, path), lambda member: member[0]):
                parts: dict[str, tuple[int, int]] = {}
                for _, suffix, offset, size in members:
                    if suffix in parts:
                        raise UserError(f"the sample {key} of {path} has two members .{suffix}: {_AGAIN}")
                    parts[suffix] = (offset, size)
                image = next((parts[suffix] for suffix in _IMAGES if suffix in parts), None)
                if image is None or label not in parts:
                    lacks = f".{label}" if image else ", ".join(f".{suffix}" for suffix in _IMAGES)
                    raise UserError(f"the sample {key} of {path} has no member {lacks}: {_AGAIN}")
                for (_, size), limit in ((image, _MAX_IMAGE), (parts[label], _MAX_LABEL)):
                    if size > limit:
                        raise UserError(f"the sample {key} of {path} has a member of {size} bytes: keep it <= {limit}")
                rows.append((*image, *parts[label]))
    except (OSError, Damaged) as error:
        raise UserError(f"{path} is damaged ({error}): {_AGAIN}") from error
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _members(file: BinaryIO, path: Path) -> Iterator[tuple[str, str, int, int]]:
    for member in tar_members(file, path.stat().st_size):
        match = _MEMBER.fullmatch(member.name)
        is_meta = "/" not in member.name and member.name.startswith("__") and member.name.endswith("__")
        if member.kind == "file" and match and not is_meta:
            yield match[1], match[2].lower(), member.offset, member.size


class DecodedBatch(NamedTuple):
    """Preprocessed images, and what the kind of task has as a label: a class, 0 or 1 per class, or captions."""

    images: Tensor  # [b, 3, h, w]
    labels: list[Any]


class BatchDecoder:
    """Reads and decodes the batch of a number, in this process or in a worker."""

    def __init__(self, task: Task, preprocess: Callable[[Image.Image], Tensor]) -> None:
        self._task, self._preprocess = task, preprocess

    def __call__(self, number: int) -> DecodedBatch:
        """Return the batch.

        Raises
        ------
        UserError
            If a file of it is missing or damaged.
        """
        path, spans, _ = self._task.batches[number]
        images: list[Tensor] = []
        labels: list[Any] = []
        offset = 0
        try:
            with path.open("rb") as file:
                for image, image_size, offset, size in spans.tolist():
                    labels.append(self._label(_bytes(file, offset, size)))
                    offset = image
                    images.append(self._preprocess(_image(_bytes(file, image, image_size))))
            return DecodedBatch(torch.stack(images), labels)
        # Pillow does not document what its decoders raise on damaged files.
        except Exception as error:
            raise UserError(f"{_name(path, offset)} in {path} is of no use ({_reason(error)}): {_AGAIN}") from error

    def _label(self, data: bytes) -> Any:
        task = self._task
        if task.kind == "retrieval":
            captions = data.decode("utf-8").splitlines()
            if not captions:
                raise ValueError("no caption")
            return captions
        if task.kind == "multilabel":
            label = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
            if label.shape != (len(task.classes),) or not np.isin(label, (0, 1)).all():
                stated = f"{CLASSES_FILE} has {len(task.classes)} lines"
                raise ValueError(f"not 0 or 1 for each class, but an array of shape {label.shape}; {stated}")
            return torch.from_numpy(label.astype(np.uint8))
        text = data.decode("ascii").strip()
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= len(task.classes):
            raise ValueError(f"class {text[:20]!r}; {CLASSES_FILE} has lines for 0 to {len(task.classes) - 1}")
        return int(text)


def _bytes(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    if len(data := file.read(size)) < size:
        raise ValueError("the file became shorter")
    return data


def _image(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS}")
        return image.convert("RGB")


def _name(path: Path, offset: int) -> str:
    """Return the name of the member whose content is at ``offset``."""
    try:
        with path.open("rb") as file:
            members = tar_members(file, path.stat().st_size)
            return next((member.name for member in members if member.offset == offset), "a member")
    except (OSError, Damaged):
        return "a member"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
