"""Trials with faults of the machine, signals of a scheduler, and restarts on another number of ranks."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable

from experiments.benchmarks.chaos.ends import Verdict
from experiments.benchmarks.chaos.runs import Run
from experiments.benchmarks.chaos.trials import Trials, said_clearly
from experiments.clip.io import files

_FOR_GOOD = 10**9
_RESUME = "resume with"


def signalled(trials: Trials, *numbers: int, status: int) -> Verdict:
    """Send signals of a scheduler, or Ctrl-C, to all processes, one shortly after the other."""
    begun = trials.in_training()
    _send(trials, begun, numbers)
    return trials.told(begun, status, _RESUME)


def signalled_early(trials: Trials, *numbers: int) -> Verdict:
    """Send signals before the first step."""
    begun = Run(trials.folder(), trials.splits)
    begun.wait_for(lambda: begun.stage() == "train")
    time.sleep(trials.random.uniform(0.05, 0.4))
    _send(trials, begun, numbers)
    return trials.told(begun, os.EX_TEMPFAIL, _RESUME)


def _send(trials: Trials, begun: Run, numbers: tuple[int, ...]) -> None:
    for number in numbers:
        begun.signal(number)
        time.sleep(trials.random.uniform(0, 0.1))


def out_of_patience(trials: Trials) -> Verdict:
    """Send SIGTERM, and soon after SIGKILL to what is left."""
    begun = trials.in_training()
    begun.signal(signal.SIGTERM)
    time.sleep(trials.random.uniform(0, 0.5))
    [status] = begun.kill()
    clear = status in (-signal.SIGKILL, os.EX_TEMPFAIL)
    return trials.resumed(begun.folder, "killed or status 75" if clear else f"NOT CLEAR: {status}")


def full_disk(trials: Trials) -> Verdict:
    """Let no file grow beyond a size, from a random step on."""
    begun = trials.in_training()
    resource.prlimit(begun.pids[0], resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    return trials.told(begun, 2, "cannot write")


def lost_folder(trials: Trials) -> Verdict:
    """Put a file into the place of the folder of checkpoints, so that it cannot be written into."""
    begun = trials.in_training()
    folder = begun.folder / "out" / "checkpoints"
    begun.signal(signal.SIGSTOP)
    folder.rename(folder.with_name("aside"))
    folder.write_text("")
    begun.signal(signal.SIGCONT)
    begun.wait_for(begun.ended)
    folder.unlink()
    folder.with_name("aside").rename(folder)
    return trials.told(begun, 2, "cannot write")


def dead_worker(trials: Trials) -> Verdict:
    """Kill a data worker."""
    begun = trials.in_training()
    (parent,) = begun.pids
    children = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split()
    os.kill(int(trials.random.choice(children)), signal.SIGKILL)
    return trials.told(begun, 2, "a data worker died")


def failing(trials: Trials, sabotage: Callable[[], None], message: str = "") -> Verdict:
    """Let reads or writes fail for a while; or for good, which is said by the message."""
    begun = trials.in_training(sabotage=sabotage)
    if message:
        return trials.told(begun, 2, message)
    (status,) = begun.finish()
    return trials.compared(begun.folder, "went on" if status == 0 else f"NOT CLEAR: {begun.said()}")


def lost_rank(trials: Trials, number: int) -> Verdict:
    """Kill one of two ranks, or stop it so that it hangs."""
    begun = trials.in_training(ranks=2)
    begun.signal(number, rank=1)
    begun.wait_for(lambda: (begun.ended(), begun.pids[0] in begun.statuses)[1])
    begun.signal(signal.SIGKILL, rank=1)
    return trials.told(begun, 2, "rank 0 lost rank 1", ranks=2)


def elastic(trials: Trials, before: int, ranks: int) -> Verdict:
    """Stop or kill a run on some ranks, and resume it on another number of them."""
    begun = trials.in_training(ranks=before)
    if trials.random.random() < 0.5:
        begun.signal(signal.SIGTERM)
        ended = said_clearly(begun, os.EX_TEMPFAIL, _RESUME)
    else:
        begun.kill()
        ended = "killed"
    return trials.resumed(begun.folder, ended, ranks, before=before)


def failing_reads(failures: int) -> None:
    """Have reads of data fail, after the first 200 of a process, with waits that suit a test."""
    read, calls, left = os.pread, [0], [failures]

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        calls[0] += 1
        if calls[0] > 200 and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, size, offset)

    os.pread = failing
    files.WAITS = (0.01,) * len(files.WAITS)


def failing_writes(failures: int) -> None:
    """Have writes of checkpoints fail, after some that succeed, as on a file system that is away for a while."""
    keep, calls, left = os.fsync, [0], [failures]

    def failing(descriptor: int) -> None:
        calls[0] += "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}")
        if calls[0] > 30 and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        keep(descriptor)

    os.fsync = failing
    files.WAITS = (0.01,) * len(files.WAITS)


_TERM, _USR1, _INT, _AGAIN = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, os.EX_TEMPFAIL

FAULTS: dict[str, Callable[[Trials], Verdict]] = {
    "full disk": full_disk,
    "folder that cannot be written": lost_folder,
    "data worker killed": dead_worker,
    "rank killed": lambda trials: lost_rank(trials, signal.SIGKILL),
    "rank that hangs": lambda trials: lost_rank(trials, signal.SIGSTOP),
    "reads that fail for a while": lambda trials: failing(trials, lambda: failing_reads(4)),
    "reads that fail for good": lambda trials: failing(trials, lambda: failing_reads(_FOR_GOOD), "cannot read"),
    "writes that fail for a while": lambda trials: failing(trials, lambda: failing_writes(4)),
    "writes that fail for good": lambda trials: failing(trials, lambda: failing_writes(_FOR_GOOD), "cannot write"),
    "SIGTERM": lambda trials: signalled(trials, _TERM, status=_AGAIN),
    "SIGUSR1": lambda trials: signalled(trials, _USR1, status=_AGAIN),
    "SIGINT": lambda trials: signalled(trials, _INT, status=130),
    "SIGTERM twice": lambda trials: signalled(trials, _TERM, _TERM, status=_AGAIN),
    "SIGUSR1, then SIGTERM": lambda trials: signalled(trials, _USR1, _TERM, status=_AGAIN),
    "SIGTERM before the first step": lambda trials: signalled_early(trials, _TERM),
    "SIGTERM, then SIGKILL": out_of_patience,
    "one rank, then two": lambda trials: elastic(trials, 1, 2),
    "two ranks, then one": lambda trials: elastic(trials, 2, 1),
    "two ranks, then three": lambda trials: elastic(trials, 2, 3),
}
