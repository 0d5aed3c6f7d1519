"""Options of the commands, and presets: named settings of ``train``."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.clip.errors import UserError
from experiments.clip.glyphs import Captions
from experiments.clip.logs import LogName
from experiments.clip.models import SHIPPED_REFERENCE
from experiments.clip.optimization import Optimization, check_optimizer
from experiments.clip.train import Execution

_CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Data:
    """The embedded glyph-name pairs."""

    captions: Captions = "swapped"
    """What the training split says of its images: the names, a random half of each name's words, or 40 % exchanged."""
    size: Literal["full", "small"] = "full"
    """All 16 faces, or 4 of them."""
    cache: Path = Path("cache")
    """Folder of shards and reference features; it can be moved."""


MethodName = Literal["openclip", "siglip", "fastclip", "drrho", "two-level"]
DivergenceName = Literal["kl", "chi-square", "cvar"]


@dataclass(frozen=True)
class Loss:
    """The training method."""

    method: MethodName = "drrho"
    """InfoNCE with learnable temperature; the pairwise sigmoid loss; the global contrastive risk; the same steered by a
    reference; the DRRho risk over samples, from each sample's contrastive risk in excess of the reference's."""
    temperature: float | Literal["auto"] = "auto"
    """tau of fastclip, drrho and two-level, in units of similarity, or where learning it starts; auto (with a
    reference): 0.3 of the spread of the reference's margins."""
    temperature_scheme: Literal["constant", "global", "individual", "per-temperature"] = "constant"
    """How fastclip and drrho treat tau: constant (FastCLIP v1), one learned with the radius --rho (v3), one learned per
    sample and direction (v2), or one learned for the risk divided by tau (v0)."""
    rho: float = 0.0
    """Radius of the KL ball over an anchor's negatives, in nats, for learned temperatures."""
    temperature_lr: float = 1e-3
    """Adam's learning rate of a learned tau, in units of similarity."""
    temperature_bounds: tuple[float, float] = (0.01, 1.0)
    """Between which a learned tau is kept, in units of similarity."""
    divergence: DivergenceName = "kl"
    """The ball over negatives of fastclip and drrho, over samples of two-level."""
    level: float = 0.1
    """Share of the negatives, or samples, that cvar averages over."""
    strength: float = 0.1
    """Penalty on the divergence over samples of two-level, in units of similarity; cvar has none."""
    coefficient: float | Literal["adaptive"] = 1.0
    """How much of the reference's margins drrho subtracts; adaptive: what leaves the least variance, estimated."""
    final_gamma: float = 0.6
    """Rate of the running estimates in the last epoch; it decays from 1 by a cosine over the epochs."""
    log_step: float | None = None
    """Instead of gamma, logarithm of SCENT's step: each estimate has a rate of its own."""
    eps: float = 1e-8
    """Added to the running estimate where the gradient divides by it."""
    distill: float = 0.0
    """Weight of the reference's distillation (cross-entropy of its softmax similarities), added to any method."""
    distill_temperature: float | Literal["auto"] = "auto"
    """Of both softmaxes, in units of similarity; auto: the reference's own."""
    reference: Path = SHIPPED_REFERENCE
    """Folder of the reference model, in open_clip's local-dir layout."""

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's features are needed."""
        return self.method in ("drrho", "two-level") or self.distill > 0


@dataclass(frozen=True)
class Shards:
    """Pairs of a catalog, instead of the embedded ones; for methods without a reference."""

    catalog: Path | None = None
    """Folder made by `run.py catalog`."""
    workers: int = 0
    """Processes of a rank that read and decode; what comes is the same for any number."""
    source_weights: str | None = None
    """How often each source is visited in an epoch, joined by ::, like 1::2; fractions need --resampled."""
    resampled: bool = False
    """Draw samples with replacement, instead of each once per epoch."""
    epoch_samples: int | None = None
    """Samples of an epoch when resampled; all by default."""
    block_shards: int = 16
    """Shards whose samples are shuffled together."""
    skip_limit: float = 0.1
    """Share of samples that may turn out to be unusable before the run stops."""
    tasks: tuple[Path, ...] = ()
    """Folders of zero-shot tasks in CLIP_benchmark's layout, to validate on."""


@dataclass(frozen=True)
class Train:
    """Train one model; ``--preset NAME`` starts from a named setting, other options override it."""

    model: str = "glyph-small"
    """A registered open_clip model."""
    split: Literal["train", "reference"] = "train"
    """The pool of pairs to train on; the two are disjoint."""
    data: Data = field(default_factory=Data)
    shards: Shards = field(default_factory=Shards)
    loss: Loss = field(default_factory=Loss)
    optimization: Optimization = field(default_factory=Optimization)
    execution: Execution = field(default_factory=Execution)
    seed: int = 0
    """Seed of the initial weights and of the order of the pairs."""
    out: Path = Path("outputs/train")
    """Folder for the checkpoint and the trained model; a run found there is continued."""
    checkpoint_minutes: float = 1.0
    """Minutes between checkpoints."""
    validations: int = 5
    """How many times to score the model on the validation split, evenly spaced."""
    logs: tuple[LogName, ...] = ("jsonl",)
    """Where numbers of the run go, within --out: lines of JSON, TensorBoard's events, Weights & Biases."""
    log_every: int = 10
    """Steps over which a line of the log is the mean."""
    weights: Literal["float32", "float16"] = "float32"
    """Precision of the exported weights."""


@dataclass(frozen=True)
class Demo:
    """Train a steered model and its unsteered twin, evaluate both and the reference, write a report."""

    quick: bool = False
    """A small version for tests: 4 faces, few epochs; its numbers mean nothing."""
    captions: Captions = "swapped"
    """What the training captions say: the names, a random half of each name's words, or 40 % exchanged."""
    cache: Path = Path("cache")
    """Folder of shards and reference features; it can be moved."""
    out: Path = Path("outputs/demo")
    """Folder of checkpoints, models and report; what is there is reused."""
    reference: Path = SHIPPED_REFERENCE
    """Folder of the reference model, in open_clip's local-dir layout."""
    seed: int = 0
    """Seed of initial weights and order of the pairs, the same for both models."""


@dataclass(frozen=True)
class Prepare:
    """Draw the glyph-name pairs and write them as webdataset shards."""

    data: Data = field(default_factory=Data)


@dataclass(frozen=True)
class CacheReference:
    """Compute the reference model's features of the training pairs."""

    data: Data = field(default_factory=Data)
    reference: Path = SHIPPED_REFERENCE
    """Folder of the reference model, in open_clip's local-dir layout."""


@dataclass(frozen=True)
class Evaluate:
    """Score a trained model on held-out pairs."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of the model, in open_clip's local-dir layout."""
    data: Data = field(default_factory=Data)
    split: Literal["validation", "test"] = "test"
    """Which held-out pairs."""
    tasks: tuple[Path, ...] = ()
    """Folders of zero-shot tasks in CLIP_benchmark's layout, instead of the held-out pairs."""


@dataclass(frozen=True)
class Catalog:
    """Count the samples of shards once and give each an index, for `train --catalog`."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Patterns of webdataset shards like data/{00000..00099}.tar, also remote; tables (.csv, .tsv, .parquet) of image
    paths and captions; or synthetic:N."""
    out: Path = Path("catalog")
    """Folder of the catalog."""
    caption_key: tuple[str, ...] = ("txt",)
    """Members that are captions; json:FIELD is a field of the member json."""
    workers: int = 2
    """Processes that scan."""
    run_pipe_commands: bool = False
    """Run the shell commands of sources that start with pipe:, which are refused otherwise."""


@dataclass(frozen=True)
class GlyphTasks:
    """Write the held-out glyph pairs as zero-shot tasks in CLIP_benchmark's layout."""

    data: Data = field(default_factory=Data)
    out: Path = Path("glyph-tasks")
    """Folder of the tasks."""


@dataclass(frozen=True)
class Plan:
    """Say what a run would take: parameters, operations, memory of a rank by part, disk, time."""

    train: Train = field(default_factory=Train)
    samples: int = 23_635
    """Pairs of the training data."""
    ranks: int = 1
    """Processes, one per device."""
    teraflops: float = 312.0
    """Peak rate of a device at the towers' precision, 10^12 operations per second (A100, bfloat16: 312)."""
    utilization: float = 0.4
    """Share of that rate which training reaches."""
    reference_width: int = 512
    """Width of the reference's features, where the run has a reference."""


_DEFAULT_LOSS = Loss()

PRESETS: dict[str, Train] = {
    "glyph-reference": Train(
        model="glyph-base",
        split="reference",
        data=Data(captions="clean"),
        loss=Loss(method="openclip"),
        optimization=Optimization(epochs=36),
        out=Path("outputs/glyph-reference"),
        validations=6,
        weights="float16",
    ),
    # Both tuned alike on the validation split: README.md beside this file says what was tried.
    "glyph-steered": Train(optimization=Optimization(epochs=12), out=Path("outputs/glyph-steered")),
    "glyph-unsteered": Train(
        loss=Loss(method="fastclip", temperature=0.2),
        optimization=Optimization(epochs=12, lr=1e-3),
        out=Path("outputs/glyph-unsteered"),
    ),
}

COMMANDS: dict[str, type] = {
    "demo": Demo,
    "prepare": Prepare,
    "cache-reference": CacheReference,
    "train": Train,
    "evaluate": Evaluate,
    "plan": Plan,
    "catalog": Catalog,
    "glyph-tasks": GlyphTasks,
}


def parse(arguments: Sequence[str]) -> Any:
    """Turn a command line into options; without a command it is the demo's.

    Raises
    ------
    UserError
        One line that names what is wrong. ``--help`` prints and exits.
    """
    rest = list(arguments)
    if rest and rest[0] in ("-h", "--help"):
        summaries = "\n".join(f"  {name:<17}{kind.__doc__}" for name, kind in COMMANDS.items())
        print(f"usage: run.py [COMMAND] [OPTIONS]; COMMAND --help lists its options\n\n{summaries}")
        raise SystemExit(0)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else "demo"
    if name not in COMMANDS:
        raise UserError(f"no command is called {name!r}: choose one of {', '.join(COMMANDS)}")
    default = None
    if name in ("train", "plan"):
        preset = _pop_preset(rest)
        default = preset if name == "train" else Plan(preset)
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            options = tyro.cli(
                COMMANDS[name], args=rest, default=default, prog=f"run.py {name}", config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_first_message(refusal.getvalue())}: see `run.py {name} --help`") from None
    if isinstance(options, (Train, Plan)):
        _check(options if isinstance(options, Train) else options.train)
    return options


def _check(options: Train) -> None:
    """Refuse numbers out of range, by the name of their option."""
    optimization, loss = options.optimization, options.loss
    tau = 1.0 if loss.temperature == "auto" else loss.temperature
    distill_tau = 1.0 if loss.distill_temperature == "auto" else loss.distill_temperature
    share = 1.0 if loss.coefficient == "adaptive" else loss.coefficient
    low, high = loss.temperature_bounds
    for flag, value, is_right, meaning in (
        ("epochs", optimization.epochs, optimization.epochs >= 1, "at least 1"),
        ("batch-size", optimization.batch_size, optimization.batch_size >= 2, "at least 2: a negative"),
        ("lr", optimization.lr, 0 < optimization.lr < math.inf, "positive"),
        ("weight-decay", optimization.weight_decay, 0 <= optimization.weight_decay < math.inf, ">= 0"),
        ("warmup", optimization.warmup, optimization.warmup >= 0, ">= 0"),
        ("temperature", loss.temperature, 0 < tau < math.inf, "positive, or auto"),
        ("final-gamma", loss.final_gamma, 0 < loss.final_gamma <= 1, "in (0, 1]"),
        ("eps", loss.eps, 0 <= loss.eps < math.inf, ">= 0"),
        ("log-every", options.log_every, options.log_every >= 1, "at least 1"),
        ("lr-min", optimization.lr_min, 0 <= optimization.lr_min <= optimization.lr, "between 0 and --lr"),
        ("betas", optimization.betas, all(0 <= beta < 1 for beta in optimization.betas), "two numbers in [0, 1)"),
        ("adam-eps", optimization.adam_eps, 0 < optimization.adam_eps < math.inf, "positive"),
        ("cooldown-steps", optimization.cooldown_steps, optimization.cooldown_steps >= 0, ">= 0"),
        ("clip-norm", optimization.clip_norm, optimization.clip_norm is None or optimization.clip_norm > 0, "positive"),
        ("ema", optimization.ema, optimization.ema is None or 0 <= optimization.ema < 1, "in [0, 1)"),
        ("exchange-minutes", options.execution.exchange_minutes, options.execution.exchange_minutes > 0, "positive"),
        ("accumulation", optimization.accumulation, 1 <= optimization.accumulation, "at least 1"),
        ("rho", loss.rho, 0 <= loss.rho < math.inf, ">= 0"),
        ("temperature-lr", loss.temperature_lr, 0 < loss.temperature_lr < math.inf, "positive"),
        ("temperature-bounds", loss.temperature_bounds, 0 < low <= high < math.inf, "two numbers, 0 < low <= high"),
        ("level", loss.level, 0 < loss.level <= 1, "in (0, 1]"),
        ("strength", loss.strength, 0 < loss.strength < math.inf, "positive"),
        ("coefficient", loss.coefficient, abs(share) < math.inf, "a finite number, or adaptive"),
        ("distill", loss.distill, 0 <= loss.distill < math.inf, ">= 0"),
        ("distill-temperature", loss.distill_temperature, 0 < distill_tau < math.inf, "positive, or auto"),
        ("checkpoint-minutes", options.checkpoint_minutes, options.checkpoint_minutes > 0, "positive"),
        ("validations", options.validations, options.validations >= 1, "at least 1"),
        ("seed", options.seed, options.seed >= 0, ">= 0"),
    ):
        if not is_right:
            raise UserError(f"--{flag} must be {meaning}, got {value}")
    check_optimizer(optimization.optimizer)
    if (optimization.schedule == "cooldown") != (optimization.cooldown_steps > 0):
        raise UserError(
            f"--schedule cooldown and --cooldown-steps need each other, got {optimization.schedule} and "
            f"{optimization.cooldown_steps} steps"
        )
    if optimization.schedule == "constant" and optimization.lr_min:
        raise UserError(f"--lr-min {optimization.lr_min} has no part in this run: --schedule constant stays at --lr")
    _check_meaning(loss)
    _check_shards(options)


def _check_shards(options: Train) -> None:
    """Refuse options of the pairs that would be ignored."""
    shards = options.shards
    if shards.catalog is None:
        for name, value in vars(shards).items():
            if value != getattr(Shards(), name):
                raise UserError(f"--{name.replace('_', '-')} {value} has no part in this run: it is for --catalog")
        return
    if options.loss.needs_reference:
        raise UserError("--catalog has no reference features yet: choose a method without a reference")
    if options.split != "train" or options.data != Data():
        raise UserError("--catalog takes the place of --split, --captions, --size and --cache: leave those out")
    for flag, value, is_right, meaning in (
        ("workers", shards.workers, shards.workers >= 0, ">= 0"),
        ("epoch-samples", shards.epoch_samples, shards.epoch_samples is None or shards.epoch_samples >= 1, ">= 1"),
        ("block-shards", shards.block_shards, shards.block_shards >= 1, "at least 1"),
        ("skip-limit", shards.skip_limit, 0 <= shards.skip_limit <= 1, "in [0, 1]"),
    ):
        if not is_right:
            raise UserError(f"--{flag} must be {meaning}, got {value}")


def _check_meaning(loss: Loss) -> None:
    """Refuse options that the chosen method would ignore: what is given must take part."""
    contrastive = loss.method in ("fastclip", "drrho")
    learned = contrastive and loss.temperature_scheme != "constant"
    with_radius = learned and loss.temperature_scheme != "per-temperature"
    is_kl = loss.divergence == "kl"
    for name, takes_part, where in (
        ("temperature", contrastive or loss.method == "two-level", "--method fastclip, drrho or two-level"),
        ("temperature_scheme", contrastive, "--method fastclip or drrho"),
        ("rho", with_radius, "--temperature-scheme global or individual"),
        ("temperature_lr", learned, "a learned --temperature-scheme"),
        ("temperature_bounds", learned, "a learned --temperature-scheme"),
        ("divergence", contrastive or loss.method == "two-level", "--method fastclip, drrho or two-level"),
        ("level", loss.divergence == "cvar", "--divergence cvar"),
        ("strength", loss.method == "two-level" and loss.divergence != "cvar", "--method two-level, without cvar"),
        ("coefficient", loss.method == "drrho", "--method drrho"),
        ("final_gamma", contrastive and loss.log_step is None, "--method fastclip or drrho, without --log-step"),
        ("log_step", contrastive and is_kl, "--method fastclip or drrho with --divergence kl"),
        ("eps", contrastive and is_kl, "--method fastclip or drrho with --divergence kl"),
        ("distill_temperature", loss.distill > 0, "--distill"),
        ("reference", loss.needs_reference, "--method drrho or two-level, or with --distill"),
    ):
        value = getattr(loss, name)
        if not takes_part and value != getattr(_DEFAULT_LOSS, name):
            raise UserError(f"--{name.replace('_', '-')} {value} has no part in this run: it is for {where}")
    if loss.temperature_scheme == "per-temperature" and not is_kl:
        raise UserError(f"--temperature-scheme per-temperature needs --divergence kl, got {loss.divergence}")
    if contrastive and loss.temperature == "auto" and not loss.needs_reference:
        raise UserError(f"--temperature auto needs a reference, which {loss.method} has not: give a number like 0.1")
    low, high = loss.temperature_bounds
    if learned and loss.temperature != "auto" and not low <= loss.temperature <= high:
        raise UserError(f"--temperature {loss.temperature} must lie within --temperature-bounds {low} {high}")


def _pop_preset(arguments: list[str]) -> Train:
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--preset":
            value = value if equals else "".join(arguments[position + 1 : position + 2])
            del arguments[position : position + (1 if equals else 2)]
            if value not in PRESETS:
                raise UserError(f"no preset is called {value!r}: choose one of {', '.join(PRESETS)}")
            return PRESETS[value]
    return Train()


def _first_message(framed: str) -> str:
    """Return the sentence in tyro's framed message: what stands between the title and the next rule."""
    body = [line.strip(" │╭╮╰╯") for line in framed.splitlines()[1:]]
    is_rule = [re.fullmatch("[─ -]*", line) is not None for line in body]
    first = is_rule.index(False) if False in is_rule else 0
    last = is_rule.index(True, first) if True in is_rule[first:] else len(body)
    return " ".join(" ".join(body[first:last]).split()).rstrip(".")


def as_settings(options: Any) -> dict[str, Any]:
    """Return options as JSON's types; a path within the checkout as one relative to it."""
    return {key: _as_setting(value) for key, value in vars(options).items()}


def _as_setting(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.relative_to(_CHECKOUT) if value.is_relative_to(_CHECKOUT) else value)
    if isinstance(value, tuple):
        return [_as_setting(part) for part in value]
    return as_settings(value) if dataclasses.is_dataclass(value) else value
