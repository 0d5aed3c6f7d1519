"""The reference model's features of every training pair, computed once and kept beside the shards.

One safetensors file per shard, rows in the order of the shard, keyed by the dense sample index. Each file names
the reference, the data and the rows it holds; a file of anything else, or a missing row, is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from experiments.clip.errors import UserError
from experiments.clip.files import write_atomically
from experiments.clip.models import Clip
from experiments.clip.shards import Manifest, Sample, Shard, read_samples

_BATCH = 512


class FeatureCache:
    """Unit features of all samples of a split, looked up by sample index.

    Parameters
    ----------
    image, text : Tensor ``[n, d]``
        Features in sample order.
    present : Tensor ``[n]`` of bool
        Which rows were computed.
    """

    def __init__(self, image: Tensor, text: Tensor, present: Tensor) -> None:
        self._image, self._text, self._present = image, text, present

    def __len__(self) -> int:
        return len(self._present)

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return image and text features ``[b, d]`` of samples ``index`` ``[b]``, float32, on ``device``.

        Raises
        ------
        UserError
            If a sample has no row.
        """
        inside = (index >= 0) & (index < len(self))
        absent = ~inside | ~self._present[index.clamp(0, len(self) - 1)]
        if bool(absent.any()):
            raise UserError(
                f"the reference features of sample {int(index[absent][0])} are missing: "
                "run `run.py cache-reference` on this data again"
            )
        return self._image[index].to(device).float(), self._text[index].to(device).float()

    def spread(self, sample: int = 1024) -> float:
        """Return the standard deviation of the reference's margins ``r_ij - r_ii``, j != i, over its first pairs.

        The temperature of a steered run is chosen relative to it: early in training the excess pair loss is the
        reference's margin, and weights ``exp(-margin / temperature)`` at a much smaller temperature sit on the
        reference's easiest negatives.
        """
        image, text = self.rows(torch.arange(min(sample, len(self))))
        similarity = image @ text.T
        margins = similarity - similarity.diagonal()[:, None]
        return margins[~torch.eye(len(margins), dtype=torch.bool)].std().item()


def cache_features(
    clip: Clip, manifest: Manifest, split: str, folder: Path, progress: Callable[[int], None] | None = None
) -> int:
    """Compute the features of every pair of a split, shard by shard; return how many were computed now.

    Shards whose file is already there are kept, so that an interrupted run goes on.
    """
    computed = 0
    for shard in manifest.splits[split].shards:
        path = _path(folder, shard)
        identity = _identity(clip, manifest, split, shard)
        if path.is_file():
            _check(path, identity)
        else:
            samples = islice(read_samples(manifest, split, start=shard.first_index), shard.samples)
            data = _features(clip, samples, shard)
            write_atomically(path, save(data, identity))
            computed += shard.samples
        if progress is not None:
            progress(shard.first_index + shard.samples)
    return computed


def open_features(clip: Clip, manifest: Manifest, split: str, folder: Path) -> FeatureCache:
    """Read the features of a split; refuse files made by another reference or on other data."""
    total = manifest.splits[split].samples
    image = text = torch.empty(0)
    present = torch.zeros(total, dtype=torch.bool)
    for shard in manifest.splits[split].shards:
        path = _path(folder, shard)
        if not path.is_file():
            raise UserError(f"reference features {path} are missing: run `run.py cache-reference` on this data")
        _check(path, _identity(clip, manifest, split, shard))
        with _opened(path) as file:
            tensors = {name: file.get_tensor(name) for name in ("index", "image", "text")}
        if image.numel() == 0:
            width = tensors["image"].shape[1]
            image = torch.zeros(total, width, dtype=tensors["image"].dtype)
            text = torch.zeros_like(image)
        index = tensors["index"]
        image[index], text[index] = tensors["image"], tensors["text"]
        present[index] = True
    if not bool(present.all()):
        raise UserError(
            f"reference features in {folder} lack sample {int((~present).nonzero()[0])}: "
            "delete the folder and run `run.py cache-reference` again"
        )
    return FeatureCache(image, text, present)


@torch.no_grad()
def _features(clip: Clip, samples: Iterator[Sample], shard: Shard) -> dict[str, Tensor]:
    index: list[int] = []
    image: list[Tensor] = []
    text: list[Tensor] = []
    while batch := list(islice(samples, _BATCH)):
        index += [sample.index for sample in batch]
        image.append(clip.encode_image(torch.stack([clip.preprocess(sample.image) for sample in batch])))
        text.append(clip.encode_text([sample.caption for sample in batch]))
    expected = list(range(shard.first_index, shard.first_index + shard.samples))
    if index != expected:
        raise UserError(
            f"shard {shard.name} does not hold samples {expected[0]} to {expected[-1]}: prepare the data again"
        )
    rows = {"image": torch.cat(image), "text": torch.cat(text)}
    for name, values in rows.items():
        if not bool(torch.isfinite(values).all()):
            raise UserError(f"the reference gives non-finite {name} features on shard {shard.name}: check its weights")
    return {
        "index": torch.tensor(index),
        **{name: values.half().contiguous() for name, values in rows.items()},
    }


def _path(folder: Path, shard: Shard) -> Path:
    return folder / f"{Path(shard.name).with_suffix('').as_posix().replace('/', '-')}.safetensors"


def _identity(clip: Clip, manifest: Manifest, split: str, shard: Shard) -> dict[str, str]:
    rows = {"first_index": shard.first_index, "samples": shard.samples}
    return {
        "reference": clip.fingerprint,
        "data": manifest.fingerprint,
        "split": split,
        "rows": json.dumps(rows),
    }


def _opened(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"reference features {path} are damaged ({error}): delete the file and cache again") from error


def _check(path: Path, identity: dict[str, str]) -> None:
    with _opened(path) as file:
        stored = file.metadata() or {}
    for key, value in identity.items():
        if stored.get(key) != value:
            raise UserError(
                f"reference features {path} were made for another {key}: delete their folder or choose another --cache"
            )
