"""Checksums of the files of a folder, in a manifest beside them: whether they are as they were written."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .files import write_atomically

MANIFEST = "manifest.json"
_BLOCK = 2**24
_THREADS = min(8, os.cpu_count() or 1)


def checksum(path: Path) -> str:
    """Return the SHA-256 of the SHA-256 of every 16 MiB of a file, which threads compute side by side."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return whole.hexdigest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:

            def digest(start: int) -> bytes:
                with view[start : start + _BLOCK] as block:
                    return hashlib.sha256(block).digest()

            with ThreadPoolExecutor(_THREADS) as threads:
                for part in threads.map(digest, range(0, size, _BLOCK)):
                    whole.update(part)
    return whole.hexdigest()


def write_manifest(folder: Path, checksums: Mapping[str, str]) -> None:
    """Write the checksums of a folder's files, by name."""
    write_atomically(folder / MANIFEST, json.dumps({"sha256": dict(sorted(checksums.items()))}, indent=2).encode())


def fault_of(folder: Path, names: Sequence[str], rank: int = 0, ranks: int = 1) -> str:
    """Return what is wrong with the files of these names, empty if nothing is; each rank reads its part of them.

    Raises
    ------
    OSError
        If a file is there and cannot be read.
    """
    try:
        stored = json.loads((folder / MANIFEST).read_bytes())["sha256"]
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
