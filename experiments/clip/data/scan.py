"""Scanning a tar file or a table: what samples it holds, and where their members are.

A sample is webdataset's: consecutive members of a tar file whose names agree up to the first dot after the last slash;
what follows the dot, in lower case, is the member's type. A type that comes a second time begins a new sample. Only
headers are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from webdataset.tariterators import base_plus_ext

from experiments.clip.data.sources import Source, Table, table_rows
from experiments.clip.errors import UserError
from experiments.clip.io.files import write_atomically
from experiments.clip.io.storage import is_remote, open_seekable, retry
from experiments.clip.io.tar import BLOCK, Damaged, Member, tar_members

FORMAT = 1
# Samples in a shard of a table or of made-up pairs.
CHUNK = 10_000

_INDEX = "index"
_JSON_FIELD = "json:"
_ABSENT = (0, -1)
_MAX_NAME = 4096

_META = re.compile(r"__[^/]*__($|/)")
_HOSTILE = re.compile(r"[\x00-\x1f\x7f]|^/|(^|[/\\])\.\.([/\\]|$)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}

LeftOut = Literal[
    "no image",
    "no caption",
    "link or device",  # in the place of an image or a caption
    "hostile name",  # absolute, climbing with .., with control characters, or of more than 4,096 bytes
    "name without a type",  # a member, not a sample
    "reserved name",  # like __this__, or in such a folder: webdataset keeps them for itself
    "damaged shard",  # a shard whose end could not be read; ``Shard.damage`` says where
]


@dataclass(frozen=True)
class Shard:
    """Samples ``first_index`` to ``first_index + samples``.

    Attributes
    ----------
    kind : "tar", "table" or "synthetic"
        What holds them: the tar file ``path``; a file of image paths and captions taken from a table; nothing.
    path : str
        An absolute path or a URL; of a table, within the catalog's folder.
    index : str
        The npy file of offsets, within the catalog's folder.
    heads : str
        Digest of the headers of first and last sample in a local tar file.
    left_out : dict
        How much was left out, by reason.
    damage : str
        Where and how the shard is damaged, if it is.
    root : str
        Where relative image paths of a table start.
    pixels : int
        Width and height of made-up images.
    """

    kind: str
    path: str
    bytes: int
    samples: int
    index: str = ""
    index_bytes: int = 0
    index_sha256: str = ""
    heads: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    damage: str = ""
    root: str = ""
    pixels: int = 0
    source: int = 0
    first_index: int = 0


@dataclass(frozen=True)
class Job:
    """What one worker does at a time: a tar file, or a whole table. ``stamp`` is its size and time of change."""

    source: Source
    path: str
    stamp: tuple[int, int]
    folder: Path
    image_keys: tuple[str, ...]
    caption_keys: tuple[str, ...]

    @property
    def name(self) -> str:
        """Digest of all that the result depends on."""
        what = dataclasses.asdict(self.source) if isinstance(self.source, Table) else self.path
        return digest_of(canonical([FORMAT, what, self.stamp, self.image_keys, self.caption_keys]))[:24]


def scan(job: Job) -> list[dict[str, Any]]:
    """Scan a tar file or table, write index files into the catalog's folder, return the fields of the `Shard` s."""
    if isinstance(job.source, Table):
        shards = _scan_table(job, job.source)
    else:
        shards = [retry(lambda: _scan_tar(job), job.path)]
    return [dataclasses.asdict(shard) for shard in shards]


def _scan_tar(job: Job) -> Shard:
    size = job.stamp[0]
    left_out: Counter[str] = Counter()
    damage = ""
    rows: list[_Row] = []
    with open_seekable(job.path) as file:
        start = file.read(8)
        for magic, method in _COMPRESSED.items():
            if start.startswith(magic):
                raise UserError(
                    f"{job.path} is compressed ({method}): samples are read from their places, so unpack it"
                )
        grouping = _Grouping(job.image_keys, [_member_type(key) for key in job.caption_keys], left_out)
        try:
            for member in tar_members(file, size):
                rows += grouping.add(member)
        except Damaged as problem:
            left_out["damaged shard"] += 1
            damage = f"{problem}, of {size}"
        rows += grouping.end()
        heads = heads_digest(file, [rows[0][0][0], rows[-1][0][0]]) if rows and not is_remote(job.path) else ""
    index = _write_index(job.folder, job.name, rows, len(job.caption_keys))
    return Shard("tar", job.path, size, len(rows), **index, heads=heads, left_out=dict(left_out), damage=damage)


# Places of the image and of the captions, and the key.
_Row = tuple[tuple[int, int], list[tuple[int, int]], bytes]


class _Grouping:
    """Turns members into samples."""

    def __init__(self, image_types: Sequence[str], caption_types: Sequence[str], left_out: Counter[str]) -> None:
        self._image_types, self._caption_types, self._left_out = image_types, caption_types, left_out
        self._key: str | None = None
        self._found: dict[str, Member] = {}

    def add(self, member: Member) -> list[_Row]:
        """Take the next member; return the sample that it ends, if it does and the sample is whole."""
        if member.kind == "folder":
            return []
        if _META.match(member.name):
            self._left_out["reserved name"] += 1
            return []
        key, suffix = base_plus_ext(member.name)
        if key is None or suffix is None:
            self._left_out["hostile name" if _is_hostile(member.name) else "name without a type"] += 1
            return []
        suffix = suffix.lower()
        ended = self.end() if key != self._key or suffix in self._found else []
        self._key = key
        self._found[suffix] = member
        return ended

    def end(self) -> list[_Row]:
        """Return the last sample, if it is whole."""
        found, key = self._found, self._key
        self._found, self._key = {}, None
        if key is None:
            return []
        image = next((found[kind] for kind in self._image_types if kind in found), None)
        captions = [found.get(kind) for kind in self._caption_types]
        given = [image, *(caption for caption in captions if caption is not None)]
        if any(_is_hostile(member.name) for member in found.values()):
            self._left_out["hostile name"] += 1
        elif image is None:
            self._left_out["no image"] += 1
        elif len(given) == 1:
            self._left_out["no caption"] += 1
        elif any(member is not None and member.kind == "other" for member in given):
            self._left_out["link or device"] += 1
        else:
            places = [(caption.offset, caption.size) if caption is not None else _ABSENT for caption in captions]
            return [((image.offset, image.size), places, key.encode("utf-8", "surrogateescape"))]
        return []


def _is_hostile(name: str) -> bool:
    return _HOSTILE.search(name) is not None or len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME


def _member_type(caption_key: str) -> str:
    return "json" if caption_key.startswith(_JSON_FIELD) else caption_key


def json_field(caption_key: str) -> str | None:
    """Return the field of the JSON member that a caption key names; None if the member itself is the caption."""
    return caption_key.removeprefix(_JSON_FIELD) if caption_key.startswith(_JSON_FIELD) else None


def _scan_table(job: Job, table: Table) -> list[Shard]:
    """Copy image paths and captions into files of `CHUNK` rows, so that any row is found at once."""
    left_out: Counter[str] = Counter()
    shards: list[Shard] = []
    rows = _whole_rows(table, left_out)
    while (chunk := list(islice(rows, CHUNK))) or left_out:
        name = f"{job.name}-{len(shards):06d}"
        data = io.BytesIO()
        places: list[_Row] = []
        for key, image, captions in chunk:
            image_place = (data.tell(), data.write(image))
            caption_places = [(data.tell(), data.write(text)) if text is not None else _ABSENT for text in captions]
            places.append((image_place, caption_places, key))
        path = f"{_INDEX}/{name}.rows"
        write_atomically(job.folder / path, data.getvalue())
        shards.append(
            Shard(
                "table",
                path,
                len(data.getvalue()),
                len(chunk),
                **_write_index(job.folder, name, places, len(table.captions)),
                heads=digest_of(data.getvalue()),
                left_out=dict(left_out),
                root=table.root or os.path.dirname(job.path),
            )
        )
        left_out.clear()
    return shards


def _whole_rows(table: Table, left_out: Counter[str]) -> Iterator[tuple[bytes, bytes, list[bytes | None]]]:
    for number, (image, captions) in enumerate(table_rows(table)):
        encoded = [text.encode("utf-8", "surrogateescape") if text is not None else None for text in captions]
        if not image:
            left_out["no image"] += 1
        elif all(text is None for text in encoded):
            left_out["no caption"] += 1
        else:
            yield str(number).encode(), image.encode("utf-8", "surrogateescape"), encoded


def _write_index(folder: Path, name: str, rows: Sequence[_Row], captions: int) -> dict[str, Any]:
    width = max((len(key) for *_, key in rows), default=1)
    fields = [("image", "<i8", (2,)), ("caption", "<i8", (captions, 2)), ("key", f"S{width}")]
    data = io.BytesIO()
    np.save(data, np.array(rows, dtype=fields), allow_pickle=False)
    path = f"{_INDEX}/{name}.npy"
    write_atomically(folder / path, data.getvalue())
    return {"index": path, "index_bytes": len(data.getvalue()), "index_sha256": digest_of(data.getvalue())}


def heads_digest(file: BinaryIO, offsets: Iterable[int]) -> str:
    """Digest the headers before the contents at ``offsets``."""
    digest = hashlib.sha256()
    for offset in offsets:
        file.seek(offset - BLOCK)
        digest.update(file.read(BLOCK))
    return digest.hexdigest()


def canonical(value: Any) -> bytes:
    """Return JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest_of(data: bytes) -> str:
    """Return the SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
