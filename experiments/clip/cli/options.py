"""Options of the commands: their names, meanings, units and defaults are the command line's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.clip.glyphs.drawing import Captions
from experiments.clip.models.clip import SHIPPED_REFERENCE
from experiments.clip.reference.cache import Precision
from experiments.clip.training.logs import LogName
from experiments.clip.training.methods import TemperatureSchedule
from experiments.clip.training.optimization import Optimization
from experiments.clip.training.selection import Selection
from experiments.clip.training.trainer import CheckpointPolicy, Execution


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
    temperature_lr_schedule: TemperatureSchedule = "constant"
    """Of that rate: constant; in step with the model's; or a third once tau is below 0.03 (FastCLIP v3)."""
    published_temperature_gradient: bool = False
    """Count a learned tau's gradient twice in its similarities, as the published code does, whose values of rho
    suppose it."""
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
    gamma_epochs: int | None = None
    """Epochs after which that rate is reached and stays; all by default."""
    log_step: float | None = None
    """Instead of gamma, logarithm of SCENT's step: each estimate has a rate of its own."""
    eps: float = 1e-8
    """Added to the running estimate where the gradient divides by it."""
    distill: float = 0.0
    """Weight of the reference's distillation (cross-entropy of its softmax similarities), added to any method."""
    distill_temperature: float | Literal["auto"] = "auto"
    """Of both softmaxes, in units of similarity; auto: the reference's own."""
    distill_own_temperature: bool = False
    """The target's softmax has the temperature of --method instead, learned where that is, as in MobileCLIP."""
    reference: Path = SHIPPED_REFERENCE
    """The reference model: a folder in open_clip's local-dir layout, such as a run's model/; or, with
    --reference-weights, a registered open_clip model."""
    reference_weights: Path | None = None
    """File of the reference's weights, safetensors or torch's."""

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's features are needed."""
        return self.method in ("drrho", "two-level") or self.distill > 0

    @property
    def takes_temperature(self) -> bool:
        """Whether the temperature is the method's own, not the model's."""
        return self.method in ("fastclip", "drrho", "two-level")

    @property
    def learns_temperature(self) -> bool:
        """Whether the method's own temperature is learned."""
        return self.method in ("fastclip", "drrho") and self.temperature_scheme != "constant"


@dataclass(frozen=True)
class Shards:
    """Pairs of a catalog, instead of the embedded ones."""

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
    reference_features: Path | None = None
    """Folder made by `run.py cache-reference --catalog`; without it, the reference runs beside the target."""
    tasks: tuple[Path, ...] = ()
    """Folders of zero-shot tasks in CLIP_benchmark's layout, to validate on."""


@dataclass(frozen=True)
class Train:
    """Train one model; ``--preset NAME``, or ``--config FILE`` of an earlier run, is where other options start from."""

    model: str = "glyph-small"
    """A registered open_clip model."""
    pretrained: Path | None = None
    """File of weights to start from, safetensors or torch's; random ones by default."""
    lock: tuple[Literal["image", "text"], ...] = ()
    """Towers that stay as they are, as in LiT."""
    unlocked_groups: int = 0
    """Groups of layers, counted from the end, that learn in a locked tower."""
    patch_dropout: float = 0.0
    """Share of an image's patches that a vision transformer drops in training."""
    split: Literal["train", "reference"] = "train"
    """The pool of pairs to train on; the two are disjoint."""
    fraction: float = 1.0
    """Share of that pool, the first of its pairs in their fixed random order: a smaller share is part of a larger."""
    data: Data = field(default_factory=Data)
    shards: Shards = field(default_factory=Shards)
    loss: Loss = field(default_factory=Loss)
    selection: Selection = field(default_factory=Selection)
    optimization: Optimization = field(default_factory=Optimization)
    execution: Execution = field(default_factory=Execution)
    seed: int = 0
    """Seed of the initial weights and of the order of the pairs."""
    out: Path = Path("outputs/train")
    """Folder for the checkpoint and the trained model; a run found there is continued."""
    keeping: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    validations: int = 5
    """How many times to score the model on the validation split, evenly spaced."""
    logs: tuple[LogName, ...] = ("jsonl", "tensorboard")
    """Where numbers of the run go, within --out: lines of JSON, TensorBoard's events, Weights & Biases."""
    log_every: int = 10
    """Steps over which a line of the log is the mean."""
    nonfinite_limit: int = 0
    """Steps whose features, loss or gradient are not finite that are passed over before such a one ends the run; the
    samples of each are written to nonfinite.jsonl."""
    weights: Literal["float32", "float16"] = "float32"
    """Precision of the exported weights."""

    @property
    def source(self) -> str:
        """Where the pairs come from, a key of `experiments.clip.cli.sources.SOURCES`."""
        return "glyphs" if self.shards.catalog is None else "catalog"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss or the selection needs the reference's features."""
        return self.loss.needs_reference or self.selection.is_on

    @property
    def pairs_per_step(self) -> int:
        """Pairs that the stream gives each step, over all ranks, at most."""
        return self.optimization.batch_size * self.selection.scored_per_pair


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
    """Compute the reference model's features of the training pairs; under torchrun or srun, shards are dealt out."""

    data: Data = field(default_factory=Data)
    catalog: Path | None = None
    """Folder made by `run.py catalog`, instead of the embedded pairs."""
    reference: Path = SHIPPED_REFERENCE
    """The reference model: a folder in open_clip's local-dir layout, or, with --reference-weights, a registered one."""
    reference_weights: Path | None = None
    """File of the reference's weights, safetensors or torch's."""
    out: Path = Path("reference-features")
    """Folder of a catalog's features, for `train --reference-features`."""
    views: int = 1
    """Of each sample. 1: the reference's own preprocessing and the first caption. More: random crops and captions by
    turns, which the target is then shown too."""
    precision: Precision = "float16"
    """Of the features on disk."""
    batch_size: int = 256
    """Samples that go through the reference at a time."""
    workers: int = 0
    """Processes of a rank that read and decode."""
    skip_limit: float = 0.1
    """Share of a shard's samples that may turn out to be unusable."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    exchange_minutes: float = 600.0
    """How long a rank waits for the others at the end."""


@dataclass(frozen=True)
class Evaluate:
    """Score a trained model on held-out pairs."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of the model, in open_clip's local-dir layout, or, with --weights, a registered one."""
    weights: Path | None = None
    """File of the model's weights, safetensors or torch's, such as epoch_12.pt."""
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
