"""How a model is optimized: the optimizer and its groups of parameters, the schedule, the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UserError
from .options import Optimization


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
    given: dict[str, Any] = {"betas": options.betas, "eps": options.adam_eps, "momentum": options.momentum}
    given = {name: value for name, value in given.items() if value is not None}
    if options.is_adamw:
        return torch.optim.AdamW(groups, lr=options.lr, fused=True, **given)
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]

    name, shared = options.optimizer, {"lr": options.lr, "weight_decay": options.weight_decay}
    try:
        optimizer = create_optimizer_v2(groups, opt=name, **shared, **given)
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"--optimizer {name} does not take {given} ({error}): leave that out") from error
    for option, value in given.items():
        # timm passes over what an optimizer does not have.
        if optimizer.defaults.get(option) != value:
            raise UserError(f"--optimizer {name} has no {option}: leave out {value}, or choose another optimizer")
    return optimizer


def check_optimizer(name: str) -> None:
    """Refuse an optimizer that does not exist, or whose state a checkpoint cannot hold."""
    from timm.optim import list_optimizers  # pyright: ignore[reportPrivateImportUsage]

    if name.startswith("kron"):
        raise UserError(f"--optimizer {name} keeps a state that checkpoints cannot hold: choose another of timm's")
    if name != "adamw" and name not in list_optimizers():
        raise UserError(f"--optimizer {name} is not known: adamw, or one of timm.optim.list_optimizers()")


def learning_rate(step: int, total: int, options: Optimization) -> float:
    """Return the rate of a step, counted from 0, of ``total``."""
    warmup = options.warmup_of(total)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    if options.schedule == "constant":
        return options.lr
    if options.schedule == "cooldown":
        left = (total - step) / max(1, options.cooldown_steps)
        return options.lr_min + (options.lr - options.lr_min) * min(1.0, left) ** (options.cooldown_power or 1.0)
    progress = (step - warmup) / max(1, total - warmup)
    return options.lr_min + (options.lr - options.lr_min) * (1 + math.cos(math.pi * progress)) / 2


def step_if(optimizer: torch.optim.Optimizer, wanted: Tensor) -> None:
    """Take the optimizer's step if ``wanted``, a boolean on the device; else weights and moments keep their bits.

    torch's fused optimizers decide on the device; others have to wait for it.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~wanted).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    elif bool(wanted):
        optimizer.step()


class LossScale:
    """The factor of the loss that keeps gradients within the range of float16, as `torch.amp.GradScaler` chooses it.

    It is halved where the gradient overflows, and doubled after 2000 steps in which it did not; the device decides.

    Attributes
    ----------
    scale : Tensor or float
        The factor, 1 without float16.
    """

    _START, _STEPS = 2.0**16, 2000

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.is_enabled = enabled
        self.scale = torch.tensor(self._START, device=device) if enabled else 1.0
        self._successes = torch.tensor(0, device=device)

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide the gradients by the factor, a power of two."""
        if isinstance(self.scale, Tensor):
            torch._foreach_mul_([_own_part(gradient) for gradient in gradients], 1 / self.scale)  # pyright: ignore[reportPrivateImportUsage]

    def update(self, is_finite: Tensor, has_gradient: Tensor) -> None:
        """Choose the next factor after a step with or without a finite gradient, one that `is_finite` otherwise."""
        if not isinstance(self.scale, Tensor):
            return
        successes = self._successes + 1
        grows = (successes == self._STEPS) & torch.isfinite(2 * self.scale)
        scale = torch.where(has_gradient, torch.where(grows, 2 * self.scale, self.scale), self.scale / 2)
        successes = torch.where(has_gradient & (successes < self._STEPS), successes, 0)
        self.scale.copy_(torch.where(is_finite, scale, self.scale))
        self._successes.copy_(torch.where(is_finite, successes, self._successes))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the factor and the steps since it changed: the tensors themselves; nothing without float16."""
        return {"scale": self.scale, "_growth_tracker": self._successes} if isinstance(self.scale, Tensor) else {}


class MovingAverage:
    """``average <- decay average + (1 - decay) weights``, in float32, starting from the weights.

    The decay of step t is at most ``(1 + t) / (10 + t)``, so that the untrained weights are soon forgotten.

    Parameters
    ----------
    in_place : bool
        The weights given are those of a model of the average's own, which are moved; otherwise they are copied.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float, *, in_place: bool = False) -> None:
        self._decay = decay
        self.average = {
            key: value.detach() if in_place else _wide(value.detach().clone()) for key, value in weights.items()
        }
        self._averaged = [key for key, value in self.average.items() if value.is_floating_point()]
        self._steps = torch.tensor(0, device=next(iter(self.average.values())).device)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], wanted: Tensor) -> None:
        """Update the average with the weights after a step if ``wanted``, a boolean on the device."""
        steps = self._steps.double()
        share = 1 - ((1 + steps) / (10 + steps)).clamp(max=self._decay)
        share = torch.where(wanted, share, 0.0).float()
        self._steps += wanted
        averages = [_own_part(self.average[key]) for key in self._averaged]
        moves = torch._foreach_sub([_wide(_own_part(weights[key])) for key in self._averaged], averages)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(moves, share)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(averages, moves)  # pyright: ignore[reportPrivateImportUsage]
        for key in self.average.keys() - set(self._averaged):
            average = self.average[key]
            average.copy_(torch.where(wanted, weights[key], average))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average and the number of steps: the tensors themselves."""
        return {**self.average, "steps": self._steps}


def _own_part(value: Tensor) -> Tensor:
    """Return what this rank has of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value.detach()


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
