"""From options to a training method."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from drrho import KL, ChiSquare, CVaR
from drrho.coefficient import AdaptiveCoefficient
from drrho.temperature import GlobalTemperature, IndividualTemperatures
from experiments.clip.cli.options import Loss, Train
from experiments.clip.cli.parser import as_settings
from experiments.clip.cli.terminal import console
from experiments.clip.data.batch import Reference
from experiments.clip.distributed import Ranks
from experiments.clip.errors import UserError
from experiments.clip.models.clip import Clip
from experiments.clip.training.methods import (
    ConstantTemperature,
    Distilled,
    GlobalContrastive,
    Method,
    OpenCLIP,
    SigLIP,
    TwoLevel,
)
from experiments.clip.training.selection import Selector

SPREAD_SHARE = 0.3  # of the spread of the reference's margins: the temperature that "auto" stands for
_DIGITS = 1000  # to the inverse of which "auto" is rounded


def check_ranks(options: Train, ranks: Ranks) -> None:
    """Refuse what cannot be spread over that many ranks."""
    batch = options.optimization.batch_size
    if batch < ranks.count:
        raise UserError(f"--batch-size {batch} is less than the {ranks.count} ranks: every rank needs a pair")
    if options.loss.method == "siglip" and ranks.count > 1:
        raise UserError("--method siglip runs in one process: open_clip's loss needs ranks with equal numbers of pairs")
    if options.loss.method == "two-level" and options.selection.is_on and ranks.count > 1:
        raise UserError(
            f"--method two-level with --select {options.selection.select} runs in one process: it needs a pair of "
            "every rank, and there may be one of which none is chosen"
        )


def build_selector(options: Train, reference: Clip | None, ranks: Ranks) -> Selector | None:
    """Return what chooses the pairs to train on, if any are left out."""
    if reference is None or not options.selection.is_on:
        return None
    loss = "sigmoid" if options.loss.method == "siglip" else "softmax"
    return Selector(options.selection, loss, reference, options.seed, ranks)


def build_method(
    loss: Loss, epochs: int, samples: int, reference: Clip | None, beside: Reference | None, ranks: Ranks
) -> tuple[Method, dict[str, Any]]:
    """Return the method and the numbers it was resolved to."""
    chosen: dict[str, Any] = {
        key: value for key, value in as_settings(loss).items() if key not in ("reference", "reference_weights")
    }
    if beside is not None and loss.temperature == "auto" and loss.takes_temperature:
        spread = beside.margin_spread(samples)
        console.print(f"reference  margins r_ij - r_ii of different pairs have standard deviation {spread:.3f}")
        # Every rank has computed it, on its own device.
        chosen["temperature"] = tau = ranks.max_over_ranks(round(_DIGITS * SPREAD_SHARE * spread)) / _DIGITS
        low, high = loss.temperature_bounds if loss.learns_temperature else (0.0, math.inf)
        if not low <= tau <= high or tau == 0:
            raise UserError(f"--temperature auto is {tau} here, outside --temperature-bounds {low} {high}: widen them")
    method = _method(loss, epochs, samples, chosen["temperature"], ranks)
    if reference is not None and loss.distill > 0:
        if loss.distill_temperature == "auto":
            chosen["distill_temperature"] = round(1 / reference.model.logit_scale.exp().item(), 6)
        tau, own = chosen["distill_temperature"], loss.distill_own_temperature
        method = Distilled(method, loss.distill, tau, own=own, group=ranks.group)
    return method, chosen


def _method(loss: Loss, epochs: int, samples: int, tau: Any, ranks: Ranks) -> Method:
    divergence = {"kl": KL, "chi-square": ChiSquare, "cvar": partial(CVaR, loss.level)}[loss.divergence]()
    if loss.method == "openclip":
        return OpenCLIP(ranks.group)
    if loss.method == "siglip":
        return SigLIP(ranks.group)
    if loss.method == "two-level":
        return TwoLevel(tau, divergence, loss.strength, ranks.group)
    place = {"group": ranks.group, "device": ranks.device}
    low, high = loss.temperature_bounds
    learning = {"learning_rate": loss.temperature_lr, "low": low, "high": high, **place}
    if not loss.learns_temperature:
        temperature = ConstantTemperature(tau)
    elif loss.temperature_scheme == "individual":
        temperature = IndividualTemperatures(samples, tau, **learning)
    else:
        temperature = GlobalTemperature(tau, **learning)
    return GlobalContrastive(
        samples,
        epochs - 1 if loss.gamma_epochs is None else loss.gamma_epochs,
        temperature,
        is_steered=loss.method == "drrho",
        coefficient=AdaptiveCoefficient() if loss.coefficient == "adaptive" else loss.coefficient,
        final_gamma=loss.final_gamma,
        log_step=loss.log_step,
        eps=loss.eps,
        divergence=divergence,
        rho=loss.rho,
        per_temperature=loss.temperature_scheme == "per-temperature",
        published_temperature_gradient=loss.published_temperature_gradient,
        temperature_schedule=loss.temperature_lr_schedule,
        **place,
    )
