"""From options to the parts of a training: models, method, selector."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from ..data.batch import Reference
from ..distributed import ONE_PROCESS, Ranks
from ..errors import UserError
from ..models.clip import Clip, load_model, lock_towers, new_model
from ..models.options import ModelInputs, augmentation, geometry
from ..models.sources import find_source
from ..reference.several import SeveralReferences
from ..training.methods import METHODS, Context, Distilled, Method
from ..training.options import Loss
from ..training.references import Mixed
from ..training.selection import Selector
from .options import Train
from .parser import as_settings
from .terminal import console

SPREAD_SHARE = 0.3  # share of the spread of the reference's margins that the temperature "auto" stands for
_DIGITS = 1000  # to the inverse of which "auto" is rounded
# Options that name models, whose fingerprints stand for them.
_REFERENCES = ("reference", "reference_weights", "more_references")


class Models(NamedTuple):
    """The model to be trained, and the reference of a steered run."""

    clip: Clip
    reference: Clip | None


def build_models(options: Train, ranks: Ranks = ONE_PROCESS) -> Models:
    """Return the models of a run; nothing is written yet."""
    loss, reference = options.loss, None
    with ranks.leader_first():  # one downloads
        find_source(options.model, _text(options.pretrained))
        if options.needs_reference:
            find_source(str(options.reference), _text(loss.reference_weights))
            for path in loss.more_references:
                find_source(str(path), None)
    clip = build_target(options, ranks)
    if options.needs_reference:
        # Beside the target, it sees the target's crops.
        crops = {"aug_cfg": geometry(options.inputs.aug_cfg) or None}
        reference = load_model(options.reference, loss.reference_weights, crops)
    if reference is not None and options.split != "train":
        raise UserError(f"--split {options.split} has no cached reference features: runs with one use --split train")
    check_ranks(options, ranks)
    say_notes(clip, *([] if reference is None else [reference]))
    return Models(clip, reference)


def say_notes(*clips: Clip) -> None:
    """Print what there is to say about models that were chosen."""
    for clip in clips:
        for note in clip.notes:
            console.print(f"model      {note}", markup=False)


def input_options(inputs: ModelInputs) -> dict[str, Any]:
    """Return what `new_model` is given of the options of a model's inputs."""
    image = {"mean": inputs.image_mean, "std": inputs.image_std, "interpolation": inputs.image_interpolation}
    image |= {"resize_mode": inputs.image_resize_mode, "aug_cfg": augmentation(inputs.aug_cfg) or None}
    sizes = {"force_image_size": inputs.force_image_size, "force_context_length": inputs.force_context_length}
    return {"image": image, **{key: value for key, value in sizes.items() if value is not None}}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def build_target(options: Train, ranks: Ranks = ONE_PROCESS) -> Clip:
    """Return the model to be trained."""
    more = input_options(options.inputs)
    if options.patch_dropout is not None:
        more["force_patch_dropout"] = options.patch_dropout
    if ranks.group is not None and options.execution.parallel == "fsdp":
        more["nonscalar_logit_scale"] = True
    sigmoid = options.loss.method == "siglip"
    clip = new_model(options.model, options.seed, sigmoid=sigmoid, weights=options.pretrained, **more)
    unlocked: dict[str, int] = {tower: options.unlocked_groups for tower in options.lock}
    if options.unlocked_text_groups is not None:
        unlocked["text"] = options.unlocked_text_groups
    lock_towers(clip.model, unlocked)
    return clip


def check_ranks(options: Train, ranks: Ranks) -> None:
    """Refuse what cannot be spread over that many ranks."""
    batch = options.optimization.batch_size
    if batch < ranks.count:
        raise UserError(f"--batch-size {batch} is less than the {ranks.count} ranks: every rank needs a pair")


def build_selector(options: Train, reference: Clip | None, ranks: Ranks) -> Selector | None:
    """Return what chooses the pairs to train on, if any are left out."""
    if not options.selection.is_on:
        return None
    loss = "sigmoid" if options.loss.method == "siglip" else "softmax"
    return Selector(options.selection, loss, reference, options.seed, ranks)


def build_method(
    loss: Loss, epochs: int, samples: int, reference: Clip | None, features: Reference | None, ranks: Ranks
) -> tuple[Method, dict[str, Any]]:
    """Return the method, and its options with the numbers that ``auto`` stands for.

    ``reference`` is the model, ``features`` what gives its features.
    """
    chosen: dict[str, Any] = {key: value for key, value in as_settings(loss).items() if key not in _REFERENCES}
    if features is not None and loss.temperature == "auto" and loss.takes_temperature:
        chosen["temperature"] = _automatic_temperature(loss, features.margin_spread(samples), ranks)
    several = features if isinstance(features, SeveralReferences) else None
    context = Context(samples, epochs, chosen["temperature"], ranks, several.widths if several else ())
    method = METHODS[loss.method].from_options(loss, context)
    if loss.distill > 0:
        if reference is not None and loss.distill_temperature == "auto":
            chosen["distill_temperature"] = round(1 / reference.model.logit_scale.exp().item(), 6)
        tau, own = chosen["distill_temperature"], loss.distill_own_temperature
        method = Distilled(method, loss.distill, tau, own=own, group=ranks.group)
    if several is not None and loss.combine == "learned":
        method = Mixed(method, several.widths, several.scales, ranks.group)
    return method, chosen


def _automatic_temperature(loss: Loss, spread: float, ranks: Ranks) -> float:
    console.print(f"reference  margins r_ij - r_ii of different pairs have standard deviation {spread:.3f}")
    # Every rank has computed it, on its own device.
    tau = ranks.max_over_ranks(round(_DIGITS * SPREAD_SHARE * spread)) / _DIGITS
    low, high = loss.temperature_bounds if loss.learns_temperature else (0.0, math.inf)
    if not low <= tau <= high or tau == 0:
        raise UserError(f"--temperature auto is {tau} here, outside --temperature-bounds {low} {high}: widen them")
    return tau
