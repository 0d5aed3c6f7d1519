"""Byte ranges of local and remote files, retries where storage fails for a while, few files open at a time."""

import os
import pickle

import fsspec
import pytest

from experiments.clip.errors import UserError
from experiments.clip.io import files, storage
from experiments.clip.io.storage import Ranges, file_size, is_remote, open_seekable


@pytest.fixture
def paths(tmp_path):
    made = [tmp_path / f"{number}.bin" for number in range(6)]
    for number, path in enumerate(made):
        path.write_bytes(bytes([number] * 100))
    return [str(path) for path in made]


def test_urls_are_remote_and_paths_are_not():
    assert all(map(is_remote, ("s3://a/b", "https://a", "zip://a::file://b")))
    assert not any(map(is_remote, ("/a://b", "a/b", "a:b", "/a")))


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_ranges_sizes_and_streams(tmp_path, kind):
    path = f"memory://{tmp_path.name}/x" if kind == "memory" else str(tmp_path / "x")
    with fsspec.open(path, "wb") as file:
        file.write(bytes(range(100)))
    ranges = Ranges(2)
    assert ranges.read(path, 10, 5) == bytes(range(10, 15)) and ranges.read(path, 95, 50) == bytes(range(95, 100))
    wanted = [(path, 3, 2), (path, 90, 90), (path, 0, 0)]
    assert ranges.read_many(wanted) == [bytes([3, 4]), bytes(range(90, 100)), b""]
    assert pickle.loads(pickle.dumps(ranges)).read(path, 7, 1) == b"\x07"
    assert file_size(path) == 100
    with open_seekable(path) as file:
        file.seek(98)
        assert file.read() == b"bc"
    for read in (file_size, lambda missing: ranges.read(missing, 0, 1), open_seekable):
        with pytest.raises(UserError, match=r"cannot read .*missing \("):
            read(f"{path}missing")


def test_few_files_stay_open(paths):
    before = len(os.listdir("/proc/self/fd"))
    ranges = Ranges(2)
    for number in (0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0):
        assert ranges.read(paths[number], 5, 3) == bytes([number] * 3)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    del ranges
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_and_a_pipe_have_no_size(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="is no regular file: name one that can be read from any offset"):
            file_size(str(path))


def test_storage_that_fails_for_a_while(paths, monkeypatch):
    waits = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    pread, failures = os.pread, [OSError(5, "Input/output error"), OSError(116, "Stale file handle")]

    def failing(*arguments):
        if failures:
            raise failures.pop()
        return pread(*arguments)

    monkeypatch.setattr(storage.os, "pread", failing)
    ranges = Ranges(2)
    assert ranges.read(paths[1], 5, 3) == bytes([1] * 3)
    assert waits == list(files.WAITS[:2])
    failures.extend([OSError(5, "Input/output error")] * 100)
    with pytest.raises(UserError, match=r"cannot read .*1.bin after 6 attempts \(Input/output error\): check"):
        ranges.read(paths[1], 5, 3)
    failures.clear()
    waits.clear()
    os.unlink(paths[2])
    with pytest.raises(UserError, match=r"cannot read .*2.bin \(No such file or directory\)"):
        ranges.read(paths[2], 0, 1)
    assert waits == []


def test_a_remote_range_that_fails_is_requested_again_alone(tmp_path, monkeypatch):
    path = f"memory://{tmp_path.name}/x"
    with fsspec.open(path, "wb") as file:
        file.write(bytes(range(10)))
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(fs, "cat_ranges", lambda paths, *_, **__: [OSError("busy"), b"given"])
    assert Ranges(1).read_many([(path, 1, 2), (path, 3, 2)]) == [b"\x01\x02", b"given"]
