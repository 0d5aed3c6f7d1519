"""Local copies of parts of remote files, which the worker processes of a rank fetch for each other and read at random.

A copy is a file in a folder that all of them know. Whoever needs one that is not there fetches it, under a lock;
threads fetch in advance. The folder is removed by the process that made it; where that was killed, by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from ..errors import UserError
from .files import claimed, writing
from .storage import Range, Ranges, download, in_requests, remote_range

#: Requests of a process at a time.
THREADS = 4
_PREFIX = "drrho-copies-"
_OWNER = re.compile(re.escape(_PREFIX) + r"(\d+)-")
_OPEN = 64
_YOUNG_SECONDS = 60.0
_CLOSING_SECONDS = 5.0


class Copy(NamedTuple):
    """Parts of a remote file: ``ranges`` are start and end of each, sorted and disjoint; without any, the whole file.

    A name stands for the same parts in all processes.
    """

    name: str
    path: str
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def origin(self) -> int:
        """The offset in the remote file of the first byte of the copy."""
        return self.ranges[0][0] if self.ranges else 0


class LocalCopies:
    """Fetches copies, and reads byte ranges out of them; what no copy has is read from where it is.

    Parameters
    ----------
    parent : Path, optional
        Where the folder of the copies is made; by default the system's folder of temporary files.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        with writing(parent):
            parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(parent)
            self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
        self._claim = contextlib.ExitStack()
        self._claim.enter_context(claimed(self.folder / ".claim"))
        self._start()

    def _start(self) -> None:
        self._background: _Background | None = None
        self._begun: dict[str, tuple[Copy, Future[None]]] = {}
        self._used: dict[str, list[Copy]] = {}
        self._ranges = Ranges(_OPEN)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self._claim = contextlib.ExitStack()
        self._start()

    def begin(self, copies: Iterable[Copy]) -> None:
        """Fetch copies in the background, in this order, unless they are there or under way in this process."""
        if self._background is None:
            self._background = _Background(THREADS)
        for copy in copies:
            if copy.name not in self._begun:
                self._begun[copy.name] = copy, self._background.submit(partial(self._fetch, copy))

    def use(self, names: Collection[str]) -> None:
        """Wait for copies that were begun, and read from these alone from now on.

        Raises
        ------
        UserError
            If one cannot be read or written.
        """
        self._used = {}
        for copy, fetched in (self._begun[name] for name in names):
            fetched.result()
            self._used.setdefault(copy.path, []).append(copy)

    def forget(self, names: Iterable[str]) -> None:
        """Forget copies in this process; the files stay."""
        for name in names:
            del self._begun[name]

    def remove(self, names: Iterable[str]) -> None:
        """Delete the files of copies that no process needs again."""
        for name in names:
            for path in (self._path(name), self._lock(name)):
                path.unlink(missing_ok=True)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Return up to ``size`` bytes from ``offset``; fewer only where the file ends."""
        return self._ranges.read(*self._place(path, offset, size))

    def read_many(self, wanted: Sequence[Range]) -> list[bytes]:
        """Return the bytes of ranges."""
        return self._ranges.read_many([self._place(*each) for each in wanted])

    def close(self) -> None:
        """Delete all copies."""
        if self._background is not None:
            self._background.close(fetched for _, fetched in self._begun.values())
        self._start()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._claim.close()

    def _place(self, path: str, offset: int, size: int) -> Range:
        """Return where a range is: in a copy, or in the file itself."""
        for copy in self._used.get(path, ()):
            if not copy.ranges or any(start <= offset and offset + size <= end for start, end in copy.ranges):
                return str(self._path(copy.name)), offset - copy.origin, size
        return path, offset, size

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _lock(self, name: str) -> Path:
        return self.folder / f".{name}.lock"

    def _fetch(self, copy: Copy) -> None:
        path = self._path(copy.name)
        if path.exists():
            return
        with _alone(self._lock(copy.name)):  # another process may be fetching it
            if not path.exists():
                partial = path.with_name(f".{copy.name}.{os.getpid()}")
                with writing(self.folder):
                    _write(copy, partial)
                    os.replace(partial, path)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock of this thread. Locks of processes, whose threads wait for each other, look like deadlocks."""
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class _Background:
    """Threads that do not keep a process alive: one that is to end need not wait for storage."""

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, action: Callable[[], None]) -> Future[None]:
        """Run an action when its turn comes."""
        future: Future[None] = Future()
        self._tasks.put((future, action))
        return future

    def close(self, futures: Iterable[Future[None]]) -> None:
        """Cancel actions that have not begun, and end the threads, but for those that wait for storage."""
        for future in futures:
            future.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        end = time.monotonic() + _CLOSING_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, action = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)


def _write(copy: Copy, to: Path) -> None:
    if not copy.ranges:
        download(copy.path, str(to))
        return
    with to.open("wb") as file:
        for start, end in copy.ranges:
            for first, stop in in_requests(start, end):
                file.seek(first - copy.origin)  # what is left out between two ranges takes no space
                file.write(remote_range(copy.path, first, stop - first))


def remove_abandoned(parent: Path) -> None:
    """Delete the folders of processes that were killed: their claims are free."""
    for folder in parent.glob(f"{_PREFIX}*"):
        owner = _OWNER.match(folder.name)
        if owner is None or int(owner[1]) == os.getpid():
            continue
        with contextlib.suppress(UserError, OSError):
            if time.time() - (folder / ".claim").stat().st_mtime < _YOUNG_SECONDS:
                continue  # which may not have been claimed yet
            with claimed(folder / ".claim") as is_free:
                if is_free:
                    shutil.rmtree(folder, ignore_errors=True)
