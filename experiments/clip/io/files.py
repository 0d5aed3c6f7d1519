"""Writing files so that a crash leaves them complete or absent, and locks on files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError

T = TypeVar("T")

# Seconds between attempts; the failure after the last of them is raised.
WAITS: tuple[float, ...] = (0.1, 0.5, 2.0, 8.0, 30.0)

_ABANDONED_SECONDS = 3600.0
# Errors that stay however long one waits. All others, such as EIO, ESTALE and ETIMEDOUT of network file systems, may
# be temporary.
_FINAL_TYPES = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, UserError)
# Errors of writing that more space would not mend.
_NOT_OF_SPACE = {
    getattr(errno, name)
    for name in ("EEXIST", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "EROFS", "ENAMETOOLONG", "ELOOP", "ENOENT")
}
_FINAL_NUMBERS = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "ENAMETOOLONG", "ELOOP")}


def retry_with_backoff(action: Callable[[], T], failures: type[Exception] = OSError) -> T:
    """Return what ``action`` returns; where it fails with an error that may be temporary, wait and try again."""
    for wait in (*WAITS, None):
        try:
            return action()
        except failures as error:
            if wait is None or is_final(error):
                raise
            time.sleep(wait)
    raise AssertionError


def is_final(error: Exception) -> bool:
    """Whether an error stays however long one waits, so that there is no use in trying again."""
    return isinstance(error, _FINAL_TYPES) or getattr(error, "errno", None) in _FINAL_NUMBERS


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block, which writes ``path``, into a `UserError`."""
    try:
        yield
    except OSError as error:
        attempts = "" if is_final(error) else f" after {len(WAITS) + 1} attempts"
        remedy = "choose another folder" if error.errno in _NOT_OF_SPACE else "free space or choose another folder"
        raise UserError(f"cannot write {path}{attempts} ({error.strerror}): {remedy}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of ``path`` by ``data``; a crash or a full disk leaves the old content or the new."""
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


def share_permissions(path: Path) -> None:
    """Give a file the permissions that ``open(path, "w")`` would have given it.

    They follow from the process's umask and the folder's access control list. Both are read from a file that is created
    in the same folder for a moment: Python can read the umask only by changing it, which other threads would notice.
    """
    probe = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with open(probe, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    os.chmod(path, mode)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ensure_writable(folder: Path) -> None:
    """Create ``folder`` and check that a file can be written there, before hours of work end in an error.

    Incomplete files that killed processes left behind are removed.
    """
    probe = folder / f".writable-{secrets.token_hex(8)}"
    write_atomically(probe, b"")
    probe.unlink()
    for path in folder.glob(".*.partial"):
        # Processes on other machines may be writing here: their incomplete files are younger.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def append_line(path: Path, line: str) -> None:
    """Append a line of text; an incomplete line at the end, left by a full disk or a crash, is ended first."""

    def append() -> None:
        with path.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.write(b"\n")
            file.write(line.encode() + b"\n")

    with writing(path):
        retry_with_backoff(append)


def write_json(path: Path, value: Any) -> None:
    """Replace the content of ``path`` by ``value`` as JSON."""
    write_atomically(path, json.dumps(value, indent=2).encode() + b"\n")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` during the block; wait while another process holds it.

    ``path`` is created if need be. The kernel releases the lock when this process ends, in whatever way, even if
    processes that it forked live on.
    """
    with _opened(path) as descriptor:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Try to lock ``path`` as `locked` does, without waiting; yield whether this process holds the lock."""
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


def append_durably(path: Path, lines: str) -> None:
    """Append lines and wait until they are on disk; an incomplete line at the end of the file is cut off first."""
    with writing(path), path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())
