"""Signals that ask a program to end: SIGTERM and SIGUSR1, which schedulers send, and Ctrl-C.

Where nothing is at stake, a signal ends the program at once, by the exception `Stopped`. In a block of `noted` it is
only noted, and a training asks for it by `asked` between two steps. Within that block, a signal is raised where the
program is `interruptible`: where it waits for something that may never come. Python runs no handler while its main
thread is in a library that does not return, so a thread beside it sees every signal as well, and ends a program that
has not ended in time, with the status of one that was stopped.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from .errors import PROGRAM

_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)
_STOPPING = (signal.SIGINT, *_SCHEDULERS)
#: Seconds that a program has to end itself after a scheduler's signal: schedulers and torchrun kill it after 30.
GRACE = 25.0
# The same where nothing is at stake.
_AT_ONCE = 10.0
_END = 0  # in the pipe, instead of a signal's number


class Stopped(KeyboardInterrupt):
    """A signal of number ``signal`` has ended what was going on."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by {name_of(signal)}")
        self.signal = signal


def name_of(number: int) -> str:
    """Return a signal's name."""
    return signal.Signals(number).name


def status_of(number: int) -> int:
    """Return the exit status of a program that a signal has stopped.

    130 after Ctrl-C; 75 (EX_TEMPFAIL: try again) after a scheduler's signal.
    """
    return 130 if number == signal.SIGINT else os.EX_TEMPFAIL


class _Signals:
    """What this process was asked by signals, and what it does about them."""

    def __init__(self) -> None:
        self.asked = self.handled = self.depth = 0
        self.is_interruptible = self.was_raised = False
        self.grace, self.deadline = GRACE, math.inf
        self.again = ""
        self._pipe: tuple[int, int] | None = None

    @property
    def is_watched(self) -> bool:
        return self._pipe is not None

    def watch(self) -> threading.Thread:
        """Start the thread that sees signals whatever the main thread does; `end_watch` ends it."""
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        thread = threading.Thread(target=self._see, args=(self._pipe[0],), daemon=True)
        thread.start()
        return thread

    def end_watch(self, thread: threading.Thread) -> None:
        assert self._pipe is not None
        signal.set_wakeup_fd(-1)
        os.write(self._pipe[1], bytes([_END]))
        thread.join()
        for end in self._pipe:
            os.close(end)
        self._pipe = None

    def _see(self, pipe: int) -> None:
        while True:
            left = None if self.deadline == math.inf else max(0.0, self.deadline - time.monotonic())
            if select.select([pipe], [], [], left)[0]:
                numbers = os.read(pipe, 64)
                if _END in numbers:
                    return
                for number in numbers:
                    if number in _STOPPING:
                        self.note(number)
            elif time.monotonic() >= self.deadline:
                self._end()

    def note(self, number: int) -> None:
        """Note a signal; a scheduler's gives this process a time to end."""
        if self.asked in (0, signal.SIGINT):
            self.asked = number
        if number in _SCHEDULERS:
            grace = self.grace if self.depth else _AT_ONCE
            self.deadline = min(self.deadline, time.monotonic() + grace)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise `Stopped` where that is due. A person's second Ctrl-C is always; a scheduler may repeat its signal."""
        self.note(number)
        self.handled += 1
        by_person = number == signal.SIGINT
        if self.depth and not self.is_interruptible and not (by_person and self.handled > 1):
            return
        if self.was_raised and not by_person:
            return
        self.was_raised = not self.depth
        self.is_interruptible = False
        raise Stopped(self.asked)

    def _end(self) -> None:
        """End this process, whatever hangs in it, and the processes that it has started."""
        line = (
            f"{PROGRAM}: {name_of(self.asked)} came, and something hangs: ended without another checkpoint; "
            f"resume with: {self.again}\n"
        )
        os.write(2, line.encode())  # not by sys.stderr, which the main thread may have locked
        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                child.kill()  # one that is stopped takes no other signal
        os._exit(status_of(self.asked))

    def forget_in_child(self) -> None:
        """Leave the signals of a process that was forked to itself and to its parent."""
        if self.is_watched:
            signal.set_wakeup_fd(-1)
            self._pipe, self.depth = None, 1


_signals = _Signals()
os.register_at_fork(after_in_child=lambda: _signals.forget_in_child())


@contextmanager
def handled(again: str) -> Iterator[None]:
    """Let signals end the program as this module says, during the block; ``again`` is the command that resumes it.

    In a thread that is not the main one, nothing changes.
    """
    global _signals
    if threading.current_thread() is not threading.main_thread() or _signals.is_watched:
        yield
        return
    _signals = _Signals()
    _signals.again = again
    before = {number: signal.signal(number, _signals.handle) for number in _STOPPING}
    thread = _signals.watch()
    try:
        yield
    finally:
        _signals.end_watch(thread)
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals = _Signals()


@contextmanager
def noted(grace: float = GRACE) -> Iterator[None]:
    """Note signals during the block, for the program to ask for; a person's second Ctrl-C is at once.

    Parameters
    ----------
    grace : float
        Seconds after a scheduler's signal in which the program has to end; then it is ended.
    """
    before, _signals.grace = _signals.grace, grace
    _signals.depth += 1
    try:
        yield
    finally:
        _signals.depth -= 1
        _signals.grace = before


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Stopped` in the block, or as it begins, if the program is asked to end."""
    _signals.is_interruptible = True
    try:
        if _signals.asked:
            raise Stopped(_signals.asked)
        yield
    finally:
        _signals.is_interruptible = False


def asked() -> int:
    """Return the number of the signal that has asked this program to end; 0 if there was none."""
    return _signals.asked


def was_raised() -> bool:
    """Whether a signal has ended the program at once: what it raises afterwards may come from that."""
    return _signals.was_raised


def exit_in_time(status: int) -> NoReturn:
    """Exit; one that was stopped does not wait longer for what libraries wait for, such as processes that hang."""
    if status in (130, os.EX_TEMPFAIL):
        timer = threading.Timer(_AT_ONCE, os._exit, (status,))
        timer.daemon = True
        timer.start()
    sys.exit(status)
