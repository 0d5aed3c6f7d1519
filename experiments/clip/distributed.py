"""The ranks of a launch: who this process is according to torchrun or srun, and collective operations over all."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from drrho.ranks import gathered

from .errors import Interrupted, UserError
from .pulse import Pulse
from .ranges import flag
from .signals import asked

_LAUNCHERS = (
    ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
    ("srun", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")),
)

_CPU = torch.device("cpu")
# Messages of gloo and NCCL where another process has ended or is late; gloo's errors have no type of their own.
_EXCHANGE_FAILED = re.compile("gloo|NCCL|Connection (closed|reset|refused)|[Tt]imed out", re.ASCII)
T = TypeVar("T")


class _Sliceable(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self: Items, part: slice, /) -> Items: ...


Items = TypeVar("Items", bound=_Sliceable)


@dataclass(frozen=True)
class Ranks:
    """One process and its place among all processes of the launch.

    ``group``, ``hosts`` and ``pulse`` are None if this is the only process; ``device`` is the one that this process
    uses, ``hosts`` the same ranks, who exchange what the hosts know without waiting for devices.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = _CPU
    group: dist.ProcessGroup | None = None
    pulse: Pulse | None = None
    hosts: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which prints and writes the files that all ranks share."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every rank has called this."""
        if self.group is not None:
            dist.barrier(group=self.group)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, however long it takes; the others run it afterwards and find its results."""
        if self.pulse is None:
            yield
        elif self.leads:
            with self.pulse.announcing():
                yield
        else:
            self.pulse.wait_for_leader()
            yield

    def split_over_ranks(self, encode: Callable[[Items], Tensor]) -> Callable[[Items], Tensor]:
        """Return a function with the values of ``encode`` of which each rank computes a part of the batch (collective).

        The parts are gathered on every rank. A batch of fewer items than ranks is encoded in full by every rank.
        """
        if self.group is None:
            return encode

        def encode_part(items: Items) -> Tensor:
            if len(items) < self.count:
                return encode(items)
            bounds = [len(items) * k // self.count for k in range(self.count + 1)]
            own = encode(items[bounds[self.rank] : bounds[self.rank + 1]])
            return gathered(own.contiguous(), [b - a for a, b in itertools.pairwise(bounds)], self.group)

        return encode_part

    def max_over_ranks(self, number: int) -> int:
        """Return the maximum of a number over ranks (collective)."""
        return self.maxima_over_ranks(number)[0]

    def maxima_over_ranks(self, *numbers: int) -> tuple[int, ...]:
        """Return the maximum of each number over ranks (collective)."""
        if self.group is None:
            return numbers
        largest = torch.tensor(numbers, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return tuple(largest.tolist())

    def sum(self, part: Tensor) -> Tensor:
        """Replace a tensor by its sum over ranks (collective): exact for counts, and for values that one rank has."""
        if self.group is not None:
            dist.all_reduce(part, group=self.group)
        return part

    def gathered_on_hosts(self, message: np.ndarray) -> np.ndarray:
        """Return the integers ``[ranks, length]`` of which every rank passes its own ``[length]`` (collective)."""
        if self.hosts is None:
            return message[None]
        sent = torch.from_numpy(message)
        received = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(received, sent, group=self.hosts)
        return torch.stack(received).numpy()

    def own_indices(self, number: int) -> range:
        """Return the part of ``range(number)`` that is this rank's work: every ``count``-th index."""
        return range(self.rank, number, self.count)

    def rounds(self, number: int) -> int:
        """Return the maximum over ranks of the length of `own_indices`: the rounds until all indices are done."""
        return -(-number // self.count)

    def raise_on_all(self, error: UserError | None) -> None:
        """Raise on every rank if any rank has an error (collective).

        A rank that has an error raises it; the others raise one that names the first such rank.
        """
        failed = self.max_over_ranks(0 if error is None else self.count - self.rank)
        if error is not None:
            raise error
        if failed:
            raise UserError(f"stopped because rank {self.count - failed} did: see its message")

    def check_same_options(self, settings: Mapping[str, Any]) -> None:
        """Refuse to start on all ranks where a rank has other options than rank 0, by their names (collective)."""
        if self.group is None:
            return
        content = json.dumps(settings, sort_keys=True).encode()
        size = torch.tensor([len(content)], device=self.device)
        dist.broadcast(size, 0, group=self.group)
        leader = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.leads:
            leader.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(leader, 0, group=self.group)
        others = dict(_leaves(json.loads(bytes(leader.tolist()))))
        differing = [(key, value) for key, value in _leaves(settings) if others.get(key) != _in_json(value)]
        problem = "; ".join(f"{flag(key)} is {value} here, {others.get(key)} on rank 0" for key, value in differing)
        self.raise_on_all(UserError(f"rank {self.rank} has other options: {problem}") if differing else None)

    def run_on_all_or_fail(self, action: Callable[[], T]) -> T:
        """Run ``action`` and return its result; raise on all ranks if it raises a `UserError` on any (collective)."""
        try:
            result = action()
        except UserError as error:
            self.raise_on_all(error)
            raise  # not reached: raise_on_all has raised it
        self.raise_on_all(None)
        return result


def _leaves(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the options of a group and of the groups in it."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield key, value


def _in_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


#: The ranks of a program that was started without a launcher.
ONE_PROCESS = Ranks()


def launched(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Return rank, number of ranks and rank on this node from the launcher's variables; 0, 1, 0 without a launcher.

    Only srun counts: in a SLURM allocation but not under srun, SLURM_PROCID is not set, and there is one process.
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
        if not 0 <= rank < count or local < 0:
            raise UserError(f"{launcher} set rank {rank} of {count}, number {local} of its node: ranks count from 0")
        port = environment.get("MASTER_PORT", "")
        if count > 1 and not (environment.get("MASTER_ADDR") and port):
            raise UserError(f"{count} ranks need MASTER_ADDR and MASTER_PORT: torchrun sets them, for srun export them")
        if count > 1 and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16):
            raise UserError(f"MASTER_PORT must be a number from 1 to 65535, got {port!r}")
        return rank, count, local
    return 0, 1, 0


def set_float32_products(device: torch.device, full: bool) -> None:
    """Choose for this process how a GPU multiplies float32: in full, or in TF32 with cuDNN's fastest algorithms.

    TF32 rounds the factors to 11 bits and adds up in float32. On the CPU nothing changes.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not full
        torch.backends.cudnn.benchmark = not full


def _gpu_of(rank: int, local: int, count: int) -> int:
    """Return the number of a rank's GPU among the ``count`` that it sees: its own, where its launcher shows it one."""
    if count == 1 and len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1:
        return 0
    if local >= count:
        raise UserError(f"rank {rank} is number {local} of its node, which has {count} GPUs")
    return local


@contextmanager
def joined_ranks(device: str, minutes: float = 10.0) -> Iterator[Ranks]:
    """Initialize the process group of this launch, and destroy it when the block ends.

    Parameters
    ----------
    device : "auto", "cpu" or "cuda"
        ``auto`` chooses a GPU if there is one.
    minutes : float
        How long a rank waits for the others in a collective operation before it stops with an error.

    Raises
    ------
    UserError
        If the device or the launcher's variables do not fit, or if another rank dies or hangs during the block.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch sees, but there is none: choose --device cpu")
    rank, count, local = launched(os.environ)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    own = torch.device("cuda", _gpu_of(rank, local, torch.cuda.device_count())) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(own)
    if count == 1:
        yield Ranks(device=own)
        return
    pulse = _meet("nccl" if on_gpu else "gloo", rank, count, minutes)
    world = dist.group.WORLD
    hosts = dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes)) if on_gpu else world
    assert isinstance(hosts, dist.ProcessGroup)
    try:
        yield Ranks(rank, count, own, world, pulse, hosts)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if not (isinstance(error, dist.DistError) or _EXCHANGE_FAILED.search(reason)):
            raise
        if number := asked():
            raise Interrupted(f"rank {rank} was stopped while other ranks ended", number) from error
        raise UserError(
            f"rank {rank} lost {pulse.lost()} in an exchange ({reason[:120]}): see what was said there; "
            "finished work is kept, run the command again to resume"
        ) from error
    finally:
        pulse.stop()
        dist.destroy_process_group()


def _meet(backend: str, rank: int, count: int, minutes: float) -> Pulse:
    """Initialize the process group, once all ranks are there, and start this rank's pulse."""
    try:
        dist.init_process_group(backend, rank=rank, world_size=count, timeout=timedelta(minutes=minutes))
        return Pulse(rank, count, 60 * minutes)
    except (RuntimeError, ValueError, OSError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {rank} of {count} has not met the others at {place} within {minutes:g} minutes "
            f"({' '.join(str(error).split())[:160]}): see what the others say, check MASTER_ADDR and MASTER_PORT"
        ) from error
