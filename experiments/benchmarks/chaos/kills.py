"""Trials in which processes are killed as a loss of power, or a scheduler that has lost patience, kills them."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable

from experiments.benchmarks.chaos.ends import Verdict
from experiments.benchmarks.chaos.runs import STEPS, Run
from experiments.benchmarks.chaos.trials import Trials

_PREPARING = ("data", "catalog")


def killed(trials: Trials, wait: Callable[[Run], object], *, ranks: int = 1, prepared: bool = True) -> Verdict:
    """Kill all processes of a run at once, after waiting for a moment, and resume it."""
    while True:
        begun = Run(trials.folder(prepared=prepared), trials.splits, ranks)
        wait(begun)
        if begun.kill() == [-signal.SIGKILL] * ranks:
            return trials.resumed(begun.folder, "killed", ranks)
        shutil.rmtree(begun.folder)  # it had ended before: another moment is drawn


def in_stage(trials: Trials, *stages: str) -> Verdict:
    """Kill a run in one of these stages before the training."""
    stage = trials.random.choice(stages)

    def wait(begun: Run) -> None:
        begun.wait_for(lambda: begun.stage() == stage)
        time.sleep(trials.random.uniform(0, trials.seconds[stage]))

    return killed(trials, wait, prepared=False)


def in_training(trials: Trials, ranks: int = 1) -> Verdict:
    """Kill a run at a random step."""
    return killed(trials, lambda begun: _wait_for_step(trials, begun), ranks=ranks)


def _wait_for_step(trials: Trials, begun: Run) -> None:
    step = trials.random.randrange(STEPS - 2)
    begun.wait_for(lambda: begun.steps() >= step)
    time.sleep(trials.random.uniform(0, 0.1))


def while_writing(trials: Trials) -> Verdict:
    """Kill a run while a checkpoint is written."""

    def wait(begun: Run) -> None:
        step = trials.random.randrange(STEPS - 2)
        folder = begun.folder / "out" / "checkpoints"
        begun.wait_for(lambda: begun.steps() >= step and any(folder.glob(".partial-*")))
        time.sleep(trials.random.uniform(0, 0.02))

    return killed(trials, wait)


def while_exporting(trials: Trials) -> Verdict:
    """Kill a run after its last step, when it validates, saves and exports."""

    def wait(begun: Run) -> None:
        begun.wait_for(lambda: begun.steps() >= STEPS)
        time.sleep(trials.random.uniform(0, 0.3))

    return killed(trials, wait)


def again(trials: Trials, times: int) -> Verdict:
    """Kill a run, and each time that it is resumed kill it again; at last let it end."""
    folder = trials.folder()
    for _ in range(times):
        begun = Run(folder, trials.splits)
        before = begun.steps()
        ahead = trials.random.randrange(8)
        begun.wait_for(lambda begun=begun, goal=before + ahead: begun.steps() >= goal)
        time.sleep(trials.random.uniform(0, 0.1))
        if begun.kill() != [-signal.SIGKILL]:
            break  # it has come to its end
    return trials.resumed(folder, "killed")


def while_resuming(trials: Trials) -> Verdict:
    """Kill a run, and again while it starts from its checkpoint."""
    begun = trials.in_training()
    begun.kill()
    second = Run(begun.folder, trials.splits)
    second.wait_for(lambda: second.stage() == "train")
    time.sleep(trials.random.uniform(0, 1.0))
    second.kill()
    return trials.resumed(begun.folder, "killed")


KILLS: dict[str, Callable[[Trials], Verdict]] = {
    "kill -9 in training": in_training,
    "kill -9 while a checkpoint is written": while_writing,
    "kill -9 while features are cached": lambda trials: in_stage(trials, "features"),
    "kill -9 in preparing and counting data": lambda trials: in_stage(trials, *_PREPARING),
    "kill -9 three times": lambda trials: again(trials, 3),
    "kill -9 while resuming": while_resuming,
    "kill -9 of both ranks": lambda trials: in_training(trials, ranks=2),
    "kill -9 at the end, while models are exported": while_exporting,
}
