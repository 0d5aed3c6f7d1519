"""One process or many: what torchrun or srun say of this process, and the group of all."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from drrho.ranks import gathered
from experiments.clip.errors import UserError

_LAUNCHERS = (
    ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
    ("srun", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")),
)

_CPU = torch.device("cpu")
# What gloo and NCCL say where another process is gone or late; gloo's errors have no type of their own.
_EXCHANGE_FAILED = re.compile("gloo|NCCL|Connection (closed|reset|refused)|[Tt]imed out", re.ASCII)
# torchrun keeps its store when it starts the processes again.
_PULSE, _PULSE_SECONDS = f"drrho/pulse/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/", 1.0
_DONE, _FAILED = b"done", b"failed"
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among all.

    ``group`` is None where there is one process; ``device`` is this process's own.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = _CPU
    group: Any = None
    pulse: _Pulse | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks and writes what all share."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all."""
        if self.group is not None:
            dist.barrier(group=self.group)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Have the leading rank do something, for as long as it takes, before the others, which then find it done."""
        if self.pulse is None:
            yield
        elif self.leads:
            with self.pulse.announcing():
                yield
        else:
            self.pulse.wait_for_leader()
            yield

    def sharing(self, encode: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """Return ``encode``, of which every rank does a part of each batch and has the whole answer."""
        if self.group is None:
            return encode

        def encode_part(items: Any) -> Tensor:
            if len(items) < self.count:
                return encode(items)
            bounds = [len(items) * k // self.count for k in range(self.count + 1)]
            own = encode(items[bounds[self.rank] : bounds[self.rank + 1]])
            return gathered(own.contiguous(), [b - a for a, b in itertools.pairwise(bounds)], self.group)

        return encode_part

    def max_over_ranks(self, number: int) -> int:
        """Return the largest number of any rank; every rank calls."""
        return self.maxima_over_ranks(number)[0]

    def maxima_over_ranks(self, *numbers: int) -> tuple[int, ...]:
        """Return of each number the largest of any rank; every rank calls."""
        if self.group is None:
            return numbers
        largest = torch.tensor(numbers, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return tuple(largest.tolist())

    def sum(self, part: Tensor) -> Tensor:
        """Add up in place what the ranks have: exact for counts, and where only one has other than zero."""
        if self.group is not None:
            dist.all_reduce(part, group=self.group)
        return part

    def share(self, number: int) -> range:
        """Return this rank's share of ``range(number)``: every ``count``-th."""
        return range(self.rank, number, self.count)

    def rounds(self, number: int) -> int:
        """Return the largest length of any rank's share."""
        return -(-number // self.count)

    def raise_on_all(self, error: UserError | None) -> None:
        """Raise on every rank if there is an error on any, and nothing otherwise; every rank calls.

        A rank that has an error raises it, the others one that names the first such rank.
        """
        failed = self.max_over_ranks(0 if error is None else self.count - self.rank)
        if error is not None:
            raise error
        if failed:
            raise UserError(f"stopped because rank {self.count - failed} did: see its message")

    def run_on_all_or_fail(self, action: Callable[[], T]) -> T:
        """Return what ``action`` returns, if it raised a `UserError` on no rank."""
        try:
            result = action()
        except UserError as error:
            self.raise_on_all(error)
            raise  # agree has raised it
        self.raise_on_all(None)
        return result


#: Without a launcher.
ONE_PROCESS = Ranks()


def launched(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Return rank, number of ranks and rank on this node, from the launcher's variables; 0, 1, 0 without one.

    srun's count: inside an allocation but not under srun, SLURM sets no SLURM_PROCID, and this is one process.
    """
    for launcher, names in _LAUNCHERS:
        values = [environment.get(name) for name in names]
        if values[0] is None:
            continue
        try:
            rank, count, local = map(int, values)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):
            stated = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            raise UserError(f"{launcher} must set {', '.join(names)} to numbers, got {stated}") from None
        if count > 1 and not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
            raise UserError(f"{count} ranks need MASTER_ADDR and MASTER_PORT: torchrun sets them, for srun export them")
        return rank, count, local
    return 0, 1, 0


@contextmanager
def joined_ranks(device: str, minutes: float) -> Iterator[Ranks]:
    """Join the other processes of this launch, and leave them at the end.

    Parameters
    ----------
    device : "auto", "cpu" or "cuda"
        auto takes a GPU where there is one.
    minutes : float
        How long a rank waits for the others in an exchange before it stops with an error.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch sees, but there is none: choose --device cpu")
    rank, count, local = launched(os.environ)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and local >= torch.cuda.device_count():
        raise UserError(f"rank {rank} is number {local} of its node, which has {torch.cuda.device_count()} GPUs")
    own = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(own)
    if count == 1:
        yield Ranks(device=own)
        return
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=count, timeout=timedelta(minutes=minutes))
    pulse = _Pulse(rank, count, 60 * minutes)
    try:
        yield Ranks(rank, count, own, dist.group.WORLD, pulse)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if not (isinstance(error, dist.DistError) or _EXCHANGE_FAILED.search(reason)):
            raise
        raise UserError(
            f"rank {rank} lost {pulse.lost()} in an exchange ({reason[:120]}): see what was said there; "
            "what was finished is kept, give the command again to go on"
        ) from error
    finally:
        pulse.stop()
        dist.destroy_process_group()


class _Pulse:
    """Tells the others that this process lives, even while it waits for one of them; a hung one has no pulse."""

    def __init__(self, rank: int, count: int, patience: float) -> None:
        self._rank, self._count, self._patience = rank, count, patience
        self._announcements = 0
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: an exchange may hold the group's.
        self._store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10 * _PULSE_SECONDS))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is in the first rank, or its agent, which may be gone
            while not self._stopped.wait(_PULSE_SECONDS):
                self._store.add(f"{_PULSE}{self._rank}", 1)

    @contextmanager
    def announcing(self) -> Iterator[None]:
        """Let the others wait until this is left."""
        name = self._next()
        outcome = _FAILED
        try:
            yield
            outcome = _DONE
        finally:
            self._store.set(name, outcome)
            if outcome == _FAILED:
                time.sleep(_PULSE_SECONDS)  # for the others to hear it: the store may end with this process

    def wait_for_leader(self) -> None:
        """Wait until the first rank leaves `announcing`, as long as it has a pulse.

        Raises
        ------
        UserError
            If it failed, died or hangs.
        """
        name = self._next()
        beats, heard = -1, time.monotonic()
        while True:
            try:
                is_over, now = self._answer(lambda: (self._store.check([name]), self._store.add(f"{_PULSE}0", 0)))
                if is_over:
                    failed = self._answer(lambda: self._store.get(name)) != _DONE
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
            time.sleep(_PULSE_SECONDS / 10)
        if failed:
            raise UserError("stopped because rank 0 did: see its message")

    def _answer(self, ask: Callable[[], T]) -> T:
        """Return what the store answers; it is in the first rank, or its agent, which may be gone or hang.

        Raises
        ------
        RuntimeError, TimeoutError
            If it is gone; if it is silent.
        """
        answers: SimpleQueue[Any] = SimpleQueue()

        def put() -> None:
            try:
                answers.put((ask(), None))
            except RuntimeError as error:
                answers.put((None, error))

        threading.Thread(target=put, daemon=True).start()
        try:
            answer, error = answers.get(timeout=2 * _PULSE_SECONDS)
        except Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return answer

    def _next(self) -> str:
        self._announcements += 1
        return f"{_PULSE}first/{self._announcements}"

    def lost(self) -> str:
        """Return the names of the ranks that have died or hang.

        The first rank, with which the store may end, stays until the others have asked as well: one that is not
        connected to the lost rank hears of it only when its own exchange has taken too long.
        """
        others = [rank for rank in range(self._count) if rank != self._rank]
        asked = f"{_PULSE}asked/"
        try:
            lost = self._silent(others)
            self._answer(lambda: self._store.add(f"{asked}{self._rank}", 1))
        except (RuntimeError, TimeoutError):
            return "rank 0"
        if self._rank == 0:
            late = [rank for rank in others if rank not in lost]
            until = time.monotonic() + self._patience + 10 * _PULSE_SECONDS
            with contextlib.suppress(RuntimeError, TimeoutError):  # an agent's store may end first
                while late and time.monotonic() < until:
                    silent = self._silent(late)
                    known = self._counts(asked, late)
                    late = [rank for rank, n in zip(late, known, strict=True) if not n and rank not in silent]
        return ", ".join(f"rank {rank}" for rank in lost) or "another rank"

    def _silent(self, ranks: list[int]) -> list[int]:
        before = self._counts(_PULSE, ranks)
        time.sleep(4 * _PULSE_SECONDS)
        after = self._counts(_PULSE, ranks)
        return [rank for rank, a, b in zip(ranks, before, after, strict=True) if a == b]

    def _counts(self, name: str, ranks: list[int]) -> list[int]:
        return self._answer(lambda: [self._store.add(f"{name}{rank}", 0) for rank in ranks])

    def stop(self) -> None:
        """End the pulse."""
        self._stopped.set()
        self._thread.join(2 * _PULSE_SECONDS)  # the store may be silent
