"""Local copies of parts of remote files: fetched once by several processes, read at random, deleted at the end."""

import multiprocessing
import os
import signal
import time

import fsspec
import pytest

from experiments.clip.errors import UserError
from experiments.clip.io import copies, files
from experiments.clip.io.copies import Copy, LocalCopies

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def path(tmp_path):
    path = f"memory://{tmp_path.name}/x"
    with fsspec.open(path, "wb") as file:
        file.write(CONTENT)
    return path


@pytest.fixture
def own(tmp_path):
    made = LocalCopies(tmp_path)
    yield made
    made.close()
    assert not list(tmp_path.iterdir())


def test_what_a_copy_has_is_read_from_it_and_all_else_from_where_it_is(own, path):
    part = Copy("part", path, ((100, 200), (5000, 5100)))
    own.begin([part, part])
    own.use(["part"])
    [file] = [each for each in own.folder.iterdir() if not each.name.startswith(".")]
    assert file.read_bytes() == CONTENT[100:200] + bytes(4800) + CONTENT[5000:5100]
    wanted = [(path, 150, 50), (path, 5000, 100), (path, 300, 10), (path, 190, 20)]
    assert own.read_many(wanted) == [CONTENT[start : start + size] for _, start, size in wanted]
    file.write_bytes(bytes(5000))
    assert own.read(path, 150, 50) == bytes(50) and own.read(path, 300, 2) == CONTENT[300:302]
    own.use([])
    assert own.read(path, 150, 50) == CONTENT[150:200]


def test_a_file_as_a_whole(own, path):
    own.begin([Copy("all", path)])
    own.use(["all"])
    assert (own.folder / "all").read_bytes() == CONTENT
    assert own.read(path, 10_000, 500) == CONTENT[10_000:]


def fetch(own, path, requests):
    original = copies.remote_range

    def counting(*arguments):
        with requests.get_lock():
            requests.value += 1
        time.sleep(0.05)
        return original(*arguments)

    copies.remote_range = counting
    own.begin([Copy(f"{start}", path, ((start, start + 100),)) for start in range(0, 1000, 100)])
    own.use([str(start) for start in range(0, 1000, 100)])
    assert own.read(path, 420, 10) == CONTENT[420:430]


def test_processes_fetch_each_copy_once(own, path):
    context = multiprocessing.get_context("fork")  # of which memory: has the same content
    requests = context.Value("i", 0)
    processes = [context.Process(target=fetch, args=(own, path, requests)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4 and requests.value == 10


def test_what_a_killed_process_left_is_deleted_by_the_next(tmp_path):
    def leave():
        LocalCopies(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=leave)
    process.start()
    process.join()
    [left] = tmp_path.iterdir()
    LocalCopies(tmp_path).close()
    assert left.exists()  # it may have been made just now
    os.utime(left / ".claim", (0, 0))
    own = LocalCopies(tmp_path)
    assert list(tmp_path.iterdir()) == [own.folder]
    os.utime(own.folder / ".claim", (0, 0))
    LocalCopies(tmp_path).close()
    assert own.folder.exists()
    own.close()


def test_failures_are_one_line(own, path, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAITS", ())
    own.begin([Copy("gone", f"{path}missing", ((0, 5),))])
    with pytest.raises(UserError, match=r"cannot read memory://.*missing \("):
        own.use(["gone"])
    monkeypatch.setattr(copies.os, "replace", lambda *_: os.open("/dev/full/x", os.O_RDONLY))
    own.begin([Copy("full", path, ((0, 5),))])
    with pytest.raises(UserError, match=r"cannot write .*: choose another folder"):
        own.use(["full"])
    monkeypatch.undo()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"):
        LocalCopies(tmp_path / "file")
    (tmp_path / "file").unlink()
