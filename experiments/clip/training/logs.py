"""The numbers of a run: what is measured, means between two lines of the log, and where the lines are written."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from drrho.coefficient import within_anchors
from experiments.clip.data.batch import Batch
from experiments.clip.distributed import Ranks
from experiments.clip.errors import UserError, printable
from experiments.clip.io.files import append_line
from experiments.clip.training.methods import Features
from experiments.clip.training.options import LogName

#: Numbers by name.
Record = dict[str, float]


class Logs:
    """Writers of one run's numbers; a run that is resumed appends.

    Parameters
    ----------
    folder : Path
        Where ``log.txt``, ``log.jsonl`` and TensorBoard's events go.
    names : sequence of str
        Which logs to write.
    settings : dict
        The run's settings, for wandb.
    """

    def __init__(self, folder: Path, names: Sequence[LogName], settings: dict[str, Any]) -> None:
        self._text = folder / "log.txt" if "text" in names else None
        self._lines = folder / "log.jsonl" if "jsonl" in names else None
        self._board = self._wandb = None
        if "tensorboard" in names:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--log-to tensorboard needs the package tensorboard: pip install tensorboard") from None
            self._board = SummaryWriter(folder / "tensorboard")
        if "wandb" in names:
            try:
                import wandb  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise UserError("--log-to wandb needs the package wandb: pip install wandb") from None
            self._wandb = wandb.init(project="drrho", dir=folder, config=settings, resume="allow", id=folder.name)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers after a step."""
        if self._text is not None:
            now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
            numbers = (f"{printable(name)} {value:.6g}" for name, value in values.items())
            append_line(self._text, f"{now}  step {step}  {'  '.join(numbers)}")
        if self._lines is not None:
            append_line(self._lines, json.dumps({"step": step, **values}))
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(printable(name), value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is buffered."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


@torch.no_grad()
def steering_measures(features: Features, reference: Features | None, ranks: Ranks) -> Record:
    """Return what steering depends on, over the negatives of a batch: Var(l), Var(l - l_ref), correlation with l_ref.

    Pooled over both directions, and by side: over an image's negative texts, over a text's negative images.
    """
    own = features[0].float(), features[1].float()
    variance = _by_side(within_anchors(own, own, ranks.group))
    found = {f"variance_of_losses{side}": value for side, value in variance.items()}
    if reference is None:
        return found
    others = reference[0].to(own[0]), reference[1].to(own[1])
    covariance = _by_side(within_anchors(own, others, ranks.group))
    of_reference = _by_side(within_anchors(others, others, ranks.group))
    for side, value in variance.items():
        found[f"variance_of_excess{side}"] = value - 2 * covariance[side] + of_reference[side]
        found[f"correlation_with_reference{side}"] = covariance[side] / math.sqrt(
            max(value * of_reference[side], 1e-300)
        )
    return found


def _by_side(sides: tuple[float, float]) -> Record:
    """Return the mean of both sides, and each, by the ending of its name."""
    return {"": sum(sides) / 2, "/image": sides[0], "/text": sides[1]}


class StepMeans:
    """Means over the steps between two lines of the log, and how the time was spent."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._reset()

    def _reset(self) -> None:
        self._start, self._waited = time.monotonic(), 0.0
        self._samples = 0
        self._sums: dict[str, float] = {}
        self._counts: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and measure how long the loop waits for them."""
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def add(self, batch: Batch, log: Record) -> None:
        """Add the numbers of a step."""
        self._samples += len(batch.index)
        self._skipped.update(batch.skipped)
        self._counts.update(log.keys())  # a step that was skipped has few numbers
        for key, value in log.items():
            self._sums[key] = self._sums.get(key, 0.0) + value

    def finish(self) -> Record:
        """Return the means and reset them; pairs per second and counts of skipped samples are this rank's."""
        seconds = time.monotonic() - self._start
        means = {key: value / self._counts[key] for key, value in self._sums.items()}
        found = {
            **means,
            "pairs_per_second_per_rank": self._samples / seconds,
            "share_of_time_waiting_for_data": self._waited / seconds,
            **{f"skipped/{reason}": count for reason, count in self._skipped.items()},
        }
        if self._ranks.device.type == "cuda":
            found["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._ranks.device) / 1e9
        self._reset()
        return found
