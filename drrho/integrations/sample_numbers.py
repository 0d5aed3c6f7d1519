"""The numbers of the samples in the batches of open_clip_train's data loaders, which do not tell them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

_COLUMNS = ("image", "text")  # of open_clip_train's webdatasets
_LIKE = "num_workers pin_memory timeout worker_init_fn multiprocessing_context generator prefetch_factor"


def numbered(
    loader: Any, index: Callable[[str, str], int] | None = None, known: Callable[[], int] | None = None
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Return the loader's batches of images and texts, with the samples' numbers ``[b]``.

    Parameters
    ----------
    loader : DataLoader or webdataset's WebLoader
        As open_clip_train makes them. A webdataset's pipeline is changed.
    index : callable, for webdatasets
        Maps the URL of a sample's shard, and the sample's key, to its number. In other data sets the number is the
        sample's place.
    known : callable, optional
        Returns how many samples have a number, which must be those of a data set that has a length.

    Raises
    ------
    ValueError
        For another loader, a webdataset without ``index``, or a data set with another number of samples.
    """
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return _with_places(loader, known)
    stages = getattr((getattr(loader, "pipeline", None) or [None])[0], "dataset", None)
    chosen = [stage for stage in getattr(stages, "pipeline", []) if getattr(stage, "args", None) == _COLUMNS]
    if len(chosen) != 1:
        raise ValueError(f"the loader must be one of open_clip_train's, got {type(loader).__name__}")
    if index is None:
        raise ValueError("index must map shards and keys to numbers, such as SampleKeys(catalog), for a webdataset")
    chosen[0].args = (*_COLUMNS, "__url__", "__key__")
    return _Named(loader, index)


class _Named:
    """A webdataset's batches, whose samples have a shard and a key."""

    def __init__(self, loader: Any, index: Callable[[str, str], int]) -> None:
        self._loader, self._index = loader, index

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for image, text, shards, keys in self._loader:
            yield image, text, torch.tensor([self._index(*sample) for sample in zip(shards, keys, strict=True)])


class _Placed(Dataset):
    """A data set's samples with their places."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        return *self._dataset[place], place


def _with_places(loader: DataLoader, known: Callable[[], int] | None) -> DataLoader:
    samples: int = len(loader.dataset)  # pyright: ignore[reportArgumentType]
    if known is not None and known() != samples:
        raise ValueError(f"the reference has features of {known()} samples, the data set has {samples}: cache it again")
    if loader.batch_sampler is None or loader.collate_fn is not default_collate:
        raise ValueError("the loader must make batches by torch's default_collate, as open_clip_train's do")
    same: dict[str, Any] = {name: getattr(loader, name) for name in (*_LIKE.split(), "persistent_workers")}
    return DataLoader(_Placed(loader.dataset), batch_sampler=loader.batch_sampler, **same)
