"""The index of a shard: an .npy file with a row for each sample, where its members begin and how long they are."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

#: Offset and size of the image, of each caption, and the sample's key.
Row = tuple[tuple[int, int], list[tuple[int, int]], bytes]


def index_bytes(rows: Sequence[Row], captions: int) -> bytes:
    """Return the file of an index."""
    width = max((len(key) for *_, key in rows), default=1)
    data = io.BytesIO()
    np.save(data, np.array(rows, dtype=_fields(captions, width)), allow_pickle=False)
    return data.getvalue()


def map_index(path: Path) -> np.ndarray:
    """Map the rows of an index; raise ``ValueError`` where the file is none.

    The header is not evaluated, as by :func:`numpy.load`, but compared with the one that its fields have: readers open
    indexes in threads, and Python 3.11 may not parse in two threads at once (``SystemError: AST constructor recursion
    depth mismatch``).
    """
    with path.open("rb") as file:
        header = _header(file)
        offset = file.tell()
    found = re.search(rb"'caption', '<i8', \((\d+), 2\).*'\|S(\d+)'.*'shape': \((\d+),\)", header)
    if found is None:
        raise ValueError("it has no header of an index")
    captions, width, samples = map(int, found.groups())
    fields = np.dtype(_fields(captions, width))
    if header != _header_of(fields, samples):
        raise ValueError("its fields are not those of an index")
    if samples == 0:
        return np.empty(0, fields)
    return np.memmap(path, fields, "r", offset, (samples,))


def _fields(captions: int, width: int) -> list[Any]:
    return [("image", "<i8", (2,)), ("caption", "<i8", (captions, 2)), ("key", f"S{width}")]


def _header(file: BinaryIO) -> bytes:
    if npy.read_magic(file) != (1, 0):
        raise ValueError("it is of another version of the format")
    return file.read(int.from_bytes(file.read(2), "little")).strip()


def _header_of(fields: np.dtype, samples: int) -> bytes:
    data = io.BytesIO()
    shape = {"descr": npy.dtype_to_descr(fields), "fortran_order": False, "shape": (samples,)}
    npy.write_array_header_1_0(data, shape)
    data.seek(0)
    return _header(data)
