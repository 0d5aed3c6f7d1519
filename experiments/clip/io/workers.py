"""Work done by other processes, results in order: torch's DataLoader, whose workers end when their parent does."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from experiments.clip.errors import UserError

Key = TypeVar("Key")
Result = TypeVar("Result")

# How torch's messages begin.
_DEATH = "DataLoader worker (pid"
_TASK_FAILED = "Caught "


class Workers(Generic[Key, Result]):
    """``count`` processes that compute ``task(key)``; with 0 of them this process does.

    They start at the first `map` and stay until `close`. A signal meant for the whole job, like a scheduler's, does
    not stop them: their parent decides.

    Parameters
    ----------
    task : callable
        What to do, the same in every process.
    ahead : int
        How many results each worker has ready, at most, before they are asked for.
    pin_memory : bool
        Whether tensors of the results are put into page-locked memory, for copies to a GPU.
    """

    def __init__(self, task: Callable[[Key], Result], count: int, *, ahead: int = 2, pin_memory: bool = False) -> None:
        self._task, self._count, self._ahead, self._pin_memory = task, count, ahead, pin_memory
        self._keys = _Keys()
        self._loader: DataLoader | None = None
        self._iterations = 0

    def map(self, keys: Iterable[Key]) -> Iterator[Result]:
        """Yield the results in the order of the keys. A new iteration ends the one before.

        Raises
        ------
        UserError
            What the task raised, or that a worker died.
        """
        self._iterations += 1
        own = self._iterations
        self._keys.pending = keys
        with self._deaths_told(), _own_child_handler(), warnings.catch_warnings():
            # Whoever chose the number of workers knows the machine.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            if self._loader is None:
                self._loader = self._start()
            results = iter(self._loader)
        while own == self._iterations:
            with self._deaths_told():
                try:
                    result = next(results)
                except StopIteration:
                    return
            if isinstance(result, UserError):
                raise result
            yield result
        raise RuntimeError("another iteration over the same workers has begun")

    def close(self) -> None:
        """End the processes."""
        loader, self._loader = self._loader, None
        results: Any = loader._iterator if loader is not None else None
        if results is not None:
            # Left to the garbage collector, which may take its queues first, it waits 10 s and kills.
            results._shutdown_workers()

    def _start(self) -> DataLoader:
        return DataLoader(
            _Tasks(self._task),
            batch_size=None,
            sampler=self._keys,
            num_workers=self._count,
            collate_fn=_same,
            pin_memory=self._pin_memory,
            worker_init_fn=_outlive_signals,
            # Without its own, it draws from the global generator, whose state a run saves.
            generator=torch.Generator(),
            prefetch_factor=self._ahead if self._count else None,
            persistent_workers=self._count > 0,
        )

    @contextmanager
    def _deaths_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.close()
            reason = " ".join(str(error).split())
            is_cut_off = isinstance(error, ConnectionError | EOFError) and not reason.startswith(_TASK_FAILED)
            if not self._count or not (is_cut_off or reason.startswith(_DEATH)):
                raise
            raise UserError(f"a data worker died ({reason}): look for a lack of memory, take fewer workers") from error


class _Keys:
    """What the workers are to do, replaced for each iteration."""

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
            # Raised here, it would reach the parent with a traceback in its message.
            return error


def _same(result: Any) -> Any:
    return result


def _outlive_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _die_next_time)


def _die_next_time(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)


@contextmanager
def _own_child_handler() -> Iterator[None]:
    """Keep torch from installing a handler that raises a worker's death amid whatever runs: `next` tells it too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
