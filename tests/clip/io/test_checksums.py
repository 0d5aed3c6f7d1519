"""Checksums of files and the manifest of a folder."""

import pytest
import xxhash

from experiments.clip.io import checksums
from experiments.clip.io.checksums import checksum, fault_of, has_manifest, write_manifest


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 1003])
def test_checksum_is_that_of_the_whole_file(size, tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "_BLOCK", 10)
    data = bytes(k % 251 for k in range(size))
    (tmp_path / "file").write_bytes(data)
    assert checksum(tmp_path / "file") == xxhash.xxh3_128_hexdigest(data)


def test_checksum_of_nothing_is_the_published_one(tmp_path):
    (tmp_path / "file").touch()
    assert checksum(tmp_path / "file") == "99aa06d3014798d86001c324468d497f"


@pytest.mark.parametrize(
    "content, message", [("{}", "but nothing"), ('{"sha256": {}}', "but sha256"), ("[3]", "but 3")]
)
def test_a_manifest_of_other_checksums_is_named(content, message, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    assert fault_of(tmp_path, []) == f"manifest.json has no xxh3_128, {message}"
    assert not has_manifest(tmp_path)


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
