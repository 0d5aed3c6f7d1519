"""Writing files that are either whole or absent."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.clip.errors import UserError

_ABANDONED_SECONDS = 3600.0


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``; a crash or a full disk leaves the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True) if partial.parent.is_dir() else None
        raise UserError(f"cannot write {path} ({error.strerror}): free space or choose another folder") from error


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
    probe = folder / f".writable-{os.getpid()}"
    write_atomically(probe, b"")
    probe.unlink(missing_ok=True)  # another machine's process may have the same number
    for path in folder.glob(".*.partial"):
        # Processes on other machines may be writing here: their files are young.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def append_line(path: Path, line: str) -> None:
    """Append a line of text; after half a line, which a full disk or a crash left, on a line of its own."""
    try:
        with path.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.write(b"\n")
            file.write(line.encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): free space or choose another folder") from error


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON."""
    write_atomically(path, json.dumps(value, indent=2).encode() + b"\n")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from what is done inside, waiting for the one that does it now.

    ``path`` is created; the kernel lets go of it when the process ends, however it ends.
    """
    with _opened(path) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Like `locked`, but yield at once whether this process has it."""
    with _opened(path) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): free space or choose another folder") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def append_whole(path: Path, lines: str) -> None:
    """Append lines so that they are on disk when this returns; half a line that was left at the end is cut off."""
    try:
        with path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): free space or choose another folder") from error
