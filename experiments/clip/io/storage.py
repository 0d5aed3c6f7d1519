"""Reading local files and URLs that fsspec knows; storage that fails for a while is tried again."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from experiments.clip.errors import UserError
from experiments.clip.io import files
from experiments.clip.io.files import is_final, retry_with_backoff

T = TypeVar("T")


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL; a local path may hold anything."""
    return "://" in path and not path.startswith("/")


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it; fsspec keeps one per process, also after a fork."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {url} ({error}): install the package that reads it, or copy the data") from error


def retry(action: Callable[[], T], path: str) -> T:
    """Return what ``action`` returns, which reads ``path``; wait and try again where storage fails.

    Raises
    ------
    UserError
        If the file does not exist or may not be read, or if all attempts fail.
    """
    # The libraries that read URLs have exceptions of their own, not derived from OSError.
    failures = Exception if is_remote(path) else OSError
    try:
        return retry_with_backoff(action, failures)
    except UserError:
        raise
    except failures as error:
        attempts = "" if is_final(error) else f" after {len(files.WAITS) + 1} attempts"
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"cannot read {path}{attempts} ({reason}): check the storage, then resume") from error


def file_size(path: str) -> int:
    """Return the number of bytes of a file.

    Raises
    ------
    UserError
        If the file cannot be read, or is a folder or a pipe (a pipe's reader would wait for ever).
    """
    if is_remote(path):
        return retry(lambda: int(filesystem(path)[0].size(filesystem(path)[1])), path)
    status = retry(lambda: os.stat(path), path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no regular file: name one that can be read from any offset")
    return status.st_size


def open_seekable(path: str) -> BinaryIO:
    """Open a file for reading bytes, at any offset."""
    if not is_remote(path):
        return retry(lambda: cast(BinaryIO, open(path, "rb")), path)
    fs, inner = filesystem(path)
    return retry(lambda: fs.open(inner, "rb"), path)


class Ranges:
    """Reads byte ranges of files; the ``kept`` local files that were used last stay open.

    Every read gives its own offset, so that processes forked from this one can share the open files.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._open: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": self._kept, "_open": {}}

    def __del__(self) -> None:
        for path in list(self._open):
            self._close(path)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Return up to ``size`` bytes from ``offset``; fewer only where the file ends."""
        return retry(partial(self._read, path, offset, size), path)

    def read_many(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return the bytes of ranges ``(path, offset, size)``, requesting those of one remote file system together."""
        results: dict[int, bytes] = {}
        groups: dict[str, list[int]] = {}
        for position, (path, _, _) in enumerate(wanted):
            if is_remote(path):
                groups.setdefault(path.partition("://")[0], []).append(position)
        for positions in groups.values():
            fs, _ = filesystem(wanted[positions[0]][0])
            paths = [fs._strip_protocol(wanted[i][0]) for i in positions]
            starts = [wanted[i][1] for i in positions]
            ends = [wanted[i][1] + wanted[i][2] for i in positions]
            answers = fs.cat_ranges(paths, starts, ends, on_error="return")
            results |= {i: data for i, data in zip(positions, answers, strict=True) if isinstance(data, bytes)}
        # A range whose request failed is requested again, alone, with retries.
        return [results[i] if i in results else self.read(*request) for i, request in enumerate(wanted)]

    def _read(self, path: str, offset: int, size: int) -> bytes:
        if is_remote(path):
            fs, inner = filesystem(path)
            return fs.cat_file(inner, start=offset, end=offset + size)
        try:
            descriptor = self._descriptor(path)
            parts: list[bytes] = []
            while size > 0 and (part := os.pread(descriptor, size, offset)):
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        except OSError:
            # A network file system may have lost the file of this descriptor: the next attempt opens it anew.
            self._close(path)
            raise

    def _descriptor(self, path: str) -> int:
        descriptor = self._open.pop(path, None)
        if descriptor is None:
            while len(self._open) >= self._kept:
                self._close(next(iter(self._open)))
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[path] = descriptor
        return descriptor

    def _close(self, path: str) -> None:
        if (descriptor := self._open.pop(path, None)) is not None:
            os.close(descriptor)
