"""The training loop, on one process or many."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from drrho.accumulation import accumulate
from drrho.coefficient import within_anchors
from drrho.ranks import gathered, row_counts
from drrho.selection import PairFeatures
from experiments.clip.data.batch import Batch, Reference, Stream
from experiments.clip.distributed import Ranks
from experiments.clip.errors import UserError
from experiments.clip.io.files import append_line
from experiments.clip.models.clip import Clip, at_least_one
from experiments.clip.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    check_settings,
    latest_checkpoint,
    restore_training,
    step_folder,
    step_number,
    training_state,
)
from experiments.clip.training.logs import Logs
from experiments.clip.training.methods import Features, Head, Loss, Method
from experiments.clip.training.optimization import MovingAverage, Optimization, build_optimizer, learning_rate
from experiments.clip.training.selection import Selector

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What ranks want after a step: nothing, a checkpoint, or one and an end for the signal of number wanted - _SAVE.
_SAVE = 1
# Names of a checkpoint's tensors beside weights and optimizer.
EMA, _SCALER = "ema.", "scaler."

Record = dict[str, float]


@dataclass(frozen=True)
class Execution:
    """On what and how the towers run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Over ranks (torchrun or srun): whole copies of the model, or its parameters sharded (FSDP2)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the towers, by autocast; float16 scales the loss. Similarities and losses are float32 always."""
    compile: bool = False
    """Compile the towers with torch.compile."""
    activation_checkpointing: bool = False
    """Keep the inputs of blocks alone and compute them again in the backward pass."""
    exchange_minutes: float = 10.0
    """How long a rank waits for another before it stops with an error."""


@dataclass(frozen=True)
class CheckpointPolicy:
    """When checkpoints are written, and which stay."""

    checkpoint_minutes: float = 1.0
    """Minutes between checkpoints, which are written while training goes on."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints, besides."""
    keep: int = 2
    """How many of the last checkpoints stay."""
    best: str | None = None
    """Metric of the validations, such as naming_top1, whose highest value's checkpoint stays too; it is exported as
    model-best."""


class Interrupted(Exception):
    """Training was asked to stop, by the signal of number ``signal``; the checkpoint is written."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def train(
    clip: Clip,
    method: Method,
    stream: Stream,
    optimization: Optimization,
    *,
    reference_model: Reference | None,
    selector: Selector | None = None,
    ranks: Ranks,
    execution: Execution,
    seed: int,
    checkpoints: Path,
    keeping: CheckpointPolicy,
    settings: dict[str, Any],
    validate: Callable[[], Record],
    validations: int,
    logs: Logs | None,
    log_every: int,
    on_step: Callable[[int, int, Record], None],
    stop: Callable[[], int],
    nonfinite_limit: int = 0,
) -> tuple[list[Record], dict[str, Tensor]]:
    """Train ``clip.model`` in place; return one record per validation, and the weights' moving average if there is one.

    Records and lines of the log count the pairs of all steps so far, over all ranks: ``samples_scored`` is those that
    were visited, ``samples_trained`` those that a backward pass was for.

    A checkpoint is written as ``keeping`` says, when ``stop`` does and at the end; if one made with the same
    ``settings`` is there, training goes on from it and, on one machine, ends at the same weights bit by bit.

    Parameters
    ----------
    reference_model : Reference, optional
        Gives the reference's features of a batch.
    selector : Selector, optional
        Chooses what to train on among the pairs of a step, by both models' features; it needs one. Otherwise a step
        trains on all.
    settings : dict
        All that the weights depend on, in JSON's types; a checkpoint made with others is refused.
    validate : callable
        Scores the model as it stands; called ``validations`` times, evenly spaced, the last time at the end.
    logs : Logs, optional
        Receives means over ``log_every`` steps, on the rank that leads.
    on_step : callable
        Receives the number of finished steps, their total and the step's log.
    stop : callable
        Asked after every step, on every rank, for the number of a signal; other than 0 on one, it ends the run with a
        checkpoint and `Interrupted`.
    nonfinite_limit : int
        Steps whose features, loss or gradient are not finite that are passed over before such a one ends the run. The
        samples of each are written down, in ``nonfinite.jsonl`` beside the checkpoints.
    """
    clip.model.logit_scale.requires_grad_(method.learns_scale)
    towers = Towers(clip, execution, ranks)
    optimizer = build_optimizer(clip.model, optimization)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=execution.precision == "float16")
    average = None if optimization.ema is None else MovingAverage(clip.model.state_dict(), optimization.ema)
    per_epoch = stream.steps_per_epoch
    total = per_epoch * optimization.epochs
    due = {round(total * (k + 1) / validations) for k in range(validations)}
    step: int = 0
    passed_over: int = 0
    seen = {"samples_scored": 0, "samples_trained": 0}
    history: list[Record] = []
    writer = CheckpointWriter(checkpoints, settings, ranks, keeping.keep)

    def shared() -> dict[str, Tensor]:
        state = training_state(clip.model, optimizer)
        if average is not None:
            state |= {f"{EMA}{key}": value for key, value in average.state_dict().items()}
        if scaler.is_enabled():
            state |= {f"{_SCALER}{key}": torch.tensor(value) for key, value in scaler.state_dict().items()}
        return state

    def best_step(last: int) -> int | None:
        best = best_record([record for record in history if record["step"] <= last], keeping.best)
        return None if best is None else int(best["step"])

    def save() -> None:
        progress = {
            "step": step,
            "history": history,
            "passed_over": passed_over,
            "seen": seen,
            # Where some optimizers count.
            "optimizer_steps": [int(group["step"]) if "step" in group else None for group in optimizer.param_groups],
        }
        writer.start(shared(), method.state_dict(), stream.state_dict(), progress, best_step)

    found = latest_checkpoint(checkpoints)
    number = -1 if found is None else step_number(found)
    highest, lowest = ranks.maxima_over_ranks(number, -number)
    if highest != -lowest:
        raise UserError(
            f"rank {ranks.rank} finds {found or 'no checkpoint'}, others another one: --out must be a folder that all "
            "ranks share"
        )
    if found is not None:
        checkpoint = Checkpoint(found)
        check_settings(found, checkpoint.settings, settings)
        restore_training(checkpoint, clip.model, optimizer)
        progress = checkpoint.progress
        step, history, passed_over = progress["step"], progress["history"], progress["passed_over"]
        seen = progress["seen"]
        writer.took_up(step, len(checkpoint.counts))
        for group, count in zip(optimizer.param_groups, progress["optimizer_steps"], strict=True):
            if count is not None:
                group["step"] = torch.full_like(own, count) if isinstance(own := group["step"], Tensor) else count
        best = best_record(history, keeping.best)
        if best is not None and not step_folder(checkpoints, int(best["step"])).is_dir():
            raise UserError(
                f"--best {keeping.best}: the checkpoint of the best validation so far, step {best['step']}, was not "
                "kept: leave out --best, or start anew in another --out"
            )
        if average is not None:
            state = average.state_dict()
            checkpoint.fill({f"{EMA}{key}": value for key, value in state.items()})
            average.load_state_dict(state)
        if scaler.is_enabled():
            state = {key: torch.tensor(value) for key, value in scaler.state_dict().items()}
            checkpoint.fill({f"{_SCALER}{key}": value for key, value in state.items()})
            scaler.load_state_dict({key: value.item() for key, value in state.items()})
        method.load_state_dict(checkpoint.own)
        stream.load_state_dict(sum(map(Counter, checkpoint.counts[ranks.rank :: ranks.count]), Counter()))
    one = torch.ones((), device=ranks.device)
    saved = time.monotonic()
    interval = Interval(ranks)
    spread: Callable[[], Record] = dict
    learnability: Callable[[], Record] = dict
    for epoch in range(step // per_epoch, optimization.epochs):
        for candidates in interval.timed(stream.batches(epoch, step - epoch * per_epoch)):
            # Dropout is a function of seed, step and rank, so that a run that goes on needs no generators' states.
            torch.manual_seed(int(np.random.SeedSequence([seed, step, ranks.rank]).generate_state(1)[0]))
            optimizer.zero_grad(set_to_none=True)
            scale = ranks.count * float(scaler.scale(one))
            reference = None
            if reference_model is not None and candidates.reference_inputs is not None:
                with towers.autocast():
                    reference = reference_model.features(candidates.reference_inputs, ranks.device)
            lr = learning_rate(step, total, optimization)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch, trained = candidates, 0
            try:
                if selector is not None:
                    parts = optimization.accumulation * selector.candidates
                    target = towers.pairs(method, candidates, parts)
                    batch, reference, learnability = selector.choose(step, candidates, target, reference)
                loss, features = towers.backward(method, batch, reference, optimization.accumulation, epoch, scale)
                trained = len(batch.index)
                if not bool(torch.isfinite(loss.value)):
                    raise NotFinite(f"the loss is {loss.value.item()}")
                scaler.unscale_(optimizer)
                norm = _clipped_norm(clip.model, optimization.clip_norm)
                if not math.isfinite(norm) and not scaler.is_enabled():
                    raise NotFinite(f"the gradient's norm is {norm}")
            except NotFinite as problem:
                passed_over += 1
                path = checkpoints.parent / "nonfinite.jsonl"
                _write_down(path, step, batch, str(problem), ranks)
                if passed_over > nonfinite_limit:
                    writer.settle()
                    raise UserError(
                        f"{problem} at step {step}, whose samples are in {path}: look at them, lower --lr, set "
                        "--clip-norm, or allow for such steps by --nonfinite-limit"
                    ) from None
                log = {"lr": lr}
            else:
                log = {"loss": loss.value.item(), "lr": lr, "gradient_norm": norm, **loss.log}
                if math.isfinite(norm):
                    log |= method.step(scale, lr / optimization.lr)
                scaler.step(optimizer)
                scaler.update()
                if average is not None:
                    average.update(clip.model.state_dict())
                spread = partial(_spread, features, reference, ranks)
            step += 1
            counts = ranks.sum(torch.tensor([len(candidates.index), trained], device=ranks.device)).tolist()
            seen = {key: seen[key] + count for key, count in zip(seen, counts, strict=True)}

            interval.add(candidates, log)
            on_step(step, total, log)
            if step % log_every == 0 or step == total:
                values = interval.finish() | spread() | learnability()
                if logs is not None:
                    logs.write(step, {**values, **seen, "epoch": step / per_epoch})
            is_best = False
            if step in due:
                history.append({"step": step, **seen, **log, **spread(), **validate()})
                if logs is not None:
                    logs.write(step, {f"validation/{key}": value for key, value in history[-1].items()})
                is_best = keeping.best is not None and best_record(history, keeping.best) is history[-1]
            asked, seconds = stop(), time.monotonic() - saved
            is_due = (
                is_best
                or seconds > 60 * keeping.checkpoint_minutes
                or step % (keeping.checkpoint_steps or step + 1) == 0
            )
            wanted, is_writing = ranks.maxima_over_ranks(
                _SAVE + asked if asked else _SAVE * is_due, int(writer.is_writing)
            )
            if writer.has_begun and not is_writing:
                writer.settle()
            if wanted:
                save()
                saved = time.monotonic()
            if wanted > _SAVE:
                writer.settle()
                raise Interrupted(
                    f"stopped after step {step} of {total}; {checkpoints} holds the state", wanted - _SAVE
                )
    if not writer.is_of(step):
        save()
    writer.settle()
    return history, {} if average is None else {key: whole(value) for key, value in average.average.items()}


def best_record(history: Sequence[Record], metric: str | None) -> Record | None:
    """Return the validation of the highest value of a metric, the first of equals; None without a metric or validation.

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
    return max(history, key=lambda record: (record[metric], -record["step"]))


class NotFinite(Exception):
    """A step that cannot be taken, on every rank: what is not finite."""


def _write_down(path: Path, step: int, batch: Batch, problem: str, ranks: Ranks) -> None:
    """Append a step and the samples of all ranks."""
    own = batch.index.to(ranks.device)
    index = gathered(own, row_counts(len(own), ranks.group, ranks.device), ranks.group)
    if ranks.leads:
        append_line(path, json.dumps({"step": step, "problem": problem, "samples": index.tolist()}))


class Towers:
    """The model as it runs: on a device, compiled, copied or sharded over ranks."""

    def __init__(self, clip: Clip, execution: Execution, ranks: Ranks) -> None:
        model = clip.model.to(ranks.device)
        model.train()
        self._ranks, self._dtype = ranks, _DTYPES[execution.precision]
        if execution.activation_checkpointing:
            model.set_grad_checkpointing()
        if execution.compile:
            model.compile()  # in place: names of parameters stay what they are
        self.model: Any = model
        if ranks.group is not None and execution.parallel == "fsdp":
            policy = MixedPrecisionPolicy() if self._dtype == torch.float32 else MixedPrecisionPolicy(self._dtype)
            for block in _blocks(model):
                fully_shard(block, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
            for method in ("encode_image", "encode_text"):  # which evaluation calls instead of forward
                register_fsdp_forward_method(model, method)
        elif ranks.group is not None:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            self.model = DistributedDataParallel(model, device_ids=devices)

    def autocast(self) -> torch.autocast:
        """Return the context in which towers run."""
        return torch.autocast(self._ranks.device.type, self._dtype, enabled=self._dtype != torch.float32)

    def backward(
        self, method: Method, batch: Batch, reference: Features | None, parts: int, epoch: int, scale: float
    ) -> tuple[Loss, Features]:
        """Return the batch's loss and features; the gradient of ``scale`` times the loss is left in the parameters.

        DistributedDataParallel and FSDP2 average it over ranks.
        """
        kept: list[Tensor] = []

        def loss(image: Tensor, text: Tensor, *head: Tensor) -> Loss:
            self._refuse_not_finite(image, text)
            kept[:] = image.detach(), text.detach()
            return method.loss((image, text), batch.index, Head(*head), epoch, reference)

        with self.autocast():
            chunks = self._chunks(batch, parts)
            found = accumulate(self._encode, chunks, loss, model=self.model, gradient_scale=scale)
        return found, (kept[0], kept[1])

    @torch.no_grad()
    def pairs(self, method: Method, batch: Batch, parts: int) -> PairFeatures:
        """Return the batch's features without a graph, as in training, and how the method compares them."""
        with self.autocast():
            encoded = [self._encode(chunk) for chunk in self._chunks(batch, parts)]
        images, texts, *heads = zip(*encoded, strict=True)
        image, text, head = torch.cat(images), torch.cat(texts), [numbers[-1] for numbers in heads]
        self._refuse_not_finite(image, text, *head)
        return PairFeatures(image, text, *method.logits_at(Head(*head)))

    def _chunks(self, batch: Batch, parts: int) -> list[tuple[Tensor, Tensor]]:
        """Cut a batch into parts, as many on every rank, whose towers meet in each; some may be empty."""
        parts = min(parts, max(1, self._ranks.max_over_ranks(len(batch.index)))) if parts > 1 else 1
        return list(zip(batch.image.tensor_split(parts), batch.text.tensor_split(parts), strict=True))

    def _encode(self, part: tuple[Tensor, Tensor]) -> list[Tensor]:
        inputs = (at_least_one(x.to(self._ranks.device, non_blocking=True)) for x in part)
        image, text, *head = self.model(*inputs)
        count = len(part[0])  # 0 where a rank's samples were all skipped, or none chosen
        return [image[:count], text[:count], *(number.reshape(()) for number in head)]

    def _refuse_not_finite(self, *features: Tensor) -> None:
        # All ranks say it together: one that raised alone would leave the others waiting in the loss.
        if self._ranks.max_over_ranks(int(not all(bool(torch.isfinite(part.sum())) for part in features))):
            raise NotFinite("the features are not finite")


def _blocks(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the transformers' blocks, in the order in which they run."""
    for module in model.modules():
        if type(module).__name__ in ("ResidualAttentionBlock", "CustomResidualAttentionBlock", "Block"):
            yield module


def _clipped_norm(model: torch.nn.Module, most: float | None) -> float:
    """Return the gradient's norm, after scaling it down to ``most``."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if most is None else most)
    return float(whole(norm))


def whole(value: Tensor) -> Tensor:
    """Return a sharded tensor whole, on every rank."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def _spread(features: Features, reference: Features | None, ranks: Ranks) -> Record:
    """Return what steering rests on, over the negatives of this batch: Var(l), Var(l - l_ref), correlation with l_ref.

    Pooled over both directions, and by side: over an image's negative texts, over a text's negative images.
    """
    own = features[0].float(), features[1].float()
    variance = _by_side(within_anchors(own, own, ranks.group))
    found = {f"variance_of_losses{side}": value for side, value in variance.items()}
    if reference is None:
        return found
    guide = reference[0].to(own[0]), reference[1].to(own[1])
    covariance = _by_side(within_anchors(own, guide, ranks.group))
    of_reference = _by_side(within_anchors(guide, guide, ranks.group))
    for side, value in variance.items():
        found[f"variance_of_excess{side}"] = value - 2 * covariance[side] + of_reference[side]
        found[f"correlation_with_reference{side}"] = covariance[side] / math.sqrt(
            max(value * of_reference[side], 1e-300)
        )
    return found


def _by_side(sides: tuple[float, float]) -> Record:
    """Return the mean of both sides, and each, by the ending of its name."""
    return {"": sum(sides) / 2, "/image": sides[0], "/text": sides[1]}


class Interval:
    """Means of the numbers between two lines of the log, and where the time went."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._reset()

    def _reset(self) -> None:
        self._start, self._waited = time.monotonic(), 0.0
        self._samples, self._sums = 0, {}
        self._counts: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, counting how long they are waited for."""
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def add(self, batch: Batch, log: Record) -> None:
        """Take in a step."""
        self._samples += len(batch.index)
        self._skipped.update(batch.skipped)
        self._counts.update(log.keys())  # a step that was passed over has few numbers
        for key, value in log.items():
            self._sums[key] = self._sums.get(key, 0.0) + value

    def finish(self) -> Record:
        """Return the means and start anew; samples, and counts of those skipped by reason, are this rank's."""
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
