"""A run's folder, copied to storage that fsspec reaches while the run goes on, and fetched from there to resume it."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from .checksums import MANIFEST
from .files import writing
from .storage import filesystem, retry

_CHECKPOINTS, _STEP = "checkpoints", "step-"
# What a run writes once, and can be had from its checkpoints.
_MODELS = ("model", "exports", "epoch_")


class Mirror:
    """Keeps a copy of a run's folder under a URL, by the folder's name.

    A checkpoint's manifest is copied last, so that one with a manifest is complete; checkpoints that are gone here are
    removed there. Files whose names begin with a dot are not copied.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, f"{url.rstrip('/')}/{folder.absolute().name}"
        self._fs, self._root = filesystem(self._url)
        self._copied: dict[str, tuple[int, int]] = {}

    def copy(self) -> None:
        """Copy what has changed.

        Raises
        ------
        UserError
            If the storage fails six times over 40 seconds.
        """
        files = {path: status for path in self._files() if (status := _status(path)) is not None}
        self._remove_replaced({path for path, status in files.items() if self._known(path, status)})
        for path, status in files.items():
            if self._known(path, status) != status:
                with contextlib.suppress(FileNotFoundError):  # a checkpoint that is no longer kept
                    self._put(path)
                    self._copied[self._name(path)] = status
        self._remove_old()

    def _files(self) -> list[Path]:
        """Return the files to copy, manifests after what they vouch for."""
        found = []
        for path in self._folder.rglob("*"):
            parts = path.relative_to(self._folder).parts
            is_left_out = any(part.startswith(".") for part in parts)
            if parts[0] == _CHECKPOINTS and not (len(parts) > 1 and parts[1].startswith(_STEP)):
                is_left_out = True
            if not is_left_out and path.is_file():
                found.append(path)
        return sorted(found, key=lambda path: (path.name == MANIFEST, path))

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _known(self, path: Path, status: tuple[int, int]) -> tuple[int, int] | None:
        return self._copied.get(self._name(path))

    def _put(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(path)
        to = f"{self._root}/{self._name(path)}"

        def put() -> None:
            self._fs.makedirs(to.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), to)

        retry(put, self._url, "write")

    def _remove_replaced(self, known: set[Path]) -> None:
        """Remove the copies of checkpoints that were written anew, whose manifests would vouch for other files."""
        for path in known:
            status = _status(path)
            if path.name == MANIFEST and status != self._copied[self._name(path)]:
                self._remove(path.parent.name)

    def _remove(self, step: str) -> None:
        prefix = f"{_CHECKPOINTS}/{step}/"
        for name in [name for name in self._copied if name.startswith(prefix)]:
            retry(lambda name=name: self._fs.rm_file(f"{self._root}/{name}"), self._url, "write")
            del self._copied[name]
        with contextlib.suppress(Exception):  # most stores have no folders; `rm` would read brackets as a pattern
            self._fs.rmdir(f"{self._root}/{prefix}")

    def _remove_old(self) -> None:
        here = {path.name for path in (self._folder / _CHECKPOINTS).glob(f"{_STEP}*")}
        for step in {name.split("/")[1] for name in self._copied if name.startswith(f"{_CHECKPOINTS}/")} - here:
            self._remove(step)

    def fetch(self) -> str | None:
        """Fetch the last complete checkpoint and the logs that are there, if this folder has none; return its name."""
        if any((self._folder / _CHECKPOINTS).glob(f"{_STEP}*")):
            return None
        there = [name for name in self._listed() if not name.startswith(".")]
        complete = {name.split("/")[1] for name in there if name.startswith(_CHECKPOINTS) and name.endswith(MANIFEST)}
        if not complete:
            return None
        last = max(complete, key=lambda name: int(name.removeprefix(_STEP)))
        partial = self._folder / _CHECKPOINTS / f".fetched-{last}"
        shutil.rmtree(partial, ignore_errors=True)
        for name in there:
            if name.startswith(f"{_CHECKPOINTS}/{last}/"):
                self._get(name, partial / name.rpartition("/")[2])
            elif not name.startswith((_CHECKPOINTS, *_MODELS)):
                self._get(name, self._folder / name)
        with writing(partial):
            os.rename(partial, self._folder / _CHECKPOINTS / last)
        return last

    def _listed(self) -> list[str]:
        def listed() -> list[str]:
            self._fs.invalidate_cache()
            if not self._fs.exists(self._root):
                return []
            root = self._fs._strip_protocol(self._root)
            return [name.removeprefix(root).lstrip("/") for name in self._fs.find(self._root)]

        return retry(listed, self._url)

    def _get(self, name: str, to: Path) -> None:
        with writing(to):
            to.parent.mkdir(parents=True, exist_ok=True)
        retry(lambda: self._fs.get_file(f"{self._root}/{name}", str(to)), self._url)


def _status(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


@contextmanager
def mirrored(folder: Path, url: str, seconds: float, say: Callable[[str], Any]) -> Iterator[None]:
    """Keep a copy of ``folder`` under ``url`` during the block, made anew every so many seconds and at its end.

    At the beginning the last checkpoint is fetched from there, if the folder has none. ``say`` is given what is fetched
    and what fails while the run goes on.

    Raises
    ------
    UserError
        If the first copy fails, or the last one of a block that has not failed itself.
    """
    mirror, ends = Mirror(folder, url), threading.Event()
    if (fetched := mirror.fetch()) is not None:
        say(f"{fetched} is fetched from {url}")
    mirror.copy()

    def repeat() -> None:
        while not ends.wait(seconds):
            try:
                mirror.copy()
            except UserError as error:
                say(str(error))

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    has_failed = True
    try:
        yield
        has_failed = False
    finally:
        ends.set()
        thread.join()
        try:
            mirror.copy()
        except UserError as error:
            if not has_failed:
                raise
            say(str(error))
