"""Short trainings of the glyphs, as the tests of training start them."""

import dataclasses

import torch

from experiments.clip.cli.building import build_method, build_selector
from experiments.clip.data.batch import HeldOut
from experiments.clip.distributed import ONE_PROCESS
from experiments.clip.glyphs.stream import MemoryStream
from experiments.clip.models.clip import new_model
from experiments.clip.reference.cache import CachedReference
from experiments.clip.reference.several import SeveralReferences
from experiments.clip.run import parse
from experiments.clip.training.logs import Logs
from experiments.clip.training.methods import ConstantTemperature, GlobalContrastive, Head, SigLIP
from experiments.clip.training.options import CheckpointPolicy, Execution, Optimization
from experiments.clip.training.trainer import Trainer

SELDOM = CheckpointPolicy(checkpoint_minutes=1e9)

SHORT = Optimization(epochs=2, batch_size=32, lr=1e-3, warmup=2)

HEAD = Head(torch.tensor(1.0))


def contrastive(samples=150, epochs=2):
    return GlobalContrastive(samples, epochs - 1, ConstantTemperature(0.1), final_gamma=0.6, eps=1e-8)


def run(pairs, method, checkpoints, *arguments, **options):
    """Train; return the model, the records of validations and the moving average."""
    trainer = trainer_of(pairs, method, checkpoints, *arguments, **options)
    history = trainer.fit()
    return trainer.clip, history, trainer.averaged_weights()


def trainer_of(
    pairs,
    method,
    checkpoints,
    features=None,
    stop=int,
    optimization=SHORT,
    seed=0,
    limit=0,
    keeping=SELDOM,
    validate=dict,
    validations=2,
    on_step=lambda step, total, log: None,
    selector=None,
    patch_dropout=0.0,
    clip=None,
    ranks=ONE_PROCESS,
    lag=None,
    logs=("jsonl",),
    self_reference=None,
    held_out=None,
    **options,
):
    sigmoid = isinstance(method, SigLIP)
    checkpoints.parent.mkdir(parents=True, exist_ok=True)
    if clip is None:
        clip = new_model("glyph-micro", seed, sigmoid=sigmoid, force_patch_dropout=patch_dropout)
    trainer = Trainer(
        clip,
        method,
        MemoryStream(
            pairs,
            optimization.batch_size * (selector.candidates if selector else 1),
            seed,
            ranks.rank,
            ranks.count,
            features,
        ),
        optimization,
        reference=features,
        self_reference=self_reference,
        held_out=held_out,
        selector=selector,
        ranks=ranks,
        execution=Execution(**options),
        seed=seed,
        folder=checkpoints,
        policy=keeping,
        settings={"method": type(method).__name__, "seed": seed},
        validate=validate,
        validations=validations,
        logs=Logs(checkpoints.parent, logs, {}) if ranks.leads else None,
        log_every=3,
        on_step=on_step,
        stop=stop,
        nonfinite_limit=limit,
        lag=lag,
    )
    trainer.clip = clip
    return trainer


ITSELF = ("--self-reference", "0.9")
NETWORK = ("--normalizer", "network", "--normalizer-prototypes", "20")
TWO = ("--more-references", "another")
FASTCLIP = ("--method", "fastclip", "--temperature", "0.1")
CHOSEN = ("--candidates", "2", "--select")

SETTINGS = {
    "openclip": ("--method", "openclip"),
    "siglip": ("--method", "siglip"),
    "fastclip v1": FASTCLIP,
    "fastclip v0": (*FASTCLIP, "--temperature-scheme", "per-temperature"),
    "fastclip v2": (*FASTCLIP, "--temperature-scheme", "individual", "--rho", "0.5"),
    "fastclip v3": (*FASTCLIP, "--temperature-scheme", "global", "--rho", "0.5"),
    "fastclip v3, as published": (
        *FASTCLIP,
        *("--temperature-scheme", "global", "--rho", "0.5", "--temperature-lr-schedule", "threshold"),
        *("--published-temperature-gradient", "--gamma-epochs", "1"),
    ),
    "fastclip with chi-square": (*FASTCLIP, "--divergence", "chi-square"),
    "fastclip with cvar": (*FASTCLIP, "--divergence", "cvar", "--level", "0.2"),
    "scent": (*FASTCLIP, "--log-step", "0.5"),
    "drrho": (),
    "drrho, adaptive": ("--coefficient", "adaptive"),
    "drrho, scheduled": ("--coefficient", "scheduled"),
    "drrho and distillation": ("--distill", "0.5"),
    "openclip and distillation": ("--method", "openclip", "--distill", "1"),
    "drrho and distillation, each at its temperature": ("--distill", "0.5", "--distill-own-temperature"),
    "openclip and distillation, each at its temperature": (
        *("--method", "openclip", "--distill", "1", "--distill-own-temperature"),
    ),
    "two levels": ("--method", "two-level"),
    "gist": ("--method", "gist"),
    "openclip on jest": (
        "--method",
        "openclip",
        *CHOSEN,
        "jest",
        "--select-chunks",
        "4",
        "--select-temperature",
        "0.5",
    ),
    "siglip on jest": ("--method", "siglip", *CHOSEN, "jest", "--select-chunks", "4"),
    "siglip on jest top-k": ("--method", "siglip", *CHOSEN, "jest-top-k", "--select-chunks", "7"),
    "fastclip v3 on jest top-k, and distillation": (
        *("--method", "fastclip", "--temperature-scheme", "global", "--rho", "0.5", "--distill", "0.5"),
        *(*CHOSEN, "jest-top-k", "--select-chunks", "4"),
    ),
    "drrho on rho top-k": (*CHOSEN, "rho-top-k"),
    "two levels on rho top-k": ("--method", "two-level", *CHOSEN, "rho-top-k"),
    "fastclip with a network": (*FASTCLIP, *NETWORK),
    "drrho with a network": (*NETWORK, "--coefficient", "adaptive"),
    "drrho by the mean of two": (*TWO, "--combine", "mean"),
    "drrho by the worst of two": (*TWO, "--combine", "worst"),
    "drrho with chi-square by the worst of two": (*TWO, "--combine", "worst", "--divergence", "chi-square"),
    "drrho by a mixture of two": (*TWO, "--combine", "learned"),
    "gist by a mixture of two, and distillation": (*TWO, "--combine", "learned", "--method", "gist", "--distill", "1"),
    "drrho beside itself": (*ITSELF, "--temperature", "0.1"),
    "gist beside itself": (*ITSELF, "--method", "gist"),
    "openclip on jest, and distillation": (
        *("--method", "openclip", "--distill", "1", *CHOSEN, "jest", "--select-chunks", "4"),
    ),
    "siglip on jest beside itself, and distillation": (
        *(*ITSELF, "--method", "siglip", "--distill", "1", "--distill-temperature", "0.1"),
        *(*CHOSEN, "jest", "--select-chunks", "4"),
    ),
}


class Misled(CachedReference):
    """A reference that takes each picture's text for that of the next sample."""

    def __init__(self, features):
        self.__dict__ = features.__dict__

    def rows(self, index, view=0):
        image, _ = super().rows(index, view)
        return image, super().rows((index + 1) % len(self), view)[1]


def shown(pairs, features):
    """The first 40 pairs as those that a method is shown, which would be held out."""
    index = torch.arange(min(40, len(pairs)))
    batch = pairs.batch(index)
    return HeldOut(batch.image, batch.text, features.features(features.rows(index), torch.device("cpu")))


def built(name, pairs, features, reference, optimization=SHORT, ranks=ONE_PROCESS):
    """Return what `run` needs for these settings, anew; a step visits as many pairs as without selection."""
    options = parse(["train", *SETTINGS[name]])
    if options.loss.more_references:
        features = SeveralReferences([features, Misled(features)], [reference] * 2, options.loss.combine)
    guide = (reference, features) if options.needs_reference else (None, None)
    scored = options.selection.scored_per_pair
    return {
        "method": build_method(options.loss, optimization.epochs, len(pairs), *guide, ranks)[0],
        "features": features if options.needs_reference else None,
        "self_reference": options.loss.self_reference,
        "held_out": shown(pairs, features) if options.loss.coefficient == "scheduled" else None,
        "selector": build_selector(options, guide[0], ranks),
        "optimization": dataclasses.replace(optimization, batch_size=optimization.batch_size // scored),
    }
