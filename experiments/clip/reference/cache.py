"""The reference model's features of every sample of a catalog, computed once and looked up while training.

There is one file for each shard, named by the shard's digest, so that it keeps its value when shards are added, left
out or put in another order. It holds the tensor ``features`` ``[samples, views, 2, width]`` (image and text, unit
length, float16 or bfloat16), whose rows are in the order of the shard, ``present`` ``[samples]``, which tells the
samples that could be decoded, and ``checksums`` ``[samples, views]``, the CRC-32 of each row's bytes, which is compared
whenever the row is read. Its metadata identify the reference, the shard and the rows; a file that was made for others,
or a missing row, is an error.

With one view, features are those of the reference's evaluation preprocessing and the first caption. With several, view
v is a random crop (the reference's training preprocessing) and caption number v, both functions of the shard, the row
and v alone, so that the target can use the same crop and caption.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..catalog.catalog import Catalog, shard_digest
from ..catalog.scan import Shard
from ..data.batch import Tensors
from ..data.draws import Draws, random_state_restored, view_draws
from ..data.prefetch import copied_ahead
from ..data.reader import SKIPS_ALLOWED, Reader, Skip, decode
from ..distributed import ONE_PROCESS, Ranks
from ..errors import PROGRAM, UserError
from ..io.files import ensure_writable, write_atomically
from ..io.workers import Workers
from ..models.clip import Clip
from .margins import SPREAD_PAIRS, margin_spread

Precision = Literal["float16", "bfloat16"]
TowerPrecision = Literal["float32", "bfloat16"]

_TOWERS: TowerPrecision = "float32"  # of files that do not say it
_AGAIN = f"run `{PROGRAM} cache-reference` on this data again"
_CONCURRENT_CHECKS = 16
_MAPPED = 256  # files that are mapped into memory at a time
T = TypeVar("T")


class CachedReference:
    """Looks up the reference's unit features of a catalog's samples: a `data.batch.Reference`.

    A batch carries the features. The files are mapped into memory; a copy in another process maps them anew.

    Attributes
    ----------
    views : int
        Number of cached views of each sample.
    """

    def __init__(self, folder: Path, catalog: Catalog, views: int, precision: Precision) -> None:
        self.views = views
        self._folder, self._catalog, self._firsts = folder, catalog, np.array(catalog.shards.firsts)
        self._digests: OrderedDict[int, str] = OrderedDict()
        self._dtype: torch.dtype = getattr(torch, precision)
        self._first = int(np.searchsorted(self._firsts, 0, side="right")) - 1  # shards before it are empty
        self._mapped: OrderedDict[int, _File] = OrderedDict()

    def __len__(self) -> int:
        return len(self._catalog)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": OrderedDict()}

    def draws(self, index: int, draws: Draws) -> Draws:
        """Return the draws that give the target the caption of the cached view and, with several views, its crop."""
        if self.views == 1:
            return draws._replace(choice=0)
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        row = index - int(self._firsts[shard])
        return view_draws(_seed(self._digest(shard)), row, draws.choice % self.views)

    def image(self, image: Image.Image, draws: Draws) -> None:
        """Return None: features that are cached need no image."""

    def collate(
        self, index: Tensor, draws: Sequence[Draws], images: Sequence[Tensor | None], captions: Sequence[str]
    ) -> Tensors:
        """Return the features of a batch, as stored."""
        return self.rows(index, torch.tensor([own.choice for own in draws], dtype=torch.int64))

    def empty_inputs(self) -> Tensors:
        """Return the features ``[0, d]`` of a batch without samples."""
        return self.rows(torch.empty(0, dtype=torch.int64))

    def features(self, inputs: Tensors, device: torch.device) -> Tensors:
        """Return a batch's features ``[b, d]``, image and text, in float32."""
        image, text = (part.to(device, non_blocking=True).float() for part in inputs)
        return image, text

    def margin_spread(self, pairs: int) -> float:
        """Return `margin_spread` over the first ``pairs`` samples, at most `SPREAD_PAIRS` and those of one file."""
        return margin_spread(*self.first(min(pairs, SPREAD_PAIRS)))

    def rows(self, index: Tensor, view: Tensor | int = 0) -> Tensors:
        """Return image and text features ``[b, d]``, as stored, of samples ``index`` ``[b]`` in views ``view`` ``[b]``.

        Raises
        ------
        UserError
            If a sample has no row.
        """
        numbers, views = index.numpy(), np.broadcast_to(np.asarray(view), index.shape)
        absent = (numbers < 0) | (numbers >= len(self))
        shards = np.searchsorted(self._firsts, numbers, side="right") - 1
        found = np.empty((len(numbers), *self._file(self._first).features.shape[2:]), np.uint16)
        for shard in np.unique(shards[~absent]):
            file = self._file(int(shard))
            here = np.flatnonzero((shards == shard) & ~absent)
            rows = numbers[here] - self._firsts[shard]
            absent[here] = file.present[rows] == 0
            if absent[here].any():
                break
            found[here] = self._checked(int(shard), rows, views[here])
        if absent.any():
            raise UserError(f"the reference features of sample {numbers[absent][0]} are missing: {_AGAIN}")
        both = torch.from_numpy(found).view(self._dtype)
        # Pinned memory keeps strides, and what is not contiguous is copied to a device by way of other memory.
        return both[:, 0].contiguous(), both[:, 1].contiguous()

    def first(self, count: int) -> Tensors:
        """Return the features of the first ``count`` samples of the first file that have features, in float32."""
        _, image, text = self._of_file(self._first, count)
        return image, text

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield, file by file, the indices ``[m]`` of all samples that have features, and these, in float32.

        Of several views it is the first.
        """
        for shard in np.flatnonzero(self._catalog.shards.samples).tolist():
            yield self._of_file(shard, None)

    def _of_file(self, shard: int, count: int | None) -> tuple[Tensor, Tensor, Tensor]:
        rows = np.flatnonzero(self._file(shard).present)[:count]
        found = self._checked(shard, rows, np.zeros(len(rows), np.int64))
        both = torch.from_numpy(found).view(self._dtype).float()
        return torch.from_numpy(rows + int(self._firsts[shard])), both[:, 0], both[:, 1]

    def _checked(self, shard: int, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return rows ``[b, 2, width]`` of a file, as 16-bit integers, whose checksums are those that were stored."""
        file = self._file(shard)
        found = file.features[rows, views]
        if file.checksums is not None:
            wrong = np.flatnonzero(_checksums(found) != file.checksums[rows, views])
            if len(wrong):
                sample = self._firsts[shard] + rows[wrong[0]]
                raise UserError(
                    f"the reference features of sample {sample} in {_path(self._folder, self._digest(shard))} are not "
                    "as they were written, their checksum differs: delete the file and cache again"
                )
        return found

    def _file(self, shard: int) -> _File:
        return _kept(self._mapped, shard, lambda: _map(_path(self._folder, self._digest(shard))))

    def _digest(self, shard: int) -> str:
        return _kept(self._digests, shard, lambda: shard_digest(self._catalog, self._catalog.shards[shard]))


def _kept(cache: OrderedDict[int, T], key: int, make: Callable[[], T]) -> T:
    """Return ``cache[key]``, which is made if it is not there; those that were used last stay."""
    if key not in cache:
        while len(cache) >= _MAPPED:
            cache.popitem(last=False)
        cache[key] = make()
    cache.move_to_end(key)
    return cache[key]


def cache_features(
    clip: Clip,
    catalog: Catalog,
    folder: Path,
    *,
    views: int = 1,
    precision: Precision = "float16",
    towers: TowerPrecision = "float32",
    batch_size: int = 256,
    workers: int = 0,
    ranks: Ranks | None = None,
    skip_limit: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compute the features of all samples, each rank those of its shards; return the number computed by this rank.

    Files that exist are kept, so that an interrupted run resumes; where shards were added to the data, only they are
    computed.

    Parameters
    ----------
    precision : str
        That of the features on disk.
    towers : str
        That of the towers, by autocast.
    batch_size : int
        Number of samples that go through the towers at a time.
    workers : int
        Number of processes of this rank that read and decode; 0 for this one.
    skip_limit : float
        Largest share of a shard's samples that may be unusable, once more than `SKIPS_ALLOWED` are.
    progress : callable
        Called with the number of this rank's samples that are done, and their total.

    Raises
    ------
    UserError
        If a file was made for something else or cannot be written, or if too many samples are unusable.
    """
    ranks = Ranks() if ranks is None else ranks
    own = np.flatnonzero(catalog.shards.samples).tolist()[ranks.rank :: ranks.count]
    samples = catalog.shards.samples
    total = int(samples[own].sum())
    ensure_writable(folder)
    paths = {number: _path(folder, shard_digest(catalog, catalog.shards[number])) for number in own}
    identities = {number: _identity(clip, catalog, catalog.shards[number], views, precision, towers) for number in own}
    missing = [number for number in own if not paths[number].is_file()]
    for number in own:
        if number not in missing:
            _check(paths[number], identities[number])
    parts = {number: _parts(catalog.shards[number], batch_size) for number in missing}
    pool: Workers[tuple[int, int], _Inputs] = Workers(
        _InputMaker(catalog, clip, views), workers, pin_memory=ranks.device.type == "cuda"
    )
    done = total - int(samples[missing].sum())
    computed = 0
    if progress is not None:
        progress(done, total)
    if not missing:
        return 0
    # Readers and copies go on over the end of a shard, and its file is written beside the next one's computation.
    inputs = copied_ahead(pool.map(itertools.chain.from_iterable(parts.values())), ranks.device)
    encoder = _Encoder(clip, views, precision, towers, skip_limit)
    with closing(pool), ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for number in missing:
            shard = catalog.shards[number]
            tensors = encoder.features(itertools.islice(inputs, len(parts[number])), shard)
            if written is not None:
                written.result()
            written = writer.submit(_write, paths[number], tensors, identities[number])
            computed += shard.samples
            if progress is not None:
                progress(done + computed, total)
        if written is not None:
            written.result()
    return computed


def _parts(shard: Shard, size: int) -> list[tuple[int, int]]:
    """Return first and stop of the samples that go through the towers together."""
    end = shard.first_index + shard.samples
    return [(k, min(k + size, end)) for k in range(shard.first_index, end, size)]


def _write(path: Path, tensors: dict[str, Tensor], identity: dict[str, str]) -> None:
    write_atomically(path, save(tensors, identity))


def open_features(clip: Clip, catalog: Catalog, folder: Path, ranks: Ranks = ONE_PROCESS) -> CachedReference:
    """Open the cached features of a catalog; refuse files that were made by another reference or from other data.

    Each rank checks a share of the files (collective).
    """
    full = np.flatnonzero(catalog.shards.samples).tolist()
    first = _path(folder, shard_digest(catalog, catalog.shards[full[0]]))
    made = _metadata(first) if first.is_file() else {}
    views, precision = int(made.get("views", 1)), cast(Precision, made.get("precision", "float16"))
    towers = cast(TowerPrecision, made.get("towers", _TOWERS))

    def check(number: int) -> str:
        shard = catalog.shards[number]
        path = _path(folder, shard_digest(catalog, shard))
        if not path.is_file():
            return f"reference features of {shard.path} are missing in {folder}: {_AGAIN}"
        _check(path, _identity(clip, catalog, shard, views, precision, towers))
        return ""

    def check_own() -> None:
        with ThreadPoolExecutor(_CONCURRENT_CHECKS) as pool:
            for problem in pool.map(check, full[ranks.rank :: ranks.count]):
                if problem:
                    raise UserError(problem)

    ranks.run_on_all_or_fail(check_own)
    return CachedReference(folder, catalog, views, precision)


class _Inputs(NamedTuple):
    """The reference's inputs of m samples: ``image`` ``[m * views, 3, h, w]``, ``text`` ``[m * views, length]``."""

    indices: list[int]
    image: Tensor
    text: Tensor
    skipped: dict[str, int]

    def of_each(self, change: Callable[[Tensor], Tensor]) -> _Inputs:
        """Return the inputs with both tensors changed."""
        return self._replace(image=change(self.image), text=change(self.text))


class _InputMaker:
    """Reads and decodes samples ``first`` to ``stop`` for the reference, in this process or in a worker."""

    def __init__(self, catalog: Catalog, clip: Clip, views: int) -> None:
        self._catalog, self._reader, self._views = catalog, Reader(catalog), views
        self._tokenize = clip.tokenize
        self._transform = clip.in_bytes(clip.preprocess if views == 1 else clip.augment)

    def __call__(self, key: tuple[int, int]) -> _Inputs:
        indices: list[int] = []
        images: list[Tensor] = []
        captions: list[str] = []
        skipped: Counter[str] = Counter()
        with random_state_restored():
            for raw in self._reader.read_many(range(*key)):
                pairs = [raw if isinstance(raw, Skip) else decode(raw, view) for view in range(self._views)]
                if isinstance(pairs[0], Skip):
                    skipped[pairs[0].reason] += 1
                    continue
                indices.append(raw.index)
                shard, row = self._catalog.locate(raw.index)
                seed = _seed(shard_digest(self._catalog, shard)) if self._views > 1 else 0
                for view, pair in enumerate(pairs):
                    assert not isinstance(pair, Skip)
                    view_draws(seed, row, view).seed_generators()
                    images.append(self._transform(pair.image))
                    captions.append(pair.caption)
        if not indices:
            return _Inputs([], torch.empty(0), torch.empty(0), dict(skipped))
        return _Inputs(indices, torch.stack(images), self._tokenize(captions), dict(skipped))


class _Encoder(NamedTuple):
    """Computes the reference's features of a shard."""

    clip: Clip
    views: int
    precision: Precision
    towers: TowerPrecision
    skip_limit: float

    @torch.no_grad()
    def features(self, parts: Iterable[_Inputs], shard: Shard) -> dict[str, Tensor]:
        """Return the tensors of the shard's file; a GPU is not waited for before all of its work is queued."""
        rows: list[Tensor] = []
        indices: list[int] = []
        skipped: Counter[str] = Counter()
        for part in parts:
            skipped.update(part.skipped)
            if part.indices:
                rows.append(self._encoded(part))
                indices += part.indices
        self._refuse_too_many(skipped, shard)
        present = torch.zeros(shard.samples, dtype=torch.uint8)
        at = torch.tensor(indices, dtype=torch.int64) - shard.first_index
        present[at] = 1
        found = self._finite(torch.cat(rows), shard) if rows else self._none()
        features = torch.zeros(shard.samples, self.views, *found.shape[1:], dtype=found.dtype)
        features[at] = found.unflatten(0, (len(at), self.views))
        sums = _checksums(features.flatten(0, 1).view(torch.int16).numpy())
        checksums = torch.from_numpy(sums.view(np.int32)).unflatten(0, (shard.samples, self.views))
        return {"features": features, "present": present, "checksums": checksums}

    def _encoded(self, part: _Inputs) -> Tensor:
        """Return features ``[m * views, 2, width]`` in float32."""
        kind = self.clip.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.towers == "bfloat16"):
            image, text = self.clip.encode_image(part.image), self.clip.encode_tokens(part.text)
        return torch.stack([image.float(), text.float()], dim=1)

    def _finite(self, both: Tensor, shard: Shard) -> Tensor:
        """Return features as they are stored, on the CPU."""
        if not bool(torch.isfinite(both).all()):
            raise UserError(f"the reference gives features that are not finite on {shard.path}: check its weights")
        return both.to(getattr(torch, self.precision)).cpu()

    def _none(self) -> Tensor:
        width = self.clip.encode_tokens(self.clip.tokenize(["none"])).shape[1]
        return torch.zeros(0, 2, width, dtype=getattr(torch, self.precision))

    def _refuse_too_many(self, skipped: Counter[str], shard: Shard) -> None:
        if skipped.total() > max(SKIPS_ALLOWED, self.skip_limit * shard.samples):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common())
            raise UserError(
                f"{skipped.total()} of the {shard.samples} samples of {shard.path} cannot be used ({reasons}): "
                f"correct the data, or raise the limit of {self.skip_limit:g}"
            )


def _checksums(rows: np.ndarray) -> np.ndarray:  # [b, ...] -> [b]
    return np.fromiter((crc32(row) for row in np.ascontiguousarray(rows)), np.uint32, len(rows))


def _path(folder: Path, digest: str) -> Path:
    return folder / f"features-{digest[:32]}.safetensors"


def _seed(digest: str) -> int:
    """Return the number that stands for a shard where views are drawn."""
    return int(digest[:16], 16)


def _identity(
    clip: Clip, catalog: Catalog, shard: Shard, views: int, precision: Precision, towers: TowerPrecision
) -> dict[str, str]:
    return {
        "reference": clip.fingerprint,
        "shard": shard_digest(catalog, shard),
        "checksum": shard.sha256,
        "views": str(views),
        "precision": precision,
        "towers": towers,
    }


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"reference features {path} are damaged ({error}): delete the file and cache again") from error


def _check(path: Path, identity: dict[str, str]) -> None:
    stored = _metadata(path)
    for key, value in identity.items():
        found = stored.get(key, _TOWERS if key == "towers" else None)
        if key == "checksum" and not (found and value):  # a catalog without checksums does not say
            continue
        if found != value:
            raise UserError(
                f"reference features {path} were made for another {key}, {found} instead of {value}: "
                "delete the file or choose another folder"
            )


class _File(NamedTuple):
    """A file's features ``[samples, views, 2, width]``, as 16-bit integers; checksums, which older files lack."""

    features: np.ndarray
    present: np.ndarray
    checksums: np.ndarray | None


def _map(path: Path) -> _File:
    """Map a safetensors file: 8 bytes with the length of its header, the header in JSON, the bytes of the tensors."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))

        def tensor(name: str, dtype: type) -> np.ndarray:
            return np.memmap(path, dtype, "r", 8 + size + header[name]["data_offsets"][0], tuple(header[name]["shape"]))

        checksums = tensor("checksums", np.uint32) if "checksums" in header else None
        return _File(tensor("features", np.uint16), tensor("present", np.uint8), checksums)
    except (OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(f"reference features {path} cannot be read ({error}): {_AGAIN}") from error
