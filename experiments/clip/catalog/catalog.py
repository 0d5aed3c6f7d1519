"""A catalog of training data: a dense stable index for every sample, and where its image and captions are.

`experiments.clip.catalog.scan` defines what a sample is. Samples are numbered in the order of sources, shards and
members, and named by their index, because keys may repeat within a shard and across shards. Those without an image or a
caption are left out, and counted by reason.

In the catalog's folder, ``catalog.json`` names the files that list the shards (`experiments.clip.catalog.shards`), and
``index/`` holds an npy file for each of them, with the offsets and sizes of its samples' members. ``journal.jsonl``
records each shard when its scan is finished, so that an interrupted scan resumes, and a scan of more shards, or of
changed ones, reads only those.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.clip.catalog.index import map_index
from experiments.clip.catalog.layout import layout_hint
from experiments.clip.catalog.scan import (
    CHUNK,
    FORMAT,
    ScanJob,
    Shard,
    canonical,
    digest_of,
    file_digest,
    heads_digest,
    scan,
)
from experiments.clip.catalog.shards import Shards, open_shards, remove_other_shards, write_shards
from experiments.clip.catalog.sources import (
    PIPE,
    Source,
    Synthetic,
    Table,
    TarPattern,
    expand,
    is_pattern,
    parse_sources,
    parse_weights,
    table_paths,
)
from experiments.clip.catalog.subset import Subset
from experiments.clip.errors import UserError
from experiments.clip.io.files import ensure_writable, write_json
from experiments.clip.io.storage import file_size, is_remote, open_seekable
from experiments.clip.io.workers import Workers

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("txt",)

_CATALOG = "catalog.json"
_CATALOG_FORMAT = 2
_JOURNAL = "journal.jsonl"
_CONCURRENT_CHECKS = 16


@dataclass(frozen=True)
class Catalog:
    """All samples of the data.

    ``fingerprint`` is a digest of the shards' names (not their folders), sizes and indices, and of the types of members
    that are images and captions. Catalogs of equal fingerprints give every sample the same index.
    """

    folder: Path
    sources: tuple[dict[str, Any], ...]
    image_keys: tuple[str, ...]
    caption_keys: tuple[str, ...]
    shards: Shards
    fingerprint: str
    subset: Subset | None = None

    def __len__(self) -> int:
        return int(self.shards.firsts[-1] + self.shards.samples[-1])

    @property
    def left_out(self) -> dict[str, int]:
        """Number of samples and members that were left out of all shards, by reason."""
        return dict(sum((Counter(shard.left_out) for shard in self.shards), Counter()))

    @property
    def damaged(self) -> list[str]:
        """A line for each damaged shard that says where and how it is damaged."""
        return [f"{shard.path}: {shard.damage}" for shard in self.shards if shard.damage]

    def hint(self) -> str:
        """Return what may help where samples were left out, by the first shard of which some were; empty if unknown."""
        return _hint(self.shards, self.image_keys, self.caption_keys)

    def locate(self, index: int) -> tuple[Shard, int]:
        """Return the shard of a sample and the sample's row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no sample {index}: the catalog has {len(self)}")
        shard = self.shards[int(np.searchsorted(self.shards.firsts, index, side="right")) - 1]
        return shard, index - shard.first_index

    def shard_weights(self, weights: Sequence[float] | None) -> list[float] | None:
        """Return the weight of each shard, which is that of its source; None for no weights."""
        if weights is None:
            return None
        if len(weights) != len(self.sources):
            raise UserError(f"there are {len(weights)} weights for {len(self.sources)} sources: give one for each")
        return np.asarray(weights, np.float64)[self.shards.sources].tolist()

    def caption_weights(self, text: str) -> list[float]:
        """Parse a weight for each source of captions: for each type of member, and each column of every table."""
        counts = {len(own["captions"]) for own in self.sources if own["kind"] == Table.kind}
        counts |= {len(self.caption_keys)} if any(own["kind"] == TarPattern.kind for own in self.sources) else set()
        if len(counts) != 1:
            raise UserError(
                f"the weights {text!r} are for sources of captions, of which this catalog's data has "
                f"{' or '.join(map(str, sorted(counts))) or 'none'}: leave them out"
            )
        weights = parse_weights(text, counts.pop(), "sources of captions")
        if not all(0 < weight < math.inf for weight in weights):
            raise UserError(f"the weights {text!r} must be positive: make the catalog without captions of no weight")
        return weights


def make_catalog(
    sources: str | Path | Source | Sequence[str | Path | Source],
    folder: Path,
    *,
    image_keys: Sequence[str] = IMAGE_KEYS,
    caption_key: str | Sequence[str] = CAPTION_KEYS,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    run_pipe_commands: bool = False,
    subset: Subset | None = None,
) -> Catalog:
    """Scan the data and write its catalog; an earlier scan is resumed, and unchanged shards are not scanned again.

    Only headers are read; but of a remote shard this means most of its blocks, once.

    Parameters
    ----------
    sources
        See `experiments.clip.catalog.sources.parse_sources`.
    folder : Path
        Where the catalog is written. Tables, and the output of ``pipe:`` commands, are copied into it.
    image_keys : sequence of str
        Types of members that are images; a sample's image is its member of the first of these types.
    caption_key : str or sequence of str
        Types of members that are captions; ``json:FIELD`` is a field of the member ``json``, a string or a list of
        strings. A sample may have several captions, among which one is drawn for each visit.
    workers : int
        Number of processes that scan; 0 for this one.
    progress : callable
        Called with the number of tar files and tables that are scanned, and their total.
    run_pipe_commands : bool
        Whether to run the shell commands of ``pipe:`` sources, which are refused otherwise.
    subset : Subset, optional
        The samples to take, each as many times as it is named. Of these the member ``json`` is read too.

    Raises
    ------
    UserError
        If data is missing, listed twice or compressed, or has no sample at all.
    """
    folder = Path(folder).resolve()
    parsed = parse_sources(sources)
    caption_keys = (caption_key,) if isinstance(caption_key, str) else tuple(caption_key)
    if not image_keys or not caption_keys or not all((*image_keys, *caption_keys)):
        raise UserError(f"images {list(image_keys)} and captions {list(caption_keys)} must each have a type of member")
    ensure_writable(folder)
    jobs = list(_jobs(parsed, folder, tuple(image_keys), caption_keys, run_pipe_commands, subset))
    journal = _Journal(folder)
    todo = [job for _, job in jobs if isinstance(job, ScanJob) and job.name not in journal.done]
    total = sum(isinstance(job, ScanJob) for _, job in jobs)
    pool: Workers[ScanJob, list[Shard]] = Workers(scan, min(workers, len(todo)))
    try:
        for done, (job, scanned) in enumerate(zip(todo, pool.map(todo), strict=True), start=total - len(todo) + 1):
            journal.add(job.name, scanned)
            if progress is not None:
                progress(done, total)
    finally:
        pool.close()
    shards: list[Shard] = []
    first = 0
    for source, job in jobs:
        for shard in journal.done[job.name] if isinstance(job, ScanJob) else job:
            shards.append(dataclasses.replace(shard, source=source, first_index=first))
            first += shards[-1].samples
    if not first:
        left_out = sum((Counter(shard.left_out) for shard in shards), Counter())
        reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items()) or "no members"
        hint = _hint(shards, tuple(image_keys), caption_keys) or "check --image-key, --caption-key and files"
        raise UserError(f"the data has no sample with image and caption ({reasons}): {hint}")
    return write_catalog(folder, parsed, tuple(image_keys), caption_keys, shards, subset)


def write_catalog(
    folder: Path,
    sources: Sequence[Source],
    image_keys: tuple[str, ...],
    caption_keys: tuple[str, ...],
    shards: Sequence[Shard],
    subset: Subset | None = None,
) -> Catalog:
    """Write the files of a catalog of shards that were scanned, and return it."""
    digests = write_shards(folder, shards)
    fingerprint = _fingerprint(shards, image_keys, caption_keys)
    described = tuple(_describe(source) for source in sources)
    catalog = Catalog(folder, described, image_keys, caption_keys, open_shards(folder, digests), fingerprint, subset)
    write_json(folder / _CATALOG, _document(catalog, digests))
    remove_other_shards(folder, digests)
    return catalog


def open_catalog(folder: Path, *, verify: bool = True) -> Catalog:
    """Read the catalog in a folder.

    Parameters
    ----------
    verify : bool
        Whether to `check_shards`, all of them.

    Raises
    ------
    UserError
        If there is no catalog, it cannot be parsed, or it no longer fits the data.
    """
    folder = Path(folder).resolve()
    path = folder / _CATALOG
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != _CATALOG_FORMAT:
            raise ValueError(f"its format is {document['format']!r}, this program reads {_CATALOG_FORMAT}")
        if document["checksum"] != _checksum(document):
            raise ValueError("it is not as it was written, its checksum differs")
        catalog = Catalog(
            folder,
            tuple(document["sources"]),
            tuple(document["image_keys"]),
            tuple(document["caption_keys"]),
            open_shards(folder, document["shards"]),
            document["fingerprint"],
            Subset(**document["subset"]) if "subset" in document else None,
        )
    except FileNotFoundError as error:
        if path.exists():
            raise UserError(f"{error.filename} is missing: make the catalog again") from error
        raise UserError(f"there is no catalog in {folder}: make it from the data first") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot understand {path} ({error!r}): make the catalog again") from error
    if verify:
        check_shards(catalog, range(len(catalog.shards)))
    return catalog


def check_shards(catalog: Catalog, numbers: Iterable[int]) -> None:
    """Check that shards of these numbers still have their sizes and, if local, the headers of first and last samples.

    Raises
    ------
    UserError
        If one no longer fits.
    """
    with ThreadPoolExecutor(_CONCURRENT_CHECKS) as pool:
        for problem in pool.map(lambda number: _problem(catalog, catalog.shards[number]), numbers):
            if problem:
                raise UserError(f"the catalog {catalog.folder} no longer fits: {problem}: make it again")


def data_path(catalog: Catalog, shard: Shard) -> str:
    """Return the path or URL of the file that a shard's index points into."""
    return str(catalog.folder / shard.path) if shard.kind == "table" else shard.path


def open_index(catalog: Catalog, shard: Shard, *, verify: bool = True) -> np.ndarray:
    """Map a shard's index, whose checksum the catalog holds: a structured array with a row for each sample.

    The fields ``image`` [2] and ``caption`` [k, 2] hold offset and size of each member; ``key`` is the sample's key. A
    caption that a sample lacks has the size -1.
    """
    path = catalog.folder / shard.index
    try:
        if verify and file_digest(path) != shard.index_sha256:
            raise ValueError("it is not as it was written, its checksum differs")
        rows = map_index(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): make the catalog again") from error
    captions = len(catalog.caption_keys) if shard.kind == "tar" else None
    if len(rows) != shard.samples or captions not in (None, rows.dtype["caption"].shape[0]):
        raise UserError(f"{path} is not the index of {shard.path}: make the catalog again")
    return rows


def _problem(catalog: Catalog, shard: Shard) -> str:
    if shard.kind == "synthetic":
        return ""
    index = catalog.folder / shard.index
    for path, size in ((data_path(catalog, shard), shard.bytes), (str(index), shard.index_bytes)):
        if not is_remote(path) and not os.path.isfile(path):
            return f"{path} is missing"
        if (now := file_size(path)) != size:
            return f"{path} has {now} bytes, not {size}"
    if shard.kind == "tar" and shard.samples and not is_remote(shard.path):
        rows = open_index(catalog, shard, verify=False)  # readers do, each when it first needs the index
        with open_seekable(shard.path) as file:
            if heads_digest(file, [int(rows["image"][row, 0]) for row in (0, -1)]) != shard.heads:
                return f"{shard.path} holds other samples"
    return ""


def _jobs(
    sources: Sequence[Source],
    folder: Path,
    image_keys: tuple[str, ...],
    caption_keys: tuple[str, ...],
    run_pipe_commands: bool,
    subset: Subset | None,
) -> Iterator[tuple[int, ScanJob | list[Shard]]]:
    """Yield the number of each source with its jobs, or with its shards if nothing needs to be read."""
    seen: set[str] = set()
    for number, source in enumerate(sources):
        if isinstance(source, Synthetic):
            if subset is not None:
                raise UserError(f"synthetic:{source.samples} has no uids of a subset: leave out one of them")
            sizes = [min(CHUNK, source.samples - first) for first in range(0, source.samples, CHUNK)]
            path = f"synthetic:{source.samples}:{source.pixels}"
            yield number, [Shard("synthetic", path, 0, size, pixels=source.pixels) for size in sizes]
            continue
        for path in table_paths(source) if isinstance(source, Table) else expand(source.pattern):
            if path in seen:
                raise UserError(f"{path} is listed twice: list it once and give its source a weight")
            seen.add(path)
            if path.startswith(PIPE):
                path = _pipe_output(path, folder, run_pipe_commands)
            size = file_size(path)
            modified = 0 if is_remote(path) else os.stat(path).st_mtime_ns
            own = replace(source, path=path) if isinstance(source, Table) and is_pattern(source.path) else source
            yield number, ScanJob(own, path, (size, modified), folder, image_keys, caption_keys, subset)


def _pipe_output(source: str, folder: Path, run_pipe_commands: bool) -> str:
    """Return the tar file that a command writes; the command is run if there is no such file yet."""
    command = source.removeprefix(PIPE)
    if not run_pipe_commands:
        raise UserError(
            f"the data {source!r} would run a shell command: allow it with run_pipe_commands, or name files"
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


class _Journal:
    """The finished jobs: a line of JSON for each, appended after its index files are written."""

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


def _hint(shards: Iterable[Shard], image_keys: tuple[str, ...], caption_keys: tuple[str, ...]) -> str:
    for shard in shards:
        if shard.kind == "tar" and {"no image", "no caption"} & set(shard.left_out):
            return layout_hint(shard.path, shard.bytes, image_keys, caption_keys)
    return ""


def _describe(source: Source) -> dict[str, Any]:
    # In JSON's types, so that it equals what is read back.
    return json.loads(canonical({"kind": source.kind, **dataclasses.asdict(source)}))


def _checksum(document: dict[str, Any]) -> str:
    return digest_of(canonical({key: value for key, value in document.items() if key != "checksum"}))


def _document(catalog: Catalog, digests: dict[str, str]) -> dict[str, Any]:
    document = {
        "format": _CATALOG_FORMAT,
        "fingerprint": catalog.fingerprint,
        "samples": len(catalog),
        "left_out": catalog.left_out,
        "sources": catalog.sources,
        "image_keys": catalog.image_keys,
        "caption_keys": catalog.caption_keys,
        "shards": digests,
    }
    if catalog.subset is not None:
        document["subset"] = dataclasses.asdict(catalog.subset)
    return document | {"checksum": _checksum(document)}


def _fingerprint(shards: Sequence[Shard], image_keys: tuple[str, ...], caption_keys: tuple[str, ...]) -> str:
    described = [
        [
            shard.kind,
            shard.heads if shard.kind == "table" else os.path.basename(shard.path),
            shard.bytes,
            shard.samples,
            shard.first_index,
            shard.index_sha256,
            shard.pixels,
        ]
        for shard in shards
    ]
    return digest_of(canonical([FORMAT, image_keys, caption_keys, described]))
