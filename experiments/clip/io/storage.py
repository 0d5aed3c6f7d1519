"""Reading local files and URLs that fsspec knows; storage that fails for a while is tried again."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import sync
from fsspec.config import conf

from ..errors import UserError
from . import files
from .files import is_final, retry_with_backoff

T = TypeVar("T")
#: A range of bytes of a file: its path or URL, offset and size.
Range = tuple[str, int, int]

#: Bytes between two ranges of a remote file that are read along with them rather than left out by another request.
MAX_GAP = 2**16
#: Bytes of a request, at most, unless a range is larger.
REQUEST_BYTES = 16 * 2**20

_CHAIN = "::"
_STREAMED = 4 * 2**20
_SILENCE = 60.0  # seconds that a server may send nothing
# What storages call the version of a file, the most precise first.
_STAMPS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "date_time")


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL; a local path may hold anything."""
    return "://" in path and not path.startswith("/")


class _Opened(NamedTuple):
    """A file system, and what its calls are made under: of an archive, one call at a time."""

    fs: Any
    guard: AbstractContextManager[Any]


# Archives that are open in this process: opening one reads its list of members, and threads share its position.
_archives: dict[tuple[int, str], _Opened] = {}


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it; one per process, also after a fork."""
    opened, inner = _opened(url)
    return opened.fs, inner


def _opened(url: str) -> tuple[_Opened, str]:
    first, chain, rest = url.partition(_CHAIN)
    key = os.getpid(), f"{first.partition('://')[0]}{chain}{rest}"
    try:
        if (archive := _archives.get(key)) is not None:
            return archive, archive.fs._strip_protocol(first)
        fs, inner = fsspec.core.url_to_fs(url, **_patience(url))
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {url} ({error}): install the package that reads it, or copy the data") from error
    if not chain or fs.cachable:  # fsspec keeps it itself
        return _Opened(fs, nullcontext()), inner
    return _archives.setdefault(key, _Opened(fs, threading.RLock())), inner


def _patience(url: str) -> dict[str, Any]:
    """Return options by which a stream lasts as long as bytes come; by default aiohttp ends it after five minutes."""
    found = {}
    for part in url.split(_CHAIN):
        protocol = part.partition("://")[0]
        if protocol in ("http", "https") and "client_kwargs" not in conf.get(protocol, {}):
            import aiohttp  # for these URLs alone

            limit = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
            found[protocol] = {"client_kwargs": {"timeout": limit}}
    return found


def retry(action: Callable[[], T], path: str, does: str = "read") -> T:
    """Return what ``action`` returns, which reads ``path``, or ``does`` something else; try again where storage fails.

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
        raise UserError(f"cannot {does} {path}{attempts} ({reason}): check the storage, then resume") from error


def _call(url: str, action: Callable[[Any, str], T]) -> T:
    """Return what ``action(file system, path)`` returns, with attempts; what it opened stays open."""

    def attempt() -> T:
        opened, inner = _opened(url)
        with opened.guard:
            return action(opened.fs, inner)

    return retry(attempt, url)


def file_size(path: str) -> int:
    """Return the number of bytes of a file.

    Raises
    ------
    UserError
        If the file cannot be read, or is a folder or a pipe (a pipe's reader would wait for ever).
    """
    return file_version(path)[0]


def file_version(path: str) -> tuple[int, str]:
    """Return the number of bytes of a file, and what changes when it is written anew.

    That is the time of modification of a local file, and what remote storage says of its version: empty if nothing.
    """
    if is_remote(path):
        info = _call(path, lambda fs, inner: fs.info(inner))
        size = info.get("size")
        if size is None:
            raise UserError(f"the storage does not say how many bytes {path} has: copy the data")
        return int(size), next((str(info[key]) for key in _STAMPS if info.get(key)), "")
    status = retry(lambda: os.stat(path), path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no regular file: name one that can be read from any offset")
    return status.st_size, str(status.st_mtime_ns)


def matching(pattern: str) -> list[str]:
    """Return the URLs that a URL with wildcards names, sorted."""
    first, chain, rest = pattern.partition(_CHAIN)
    names = _call(pattern, lambda fs, inner: sorted(fs.glob(inner)))
    if chain:
        return [f"{first.partition('://')[0]}://{name}{chain}{rest}" for name in names]
    fs, _ = filesystem(pattern)
    return [fs.unstrip_protocol(name) for name in names]


def refuse_without_ranges(url: str) -> None:
    """Refuse an HTTP server that answers a request for a range with the whole file, by its name."""
    fs, inner = filesystem(url)
    if not {"http", "https"} & {*([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)}:
        return

    async def status() -> int:
        session = await fs.set_session()
        options = dict(fs.kwargs)
        headers = {**options.pop("headers", {}), "Range": "bytes=0-0"}
        async with session.get(fs.encode_url(inner), headers=headers, **options) as answer:
            return answer.status

    if retry(lambda: sync(fs.loop, status), url) == 200 and file_size(url) > 1:
        raise _no_ranges(url)


def _no_ranges(url: str) -> UserError:
    host = urlsplit(url.rpartition(_CHAIN)[2]).netloc or url
    return UserError(
        f"the server {host} ignores requests for a part of a file, as `python -m http.server` does: train with "
        "--reading shards, which reads files as a whole, or use another server, such as nginx"
    )


class _Forward(io.RawIOBase):
    """A remote file of ``size`` bytes that is read once, in one stream; seeking forward reads on.

    Seeking backward is possible within the part read last. ``digest`` is the SHA-256 of what was read so far.
    """

    def __init__(self, source: Any, size: int) -> None:
        self._source, self._size = source, size
        self._part, self._start, self._at = b"", 0, 0
        self._sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._source.close()
        super().close()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset < self._start:
            raise io.UnsupportedOperation(f"this stream cannot go back to byte {offset}")
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride] (never None)
        parts: list[bytes] = []
        while size != 0 and self._reach():
            part = self._part[self._at - self._start :][: size if size > 0 else None]
            parts.append(part)
            self._at += len(part)
            size -= len(part) if size > 0 else 0
        return b"".join(parts)

    def _reach(self) -> bool:
        """Read on until the part at hand has the byte at the position; return whether there is one."""
        while self._at >= self._start + len(self._part):
            following = self._source.read(_STREAMED)
            if not following:
                if (end := self._start + len(self._part)) < self._size:
                    raise OSError(f"the stream ended after {end} of {self._size} bytes")
                return False
            self._start += len(self._part)
            self._part = bytes(following)
            self._sha256.update(self._part)
        return True

    def digest(self) -> str:
        """Read the rest, and return the SHA-256 of the file in hexadecimal."""
        self._at = max(self._at, self._size)
        self._reach()
        return self._sha256.hexdigest()


def open_once(path: str, size: int) -> BinaryIO:
    """Open a file of ``size`` bytes for reading it forward once: of a remote file, in one stream of one request.

    A server that ignores ranges will do. What an archive holds is read under no lock: by one thread at a time.
    """
    if not is_remote(path):
        return retry(lambda: cast(BinaryIO, open(path, "rb")), path)
    return cast(BinaryIO, _call(path, lambda fs, inner: _Forward(_stream(fs, inner), size)))


def digest_once(file: BinaryIO) -> str:
    """Return the SHA-256 in hexadecimal of a file that `open_once` gave; a stream goes on where it is."""
    if isinstance(file, _Forward):
        return file.digest()
    file.seek(0)
    sha256 = hashlib.sha256()
    while part := file.read(_STREAMED):
        sha256.update(part)
    return sha256.hexdigest()


def _stream(fs: Any, inner: str) -> Any:
    # Of these keywords, HTTP knows the first, for which 0 means one request; other storages read blocks ahead.
    if {"http", "https"} & {*([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)}:
        return fs.open(inner, "rb", block_size=0)
    return fs.open(inner, "rb", block_size=REQUEST_BYTES, cache_type="readahead")


def open_seekable(path: str) -> BinaryIO:
    """Open a file for reading bytes, at any offset."""
    if not is_remote(path):
        return retry(lambda: cast(BinaryIO, open(path, "rb")), path)
    return _call(path, lambda fs, inner: fs.open(inner, "rb"))


def download(path: str, to: str) -> None:
    """Copy a remote file as a whole, in one stream."""
    _call(path, lambda fs, inner: fs.get_file(inner, to))


def merged(ranges: Sequence[tuple[int, int]], gap: int, most: int | None = None) -> list[tuple[int, int]]:
    """Join ranges ``(start, end)`` that are at most ``gap`` bytes apart, up to ``most`` bytes; they come sorted."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1] + gap and (most is None or max(end, found[-1][1]) - found[-1][0] <= most):
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


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
        if is_remote(path):
            return remote_range(path, offset, size)
        return retry(partial(self._read, path, offset, size), path)

    def read_many(self, wanted: Sequence[Range]) -> list[bytes]:
        """Return the bytes of ranges, requesting those of one remote file system together, and neighbors in one."""
        joined = self._joined([each for each in wanted if is_remote(each[0]) and each[2] > 0])
        return [found if (found := _cut_out(joined, *each)) is not None else self.read(*each) for each in wanted]

    def _joined(self, wanted: Sequence[Range]) -> dict[str, list[tuple[int, bytes]]]:
        """Return, by file, offset and bytes of what was requested for some ranges of remote files, without failures."""
        places: dict[str, list[tuple[int, int]]] = {}
        for path, offset, size in wanted:
            places.setdefault(path, []).append((offset, offset + size))
        groups: dict[int, tuple[_Opened, list[tuple[str, str, int, int]]]] = {}
        for path, own in places.items():
            opened, inner = _opened(path)
            requests = groups.setdefault(id(opened.fs), (opened, []))[1]
            requests += [(path, inner, *each) for each in merged(own, MAX_GAP, REQUEST_BYTES)]
        found: dict[str, list[tuple[int, bytes]]] = {}
        for opened, requests in groups.values():
            _, inner, starts, ends = map(list, zip(*requests, strict=True))
            with opened.guard:
                answers = opened.fs.cat_ranges(inner, starts, ends, on_error="return")
            for (path, _, start, end), answer in zip(requests, answers, strict=True):
                if isinstance(answer, bytes):
                    found.setdefault(path, []).append((start, _of_length(path, answer, end - start)))
        return found

    def _read(self, path: str, offset: int, size: int) -> bytes:
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


def _cut_out(joined: dict[str, list[tuple[int, bytes]]], path: str, offset: int, size: int) -> bytes | None:
    """Return a range out of what was requested; None where that failed: it is requested again, alone."""
    if size == 0:
        return b""
    for start, data in joined.get(path, ()):
        if start <= offset and offset + size <= start + len(data):
            return data[offset - start : offset - start + size]
    return None


def remote_range(path: str, offset: int, size: int) -> bytes:
    """Return up to ``size`` bytes from ``offset`` of a remote file; fewer only where the file ends."""
    return _of_length(path, _call(path, lambda fs, inner: fs.cat_file(inner, start=offset, end=offset + size)), size)


def in_requests(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range that are requested one after another."""
    for first in range(start, end, REQUEST_BYTES):
        yield first, min(first + REQUEST_BYTES, end)


def _of_length(path: str, data: bytes, size: int) -> bytes:
    if len(data) > size:
        raise _no_ranges(path)
    return data
