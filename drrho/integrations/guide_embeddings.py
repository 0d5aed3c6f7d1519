"""A guide's embeddings of a training set, computed once and looked up while training.

A folder has a file for every `ROWS` samples, a safetensors tensor ``embeddings`` ``[samples, columns, d]``. Its
metadata identify guide, data and precision, and hold the CRC-32 of the tensor's bytes, which is compared when the file
is first read. A file is complete or absent, so that an interrupted computation goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

ROWS = 4096  # samples of a file
_LABELS = ("label", "labels", "score", "scores")  # columns that sentence-transformers does not take for text
_TAG = 2**32  # a sample's label is its number, plus this times a number that belongs to the data


class GuideEmbeddings:
    """The embeddings that a guide gives every text of a dataset; `cached` makes them.

    Attributes
    ----------
    dataset : datasets.Dataset or mapping of str to it
        The data to train on, with a column ``label`` by which a batch's embeddings are found.
    """

    def __init__(self, files: Sequence[Path], identity: dict[str, str], dataset: Any) -> None:
        self.dataset = dataset
        self._files, self._identity, self._maps = files, identity, {}
        self._tag = _tag(identity)

    @classmethod
    def cached(
        cls,
        folder: str | os.PathLike[str],
        guide: Any,
        dataset: Any,
        *,
        precision: Literal["float32", "float16"] = "float32",
        batch_size: int = 128,
    ) -> GuideEmbeddings:
        """Compute the embeddings that the folder does not have yet.

        Parameters
        ----------
        folder : path
            Where the embeddings are kept, for one guide and one dataset.
        guide : SentenceTransformer
            The reference model.
        dataset : datasets.Dataset, or mapping of names to datasets
            Data whose columns are all text, (anchor, positive, ...), for example ``{"train": ..., "eval": ...}``.
        precision : "float32" or "float16"
            That of the embeddings on disk.
        batch_size : int
            Number of texts that go through the guide at a time.

        Raises
        ------
        ValueError
            If the folder has embeddings of another guide, other data or another precision, if the dataset has labels,
            or if an embedding is not finite.
        """
        sets = list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]
        columns = _text_columns(sets)
        identity = {
            "guide": _fingerprint_of_model(guide),
            "data": _fingerprint_of_data(sets, columns),
            "columns": ", ".join(columns),
            "precision": precision,
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for number, texts in enumerate(_parts(sets, columns)):
            files.append(folder / f"embeddings-{number:05d}.safetensors")
            if files[-1].is_file():
                _check(files[-1], identity)
            else:
                _write(files[-1], _embedded(guide, texts, precision, batch_size), identity)
        numbered = iter(_numbered(sets, _tag(identity)))
        whole = {name: next(numbered) for name in dataset} if isinstance(dataset, Mapping) else next(numbered)
        return cls(files, identity, whole)

    def __repr__(self) -> str:
        return f"GuideEmbeddings(guide={self._identity['guide'][:12]}, data={self._identity['data'][:12]})"

    def embeddings(
        self,
        columns: Sequence[dict[str, Any]],
        labels: Tensor | None,
        size: int | None = None,
        tokens: int | None = None,
    ) -> list[Tensor]:
        """Return the embeddings ``[b, d]`` of each column, in float32, of the samples with these labels ``[b]``.

        Raises
        ------
        ValueError
            If the labels are not those of `dataset`, or there is another number of columns.
        """
        known = self._identity["columns"].split(", ")
        if len(columns) != len(known):
            raise ValueError(
                f"the guide's embeddings are of the columns {', '.join(known)}, got {len(columns)} columns"
            )
        numbers = None if labels is None or labels.is_floating_point() else labels.cpu().numpy()
        if numbers is None or numbers.ndim != 1 or (numbers // _TAG != self._tag).any():
            raise ValueError("the batch is not of the data that the guide's embeddings are of: train on guide.dataset")
        numbers = numbers % _TAG
        found = np.stack([self._file(number // ROWS)[number % ROWS] for number in numbers.tolist()])
        device = next(value.device for value in columns[0].values() if isinstance(value, Tensor))
        return list(torch.from_numpy(found).to(device).float().unbind(1))

    def _file(self, number: int) -> np.ndarray:
        if number not in self._maps:
            self._maps[number] = _mapped(self._files[number])
        return self._maps[number]


def _text_columns(sets: Sequence[Any]) -> list[str]:
    columns = list(sets[0].column_names)
    for each in sets:
        if found := [name for name in each.column_names if name in _LABELS]:
            raise ValueError(f"the dataset has the column {found[0]!r}, which this loss does not use: remove it")
        if list(each.column_names) != columns:
            raise ValueError(f"all datasets must have the columns {columns}, got {list(each.column_names)}")
    return columns


def _parts(sets: Sequence[Any], columns: Sequence[str]) -> Iterator[list[list[str]]]:
    """Yield the texts of `ROWS` samples at a time, a list for each column; files do not end with a dataset."""
    held: list[list[str]] = [[] for _ in columns]
    for each in sets:
        for first in range(0, len(each), ROWS):
            rows = each[first : first + ROWS]
            for column, texts in zip(columns, held, strict=True):
                texts.extend(rows[column])
            if len(held[0]) >= ROWS:
                yield [texts[:ROWS] for texts in held]
                held = [texts[ROWS:] for texts in held]
    if held[0]:
        yield held


def _numbered(sets: Sequence[Any], tag: int) -> Iterator[Any]:
    first = tag * _TAG
    for each in sets:
        yield each.add_column("label", np.arange(first, first + len(each)))
        first += len(each)


def _tag(identity: dict[str, str]) -> int:
    """Return a number of 31 bits that other data, or another guide, are unlikely to have."""
    return crc32(repr(sorted(identity.items())).encode()) >> 1


def _fingerprint_of_data(sets: Sequence[Any], columns: Sequence[str]) -> str:
    digest = hashlib.sha256(repr([len(each) for each in sets]).encode())
    for texts in _parts(sets, columns):
        for text in (text for column in texts for text in column):
            if not isinstance(text, str):
                raise ValueError(f"all columns must hold text, got {type(text).__name__} in one of {list(columns)}")
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _fingerprint_of_model(guide: Any) -> str:
    digest = hashlib.sha256(repr((guide.max_seq_length, sorted(guide.tokenizer.get_vocab().items()))).encode())
    for name, value in sorted(guide.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _embedded(guide: Any, texts: list[list[str]], precision: str, batch_size: int) -> np.ndarray:
    flat = [text for column in texts for text in column]
    found = guide.encode(flat, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
    if not np.isfinite(found).all():
        raise ValueError("the guide's embeddings are not finite: check its weights")
    return np.stack(np.split(found.astype(precision), len(texts)), axis=1)


def _write(path: Path, embeddings: np.ndarray, identity: dict[str, str]) -> None:
    from safetensors.numpy import save

    whole = save({"embeddings": embeddings}, {**identity, "checksum": str(crc32(embeddings.data))})
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check(path: Path, identity: dict[str, str]) -> None:
    found = _header(path)[0].get("__metadata__", {})
    for key, value in identity.items():
        if found.get(key) != value:
            raise ValueError(
                f"the guide's embeddings {path} are of another {key}, {found.get(key)} instead of {value}: "
                "delete the folder or name another"
            )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where its tensors begin."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return dict(json.loads(file.read(min(size, path.stat().st_size)))), 8 + size
    except ValueError as error:
        raise ValueError(f"the guide's embeddings {path} are damaged ({error}): delete the file") from error


def _mapped(path: Path) -> np.ndarray:
    """Map a file's embeddings into memory, and compare their checksum."""
    header, start = _header(path)
    try:
        about = header["embeddings"]
        kind = {"F32": np.float32, "F16": np.float16}[about["dtype"]]
        embeddings = np.memmap(path, kind, "r", start, tuple(about["shape"]))
        if crc32(embeddings.data) == int(header["__metadata__"]["checksum"]):
            return embeddings
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"the guide's embeddings {path} are not as they were written: delete the file")
