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

open_clip.add_model_config(Path(__file__).parent / "configs")

SHIPPED_REFERENCE = Path(__file__).parents[1] / "glyphs" / "reference_model"
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_SIGMOID_BIAS = -10.0


@dataclass(frozen=True)
class Clip:
    """A model and what it needs to read images and captions.

    ``preprocess`` maps a PIL image to the model's normalized input; ``tokenize`` a list of captions to ``[b, length]``.
    ``name`` is the registered name or the folder; ``fingerprint`` identifies weights, preprocessing and tokenizer of
    a model that was loaded, and is empty for a new one. ``augment`` is the preprocessing for training.
    """

    name: str
    model: open_clip.CLIP
    preprocess: Callable[[Any], Tensor]
    tokenize: Callable[[Sequence[str]], Tensor]
    fingerprint: str
    augment: Callable[[Any], Tensor]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.logit_scale.device

    def encode_image(self, images: Tensor) -> Tensor:
        """Return unit features ``[b, d]`` of preprocessed images ``[b, 3, h, w]``."""
        return self.model.encode_image(at_least_one(images.to(self.device)), normalize=True)[: len(images)]

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Return unit features ``[b, d]`` of captions."""
        return self.encode_tokens(self.tokenize(list(captions)))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Return unit features ``[b, d]`` of tokenized captions ``[b, length]``."""
        return self.model.encode_text(at_least_one(tokens.to(self.device)), normalize=True)[: len(tokens)]


def at_least_one(inputs: Tensor) -> Tensor:
    """Return inputs ``[b, ...]``, or where b = 0 a single zero: open_clip's towers take no empty batch."""
    return inputs if len(inputs) else inputs.new_zeros(1, *inputs.shape[1:])


def new_model(name: str, seed: int, *, sigmoid: bool = False, weights: Path | None = None, **options: Any) -> Clip:
    """Build a registered open_clip model with weights drawn from ``seed``, or from a file.

    ``sigmoid`` gives it SigLIP's head: a logit bias of -10 and a scale of 10 to start from. ``options`` go to
    ``open_clip.create_model_and_transforms``.
    """
    if name not in open_clip.list_models():
        raise UserError(f"no model is called {name!r}: open_clip.list_models() and the glyph models are known")
    head = {"init_logit_bias": _SIGMOID_BIAS, "init_logit_scale": math.log(10)} if sigmoid else {}
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        if weights is not None:
            return _from_weights(name, weights, **head, **options)
        try:
            model, augment, preprocess = open_clip.create_model_and_transforms(name, **head, **options)
            return Clip(name, model, preprocess, open_clip.get_tokenizer(name), "", augment)
        except ImportError as error:
            raise UserError(f"--model {name} needs another package ({error}): install it") from error


def load_model(name: str | Path, weights: Path | None = None) -> Clip:
    """Load a model in evaluation mode: a folder in open_clip's ``local-dir:`` layout, or a registered name and a file.

    Files of weights are safetensors, or torch's, of which only tensors are read.
    """
    if weights is not None:
        if str(name) not in open_clip.list_models():
            raise UserError(f"no model is called {name!r}: with a file of weights, name one of open_clip.list_models()")
        with _quiet():
            clip = _from_weights(str(name), weights)
        clip.model.eval()
        return clip
    folder = Path(name)
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]}: name a folder written by `run.py train` or open_clip, "
            "or a registered model with a file of weights"
        )
    try:
        with _quiet():
            model, augment, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:  # open_clip lets through whatever JSON, safetensors and torch raise on damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} does not load as an open_clip model ({reason}): make or copy it again") from error
    model.eval()
    return Clip(str(folder), model, preprocess, tokenizer, fingerprint_of(folder), augment)


def fingerprint_of(folder: Path) -> str:
    """Return what identifies the model in a folder of open_clip's local-dir layout."""
    return _digest(folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def lock_towers(model: Any, towers: Sequence[str], unlocked: int) -> None:
    """Keep the image tower, the text tower or both as they are, but for their last ``unlocked`` groups of layers."""
    for tower in towers:
        lock = getattr(model, f"lock_{tower}_tower", None)
        try:
            if lock is None:
                raise NotImplementedError(f"it has no lock_{tower}_tower")
            # Running statistics of batch normalization are frozen with an image tower, gains with a text tower.
            lock(unlocked, True)
        except (NotImplementedError, AssertionError, AttributeError) as error:
            raise UserError(f"this model's {tower} tower cannot be locked ({error}): choose another --model") from error


def _from_weights(name: str, weights: Path, **options: Any) -> Clip:
    if not weights.is_file():
        raise UserError(f"there is no file of weights {weights}: name one that was saved for {name}")
    try:
        model, augment, preprocess = open_clip.create_model_and_transforms(name, pretrained=str(weights), **options)
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{weights} does not load as weights of {name} ({reason}): name the model it is of") from error
    return Clip(name, model, preprocess, open_clip.get_tokenizer(name), name + _digest(weights), augment)


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while part := file.read(2**22):
                digest.update(part)
    return digest.hexdigest()


class _quiet:
    """open_clip warns on the root logger that a model to be trained has no pretrained weights."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *error: object) -> None:
        logging.disable(logging.NOTSET)
