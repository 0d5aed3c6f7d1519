"""Worker processes that return results in order: torch's DataLoader, whose workers end when their parent does."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError

#: Results that each worker computes before they are requested: so many times the workers are in shared memory at most.
AHEAD = 2

# Workers that a rank starts at most, unless it is told how many: each takes memory.
_MOST_USUAL = 16

Key = TypeVar("Key")
Result = TypeVar("Result")

# How torch's messages about a dead worker, and about an error of a task, begin.
_DEATH = "DataLoader worker (pid"
_TASK_FAILED = "Caught "


class Workers(Generic[Key, Result]):
    """Computes ``task(key)`` in ``count`` worker processes; with 0 of them, in this process.

    The processes start with the first `map` and end at `close`. They ignore signals that a scheduler sends to all
    processes of a job: their parent decides when they end.

    Parameters
    ----------
    task : callable
        The function that every process computes.
    ahead : int
        Largest number of results that each worker computes before they are requested.
    pin_memory : bool
        Whether tensors of the results are put into page-locked memory, which makes copies to a GPU faster.
    """

    def __init__(
        self, task: Callable[[Key], Result], count: int, *, ahead: int = AHEAD, pin_memory: bool = False
    ) -> None:
        self._task, self._count, self._ahead, self._pin_memory = task, count, ahead, pin_memory
        self._keys = _Keys()
        self._loader: DataLoader | None = None
        self._iterations = 0

    def map(self, keys: Iterable[Key]) -> Iterator[Result]:
        """Begin to compute, and return the results in the order of the keys. A new iteration ends the previous one.

        Raises
        ------
        UserError
            If the task raises one, or if a worker dies.
        """
        self._iterations += 1
        own = self._iterations
        self._keys.pending = keys
        with self._reporting_deaths(), _child_handler_kept(), warnings.catch_warnings():
            # The user has chosen the number of workers; torch warns if it exceeds that of the cores.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            if self._loader is None:
                self._loader = self._start()
            results = iter(self._loader)
        return self._results(own, results)

    def _results(self, own: int, results: Iterator[Any]) -> Iterator[Result]:
        while own == self._iterations:
            with self._reporting_deaths():
                try:
                    result = next(results)
                except StopIteration:
                    return
            if isinstance(result, UserError):
                raise result
            yield result
        raise RuntimeError("another iteration over the same workers has begun")

    def close(self) -> None:
        """End the processes, those too that are stopped or hang: none of them writes anything."""
        loader, self._loader = self._loader, None
        results: Any = loader._iterator if loader is not None else None
        if results is not None:
            for worker in getattr(results, "_workers", ()):
                worker.kill()
            # The garbage collector may delete its queues first; then shutting down waits 10 s and kills the workers.
            results._shutdown_workers()

    def _start(self) -> DataLoader:
        return DataLoader(
            _Tasks(self._task),
            batch_size=None,
            sampler=self._keys,
            num_workers=self._count,
            collate_fn=_unchanged,
            pin_memory=self._pin_memory,
            worker_init_fn=_ignore_signals,
            # Without a generator of its own, it draws from the global one, whose state a run saves.
            generator=torch.Generator(),
            prefetch_factor=self._ahead if self._count else None,
            persistent_workers=self._count > 0,
        )

    @contextmanager
    def _reporting_deaths(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.close()
            reason = " ".join(str(error).split())
            is_cut_off = isinstance(error, ConnectionError | EOFError) and not reason.startswith(_TASK_FAILED)
            if not self._count or not (is_cut_off or reason.startswith(_DEATH)):
                raise
            raise UserError(
                f"a data worker died ({reason}): look for a lack of memory, or use fewer workers"
            ) from error


def spare_cores() -> int:
    """Return how many cores this process may use beside its own."""
    return len(os.sched_getaffinity(0)) - 1


def usual_workers() -> int:
    """Return how many processes a rank starts to read and decode, where none are asked for.

    Ranks that torchrun starts on one machine share its cores; srun gives each its own.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(_MOST_USUAL, (spare_cores() + 1) // ranks - 1))


def spread(task: Callable[[Key], Result], keys: Sequence[Key]) -> Iterator[Result]:
    """Yield ``task(key)`` in the order of the keys, computed by as many processes as this one may use cores."""
    count = min(len(keys) - 1, spare_cores()) + 1
    workers: Workers[Key, Result] = Workers(task, count if count > 1 else 0)
    try:
        yield from workers.map(keys)
    finally:
        workers.close()


class _Keys:
    """The keys of the current iteration: the loader's sampler, which stays the same object."""

    pending: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pending)


class _Tasks(Dataset):
    def __init__(self, task: Callable[[Any], Any]) -> None:
        self._task = task

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._task(key)
        except UserError as error:
            # An exception raised here would reach the parent with a traceback in its message.
            return error


def _unchanged(result: Any) -> Any:
    return result


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _restore_default)


def _restore_default(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)


@contextmanager
def _child_handler_kept() -> Iterator[None]:
    """Remove the handler that torch installs, which would raise a worker's death anywhere: `next` reports it too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
