"""The reference model's features of every sample of a catalog, computed once, in one file for each shard.

A file ``features-00012.safetensors`` holds the tensor ``features`` ``[samples, views, 2, width]`` (image and text, unit
length, float16 or bfloat16), rows in the order of the shard, and ``present`` ``[samples]``: which could be decoded. Its
metadata name the reference, the data and the rows; a file of anything else, or a missing row, is an error.

One view is the reference's own evaluation preprocessing and the first caption. With several, view v is a random crop
(the reference's own training preprocessing) and caption number v, both functions of the sample's index and v alone, so
that the target can be shown the same crop and caption.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from experiments.clip.data.catalog import Catalog
from experiments.clip.data.draws import Draws, random_state_restored, view_draws
from experiments.clip.data.reader import SKIPS_ALLOWED, Reader, Skip, decode
from experiments.clip.data.scan import Shard
from experiments.clip.distributed import Ranks
from experiments.clip.errors import UserError
from experiments.clip.io.files import ensure_writable, write_atomically
from experiments.clip.io.workers import Workers
from experiments.clip.models.clip import Clip

Precision = Literal["float16", "bfloat16"]

_AGAIN = "run `run.py cache-reference` on this data again"
_CONCURRENT_CHECKS = 16
_MAPPED = 256  # files mapped at a time


class FeatureCache:
    """Unit features of all samples of a catalog, mapped into memory; copies in other processes map the files anew.

    Attributes
    ----------
    views : int
        Of each sample.
    """

    def __init__(self, files: list[Path], firsts: np.ndarray, samples: int, views: int, precision: Precision) -> None:
        self.views = views
        self._files, self._firsts, self._samples = files, firsts, samples
        self._dtype: torch.dtype = getattr(torch, precision)
        self._first = int(np.searchsorted(firsts, 0, side="right")) - 1  # shards before it are empty
        self._mapped: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return self._samples

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": OrderedDict()}

    def draws(self, index: int, draws: Draws) -> Draws:
        """Return what the target must draw so that it sees the caption, and of several views the crop, of its row."""
        return draws._replace(choice=0) if self.views == 1 else view_draws(index, draws.choice % self.views)

    def rows(self, index: Tensor, view: Tensor | int = 0) -> tuple[Tensor, Tensor]:
        """Return image and text features ``[b, d]``, as stored, of samples ``index`` ``[b]`` in their views.

        Raises
        ------
        UserError
            If a sample has no row.
        """
        numbers, views = index.numpy(), np.broadcast_to(np.asarray(view), index.shape)
        absent = (numbers < 0) | (numbers >= len(self))
        shards = np.searchsorted(self._firsts, numbers, side="right") - 1
        found = np.empty((len(numbers), *self._file(self._first)[0].shape[2:]), np.uint16)
        for shard in np.unique(shards[~absent]):
            features, present = self._file(int(shard))
            here = np.flatnonzero((shards == shard) & ~absent)
            rows = numbers[here] - self._firsts[shard]
            absent[here] = present[rows] == 0
            if absent[here].any():
                break
            found[here] = features[rows, views[here]]
        if absent.any():
            raise UserError(f"the reference features of sample {numbers[absent][0]} are missing: {_AGAIN}")
        both = torch.from_numpy(found).view(self._dtype)
        return both[:, 0], both[:, 1]

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the features of the first samples that have them, up to ``count``, in float32."""
        features, present = self._file(self._first)
        rows = np.flatnonzero(present)[:count]
        both = torch.from_numpy(np.array(features[rows, 0])).view(self._dtype).float()
        return both[:, 0], both[:, 1]

    def _file(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a file's features ``[samples, views, 2, width]``, as 16-bit numbers, and presence."""
        if shard not in self._mapped:
            while len(self._mapped) >= _MAPPED:
                self._mapped.popitem(last=False)
            self._mapped[shard] = _map(self._files[shard])
        self._mapped.move_to_end(shard)
        return self._mapped[shard]


def cache_features(
    clip: Clip,
    catalog: Catalog,
    folder: Path,
    *,
    views: int = 1,
    precision: Precision = "float16",
    batch_size: int = 256,
    workers: int = 0,
    ranks: Ranks | None = None,
    skip_limit: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compute the features of all samples, the shards dealt out to the ranks; return how many were computed now.

    Files that are there already are kept, so that an interrupted run goes on.

    Parameters
    ----------
    batch_size : int
        Samples that go through the towers at a time.
    workers : int
        Processes of this rank that read and decode; 0 for this one.
    skip_limit : float
        Share of a shard's samples that may turn out to be unusable, once more than `SKIPS_ALLOWED` are.
    progress : callable
        Receives how many samples are done, and of how many, of this rank.

    Raises
    ------
    UserError
        If a file was made otherwise, cannot be written, or too many samples are unusable.
    """
    ranks = Ranks() if ranks is None else ranks
    own = [number for number, shard in enumerate(catalog.shards) if shard.samples][ranks.rank :: ranks.count]
    total = sum(catalog.shards[number].samples for number in own)
    ensure_writable(folder)
    task = _Preparing(Reader(catalog), clip, views)
    pool: Workers[tuple[int, int], _Inputs] = Workers(task, workers, pin_memory=ranks.device.type == "cuda")
    computed = done = 0
    try:
        for number in own:
            shard = catalog.shards[number]
            path = _path(folder, number)
            identity = _identity(clip, catalog, shard, views, precision)
            if path.is_file():
                _check(path, identity)
            else:
                end = shard.first_index + shard.samples
                keys = [(k, min(k + batch_size, end)) for k in range(shard.first_index, end, batch_size)]
                tensors = _encoded(clip, pool.map(keys), shard, views, precision, skip_limit)
                write_atomically(path, save(tensors, identity))
                computed += shard.samples
            done += shard.samples
            if progress is not None:
                progress(done, total)
    finally:
        pool.close()
    return computed


def open_features(clip: Clip, catalog: Catalog, folder: Path) -> FeatureCache:
    """Open the features of a catalog; refuse files made by another reference or on other data."""
    files = [_path(folder, number) for number in range(len(catalog.shards))]
    full = [number for number, shard in enumerate(catalog.shards) if shard.samples]
    made = _metadata(files[full[0]]) if files[full[0]].is_file() else {}
    views, precision = int(made.get("views", 1)), made.get("precision", "float16")

    def check(number: int) -> str:
        if not files[number].is_file():
            return f"reference features {files[number]} are missing: {_AGAIN}"
        _check(files[number], _identity(clip, catalog, catalog.shards[number], views, precision))
        return ""

    with ThreadPoolExecutor(_CONCURRENT_CHECKS) as pool:
        for problem in pool.map(check, full):
            if problem:
                raise UserError(problem)
    firsts = np.array([shard.first_index for shard in catalog.shards])
    return FeatureCache(files, firsts, len(catalog), views, precision)  # pyright: ignore[reportArgumentType]


class _Inputs(NamedTuple):
    """Some samples' views as the reference takes them: ``image`` ``[m * views, 3, h, w]``, ``text`` likewise."""

    index: list[int]
    image: Tensor
    text: Tensor
    skipped: dict[str, int]


class _Preparing:
    """Reads and decodes samples ``first`` to ``stop`` for the reference, in whatever process."""

    def __init__(self, reader: Reader, clip: Clip, views: int) -> None:
        self._reader, self._views = reader, views
        self._tokenize = clip.tokenize
        self._preprocess, self._augment = clip.preprocess, clip.augment

    def __call__(self, key: tuple[int, int]) -> _Inputs:
        index: list[int] = []
        images: list[Tensor] = []
        captions: list[str] = []
        skipped: Counter[str] = Counter()
        with random_state_restored():
            for raw in self._reader.read_many(range(*key)):
                pairs = [raw if isinstance(raw, Skip) else decode(raw, view) for view in range(self._views)]
                if isinstance(pairs[0], Skip):
                    skipped[pairs[0].reason] += 1
                    continue
                index.append(raw.index)
                for view, pair in enumerate(pairs):
                    assert not isinstance(pair, Skip)
                    view_draws(raw.index, view).seed_generators()
                    images.append((self._preprocess if self._views == 1 else self._augment)(pair.image))
                    captions.append(pair.caption)
        if not index:
            return _Inputs([], torch.empty(0), torch.empty(0), dict(skipped))
        return _Inputs(index, torch.stack(images), self._tokenize(captions), dict(skipped))


@torch.no_grad()
def _encoded(
    clip: Clip, parts: Iterator[_Inputs], shard: Shard, views: int, precision: Precision, skip_limit: float
) -> dict[str, Tensor]:
    features: Tensor | None = None
    present = torch.zeros(shard.samples, dtype=torch.uint8)
    skipped: Counter[str] = Counter()
    for part in parts:
        skipped.update(part.skipped)
        if not part.index:
            continue
        both = torch.stack([clip.encode_image(part.image), clip.encode_tokens(part.text)], dim=1)
        if not bool(torch.isfinite(both).all()):
            raise UserError(f"the reference gives features that are not finite on {shard.path}: check its weights")
        rows = both.to(getattr(torch, precision)).cpu().unflatten(0, (len(part.index), views))
        if features is None:
            features = torch.zeros(shard.samples, *rows.shape[1:], dtype=rows.dtype)
        at = torch.tensor(part.index) - shard.first_index
        features[at] = rows
        present[at] = 1
    if skipped.total() > max(SKIPS_ALLOWED, skip_limit * shard.samples):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common())
        raise UserError(
            f"{skipped.total()} of the {shard.samples} samples of {shard.path} cannot be used ({reasons}): "
            f"mend the data, or raise the limit of {skip_limit:g}"
        )
    if features is None:
        width = clip.encode_tokens(clip.tokenize(["none"])).shape[1]
        features = torch.zeros(shard.samples, views, 2, width, dtype=getattr(torch, precision))
    return {"features": features, "present": present}


def _path(folder: Path, number: int) -> Path:
    return folder / f"features-{number:05d}.safetensors"


def _identity(clip: Clip, catalog: Catalog, shard: Shard, views: int, precision: str) -> dict[str, str]:
    return {
        "reference": clip.fingerprint,
        "data": catalog.fingerprint,
        "rows": f"{shard.first_index}+{shard.samples}",
        "views": str(views),
        "precision": precision,
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
        if stored.get(key) != value:
            raise UserError(
                f"reference features {path} were made for another {key}, {stored.get(key)} instead of {value}: "
                "delete their folder or choose another"
            )


def _map(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Map a safetensors file: 8 bytes that say how long its header is, the header in JSON, the tensors' bytes."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        entries = header["features"], header["present"]
        features, present = (
            np.memmap(path, dtype, "r", 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
            for dtype, entry in zip((np.uint16, np.uint8), entries, strict=True)
        )
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"reference features {path} cannot be read ({error}): {_AGAIN}") from error
    return features, present
