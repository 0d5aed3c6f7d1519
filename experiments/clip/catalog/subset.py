"""A subset of samples by their uids, in the format of DataComp's filters: sorted numbers of 128 bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ..errors import UserError
from ..io.checksums import checksum

#: A uid: its upper and its lower 64 bits.
UID = np.dtype("u8,u8")
_MAGIC = b"\x93NUMPY"
_DIGITS = 32
_CHUNK = 2**22


@dataclass(frozen=True)
class Subset:
    """A file of uids, which may hold one several times, and where a sample's uid is.

    ``key`` is the field of the member ``json``, or a table's column, that holds it in hexadecimal digits.
    """

    path: str
    checksum: str
    uids: int
    key: str


def open_subset(path: Path, key: str) -> Subset:
    """Return the subset whose uids are in a file.

    Raises
    ------
    UserError
        If it holds something else, or its uids are not sorted.
    """
    uids = map_uids(path)
    for first in range(0, len(uids), _CHUNK):
        upper, lower = (uids[first : first + _CHUNK + 1][name] for name in ("f0", "f1"))
        if np.any((upper[1:] < upper[:-1]) | ((upper[1:] == upper[:-1]) & (lower[1:] < lower[:-1]))):
            raise UserError(
                f"the uids of {path} are not sorted: sort them by numpy.save(PATH, numpy.sort(numpy.load(PATH)))"
            )
    return Subset(str(path.absolute()), checksum(path), len(uids), key)


def map_uids(path: Path) -> np.ndarray:
    """Map a file of uids: an .npy file, or, as DataComp's resharder takes too, its numbers alone."""
    try:
        with path.open("rb") as file:
            is_npy = file.read(len(_MAGIC)) == _MAGIC
        uids: np.ndarray = np.load(path, "r", allow_pickle=False) if is_npy else np.memmap(path, UID, "r")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the uids {path} ({error}): name an .npy file of DataComp's uids") from error
    if uids.dtype != UID or uids.ndim != 1:
        raise UserError(
            f"{path} holds {uids.dtype} {list(uids.shape)}, not DataComp's uids, which are one row of "
            'numpy.dtype("u8,u8")'
        )
    return uids


def times_in(uids: np.ndarray, uid: str) -> int:
    """Return how many times a sorted array has a uid, given in hexadecimal digits."""
    wanted = np.array([divmod(int(uid, 16), 2**64)], UID)
    first, end = (int(np.searchsorted(uids, wanted, side)[0]) for side in ("left", "right"))
    return end - first


def is_uid(value: Any) -> TypeGuard[str]:
    """Whether a value is a uid in hexadecimal digits."""
    return isinstance(value, str) and 0 < len(value) <= _DIGITS and set(value) <= set("0123456789abcdefABCDEF")


def uid_in(data: bytes, key: str) -> str | None:
    """Return the uid in a field of a JSON document; None if it has none."""
    try:
        value = json.loads(data.decode("utf-8-sig"))[key]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return value if is_uid(value) else None
