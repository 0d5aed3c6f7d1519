"""Byte ranges of local and remote files, retries where storage fails for a while, few files open at a time."""

import hashlib
import os
import pickle
import re
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from experiments.clip.errors import UserError
from experiments.clip.io import files, storage
from experiments.clip.io.storage import (
    Ranges,
    download,
    file_size,
    file_version,
    is_remote,
    matching,
    open_once,
    open_seekable,
    refuse_without_ranges,
)


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


@pytest.fixture
def far(tmp_path):
    """A remote file whose ends are far apart, and what it holds."""
    path, content = f"memory://{tmp_path.name}/x", os.urandom(2**18)
    with fsspec.open(path, "wb") as file:
        file.write(content)
    return path, content


def test_neighbors_of_a_remote_file_are_requested_together(far, monkeypatch):
    path, content = far
    asked = []
    fs = fsspec.filesystem("memory")
    original = fs.cat_ranges

    def counting(paths, starts, ends, **options):
        asked.extend(zip(starts, ends, strict=True))
        return original(paths, starts, ends, **options)

    monkeypatch.setattr(fs, "cat_ranges", counting)
    wanted = [(path, 200_000, 50), (path, 70, 30), (path, 0, 50), (path, 0, 0), (path, 65_000, 9)]
    assert Ranges(1).read_many(wanted) == [content[start : start + size] for _, start, size in wanted]
    assert asked == [(0, 65_009), (200_000, 200_050)]


def test_a_remote_range_that_fails_is_requested_again_alone(far, monkeypatch):
    path, content = far
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(fs, "cat_ranges", lambda paths, *_, **__: [OSError("busy"), b"ok"])
    assert Ranges(1).read_many([(path, 1, 2), (path, 200_000, 2)]) == [content[1:3], b"ok"]


@pytest.mark.parametrize("protocol", ["zip", "tar"])
def test_an_archive_stays_open_and_has_globs(tmp_path, monkeypatch, protocol):
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number] * 2000))
    chain = f"{protocol}://{{}}::file://{tmp_path}/all.{protocol}"
    if protocol == "zip":
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for number in range(3):
                archive.write(tmp_path / f"{number}.tar", f"{number}.tar")
    else:
        with tarfile.open(tmp_path / "all.tar", "w") as archive:
            for number in range(3):
                archive.add(tmp_path / f"{number}.tar", f"{number}.tar")
    opened = []
    original = fsspec.core.url_to_fs
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: opened.append(url) or original(url))
    assert matching(chain.format("*.tar")) == [chain.format(f"{number}.tar") for number in range(3)]
    ranges = Ranges(1)
    for number in range(3):
        path = chain.format(f"{number}.tar")
        assert ranges.read_many([(path, 5, 10), (path, 0, 3)]) == [bytes([number] * 10), bytes([number] * 3)]
        assert file_size(path) == 2000
        with open_once(path, 2000) as file:
            assert file.read(2100) == bytes([number] * 2000)
    assert len(opened) == 1
    ranges = Ranges(1)
    path = chain.format("1.tar")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: ranges.read(path, start, 7), range(200)))
    assert found == [bytes([1] * 7)] * 200


def test_a_stream_reads_forward_once(far):
    path, content = far
    with open_once(path, len(content)) as file:
        assert file.read(8) == content[:8]
        file.seek(0)
        assert file.read(4) == content[:4]
        file.seek(100_000)
        assert file.read(10) == content[100_000:100_010]
        assert file.digest() == hashlib.sha256(content).hexdigest()
    with pytest.raises(OSError, match=r"ended after 262144 of 300000 bytes"), open_once(path, 300_000) as file:
        file.seek(300_000)
        file.read(1)


def test_the_version_of_a_file_changes_when_it_is_written(far, paths):
    path, _ = far
    with open(paths[0], "rb") as file:
        before = file.read()
    first = file_version(paths[0])
    with open(paths[0], "wb") as file:
        file.write(before)
    assert file_version(paths[0]) != first and file_version(paths[0])[0] == 100
    assert file_version(path)[0] == 2**18


def test_servers_by_http(tmp_path):
    pytest.importorskip("aiohttp")
    from experiments.benchmarks.remote import served

    content = os.urandom(5_000_000)
    (tmp_path / "x.tar").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"")
    with served(tmp_path) as server:
        url = f"{server.url}/x.tar"
        refuse_without_ranges(url)
        refuse_without_ranges(f"{server.url}/empty")
        assert file_version(url)[0] == 5_000_000 and file_version(url)[1]
        server.requests.clear()
        assert Ranges(1).read_many([(url, 10, 20), (url, 40, 5)]) == [content[10:30], content[40:45]]
        assert [stated for *_, stated in server.requests] == ["bytes=10-44"]
        server.requests.clear()
        with open_once(url, 5_000_000) as file:
            file.seek(4_999_990)
            assert file.read(99) == content[-10:]
        assert [method for method, *_ in server.requests] == ["HEAD", "GET"]
    with served(tmp_path, ranges=False) as server:
        url, host = f"{server.url}/x.tar", server.url.removeprefix("http://")
        for read in (refuse_without_ranges, lambda url: Ranges(1).read(url, 3, 5)):
            with pytest.raises(
                UserError, match=rf"the server {re.escape(host)} ignores .*: train with --reading shards"
            ):
                read(url)
        with open_once(url, 5_000_000) as file:
            assert file.digest() == hashlib.sha256(content).hexdigest()
        download(url, str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == content


class Slow(BaseHTTPRequestHandler):
    """Sends a file in eight parts, with a pause before each."""

    content, pause = bytes(range(256)) * 8, 0.1

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        for start in range(0, len(self.content), 256):
            time.sleep(self.pause)
            self.wfile.write(self.content[start : start + 256])

    def log_message(self, *_):
        pass


def test_a_stream_lasts_as_long_as_bytes_come(tmp_path, monkeypatch):
    aiohttp = pytest.importorskip("aiohttp")
    monkeypatch.setattr(aiohttp.client, "DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.3))  # of 300 seconds
    monkeypatch.setattr(files, "WAITS", (0.01,))
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x.tar"
        download(url, str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == Slow.content
        with open_once(url, len(Slow.content)) as file:
            assert file.read() == Slow.content
        monkeypatch.setattr(storage, "_SILENCE", 0.02)
        with pytest.raises(UserError, match=r"cannot read http://.* after 2 attempts \(.*[Tt]imeout"):
            download(url, str(tmp_path / "silent"))
        server.shutdown()
