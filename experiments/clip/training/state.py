"""Everything that training changes, as a checkpoint holds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.batch import Stream
from ..distributed import Ranks
from ..errors import UserError
from .checkpoint import (
    Checkpoint,
    check_settings,
    restore_training,
    step_folder,
    training_state,
)
from .logs import Record
from .methods import Method
from .optimization import LossScale, MovingAverage

# Names of a checkpoint's tensors beside weights and optimizer.
EMA, _SCALER, _SELF = "ema.", "scaler.", "self_reference."


class Snapshot(NamedTuple):
    """What a checkpoint holds; see `CheckpointWriter.start`."""

    shared: dict[str, Tensor]
    own: dict[str, Tensor]
    counts: dict[str, int]
    progress: dict[str, Any]


@dataclass
class TrainState:
    """Everything that training changes: a checkpoint holds it, and a run resumes from it.

    Attributes
    ----------
    step : int
        Finished steps.
    skipped_steps : int
        Steps that were not taken because something was not finite.
    seen : dict
        Pairs so far, over all ranks: those that the stream gave, and those that a backward pass was for.
    history : list
        One record per validation.
    counts : dict
        The stream's counts of the finished steps: it may have given the next batch already.
    unscored : dict, optional
        The record of a validation that is due after this step, without its scores: the run was stopped before it.
    self_reference : MovingAverage, optional
        The weights of the target's own average, where that is the reference.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: LossScale
    average: MovingAverage | None
    method: Method
    stream: Stream
    step: int = 0
    skipped_steps: int = 0
    seen: dict[str, int] = field(default_factory=lambda: {"samples_scored": 0, "samples_trained": 0})
    history: list[Record] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    unscored: Record | None = None
    self_reference: MovingAverage | None = None

    def _averages(self) -> dict[str, MovingAverage]:
        averages = {EMA: self.average, _SELF: self.self_reference}
        return {prefix: average for prefix, average in averages.items() if average is not None}

    def state_dict(self) -> Snapshot:
        """Return the state: tensors are the ones that training changes, not copies."""
        shared = training_state(self.model, self.optimizer)
        for prefix, average in self._averages().items():
            shared |= {f"{prefix}{key}": value for key, value in average.state_dict().items()}
        shared |= {f"{_SCALER}{key}": value for key, value in self.scaler.state_dict().items()}
        progress = {
            "step": self.step,
            "history": self.history,
            "passed_over": self.skipped_steps,
            "seen": self.seen,
            "unscored": self.unscored,
            # Where some optimizers count.
            "optimizer_steps": [
                int(group["step"]) if "step" in group else None for group in self.optimizer.param_groups
            ],
        }
        return Snapshot(shared, self.method.state_dict(), self.counts, progress)

    def load_state_dict(self, checkpoint: Checkpoint, ranks: Ranks) -> None:
        """Load the state of a checkpoint, which may be of another number of ranks."""
        restore_training(checkpoint, self.model, self.optimizer)
        progress = checkpoint.progress
        self.step, self.history = progress["step"], progress["history"]
        self.skipped_steps, self.seen = progress["passed_over"], progress["seen"]
        self.unscored = progress.get("unscored")
        for group, count in zip(self.optimizer.param_groups, progress["optimizer_steps"], strict=True):
            if count is not None:
                group["step"] = torch.full_like(own, count) if isinstance(own := group["step"], Tensor) else count
        for prefix, average in self._averages().items():
            checkpoint.fill({f"{prefix}{key}": value for key, value in average.state_dict().items()})
        checkpoint.fill({f"{_SCALER}{key}": value for key, value in self.scaler.state_dict().items()})
        self.method.load_state_dict(checkpoint.own)
        # Counts of ranks that no longer exist go to those that do.
        self.stream.load_state_dict(sum(map(Counter, checkpoint.counts[ranks.rank :: ranks.count]), Counter()))
        self.counts = self.stream.state_dict()


def best_record(history: Sequence[Record], metric: str | None) -> Record | None:
    """Return the validation of the best value of a metric, the first of equals; None without a metric or validation.

    The best is the lowest of a loss or a rank, and the highest of all else.

    Raises
    ------
    UserError
        If the validations have no such metric.
    """
    if metric is None or not history:
        return None
    for record in history:
        if metric not in record:
            raise UserError(f"--best {metric} is no metric of the validations: choose one of {', '.join(record)}")
    sign = -1 if metric.endswith(("loss", "_rank")) else 1
    return max(history, key=lambda record: (sign * record[metric], -record["step"]))


def check_resumable(path: Path, checkpoint: Checkpoint, settings: dict[str, Any], best: str | None) -> None:
    """Refuse a checkpoint of other settings, or one without that of the best validation beside it."""
    check_settings(path, checkpoint.settings, settings)
    record = best_record(checkpoint.progress["history"], best)
    if record is not None and not step_folder(path.parent, int(record["step"])).is_dir():
        raise UserError(
            f"--best {best}: the checkpoint of the best validation so far, step {record['step']}, was not kept: leave "
            "out --best, or start anew in another --out"
        )
