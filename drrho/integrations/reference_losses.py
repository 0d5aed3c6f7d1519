"""The reference model's losses of every sample of a data set, computed once and looked up while training.

A folder holds ``losses.f32``, float32 in the order of the samples, with one value or, for sequences, one for each token
of a sample (then ``offsets.i64`` says where a sample begins); optionally ``keys.u64``, by which samples are found that
have no number; and ``reference-losses.json``, which is written last and says what they are losses of.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drrho.integrations.pages import AGAIN, Pages, checksums_of
from drrho.integrations.reference_writing import HEADER, Batch, compute, refuse_other
from drrho.validation import ArrayLike, as_index

__all__ = ["ReferenceLosses"]


class ReferenceLosses:
    """Reads the losses of a folder that `compute` has written; a copy in another process opens it anew.

    Parameters
    ----------
    folder : path
        Where they are.
    about : mapping, optional
        What they must be losses of: every key must be there, with this value.

    Attributes
    ----------
    about : dict
        What they are losses of.
    fingerprint : str
        SHA-256 of everything that the folder holds.

    Raises
    ------
    ValueError
        If the folder is incomplete or damaged, or is about something else, naming the key and both values.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from drrho.integrations import ReferenceLosses
    >>> samples = torch.arange(6.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     batches = ((samples[rows].int(), samples[rows]) for rows in torch.arange(6).split(4))
    ...     losses = ReferenceLosses.compute(folder, torch.square, batches, 6, about={"model": "square"})
    ...     print(losses.lookup([5, 0]).tolist(), len(losses))
    [25.0, 0.0] 6
    """

    def __init__(self, folder: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        header = _header(self.folder)
        self.about: dict[str, Any] = header["about"]
        refuse_other(self.folder, self.about, about or {})
        self.fingerprint = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
        self._rows: int = header["rows"]
        self._values = Pages(self.folder / "losses.f32", "<f4", header["values"])
        self._offsets = Pages(self.folder / "offsets.i64", "<i8", self._rows + 1) if header["ragged"] else None
        self._keys = Pages(self.folder / "keys.u64", "<u8", 2 * self._rows) if header["keyed"] else None
        for name, expected in header["sha256"].items():
            if hashlib.sha256(checksums_of(self.folder / name).read_bytes()).hexdigest() != expected:
                raise ValueError(f"{checksums_of(self.folder / name)} is damaged: {AGAIN}")

    def __len__(self) -> int:
        return self._rows

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.folder, self.fingerprint)

    @property
    def is_keyed(self) -> bool:
        """Whether samples are found by keys."""
        return self._keys is not None

    @property
    def is_ragged(self) -> bool:
        """Whether a sample has a loss for each of its tokens."""
        return self._offsets is not None

    def lengths(self, index: ArrayLike) -> Tensor:
        """Return how many losses samples ``index`` ``[b]`` have, int64 ``[b]``."""
        first, last = self._ends(index)
        return torch.from_numpy(last - first)

    def lookup(self, index: ArrayLike) -> Tensor:
        """Return the losses of samples ``index`` ``[b]``, float32 ``[b]``; of sequences, one after another.

        Raises
        ------
        ValueError
            For an index that is no integer ``[b]`` or out of range, and for damaged bytes, naming the file.
        """
        first, last = self._ends(index)
        if (some := last > first).any():
            self._values.compare(first[some], last[some] - 1)
        if self._offsets is None:
            return torch.from_numpy(self._values.values[first])
        parts = [self._values.values[start:stop] for start, stop in zip(first, last, strict=True)]
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0)

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the sample of each key of ``keys`` ``[k, 2]``, -1 for one that is not there.

        The losses must have keys, else a ``ValueError`` is raised.
        """
        if self._keys is None:
            raise ValueError(f"{self.folder} finds samples by number, not by content: {AGAIN}, with keys")
        high, low = self._keys.values[: self._rows], self._keys.values[self._rows :]
        place = np.searchsorted(high, keys[:, 0])
        found = np.full(len(keys), -1, dtype=np.int64)
        for k, row in enumerate(np.minimum(place, self._rows - 1).tolist()):
            while row < self._rows - 1 and high[row] == keys[k, 0] and low[row] != keys[k, 1]:
                row += 1
            stored = self._keys.take(np.array([row, self._rows + row]))
            if (stored == keys[k]).all():
                found[k] = row
        return found

    @classmethod
    def compute(
        cls,
        folder: str | os.PathLike[str],
        losses_of: Callable[[Batch], Tensor],
        batches: Iterable[tuple[ArrayLike, Batch]],
        rows: int | Sequence[int] | NDArray[np.int64],
        *,
        about: Mapping[str, Any],
        keys: NDArray[np.uint64] | None = None,
    ) -> ReferenceLosses:
        """Compute the losses of all samples, or of those that an interrupted run has not, and return them opened.

        What is written survives ``kill -9`` and a full disk: run it again, with batches of any size and in any order.

        Parameters
        ----------
        folder : path
            Where to write them; if all are there, nothing is computed.
        losses_of : callable
            Maps a batch to the reference's losses ``[b]``, or for sequences ``[tokens]``, one sample after another. It
            runs without gradients.
        batches : iterable of (index, batch)
            ``index`` ``[b]`` tells the samples of a batch; each must occur.
        rows : int or sequence of int
            The number of samples, or of sequences the number of losses of each.
        about : mapping
            What the losses are of, as JSON: reference, data, precision. Opening compares it.
        keys : uint64 array ``[rows, 2]``, optional
            A key for each sample, in ascending order, by which `find` finds it.

        Raises
        ------
        ValueError
            Naming the sample for a NaN or infinite loss; for batches that do not fit the rows or leave some out; for a
            folder about something else, naming the key and both values.
        OSError
            If the disk is full, or another process is computing in this folder.
        """
        path = Path(folder)
        if not (path / HEADER).exists():
            compute(path, losses_of, batches, rows, about, keys)
        opened = cls(path, about)
        count = rows if isinstance(rows, int) else len(rows)
        if len(opened) != count:
            raise ValueError(f"rows must be the {len(opened)} that {path} has, got {count}: choose another folder")
        return opened

    def _ends(self, index: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the losses of each sample begin and end."""
        rows = as_index(index, "index").cpu().numpy().astype(np.int64)
        outside = (rows < 0) | (rows >= self._rows)
        if outside.any():
            raise ValueError(
                f"index must lie in [0, {self._rows}), got {rows[outside][0]}: {self.folder} is of other data"
            )
        if self._offsets is None:
            return rows, rows + 1
        return self._offsets.take(rows), self._offsets.take(rows + 1)


def _again(folder: Path, fingerprint: str) -> ReferenceLosses:
    opened = ReferenceLosses(folder)
    if opened.fingerprint != fingerprint:
        raise ValueError(f"{folder} has been written anew since it was opened: start again")
    return opened


def _header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_bytes())
        if header["format"] != 1:
            raise ValueError(f"{path} has format {header['format']}, this version reads 1")
        return {name: header[name] for name in ("about", "rows", "values", "ragged", "keyed", "sha256")}
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no complete losses, there is no {HEADER}: run ReferenceLosses.compute"
        ) from None
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): {AGAIN}") from error
