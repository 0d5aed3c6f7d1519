"""The held-out glyph pairs as zero-shot tasks in CLIP_benchmark's folder layout."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from webdataset.writer import TarWriter

from ..cli.terminal import console
from ..errors import UserError
from ..evaluation.task_files import CLASSES_FILE, LABELS, TEMPLATES_FILE, TYPE_FILE, Kind
from ..io.files import sync, write_atomically
from .dataset import Manifest, read_samples
from .evaluation import glyph_attributes
from .options import GlyphTasks
from .source import prepare

_MARKER = "tasks.json"


class Row(NamedTuple):
    """A sample to be written: a PNG, and the number of its class, or its captions, one a line."""

    image: bytes
    label: str


class TaskText(NamedTuple):
    """A task to be written; ``templates`` mark the class by ``{c}``, and retrieval has neither classes nor them."""

    name: str
    kind: Kind
    classes: Sequence[str]
    templates: Sequence[str]
    rows: Sequence[Row]


def run_glyph_tasks(options: GlyphTasks) -> None:
    """Write the tasks of the held-out pairs and print their folders."""
    for folder in write_glyph_tasks(prepare(options.data), options.out):
        console.print(f"task       {folder}")


def write_glyph_tasks(manifest: Manifest, folder: Path, *, shard_size: int = 1000) -> list[Path]:
    """Write the test split of the glyph-name pairs as tasks, all of them or none, and return their folders.

    ``glyph-names`` classifies over the names of the whole data set; ``glyph-script`` and ``glyph-base-letter`` are the
    attribute tasks of `glyph_attributes`, where there are any. ``glyph-retrieval`` has the first image of each name
    with two captions, the name alone and with the face. Images drawn alike are left out: among equal items the score
    would depend on the order in which a sort leaves ties.

    Parameters
    ----------
    manifest
        The data set.
    folder
        Where the tasks go. Tasks of the same data that are there already are kept.
    shard_size
        Samples per shard.
    """
    marker = {"format": 1, "data": manifest.fingerprint, "shard_size": shard_size}
    return write_tasks(folder, marker, lambda: _glyph_tasks(manifest), shard_size=shard_size)


def write_tasks(
    folder: Path, marker: dict[str, Any], tasks: Callable[[], Iterable[TaskText]], *, shard_size: int = 1000
) -> list[Path]:
    """Write tasks into a folder, all of them or none, and return their folders.

    Parameters
    ----------
    folder
        Where the tasks go. Those of an equal ``marker`` that are there already are kept; others are refused.
    marker
        What the tasks were made from, in JSON's types.
    tasks
        Makes them, where they are not there.
    shard_size
        Samples per shard.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (written := _written(folder, marker)):
        return written
    scratch = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        for task in tasks():
            _write_task(scratch / task.name, task, shard_size)
        write_atomically(scratch / _MARKER, json.dumps(marker, indent=2).encode() + b"\n")
        for path in (*(path for path in scratch.rglob("*") if path.is_dir()), scratch):
            sync(path)
        os.rename(scratch, folder)
        sync(folder.parent)
    except OSError as error:
        raise UserError(f"cannot write the tasks {folder} ({error.strerror}): choose another folder") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _written(folder, marker)


def _written(folder: Path, marker: dict[str, Any]) -> list[Path]:
    """Return the tasks in a folder, none if it is empty; refuse a folder without this marker."""
    try:
        if not any(folder.iterdir()):
            return []
        stored = json.loads((folder / _MARKER).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no tasks with a readable {_MARKER}: choose another folder") from error
    if stored != marker:
        raise UserError(f"{folder} holds the tasks of other data ({stored}): delete it or choose another folder")
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _glyph_tasks(manifest: Manifest) -> Iterator[TaskText]:
    samples = list(read_samples(manifest, "test"))
    images = [png_of(sample.image) for sample in samples]
    names = [sample.meta["name"] for sample in samples]
    position = {name: number for number, name in enumerate(manifest.vocabulary)}
    rows = [Row(image, str(position[name])) for image, name in zip(images, names, strict=True)]
    yield TaskText("glyph-names", "classification", manifest.vocabulary, ("{c}",), rows)
    for task in glyph_attributes(names):
        templates = [template.replace("{}", "{c}") for template in task.templates]
        rows = [Row(images[i], str(label)) for i, label in zip(task.members, task.labels, strict=True)]
        name = f"glyph-{task.name.replace(' ', '-')}"
        yield TaskText(name, "classification", task.classes, templates, rows)
    seen: set[bytes | str] = set()
    rows = []
    for sample, image, name in zip(samples, images, names, strict=True):
        if not {image, name} & seen:
            seen |= {image, name}
            rows.append(Row(image, f"{name}\n{name} in {sample.meta['face']}"))
    yield TaskText("glyph-retrieval", "retrieval", (), (), rows)


def png_of(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _write_task(folder: Path, task: TaskText, shard_size: int) -> None:
    rows = task.rows
    starts = range(0, len(rows), shard_size)
    texts = {TYPE_FILE: [task.kind], "test/nshards.txt": [str(len(starts))]}
    if task.classes:
        texts |= {CLASSES_FILE: task.classes, TEMPLATES_FILE: task.templates}
    for name, lines in texts.items():
        write_atomically(folder / name, "".join(f"{line}\n" for line in lines).encode())
    for number, start in enumerate(starts):
        data = io.BytesIO()
        with TarWriter(data, mtime=0, encoder=False) as writer:
            for index, (image, label) in enumerate(rows[start : start + shard_size], start):
                writer.write({"__key__": f"s{index:07d}", "png": image, LABELS[task.kind]: label.encode()})
        write_atomically(folder / "test" / f"{number}.tar", data.getvalue())
