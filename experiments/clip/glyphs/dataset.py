"""Image-caption data sets in webdataset shards with a manifest, written completely or not at all."""

import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from webdataset.pipeline import DataPipeline
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from ..data.reader import MAX_PIXELS
from ..errors import UserError
from ..io.files import sync

Progress = Callable[[int], None]

FORMAT = 1

_MANIFEST = "manifest.json"
_MEMBERS = ("png", "txt", "json")
_PROGRESS_EVERY = 256
_REMEDY = "delete the folder or choose another with --cache"
# webdataset takes what follows the first dot for the member's type, and skips names like __this__.
_KEY = re.compile(r"(?!__)[A-Za-z0-9_-]{1,90}")


class GlyphPair(NamedTuple):
    """An image, or the bytes of a PNG, and its caption, to be written under ``key``."""

    key: str
    image: Image.Image | bytes
    caption: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class StoredPair:
    """A pair as read back: ``index`` is its place in the split, ``image`` is RGB."""

    index: int
    key: str
    image: Image.Image
    caption: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class GlyphShard:
    """One tar file; ``name`` is its path within the data set's folder."""

    name: str
    samples: int
    first_index: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class GlyphSplit:
    """The shards of a split; a sample's index is its shard's ``first_index`` plus its position there."""

    name: str
    shards: tuple[GlyphShard, ...]
    samples: int


@dataclass(frozen=True)
class Manifest:
    """A complete data set on disk.

    ``vocabulary`` lists the distinct true captions of all splits, over which zero-shot naming chooses;
    ``fingerprint`` hashes the format, the settings, the vocabulary and the shards.
    """

    folder: Path
    settings: dict[str, Any]
    splits: dict[str, GlyphSplit]
    vocabulary: tuple[str, ...]
    fingerprint: str


def write_dataset(
    folder: Path,
    splits: Mapping[str, Iterable[GlyphPair]],
    settings: dict[str, Any],
    *,
    vocabulary: Sequence[str] = (),
    extra: Mapping[str, bytes] | None = None,
    shard_size: int = 4096,
    progress: Progress | None = None,
) -> Manifest:
    """Write a data set, completely or not at all, and return its manifest.

    Everything goes to a sibling folder ``.NAME.partial-PID`` that is renamed at the end, so a process killed
    at any moment leaves nothing that `open_dataset` accepts; the next write removes what dead processes left.
    When several processes (not threads) write one folder, the first wins and the others return its data set.

    Parameters
    ----------
    folder
        Where the data set goes. If it is there already, complete and of equal settings, it is returned as it is.
    splits
        The pairs of each split, in the order of their indices.
    settings
        What the data set was made from, in JSON's types: `open_dataset` compares it.
    vocabulary
        The distinct captions among which zero-shot naming chooses.
    extra
        Other files of the folder, by name.
    shard_size
        Samples per shard.
    progress
        Called now and then, and at the end, with the number of samples written so far.
    """
    folder = Path(folder).resolve()
    scratch = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    report = progress or (lambda written: None)
    with _disk_errors("write", folder):
        if (existing := open_dataset(folder, settings)) is not None:
            return existing
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"the folder {folder} holds other files but no {_MANIFEST}: {_REMEDY}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        scratch.mkdir()
        try:
            written = itertools.count(1)
            entries = {
                name: _write_split(scratch, name, pairs, shard_size, written, report) for name, pairs in splits.items()
            }
            report(next(written) - 1)
            for name, data in (extra or {}).items():
                (scratch / name).write_bytes(data)
            document = {
                "format": FORMAT,
                "settings": json.loads(_canonical(settings)),
                "vocabulary": list(vocabulary),
                "splits": entries,
            }
            document["fingerprint"] = _digest(_canonical(document))
            _publish(scratch, folder, json.dumps(document, indent=1))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if (manifest := open_dataset(folder, settings)) is None:
        raise UserError(f"another process filled or removed the folder {folder}: {_REMEDY}")
    return manifest


def _write_split(
    scratch: Path, name: str, pairs: Iterable[GlyphPair], size: int, written: Iterator[int], report: Progress
) -> list[dict[str, Any]]:
    (scratch / name).mkdir()
    rest = iter(pairs)
    keys: set[str] = set()
    shards: list[dict[str, Any]] = []
    while batch := list(itertools.islice(rest, size)):
        path = scratch / name / f"{len(shards):05d}.tar"
        with path.open("wb") as stream, TarWriter(stream, mtime=0, encoder=False) as writer:
            for key, image, caption, meta in batch:
                if not _KEY.fullmatch(key) or key in keys:
                    raise ValueError(f"the key {key!r} must match {_KEY.pattern} and occur once in its split")
                keys.add(key)
                sample = {"png": _png(image), "txt": caption.encode(), "json": _canonical(meta)}
                writer.write({"__key__": key, **sample})
                if (count := next(written)) % _PROGRESS_EVERY == 0:
                    report(count)
        data = path.read_bytes()
        first = len(shards) * size
        shards.append(asdict(GlyphShard(f"{name}/{path.name}", len(batch), first, len(data), _digest(data))))
    return shards


def _png(image: Image.Image | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def _publish(scratch: Path, folder: Path, manifest: str) -> None:
    (scratch / _MANIFEST).write_text(manifest, encoding="utf-8")
    for path in (*scratch.rglob("*"), scratch):
        sync(path)
    try:
        os.rename(scratch, folder)
    except OSError as error:
        # Another writer was first: the caller opens what that one wrote.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    sync(folder.parent)


def _remove_abandoned(folder: Path) -> None:
    prefix = f".{folder.name}.partial-"
    for path in folder.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdecimal() and not _is_other_process(int(pid)):
            shutil.rmtree(path)


def _is_other_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid != os.getpid()


@contextmanager
def _disk_errors(action: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"cannot {action} the data set {folder} ({error}): choose another with --cache"
        raise UserError(message) from error


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def open_dataset(folder: Path, settings: dict[str, Any] | None = None) -> Manifest | None:
    """Open a data set; None if the folder is absent or has no manifest.

    `UserError` is raised if the manifest cannot be understood, a shard is missing or has another size than it
    says, or ``settings`` are given and differ from those that the data set was made from.
    """
    folder = Path(folder).resolve()
    with _disk_errors("read", folder):
        try:
            text = (folder / _MANIFEST).read_bytes()
        except FileNotFoundError:
            return None
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']!r}, this program reads {FORMAT}")
        fingerprint = document.pop("fingerprint")
        if fingerprint != _digest(_canonical(document)):
            raise ValueError("its fingerprint does not match its contents")
        stored = dict(document["settings"])
        vocabulary = tuple(document["vocabulary"])
        splits: dict[str, GlyphSplit] = {}
        for name, entries in document["splits"].items():
            shards = tuple(GlyphShard(**entry) for entry in entries)
            splits[name] = GlyphSplit(name, shards, sum(shard.samples for shard in shards))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot understand {folder / _MANIFEST} ({error!r}): {_REMEDY}") from error
    wanted = stored if settings is None else json.loads(_canonical(settings))
    changes = [
        f"{key} is {stored.get(key)!r} there and {wanted.get(key)!r} here"
        for key in sorted(stored | wanted)
        if stored.get(key) != wanted.get(key)
    ]
    if changes:
        raise UserError(f"the data set {folder} has other settings ({', '.join(changes)}): {_REMEDY}")
    for shard in (shard for split in splits.values() for shard in split.shards):
        path = folder / shard.name
        with _disk_errors("read", folder):
            size = path.stat().st_size if path.exists() else None
        if size != shard.bytes:
            problem = "is missing" if size is None else f"has {size} bytes, not the {shard.bytes} written"
            raise UserError(f"the shard {path} {problem}: {_REMEDY}")
    return Manifest(folder, stored, splits, vocabulary, fingerprint)


def verify(manifest: Manifest) -> None:
    """Check the contents of all shards against the manifest; `UserError` names the first that differs."""
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        path = manifest.folder / shard.name
        with _disk_errors("read", manifest.folder):
            digest = _digest(path.read_bytes())
        if digest != shard.sha256:
            raise UserError(f"the shard {path} has the SHA-256 {digest}, not {shard.sha256}: {_REMEDY}")


def read_samples(manifest: Manifest, split: str, *, start: int = 0) -> Iterator[StoredPair]:
    """Read a split in the order of its indices, from the index ``start`` on.

    Only PNG, text and JSON members are decoded; whatever else a shard holds is passed over unread.
    `UserError` is raised if there is no such split, or a shard is damaged: unreadable, with more or fewer
    samples than the manifest says, or with a sample that lacks image or caption or has more than
    ``MAX_PIXELS`` pixels.
    """
    if split not in manifest.splits:
        names = ", ".join(manifest.splits)
        raise UserError(f"the data set in {manifest.folder} has no split {split!r}: choose one of {names}")
    if not 0 <= start <= manifest.splits[split].samples:
        raise ValueError(f"start is {start}: choose one from 0 to {manifest.splits[split].samples}")
    shards = (shard for shard in manifest.splits[split].shards if shard.first_index + shard.samples > start)
    return itertools.chain.from_iterable(_read_shard(manifest.folder / s.name, s, start) for s in shards)


def read_shard(manifest: Manifest, shard: GlyphShard) -> Iterator[StoredPair]:
    """Read one shard, as `read_samples` reads all of a split."""
    return _read_shard(manifest.folder / shard.name, shard, 0)


def _read_shard(path: Path, shard: GlyphShard, start: int) -> Iterator[StoredPair]:
    index, end = shard.first_index, shard.first_index + shard.samples
    try:
        with path.open("rb") as stream:
            # Not the class WebDataset: it deals shards out to workers, which would shift the indices, takes
            # characters of the path for URL syntax, and leaves the file open.
            for members in DataPipeline(
                lambda: iter([{"url": str(path), "stream": stream}]),
                partial(tar_file_expander, select_files=lambda name: name.partition(".")[2] in _MEMBERS),
                group_by_keys,
            ):
                if index == end:
                    raise UserError(f"the shard {path} holds more than {shard.samples} samples: {_REMEDY}")
                if index >= start:
                    yield _decode(members, index, path)
                index += 1
    except (OSError, tarfile.TarError, EOFError, ValueError, zlib.error) as error:
        # webdataset appends its streams to the arguments of the errors that pass through it.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error.args[0]
        raise UserError(f"the shard {path} breaks off at sample {index} ({reason}): {_REMEDY}") from error
    if index < end:
        raise UserError(f"the shard {path} ends before sample {index} of {end}: {_REMEDY}")


def _decode(members: dict[str, Any], index: int, path: Path) -> StoredPair:
    key = members["__key__"]
    sample = f"the sample {index} ({key}) of the shard {path}"
    if missing := {"png", "txt"} - members.keys():
        raise UserError(f"{sample} lacks its member .{min(missing)}: {_REMEDY}")
    try:
        image = Image.open(io.BytesIO(members["png"]), formats=("PNG",))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS}")
        meta = dict(json.loads(members.get("json", b"{}")))
        return StoredPair(index, key, image.convert("RGB"), members["txt"].decode("utf-8"), meta)
    # Pillow does not document what its decoders raise on damaged files.
    except Exception as error:
        raise UserError(f"{sample} cannot be decoded ({error}): {_REMEDY}") from error
