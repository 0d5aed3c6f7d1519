"""Reading samples of a catalog in any order, and decoding them without trusting their contents.

Nothing that a sample contains is executed. A sample that cannot be used becomes a `Skip` with one of a few reasons,
which the caller counts.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..catalog.catalog import Catalog, data_path, open_index
from ..catalog.scan import ABSENT, Shard, json_field, stored_captions
from ..io.storage import MAX_GAP, Range, Ranges

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_BYTES = 64 * 2**20
MAX_CAPTION_BYTES = 2**20
# No tokenizer's context is as long, and open_clip's tokenizer takes time quadratic in the length of a word.
MAX_CAPTION_CHARACTERS = 4096
MAX_PIXELS = 64 * 2**20
# Every scan of a progressive JPEG decodes all of its pixels, and a small file can have a million scans.
MAX_SCANNED_PIXELS = 32 * MAX_PIXELS
# Enlarging the shorter side of a line of pixels to the model's size would make an image as large as any bomb.
MAX_ASPECT = 200
# Number of samples that may be skipped before their share is compared with the limit.
SKIPS_ALLOWED = 64

Reason = Literal[
    "too many bytes",  # of the image, or of a caption
    "cut off",  # the file ends before the sample does
    "no image file",  # at the path that a table has
    "unreadable image",  # damaged, or in another format than JPEG, PNG and WebP
    "too many pixels",  # or too many scans over them in a progressive JPEG
    "extreme aspect ratio",
    "invalid caption",  # all of them: not UTF-8, not JSON, or without the field
    "empty caption",
]

# Bytes of samples that are read together, unless one alone has more.
_READ_BYTES = 32 * 2**20
# Chances that a draw chooses among weighted sources of captions.
_DRAWS = 2**32


@dataclass(frozen=True)
class Skip:
    """A sample that cannot be used."""

    index: int
    reason: Reason


@dataclass(frozen=True)
class RawSample:
    """The bytes of a sample; a caption comes with the JSON field that holds it, or None if it is plain text.

    ``weights`` are those of the captions' sources, where these are weighted.
    """

    index: int
    key: str
    image: bytes
    captions: tuple[tuple[bytes, str | None], ...]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A decoded sample; ``image`` is RGB."""

    index: int
    image: Image.Image
    caption: str


class Storage(Protocol):
    """Where byte ranges are read from."""

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Return up to ``size`` bytes from ``offset``; fewer only where the file ends."""
        ...

    def read_many(self, wanted: Sequence[Range]) -> list[bytes]:
        """Return the bytes of ranges."""
        ...


class Rows(NamedTuple):
    """A copy of the rows of a shard's index that are of samples ``first`` to ``stop``."""

    first: int
    stop: int
    rows: np.ndarray


class Reader:
    """Reads samples by index. A reader can be copied to other processes, forked or spawned.

    Parameters
    ----------
    kept : int
        Number of shards that stay open: at least as many as are read in turn.
    caption_weights : sequence of float
        Weights of the sources of captions, positive; see `decode`.
    storage : Storage, optional
        Where bytes are read from, if not where the catalog says.
    """

    def __init__(
        self,
        catalog: Catalog,
        kept: int = 64,
        caption_weights: Sequence[float] = (),
        storage: Storage | None = None,
    ) -> None:
        self._catalog, self._kept, self._weights = catalog, kept, tuple(caption_weights)
        self._ranges = Ranges(kept) if storage is None else storage
        self._rows: dict[int, np.ndarray] = {}
        self._fields = tuple(json_field(key) for key in catalog.caption_keys)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_rows": {}}

    def read(self, index: int) -> RawSample | Skip:
        """Return a sample's bytes.

        Raises
        ------
        UserError
            If the storage fails, even after retries.
        """
        return next(self.read_many([index]))

    def read_many(self, indices: Sequence[int], held: Sequence[Rows] = ()) -> Iterator[RawSample | Skip]:
        """Yield the bytes of several samples, of which a few megabytes at a time are read together.

        ``held`` are rows that need not be looked up.
        """
        held = sorted(held, key=_first)
        part: list[_ReadPlan | RawSample | Skip] = []
        size = 0
        for index in indices:
            plan = self._plan(index, held)
            own = sum(each[2] for each in plan.ranges) if isinstance(plan, _ReadPlan) else 0
            if part and size + own > _READ_BYTES:
                yield from self._read_part(part)
                part, size = [], 0
            part.append(plan)
            size += own
        yield from self._read_part(part)

    def _read_part(self, plans: Sequence[_ReadPlan | RawSample | Skip]) -> Iterator[RawSample | Skip]:
        wanted = [each for plan in plans if isinstance(plan, _ReadPlan) for each in plan.ranges]
        data = iter(self._ranges.read_many(wanted))
        for plan in plans:
            yield plan if not isinstance(plan, _ReadPlan) else self._assemble(plan, [next(data) for _ in plan.ranges])

    def rows(self, first: int, stop: int) -> Rows:
        """Return the rows of the samples ``first`` to ``stop`` of one shard."""
        shard, row = self._catalog.locate(first)
        return Rows(first, stop, np.array(self._index(shard)[row : row + stop - first]))

    def places(self, rows: Rows) -> tuple[str, list[tuple[int, int]]]:
        """Return the file that holds the samples, and start and end of each member of them that is ever read."""
        path = data_path(self._catalog, self._catalog.locate(rows.first)[0])
        images, captions = rows.rows["image"], rows.rows["caption"]
        is_read = (images[:, 1] <= MAX_IMAGE_BYTES) & (captions[..., 1] <= MAX_CAPTION_BYTES).all(1)
        members = np.concatenate([images[is_read][:, None], captions[is_read]], axis=1).reshape(-1, 2)
        members = members[members[:, 1] >= 0]
        return path, [(int(offset), int(offset + size)) for offset, size in members]

    def _plan(self, index: int, held: Sequence[Rows]) -> _ReadPlan | RawSample | Skip:
        shard, row = self._catalog.locate(index)
        if shard.kind == "synthetic":
            caption = f"made-up pair number {index}".encode()
            return RawSample(index, str(index), _made_up_image(shard.pixels, index % 251), ((caption, None),))
        own = held[place - 1] if (place := bisect_right(held, index, key=_first)) else None
        if own is not None and index < own.stop:
            entry = own.rows[index - own.first]
        else:
            entry = self._index(shard)[row]
        places = [(int(offset), int(size)) for offset, size in (entry["image"], *entry["caption"])]
        places[1:] = [place if place[1] <= MAX_CAPTION_BYTES else ABSENT for place in places[1:]]
        if places[0][1] > MAX_IMAGE_BYTES or all(place == ABSENT for place in places[1:]):
            return Skip(index, "too many bytes")
        present = [place for place in places if place[1] >= 0]
        first, end = min(offset for offset, _ in present), max(offset + size for offset, size in present)
        path = data_path(self._catalog, shard)
        if end - first <= sum(size for _, size in present) + MAX_GAP:
            ranges = [(path, first, end - first)]
        else:
            ranges = [(path, offset, size) for offset, size in present]
        return _ReadPlan(index, shard, entry["key"].decode("utf-8", "surrogateescape"), places, ranges)

    def _assemble(self, plan: _ReadPlan, data: list[bytes]) -> RawSample | Skip:
        if any(len(part) < size for part, (_, _, size) in zip(data, plan.ranges, strict=True)):
            return Skip(plan.index, "cut off")
        if len(data) == 1:
            start = plan.ranges[0][1]
            parts = [data[0][offset - start : offset - start + size] for offset, size in plan.places if size >= 0]
        else:
            parts = data
        rest = iter(parts)
        image, *captions = (next(rest) if size >= 0 else None for _, size in plan.places)
        assert image is not None
        if plan.shard.kind == "table":
            found = self._image_file(os.path.join(os.fsencode(plan.shard.root), image))
            if not isinstance(found, bytes):
                return Skip(plan.index, found)
            image = found
            members = [stored_captions(caption) if caption is not None else None for caption in captions]
        else:
            members = [
                (caption, field) if caption is not None else None
                for caption, field in zip(captions, self._fields, strict=True)
            ]
        weights = tuple(
            weight for weight, member in zip(self._weights, members, strict=bool(self._weights)) if member is not None
        )
        return RawSample(plan.index, plan.key, image, tuple(m for m in members if m is not None), weights)

    def _image_file(self, path: bytes) -> bytes | Reason:
        try:
            is_file, size = os.path.isfile(path), os.path.getsize(path)
        except (OSError, ValueError):
            return "no image file"
        if not is_file:
            return "no image file"
        if size > MAX_IMAGE_BYTES:
            return "too many bytes"
        return self._ranges.read(os.fsdecode(path), 0, size)

    def _index(self, shard: Shard) -> np.ndarray:
        rows = self._rows.pop(shard.first_index, None)
        if rows is None:
            while len(self._rows) >= self._kept:
                del self._rows[next(iter(self._rows))]
            rows = open_index(self._catalog, shard)
        self._rows[shard.first_index] = rows
        return rows


def _first(rows: Rows) -> int:
    return rows.first


@dataclass(frozen=True)
class _ReadPlan:
    """The ranges of bytes to read for a sample, and offset and size of its members in them, the image first."""

    index: int
    shard: Shard
    key: str
    places: list[tuple[int, int]]
    ranges: list[Range]


def decode(raw: RawSample, draw: int = 0) -> Pair | Skip:
    """Decode image and caption, and cut the caption to `MAX_CAPTION_CHARACTERS`.

    Sources of captions are read each on its own: what one of them lacks, or holds that is no caption, is passed over.

    Parameters
    ----------
    draw : int
        Chooses among several captions: the caption of number ``draw`` modulo their count. Where sources are weighted,
        the lower 32 bits choose one with that probability among those that have a caption, the others among its own.
    """
    caption = _caption(raw, draw)
    if isinstance(caption, _Refused):
        return Skip(raw.index, caption.reason)
    image = _image(raw.image)
    if isinstance(image, _Refused):
        return Skip(raw.index, image.reason)
    return Pair(raw.index, image, caption)


def first_pairs(catalog: Catalog, count: int) -> list[tuple[Image.Image, str]]:
    """Return image and caption of the first ``count`` samples, without those that cannot be used."""
    return pairs_at(catalog, range(min(count, len(catalog))))


def pairs_at(catalog: Catalog, indices: Sequence[int]) -> list[tuple[Image.Image, str]]:
    """Return image and caption of some samples, without those that cannot be used."""
    found = [raw if isinstance(raw, Skip) else decode(raw) for raw in Reader(catalog).read_many(indices)]
    return [(pair.image, pair.caption) for pair in found if not isinstance(pair, Skip)]


def decode_image(data: bytes) -> Image.Image:
    """Return an image as RGB, decoded as `decode` does; raise `ValueError` with the reason where it cannot be used."""
    image = _image(data)
    if isinstance(image, _Refused):
        raise ValueError(image.reason)
    return image


class _Refused(NamedTuple):
    reason: Reason


def _caption(raw: RawSample, draw: int) -> str | _Refused:
    sources = [_captions(data, field) for data, field in raw.captions]
    usable = [captions for captions in sources if captions]
    if not usable:
        return _Refused("invalid caption" if None in sources else "empty caption")
    if raw.weights:
        weights = [weight for weight, captions in zip(raw.weights, sources, strict=True) if captions]
        captions, draw = usable[_drawn(weights, draw % _DRAWS)], draw // _DRAWS
    else:
        captions = [caption for own in usable for caption in own]
    caption = captions[draw % len(captions)]
    return caption if len(caption) <= MAX_CAPTION_CHARACTERS else caption.strip()[:MAX_CAPTION_CHARACTERS]


def _captions(data: bytes, field: str | None) -> list[str] | None:
    """Return the captions of one source, none if all are empty; None if it holds something else."""
    try:
        # Some programs begin a text with a byte order mark.
        text = data.decode("utf-8-sig")
        value = text if field is None else json.loads(text)[field]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    values = value if isinstance(value, list) else [value]
    captions = [each for each in values if isinstance(each, str) and _is_text(each)]
    return None if len(captions) < len(values) and not captions else [each for each in captions if each.strip()]


def _is_text(value: str) -> bool:
    """Whether a string is valid Unicode: JSON can contain halves of surrogate pairs."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _drawn(weights: Sequence[float], draw: int) -> int:
    """Return the number of the weight that a draw below `_DRAWS` falls on."""
    share = draw / _DRAWS * sum(weights)
    return min(bisect_right(list(accumulate(weights)), share), len(weights) - 1)


def _image(data: bytes) -> Image.Image | _Refused:
    # Pillow warns about damage that it repairs and about bombs; both are handled here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
            pixels = image.width * image.height
            if pixels > MAX_PIXELS or pixels * scans > MAX_SCANNED_PIXELS:
                return _Refused("too many pixels")
            if max(image.size) > MAX_ASPECT * min(image.size):
                return _Refused("extreme aspect ratio")
            return _in_rgb(image)
        except Image.DecompressionBombError:
            return _Refused("too many pixels")
        except MemoryError:
            raise
        # Pillow does not document what its decoders raise on damaged files.
        except Exception:
            return _Refused("unreadable image")


def _in_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB; of 16 bits of gray the upper 8 stay, where Pillow would make all above 255 white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


@lru_cache(maxsize=251)  # all shades of a size
def _made_up_image(pixels: int, shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (pixels, pixels), (shade, 255 - shade, shade // 2)).save(data, "PNG", compress_level=1)
    return data.getvalue()
