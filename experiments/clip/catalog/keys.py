"""The number of a sample in a catalog, by its shard and its key, which is how webdataset names it."""

from __future__ import annotations

import os
from collections import defaultdict
from functools import lru_cache

import numpy as np

from ..errors import UserError
from .catalog import Catalog, open_index
from .scan import Shard

_OPENED = 256  # indexes that are kept in order at a time


class SampleKeys:
    """Finds samples of a catalog of tar files.

    Raises
    ------
    UserError
        When called, for a shard or a key that the catalog does not have, or has twice.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._shards: dict[str, list[Shard]] = defaultdict(list)
        for shard in catalog.shards:
            self._shards[os.path.basename(shard.path)].append(shard)
        self._ordered = lru_cache(_OPENED)(self._order)

    def __call__(self, url: str, key: str) -> int:
        """Return the number of the sample with this key in the shard with this path or URL."""
        shard = self._shard(url)
        keys, rows = self._ordered(shard.first_index)
        wanted = key.encode("utf-8", "surrogateescape")
        place = int(np.searchsorted(keys, wanted))
        if place == len(keys) or keys[place] != wanted:
            raise UserError(f"{shard.path} has no sample {key!r} in the catalog: make the catalog of the data anew")
        if place + 1 < len(keys) and keys[place + 1] == wanted:
            raise UserError(f"{shard.path} has two samples {key!r}, which cannot be told apart by their key")
        return shard.first_index + int(rows[place])

    def _shard(self, url: str) -> Shard:
        found = self._shards.get(os.path.basename(url), [])
        if len(found) > 1:
            found = [shard for shard in found if shard.path in (url, os.path.abspath(url))]
        if len(found) != 1:
            raise UserError(f"{url} is not a shard of the catalog {self._catalog.folder}: make a catalog of this data")
        return found[0]

    def _order(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys of a shard in order, and the row of each."""
        shard, _ = self._catalog.locate(first)
        keys = np.asarray(open_index(self._catalog, shard)["key"])
        rows = np.argsort(keys, kind="stable")
        return keys[rows], rows
