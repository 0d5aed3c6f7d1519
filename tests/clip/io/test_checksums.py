"""Checksums of files and the manifest of a folder."""

import hashlib

import pytest

from experiments.clip.io import checksums
from experiments.clip.io.checksums import checksum, fault_of, write_manifest


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 1003])
def test_checksum_is_that_of_the_checksums_of_blocks(size, tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "_BLOCK", 10)
    data = bytes(k % 251 for k in range(size))
    (tmp_path / "file").write_bytes(data)
    blocks = b"".join(hashlib.sha256(data[start : start + 10]).digest() for start in range(0, size, 10))
    assert checksum(tmp_path / "file") == hashlib.sha256(blocks).hexdigest()


def test_what_is_missing_or_more_is_named(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    assert fault_of(tmp_path, ["a", "b"]) == "manifest.json is missing"
    write_manifest(tmp_path, {name: checksum(tmp_path / name) for name in "ab"})
    assert fault_of(tmp_path, ["b", "a"]) == ""
    assert fault_of(tmp_path, ["a"]) == "manifest.json is of a, b, the folder has a"
    (tmp_path / "b").unlink()
    assert fault_of(tmp_path, ["a", "b"]) == "b is missing"
    (tmp_path / "b").write_bytes(b"c")
    assert fault_of(tmp_path, ["a", "b"]) == "b is not as it was written: its checksum differs"
