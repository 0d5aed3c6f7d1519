"""The work of a scan: what its sources name, and which parts were done before."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..io.storage import file_version, is_remote
from .scan import CHUNK, ScanJob, Shard, canonical, digest_of
from .sources import PIPE, Source, Synthetic, Table, expand, is_pattern, table_paths
from .subset import Subset

_JOURNAL = "journal.jsonl"
_CONCURRENT = 16


def jobs_of(
    sources: Sequence[Source],
    folder: Path,
    image_keys: tuple[str, ...],
    caption_keys: tuple[str, ...],
    run_pipe_commands: bool,
    subset: Subset | None,
    checksums: bool,
) -> Iterator[tuple[int, ScanJob | list[Shard]]]:
    """Yield the number of each source with its jobs, or with its shards if nothing needs to be read."""
    seen: set[str] = set()
    with ThreadPoolExecutor(_CONCURRENT) as pool:
        for number, source, paths in _named(sources, folder, run_pipe_commands, seen, subset):
            if isinstance(source, Synthetic):
                yield number, _made_up(source)
                continue
            for path, (size, version) in zip(paths, pool.map(file_version, paths), strict=True):
                stamp = (size, (version or 0) if is_remote(path) else int(version))
                own = replace(source, path=path) if isinstance(source, Table) and is_pattern(source.path) else source
                yield number, ScanJob(own, path, stamp, folder, image_keys, caption_keys, subset, checksums)


def _made_up(source: Synthetic) -> list[Shard]:
    sizes = [min(CHUNK, source.samples - first) for first in range(0, source.samples, CHUNK)]
    path = f"synthetic:{source.samples}:{source.pixels}"
    return [Shard("synthetic", path, 0, size, pixels=source.pixels) for size in sizes]


def _named(
    sources: Sequence[Source], folder: Path, run_pipe_commands: bool, seen: set[str], subset: Subset | None
) -> Iterator[tuple[int, Source, list[str]]]:
    """Yield the number of each source with the files that it names."""
    for number, source in enumerate(sources):
        if isinstance(source, Synthetic):
            if subset is not None:
                raise UserError(f"synthetic:{source.samples} has no uids of a subset: leave out one of them")
            yield number, source, []
            continue
        paths = table_paths(source) if isinstance(source, Table) else expand(source.pattern)
        for path in paths:
            if path in seen:
                raise UserError(f"{path} is listed twice: list it once and give its source a weight")
            seen.add(path)
        yield number, source, [_pipe_output(p, folder, run_pipe_commands) if p.startswith(PIPE) else p for p in paths]


def _pipe_output(source: str, folder: Path, run_pipe_commands: bool) -> str:
    """Return the tar file that a command writes; the command is run if there is no such file yet."""
    command = source.removeprefix(PIPE)
    if not run_pipe_commands:
        raise UserError(
            f"the data {source!r} would run a shell command: allow it by --run-pipe-commands, or name files"
        )
    path = folder / "pipes" / f"{digest_of(command.encode())[:24]}.tar"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, check=True)
            partial.replace(path)
        except subprocess.CalledProcessError as error:
            reason = " ".join(error.stderr.decode(errors="replace").split())[-200:]
            raise UserError(f"the command {command!r} ended with {error.returncode} ({reason})") from error
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): free space") from error
        finally:
            partial.unlink(missing_ok=True)
    return str(path)


class Journal:
    """The finished jobs: a line of JSON for each, appended after its index files are written.

    Attributes
    ----------
    done : dict
        The shards of each finished job whose files are there, by the job's name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / _JOURNAL
        self.done: dict[str, list[Shard]] = {}
        try:
            lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        except OSError as error:
            raise UserError(f"cannot read {self._path} ({error.strerror})") from error
        for line in lines:
            # A line that was being written when the process died is ignored.
            try:
                job, records = json.loads(line)
                shards = [Shard(**record) for record in records]
                if all(map(self._has_files, shards)):
                    self.done[job] = shards
            except (ValueError, TypeError, RecursionError):
                continue

    def add(self, job: str, shards: list[Shard]) -> None:
        """Record the shards of a finished job."""
        self.done[job] = shards
        records = [dataclasses.asdict(shard) for shard in shards]
        try:
            with self._path.open("ab") as file:
                # The line feed first ends an incomplete line, if there is one.
                file.write(b"\n" + canonical([job, records]) + b"\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path} ({error.strerror}): free space") from error

    def _has_files(self, shard: Shard) -> bool:
        files = [(shard.index, shard.index_bytes)] + [(shard.path, shard.bytes)] * (shard.kind == "table")
        paths = [(self._folder / name, size) for name, size in files]
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)
