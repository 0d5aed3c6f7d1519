"""Scanning a tar file or a table: which samples it holds, and where their members are.

Samples are those of webdataset: consecutive members of a tar file whose names agree up to the first dot after the last
slash. What follows the dot, in lower case, is the member's type; a type that occurs again begins a new sample. Only
headers are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, repeat
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from webdataset.tariterators import base_plus_ext

from ..errors import UserError
from ..io.files import write_atomically
from ..io.storage import digest_once, is_remote, open_once, retry
from ..io.tar import BLOCK, Damaged, Member, tar_members
from .index import Row, index_bytes
from .sources import Caption, Source, Table, table_rows
from .subset import Subset, is_uid, map_uids, times_in, uid_in

FORMAT = 1
# Largest number of samples in a shard of a table or of made-up pairs.
CHUNK = 10_000

_INDEX = "index"
_JSON_FIELD = "json:"
#: The place of a caption that a sample lacks.
ABSENT = (0, -1)
# What a caption of a table begins with that is a list of captions in JSON, as in RFC 7464, and the field of that list.
_LISTED, _LIST = b"\x1e", "captions"
_MAX_NAME = 4096
# Largest member json that is searched for a uid.
_MAX_DESCRIPTION = 2**20

_URLS = ("http://", "https://")
_META = re.compile(r"__[^/]*__($|/)")
_METADATA = re.compile(r"(^|/)\._[^/]*$")
_HOSTILE = re.compile(r"[\x00-\x1f\x7f]|^/|(^|[/\\])\.\.([/\\]|$)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}

LeftOut = Literal[
    "no image",
    "no caption",
    "URL",  # in a table, in the place of an image's path
    "link or device",  # in the place of an image, or of all captions
    "no uid",  # by which it could be in the subset
    "not in the subset",
    "hostile name",  # absolute, climbing with .., with control characters, or of more than 4,096 bytes
    "name without a type",  # a member, not a sample
    "macOS metadata",  # a member ._name, which holds what macOS keeps of a file beside its contents
    "reserved name",  # like __this__, or in such a folder: webdataset keeps them for itself
    "damaged shard",  # a shard whose end could not be read; ``Shard.damage`` says where
]


@dataclass(frozen=True)
class Shard:
    """Samples ``first_index`` to ``first_index + samples``.

    Attributes
    ----------
    kind : "tar", "table" or "synthetic"
        Where the samples are: in the tar file ``path``; in a file of image paths and captions that was copied from a
        table; nowhere, because they are made up.
    path : str
        An absolute path or a URL; for a table, relative to the catalog's folder.
    index : str
        The npy file of offsets, relative to the catalog's folder.
    heads : str
        Digest of the headers of the first and the last sample in a local tar file.
    left_out : dict
        Number of samples and members that were left out, by reason.
    damage : str
        Where and how the shard is damaged; empty if it is intact.
    root : str
        The folder at which relative image paths of a table start.
    pixels : int
        Width and height of made-up images.
    version : str
        Of a tar file: what changes when it is written, its time of modification or what remote storage says.
    sha256 : str
        Of a tar file, where checksums were asked for.
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
    version: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class ScanJob:
    """The unit of work of a scan: a tar file or a table.

    ``stamp`` is its size and what changes when it is written; ``checksums``, whether the SHA-256 of tar files is kept.
    """

    source: Source
    path: str
    stamp: tuple[int, int | str]
    folder: Path
    image_keys: tuple[str, ...]
    caption_keys: tuple[str, ...]
    subset: Subset | None = None
    checksums: bool = False

    @property
    def name(self) -> str:
        """Digest of everything that the result depends on."""
        what = dataclasses.asdict(self.source) if isinstance(self.source, Table) else self.path
        also = [] if self.subset is None else [self.subset.checksum, self.subset.key]
        also += ["checksums"] if self.checksums else []
        return digest_of(canonical([FORMAT, what, self.stamp, self.image_keys, self.caption_keys, *also]))[:24]


def scan(job: ScanJob) -> list[Shard]:
    """Scan a tar file or a table, write its index files into the catalog's folder, and return its shards."""
    if isinstance(job.source, Table):
        return _scan_table(job, job.source)
    return [retry(lambda: _scan_tar(job), job.path)]


def _scan_tar(job: ScanJob) -> Shard:
    size = job.stamp[0]
    left_out: Counter[str] = Counter()
    damage = ""
    rows: list[Row] = []
    with open_once(job.path, size) as file:
        start = file.read(8)
        for magic, method in _COMPRESSED.items():
            if start.startswith(magic):
                raise UserError(
                    f"{job.path} is compressed ({method}), but samples are read by their offsets: decompress it"
                )
        times = _times_of_members(file, job.subset, left_out)
        grouping = _Grouping(job.image_keys, [_member_type(key) for key in job.caption_keys], times, left_out)
        try:
            for member in tar_members(file, size):
                rows += grouping.add(member)
        except Damaged as problem:
            left_out["damaged shard"] += 1
            damage = f"{problem}, of {size}"
        rows += grouping.end()
        heads = heads_digest(file, [rows[0][0][0], rows[-1][0][0]]) if rows and not is_remote(job.path) else ""
        sha256 = digest_once(file) if job.checksums else ""
    shard = Shard(
        "tar",
        job.path,
        size,
        len(rows),
        heads=heads,
        left_out=dict(left_out),
        damage=damage,
        version=str(job.stamp[1] or ""),
        sha256=sha256,
    )
    return _with_index(shard, job.folder, job.name, rows, len(job.caption_keys))


def _times_of_members(
    file: BinaryIO, subset: Subset | None, left_out: Counter[str]
) -> Callable[[Mapping[str, Member]], int]:
    """Return what says how many times the sample of some members is in the subset."""
    if subset is None:
        return lambda members: 1

    def times(members: Mapping[str, Member]) -> int:
        described = members.get("json")
        if described is None or described.kind == "other" or described.size > _MAX_DESCRIPTION:
            return _times(subset, None, left_out)
        file.seek(described.offset)
        return _times(subset, uid_in(file.read(described.size), subset.key), left_out)

    return times


def _times(subset: Subset, uid: str | None, left_out: Counter[str]) -> int:
    """Return how many times a uid is in the subset; count what is not."""
    times = 0 if uid is None else times_in(_mapped(subset.path), uid)
    if not times:
        left_out["no uid" if uid is None else "not in the subset"] += 1
    return times


@cache
def _mapped(path: str) -> np.ndarray:
    return map_uids(Path(path))


class _Grouping:
    """Groups consecutive members into samples; ``times`` says how many times the one of some members is wanted."""

    def __init__(
        self,
        image_types: Sequence[str],
        caption_types: Sequence[str],
        times: Callable[[Mapping[str, Member]], int],
        left_out: Counter[str],
    ) -> None:
        self._image_types, self._caption_types, self._left_out = image_types, caption_types, left_out
        self._times = times
        self._key: str | None = None
        self._found: dict[str, Member] = {}

    def add(self, member: Member) -> list[Row]:
        """Add the next member; return the sample before it if it ends there and is complete, in a list."""
        if member.kind == "folder":
            return []
        if _META.match(member.name):
            self._left_out["reserved name"] += 1
            return []
        if _METADATA.search(member.name):
            self._left_out["macOS metadata"] += 1
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

    def end(self) -> list[Row]:
        """Return the last sample if it is complete, in a list."""
        found, key = self._found, self._key
        self._found, self._key = {}, None
        if key is None:
            return []
        image = next((found[kind] for kind in self._image_types if kind in found), None)
        members = [found.get(kind) for kind in self._caption_types]
        captions = [member if member is not None and member.kind != "other" else None for member in members]
        if any(_is_hostile(member.name) for member in found.values()):
            self._left_out["hostile name"] += 1
        elif image is None:
            self._left_out["no image"] += 1
        elif members == [None] * len(members):
            self._left_out["no caption"] += 1
        elif image.kind == "other" or captions == [None] * len(captions):
            self._left_out["link or device"] += 1
        else:
            places = [(caption.offset, caption.size) if caption is not None else ABSENT for caption in captions]
            return [((image.offset, image.size), places, key.encode("utf-8", "surrogateescape"))] * self._times(found)
        return []


def _is_hostile(name: str) -> bool:
    return _HOSTILE.search(name) is not None or len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME


def _member_type(caption_key: str) -> str:
    return "json" if caption_key.startswith(_JSON_FIELD) else caption_key


def json_field(caption_key: str) -> str | None:
    """Return the JSON field that a caption key names, or None if the member itself is the caption."""
    return caption_key.removeprefix(_JSON_FIELD) if caption_key.startswith(_JSON_FIELD) else None


def _scan_table(job: ScanJob, table: Table) -> list[Shard]:
    """Copy image paths and captions into files of `CHUNK` rows, in which each row has a known offset."""
    left_out: Counter[str] = Counter()
    shards: list[Shard] = []
    rows = _complete_rows(table, job.subset, left_out)
    while (chunk := list(islice(rows, CHUNK))) or left_out:
        name = f"{job.name}-{len(shards):06d}"
        data = io.BytesIO()
        places: list[Row] = []
        for key, image, captions in chunk:
            image_place = (data.tell(), data.write(image))
            caption_places = [(data.tell(), data.write(text)) if text is not None else ABSENT for text in captions]
            places.append((image_place, caption_places, key))
        path = f"{_INDEX}/{name}.rows"
        write_atomically(job.folder / path, data.getvalue())
        shard = Shard(
            "table",
            path,
            len(data.getvalue()),
            len(chunk),
            heads=digest_of(data.getvalue()),
            left_out=dict(left_out),
            root=table.root or os.path.dirname(job.path),
        )
        shards.append(_with_index(shard, job.folder, name, places, len(table.captions)))
        left_out.clear()
    return shards


def _complete_rows(
    table: Table, subset: Subset | None, left_out: Counter[str]
) -> Iterator[tuple[bytes, bytes, list[bytes | None]]]:
    if subset is not None:
        table = dataclasses.replace(table, captions=(*table.captions, subset.key))
    for number, (image, captions) in enumerate(table_rows(table)):
        uid = captions.pop() if subset is not None else None
        encoded = [_stored(each) for each in captions]
        if not image:
            left_out["no image"] += 1
        elif image.startswith(_URLS):
            left_out["URL"] += 1
        elif all(text is None for text in encoded):
            left_out["no caption"] += 1
        else:
            times = 1 if subset is None else _times(subset, uid if is_uid(uid) else None, left_out)
            row = str(number).encode(), image.encode("utf-8", "surrogateescape"), encoded
            yield from repeat(row, times)


def _stored(caption: Caption) -> bytes | None:
    """Return a caption, or a list of them, as a file of rows holds it; None for nothing."""
    if isinstance(caption, list) or (caption is not None and caption.startswith(_LISTED.decode())):
        captions = caption if isinstance(caption, list) else [caption]
        return _LISTED + canonical({_LIST: captions}) if captions else None
    return caption.encode("utf-8", "surrogateescape") if caption is not None else None


def stored_captions(stored: bytes) -> tuple[bytes, str | None]:
    """Return what a file of rows holds of a source of captions, and the field of JSON that it is, as `json_field`."""
    return (stored.removeprefix(_LISTED), _LIST) if stored.startswith(_LISTED) else (stored, None)


def _with_index(shard: Shard, folder: Path, name: str, rows: Sequence[Row], captions: int) -> Shard:
    """Write the index of a shard and return the shard with the index's path, size and digest."""
    data = index_bytes(rows, captions)
    path = f"{_INDEX}/{name}.npy"
    write_atomically(folder / path, data)
    return dataclasses.replace(shard, index=path, index_bytes=len(data), index_sha256=digest_of(data))


def heads_digest(file: BinaryIO, offsets: Iterable[int]) -> str:
    """Return a digest of the headers before the contents at ``offsets``."""
    digest = hashlib.sha256()
    for offset in offsets:
        file.seek(offset - BLOCK)
        digest.update(file.read(BLOCK))
    return digest.hexdigest()


def canonical(value: Any) -> bytes:
    """Return a value as JSON, equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest_of(data: bytes) -> str:
    """Return the SHA-256 digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()
