"""The numbers of a run: what is measured, means between two lines of the log, and where the lines are written.

A step's numbers are computed by the device, which is not waited for: they are summed over ranks in one message, and
read some steps later.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drrho.coefficient import covariances_within_anchors
from drrho.routes import BatchIndex

from ..data.batch import Batch
from ..distributed import Ranks
from ..errors import UserError, printable
from ..io.files import append_line, write_atomically, writing
from .methods import Features, Number, RankSum
from .options import LogName

# What a page could take for markup, and a terminal for a command, in the name of a number.
_MARKUP = re.compile(r"[^\w ./:@+-]")

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
    project, name : str, optional
        Project and name of the run, for wandb.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[LogName],
        settings: dict[str, Any],
        project: str | None = None,
        name: str | None = None,
    ) -> None:
        self._events = folder / "tensorboard"
        self._text = folder / "log.txt" if "text" in names else None
        self._lines = folder / "log.jsonl" if "jsonl" in names else None
        self._board = self._wandb = None
        if "tensorboard" in names:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--log-to tensorboard needs the package tensorboard: pip install tensorboard") from None
            with writing(self._events):
                self._board = SummaryWriter(self._events)
            threading.excepthook = _without_writers_errors
        if "wandb" in names:
            try:
                import wandb  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise UserError("--log-to wandb needs the package wandb: pip install wandb") from None
            self._wandb = wandb.init(
                project=project or os.environ.get("WANDB_PROJECT", "drrho"),  # an argument goes before the variable
                name=name or folder.absolute().name,
                id=_wandb_id(folder / "wandb-id"),
                dir=folder,
                config=settings,
                resume="allow",
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers after a step."""
        if self._text is not None:
            now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
            numbers = (f"{printable(name)} {value:.6g}" for name, value in values.items())
            append_line(self._text, f"{now}  step {step}  {'  '.join(numbers)}")
        if self._lines is not None:
            append_line(self._lines, json.dumps({"step": step, **values}))
        if self._board is not None:
            with writing(self._events):  # what its own thread could not write is raised by a later call
                for name, value in values.items():
                    self._board.add_scalar(_MARKUP.sub("_", name), value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is buffered."""
        if self._board is not None:
            with writing(self._events):
                self._board.flush()
                self._board.close()
            threading.excepthook = threading.__excepthook__
        if self._wandb is not None:
            self._wandb.finish()


def _without_writers_errors(error: threading.ExceptHookArgs) -> None:
    """Print no traceback of what TensorBoard's own thread could not write, which a later call raises."""
    if not (isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(error)


def _wandb_id(path: Path) -> str:
    """Return the run's own name for wandb, kept in a file: folders of runs may have one name."""
    if not path.exists():
        write_atomically(path, secrets.token_hex(8).encode())
    return path.read_text()


@torch.no_grad()
def steering_measures(features: Features, reference: Features | None, ranks: Ranks) -> Record:
    """Return what steering depends on, over the negatives of a batch: Var(l), Var(l - l_ref), correlation with l_ref.

    Pooled over both directions, and by side: over an image's negative texts, over a text's negative images.
    """
    own = features[0].float(), features[1].float()
    others = own if reference is None else (reference[0].to(own[0]), reference[1].to(own[1]))
    models = [(own, own)] if reference is None else [(own, own), (own, others), (others, others)]
    variance, *of_both = map(_by_side, covariances_within_anchors(models, ranks.group).tolist())
    found = {f"variance_of_losses{side}": value for side, value in variance.items()}
    if not of_both:
        return found
    covariance, of_reference = of_both
    for side, value in variance.items():
        found[f"variance_of_excess{side}"] = value - 2 * covariance[side] + of_reference[side]
        found[f"correlation_with_reference{side}"] = covariance[side] / math.sqrt(
            max(value * of_reference[side], 1e-300)
        )
    return found


def _by_side(sides: Sequence[float]) -> Record:
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

    def add(self, samples: int, skipped: Mapping[str, int], log: Record) -> None:
        """Add the numbers of a step, with those of its samples and of the skipped ones by reason."""
        self._samples += samples
        self._skipped.update(skipped)
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


class Underway(NamedTuple):
    """A step whose numbers are not read yet.

    Attributes
    ----------
    step : int
        Steps before it.
    scored, trained : BatchIndex
        Samples that the stream gave, and those that a backward pass was for.
    skipped : mapping
        Number of this rank's samples that could not be used, by reason.
    log, after : dict
        What the step logs, and what the method's own step does.
    steering : callable
        Measures what steering depends on, on its batch.
    """

    step: int
    scored: BatchIndex
    trained: BatchIndex
    skipped: Mapping[str, int]
    log: dict[str, Number]
    after: Mapping[str, Number] = MappingProxyType({})
    steering: Callable[[], Record] = dict


def packed(numbers: Sequence[Tensor]) -> Tensor:
    """Return scalars of any types in one tensor, float64, by a few operations."""
    dtypes = list(dict.fromkeys(number.dtype for number in numbers))
    parts = [[k for k, number in enumerate(numbers) if number.dtype == dtype] for dtype in dtypes]
    stacked = [torch.stack([numbers[k].detach().reshape(()) for k in part]).double() for part in parts]
    if len(parts) == 1:
        return stacked[0]
    places = {k: place for place, k in enumerate(k for part in parts for k in part)}
    together = torch.cat(stacked).unbind()
    return torch.stack([together[places[k]] for k in range(len(numbers))])


def on_device(log: Mapping[str, Number]) -> list[Tensor]:
    """Return the numbers that the device computes and every rank has, in order."""
    return [number for number in log.values() if isinstance(number, Tensor)]


def parts_of_ranks(log: Mapping[str, Number]) -> list[Tensor]:
    """Return this rank's parts of the numbers that are summed over ranks, in order."""
    return [number.part for number in log.values() if isinstance(number, RankSum)]


def filled_in(log: Mapping[str, Number], sums: Iterable[float], values: Iterable[float]) -> Record:
    """Return the log with the numbers that `parts_of_ranks`, summed, and `on_device` gave."""
    sums, values, record = iter(sums), iter(values), {}
    for name, number in log.items():
        if isinstance(number, RankSum):
            record[name] = number.finish(next(sums))
        elif isinstance(number, Tensor):
            value = next(values)
            record[name] = value if number.is_floating_point() else int(value)
        else:
            record[name] = number
    return record


class LateNumbers:
    """Numbers that are copied from the device while it goes on, and received in order some steps later.

    Parameters
    ----------
    lag : int
        How many of the last ones may still be on their way; the same on all ranks, which receive them alike.
    """

    def __init__(self, device: torch.device, lag: int) -> None:
        self._device, self._lag = device, lag
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: deque[tuple[Callable[[], list[float]], Callable[[list[float]], None]]] = deque()

    def put(self, numbers: Tensor | None, receive: Callable[[list[float]], None]) -> None:
        """Send numbers ``[n]``, or none, to ``receive``."""
        self._pending.append((list if numbers is None else self._copied(numbers), receive))

    def read(self, *, all_of_them: bool = False) -> None:
        """Let those be received that are old enough."""
        while len(self._pending) > (0 if all_of_them else self._lag):
            values, receive = self._pending.popleft()
            receive(values())

    def _copied(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Start to copy the numbers; return what waits for them."""
        if self._stream is None:
            return numbers.tolist
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        copy, done = torch.empty_like(numbers, device="cpu", pin_memory=True), torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            copy.copy_(numbers, non_blocking=True)
            done.record()
        numbers.record_stream(self._stream)

        def values() -> list[float]:
            done.synchronize()
            return copy.tolist()

        return values
