"""Writing files that are either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from experiments.clip.errors import UserError

T = TypeVar("T")

# Seconds between the attempts; the last failure is final.
WAITS: tuple[float, ...] = (0.1, 0.5, 2.0, 8.0, 30.0)

_ABANDONED_SECONDS = 3600.0
# What waiting does not mend: all else, such as EIO, ESTALE and ETIMEDOUT of network file systems, may pass.
_FINAL_TYPES = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, UserError)
_FINAL_NUMBERS = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "ENAMETOOLONG", "ELOOP")}


def retry_with_backoff(action: Callable[[], T], failures: type[Exception] = OSError) -> T:
    """Return what ``action`` returns; wait and try again where it fails in a way that may pass."""
    for wait in (*WAITS, None):
        try:
            return action()
        except failures as error:
            if wait is None or is_final(error):
                raise
            time.sleep(wait)
    raise AssertionError


def is_final(error: Exception) -> bool:
    """Whether an error is one that waiting does not mend."""
    return isinstance(error, _FINAL_TYPES) or getattr(error, "errno", None) in _FINAL_NUMBERS


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise a `UserError` where what is done inside, writing ``path``, fails."""
    try:
        yield
    except OSError as error:
        attempts = "" if is_final(error) else f" after {len(WAITS) + 1} attempts"
        raise UserError(
            f"cannot write {path}{attempts} ({error.strerror}): free space or choose another folder"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``; a crash or a full disk leaves the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")

    def write() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    with writing(path):
        retry_with_backoff(write)


def sync(path: Path) -> None:
    """Have the file system keep a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ensure_writable(folder: Path) -> None:
    """Create ``folder`` and prove that a file can be written there, so that hours of work do not end in an error.

    Parts of files that processes left when they were killed are removed.
    """
    probe = folder / f".writable-{secrets.token_hex(8)}"
    write_atomically(probe, b"")
    probe.unlink()
    for path in folder.glob(".*.partial"):
        # Processes on other machines may be writing here: their files are young.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def append_line(path: Path, line: str) -> None:
    """Append a line of text; after half a line, which a full disk or a crash left, on a line of its own."""

    def append() -> None:
        with path.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.write(b"\n")
            file.write(line.encode() + b"\n")

    with writing(path):
        retry_with_backoff(append)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON."""
    write_atomically(path, json.dumps(value, indent=2).encode() + b"\n")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from what is done inside, waiting for the one that does it now.

    ``path`` is created; the kernel lets go of it when the process ends, however it ends, whatever becomes of processes
    that it forked.
    """
    with _opened(path) as descriptor:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Like `locked`, but yield at once whether this process has it."""
    with _opened(path) as descriptor:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
            return
        yield True


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def append_whole(path: Path, lines: str) -> None:
    """Append lines so that they are on disk when this returns; half a line that was left at the end is cut off."""
    with writing(path), path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())
