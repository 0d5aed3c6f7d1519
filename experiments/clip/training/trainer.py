"""Training, on one process or many: `Trainer.fit` reads from top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from drrho.routes import BatchIndex
from drrho.validation import deferred_checks

from ..data.batch import Batch, HeldOut, Reference, Stream
from ..distributed import Ranks
from ..errors import Interrupted, UserError
from ..io.files import append_line
from ..models.clip import Clip
from ..signals import Stopped, interruptible, noted
from .checkpoint import (
    Checkpoint,
    check_continued,
    latest_checkpoint,
    step_number,
)
from .checkpoint_writer import CheckpointWriter
from .logs import (
    LateNumbers,
    Logs,
    Record,
    StepMeans,
    Underway,
    filled_in,
    on_device,
    packed,
    parts_of_ranks,
    steering_measures,
)
from .methods import Features, Method, MethodLoss, Number, Outcome
from .optimization import LossScale, MovingAverage, build_optimizer, learning_rate, step_if
from .options import CheckpointPolicy, Execution, Optimization
from .references import SelfReference
from .selection import Chosen, Selector
from .state import TrainState, best_record, check_resumable
from .towers import (
    Towers,
    are_not_finite,
    choose_head,
    clipped_norm,
    full_tensor,
    hold_scale,
    precision_of,
)

# What ranks want after a step: nothing, a checkpoint, or one and an end for the signal of number wanted - _SAVE.
_SAVE = 1
_SHOWN_EVERY = 50  # steps between two looks at held-out pairs
_FEATURES = "the features are not finite"
# Pairs that a step trains on at least: one has no other to be compared with, and is skipped under this name.
_FEWEST, _ALONE = 2, "alone in its batch"


class Wishes(NamedTuple):
    """What a rank wants after a step, and whether it still writes a checkpoint."""

    wanted: int = 0
    is_writing: int = 0


class Trainer:
    """Trains a model in place; a run that is interrupted resumes and, on one kind of CPU, ends at the same bits.

    Parameters
    ----------
    reference : Reference, optional
        Gives the reference's features of a batch.
    self_reference : float, optional
        Instead of one, the reference is the target's own moving average with this decay per step.
    held_out : HeldOut, optional
        Held-out pairs that the method is shown in every 50th step, as both models see them.
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
        Receives the number of finished steps, their total and the step's log, once its numbers are read.
    stop : callable
        Asked at every step, on every rank, for the number of a signal; other than 0 on one of them, it ends the run
        with a checkpoint and `Interrupted`.
    nonfinite_limit : int
        How many steps with features, a loss or a gradient that is not finite are skipped before another one ends the
        run. The samples of each are written to ``nonfinite.jsonl`` beside the checkpoints.
    lag : int, optional
        For how many of the last steps numbers may still be on their way from the device, which decides itself whether a
        step is taken: by default 1 on a GPU, so that it need not wait. Lines of the log, validations and checkpoints
        come after all numbers. A run that ends for ``nonfinite_limit`` has tried as many steps more, and saves none.
    other : Path, optional
        The checkpoint of another run, from whose state this one begins unless it has a checkpoint of its own.
    export : callable
        Writes the model as it stands, given a name and the moving average; called where the policy wants it.

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
        self_reference: float | None = None,
        held_out: HeldOut | None = None,
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
        lag: int | None = None,
        other: Path | None = None,
        export: Callable[[str, dict[str, Tensor]], None] = lambda name, average: None,
    ) -> None:
        choose_head(clip.model, method)
        # A copy of the target, made before that is compiled or sharded.
        own = None if self_reference is None else SelfReference(clip, self_reference, execution, ranks)
        self._towers = Towers(clip, execution, ranks)
        self.state = TrainState(
            clip.model,
            build_optimizer(clip.model, optimization),
            LossScale(precision_of(execution, ranks.device) == "float16", ranks.device),
            None if optimization.ema is None else MovingAverage(clip.model.state_dict(), optimization.ema),
            method,
            stream,
            self_reference=None if own is None else own.average,
        )
        self._optimization, self._reference, self._selector = optimization, reference, selector
        self._self_reference, self._held_out = own, held_out
        self._ranks, self._seed, self._nonfinite_limit = ranks, seed, nonfinite_limit
        self._policy, self._settings, self._folder = policy, settings, folder
        self._validate, self._logs, self._log_every = validate, logs, log_every
        self._on_step, self._stop, self._other, self._export = on_step, stop, other, export
        self.total = stream.steps_per_epoch * optimization.epochs
        self._validation_steps = {round(self.total * (k + 1) / validations) for k in range(validations)}
        self._checkpoint_minutes = policy.minutes(sum(each.numel() for each in clip.model.parameters()))
        self._writer = CheckpointWriter(folder, settings, ranks, policy.keep)
        self._means, self._saved_at = StepMeans(ranks), time.monotonic()
        self._late = LateNumbers(ranks.device, int(ranks.device.type == "cuda") if lag is None else lag)
        # The log of the last step whose numbers are read, and what ranks wanted before the last step.
        self._log: Record = {}
        self._agreed = Wishes()
        # How many samples a rank gets at most.
        self._capacity = -(-optimization.batch_size * (selector.candidates if selector else 1) // ranks.count)
        # Measured when a line of the log is due: what steering depends on, and what a selection has chosen.
        self._steering: Callable[[], Record] = dict
        self._learnability: Callable[[], Record] = dict

    def fit(self) -> list[Record]:
        """Train to the end, from the last checkpoint if there is one; return one record per validation.

        Records and lines of the log count the pairs of all steps so far, over all ranks: ``samples_scored`` are those
        that the stream gave, ``samples_trained`` those that a backward pass was for.
        A signal that asks to stop ends the run with a checkpoint of the last step, also while a batch is waited for.
        """
        self.restore()
        with noted(self._policy.grace_seconds):
            self._fit()
        return self.state.history

    def _fit(self) -> None:
        state, stream = self.state, self.state.stream
        self._means, self._saved_at = StepMeans(self._ranks), time.monotonic()
        if state.unscored is not None:
            self.validate()
            self.save()
        for epoch in range(state.step // stream.steps_per_epoch, self._optimization.epochs):
            first = state.step - epoch * stream.steps_per_epoch
            for candidates in self._until_stopped(self._means.timed(stream.batches(epoch, first))):
                self.step(candidates, epoch)
                self._after_step(state.step in self._validation_steps)
        if not self._writer.is_of(state.step):
            self.save()
        self._writer.commit()
        if not state.seen["samples_trained"]:
            raise UserError(
                f"none of the {self.total} steps had {_FEWEST} pairs to compare: see skipped/ in the log, train on "
                "more pairs, or lower --candidates"
            )

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch | None]:
        """Yield the batches; None, and no more, where the run is asked to stop while it waits for one."""
        while True:
            try:
                with interruptible():
                    batch = next(batches, None)
            except Stopped:
                yield None
                return
            if batch is None:
                return
            yield batch

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
        if found is not None:
            checkpoint = Checkpoint(found)
            check_resumable(found, checkpoint, self._settings, self._policy.best)
            self.state.load_state_dict(checkpoint, self._ranks)
            self._writer.resumed_from(self.state.step, len(checkpoint.counts))
        elif self._other is not None:
            self._begin_from(self._other)

    def _begin_from(self, other: Path) -> None:
        """Load the state of another run, whose validations are its own."""
        state, checkpoint = self.state, Checkpoint(other)
        check_continued(other, checkpoint.settings, self._settings)
        state.load_state_dict(checkpoint, self._ranks)
        state.history, state.unscored = [], None
        if state.step >= self.total:
            raise UserError(f"--resume {other} has {state.step} steps, this run ends with {self.total}: raise --epochs")

    def step(self, candidates: Batch | None, epoch: int) -> None:
        """Take one step on a batch, on the device, where nothing changes if something is not finite.

        Its numbers are received by `_report`, some steps later. Where a rank has None, because a signal came while it
        waited for its batch, all ranks end the run.
        """
        state = self.state
        scored = self._samples_of_ranks(None if candidates is None else candidates.index)
        if candidates is None or scored is None:
            self._end(self._wishes().wanted if self._ranks.group is None else self._agreed.wanted)
        # Dropout is a function of seed, step and rank, so that a resumed run needs no generators' states.
        torch.manual_seed(int(np.random.SeedSequence([self._seed, state.step, self._ranks.rank]).generate_state(1)[0]))
        state.optimizer.zero_grad(set_to_none=True)
        underway = Underway(state.step, scored, scored, candidates.skipped, {"lr": self._set_learning_rate()})
        total = sum(scored.counts)
        if (total if self._selector is None else self._selector.size(total)) < _FEWEST:
            self._late.put(None, lambda _: self._pass_over(underway))
        else:
            with deferred_checks():
                self._take(underway, candidates, scored, epoch)
        state.step += 1
        state.counts = state.stream.state_dict()

    def _take(self, underway: Underway, candidates: Batch, scored: BatchIndex, epoch: int) -> None:
        chosen = self._chosen(candidates, scored)
        if chosen is None:
            self._late.put(None, lambda _: self._skip(underway, _FEATURES))
            return
        batch, reference, self._learnability = chosen
        trained = scored if batch is candidates else self._samples_of_ranks(batch.index)
        assert trained is not None
        self._train(batch, underway._replace(trained=trained), reference, epoch)

    def _train(self, batch: Batch, underway: Underway, reference: Features | None, epoch: int) -> None:
        """Compute the loss and its gradient, update what is learned from it, and send the step's numbers."""
        state, parts = self.state, self._optimization.accumulation
        if self._held_out is not None and state.step % _SHOWN_EVERY == 0:
            state.method.observe(self._towers.features_as_evaluated(self._held_out), self._held_out.reference)
        scale = self._ranks.count * state.scaler.scale
        loss, features = self._towers.backward(state.method, batch, underway.trained, reference, parts, epoch, scale)
        norm = self._gradient_norm()
        log = {"loss": loss.value, **underway.log, "gradient_norm": norm, **loss.log}
        sums = self._ranks.sum(packed([are_not_finite(*features, *(reference or ())), *parts_of_ranks(log)]))
        is_finite = (sums[0] == 0) & torch.isfinite(loss.value.detach())
        has_gradient = is_finite & torch.isfinite(norm)
        after = self._update(loss, scale, Outcome(is_finite if state.scaler.is_enabled else has_gradient, has_gradient))
        steering = partial(steering_measures, features, reference, self._ranks)
        underway = underway._replace(log=log, after=after, steering=steering)
        numbers = [*on_device(log), *on_device(after)]
        self._late.put(torch.cat([sums, packed(numbers)]), partial(self._report, underway, len(sums)))

    def _samples_of_ranks(self, own: Tensor | None) -> BatchIndex | None:
        """Return the samples of all ranks, and note what ranks want; the hosts exchange both in one message.

        None is of a rank that has no batch, and is then returned on all.
        """
        ranks, index = self._ranks, np.empty(0, np.int64) if own is None else own.numpy()
        if ranks.group is None:
            return None if own is None else BatchIndex([index])
        message = np.zeros(3 + self._capacity, np.int64)
        message[:3] = -1 if own is None else len(index), *self._wishes()
        message[3 : 3 + len(index)] = index
        messages = ranks.gathered_on_hosts(message)
        self._agreed = Wishes(*messages[:, 1:3].max(0).tolist())
        if messages[:, 0].min() < 0:
            return None
        return BatchIndex([each[3 : 3 + each[0]] for each in messages], ranks.group)

    def _reference_features(self, batch: Batch, samples: BatchIndex, parts: int) -> Features | None:
        if self._self_reference is not None:
            return self._self_reference.features(batch, samples, parts)
        if self._reference is None or batch.reference_inputs is None:
            return None
        with self._towers.autocast():
            return self._reference.features(batch.reference_inputs, self._ranks.device)

    def _set_learning_rate(self) -> float:
        lr = learning_rate(self.state.step, self.total, self._optimization)
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _chosen(self, candidates: Batch, scored: BatchIndex) -> Chosen | None:
        """Return the pairs to train on; None if that depends on features that are not finite."""
        selector, parts = self._selector, self._optimization.accumulation
        parts = parts if selector is None else parts * selector.candidates
        reference = self._reference_features(candidates, scored, parts)
        if selector is None:
            return Chosen(candidates, reference, dict)
        target, wrong = self._towers.pairs(self.state.method, candidates, scored, parts)
        return selector.choose(self.state.step, candidates, sum(scored.counts), target, wrong, reference)

    def _gradient_norm(self) -> Tensor:
        """Return the norm of the gradient before it was clipped."""
        model = self.state.model
        self.state.scaler.unscale([each.grad for each in model.parameters() if each.grad is not None])
        return clipped_norm(model, self._optimization.clip_norm)

    def _update(self, loss: MethodLoss, scale: float | Tensor, outcome: Outcome) -> dict[str, Number]:
        """Update the weights, their moving average and what the method keeps; return the method's numbers to log."""
        state, rate = self.state, self.state.optimizer.param_groups[0]["lr"] / self._optimization.lr
        log = state.method.step(loss, scale, rate, outcome)
        step_if(state.optimizer, outcome.has_gradient)
        hold_scale(state.model, state.method, outcome.has_gradient)
        state.scaler.update(*outcome)
        for average in (state.average, state.self_reference):
            if average is not None:
                average.update(state.model.state_dict(), outcome.is_finite)
        return log

    def _report(self, underway: Underway, sums: int, numbers: list[float]) -> None:
        """Receive the numbers of a step: log it, or write down that it was not taken."""
        shared, own = numbers[1:sums], iter(numbers[sums:])
        log = filled_in(underway.log, shared, own)
        problem = _problem(numbers[0] > 0, log["loss"], log["gradient_norm"], self.state.scaler.is_enabled)
        if problem:
            self._skip(underway, problem)
            return
        if math.isfinite(log["gradient_norm"]):
            log |= filled_in(underway.after, (), own)
        self._steering = underway.steering
        self._finish(underway, sum(underway.trained.counts), log)

    def _skip(self, underway: Underway, problem: str) -> None:
        """Write down the samples of a step that was not taken; end the run where there were too many."""
        state, path = self.state, self._folder.parent / "nonfinite.jsonl"
        state.skipped_steps += 1
        if self._ranks.leads:
            index = np.concatenate(underway.trained.parts).tolist()
            append_line(path, json.dumps({"step": underway.step, "problem": problem, "samples": index}))
        if state.skipped_steps > self._nonfinite_limit:
            self._writer.commit()
            raise UserError(
                f"{problem} at step {underway.step}, whose samples are in {path}: look at them, lower --lr, set "
                "--clip-norm, or allow for such steps by --nonfinite-limit"
            )
        trained = 0 if problem == _FEATURES else sum(underway.trained.counts)
        self._finish(underway, trained, {"lr": underway.log["lr"]})  # pyright: ignore[reportArgumentType]

    def _pass_over(self, underway: Underway) -> None:
        """Count the samples of a batch that has no two pairs to compare: at the end of an epoch, or others skipped."""
        alone = {_ALONE: len(underway.scored.own)} if len(underway.scored.own) else {}
        self._finish(underway._replace(skipped={**underway.skipped, **alone}), 0, {})

    def _finish(self, underway: Underway, trained: int, log: Record) -> None:
        """Count a step's samples, and give its numbers to those that want them."""
        counts = sum(underway.scored.counts), trained
        seen = self.state.seen
        self.state.seen = {key: seen[key] + count for key, count in zip(seen, counts, strict=True)}
        self._means.add(len(underway.scored.own), underway.skipped, log)
        self._log = log or self._log
        self._on_step(underway.step + 1, self.total, log)

    def _write_log(self) -> None:
        """Write the means since the last line, and what is measured on the last batch."""
        state = self.state
        values = self._means.finish() | self._steering() | self._learnability()
        if self._logs is not None:
            self._logs.write(state.step, {**values, **state.seen, "epoch": state.step / state.stream.steps_per_epoch})

    def _after_step(self, validates: bool) -> None:
        """Log, validate and save where that is due: by time, by steps, after the best validation so far.

        End the run with a checkpoint where that is asked. Ranks know of each other what they wanted before the step.
        """
        state, policy = self.state, self._policy
        logs = state.step % self._log_every == 0 or state.step == self.total
        self._late.read(all_of_them=logs or validates)
        if logs:
            self._write_log()
        if (name := self._export_due()) is not None:
            self._late.read(all_of_them=True)
            self._export(name, self.averaged_weights())
        if validates:
            state.unscored = {"step": state.step, **state.seen, **self._log, **self._steering()}
        wanted, is_writing = self._wishes() if self._ranks.group is None else self._agreed
        if self._writer.has_begun and not is_writing:
            self._writer.commit()
        if wanted > _SAVE:
            self._end(wanted)
        is_best = validates and self.validate()
        if wanted or is_best or state.step % (policy.checkpoint_steps or state.step + 1) == 0:
            self.save()
            self._saved_at = time.monotonic()

    def _export_due(self) -> str | None:
        """Return the name of the export that is due after this step, if one is."""
        step, policy, epoch = self.state.step, self._policy, self.state.stream.steps_per_epoch
        if policy.export_epochs and step % (epoch * policy.export_epochs) == 0:
            return f"epoch-{step // epoch}"
        return f"step-{step}" if policy.export_steps and step % policy.export_steps == 0 else None

    def validate(self) -> bool:
        """Score the model and keep the record; return whether it is the best so far by the metric to keep."""
        state = self.state
        try:
            # The ranks score together, and would lose each other.
            with interruptible() if self._ranks.group is None else nullcontext():
                scores = self._validate()
        except Stopped:
            self._end(self._wishes().wanted)
        record = {**(state.unscored or {}), **scores}
        state.history.append(record)
        state.unscored = None
        if self._logs is not None and scores:
            self._logs.write(state.step, {f"validation/{key}": value for key, value in scores.items()})
        if self._policy.best is None:
            return False
        return bool(self._ranks.max_over_ranks(int(best_record(state.history, self._policy.best) is record)))

    def _wishes(self) -> Wishes:
        """Return what this rank wants: a checkpoint by time, or one and an end because it is asked to stop."""
        asked, seconds = self._stop(), time.monotonic() - self._saved_at
        is_due = seconds > 60 * self._checkpoint_minutes
        return Wishes(_SAVE + asked if asked else _SAVE * is_due, int(self._writer.is_writing))

    def _end(self, wanted: int) -> NoReturn:
        """End the run as it stands, for the signal that is wanted, with a checkpoint of the last step."""
        step = self.state.step
        if step and not self._writer.is_of(step):
            self.save()
        self._writer.commit()
        kept = f"; {self._folder} holds the state" if step else ""
        raise Interrupted(f"stopped after step {step} of {self.total}{kept}", wanted - _SAVE)

    def save(self) -> None:
        """Start to write a checkpoint, which is committed later, once all steps so far are known to be right."""
        self._late.read(all_of_them=True)
        self._writer.start(*self.state.state_dict(), self._best_step)

    def _best_step(self, last: int) -> int | None:
        """Return the step of the best validation up to a step, whose checkpoint stays as long as that step's does."""
        best = best_record([record for record in self.state.history if record["step"] <= last], self._policy.best)
        return None if best is None else int(best["step"])

    def averaged_weights(self) -> dict[str, Tensor]:
        """Return the moving average of the weights in full; empty without one."""
        average = self.state.average
        return {} if average is None else {key: full_tensor(value) for key, value in average.average.items()}


def _problem(are_features_wrong: bool, loss: float, norm: float, scales: bool) -> str:
    """Return what is not finite in a step; with a loss scale a gradient may overflow."""
    if are_features_wrong:
        return _FEATURES
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    return "" if scales or math.isfinite(norm) else f"the gradient's norm is {norm}"
