"""How a model is optimized: the optimizer and its groups of parameters, the schedule, the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from experiments.clip.errors import UserError
from experiments.clip.training.options import Optimization


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
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]

    return create_optimizer_v2(groups, opt=options.optimizer, lr=options.lr, weight_decay=options.weight_decay)


def check_optimizer(name: str) -> None:
    """Refuse an optimizer that does not exist, or whose state a checkpoint cannot hold."""
    from timm.optim import list_optimizers  # pyright: ignore[reportPrivateImportUsage]

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
        self._averaged = [key for key, value in self.average.items() if value.is_floating_point()]
        self._copied = [key for key in self.average if key not in set(self._averaged)]

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Update the average with the weights after a step, all tensors in a few kernels."""
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        if self._averaged:
            new = [_wide(_own_part(weights[key])) for key in self._averaged]
            own = [_own_part(self.average[key]) for key in self._averaged]
            torch._foreach_lerp_(own, new, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for key in self._copied:
            self.average[key].copy_(weights[key])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average and the number of steps."""
        return {**self.average, "steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self._steps = int(state["steps"])
        for key, average in self.average.items():
            average.copy_(state[key])


def _own_part(value: Tensor) -> Tensor:
    """Return what this rank has of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value.detach()


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
