"""Training state in safetensors files, one folder per step: weights, optimizer, method, progress; never pickle.

``step-00000120/`` holds ``training.safetensors`` (what all ranks share) and ``method-K-of-N.safetensors`` (rank K's
rows of running state). It is written under another name and renamed when every rank is done, so that a folder of
this name is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from experiments.clip.distributed import Ranks
from experiments.clip.errors import UserError
from experiments.clip.files import sync, write_atomically
from experiments.clip.methods import Method

_STEP = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial-"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_LOADING = StateDictOptions(full_state_dict=True)
_OF = "|"  # between a parameter's name and the optimizer's


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the last finished step, if there is one."""
    steps = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return max(steps, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def save_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    extra: Mapping[str, torch.Tensor],
    progress: dict[str, Any],
    settings: dict[str, Any],
    ranks: Ranks,
    *,
    keep: int = 2,
) -> None:
    """Write the state after ``progress["step"]`` steps and remove all but the last ``keep``; every rank calls.

    A failure on any rank, such as a full disk, leaves the earlier ones; the rank that failed raises its error, the
    others one that names it.
    """
    name = f"step-{progress['step']:08d}"
    partial = folder / f"{_PARTIAL}{name}"
    shared = {f"model.{key}": value for key, value in get_model_state_dict(model, options=_WHOLE).items()}
    state: Any = get_optimizer_state_dict(model, optimizer, options=_WHOLE).get("state", {})
    shared |= {
        f"optimizer.{name}{_OF}{key}": torch.as_tensor(value)
        for name, values in state.items()
        for key, value in values.items()
    }
    shared |= {f"extra.{key}": value for key, value in extra.items()}
    failure: UserError | None = None
    try:
        if ranks.leads:
            _remove_partial(folder)  # what a killed run left, too
        ranks.wait()
        _write(partial / f"method-{ranks.rank}-of-{ranks.count}.safetensors", method.state_dict(), {"format": "pt"})
        if ranks.leads:
            metadata = {"progress": json.dumps(progress), "settings": json.dumps(settings, sort_keys=True)}
            _write(partial / "training.safetensors", shared, metadata)
    except UserError as error:
        failure = error
    try:
        ranks.agree(failure)
    except UserError:
        if ranks.leads:
            _remove_partial(folder)
        raise
    if ranks.leads:
        if (folder / name).exists():  # this step again, as by another number of ranks
            os.rename(folder / name, folder / f"{_PARTIAL}old-{name}")
        os.rename(partial, folder / name)
        sync(folder)
        _remove_partial(folder)
        _remove_old(folder, keep)
    ranks.wait()


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomically(path, save(whole, metadata))


def _remove_partial(folder: Path) -> None:
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove_old(folder: Path, keep: int) -> None:
    steps = sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name))
    for path in steps[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    settings: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Restore a step's folder made with equal ``settings``, by any number of ranks; return its progress and extras."""
    try:
        tensors, metadata = _read(path / "training.safetensors")
        stored = json.loads(metadata["settings"])
        progress = json.loads(metadata["progress"])
        parts = [_read(part)[0] for part in _method_parts(path)]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint {path} is damaged ({error}): delete it to go on from the one before") from error
    check_settings(path, stored, settings)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    # A single number, the logit scale, has shape [1] where parameters are sharded and none elsewhere.
    shapes = {name: value.shape for name, value in model.state_dict().items() if value.numel() == 1}
    weights = part("model.")
    weights |= {name: weights[name].reshape(shape) for name, shape in shapes.items() if name in weights}
    set_model_state_dict(model, weights, options=_LOADING)
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in part("optimizer.").items():
        name, _, field = key.partition(_OF)
        moment = name in shapes and field != "step"
        state.setdefault(name, {})[field] = value.reshape(shapes[name]) if moment else value
    # The groups' settings are those of this run.
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=_LOADING)
    method.load_state_dict(parts)
    return progress, part("extra.")


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def _method_parts(path: Path) -> list[Path]:
    """Return the files of all ranks, in order; a missing one is an error."""
    found = sorted(path.glob("method-*-of-*.safetensors"))
    count = int(found[0].stem.rpartition("-of-")[2]) if found else 1
    return [path / f"method-{rank}-of-{count}.safetensors" for rank in range(count)]


def check_settings(path: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse a result made with other settings, naming the first that differs."""
    for key in sorted(stored.keys() | settings.keys()):
        if stored.get(key) != settings.get(key):
            raise UserError(
                f"{path} was made with {key}={stored.get(key)}, now it is {settings.get(key)}: "
                "choose another --out or delete that folder"
            )
