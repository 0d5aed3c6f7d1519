"""Training, on one process or many: `Trainer.fit` reads from top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrho.ranks import gathered, row_counts
from experiments.clip.data.batch import Batch, Reference, Stream
from experiments.clip.distributed import Ranks
from experiments.clip.errors import Interrupted, UserError
from experiments.clip.io.files import append_line
from experiments.clip.models.clip import Clip
from experiments.clip.training.checkpoint import (
    Checkpoint,
    check_settings,
    latest_checkpoint,
    restore_training,
    step_folder,
    step_number,
    training_state,
)
from experiments.clip.training.checkpoint_writer import CheckpointWriter
from experiments.clip.training.logs import Logs, Record, StepMeans, steering_measures
from experiments.clip.training.methods import Features, Method, MethodLoss
from experiments.clip.training.optimization import MovingAverage, build_optimizer, learning_rate
from experiments.clip.training.options import CheckpointPolicy, Execution, Optimization
from experiments.clip.training.selection import Selector
from experiments.clip.training.towers import NotFinite, Towers, choose_head, clipped_norm, full_tensor, hold_scale

# What ranks want after a step: nothing, a checkpoint, or one and an end for the signal of number wanted - _SAVE.
_SAVE = 1
# Names of a checkpoint's tensors beside weights and optimizer.
EMA, _SCALER = "ema.", "scaler."


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
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # pyright: ignore[reportPrivateImportUsage]
    average: MovingAverage | None
    method: Method
    stream: Stream
    step: int = 0
    skipped_steps: int = 0
    seen: dict[str, int] = field(default_factory=lambda: {"samples_scored": 0, "samples_trained": 0})
    history: list[Record] = field(default_factory=list)

    def state_dict(self) -> Snapshot:
        """Return the state: tensors are the ones that training changes, not copies."""
        shared = training_state(self.model, self.optimizer)
        if self.average is not None:
            shared |= {f"{EMA}{key}": value for key, value in self.average.state_dict().items()}
        if self.scaler.is_enabled():
            shared |= {f"{_SCALER}{key}": torch.tensor(value) for key, value in self.scaler.state_dict().items()}
        progress = {
            "step": self.step,
            "history": self.history,
            "passed_over": self.skipped_steps,
            "seen": self.seen,
            # Where some optimizers count.
            "optimizer_steps": [
                int(group["step"]) if "step" in group else None for group in self.optimizer.param_groups
            ],
        }
        return Snapshot(shared, self.method.state_dict(), self.stream.state_dict(), progress)

    def load_state_dict(self, checkpoint: Checkpoint, ranks: Ranks) -> None:
        """Load the state of a checkpoint, which may be of another number of ranks."""
        restore_training(checkpoint, self.model, self.optimizer)
        progress = checkpoint.progress
        self.step, self.history = progress["step"], progress["history"]
        self.skipped_steps, self.seen = progress["passed_over"], progress["seen"]
        for group, count in zip(self.optimizer.param_groups, progress["optimizer_steps"], strict=True):
            if count is not None:
                group["step"] = torch.full_like(own, count) if isinstance(own := group["step"], Tensor) else count
        if self.average is not None:
            state = self.average.state_dict()
            checkpoint.fill({f"{EMA}{key}": value for key, value in state.items()})
            self.average.load_state_dict(state)
        if self.scaler.is_enabled():
            state = {key: torch.tensor(value) for key, value in self.scaler.state_dict().items()}
            checkpoint.fill({f"{_SCALER}{key}": value for key, value in state.items()})
            self.scaler.load_state_dict({key: value.item() for key, value in state.items()})
        self.method.load_state_dict(checkpoint.own)
        # Counts of ranks that no longer exist go to those that do.
        self.stream.load_state_dict(sum(map(Counter, checkpoint.counts[ranks.rank :: ranks.count]), Counter()))


class Trainer:
    """Trains a model in place; a run that is interrupted resumes and, on one machine, ends at the same bits.

    Parameters
    ----------
    reference : Reference, optional
        Gives the reference's features of a batch.
    selector : Selector, optional
        Chooses the pairs to train on among those of a step, by both models' features; it needs a reference. Without it
        a step trains on all.
    settings : dict
        All that the weights depend on, in JSON's types; a checkpoint made with others is refused.
    folder : Path
        Where checkpoints are written.
    validate : callable
        Scores the model as it stands; called ``validations`` times, evenly spaced, the last time at the end.
    logs : Logs, optional
        Receives means over ``log_every`` steps, on the rank that leads.
    on_step : callable
        Receives the number of finished steps, their total and the step's log.
    stop : callable
        Asked after every step, on every rank, for the number of a signal; other than 0 on one of them, it ends the run
        with a checkpoint and `Interrupted`.
    nonfinite_limit : int
        How many steps with features, a loss or a gradient that is not finite are skipped before another one ends the
        run. The samples of each are written to ``nonfinite.jsonl`` beside the checkpoints.

    Attributes
    ----------
    state : TrainState
        Everything that training changes.
    total : int
        Steps of the run.
    """

    def __init__(
        self,
        clip: Clip,
        method: Method,
        stream: Stream,
        optimization: Optimization,
        *,
        reference: Reference | None = None,
        selector: Selector | None = None,
        ranks: Ranks,
        execution: Execution,
        policy: CheckpointPolicy,
        settings: dict[str, Any],
        folder: Path,
        seed: int,
        validate: Callable[[], Record],
        validations: int,
        logs: Logs | None,
        log_every: int,
        on_step: Callable[[int, int, Record], None],
        stop: Callable[[], int],
        nonfinite_limit: int = 0,
    ) -> None:
        choose_head(clip.model, method)
        self._towers = Towers(clip, execution, ranks)
        self.state = TrainState(
            clip.model,
            build_optimizer(clip.model, optimization),
            torch.amp.GradScaler(ranks.device.type, enabled=execution.precision == "float16"),  # pyright: ignore[reportPrivateImportUsage]
            None if optimization.ema is None else MovingAverage(clip.model.state_dict(), optimization.ema),
            method,
            stream,
        )
        self._optimization, self._reference, self._selector = optimization, reference, selector
        self._ranks, self._seed, self._nonfinite_limit = ranks, seed, nonfinite_limit
        self._policy, self._settings, self._folder = policy, settings, folder
        self._validate, self._logs, self._log_every = validate, logs, log_every
        self._on_step, self._stop = on_step, stop
        self.total = stream.steps_per_epoch * optimization.epochs
        self._validation_steps = {round(self.total * (k + 1) / validations) for k in range(validations)}
        self._writer = CheckpointWriter(folder, settings, ranks, policy.keep)
        self._means, self._saved_at = StepMeans(ranks), time.monotonic()
        # Measured when a line of the log is due: what steering depends on, and what a selection has chosen.
        self._steering: Callable[[], Record] = dict
        self._learnability: Callable[[], Record] = dict

    def fit(self) -> list[Record]:
        """Train to the end, from the last checkpoint if there is one; return one record per validation.

        Records and lines of the log count the pairs of all steps so far, over all ranks: ``samples_scored`` are those
        that the stream gave, ``samples_trained`` those that a backward pass was for.
        """
        state, stream = self.state, self.state.stream
        self.restore()
        self._means, self._saved_at = StepMeans(self._ranks), time.monotonic()
        for epoch in range(state.step // stream.steps_per_epoch, self._optimization.epochs):
            first = state.step - epoch * stream.steps_per_epoch
            for candidates in self._means.timed(stream.batches(epoch, first)):
                log = self.step(candidates, epoch)
                self._on_step(state.step, self.total, log)
                if state.step % self._log_every == 0 or state.step == self.total:
                    self._write_log()
                is_best = state.step in self._validation_steps and self.validate(log)
                self._checkpoint_if_due(is_best)
        if not self._writer.is_of(state.step):
            self.save()
        self._writer.commit()
        return state.history

    def restore(self) -> None:
        """Load the last checkpoint, if there is one."""
        found = latest_checkpoint(self._folder)
        number = -1 if found is None else step_number(found)
        highest, lowest = self._ranks.maxima_over_ranks(number, -number)
        if highest != -lowest:
            raise UserError(
                f"rank {self._ranks.rank} finds {found or 'no checkpoint'}, others another one: --out must be a folder "
                "that all ranks share"
            )
        if found is None:
            return
        checkpoint = Checkpoint(found)
        check_settings(found, checkpoint.settings, self._settings)
        self.state.load_state_dict(checkpoint, self._ranks)
        self._writer.resumed_from(self.state.step, len(checkpoint.counts))
        best = best_record(self.state.history, self._policy.best)
        if best is not None and not step_folder(self._folder, int(best["step"])).is_dir():
            raise UserError(
                f"--best {self._policy.best}: the checkpoint of the best validation so far, step {best['step']}, was "
                "not kept: leave out --best, or start anew in another --out"
            )

    def step(self, candidates: Batch, epoch: int) -> Record:
        """Take one step on a batch, or skip it where something is not finite; return the numbers to log."""
        state = self.state
        # Dropout is a function of seed, step and rank, so that a resumed run needs no generators' states.
        torch.manual_seed(int(np.random.SeedSequence([self._seed, state.step, self._ranks.rank]).generate_state(1)[0]))
        state.optimizer.zero_grad(set_to_none=True)
        scale = self._ranks.count * float(state.scaler.scale(torch.ones((), device=self._ranks.device)))
        reference = self._reference_features(candidates)
        lr = self._set_learning_rate()
        batch, trained = candidates, 0
        try:
            if self._selector is not None:
                batch, reference = self._select(self._selector, candidates, reference)
            parts = self._optimization.accumulation
            loss, features = self._towers.backward(state.method, batch, reference, parts, epoch, scale)
            trained = len(batch.index)
            norm = self._gradient_norm(loss)
        except NotFinite as problem:
            self._skip(batch, problem)
            log = {"lr": lr}
        else:
            log = {"loss": loss.value.item(), "lr": lr, "gradient_norm": norm, **loss.log}
            log |= self._update(loss, scale, norm, lr)
            self._steering = partial(steering_measures, features, reference, self._ranks)
        state.step += 1
        self._count(len(candidates.index), trained)
        self._means.add(candidates, log)
        return log

    def _reference_features(self, batch: Batch) -> Features | None:
        if self._reference is None or batch.reference_inputs is None:
            return None
        with self._towers.autocast():
            return self._reference.features(batch.reference_inputs, self._ranks.device)

    def _set_learning_rate(self) -> float:
        lr = learning_rate(self.state.step, self.total, self._optimization)
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _select(
        self, selector: Selector, candidates: Batch, reference: Features | None
    ) -> tuple[Batch, Features | None]:
        """Return the pairs to train on, with the reference's features of them."""
        parts = self._optimization.accumulation * selector.candidates
        target = self._towers.pairs(self.state.method, candidates, parts)
        batch, reference, self._learnability = selector.choose(self.state.step, candidates, target, reference)
        return batch, reference

    def _gradient_norm(self, loss: MethodLoss) -> float:
        """Return the norm of the gradient, clipped; refuse a loss or a gradient that is not finite."""
        state = self.state
        if not bool(torch.isfinite(loss.value)):
            raise NotFinite(f"the loss is {loss.value.item()}")
        state.scaler.unscale_(state.optimizer)
        norm = clipped_norm(state.model, self._optimization.clip_norm)
        if not math.isfinite(norm) and not state.scaler.is_enabled():
            raise NotFinite(f"the gradient's norm is {norm}")
        return norm

    def _update(self, loss: MethodLoss, scale: float, norm: float, lr: float) -> Record:
        """Update the weights, their moving average and what the method learns; return the method's numbers to log."""
        state = self.state
        log = state.method.step(loss, scale, lr / self._optimization.lr) if math.isfinite(norm) else {}
        state.scaler.step(state.optimizer)
        state.scaler.update()
        hold_scale(state.model, state.method)
        if state.average is not None:
            state.average.update(state.model.state_dict())
        return log

    def _skip(self, batch: Batch, problem: NotFinite) -> None:
        """Write down the samples of a step that cannot be taken; end the run where there were too many."""
        state, ranks = self.state, self._ranks
        state.skipped_steps += 1
        path = self._folder.parent / "nonfinite.jsonl"
        own = batch.index.to(ranks.device)
        index = gathered(own, row_counts(len(own), ranks.group, ranks.device), ranks.group)
        if ranks.leads:
            append_line(path, json.dumps({"step": state.step, "problem": str(problem), "samples": index.tolist()}))
        if state.skipped_steps > self._nonfinite_limit:
            self._writer.commit()
            raise UserError(
                f"{problem} at step {state.step}, whose samples are in {path}: look at them, lower --lr, set "
                "--clip-norm, or allow for such steps by --nonfinite-limit"
            ) from None

    def _count(self, scored: int, trained: int) -> None:
        counts = self._ranks.sum(torch.tensor([scored, trained], device=self._ranks.device)).tolist()
        self.state.seen = {
            key: seen + count for (key, seen), count in zip(self.state.seen.items(), counts, strict=True)
        }

    def _write_log(self) -> None:
        """Write the means since the last line, and what is measured on the last batch."""
        state = self.state
        values = self._means.finish() | self._steering() | self._learnability()
        if self._logs is not None:
            self._logs.write(state.step, {**values, **state.seen, "epoch": state.step / state.stream.steps_per_epoch})

    def validate(self, log: Record) -> bool:
        """Score the model and keep the record; return whether it is the best so far by the metric to keep."""
        state = self.state
        scores = self._validate()
        record = {"step": state.step, **state.seen, **log, **self._steering(), **scores}
        state.history.append(record)
        if self._logs is not None and scores:
            self._logs.write(state.step, {f"validation/{key}": value for key, value in scores.items()})
        return self._policy.best is not None and best_record(state.history, self._policy.best) is record

    def _checkpoint_if_due(self, is_best: bool) -> None:
        """Save after the best validation so far, by time, by steps, or when asked to stop; then end the run."""
        policy, step = self._policy, self.state.step
        asked, seconds = self._stop(), time.monotonic() - self._saved_at
        is_due = (
            is_best or seconds > 60 * policy.checkpoint_minutes or step % (policy.checkpoint_steps or step + 1) == 0
        )
        wanted, is_writing = self._ranks.maxima_over_ranks(
            _SAVE + asked if asked else _SAVE * is_due, int(self._writer.is_writing)
        )
        if self._writer.has_begun and not is_writing:
            self._writer.commit()
        if wanted:
            self.save()
            self._saved_at = time.monotonic()
        if wanted > _SAVE:
            self._writer.commit()
            message = f"stopped after step {step} of {self.total}; {self._folder} holds the state"
            raise Interrupted(message, wanted - _SAVE)

    def save(self) -> None:
        """Start to write a checkpoint, which is committed later."""
        self._writer.start(*self.state.state_dict(), self._best_step)

    def _best_step(self, last: int) -> int | None:
        """Return the step of the best validation up to a step, whose checkpoint stays as long as that step's does."""
        best = best_record([record for record in self.state.history if record["step"] <= last], self._policy.best)
        return None if best is None else int(best["step"])

    def averaged_weights(self) -> dict[str, Tensor]:
        """Return the moving average of the weights in full; empty without one."""
        average = self.state.average
        return {} if average is None else {key: full_tensor(value) for key, value in average.average.items()}


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
