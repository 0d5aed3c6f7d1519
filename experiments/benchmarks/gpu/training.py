"""Trainings in this process, as ``run.py train`` carries them out, with a look at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.benchmarks.gpu.agreement import relative
from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.cli.building import build_models
from experiments.clip.cli.options import Train
from experiments.clip.cli.terminal import console
from experiments.clip.cli.train import train_model
from experiments.clip.distributed import Ranks
from experiments.clip.run import parse
from experiments.clip.training.checkpoint import Checkpoint, latest_checkpoint
from experiments.clip.training.options import SHIPPED_REFERENCE
from experiments.clip.training.towers import full_tensor

_FASTCLIP = ("--method", "fastclip", "--temperature", "0.1")
_REFERENCE = ("--reference", str(SHIPPED_REFERENCE))
_DRRHO = ("--method", "drrho", "--temperature", "0.1", *_REFERENCE)
#: Every training method, as options of ``run.py train``.
METHODS: dict[str, tuple[str, ...]] = {
    "openclip": ("--method", "openclip"),
    "siglip": ("--method", "siglip"),
    "fastclip v0": (*_FASTCLIP, "--temperature-scheme", "per-temperature"),
    "fastclip v1": _FASTCLIP,
    "fastclip v2": (*_FASTCLIP, "--temperature-scheme", "individual", "--rho", "0.5"),
    "fastclip v3": (*_FASTCLIP, "--temperature-scheme", "global", "--rho", "0.5"),
    "fastclip, chi-square": (*_FASTCLIP, "--divergence", "chi-square"),
    "fastclip, CVaR": (*_FASTCLIP, "--divergence", "cvar", "--level", "0.2"),
    "scent": (*_FASTCLIP, "--log-step", "0.5"),
    "drrho": _DRRHO,
    "drrho, adaptive": (*_DRRHO, "--coefficient", "adaptive"),
    "drrho, distilled": (*_DRRHO, "--distill", "0.5"),
    "drrho on rho top-k": (*_DRRHO, "--select", "rho-top-k", "--candidates", "2"),
    "openclip on jest top-k": (
        *("--method", "openclip", "--select", "jest-top-k"),
        *("--candidates", "2", "--select-chunks", "4", *_REFERENCE),
    ),
    "two levels": ("--method", "two-level", "--temperature", "0.1", *_REFERENCE),
    "gist": ("--method", "gist", *_REFERENCE),
}
STEPS = 4
# Adam's steps do not depend on the size of a gradient, but where this constant is larger: rounding stays rounding.
_SMOOTH = ("--adam-eps", "0.01", "--warmup", "1", "--lr", "2e-3")


class Enough(Exception):
    """Raised by a look at a step, to end a training."""


class Trained(NamedTuple):
    """The weights before and after a training, in one vector each, and the state that the method keeps."""

    before: Tensor
    after: Tensor
    state: Tensor

    def differences(self, other: Trained, with_state: bool = True) -> dict[str, float]:
        """Return how far this is from another training: of weights, in units of their change."""
        change = {"weights": relative(self.after - self.before, other.after - other.before)}
        if with_state and other.state.numel():
            change["state"] = relative(self.state, other.state)
        return change


def train(words: Sequence[Any], out: Path, ranks: Ranks, look: Callable[[int], None] | None = None) -> Trained:
    """Train as the options say.

    Parameters
    ----------
    look : callable, optional
        Called at every step with their number so far.
    """
    options: Train = parse(["train", *map(str, words), "--device", ranks.device.type, "--out", str(out)])
    out.mkdir(parents=True, exist_ok=True)
    console.quiet, steps = True, 0

    def stop() -> int:
        nonlocal steps
        steps += 1
        if look is not None:
            look(steps)
        return 0

    models = build_models(options, ranks)
    before = _vector(models.clip.model)
    with suppress(Enough):
        train_model(options, models, ranks, stop)
    found = latest_checkpoint(out / "checkpoints")
    own = [] if found is None else [value for part in Checkpoint(found).own for value in part.values()]
    return Trained(before, _vector(models.clip.model), _flat(own))


def few_steps(name: str, extra: Sequence[Any], batch: int, scratch: Path, out: Path, ranks: Ranks) -> Trained:
    """Train by a method of `METHODS` on made-up pairs for some steps, in full float32 and little moved by rounding."""
    pixels = 32
    words = ["--catalog", made_up_catalog(batch * STEPS, scratch / f"catalog-{ranks.rank}", pixels), "--epochs", 1]
    words += [
        "--model",
        "glyph-micro",
        "--batch-size",
        batch,
        "--log-every",
        1,
        "--log-to",
        "jsonl",
        "--workers",
        0,
        "--precision",
        "float32",
        "--full-float32",
        *_SMOOTH,
    ]
    return train([*words, *METHODS[name], *extra], out, ranks)


def group_ranks(rank: int, count: int, device: torch.device) -> Ranks:
    """Return the ranks of the group that is initialized, forced where there is one."""
    hosts = dist.new_group(backend="gloo")
    assert isinstance(hosts, dist.ProcessGroup)
    return Ranks(rank, count, device, dist.group.WORLD, hosts=hosts)


def made_up_catalog(samples: int, folder: Path, pixels: int = 224) -> Path:
    """Write a catalog of made-up pairs, unless it is there."""
    if not (folder / "catalog.json").exists():
        make_catalog(f"synthetic:{samples}:{pixels}", folder)
    return folder


def _vector(model: torch.nn.Module) -> Tensor:
    return _flat([full_tensor(value) for value in model.state_dict().values()])


def _flat(values: Sequence[Tensor]) -> Tensor:
    """Return all entries in one vector, with one number for what was never visited."""
    parts = [value.detach().cpu().double().reshape(-1).nan_to_num(-99.0, -99.0, -99.0) for value in values]
    return torch.cat(parts) if parts else torch.empty(0)
