"""Signals that ask a program to end: at once, between two pieces of work, or by force where something hangs."""

import os
import re
import signal
import textwrap
import threading
import time
from pathlib import Path

import pytest

from experiments.clip.signals import Stopped, asked, handled, interruptible, noted, status_of
from tests.clip.launched import Launched

SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)
STOPPING = (signal.SIGINT, *SCHEDULERS)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_ends_at_once_where_nothing_is_at_stake_and_is_noted_elsewhere(number):
    before = [signal.getsignal(each) for each in STOPPING]
    with handled("again"):
        with pytest.raises(Stopped) as stopped:
            send(number)
        assert stopped.value.signal == asked() == number
    assert asked() == 0 and [signal.getsignal(each) for each in STOPPING] == before
    with handled("again"), noted():
        send(number)
        assert asked() == number
        with pytest.raises(Stopped), interruptible():
            raise AssertionError("it had been asked to end")


def test_a_wait_that_may_never_end_is_interrupted():
    with handled("again"), noted():
        with pytest.raises(Stopped), interruptible():
            threading.Timer(0.1, send, (signal.SIGTERM,)).start()
            time.sleep(30)
        send(signal.SIGTERM)  # schedulers repeat theirs
        assert asked() == signal.SIGTERM


@pytest.mark.parametrize("first", STOPPING)
def test_a_person_s_second_signal_is_at_once(first):
    with handled("again"), noted():
        send(first)
        with pytest.raises(Stopped):
            send(signal.SIGINT)
        assert asked() == first


def test_a_scheduler_s_signal_decides_the_status():
    with handled("again"), noted():
        send(signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
        assert asked() == signal.SIGUSR1
    assert [status_of(number) for number in STOPPING] == [130, 75, 75]


def test_other_threads_and_inner_blocks_change_nothing():
    def work():
        with handled("again"):
            found.append(signal.getsignal(signal.SIGTERM))

    found = []
    with handled("again"):
        own = signal.getsignal(signal.SIGTERM)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        with handled("other"):
            assert found == [signal.getsignal(signal.SIGTERM)] == [own]


HANGING = """
    import multiprocessing, os, signal, time
    from ctypes import CDLL
    from experiments.clip.signals import handled, noted

    def hang():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)

    child = multiprocessing.get_context("fork").Process(target=hang)
    with handled("run.py train"), noted(grace=1.0):
        child.start()
        open(__file__ + ".ready", "w").write(str(child.pid))
        while True:
            CDLL(None).pause()  # Python runs no handler in between
"""


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM)])
def test_a_program_that_hangs_in_a_library_is_ended_in_time_with_what_it_started(numbers, tmp_path):
    program, ready = tmp_path / "hanging.py", tmp_path / "hanging.py.ready"
    program.write_text(textwrap.dedent(HANGING))
    process = Launched(program=program)
    while not (ready.is_file() and ready.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    started = time.monotonic()
    for number in numbers:
        process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == os.EX_TEMPFAIL and 0.9 < time.monotonic() - started < 10
    (line,) = errors.splitlines()
    names = "|".join(number.name for number in numbers)  # of two that are pending, the kernel chooses the first
    assert re.fullmatch(
        f"run.py: ({names}) came, and something hangs: ended without another checkpoint; resume with: run.py train",
        line,
    )
    child = Path(f"/proc/{ready.read_text()}/stat")
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() - started < 10
        time.sleep(0.01)
