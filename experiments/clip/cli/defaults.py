"""What options mean that were not given, where it depends on the model, the device or the length of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ..training.options import TowerPrecision
from .options import Train

#: AdamW's settings by the architecture that images go through, as OpenAI and open_clip_train have them.
ADAMW_OF_TRANSFORMERS: dict[str, Any] = {"betas": (0.9, 0.98), "adam_eps": 1e-6}
ADAMW_OF_OTHERS: dict[str, Any] = {"betas": (0.9, 0.999), "adam_eps": 1e-8}
# How timm's names of vision transformers begin.
_TRANSFORMERS = ("vit", "eva")


def adamw_of(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return AdamW's settings for an architecture, in open_clip's ``model_cfg``.

    open_clip_train takes those of transformers where the model's name contains "vit", which not every transformer's
    does.
    """
    vision = architecture["vision_cfg"]
    if name := vision.get("timm_model_name"):
        is_transformer = name.startswith(_TRANSFORMERS)
    else:
        is_transformer = not isinstance(vision.get("layers"), list)
    return ADAMW_OF_TRANSFORMERS if is_transformer else ADAMW_OF_OTHERS


def with_defaults(options: Train, architecture: Mapping[str, Any], precision: TowerPrecision) -> Train:
    """Return options with what stands for those that were not given; ``precision`` is that of the towers."""
    optimization, execution = options.optimization, options.execution
    if optimization.is_adamw:
        own = {name: value for name, value in adamw_of(architecture).items() if getattr(optimization, name) is None}
        optimization = dataclasses.replace(optimization, **own)
    execution = dataclasses.replace(execution, precision=precision)
    return dataclasses.replace(options, optimization=optimization, execution=execution)


def out_of_proportion(options: Train, samples: int, steps: int) -> Iterator[str]:
    """Yield a line about each option that is too large for a run of so many steps over so many samples an epoch."""
    optimization = options.optimization
    if optimization.warmup is not None and optimization.warmup >= steps:
        highest = optimization.lr * steps / optimization.warmup
        yield (
            f"--warmup {optimization.warmup} is not over when the run is, after {steps} steps: the learning rate ends "
            f"at {highest:.3g}, and --lr {optimization.lr:g} is never reached"
        )
    if options.pairs_per_step > samples:
        scored = options.selection.scored_per_pair
        what = f"--batch-size {optimization.batch_size}" + (f" times --candidates {scored}" if scored > 1 else "")
        yield f"{what} is more than the {samples} pairs of an epoch: every epoch is one step, on all of them"
