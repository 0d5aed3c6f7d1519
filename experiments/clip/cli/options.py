"""Options of the commands: names, ranges, meanings, units and defaults of the command line.

Nothing heavy is imported here, so that a wrong option is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import PROGRAM, UserError
from ..models.options import ModelInputs
from ..ranges import (
    AtLeast,
    BelowOne,
    NotNegative,
    OnlyWith,
    Positive,
    Range,
    Share,
    ShareOrZero,
    refuse_if_given,
)
from ..training.options import (
    SHIPPED_REFERENCE,
    STEERED,
    CheckpointPolicy,
    Execution,
    LogName,
    Loss,
    Optimization,
    Selection,
    TowerPrecision,
)

_TRAINER = __name__.rpartition(".cli.")[0]
#: The module of each source of pairs by `Train.source`; its function ``open_data`` is a `cli.sources.DataSource`.
#: Embedded data sets stand above this room, so their modules are imported when they are asked for.
SOURCES = {
    "catalog": f"{_TRAINER}.cli.sources",
    "glyphs": f"{_TRAINER}.glyphs.source",
    "icons": f"{_TRAINER}.icons.pairs",
}

Captions = Literal["clean", "vague", "swapped"]
DataName = Literal["glyphs", "icons"]
FeaturePrecision = Literal["float16", "bfloat16"]
Reading = Literal["random", "blocks", "shards"]
Check = Literal["time", "checksum"]

_WITH_REFERENCE = "--method drrho, two-level or gist, or with --distill or --select"
_WITH_DATA = OnlyWith("--tasks or --val-data", lambda options: options.tasks or options.val_data is not None)
_WITH_TASKS = OnlyWith("--tasks", lambda options: options.tasks)
_WITH_VAL_DATA = OnlyWith("--val-data", lambda options: options.val_data is not None)
_WITH_WANDB = OnlyWith("--log-to wandb", lambda options: "wandb" in options.logs)
_OF_A_CATALOG = OnlyWith("--catalog", lambda options: options.catalog is not None)
_PERCENT = Range("in (0, 100)", lambda value: 0 < value < 100)
_OF_ICONS = OnlyWith("--data icons", lambda data: data.kind == "icons")


@dataclass(frozen=True)
class Data:
    """Pairs of pictures and names that the program draws itself."""

    captions: Annotated[Captions, OnlyWith("--data glyphs", lambda data: data.kind == "glyphs")] = "swapped"
    """What the training split says of its glyphs: the names, a random half of each name's words, or 40 % exchanged."""
    size: Literal["full", "small"] = "full"
    """All 16 faces, or 4 of them; all icons, or about 30,000."""
    cache: Path = Path("cache")
    """Folder of shards and reference features; it can be moved."""
    kind: Annotated[DataName, tyro.conf.arg(name="data")] = "glyphs"
    """Characters of the shipped fonts with their Unicode names, or the icons of npm's @iconify/json with theirs."""
    pixels: Annotated[int, AtLeast(8), _OF_ICONS] = 64
    """Width and height of the icons' pictures."""
    swapped: Annotated[float, BelowOne, _OF_ICONS] = 0.0
    """Share of the training icons whose names are exchanged among each other, beyond what is wrong by nature."""


@dataclass(frozen=True)
class Shards:
    """Pairs of a catalog, instead of the embedded ones."""

    catalog: Path | None = None
    """Folder made by the command `catalog`."""
    workers: Annotated[int | None, NotNegative, _OF_A_CATALOG] = None
    """Processes of a rank that read and decode, and as many for --tasks; the batches are the same for any number. By
    default a rank's share of the cores but one, up to 16."""
    in_memory: Annotated[bool, _OF_A_CATALOG] = False
    """Keep each pair in memory as it was at its first visit, with its first caption and without augmentation: for small
    pictures, which take longer to decode than to train on."""
    source_weights: Annotated[str | None, _OF_A_CATALOG] = None
    """How often each source is visited in an epoch, joined by ::, like 1::2; fractions need --resampled."""
    caption_weights: Annotated[str | None, _OF_A_CATALOG] = None
    """How often a sample is shown with a caption of each --caption-key of its catalog, joined by ::, like 1::3, among
    those that it has; all of a sample's captions alike by default."""
    resampled: Annotated[bool, _OF_A_CATALOG] = False
    """Draw samples with replacement, instead of each once per epoch."""
    epoch_samples: Annotated[int | None, AtLeast(1), _OF_A_CATALOG] = None
    """Samples of an epoch when resampled; all by default."""
    block_shards: Annotated[int, AtLeast(1), _OF_A_CATALOG] = 16
    """Shards whose samples are shuffled together."""
    reading: Annotated[Reading | None, _OF_A_CATALOG] = None
    """How shards are read, and in which order. random: each sample by its offset, the default of local shards. blocks:
    parts of 8 MiB, each by one request, the default of remote ones. shards: as a whole, for servers without ranges."""
    block_folder: Annotated[Path | None, _OF_A_CATALOG] = None
    """Where blocks of remote shards are kept for a while; by default the system's folder of temporary files."""
    check_shards: Annotated[Check | None, _OF_A_CATALOG] = None
    """What must be as in the catalog beside sizes and headers. time: shards were not written since; checksum: their
    contents, which are all read."""
    skip_limit: Annotated[float, ShareOrZero, _OF_A_CATALOG] = 0.1
    """Share of samples that may turn out to be unusable before the run stops."""
    reference_features: Annotated[Path | None, _OF_A_CATALOG] = None
    """Folder made by the command `cache-reference --catalog`; without it, the reference runs beside the target."""
    more_reference_features: Annotated[tuple[Path, ...], _OF_A_CATALOG] = ()
    """The same for each of --more-references."""
    tasks: Annotated[tuple[Path, ...], _OF_A_CATALOG] = ()
    """Folders of zero-shot tasks to validate on: in CLIP_benchmark's layout, or a folder of images for each class."""
    val_data: Annotated[Path | None, _OF_A_CATALOG] = None
    """Folder of a catalog of held-out pairs to validate on, by contrastive loss and retrieval."""
    validation_batch_size: Annotated[int | None, AtLeast(1), _OF_A_CATALOG] = None
    """Images, or texts, per call of the model in a validation; 64 by default."""


@dataclass(frozen=True)
class Train:
    """Train one model; ``--preset NAME``, or ``--config FILE`` of an earlier run, is where other options start from."""

    model: str = ""
    """A registered open_clip model, a JSON file with an architecture, or, with its weights, a folder in open_clip's
    local-dir layout or hf-hub:OWNER/NAME."""
    pretrained: Path | None = None
    """Weights to start from: a file (safetensors, torch's, OpenAI's archive), a folder, hf-hub:OWNER/NAME, or a tag
    like openai; random ones by default. What is there under the name goes first."""
    inputs: ModelInputs = field(default_factory=ModelInputs)
    lock: tuple[Literal["image", "text"], ...] = ()
    """Towers that stay as they are, as in LiT."""
    unlocked_groups: Annotated[int, NotNegative, OnlyWith("--lock", lambda options: options.lock)] = 0
    """Groups of layers, counted from the end, that learn in a locked tower."""
    unlocked_text_groups: Annotated[
        int | None, NotNegative, OnlyWith("--lock text", lambda options: "text" in options.lock)
    ] = None
    """The same of the text tower, where it is another number."""
    patch_dropout: Annotated[float | None, BelowOne] = None
    """Share of an image's patches that a vision transformer drops in training; by default what its architecture says,
    which is none for all registered models."""
    split: Literal["train", "reference"] = "train"
    """The pool of pairs to train on; the two are disjoint."""
    fraction: Annotated[float, Share] = 1.0
    """Share of that pool, the first of its pairs in their fixed random order: a smaller share is part of a larger."""
    data: Data = field(default_factory=Data)
    shards: Shards = field(default_factory=Shards)
    loss: Loss = field(default_factory=Loss)
    selection: Selection = field(default_factory=Selection)
    optimization: Optimization = field(default_factory=Optimization)
    execution: Execution = field(default_factory=Execution)
    seed: Annotated[int, NotNegative] = 0
    """Seed of the initial weights and of the order of the pairs."""
    out: Path = Path("outputs/train")
    """Folder for the checkpoint and the trained model; a run found there is resumed."""
    resume: Path | None = None
    """Start from the state of another run, given by its folder or one of its checkpoints: weights, optimizer, running
    estimates, place in the data. Epochs, rates, schedule and the like may be others; data, model, batch and method not.
    Checkpoints in --out go first."""
    remote_sync: str | None = None
    """URL under which fsspec keeps a copy of --out, such as s3://bucket/runs: checkpoints, exports and logs. A run
    whose --out has no checkpoint begins with the one that is there."""
    remote_sync_frequency: Annotated[
        float, Positive, OnlyWith("--remote-sync", lambda options: options.remote_sync is not None)
    ] = 300.0
    """Seconds between copies."""
    keeping: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    validations: Annotated[int, AtLeast(1)] = 5
    """How many times to score the model on the validation split, evenly spaced."""
    # torchrun takes --logs for an ambiguous start of options of its own.
    logs: Annotated[tuple[LogName, ...], tyro.conf.arg(name="log-to", aliases=["--logs"])] = (
        "text",
        "jsonl",
        "tensorboard",
    )
    """Where the run's numbers are written, within --out: lines of text and of JSON, TensorBoard's events, Weights &
    Biases."""
    name: Annotated[str | None, _WITH_WANDB] = None
    """Name of the run in Weights & Biases; by default that of --out."""
    wandb_project: Annotated[str | None, _WITH_WANDB] = None
    """Project in Weights & Biases; by default what WANDB_PROJECT says, or drrho."""
    log_every: Annotated[int, AtLeast(1)] = 10
    """Each line of the log is the mean over so many steps."""
    nonfinite_limit: Annotated[int, NotNegative] = 0
    """How many steps with features, a loss or a gradient that is not finite are skipped before another one ends the
    run; the samples of each are written to nonfinite.jsonl."""
    weights: Literal["float32", "float16"] = "float32"
    """Precision of the exported weights."""

    @property
    def source(self) -> str:
        """Where the pairs come from, a key of `SOURCES`."""
        return self.data.kind if self.shards.catalog is None else "catalog"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss or the selection needs another model's features."""
        return self.loss.needs_reference or (self.selection.is_on and self.loss.self_reference is None)

    @property
    def reference(self) -> Path:
        """The reference model that is named, or the one that ships with the embedded pairs."""
        return self.loss.reference or SHIPPED_REFERENCE

    @property
    def pairs_per_step(self) -> int:
        """Pairs that the stream gives each step, over all ranks, at most."""
        return self.optimization.batch_size * self.selection.scored_per_pair

    def check_together(self) -> None:
        """Refuse options that contradict each other, and those that the run would ignore."""
        if {"image", "text"} <= set(self.lock) and not (self.unlocked_groups or self.unlocked_text_groups):
            raise UserError("--lock image text leaves nothing to train: lock one tower, or give --unlocked-groups")
        loss, selection, batch = self.loss, self.selection, self.optimization.batch_size
        if loss.self_reference is not None:
            self._check_self_reference()
        elif not self.needs_reference:
            refuse_if_given(loss, "reference", _WITH_REFERENCE)
            refuse_if_given(loss, "reference_weights", _WITH_REFERENCE)
            refuse_if_given(self.shards, "reference_features", _WITH_REFERENCE)
            refuse_if_given(loss, "more_references", _WITH_REFERENCE)
        self._check_several_references()
        self._check_scheduled()
        if loss.is_running and loss.temperature == "auto" and not self.needs_reference:
            raise UserError(
                f"--temperature auto needs a reference, which {loss.method} has not: give a number like 0.1"
            )
        if selection.is_joint and not 1 <= selection.select_chunks <= batch:
            raise UserError(
                f"--select-chunks must be between 1 and --batch-size {batch}, got {selection.select_chunks}"
            )
        if selection.is_on and loss.learns_temperature and loss.temperature_scheme == "individual":
            raise UserError(
                f"--select {selection.select} compares pairs at one temperature, which --temperature-scheme individual "
                "has not: choose another"
            )
        if self.shards.reference_features is not None:
            refuse_if_given(self.shards, "caption_weights", "runs without --reference-features, which are of captions")
        if self.source != "catalog":
            refuse_if_given(self.inputs, "aug_cfg", "--catalog")
        if self.source == "catalog" and (self.split != "train" or self.fraction != 1 or self.data != Data()):
            raise UserError(
                "--catalog takes the place of --data and its options, --split and --fraction: leave those out"
            )
        if self.source == "icons" and self.needs_reference and self.loss.reference is None:
            raise UserError(
                "--data icons needs --reference: the model that steers, such as a run with --split reference"
            )
        if self.source == "catalog":
            self._check_models()
        if self.shards.in_memory:
            self._check_in_memory()

    def _check_self_reference(self) -> None:
        """Refuse the average of the target beside another reference, and what only such a one has."""
        loss, where = self.loss, "runs without --self-reference"
        if not (loss.uses_reference or self.selection.is_on):
            refuse_if_given(loss, "self_reference", _WITH_REFERENCE)
        refuse_if_given(loss, "reference", where)
        refuse_if_given(loss, "reference_weights", where)
        refuse_if_given(loss, "more_references", where)
        refuse_if_given(self.shards, "reference_features", where)
        for option, is_auto in (
            ("temperature", loss.takes_temperature and loss.temperature == "auto"),
            ("distill_temperature", loss.distill > 0 and loss.distill_temperature == "auto"),
        ):
            if is_auto:
                raise UserError(
                    f"--{option.replace('_', '-')} auto is that of another model, which --self-reference "
                    f"{loss.self_reference} has not: give a number like 0.1"
                )

    def _check_scheduled(self) -> None:
        """Refuse a scheduled coefficient without held-out pairs, or of a reference that cannot be ahead on them."""
        if self.loss.coefficient != "scheduled":
            return
        if self.loss.self_reference is not None:
            raise UserError(
                "--coefficient scheduled falls as the target overtakes another model, which --self-reference "
                f"{self.loss.self_reference} has not: give a number or adaptive"
            )
        if self.source == "catalog" and self.shards.val_data is None:
            raise UserError(
                "--coefficient scheduled is measured on held-out pairs: give a catalog of some as --val-data"
            )

    def _check_several_references(self) -> None:
        """Refuse features that are not one folder for each reference, and a combination that is not of the method."""
        loss, shards = self.loss, self.shards
        cached, others = len(shards.more_reference_features), len(loss.more_references)
        if cached != (others if shards.reference_features is not None else 0):
            raise UserError(
                "--reference-features and --more-reference-features are of all references or of none: got "
                f"{int(shards.reference_features is not None)} and {cached} folders for --more-references "
                f"{' '.join(map(str, loss.more_references))}"
            )
        if loss.combine == "worst":
            refused = {
                f"--method {loss.method}": loss.method != "drrho",
                f"--coefficient {loss.coefficient}": isinstance(loss.coefficient, str),
                f"--distill {loss.distill}": loss.distill > 0,
            }
            for option, takes_similarities in refused.items():
                if takes_similarities:
                    raise UserError(
                        f"--combine worst is of margins, which {option} does not take: give mean or learned"
                    )
        if loss.combine in ("worst", "learned") and self.selection.is_on:
            raise UserError(
                f"--select {self.selection.select} compares with the mean of several references, not with --combine "
                f"{loss.combine}: give mean"
            )

    def _check_in_memory(self) -> None:
        """Refuse what would have a part where pairs are prepared at every visit."""
        shards, where = self.shards, "runs without --in-memory"
        if shards.workers:
            raise UserError(f"--in-memory takes --workers 0, got {shards.workers}: each would keep a copy")
        if shards.reading not in (None, "random"):
            raise UserError(f"--in-memory takes --reading random, got {shards.reading}: leave one of them out")
        refuse_if_given(shards, "caption_weights", where)
        refuse_if_given(self.inputs, "aug_cfg", where)
        if self.needs_reference and shards.reference_features is None:
            raise UserError(
                f"--in-memory needs --reference-features beside --reference: run `{PROGRAM} cache-reference`"
            )

    def _check_models(self) -> None:
        """Refuse to train on a user's data without knowing which model, and which reference."""
        if not self.model:
            raise UserError("--catalog needs --model: the model to train, like ViT-B-32")
        if self.needs_reference and self.loss.reference is None:
            if self.loss.method in STEERED:
                option = f"--method {self.loss.method}"
            else:
                option = "--distill" if self.loss.distill else f"--select {self.selection.select}"
            raise UserError(
                f"{option} needs --reference: the model that steers, like hf-hub:OWNER/NAME, or ViT-B-32 with "
                "--reference-weights openai (--method openclip, siglip and fastclip train without one)"
            )


@dataclass(frozen=True)
class CacheReference:
    """Compute the reference model's features of the training pairs; under torchrun or srun, shards are dealt out."""

    data: Data = field(default_factory=Data)
    catalog: Path | None = None
    """Folder made by the command `catalog`, instead of the embedded pairs."""
    reference: Path | None = None
    """The reference model: a folder in open_clip's local-dir layout, hf-hub:OWNER/NAME, or, with --reference-weights, a
    registered one. The embedded pairs have one that ships with them."""
    reference_weights: Path | None = None
    """The reference's weights: a file, a folder, hf-hub:OWNER/NAME, or a tag like openai."""
    out: Annotated[Path, _OF_A_CATALOG] = Path("reference-features")
    """Folder of a catalog's features, for `train --reference-features`."""
    views: Annotated[int, AtLeast(1), _OF_A_CATALOG] = 1
    """Views of each sample. 1: the reference's own preprocessing and the first caption. More: random crops and captions
    by turns, which the target is then shown too."""
    precision: Annotated[FeaturePrecision, _OF_A_CATALOG] = "float16"
    """Precision of the features on disk."""
    towers: Literal["float32", "bfloat16"] = "float32"
    """Precision of the reference's towers, by autocast."""
    batch_size: Annotated[int, AtLeast(1), _OF_A_CATALOG] = 256
    """Samples that go through the reference at a time."""
    workers: Annotated[int | None, NotNegative, _OF_A_CATALOG] = None
    """Processes of a rank that read and decode; by default its share of the cores but one, up to 16."""
    skip_limit: Annotated[float, ShareOrZero, _OF_A_CATALOG] = 0.1
    """Share of a shard's samples that may turn out to be unusable."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    exchange_minutes: Annotated[float, Positive] = 600.0
    """How long a rank waits for the others at the end."""

    def check_together(self) -> None:
        """Refuse options of the embedded pairs beside a catalog."""
        if self.catalog is not None and self.data != Data():
            raise UserError("--catalog takes the place of --data and its options: leave those out")
        if self.reference is None and (self.catalog is not None or self.data.kind != "glyphs"):
            where = "--catalog" if self.catalog is not None else f"--data {self.data.kind}"
            raise UserError(f"{where} needs --reference: the model whose features to store, like hf-hub:OWNER/NAME")


@dataclass(frozen=True)
class Advise:
    """Predict, for each reference and way to use it, the gain over the unsteered run, and recommend one or none."""

    reference: tuple[Path, ...] = ()
    """Reference models: folders in open_clip's local-dir layout, or hf-hub:OWNER/NAME. The glyphs have one that ships
    with them."""
    model: str = "glyph-tiny"
    """The model to train."""
    data: Data = field(default_factory=Data)
    catalog: Path | None = None
    """Folder made by the command `catalog`, instead of the embedded pairs."""
    reference_features: Annotated[tuple[Path, ...], _OF_A_CATALOG] = ()
    """Folders made by the command `cache-reference --catalog`, one for each --reference in the same order; without
    them the features of --pairs pairs are computed."""
    pairs: Annotated[int, AtLeast(1024)] = 4096
    """Training pairs on which the references are judged."""
    epochs: Annotated[int, AtLeast(1)] = 5
    """Passes over the training pairs of the run that is planned: its budget."""
    lr: Annotated[float, Positive] = 1e-3
    """Peak learning rate of that run."""
    expected: Annotated[float | None, _PERCENT] = None
    """What the unsteered run is expected to reach, in percent of the metric in which the gain is wanted, such as top-1.
    By default a probe predicts it, as naming top-1 of the glyphs."""
    reference_score: Annotated[
        tuple[float, ...],
        Range("percentages in (0, 100)", lambda value: all(0 < each < 100 for each in value)),
        OnlyWith("--expected", lambda options: options.expected is not None),
    ] = ()
    """What the references reach in the same metric, in percent and in the same order: they tell what --expected means
    for pairs like these."""
    probe_share: Annotated[float, Range("in (0, 0.02]", lambda value: 0 < value <= 0.02)] = 0.02
    """Share of the budget that the probe of the unsteered run takes."""
    most_cost: Annotated[float, AtLeast(1)] = 3.0
    """Largest number of operations relative to the unsteered run's: selecting one pair in five takes 2.7, as all
    candidates are scored; 1 leaves selections out."""
    seed: Annotated[int, NotNegative] = 0
    """Seed of the pairs that are drawn and of the probe."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    out: Path | None = None
    """File of the advice in JSON."""

    def check_together(self) -> None:
        """Refuse options that contradict each other, and data without a reference."""
        if self.catalog is not None and self.data != Data():
            raise UserError("--catalog takes the place of --data and its options: leave those out")
        if not self.reference and (self.catalog is not None or self.data.kind != "glyphs"):
            where = "--catalog" if self.catalog is not None else f"--data {self.data.kind}"
            raise UserError(f"{where} needs --reference: one model or several, like hf-hub:OWNER/NAME")
        count = max(1, len(self.reference))
        for option, given in (
            ("--reference-features", self.reference_features),
            ("--reference-score", self.reference_score),
        ):
            if given and len(given) != count:
                raise UserError(f"{option} has {len(given)} values for {count} of --reference: give one for each")


@dataclass(frozen=True)
class Evaluate:
    """Score a model on zero-shot tasks and held-out pairs; a model of the embedded glyphs, without both, on those."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of the model, in open_clip's local-dir layout, or, with --weights, a registered one."""
    weights: Path | None = None
    """File of the model's weights, safetensors or torch's, such as epoch_12.pt."""
    tasks: tuple[Path, ...] = ()
    """Folders of zero-shot tasks: in CLIP_benchmark's layout, or with a folder of images for each class."""
    datacomp: Annotated[bool, _WITH_TASKS] = False
    """The tasks are all of DataComp's: add its averages."""
    val_data: Path | None = None
    """Folder of a catalog of held-out pairs, made by the command `catalog`."""
    skip_limit: Annotated[float, ShareOrZero, _WITH_VAL_DATA] = 0.1
    """Share of the held-out pairs that may turn out to be unusable."""
    batch_size: Annotated[int, AtLeast(1), _WITH_DATA] = 64
    """Images, or texts, per call of the model."""
    workers: Annotated[int | None, NotNegative, _WITH_DATA] = None
    """Processes of a rank that read and decode; by default its share of the cores but one, up to 16."""
    precision: Annotated[TowerPrecision, _WITH_DATA] = "float32"
    """Precision of the towers, by autocast."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    out: Path | None = None
    """File of the scores in JSON; tasks that it has already are not scored again."""
    exchange_minutes: Annotated[float, Positive] = 30.0
    """How long a rank waits for another before it stops with an error."""
    data: Data = field(default_factory=Data)
    split: Literal["validation", "test"] = "test"
    """Which of the embedded pairs."""

    def check_together(self) -> None:
        """Refuse options of the embedded pairs beside other data."""
        if (self.tasks or self.val_data is not None) and (self.data != Data() or self.split != "test"):
            raise UserError(
                "--tasks and --val-data take the place of --data and its options, and of --split: leave those out"
            )


@dataclass(frozen=True)
class Export:
    """Write the model of a run, at one of its checkpoints, for open_clip and CLIP_benchmark; also while it goes on."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, for its last checkpoint, or of one of its checkpoints (checkpoints/step-N)."""
    out: Path | None = None
    """Folder of the model, in open_clip's local-dir layout; exports/step-N in the run's folder by default."""
    ema: bool = False
    """Export the moving average of the weights instead."""
    weights: Literal["float32", "float16"] = "float32"
    """Precision of the exported weights."""


@dataclass(frozen=True)
class MakeCatalog:
    """Count the samples of shards once and give each an index, for `train --catalog`."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Patterns of webdataset shards like data/{00000..00099}.tar, or folders of them, also remote; tables (.csv, .tsv,
    .parquet) of image paths and captions; or synthetic:N. They may be joined by ::."""
    out: Path = Path("catalog")
    """Folder of the catalog."""
    image_key: tuple[str, ...] = ()
    """Members of shards that are images, of which the first that a sample has is its image (jpg, jpeg, png and webp by
    default); or the column of a table that has their paths (filepath)."""
    caption_key: tuple[str, ...] = ()
    """Members of shards that are captions (txt by default), json:FIELD being a field of the member json; or columns of
    a table (title). A sample may lack some of them."""
    separator: str = ""
    """What separates the columns of a table: one character, or tab; by default found in its header."""
    uids: Path | None = None
    """Take a subset: a file of DataComp's, sorted uids in .npy, each as many times as it is there."""
    uid_key: Annotated[str, OnlyWith("--uids", lambda options: options.uids is not None)] = "uid"
    """The field of the member json, or the column of a table, that has the uid."""
    workers: Annotated[int, NotNegative] = 2
    """Processes that scan."""
    checksums: bool = False
    """Keep the SHA-256 of each shard, for `train --check-shards checksum`; local shards are then read as a whole."""
    run_pipe_commands: bool = False
    """Run the shell commands of sources that start with pipe:, which are refused otherwise."""


@dataclass(frozen=True)
class Plan:
    """Say what a run would take: parameters, operations, memory of a rank by part, disk, time."""

    train: Train = field(default_factory=Train)
    samples: Annotated[int | None, Positive] = None
    """Pairs of the training data; by default those of --catalog, or else the 23,635 that are embedded."""
    ranks: Annotated[int, Positive] = 1
    """Processes, one per device."""
    teraflops: Annotated[float, Positive] = 312.0
    """Peak rate of a device at the towers' precision, 10^12 operations per second (A100, bfloat16: 312)."""
    utilization: Annotated[float, Positive] = 0.4
    """Share of that rate which training reaches."""
    reference_width: Annotated[int, Positive] = 512
    """Width of the reference's features, where the run has a reference."""
    shards: Annotated[int | None, AtLeast(1)] = None
    """Tar files of the training data; by default those of --catalog, or one for each 10,000 pairs."""
    pair_kilobytes: Annotated[float, Positive] = 35.0
    """Mean size of a pair in them, 1000 bytes (DataComp's pool: 450 TB of 12.8 billion)."""
    writing_gigabytes: Annotated[float, Positive] = 1.0
    """Rate at which a rank writes checkpoints, 10^9 bytes per second."""

    def check_together(self) -> None:
        """Refuse options of the run that a plan would ignore."""
        if self.train.fraction != 1:
            raise UserError(
                f"--fraction {self.train.fraction} has no part in a plan: give --samples the number of pairs used"
            )
