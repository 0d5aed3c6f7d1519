"""Options of training, in groups beside what they steer: names, ranges, meanings, units and defaults.

The names are those of the command line, and of the hash by which a study knows a training: a new option must be off by
default (None, False, empty), or the hash of every finished training changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ..errors import UserError
from ..models.options import SHIPPED
from ..ranges import (
    AtLeast,
    BelowOne,
    NotNegative,
    OnlyWith,
    Positive,
    PositiveOrAuto,
    PositiveOrInfinite,
    Range,
    Share,
)

if TYPE_CHECKING:
    from drrho import Divergence

#: The reference model that ships with the embedded pairs, in open_clip's local-dir layout.
SHIPPED_REFERENCE = SHIPPED["glyphs"]

#: The methods whose loss has a reference.
STEERED = ("drrho", "two-level", "gist")

MethodName = Literal["openclip", "siglip", "fastclip", "drrho", "two-level", "gist"]
DivergenceName = Literal["kl", "chi-square", "cvar"]
TemperatureSchedule = Literal["constant", "model", "threshold"]
TowerPrecision = Literal["float32", "bfloat16", "float16"]
LogName = Literal["text", "jsonl", "tensorboard", "wandb"]

#: Steps of the warm-up, and the share of a shorter run, where no number is given.
USUAL_WARMUP, WARMUP_SHARE = 10_000, 0.05

# Checkpoints of large models are written seldom, if nothing else is said: ViT-B every 5 minutes, ViT-L every 14.
_PARAMETERS_A_MINUTE, _MOST_MINUTES = 30e6, 30.0
_WITHOUT_LOG_STEP = OnlyWith("--method fastclip or drrho, without --log-step", lambda loss: loss.log_step is None)
_LEARNED = OnlyWith("a learned --temperature-scheme", lambda loss: loss.learns_temperature)
_WITH_NETWORK = OnlyWith("--normalizer network", lambda loss: loss.normalizer == "network")
_WITH_KL = OnlyWith("--divergence kl", lambda loss: loss.divergence == "kl")


@dataclass(frozen=True)
class Loss:
    """The training method. Which of these options a method takes, its class says (`training.methods`)."""

    method: MethodName = "drrho"
    """InfoNCE with learnable temperature; the pairwise sigmoid loss; the global contrastive risk; the same steered by a
    reference; the DRRho risk over samples, from each sample's contrastive risk in excess of the reference's; InfoNCE
    without the negatives that the reference finds closer than the pair itself."""
    temperature: Annotated[float | Literal["auto"], PositiveOrAuto] = "auto"
    """The temperature tau of fastclip, drrho and two-level, in units of similarity, or where learning it starts; auto
    (with a reference): 0.3 of the spread of the reference's margins."""
    temperature_scheme: Literal["constant", "global", "individual", "per-temperature"] = "constant"
    """How fastclip and drrho treat tau: constant (FastCLIP v1), one learned with the radius --rho (v3), one learned per
    sample and direction (v2), or one learned for the risk divided by tau (v0)."""
    rho: Annotated[
        float,
        NotNegative,
        OnlyWith(
            "--temperature-scheme global or individual",
            lambda loss: loss.learns_temperature and loss.temperature_scheme != "per-temperature",
        ),
    ] = 0.0
    """Radius of the KL ball over an anchor's negatives, in nats, for learned temperatures."""
    temperature_lr: Annotated[float, Positive, _LEARNED] = 1e-3
    """Adam's learning rate of a learned tau, in units of similarity."""
    temperature_lr_schedule: Annotated[TemperatureSchedule, _LEARNED] = "constant"
    """How the temperature's learning rate changes: constant; model, proportional to the model's rate; threshold,
    divided by three once tau falls below 0.03 (FastCLIP v3)."""
    published_temperature_gradient: Annotated[
        bool,
        OnlyWith(
            "a learned --temperature-scheme with --divergence kl",
            lambda loss: loss.learns_temperature and loss.divergence == "kl",
        ),
    ] = False
    """Count a learned tau's gradient twice in its similarities, as the published code does, whose values of rho
    suppose it."""
    temperature_bounds: Annotated[
        tuple[float, float],
        Range("two numbers, 0 < low <= high", lambda value: 0 < value[0] <= value[1] < math.inf),
        _LEARNED,
    ] = (0.01, 1.0)
    """The interval in which a learned tau is kept, in units of similarity."""
    divergence: DivergenceName = "kl"
    """The divergence of the ball over negatives for fastclip and drrho, over samples for two-level."""
    level: Annotated[float, Share, OnlyWith("--divergence cvar", lambda loss: loss.divergence == "cvar")] = 0.1
    """Share of the negatives, or samples, that cvar averages over."""
    strength: Annotated[
        float, Positive, OnlyWith("--method two-level, without cvar", lambda loss: loss.divergence != "cvar")
    ] = 0.1
    """Penalty on the divergence over samples of two-level, in units of similarity; cvar has none."""
    coefficient: Annotated[
        float | Literal["adaptive", "scheduled"],
        Range("a finite number, adaptive or scheduled", lambda value: abs(value) < math.inf),
    ] = 1.0
    """How much of the reference's margins drrho subtracts. adaptive: the estimated coefficient of least variance.
    scheduled: half of the same by how much more the reference knows of held-out pairs, which ends at 0 where the target
    overtakes it; of a catalog these are of --val-data."""
    final_gamma: Annotated[float, Share, _WITHOUT_LOG_STEP] = 0.6
    """Rate of the running estimates in the last epoch; it decays from 1 by a cosine over the epochs."""
    gamma_epochs: Annotated[int | None, NotNegative, _WITHOUT_LOG_STEP] = None
    """Number of epochs after which that rate is reached and stays; all by default."""
    log_step: Annotated[float | None, _WITH_KL] = None
    """Instead of gamma, the logarithm of SCENT's step: each estimate has a rate of its own."""
    eps: Annotated[float, NotNegative, _WITH_KL] = 1e-8
    """Added to the running estimate where the gradient divides by it."""
    normalizer: Annotated[
        Literal["network"] | None,
        OnlyWith(
            "--method fastclip or drrho, --divergence kl, --temperature-scheme constant, without --log-step",
            lambda loss: loss.may_predict_normalizers,
        ),
    ] = None
    """network: instead of a running estimate for each sample, a small network of the features predicts each anchor's
    normalizer, trained beside the model (NeuCLIP); the batch's own has the weight gamma beside it."""
    normalizer_prototypes: Annotated[int | None, AtLeast(1), _WITH_NETWORK] = None
    """Prototypes of that network for each direction; 256 by default."""
    normalizer_lr: Annotated[float | None, Positive, _WITH_NETWORK] = None
    """Adam's learning rate of that network, in units of features; 0.01 by default."""
    normalizer_steps: Annotated[int | None, AtLeast(1), _WITH_NETWORK] = None
    """Its steps for each of the model's; 1 by default."""
    distill: Annotated[float, NotNegative] = 0.0
    """Weight of the reference's distillation (cross-entropy of its softmax similarities), added to any method."""
    distill_temperature: Annotated[
        float | Literal["auto"], PositiveOrAuto, OnlyWith("--distill", lambda loss: loss.distill > 0)
    ] = "auto"
    """Temperature of both softmaxes, in units of similarity; auto: the reference's own."""
    distill_own_temperature: Annotated[
        bool,
        OnlyWith(
            "--distill, with one temperature for all samples",
            lambda loss: loss.distill > 0 and not (loss.is_running and loss.temperature_scheme == "individual"),
        ),
    ] = False
    """The target's softmax has the temperature of --method instead, learned where that is, as in MobileCLIP."""
    reference: Path | None = None
    """The reference model: a folder in open_clip's local-dir layout, such as a run's model/; hf-hub:OWNER/NAME; or a
    registered open_clip model with --reference-weights. The embedded pairs have one that ships with them."""
    reference_weights: Path | None = None
    """The reference's weights: a file, a folder, hf-hub:OWNER/NAME, or a tag like openai."""

    more_references: tuple[Path, ...] = ()
    """References beside --reference, each a folder or hf-hub:OWNER/NAME, whose margins are combined with its own."""
    combine: Annotated[
        Literal["mean", "worst", "learned"] | None,
        OnlyWith("--more-references", lambda loss: loss.more_references),
    ] = None
    """How the margins of several references are combined. mean: their mean, the default; worst: of each negative the
    smallest, by which the target's excess is largest (drrho); learned: a mixture whose weights make the pairs of the
    batches most likely, learned beside the target."""
    self_reference: Annotated[float | None, BelowOne] = None
    """Take the target's own moving average for the reference, instead of another model: its decay per step, such as
    0.999. Each step has one more forward pass."""

    @property
    def is_running(self) -> bool:
        """Whether the method keeps running estimates of every sample."""
        return self.method in ("fastclip", "drrho")

    @property
    def may_predict_normalizers(self) -> bool:
        """Whether there are normalizers that a network could predict."""
        is_plain = self.divergence == "kl" and self.temperature_scheme == "constant" and self.log_step is None
        return self.is_running and is_plain

    @property
    def uses_reference(self) -> bool:
        """Whether the loss has a reference, be it the target's own average."""
        return self.method in STEERED or self.distill > 0

    @property
    def needs_reference(self) -> bool:
        """Whether another model's features are needed."""
        return self.uses_reference and self.self_reference is None

    @property
    def takes_temperature(self) -> bool:
        """Whether the temperature is the method's own, not the model's."""
        return self.method in ("fastclip", "drrho", "two-level")

    @property
    def learns_temperature(self) -> bool:
        """Whether the method's own temperature is learned."""
        return self.is_running and self.temperature_scheme != "constant"

    def build_divergence(self) -> Divergence:
        """Return the divergence: a new one takes a name in `DivergenceName` and a line here."""
        import drrho  # loads torch, which an option that is wrong should not wait for

        known = {"kl": drrho.KL, "chi-square": drrho.ChiSquare, "cvar": lambda: drrho.CVaR(self.level)}
        return known[self.divergence]()

    def check_together(self) -> None:
        """Refuse options that contradict each other."""
        if self.temperature_scheme == "individual" and self.temperature_lr_schedule == "threshold":
            raise UserError(
                "--temperature-lr-schedule threshold is for a single tau, not --temperature-scheme individual"
            )
        if self.temperature_scheme == "per-temperature" and self.divergence != "kl":
            raise UserError(f"--temperature-scheme per-temperature needs --divergence kl, got {self.divergence}")
        if self.normalizer is not None and self.combine == "worst":
            raise UserError("--normalizer network predicts from features, which --combine worst is none of: give mean")
        low, high = self.temperature_bounds
        if self.learns_temperature and self.temperature != "auto" and not low <= self.temperature <= high:
            raise UserError(f"--temperature {self.temperature} must lie within --temperature-bounds {low} {high}")


@dataclass(frozen=True)
class Selection:
    """Which of the pairs to train on."""

    select: Literal["all", "jest", "jest-top-k", "rho-top-k"] = "all"
    """Train on every pair, or on those of a larger batch that are most learnable, by the target's loss minus the
    reference's: drawn in parts, each given those before (JEST); the same, but the largest scores instead of draws; or
    the pairs whose own losses among all candidates exceed the reference's most (RHO-LOSS)."""
    candidates: Annotated[
        int,
        AtLeast(2, "one is left out"),
        OnlyWith("--select jest, jest-top-k or rho-top-k", lambda selection: selection.is_on),
    ] = 5
    """Pairs scored for each pair of --batch-size; JEST's filter ratio is 1 - 1/candidates, published with 5."""
    select_chunks: Annotated[int, OnlyWith("--select jest or jest-top-k", lambda selection: selection.is_joint)] = 16
    """Parts in which JEST chooses a batch, of a pair at least: a batch of fewer pairs has as many parts as pairs."""
    select_temperature: Annotated[
        float,
        Range("positive: 0 is --select jest-top-k", lambda value: 0 < value <= 1e300),
        OnlyWith("--select jest", lambda selection: selection.select == "jest"),
    ] = 1.0
    """Temperature of JEST's draws, in nats of the score; published: 1."""

    @property
    def is_on(self) -> bool:
        """Whether pairs are left out."""
        return self.select != "all"

    @property
    def is_joint(self) -> bool:
        """Whether the batch is chosen in parts."""
        return self.select in ("jest", "jest-top-k")

    @property
    def scored_per_pair(self) -> int:
        """Pairs that the stream gives for each pair of the batch size."""
        return self.candidates if self.is_on else 1


@dataclass(frozen=True)
class Optimization:
    """How long and how to train."""

    epochs: Annotated[int, AtLeast(1)] = 32
    """Passes over the training pairs."""
    batch_size: Annotated[int, AtLeast(2, "an anchor needs a negative")] = 512
    """Pairs trained on per step over all ranks, at most: an epoch is cut into batches of equal size up to one."""
    accumulation: Annotated[int, AtLeast(1)] = 1
    """Parts of a rank's batch that go through the towers one after the other; the loss still sees all of the batch."""
    optimizer: str = "adamw"
    """adamw, or the name of any optimizer of timm (timm.optim.list_optimizers())."""
    lr: Annotated[float, Positive] = 5e-4
    """Peak learning rate."""
    betas: Annotated[
        tuple[float, float] | None, Range("two numbers in [0, 1)", lambda value: all(0 <= beta < 1 for beta in value))
    ] = None
    """Decay rates of the moments. By default adamw has OpenAI's: 0.9 and 0.98 where images go through a transformer,
    else 0.9 and 0.999; other optimizers have their own."""
    adam_eps: Annotated[float | None, Positive] = None
    """Added to the root of the second moment. By default adamw has OpenAI's: 1e-6 for a transformer, else 1e-8."""
    momentum: Annotated[
        float | None, BelowOne, OnlyWith("an --optimizer of timm", lambda optimization: not optimization.is_adamw)
    ] = None
    """Momentum of an optimizer of timm; 0.9 by default, where it has one."""
    weight_decay: Annotated[float, NotNegative] = 0.2
    """Decoupled weight decay of matrices; gains, biases and the temperature have none."""
    schedule: Literal["cosine", "constant", "cooldown"] = "cosine"
    """After the warm-up: a cosine to --lr-min; constant; or constant, and to --lr-min in the last --cooldown-steps."""
    warmup: Annotated[int | None, NotNegative] = None
    """Steps of linear warm-up; by default 10,000, or 5 % of a run of fewer than 200,000."""
    lr_min: Annotated[
        float,
        OnlyWith("--schedule cosine or cooldown", lambda optimization: optimization.schedule != "constant"),
    ] = 0.0
    """Where cosine and cooldown end."""
    cooldown_steps: Annotated[int, NotNegative] = 0
    """Steps of the cooldown, the last of the run."""
    cooldown_power: Annotated[
        float | None, Positive, OnlyWith("--schedule cooldown", lambda optimization: optimization.cooldown_steps > 0)
    ] = None
    """Power of the share of its steps that are left, by which the rate falls in the cooldown; linear by default."""
    clip_norm: Annotated[float | None, PositiveOrInfinite] = None
    """Largest norm of the gradient; larger ones are scaled down to it."""
    ema: Annotated[float | None, BelowOne] = None
    """Decay per step of a moving average of the weights, exported beside them."""

    @property
    def is_adamw(self) -> bool:
        """Whether the optimizer is torch's own AdamW."""
        return self.optimizer == "adamw"

    def warmup_of(self, steps: int) -> int:
        """Return the steps of the warm-up in a run of so many."""
        return min(USUAL_WARMUP, math.ceil(WARMUP_SHARE * steps)) if self.warmup is None else self.warmup

    def check_together(self) -> None:
        """Refuse options that contradict each other."""
        if not 0 <= self.lr_min <= self.lr:
            raise UserError(f"--lr-min must be between 0 and --lr, got {self.lr_min}")
        if (self.schedule == "cooldown") != (self.cooldown_steps > 0):
            raise UserError(
                f"--schedule cooldown and --cooldown-steps need each other, got {self.schedule} and "
                f"{self.cooldown_steps} steps"
            )


@dataclass(frozen=True)
class Execution:
    """Device, precision and parallelism of training."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Over ranks (torchrun or srun): a copy of the model on each, or its parameters sharded (FSDP2)."""
    precision: TowerPrecision | None = None
    """Precision of the towers, by autocast: by default bfloat16 on a GPU (float16 on one that has no bfloat16), else
    float32; float16 scales the loss. Similarities and losses are always float32."""
    full_float32: bool = False
    """Keep products and convolutions of float32 on a GPU in full precision, and cuDNN to its usual algorithms; without
    it they run in TF32, and cuDNN tries which algorithm is fastest, as open_clip trains."""
    use_bn_sync: bool = False
    """Batch normalization over the pairs of all ranks, on GPUs."""
    compile: bool | Literal["reduce-overhead"] = False
    """Compile the towers with torch.compile; with reduce-overhead, a GPU replays them as CUDA graphs, for small models
    whose steps consist of launches."""
    activation_checkpointing: bool = False
    """Keep the inputs of blocks alone and compute them again in the backward pass."""
    exchange_minutes: Annotated[float, Positive] = 10.0
    """How long a rank waits for another before it stops with an error."""


@dataclass(frozen=True)
class CheckpointPolicy:
    """When checkpoints are written, and which are kept."""

    checkpoint_minutes: Annotated[float | Literal["auto"], PositiveOrInfinite] = "auto"
    """Minutes between checkpoints, which are written while training continues; auto: one for every 30 million
    parameters, from 1 to 30."""
    checkpoint_steps: Annotated[int | None, AtLeast(1)] = None
    """Steps between checkpoints, in addition."""
    keep: Annotated[int, AtLeast(1)] = 2
    """How many of the last checkpoints are kept."""
    export_epochs: Annotated[int | None, AtLeast(1)] = None
    """Epochs between exports of the model as it stands, to exports/ in --out."""
    export_steps: Annotated[int | None, AtLeast(1)] = None
    """Steps between such exports, in addition."""
    grace_seconds: Annotated[float, PositiveOrInfinite] = 25.0
    """Seconds after SIGTERM or SIGUSR1 by which the run ends, with a checkpoint of its last step unless something hangs
    that long. Schedulers and torchrun kill 30 seconds after SIGTERM."""
    best: str | None = None
    """Metric of the validations, such as naming_top1 or held_out/loss: the checkpoint of its best value (the lowest of
    a loss or a rank, else the highest) is kept too, and exported as model-best."""

    def minutes(self, parameters: int) -> float:
        """Return the minutes between checkpoints of a model with so many parameters."""
        if self.checkpoint_minutes == "auto":
            return min(max(parameters / _PARAMETERS_A_MINUTE, 1.0), _MOST_MINUTES)
        return self.checkpoint_minutes
