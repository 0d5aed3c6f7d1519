"""Files that are complete or absent, lines that stay apart, permissions, locks, and errors that are retried or not."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from experiments.clip.errors import UserError
from experiments.clip.io import files
from experiments.clip.io.files import (
    append_durably,
    append_line,
    claimed,
    ensure_writable,
    is_final,
    locked,
    retry_with_backoff,
    share_permissions,
    write_atomically,
    write_json,
)


@pytest.fixture
def waits(monkeypatch):
    """The waits between attempts, which take no time."""
    waits = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    return waits


def test_errors_that_may_be_temporary_are_retried(waits):
    failures = [OSError(errno.EIO, "x"), OSError(errno.ESTALE, "x")]

    def action():
        if failures:
            raise failures.pop()
        return "done"

    assert retry_with_backoff(action) == "done" and waits == [0.1, 0.5]
    failures += [OSError(errno.EIO, "x")] * 6
    with pytest.raises(OSError, match="x"):
        retry_with_backoff(action)
    assert not failures and waits[2:] == [0.1, 0.5, 2.0, 8.0, 30.0]
    failures.append(OSError(errno.ENOSPC, "full"))
    with pytest.raises(OSError, match="full"):
        retry_with_backoff(action)
    assert len(waits) == 7
    assert is_final(UserError("x")) and is_final(FileNotFoundError()) and not is_final(TimeoutError())


def test_a_write_is_complete_or_leaves_the_old_content(tmp_path, monkeypatch, waits):
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    replaced = []

    def full(partial, target):
        replaced.append((partial.read_bytes(), target.read_bytes()))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"cannot write .*x.json \(No space left on device\): free space or choose"):
        write_atomically(path, b"other")
    assert replaced == [(b"other", before)] and path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path] and not waits


def test_what_killed_processes_left_is_removed_once_it_is_old(tmp_path):
    old, young, own = tmp_path / ".a.1.partial", tmp_path / ".b.2.partial", tmp_path / "c.partial"
    for path in (old, young, own):
        path.write_bytes(b"x")
    for path in (old, own):
        os.utime(path, (time.time() - 7200,) * 2)
    ensure_writable(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.2.partial", "c.partial"]
    with pytest.raises(UserError, match="cannot write"):
        ensure_writable(own / "folder")


def test_lines_stay_apart_after_an_incomplete_one(tmp_path):
    path = tmp_path / "log"
    append_line(path, "one")
    with path.open("a") as file:
        file.write("hal")
    append_line(path, "two")
    assert path.read_text() == "one\nhal\ntwo\n"
    with path.open("a") as file:
        file.write("hal")
    append_durably(path, "three\nfour\n")
    assert path.read_text() == "one\nhal\ntwo\nthree\nfour\n"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_a_plain_open(tmp_path, umask):
    path = tmp_path / "private"
    path.write_bytes(b"x")
    path.chmod(0o600)
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_bytes(b"x")
        share_permissions(path)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(each.name for each in tmp_path.iterdir()) == ["plain", "private"]


TRY = """
import fcntl, os, sys
try:
    fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(3)
"""


def test_a_lock_is_of_one_process_at_a_time(tmp_path):
    path = tmp_path / "new" / ".lock"

    def other():
        return subprocess.run([sys.executable, "-S", "-c", TRY, str(path)]).returncode

    with locked(path):
        assert other() == 3
    with claimed(path) as mine:
        assert mine and other() == 3
    assert other() == 0


HOLD = """
import fcntl, os, sys
fcntl.lockf(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_claim_on_a_lock_of_another_process_fails_at_once_until_that_is_killed(tmp_path):
    path = tmp_path / ".lock"
    command = [sys.executable, "-S", "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with claimed(path) as mine:
            assert not mine
        holder.kill()
    with claimed(path) as mine:
        assert mine
