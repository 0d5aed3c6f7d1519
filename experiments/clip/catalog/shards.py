"""The shards of a catalog on disk: a line of JSON for each, which is parsed when it is asked for.

``shards-DIGEST.jsonl`` has the lines, ``shards-DIGEST.columns`` six integers for each: where its line begins, and what
an order of the samples needs. Both are mapped into memory, so that all ranks and workers of a host share them: of
140,000 shards, none of them parses more than those that it reads from.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from ..errors import UserError
from ..io.files import write_atomically
from ..io.storage import is_remote
from .scan import Shard, canonical, digest_of, file_digest

_NAME = "shards-"
_LINES, _COLUMNS = ".jsonl", ".columns"
_LINE, _FIRST, _SAMPLES, _BYTES, _SOURCE, _REMOTE = range(6)
_WIDTH = 6


class Shards(Sequence[Shard]):
    """The shards of a catalog, in the order of their samples; it can be copied to other processes.

    Attributes
    ----------
    firsts, samples, bytes, sources : integers ``[n]``
        Index of the first sample of each shard, number of samples, size, and number of the source.
    remote : booleans ``[n]``
        Whether the shard is at a URL.
    """

    def __init__(self, lines: Path) -> None:
        self._path = lines
        with lines.open("rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._columns = np.memmap(lines.with_suffix(_COLUMNS), "<i8", "r").reshape(-1, _WIDTH)

    def __reduce__(self) -> tuple[type[Shards], tuple[Path]]:
        return Shards, (self._path,)

    def __len__(self) -> int:
        return len(self._columns)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        start = int(self._columns[number, _LINE])
        line = self._lines[start : self._lines.find(b"\n", start)]
        try:
            return Shard(**json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"cannot understand {self._path}, shard {number}: make the catalog again") from error

    def __iter__(self) -> Iterator[Shard]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and self._lines[:] == other._lines[:]

    def __hash__(self) -> int:
        return hash(self._path)

    @property
    def firsts(self) -> np.ndarray:
        """Index of the first sample of each shard, ``[n]``."""
        return self._columns[:, _FIRST]

    @property
    def samples(self) -> np.ndarray:
        """Number of samples of each shard, ``[n]``."""
        return self._columns[:, _SAMPLES]

    @property
    def bytes(self) -> np.ndarray:
        """Size of each shard, ``[n]``."""
        return self._columns[:, _BYTES]

    @property
    def sources(self) -> np.ndarray:
        """Number of the source of each shard, ``[n]``."""
        return self._columns[:, _SOURCE]

    @property
    def remote(self) -> np.ndarray:
        """Whether each shard is at a URL, ``[n]``."""
        return self._columns[:, _REMOTE] > 0


def write_shards(folder: Path, shards: Iterable[Shard]) -> dict[str, str]:
    """Write the shards of a catalog; return the SHA-256 digests of both files by name, which `open_shards` needs."""
    lines: list[bytes] = []
    columns: list[tuple[int, ...]] = []
    start = 0
    for shard in shards:
        lines.append(canonical(dataclasses.asdict(shard)) + b"\n")
        columns.append((start, shard.first_index, shard.samples, shard.bytes, shard.source, is_remote(shard.path)))
        start += len(lines[-1])
    text, table = b"".join(lines), np.array(columns, "<i8").tobytes()
    name = f"{_NAME}{digest_of(text)[:24]}"
    write_atomically(folder / f"{name}{_LINES}", text)
    write_atomically(folder / f"{name}{_COLUMNS}", table)
    return {f"{name}{_LINES}": digest_of(text), f"{name}{_COLUMNS}": digest_of(table)}


def open_shards(folder: Path, digests: dict[str, str]) -> Shards:
    """Open what `write_shards` wrote; raise ``ValueError`` where a file is not as it was written."""
    lines, columns = sorted(digests, key=lambda name: name.endswith(_COLUMNS))
    if not (lines.startswith(_NAME) and columns == f"{Path(lines).stem}{_COLUMNS}" and Path(lines).name == lines):
        raise ValueError(f"{lines} and {columns} are no files of shards")
    for name, digest in digests.items():
        if file_digest(folder / name) != digest:
            raise ValueError(f"{name} is not as it was written, its checksum differs")
    return Shards(folder / lines)


def remove_other_shards(folder: Path, digests: dict[str, str]) -> None:
    """Remove the files of shards that a catalog no longer names."""
    for path in (*folder.glob(f"{_NAME}*{_LINES}"), *folder.glob(f"{_NAME}*{_COLUMNS}")):
        if path.name not in digests:
            path.unlink(missing_ok=True)
