"""Listing the members of a tar file from its headers: exact offsets, without reading contents.

Python's `tarfile` silently ends an archive at a header that it cannot read, and damaged sizes or extended headers make
some versions of it loop. So here it only parses single headers; following them is done by `tar_members`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

BLOCK = 512
# Largest extended header or long name that is read into memory.
_MAX_EXTENSION = 2**16
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
)
# Tar writers fill up their last record with zeros. More zeros than this are a hole that may have replaced samples.
_TAIL = 2**20


class Member(NamedTuple):
    """A member of a tar file, whose content is the ``size`` bytes from ``offset`` on.

    Bytes of the name that are not UTF-8 are kept as surrogates.
    """

    name: str
    kind: Literal["file", "folder", "other"]
    offset: int
    size: int


class Damaged(Exception):
    """The tar file cannot be followed beyond byte ``offset``."""

    def __init__(self, offset: int, problem: str) -> None:
        super().__init__(f"{problem} at byte {offset}")
        self.offset = offset


def tar_members(file: BinaryIO, size: int) -> Iterator[Member]:
    """Yield the members of an uncompressed tar file of ``size`` bytes whose content is complete.

    Global extended headers are ignored: they describe no single member.

    Raises
    ------
    Damaged
        Where bytes are no header, where a member is cut off, where the end mark is missing, or where data follow it.
    """
    position = 0
    long_name: str | None = None
    extended: dict[str, str] = {}
    while True:
        header = _read(file, position, BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            is_end = len(header) == BLOCK and not any(header)
            if is_end and long_name is None and not extended:
                break
            problem = "no member after its extended header" if is_end else f"{error}" if header else "no end mark"
            raise Damaged(position, problem) from error
        start = position + BLOCK
        if info.size < 0:
            raise Damaged(position, f"a size of {info.size}")
        if info.type in _EXTENSIONS:
            if info.size > _MAX_EXTENSION:
                raise Damaged(position, f"an extended header of {info.size} bytes")
            data = _read(file, start, info.size)
            if len(data) < info.size:
                raise Damaged(position, "a cut-off extended header")
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extended = _records(data, position)
            position = start + _blocks(info.size)
            continue

        is_sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extended)
        more = info.type == tarfile.GNUTYPE_SPARSE and header[482]
        while more:
            block = _read(file, start, BLOCK)
            if len(block) < BLOCK:
                raise Damaged(start, "a cut-off sparse map")
            more = block[504]
            start += BLOCK

        length = info.size
        if (stated := extended.get("size")) is not None:
            if not stated.isdecimal() or len(stated) > 20:
                raise Damaged(position, f"a size of {stated[:20]!r}")
            length = int(stated)
        has_content = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        if has_content and start + length > size:
            raise Damaged(position, f"a member of {length} bytes that is cut off")
        kind = "folder" if info.isdir() else "file" if info.isreg() and not is_sparse else "other"
        # An extended header's path has no final slash, as tarfile reads it.
        name = extended["path"].rstrip("/") if "path" in extended else info.name if long_name is None else long_name
        yield Member(name, kind, start, length if has_content else 0)
        position = start + (_blocks(length) if has_content else 0)
        long_name, extended = None, {}

    if size - position > _TAIL or any(_read(file, position, _TAIL)):
        raise Damaged(position, "data after the end mark")


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _records(data: bytes, offset: int) -> dict[str, str]:
    """Parse an extended header: records ``LENGTH KEY=VALUE`` that each end with a line feed."""
    records: dict[str, str] = {}
    start = 0
    while data[start : start + 1] not in (b"", b"\0"):
        digits = data[start : start + 8].partition(b" ")[0]
        end = start + int(digits) if digits.isdigit() else 0
        key, equals, value = data[start + len(digits) + 1 : end - 1].partition(b"=")
        if not start < end <= len(data) or data[end - 1 : end] != b"\n" or not (key and equals):
            raise Damaged(offset, "an extended header that is damaged")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        start = end
    return records
