"""The command ``train``: one training, from its options to the exported model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip import get_model_preprocess_cfg
from torch import Tensor

from ..data.prefetch import Prefetched
from ..distributed import ONE_PROCESS, Ranks, joined_ranks, set_float32_products
from ..errors import UserError
from ..io.files import claimed, ensure_writable, write_json
from ..io.mirror import mirrored
from ..models.clip import Clip
from ..models.export import export_checkpoint, export_model
from ..signals import asked
from ..training.checkpoint import (
    MODEL,
    Checkpoint,
    check_continued,
    check_sound,
    chosen_checkpoint,
    latest_checkpoint,
    set_aside_damaged,
    step_folder,
    step_number,
)
from ..training.logs import Logs, Record
from ..training.state import best_record, check_resumable
from ..training.towers import full_tensor, precision_of, repeated_blocks
from ..training.trainer import Trainer
from .building import Models, build_method, build_models, build_selector
from .defaults import out_of_proportion, with_defaults
from .options import Train
from .parser import as_settings, save_config
from .sources import DataSource, TrainingData, open_training_data
from .terminal import console, progress_bar

# Options that are newer than some checkpoints, which do not have them where they are off.
_NEWER = ("momentum", "cooldown_power")


def run(options: Train) -> None:
    """Train on the ranks of this launch, and keep what was done in ``run.json``."""
    with joined_ranks(options.execution.device, options.execution.exchange_minutes) as ranks:
        console.quiet = not ranks.leads
        ranks.check_same_options(as_settings(options))
        run_training(options, ranks)


class Trained(NamedTuple):
    """A trained model, one record per validation, what identifies the run, the weights' moving average if any."""

    clip: Clip
    history: list[Record]
    identity: dict[str, Any]
    average: dict[str, Tensor]

    def record(self) -> dict[str, Any]:
        """Return what ``run.json`` keeps of it."""
        return {"settings": self.identity, "history": self.history}


def run_training(options: Train, ranks: Ranks = ONE_PROCESS) -> Trained:
    """Train as the options say, from a checkpoint in ``options.out`` if there is one; export the model."""
    models = build_models(options, ranks)
    with ExitStack() as held:
        with ranks.leader_first():
            ensure_writable(options.out)
            if ranks.leads:
                if not held.enter_context(claimed(options.out / ".claim")):
                    raise UserError(
                        f"--out {options.out} is in use: wait for that run, end it, or choose another --out"
                    )
                if (url := options.remote_sync) is not None:
                    held.enter_context(mirrored(options.out, url, options.remote_sync_frequency, _say_of_copies))
        # One that is refused leaves the configuration of the run that it does not resume.
        trained = train_model(
            options, models, ranks, asked, begin=lambda: save_config(options.out / "config.json", options)
        )
        weights = {key: full_tensor(value) for key, value in trained.clip.model.state_dict().items()}
        if ranks.leads:
            write_exports(options, trained.clip, trained.history, weights, trained.average)
            write_json(options.out / "run.json", {"options": as_settings(options), **trained.record()})
    return trained


def _say_of_copies(line: str) -> None:
    console.print(f"copies     {line}")


def train_model(
    options: Train,
    models: Models,
    ranks: Ranks,
    stop: Callable[[], int],
    source: DataSource = open_training_data,
    begin: Callable[[], None] = lambda: None,
) -> Trained:
    """Train as the options say, from a checkpoint in ``options.out`` if there is one; write logs and checkpoints only.

    ``stop`` is the `Trainer`'s; ``source`` opens the pairs; the leading rank calls ``begin`` when nothing is refused
    any more.
    """
    set_float32_products(ranks.device, options.execution.full_float32)
    clip, reference = models
    options = with_defaults(options, clip.config.model, precision_of(options.execution, ranks.device))
    data = source(options, clip, reference, ranks)
    _check_best(options.keeping.best, data.metrics)
    method, chosen = build_method(
        options.loss, options.optimization.epochs, data.samples, reference, data.reference, ranks
    )
    identity = _identity(options, models, data.identity, chosen)
    checkpoints = options.out / "checkpoints"
    for path, moved_to, fault in set_aside_damaged(checkpoints, ranks):
        console.print(f"training   {path} is damaged ({fault}): it is now {moved_to.name}")
    _say_what_is_chosen(options, data)
    found, other = ranks.run_on_all_or_fail(lambda: _beginning(options, checkpoints, identity))
    step = 0 if found is None else step_number(found)
    if found is not None:
        console.print(f"training   resuming from {found}")
    logs = None
    if ranks.leads:
        begin()
        logs = Logs(options.out, options.logs, identity, options.wandb_project, options.name)
    stream = Prefetched(data.stream, ranks.device)
    with closing(stream), progress_bar(f"training {options.out.name}") as advance:
        if step < stream.steps_per_epoch * options.optimization.epochs:
            stream.begin(*divmod(step, stream.steps_per_epoch))
        shown = _Shown(advance, data.validate)
        trainer = Trainer(
            clip,
            method,
            stream,
            options.optimization,
            reference=data.reference,
            held_out=data.held_out,
            self_reference=options.loss.self_reference,
            selector=build_selector(options, reference, ranks),
            ranks=ranks,
            execution=options.execution,
            policy=options.keeping,
            settings=identity,
            folder=checkpoints,
            seed=options.seed,
            validate=shown.validate,
            validations=options.validations,
            logs=logs,
            log_every=options.log_every,
            on_step=shown.step,
            stop=stop,
            nonfinite_limit=options.nonfinite_limit,
            other=other,
            export=exports_of(options, clip, ranks),
        )
        if ranks.group is not None and options.execution.parallel == "fsdp" and not repeated_blocks(clip.model):
            console.print("training   the model repeats no block: --parallel fsdp gathers all of it at once")
        history = trainer.fit()
    if logs is not None:
        logs.close()
    return Trained(clip, history, identity, trainer.averaged_weights())


def _beginning(options: Train, checkpoints: Path, identity: dict[str, Any]) -> tuple[Path | None, Path | None]:
    """Return the checkpoint that a run begins with, if there is one, and the same where it is another run's."""
    if (found := latest_checkpoint(checkpoints)) is not None:
        check_resumable(found, Checkpoint(found), identity, options.keeping.best)
        return found, None
    if options.resume is None:
        return None, None
    other = chosen_checkpoint(options.resume, "--resume")
    check_sound(other)
    check_continued(other, Checkpoint(other).settings, identity)
    return other, other


def _identity(options: Train, models: Models, data: dict[str, Any], method: dict[str, Any]) -> dict[str, Any]:
    """Return all that the weights depend on."""
    reference = models.reference
    return {
        "model": options.model,
        "pretrained": models.clip.fingerprint,
        "lock": list(options.lock),
        "unlocked_groups": options.unlocked_groups,
        "patch_dropout": options.patch_dropout or 0.0,
        **data,
        "reference": reference.fingerprint if reference is not None else "",
        "seed": options.seed,
        **({} if options.resume is None else {"resume": str(options.resume)}),
        "validations": options.validations,
        "precision": options.execution.precision,
        **({} if options.unlocked_text_groups is None else {"unlocked_text_groups": options.unlocked_text_groups}),
        **{key: True for key in ("full_float32", "use_bn_sync") if getattr(options.execution, key)},
        **{key: value for key, value in as_settings(options.optimization).items() if key not in _NEWER or value},
        **as_settings(options.selection),
        **method,
    }


def _say_what_is_chosen(options: Train, data: TrainingData) -> None:
    """Print what a run is like whose options were left to the program, and what is out of proportion."""
    steps = data.stream.steps_per_epoch * options.optimization.epochs
    warmup, precision = options.optimization.warmup_of(steps), options.execution.precision
    console.print(f"training   {steps} steps, a warm-up of {warmup}, towers in {precision}")
    epoch = options.shards.epoch_samples if options.shards.resampled else None
    for line in out_of_proportion(options, epoch or data.samples, steps):
        console.print(f"training   {line}", markup=False)


def _check_best(metric: str | None, names: Sequence[str]) -> None:
    """Refuse a metric that no validation will have, before the first step."""
    if metric is not None and metric not in names:
        known = f"choose one of {', '.join(names)}" if names else "a run on a catalog needs --tasks or --val-data"
        raise UserError(f"--best {metric} is no metric of the validations: {known}")


class _Shown:
    """What a person sees of a training: a bar, and the scores of each validation, in a file too."""

    def __init__(self, advance: Callable[..., None], validate: Callable[[], Record]) -> None:
        self._advance, self._validate = advance, validate
        self._at = ""

    def step(self, step: int, total: int, log: Record) -> None:
        """Show how many steps are done, and the loss."""
        self._at = f"step {step} of {total}"
        self._advance(step, total, f"loss {log['loss']:.4f}" if "loss" in log else "")

    def validate(self) -> Record:
        """Return the scores of the model as it stands, and print them: a line for each task."""
        scores = self._validate()
        lines: dict[str, list[str]] = {}
        for name, value in scores.items():
            task, _, metric = name.rpartition("/")
            lines.setdefault(task, []).append(f"{metric} {value:.4f}")
        for task, values in lines.items():
            console.print(f"validation {self._at}: {task}{' ' if task else ''}{', '.join(values)}")
        return scores


def write_exports(
    options: Train, clip: Clip, history: list[Record], weights: dict[str, Tensor], average: dict[str, Tensor]
) -> None:
    """Write the trained model, its best validation and its moving average, where there is one."""
    dtype, epoch = getattr(torch, options.weights), options.optimization.epochs
    preprocess = get_model_preprocess_cfg(clip.model)
    for name, state in (("model", weights), ("model-ema", average)):
        if state:
            export_model(clip, options.out / name, dtype, state)
            path = options.out / f"epoch_{epoch}{name.removeprefix('model')}.pt"
            architecture = clip.config.model
            export_checkpoint(clip.name, state, preprocess, path, epoch=epoch, dtype=dtype, config=architecture)
    console.print(f"training   {options.out / 'model'} holds the model in open_clip's local-dir layout")
    if (best := best_record(history, options.keeping.best)) is not None:
        path = step_folder(options.out / "checkpoints", int(best["step"]))
        check_sound(path)
        checkpoint = Checkpoint(path)
        export_model(clip, options.out / "model-best", dtype, checkpoint.full_tensors(MODEL))


def exports_of(options: Train, clip: Clip, ranks: Ranks) -> Callable[[str, dict[str, Tensor]], None]:
    """Return what writes the model as it stands, and its moving average if any, under ``exports/NAME`` (collective)."""
    dtype = getattr(torch, options.weights)

    def write(name: str, average: dict[str, Tensor]) -> None:
        weights = {key: full_tensor(value) for key, value in clip.model.state_dict().items()}

        def both() -> None:
            for ending, state in (("", weights), ("-ema", average)):
                if state:
                    export_model(clip, options.out / "exports" / f"{name}{ending}", dtype, state)

        ranks.run_on_all_or_fail(both if ranks.leads else lambda: None)

    return write
