"""A catalog of training data: a dense stable index for every sample, and where its image and captions are.

`catalog.scan` defines what a sample is. Samples are numbered in the order of sources, shards and
members, and named by their index, because keys may repeat within a shard and across shards. Those without an image or a
caption are left out, and counted by reason.

In the catalog's folder, ``catalog.json`` names the files that list the shards (`catalog.shards`), and
``index/`` holds an npy file for each of them, with the offsets and sizes of its samples' members. ``journal.jsonl``
records each shard when its scan is finished, so that an interrupted scan resumes, and a scan of more shards, or of
changed ones, reads only those.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import PROGRAM, UserError
from ..io.files import ensure_writable, write_json
from ..io.storage import digest_once, file_version, is_remote, open_once, open_seekable, retry
from ..io.workers import Workers
from .index import map_index
from .jobs import Journal, jobs_of
from .layout import layout_hint
from .scan import (
    FORMAT,
    ScanJob,
    Shard,
    canonical,
    digest_of,
    file_digest,
    heads_digest,
    scan,
)
from .shards import Shards, open_shards, remove_other_shards, write_shards
from .sources import (
    Source,
    Table,
    TarPattern,
    parse_sources,
    parse_weights,
)
from .subset import Subset

#: What of the shards is compared with the catalog, beside sizes and headers.
Check = Literal["time", "checksum"]
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("txt",)

_CATALOG = "catalog.json"
_CATALOG_FORMAT = 2
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
    checksums: bool = False,
) -> Catalog:
    """Scan the data and write its catalog; an earlier scan is resumed, and unchanged shards are not scanned again.

    Only headers of local shards are read; a remote shard is read once, in one stream.

    Parameters
    ----------
    sources
        See `catalog.sources.parse_sources`.
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
    checksums : bool
        Whether to keep the SHA-256 of each tar file, for which local ones are read as a whole too.

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
    if "json" in caption_keys and any(source.kind == TarPattern.kind for source in parsed):
        raise UserError(
            "--caption-key json would take whole documents for captions: name the field with the caption, like "
            "json:caption"
        )
    jobs = list(jobs_of(parsed, folder, tuple(image_keys), caption_keys, run_pipe_commands, subset, checksums))
    journal = Journal(folder)
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


def open_catalog(folder: Path, *, verify: bool = True, check: Check | None = None) -> Catalog:
    """Read the catalog in a folder.

    Parameters
    ----------
    verify : bool
        Whether to `check_shards`, all of them.
    check : "time" or "checksum", optional
        As for `check_shards`.

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
        check_shards(catalog, range(len(catalog.shards)), check)
    return catalog


def check_shards(catalog: Catalog, numbers: Iterable[int], check: Check | None = None) -> None:
    """Check that shards of these numbers still have their sizes and, if local, the headers of first and last samples.

    Parameters
    ----------
    check : "time" or "checksum", optional
        What to check beside: that no shard has been written since, or, by reading all of them, that none has changed.

    Raises
    ------
    UserError
        If one no longer fits.
    """
    with ThreadPoolExecutor(_CONCURRENT_CHECKS) as pool:
        for problem in pool.map(lambda number: _problem(catalog, catalog.shards[number], check), numbers):
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


def shard_digest(catalog: Catalog, shard: Shard) -> str:
    """Return a digest of what a shard is, whatever other shards its catalog has: equal ones have the same samples.

    It is of the name (not the folder), size and index, and of the types of members that are images and captions.
    """
    what = [*_described(shard), shard.first_index if shard.kind == "synthetic" else 0]
    return digest_of(canonical([FORMAT, catalog.image_keys, catalog.caption_keys, what]))


def _problem(catalog: Catalog, shard: Shard, check: Check | None) -> str:
    if shard.kind == "synthetic":
        return ""
    path, index = data_path(catalog, shard), str(catalog.folder / shard.index)
    for each, size in ((path, shard.bytes), (index, shard.index_bytes)):
        if not is_remote(each) and not os.path.isfile(each):
            return f"{each} is missing"
        now, version = file_version(each)
        if now != size:
            return f"{each} has {now} bytes, not {size}"
        if each == path and check == "time" and shard.kind == "tar" and version != shard.version:
            return f"{path} has been written since, it is of {version or 'unknown'}, not {shard.version or 'unknown'}"
    if shard.kind != "tar":
        return ""
    if shard.samples and not is_remote(path):
        rows = open_index(catalog, shard, verify=False)  # readers do, each when it first needs the index
        with open_seekable(path) as file:
            if heads_digest(file, [int(rows["image"][row, 0]) for row in (0, -1)]) != shard.heads:
                return f"{path} holds other samples"
    return _changed(shard) if check == "checksum" else ""


def _changed(shard: Shard) -> str:
    """Return what is wrong with the contents of a tar file, empty if nothing is."""
    if not shard.sha256:
        return f"it has no checksum of {shard.path}, which `{PROGRAM} catalog --checksums` keeps"

    def digest() -> str:
        with open_once(shard.path, shard.bytes) as file:
            return digest_once(file)

    return "" if retry(digest, shard.path) == shard.sha256 else f"{shard.path} has changed, its checksum differs"


def _hint(shards: Iterable[Shard], image_keys: tuple[str, ...], caption_keys: tuple[str, ...]) -> str:
    for shard in shards:
        if "URL" in shard.left_out:
            return "download its images, into shards by img2dataset --output_format webdataset"
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
        [kind, name, size, samples, shard.first_index, index, pixels]
        for shard in shards
        for kind, name, size, samples, index, pixels in [_described(shard)]
    ]
    return digest_of(canonical([FORMAT, image_keys, caption_keys, described]))


def _described(shard: Shard) -> tuple[str, str, int, int, str, int]:
    name = shard.heads if shard.kind == "table" else os.path.basename(shard.path)
    return shard.kind, name, shard.bytes, shard.samples, shard.index_sha256, shard.pixels
