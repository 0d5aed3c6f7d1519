"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drrho.accumulation import accumulate
from experiments.clip.checkpoint import load_checkpoint, save_checkpoint
from experiments.clip.errors import UserError
from experiments.clip.methods import Head, Loss, Method
from experiments.clip.models import Clip
from experiments.clip.stream import Pairs, epoch_order, steps_per_epoch


@dataclass(frozen=True)
class Optimization:
    """How long and how to train."""

    epochs: int = 16
    """Passes over the training pairs."""
    batch_size: int = 512
    """Pairs per step, at most: an epoch is cut into batches of equal size up to one."""
    lr: float = 2e-3
    """Peak learning rate of AdamW (betas 0.9 and 0.98, eps 1e-6)."""
    weight_decay: float = 0.2
    """Decoupled weight decay of matrices; gains, biases and the temperature have none."""
    warmup: int = 50
    """Steps of linear warm-up, before a cosine decay to 0."""
    accumulation: int = 1
    """Parts of a batch that go through the towers one after the other; the loss still sees the whole batch."""


Record = dict[str, float]


class Interrupted(Exception):
    """Training was asked to stop; the checkpoint is written."""


def train(
    clip: Clip,
    method: Method,
    pairs: Pairs,
    optimization: Optimization,
    *,
    seed: int,
    checkpoint: Path,
    checkpoint_seconds: float,
    settings: dict[str, Any],
    validate: Callable[[], Record],
    validations: int,
    on_step: Callable[[int, int, Record], None],
    stop: Callable[[], bool],
) -> list[Record]:
    """Train ``clip.model`` in place and return the history: one record per validation.

    A checkpoint is written every ``checkpoint_seconds``, when ``stop`` says so and at the end; if one made with the
    same ``settings`` is there, training goes on from it and, on one machine, ends at the same weights bit by bit.

    Parameters
    ----------
    settings : dict
        All that the weights depend on, in JSON's types; a checkpoint made with others is refused.
    validate : callable
        Scores the model as it stands; called ``validations`` times, evenly spaced, the last time at the end.
    on_step : callable
        Receives the number of finished steps, their total and the step's log.
    stop : callable
        Asked after every step; true ends the run with a checkpoint and `Interrupted`.
    """
    model = clip.model
    optimizer = _optimizer(model, method, optimization)
    per_epoch = steps_per_epoch(len(pairs), optimization.batch_size)
    total = per_epoch * optimization.epochs
    due = {round(total * (k + 1) / validations) for k in range(validations)}
    step: int = 0
    history: list[Record] = []

    def save() -> None:
        save_checkpoint(checkpoint, model, optimizer, method, {"step": step, "history": history}, settings)

    if checkpoint.is_file():
        progress = load_checkpoint(checkpoint, model, optimizer, method, settings)
        step, history = progress["step"], progress["history"]
    saved = time.monotonic()
    for epoch in range(step // per_epoch, optimization.epochs):
        for index in epoch_order(len(pairs), optimization.batch_size, seed, epoch)[step - epoch * per_epoch :]:
            optimizer.zero_grad(set_to_none=True)
            loss = _loss(clip, method, pairs, index, optimization.accumulation, epoch)
            if not bool(torch.isfinite(loss.value)):
                raise UserError(f"the loss is {loss.value.item()} at step {step}: lower --lr")
            log = loss.log | method.step()
            lr = _learning_rate(step, total, optimization)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            step += 1

            on_step(step, total, {"loss": loss.value.item(), "lr": lr, **log})
            if step in due:
                history.append({"step": step, "loss": loss.value.item(), **log, **validate()})
            if stop():
                save()
                raise Interrupted(f"stopped after step {step} of {total}; {checkpoint} holds the state")
            if time.monotonic() - saved > checkpoint_seconds:
                save()
                saved = time.monotonic()
    save()
    return history


def _loss(clip: Clip, method: Method, pairs: Pairs, index: Tensor, parts: int, epoch: int) -> Loss:
    """Return the loss of a batch, its gradient left in the parameters."""
    model = clip.model

    def encode(part: Tensor) -> list[Tensor]:
        batch = pairs.batch(part)
        image = model.encode_image(batch.image, normalize=True)  # [b, d]
        text = model.encode_text(batch.text, normalize=True)  # [b, d]
        bias = [] if model.logit_bias is None else [model.logit_bias]
        return [image, text, model.logit_scale.exp(), *bias]

    def loss(image: Tensor, text: Tensor, *head: Tensor) -> Loss:
        if not bool(torch.isfinite(image.sum() + text.sum())):
            raise UserError("the features are not finite: lower --lr")
        return method.loss(image, text, index, Head(*head), epoch)

    return accumulate(encode, index.tensor_split(min(parts, len(index))), loss, model=model)


def _optimizer(model: torch.nn.Module, method: Method, optimization: Optimization) -> torch.optim.AdamW:
    model.logit_scale.requires_grad_(method.learns_scale)
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optimization.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optimization.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def _learning_rate(step: int, total: int, optimization: Optimization) -> float:
    if step < optimization.warmup:
        return optimization.lr * (step + 1) / optimization.warmup
    progress = (step - optimization.warmup) / max(1, total - optimization.warmup)
    return optimization.lr * (1 + math.cos(math.pi * progress)) / 2
