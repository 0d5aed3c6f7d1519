"""Training state in one safetensors file: weights, optimizer, method, progress; never pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from experiments.clip.errors import UserError
from experiments.clip.files import write_atomically
from experiments.clip.methods import Method


def save_checkpoint(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    progress: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Replace the checkpoint at ``path``; an interruption leaves the previous one."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"method.{key}": value for key, value in method.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
    metadata = {"progress": json.dumps(progress), "settings": json.dumps(settings, sort_keys=True)}
    write_atomically(path, save({key: value.contiguous() for key, value in tensors.items()}, metadata))


def load_checkpoint(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Restore a checkpoint made with equal ``settings`` and return its progress."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        stored = json.loads(metadata["settings"])
        progress = json.loads(metadata["progress"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint {path} is damaged ({error}): delete it to start anew") from error
    check_settings(path, stored, settings)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    model.load_state_dict(part("model."))
    method.load_state_dict(part("method."))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in part("optimizer.").items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return progress


def check_settings(path: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse a result made with other settings, naming the first that differs."""
    for key in sorted(stored.keys() | settings.keys()):
        if stored.get(key) != settings.get(key):
            raise UserError(
                f"{path} was made with {key}={stored.get(key)}, now it is {settings.get(key)}: "
                "choose another --out or delete that folder"
            )
