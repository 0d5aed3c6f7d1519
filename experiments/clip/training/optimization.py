"""How a model is optimized: the optimizer and its groups of parameters, the schedule, the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from experiments.clip.errors import UserError


@dataclass(frozen=True)
class Optimization:
    """How long and how to train."""

    epochs: int = 16
    """Passes over the training pairs."""
    batch_size: int = 512
    """Pairs trained on per step over all ranks, at most: an epoch is cut into batches of equal size up to one."""
    accumulation: int = 1
    """Parts of a rank's batch that go through the towers one after the other; the loss still sees the whole batch."""
    optimizer: str = "adamw"
    """adamw, or the name of any optimizer of timm (timm.optim.list_optimizers())."""
    lr: float = 2e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of adamw's moments: 0.9 and 0.98 are usual for transformers, 0.9 and 0.999 for ResNets."""
    adam_eps: float = 1e-6
    """Added to the root of adamw's second moment."""
    weight_decay: float = 0.2
    """Decoupled weight decay of matrices; gains, biases and the temperature have none."""
    schedule: Literal["cosine", "constant", "cooldown"] = "cosine"
    """After the warm-up: a cosine to --lr-min; constant; or constant, and linear to --lr-min in --cooldown-steps."""
    warmup: int = 50
    """Steps of linear warm-up."""
    lr_min: float = 0.0
    """Where cosine and cooldown end."""
    cooldown_steps: int = 0
    """Steps of the cooldown, the last of the run."""
    clip_norm: float | None = None
    """Largest norm of the gradient; larger ones are scaled down to it."""
    ema: float | None = None
    """Decay per step of a moving average of the weights, exported beside them."""


def build_optimizer(model: torch.nn.Module, options: Optimization) -> torch.optim.Optimizer:
    """Return the optimizer over the parameters that learn, weight decay on matrices alone."""
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.adam_eps, fused=True)
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(groups, opt=options.optimizer, lr=options.lr, weight_decay=options.weight_decay)


def check_optimizer(name: str) -> None:
    """Refuse an optimizer that there is not."""
    from timm.optim import list_optimizers

    if name.startswith("kron"):
        raise UserError(f"--optimizer {name} keeps a state that checkpoints cannot hold: choose another of timm's")
    if name != "adamw" and name not in list_optimizers():
        raise UserError(f"--optimizer {name} is not known: adamw, or one of timm.optim.list_optimizers()")


def learning_rate(step: int, total: int, options: Optimization) -> float:
    """Return the rate of a step, counted from 0, of ``total``."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    if options.schedule == "constant":
        return options.lr
    if options.schedule == "cooldown":
        left = (total - step) / max(1, options.cooldown_steps)
        return options.lr_min + (options.lr - options.lr_min) * min(1.0, left)
    progress = (step - options.warmup) / max(1, total - options.warmup)
    return options.lr_min + (options.lr - options.lr_min) * (1 + math.cos(math.pi * progress)) / 2


class MovingAverage:
    """``average <- decay average + (1 - decay) weights``, in float32, starting from the weights.

    The decay of step t is at most ``(1 + t) / (10 + t)``, so that the untrained weights are soon forgotten.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self._decay = decay
        self._steps = 0
        self.average = {key: _wide(value.detach().clone()) for key, value in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after a step."""
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        for key, average in self.average.items():
            if average.is_floating_point():
                average.lerp_(weights[key].detach().to(average.dtype), 1 - decay)
            else:
                average.copy_(weights[key])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average and the number of steps."""
        return {**self.average, "steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""
        self._steps = int(state["steps"])
        for key, average in self.average.items():
            average.copy_(state[key])


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
