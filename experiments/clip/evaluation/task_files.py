"""A zero-shot task's folder, opened and checked: CLIP_benchmark's layout, or a folder of images for each class.

``clip_benchmark eval --dataset wds/NAME --dataset_root FOLDER --no_amp`` reads the first of them too, with
``--task zeroshot_retrieval`` for captions, and no more ``--num_workers`` than there are shards::

    dataset_type.txt                         retrieval, multilabel or association; absent for classification
    classnames.txt                           one class per line (not for retrieval and association)
    zeroshot_classification_templates.txt    one prompt per line, with {c} where the class goes (as classnames.txt)
    test/nshards.txt                         how many shards there are
    test/0.tar ...                           an image, and .cls (classification), .npy (multilabel) or .txt (captions)

A sample of an association (WinoGAViL) has a ``.json`` with a cue, the names of the candidates and of those that are
associated with the cue, and an image for each candidate, ``.0.jpg`` and so on. Some of DataComp's tasks have numbers
about each sample in an ``.npy``.

Nothing is downloaded and no pickle is read.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from ..data.reader import MAX_IMAGE_BYTES
from ..errors import UserError, printable
from ..io.tar import Damaged, tar_members
from .datacomp import Entry, entry_of
from .shards import Shard, TarShard

Kind = Literal["classification", "multilabel", "retrieval", "association", "objectives"]

# In the order in which CLIP_benchmark looks for them.
IMAGES = ("webp", "png", "jpg", "jpeg")
LABELS: dict[str, str] = {"classification": "cls", "multilabel": "npy", "retrieval": "txt", "association": "json"}
TYPE_FILE, CLASSES_FILE, TEMPLATES_FILE = "dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt"
#: What `run.py glyph-tasks` writes beside its tasks.
MARKER = "tasks.json"
METADATA = "npy"
_MAX_LABEL, _MAX_TEXT = 2**20, 2**24  # bytes
# Characters of a class or a prompt: the tokenizer takes time quadratic in the length of a word, for each prompt.
_MAX_LINE = 1024
# As webdataset splits a member's name: the type is what follows the first dot of the last part.
_MEMBER = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")
_CANDIDATE = re.compile(rf"([0-9]{{1,4}})\.({'|'.join(IMAGES)})")
MAX_CANDIDATES = 32  # of an association
AGAIN = "copy the task again"
# Folders that are a part of a data set, and named so, in the layout of a folder for each class.
_PARTS = ("val", "validation", "test")


@dataclass(frozen=True)
class Task:
    """An opened task.

    Attributes
    ----------
    name : str
        The folder's name, fit for a terminal.
    classes, templates : list of str
        None for retrieval and association.
    shards : list
        Where the samples are, in order.
    entry : Entry, optional
        What DataComp says of the task, if it is one of its own and the samples have what its metrics need.
    fingerprint : str
        A digest of the text files and of the samples' places.
    """

    name: str
    folder: Path
    kind: Kind
    classes: list[str]
    templates: list[str]
    shards: Sequence[Shard]
    entry: Entry | None
    fingerprint: str

    @property
    def samples(self) -> int:
        """The number of samples of all shards."""
        return sum(map(len, self.shards))


def open_task(folder: Path) -> Task:
    """Read a task's text files and the headers of its shards.

    `UserError` is raised if a file is missing, damaged, or at odds with another.
    """
    kind: Any = read_text(folder / TYPE_FILE).strip().lower() if (folder / TYPE_FILE).exists() else "classification"
    if kind not in LABELS:
        raise UserError(f"{folder / TYPE_FILE} says {kind[:40]!r}: only {', '.join(LABELS)} are known")
    paths = _shard_paths(folder / "test")
    entry = entry_of(folder)
    if entry is not None and entry.columns and not (kind == "classification" and _has_metadata(paths)):
        entry = None  # other data of that name
    if entry is not None and entry.objectives:
        kind = "objectives"
    has_classes = kind not in ("retrieval", "association")
    classes = class_names(folder / CLASSES_FILE) if has_classes else []
    templates = prompt_templates(folder / TEMPLATES_FILE) if has_classes else []
    label = METADATA if kind == "objectives" else LABELS[kind]
    more = [METADATA] if entry is not None and entry.groups else []
    shards = [_open_shard(path, label, more) for path in paths]
    if not any(map(len, shards)):
        raise UserError(f"the shards of {folder} hold no sample: {AGAIN}")
    return opened(folder, kind, classes, templates, shards, entry)


def opened(
    folder: Path,
    kind: Kind,
    classes: list[str],
    templates: list[str],
    shards: Sequence[Shard],
    entry: Entry | None,
) -> Task:
    """Return a task with its fingerprint."""
    digest = hashlib.sha256(repr((kind, classes, templates)).encode("utf-8", "surrogateescape"))
    for shard in shards:
        digest.update(shard.digest())
    own = folder.absolute()
    name = f"{own.parent.name}-{own.name}" if own.name in _PARTS else own.name
    return Task(printable(name), folder, kind, classes, templates, shards, entry, digest.hexdigest())


# --- text files -------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Return the content of a text file of bounded size."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_TEXT + 1)
        if len(data) > _MAX_TEXT:
            raise UserError(f"{path} has more than {_MAX_TEXT} bytes: {AGAIN}, or correct it")
        return data.decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {AGAIN}, or write it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text ({error}): {AGAIN}") from error


def class_names(path: Path) -> list[str]:
    """Return the names of a file's lines; an empty line is a class with an empty name."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    if not any(lines):
        raise UserError(f"{path} is empty: {AGAIN}")
    _check_lengths(path, lines)
    return lines


def prompt_templates(path: Path) -> list[str]:
    """Return the templates of a file's lines, in which ``{c}`` marks the class."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    if not lines:
        raise UserError(f"{path} is empty: {AGAIN}")
    _check_lengths(path, lines)
    for template in lines:
        if "{c}" not in template or set("{}") & set(template.replace("{c}", "")):
            raise UserError(f"{path} has the line {template!r}: mark the class by {{c}}, use no other brace")
    return lines


def _check_lengths(path: Path, lines: Sequence[str]) -> None:
    for number, line in enumerate(lines, 1):
        if len(line) > _MAX_LINE:
            raise UserError(
                f"line {number} of {path} has {len(line)} characters: keep them <= {_MAX_LINE}, more than any model "
                "reads"
            )


# --- shards -----------------------------------------------------------------------------------------------------


def _shard_paths(folder: Path) -> list[Path]:
    counted = read_text(folder / "nshards.txt").strip()
    if not re.fullmatch("[1-9][0-9]{0,6}", counted):
        raise UserError(f"{folder / 'nshards.txt'} says {counted[:40]!r}: write how many shards there are")
    paths: list[Path] = []
    for number in range(int(counted)):  # the first that is missing ends it, however many are counted
        paths.append(folder / f"{number}.tar")
        if not paths[-1].is_file():
            raise UserError(f"{paths[-1]} is missing, one of the {counted} shards that nshards.txt counts: {AGAIN}")
    present = {path for path in folder.glob("*.tar") if path.stem.isdecimal()}
    if more := present - set(paths):
        raise UserError(f"{min(more)} is not among the {counted} shards that nshards.txt counts: correct the number")
    return paths


Parts = dict[str, tuple[int, int]]  # offset and size of a sample's members, by their types


def _open_shard(path: Path, label: str, more: Sequence[str]) -> TarShard:
    """Return where the parts of each sample are: the label, what else is wanted, the images."""
    starts, parts = [0], []
    for key, found in _samples(path):
        images = _candidates(found) if label == LABELS["association"] else _image(found)
        wanted = [label, *more]
        for suffix in wanted:
            if suffix not in found:
                raise _lacking(key, path, f".{suffix}")
        if not images:
            raise _lacking(key, path, ", ".join(f".{suffix}" for suffix in IMAGES))
        for sizes, limit in ((images, MAX_IMAGE_BYTES), ([found[suffix] for suffix in wanted], _MAX_LABEL)):
            if (size := max(size for _, size in sizes)) > limit:
                raise UserError(f"the sample {key} of {path} has a member of {size} bytes: keep it <= {limit}")
        parts += [*(found[suffix] for suffix in wanted), *images]
        starts.append(len(parts))
    return TarShard(path, np.array(parts, np.int64).reshape(-1, 2), np.array(starts), len(more))


def _lacking(key: str, path: Path, what: str) -> UserError:
    return UserError(f"the sample {key} of {path} has no member {what}: {AGAIN}")


def _image(found: Parts) -> list[tuple[int, int]]:
    return [found[suffix] for suffix in IMAGES if suffix in found][:1]


def _candidates(found: Parts) -> list[tuple[int, int]]:
    """Return the images of an association's candidates, in the order of their numbers."""
    numbered = {int(match[1]): place for suffix, place in found.items() if (match := _CANDIDATE.fullmatch(suffix))}
    return [numbered[number] for number in sorted(numbered)][:MAX_CANDIDATES]


def _has_metadata(paths: Sequence[Path]) -> bool:
    """Whether the first sample of a task has numbers about it."""
    return any(METADATA in found for path in paths[:1] for _, found in itertools.islice(_samples(path), 1))


def _samples(path: Path) -> Iterator[tuple[str, Parts]]:
    """Yield the key and the members of each sample, which must be adjacent."""
    try:
        with path.open("rb") as file:
            for key, members in itertools.groupby(_members(file, path), lambda member: member[0]):
                parts: Parts = {}
                for _, suffix, offset, size in members:
                    if suffix in parts:
                        raise UserError(f"the sample {key} of {path} has two members .{suffix}: {AGAIN}")
                    parts[suffix] = (offset, size)
                yield key, parts
    except (OSError, Damaged) as error:
        raise UserError(f"{path} is damaged ({error}): {AGAIN}") from error


def _members(file: BinaryIO, path: Path) -> Iterator[tuple[str, str, int, int]]:
    for member in tar_members(file, path.stat().st_size):
        match = _MEMBER.fullmatch(member.name)
        is_meta = "/" not in member.name and member.name.startswith("__") and member.name.endswith("__")
        if member.kind == "file" and match and not is_meta:
            yield match[1], match[2].lower(), member.offset, member.size
