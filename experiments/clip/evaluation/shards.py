"""Where a task's samples are: in a tar file, or in a folder of images of one class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from ..data.reader import MAX_IMAGE_BYTES
from ..io.tar import Damaged, tar_members


class RawSample(NamedTuple):
    """The bytes of a sample; ``label`` is the number of the class where the sample's folder says it."""

    label: bytes | int
    metadata: bytes | None
    images: list[bytes]


class Unreadable(Exception):
    """A sample of which a part cannot be read."""


class Shard(Protocol):
    """Consecutive samples of a task."""

    def __len__(self) -> int: ...

    def read(self, rows: Iterable[int]) -> Iterator[RawSample]:
        """Yield the bytes of some samples."""
        ...

    def name(self, row: int, part: int) -> str:
        """Return what a message calls a part of a sample: 0 is the label, numbers about it and images follow."""
        ...

    def digest(self) -> bytes:
        """Return a digest of where the samples are."""
        ...


@dataclass(frozen=True)
class TarShard:
    """Samples of a tar file: ``parts[starts[i] : starts[i + 1]]`` are offset and size of the parts of sample i.

    The first part is the label; ``numbers`` (0 or 1) parts are numbers about the sample; the others are images.
    """

    path: Path
    parts: np.ndarray  # [parts, 2]
    starts: np.ndarray  # [samples + 1]
    numbers: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def _places(self, row: int) -> list[list[int]]:
        return self.parts[self.starts[row] : self.starts[row + 1]].tolist()

    def images(self) -> np.ndarray:  # [samples]
        """Return how many images each sample has."""
        return np.diff(self.starts) - 1 - self.numbers

    def read(self, rows: Iterable[int]) -> Iterator[RawSample]:
        """Yield the bytes of some samples."""
        with self.path.open("rb") as file:
            for row in rows:
                label, *others = [_bytes(file, offset, size) for offset, size in self._places(row)]
                yield RawSample(label, others[0] if self.numbers else None, others[self.numbers :])

    def name(self, row: int, part: int) -> str:
        """Return the name of the member, and the path of the file."""
        offset = self._places(row)[part][0]
        try:
            with self.path.open("rb") as file:
                members = tar_members(file, self.path.stat().st_size)
                found = next((member.name for member in members if member.offset == offset), "a member")
        except (OSError, Damaged):
            found = "a member"
        return f"{found} in {self.path}"

    def digest(self) -> bytes:
        """Return a digest of the file's size and of the parts' places."""
        size = self.path.stat().st_size
        return hashlib.sha256(b"%d" % size + self.parts.tobytes() + self.starts.tobytes()).digest()


@dataclass(frozen=True)
class ClassFolder:
    """The images of one class, files of a folder."""

    path: Path
    files: tuple[str, ...]
    label: int

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: Iterable[int]) -> Iterator[RawSample]:
        """Yield the bytes of some images, and the class."""
        for row in rows:
            with (self.path / self.files[row]).open("rb") as file:
                data = file.read(MAX_IMAGE_BYTES + 1)
            if len(data) > MAX_IMAGE_BYTES:
                raise Unreadable(f"more than {MAX_IMAGE_BYTES} bytes")
            yield RawSample(self.label, None, [data])

    def name(self, row: int, part: int) -> str:
        """Return the file's path."""
        return str(self.path / self.files[row])

    def digest(self) -> bytes:
        """Return a digest of the files' names and sizes."""
        sizes = [(name, (self.path / name).stat().st_size) for name in self.files]
        return hashlib.sha256(repr((self.label, sizes)).encode("utf-8", "surrogateescape")).digest()


def _bytes(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    if len(data := file.read(size)) < size:
        raise Unreadable("the file became shorter")
    return data
