"""open_clip models with their own preprocessing and tokenizer, from a registered name or a folder."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from experiments.clip.errors import UserError

open_clip.add_model_config(Path(__file__).parent / "model_configs")

SHIPPED_REFERENCE = Path(__file__).parent / "reference"
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_SIGMOID_BIAS = -10.0


@dataclass(frozen=True)
class Clip:
    """A model and what it needs to read images and captions.

    ``preprocess`` maps a PIL image to the model's normalized input; ``tokenize`` a list of captions to ``[b, length]``.
    ``name`` is the registered name or the folder; ``fingerprint`` identifies weights, preprocessing and tokenizer of
    a model that was loaded, and is empty for a new one. ``augment`` is the preprocessing for training, of a new model.
    """

    name: str
    model: open_clip.CLIP
    preprocess: Callable[[Any], Tensor]
    tokenize: Callable[[Sequence[str]], Tensor]
    fingerprint: str = ""
    augment: Callable[[Any], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.logit_scale.device

    def encode_image(self, images: Tensor) -> Tensor:
        """Return unit features ``[b, d]`` of preprocessed images ``[b, 3, h, w]``."""
        return self.model.encode_image(images.to(self.device), normalize=True)

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Return unit features ``[b, d]`` of captions."""
        return self.model.encode_text(self.tokenize(list(captions)).to(self.device), normalize=True)


def new_model(name: str, seed: int, *, sigmoid: bool = False, **options: Any) -> Clip:
    """Build a registered open_clip model with weights drawn from ``seed``.

    ``sigmoid`` gives it SigLIP's head: a logit bias of -10 and a scale of 10 to start from. ``options`` go to
    ``open_clip.create_model_and_transforms``.
    """
    if name not in open_clip.list_models():
        raise UserError(f"no model is called {name!r}: open_clip.list_models() and the glyph models are known")
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        head = {"init_logit_bias": _SIGMOID_BIAS, "init_logit_scale": math.log(10)} if sigmoid else {}
        model, augment, preprocess = open_clip.create_model_and_transforms(name, **head, **options)
        return Clip(name, model, preprocess, open_clip.get_tokenizer(name), augment=augment)


def load_model(folder: Path) -> Clip:
    """Load a folder in open_clip's ``local-dir:`` layout, in evaluation mode."""
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} has no {missing[0]}: name a folder written by `run.py train` or open_clip")
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update((folder / name).read_bytes())
    try:
        with _quiet():
            model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:  # open_clip lets through whatever JSON, safetensors and torch raise on damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} does not load as an open_clip model ({reason}): make or copy it again") from error
    model.eval()
    return Clip(str(folder), model, preprocess, tokenizer, digest.hexdigest())


class _quiet:
    """open_clip warns on the root logger that a model to be trained has no pretrained weights."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        logging.disable(logging.NOTSET)
