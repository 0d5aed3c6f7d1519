"""Files of numbers that are mapped into memory, with a CRC-32 for every 4 KiB that is compared when it is first read.

The numbers are raw and little-endian. Beside ``NAME`` lies ``NAME.crc``, one 32-bit checksum for each page.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

PAGE = 4096
_CHUNK = 2**22
AGAIN = "delete its folder and compute the losses again"


class Pages:
    """A complete file of numbers, of which reading touches only the pages that are asked for.

    Parameters
    ----------
    path : Path
        The file.
    dtype : str
        A NumPy type such as ``"<f4"``.
    count : int
        How many numbers it must hold.

    Raises
    ------
    ValueError
        Naming the file, if it or its checksums are missing or have another size.
    """

    def __init__(self, path: Path, dtype: str, count: int) -> None:
        self._path, self._size = path, np.dtype(dtype).itemsize
        for each, size in ((path, count * self._size), (checksums_of(path), 4 * -(-count * self._size // PAGE))):
            found = each.stat().st_size if each.exists() else None
            if found != size:
                raise ValueError(f"{each} must have {size} bytes, got {'no file' if found is None else found}: {AGAIN}")
        self.values: NDArray = np.memmap(path, dtype, "r") if count else np.empty(0, dtype)
        self._bytes = memoryview(self.values).cast("B") if count else b""  # pyright: ignore[reportArgumentType]
        self._checksums = np.fromfile(checksums_of(path), "<u4")
        self._compared = np.zeros(len(self._checksums), dtype=bool)

    def compare(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> None:
        """Compare the checksums of the pages that hold values ``first[k]`` to ``last[k]``, both included.

        Raises
        ------
        ValueError
            Naming the file and the bytes, if a page is not as it was written.
        """
        first, last = first * self._size // PAGE, last * self._size // PAGE
        pages = [first, last]
        if len(long := np.flatnonzero(last - first > 1)):
            pages += [np.arange(first[k], last[k]) for k in long]
        pages = np.unique(np.concatenate(pages))
        for page in pages[~self._compared[pages]].tolist():
            if crc32(self._bytes[page * PAGE : (page + 1) * PAGE]) != self._checksums[page]:
                raise ValueError(
                    f"{self._path} is damaged between bytes {page * PAGE} and {(page + 1) * PAGE}: {AGAIN}"
                )
            self._compared[page] = True

    def take(self, index: NDArray[np.int64]) -> NDArray:
        """Return the values at ``index``."""
        self.compare(index, index)
        return self.values[index]


def checksums_of(path: Path) -> Path:
    """Return where the checksums of a file are."""
    return path.with_name(f"{path.name}.crc")


def reserve(path: Path, count: int, size: int) -> None:
    """Create a file of ``count`` numbers of ``size`` bytes, zeros, and its space on the disk.

    Raises
    ------
    OSError
        Naming the file and its size, if the disk has no room for it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        if count and hasattr(os, "posix_fallocate"):  # not on macOS, where `write` finds out
            os.posix_fallocate(descriptor, 0, count * size)
    except OSError as error:
        raise no_room(path, count * size, error) from error
    finally:
        os.close(descriptor)


def write(descriptor: int, path: Path, values: NDArray, start: int) -> None:
    """Write numbers from number ``start`` on: not through the mapping, where a full disk would kill the process."""
    content, place = memoryview(np.ascontiguousarray(values).tobytes()), start * values.itemsize
    try:
        while content:
            done = os.pwrite(descriptor, content, place)
            content, place = content[done:], place + done
    except OSError as error:
        raise no_room(path, values.nbytes, error) from error


def write_file(path: Path, values: NDArray) -> None:
    """Write a file of numbers and its checksums, and wait until both are on the disk."""
    reserve(path, values.size, values.itemsize)
    descriptor = os.open(path, os.O_RDWR)
    try:
        write(descriptor, path, values, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if not path.name.endswith(".crc"):
        seal(path)


def seal(path: Path) -> None:
    """Write the checksums of a file that is complete."""
    found: list[int] = []
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found += [crc32(chunk[k : k + PAGE]) for k in range(0, len(chunk), PAGE)]
    write_file(checksums_of(path), np.array(found, "<u4"))


def no_room(path: Path, size: int, error: OSError) -> OSError:
    """Return the error of a write that failed, which names the file."""
    return OSError(
        error.errno, f"cannot write {size} bytes to {path} ({error.strerror}): free space, then run it again"
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a file by a mapping as JSON; a crash leaves the old content or the new."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(json.dumps(value, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the kernel releases however this process ends."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OSError(error.errno, f"another process is computing the losses of {folder}: wait for it") from error
    finally:
        os.close(descriptor)
