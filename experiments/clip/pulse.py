"""Whether the other ranks of a launch are alive: a heartbeat in the launch's store, read where an exchange fails."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch.distributed as dist

from .errors import UserError
from .signals import asked

# torchrun keeps its store when it restarts the processes, so the number of restarts is part of the key.
_KEY, _SECONDS = f"drrho/pulse/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/", 1.0
_DONE, _FAILED = "done", "failed"
T = TypeVar("T")


class Pulse:
    """Counts up in the store every second while this process runs, so that the others see that it is alive.

    The counter keeps counting while the process waits for another rank; it stops when the process dies or is stopped.

    Parameters
    ----------
    patience : float
        Seconds without a heartbeat after which a rank counts as lost.
    """

    def __init__(self, rank: int, count: int, patience: float) -> None:
        self._rank, self._count, self._patience = rank, count, patience
        self._announcements, self._has_told = 0, False
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: a collective operation may be using the group's.
        timeout = timedelta(seconds=10 * _SECONDS)
        self._store = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is in rank 0, or in its agent, which may have ended
            while not self._stopped.wait(_SECONDS):
                self._store.add(f"{_KEY}{self._rank}", 1)
                self._pass_on_signal()

    def _pass_on_signal(self) -> None:
        """Tell the other ranks of a signal, of which each must know: one of them may wait for what never comes."""
        if asked() and not self._has_told:
            self._has_told = True
            self._store.add(f"{_KEY}signal", asked())
        elif not self._has_told and (number := self._store.add(f"{_KEY}signal", 0)):
            self._has_told = True
            # Several ranks may have told the others, each of its own.
            os.kill(os.getpid(), number if number in (signal.SIGINT, signal.SIGUSR1) else signal.SIGTERM)

    @contextmanager
    def announcing(self) -> Iterator[None]:
        """Have the ranks in `wait_for_leader` wait until this block ends, and tell them whether it failed."""
        name = self._next()
        outcome = _FAILED
        try:
            yield
            outcome = _DONE
        finally:
            self._store.set(name, outcome)
            if outcome == _FAILED:
                time.sleep(_SECONDS)  # for the others to read it: the store may end with this process

    def wait_for_leader(self) -> None:
        """Wait until rank 0 leaves its `announcing` block, however long that takes.

        Raises
        ------
        UserError
            If its block fails, or if it dies or hangs.
        """
        name = self._next()
        beats, heard = -1, time.monotonic()
        while True:
            try:
                is_over, now = self._answer(lambda: (self._store.check([name]), self._store.add(f"{_KEY}0", 0)))
                if is_over:
                    failed = self._answer(lambda: self._store.get(name)).decode() != _DONE
                    break
                if now != beats:
                    beats, heard = now, time.monotonic()
            except TimeoutError:
                pass
            except RuntimeError as error:
                raise UserError(
                    f"rank {self._rank} lost rank 0 while waiting for it: see what was said there"
                ) from error
            if time.monotonic() - heard > self._patience:
                raise UserError(
                    f"rank {self._rank} lost rank 0, which has had no pulse for {self._patience:g} seconds while the "
                    "others waited for it: see what was said there"
                )
            time.sleep(_SECONDS / 10)
        if failed:
            raise UserError("stopped because rank 0 did: see its message")

    def _answer(self, ask: Callable[[], T]) -> T:
        """Return the store's answer. The store is in rank 0, or in its agent, which may have ended or hang.

        Raises
        ------
        RuntimeError, TimeoutError
            If the store has ended; if it does not answer in time.
        """
        answers: SimpleQueue[T | RuntimeError] = SimpleQueue()

        def put() -> None:
            try:
                answers.put(ask())
            except RuntimeError as error:
                answers.put(error)

        threading.Thread(target=put, daemon=True).start()
        try:
            answer = answers.get(timeout=2 * _SECONDS)
        except Empty:
            raise TimeoutError from None
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    def _next(self) -> str:
        self._announcements += 1
        return f"{_KEY}first/{self._announcements}"

    def lost(self) -> str:
        """Return the names of the ranks that have died or hang, joined by commas.

        Rank 0, with which the store may end, waits here until the others have asked as well: a rank that is not
        connected to the lost one notices it only when its own exchange times out.
        """
        others = [rank for rank in range(self._count) if rank != self._rank]
        asked = f"{_KEY}asked/"
        try:
            lost = self._silent(others)
            self._answer(lambda: self._store.add(f"{asked}{self._rank}", 1))
        except (RuntimeError, TimeoutError):
            return "rank 0"
        if self._rank == 0:
            late = [rank for rank in others if rank not in lost]
            until = time.monotonic() + self._patience + 10 * _SECONDS
            with contextlib.suppress(RuntimeError, TimeoutError):  # the store of an agent may end first
                while late and time.monotonic() < until:
                    silent = self._silent(late)
                    known = self._counts(asked, late)
                    late = [rank for rank, n in zip(late, known, strict=True) if not n and rank not in silent]
        return ", ".join(f"rank {rank}" for rank in lost) or "another rank"

    def _silent(self, ranks: list[int]) -> list[int]:
        before = self._counts(_KEY, ranks)
        time.sleep(4 * _SECONDS)
        after = self._counts(_KEY, ranks)
        return [rank for rank, a, b in zip(ranks, before, after, strict=True) if a == b]

    def _counts(self, name: str, ranks: list[int]) -> list[int]:
        return self._answer(lambda: [self._store.add(f"{name}{rank}", 0) for rank in ranks])

    def stop(self) -> None:
        """Stop counting."""
        self._stopped.set()
        self._thread.join(2 * _SECONDS)  # the store may not answer
