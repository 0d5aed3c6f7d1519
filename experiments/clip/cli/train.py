"""One training, from its options to the exported model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from math import nan
from typing import Any, NamedTuple

import torch
from open_clip import get_model_preprocess_cfg
from torch import Tensor

from experiments.clip.cli.building import build_method, build_selector, check_ranks
from experiments.clip.cli.options import Train
from experiments.clip.cli.parser import as_settings, save_config
from experiments.clip.cli.sources import DataSource, open_training_data
from experiments.clip.cli.terminal import console, progress_bar, stop_on_signal
from experiments.clip.distributed import ONE_PROCESS, Ranks
from experiments.clip.errors import UserError
from experiments.clip.io.files import claimed, ensure_writable
from experiments.clip.models.clip import Clip, load_model, lock_towers, new_model
from experiments.clip.models.export import export_checkpoint, export_model
from experiments.clip.training.checkpoint import MODEL, Checkpoint, latest_checkpoint, step_folder
from experiments.clip.training.logs import Logs
from experiments.clip.training.trainer import Record, best_record, train, whole


class Models(NamedTuple):
    """The model to be trained, and the reference of a steered run."""

    clip: Clip
    reference: Clip | None


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
    """Train as the options say, going on from a checkpoint in ``options.out``; export the model."""
    models = build_models(options, ranks)
    with ExitStack() as claims:
        with ranks.leader_first():
            ensure_writable(options.out)
            if ranks.leads:
                if not claims.enter_context(claimed(options.out / ".claim")):
                    raise UserError(
                        f"--out {options.out} is in use: wait for that run, end it, or choose another --out"
                    )
                save_config(options.out / "config.json", options)
        with stop_on_signal() as stop:
            trained = train_model(options, models, ranks, stop)
    weights = {key: whole(value) for key, value in trained.clip.model.state_dict().items()}
    if ranks.leads:
        write_exports(options, trained.clip, weights, trained.average)
        if (best := best_record(trained.history, options.keeping.best)) is not None:
            chosen = Checkpoint(step_folder(options.out / "checkpoints", int(best["step"]))).whole(MODEL)
            export_model(trained.clip, options.out / "model-best", getattr(torch, options.weights), chosen)
    return trained


def build_models(options: Train, ranks: Ranks = ONE_PROCESS) -> Models:
    """Return the models of a run, of which nothing is written yet."""
    clip, loss = _target(options, ranks), options.loss
    reference = load_model(loss.reference, loss.reference_weights) if options.needs_reference else None
    if reference is not None and options.split != "train":
        raise UserError(f"--split {options.split} has no cached reference features: runs with one use --split train")
    check_ranks(options, ranks)
    return Models(clip, reference)


def train_model(
    options: Train,
    models: Models,
    ranks: Ranks,
    stop: Callable[[], int],
    source: DataSource = open_training_data,
) -> Trained:
    """Train as the options say, going on from a checkpoint in ``options.out``; write logs and checkpoints alone.

    ``stop`` is `experiments.clip.train.train`'s; ``source`` opens the pairs.
    """
    (clip, reference), loss = models, options.loss
    data = source(options, clip, reference, ranks)
    method, chosen = build_method(loss, options.optimization.epochs, data.samples, reference, data.reference, ranks)
    identity = {
        "model": options.model,
        "pretrained": clip.fingerprint,
        "lock": list(options.lock),
        "unlocked_groups": options.unlocked_groups,
        "patch_dropout": options.patch_dropout,
        **data.identity,
        "reference": reference.fingerprint if reference is not None else "",
        "seed": options.seed,
        "validations": options.validations,
        "precision": options.execution.precision,
        **as_settings(options.optimization),
        **as_settings(options.selection),
        **chosen,
    }
    checkpoints = options.out / "checkpoints"
    if (found := latest_checkpoint(checkpoints)) is not None:
        console.print(f"training   going on from {found}")
    logs = Logs(options.out, options.logs, identity) if ranks.leads else None
    title = f"training {options.out.name}"
    with closing(data.stream), progress_bar(title) as advance:
        history, average = train(
            clip,
            method,
            data.stream,
            options.optimization,
            reference_model=data.reference,
            selector=build_selector(options, reference, ranks),
            ranks=ranks,
            execution=options.execution,
            seed=options.seed,
            checkpoints=checkpoints,
            keeping=options.keeping,
            settings=identity,
            validate=data.validate,
            validations=options.validations,
            logs=logs,
            log_every=options.log_every,
            on_step=lambda step, total, log: advance(step, total, f"loss {log.get('loss', nan):.4f}"),
            stop=stop,
            nonfinite_limit=options.nonfinite_limit,
        )
    if logs is not None:
        logs.close()
    return Trained(clip, history, identity, average)


def _target(options: Train, ranks: Ranks) -> Clip:
    """Return the model to be trained."""
    more: dict[str, Any] = {"force_patch_dropout": options.patch_dropout} if options.patch_dropout else {}
    if ranks.group is not None and options.execution.parallel == "fsdp":
        more["nonscalar_logit_scale"] = True
    sigmoid = options.loss.method == "siglip"
    clip = new_model(options.model, options.seed, sigmoid=sigmoid, weights=options.pretrained, **more)
    lock_towers(clip.model, options.lock, options.unlocked_groups)
    return clip


def write_exports(options: Train, clip: Clip, weights: dict[str, Tensor], average: dict[str, Tensor]) -> None:
    """Write the trained model, and the moving average of its weights, for open_clip and CLIP_benchmark."""
    dtype, epoch = getattr(torch, options.weights), options.optimization.epochs
    preprocess = get_model_preprocess_cfg(clip.model)
    for name, state in (("model", weights), ("model-ema", average)):
        if state:
            export_model(clip, options.out / name, dtype, state)
            path = options.out / f"epoch_{epoch}{name.removeprefix('model')}.pt"
            export_checkpoint(clip.name, state, preprocess, path, epoch=epoch, dtype=dtype)
    console.print(f"training   {options.out / 'model'} holds the model in open_clip's local-dir layout")
