"""Work that is done by several processes at once, none of which takes the others with it when it dies or hangs."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

import torch

from experiments.benchmarks.measure import explain

Task = TypeVar("Task")
_SPAWN = multiprocessing.get_context("spawn")
_PATIENCE = 10.0  # seconds for a process to end
#: What the reason begins with where a task has got no answer in time.
LATE = "not done within"
# After an error of the driver, every later call of the process fails too.
_BROKEN = ("CUDA error", "CUDA driver", "device-side assert", "illegal memory access")


class Outcome(NamedTuple):
    """What came of a task: a result, or the reason why there is none."""

    task: Any
    result: Any
    problem: str


class _Worker:
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.task: Any = None
        self.process = _SPAWN.Process(target=_serve, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, task: Any) -> None:
        self.task = task
        self.pipe.send(task)

    def outcome(self) -> tuple[Outcome, bool]:
        """Return what came of the task, and whether the worker can go on."""
        try:
            result, problem, is_sound = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(_PATIENCE)
            result, problem, is_sound = None, f"its process ended with status {self.process.exitcode}", False
        return Outcome(self.task, result, problem), is_sound

    def end(self) -> None:
        self.process.kill()
        self.process.join(_PATIENCE)  # one whose kernel does not end may not be ended either
        self.pipe.close()


def outcomes(work: Callable[[Task], Any], tasks: Sequence[Task], workers: int, seconds: float) -> Iterator[Outcome]:
    """Yield what came of every task, in the order in which they end; those not done in time are given up.

    ``work`` is a function of a module. A task whose process dies is one with a problem; another process takes the
    place of the dead one.
    """
    deadline, waiting = time.monotonic() + seconds, list(reversed(tasks))
    crew = [_Worker(work) for _ in range(min(workers, len(tasks)))]
    for worker in crew:
        worker.give(waiting.pop())
    try:
        while crew:
            pipes = {worker.pipe: worker for worker in crew}
            ready = multiprocessing.connection.wait(list(pipes), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                worker = pipes[pipe]  # pyright: ignore[reportArgumentType]
                outcome, is_sound = worker.outcome()
                yield outcome
                _go_on(crew, worker, is_sound, work, waiting)
    finally:
        for worker in crew:
            worker.end()
    for task in [worker.task for worker in crew] + waiting[::-1]:
        yield Outcome(task, None, f"{LATE} {seconds:.0f} s")


def _go_on(crew: list[_Worker], worker: _Worker, is_sound: bool, work: Any, waiting: list[Any]) -> None:
    """Give a worker its next task, or another one in its place; end it where none is left."""
    if not (is_sound and waiting):
        worker.end()
        crew.remove(worker)
        if not waiting:
            return
        worker = _Worker(work)
        crew.append(worker)
    worker.give(waiting.pop())


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((work(task), "", True))
        except Exception as error:
            pipe.send((None, explain(error), not any(words in str(error) for words in _BROKEN)))
