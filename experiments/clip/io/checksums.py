"""Checksums of the files of a folder, in a manifest beside them: whether they are as they were written.

They find damage, not malice: who can change a file can change the manifest too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import xxhash

from .files import write_atomically

MANIFEST = "manifest.json"
#: The checksum's name in a manifest, and the ending of the file that holds one.
CHECKSUM = "xxh3_128"
_BLOCK = 2**20


def checksum(path: Path) -> str:
    """Return the XXH3 of a file in 128 bits, as ``xxhsum -H2`` prints it.

    It takes a tenth of the processor time of SHA-256. The file is read, not mapped: a page of a mapped file that the
    storage cannot give ends the process.
    """
    whole = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            whole.update(block[:count])
    return whole.hexdigest()


def write_manifest(folder: Path, checksums: Mapping[str, str]) -> None:
    """Write the checksums of a folder's files, by name."""
    write_atomically(folder / MANIFEST, json.dumps({CHECKSUM: dict(sorted(checksums.items()))}, indent=2).encode())


def has_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest of such checksums, be they right or not."""
    try:
        return CHECKSUM in json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def fault_of(folder: Path, names: Sequence[str], rank: int = 0, ranks: int = 1) -> str:
    """Return what is wrong with the files of these names, empty if nothing is; each rank reads its part of them.

    Raises
    ------
    OSError
        If a file is there and cannot be read.
    """
    try:
        document = json.loads((folder / MANIFEST).read_bytes())
        if CHECKSUM not in document:
            return f"{MANIFEST} has no {CHECKSUM}, but {', '.join(map(str, document)) or 'nothing'}"
        stored = document[CHECKSUM]
        if sorted(stored) != sorted(names):
            return f"{MANIFEST} is of {', '.join(stored)}, the folder has {', '.join(names)}"
        for name in sorted(names)[rank::ranks]:
            if checksum(folder / name) != stored[name]:
                return f"{name} is not as it was written: its checksum differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return ""
