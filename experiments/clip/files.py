"""Writing files that are either whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import time
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
