"""open_clip models with their preprocessing and tokenizer, made by a registered name or loaded from a folder."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from torch import Tensor

from experiments.clip.errors import UserError
from experiments.clip.models.pixels import Normalization, Transform, cut

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_CONFIGS = Path(__file__).parent / "configs"
_SIGMOID_BIAS = -10.0

Tokenizer = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Clip:
    """A model with the functions that prepare images and captions for it.

    Attributes
    ----------
    name : str
        The registered name, or the folder that the model was loaded from.
    preprocess : callable
        Maps a PIL image to the model's normalized input, in evaluation.
    tokenize : callable
        Maps a list of captions to tokens ``[b, length]``.
    fingerprint : str
        Identifies weights, preprocessing and tokenizer of a model that was loaded; empty for a new one.
    augment : callable
        The preprocessing for training, with random crops.
    normalization : Normalization, optional
        The last steps of ``preprocess``, which `prepared` does; None where they cannot be told apart.
    """

    name: str
    model: open_clip.CLIP
    preprocess: Transform
    tokenize: Tokenizer
    fingerprint: str
    augment: Transform
    normalization: Normalization | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return self.model.logit_scale.device

    def compile(self) -> None:
        """Compile the towers where features are computed, for a model that is not trained."""
        for name in ("encode_image", "encode_text"):
            setattr(self.model, name, torch.compile(getattr(self.model, name)))

    def in_bytes(self, transform: Transform) -> Transform:
        """Return ``preprocess`` or ``augment`` without the normalization, which `prepared` does; else as it is."""
        shorter, normalization = cut(transform)
        return transform if normalization is None or normalization != self.normalization else shorter

    def prepared(self, images: Tensor) -> Tensor:
        """Return images ``[b, 3, h, w]``, in bytes or normalized, as the model takes them: on its device, normalized.

        Bytes become floats of autocast's type where that is on.
        """
        images = images.to(self.device, non_blocking=True)
        if self.normalization is None or images.dtype != torch.uint8:
            return images
        kind = self.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        return self.normalization(images, narrow)

    def encode_image(self, images: Tensor) -> Tensor:
        """Return unit features ``[b, d]`` of images ``[b, 3, h, w]`` in bytes or normalized, see `prepared`."""
        return self.model.encode_image(at_least_one(self.prepared(images)), normalize=True)[: len(images)]

    def prepared_tokens(self, tokens: Tensor) -> Tensor:
        """Return tokens ``[b, length]``, in integers of any size, as the model takes them."""
        return tokens.to(self.device, non_blocking=True).to(torch.int64)

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Return unit features ``[b, d]`` of captions."""
        return self.encode_tokens(self.tokenize(list(captions)))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Return unit features ``[b, d]`` of tokenized captions ``[b, length]``."""
        return self.model.encode_text(at_least_one(self.prepared_tokens(tokens)), normalize=True)[: len(tokens)]


def at_least_one(inputs: Tensor) -> Tensor:
    """Return inputs ``[b, ...]`` as they are, or one zero if b = 0: open_clip's towers take no empty batch."""
    return inputs if len(inputs) else inputs.new_zeros(1, *inputs.shape[1:])


@functools.cache
def register_models() -> None:
    """Add the glyph models to the names that open_clip knows, for this process."""
    open_clip.add_model_config(_CONFIGS)


def check_registered(name: str) -> None:
    """Raise a `UserError` if no registered model has this name."""
    register_models()
    if name not in open_clip.list_models():
        raise UserError(f"no model is called {name!r}: name one of open_clip.list_models() or a glyph model")


def new_model(name: str, seed: int, *, sigmoid: bool = False, weights: Path | None = None, **options: Any) -> Clip:
    """Build a registered open_clip model with weights drawn from ``seed``, or from a file.

    With ``sigmoid`` it has SigLIP's head, whose logit bias starts at -10 and whose scale starts at 10. ``options`` are
    passed to ``open_clip.create_model_and_transforms``.
    """
    check_registered(name)
    head = {"init_logit_bias": _SIGMOID_BIAS, "init_logit_scale": math.log(10)} if sigmoid else {}
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        if weights is not None:
            return _from_weights(name, weights, **head, **options)
        try:
            return _create(name, name, "", **head, **options)
        except ImportError as error:
            raise UserError(f"--model {name} needs another package ({error}): install it") from error


def load_model(name: str | Path, weights: Path | None = None) -> Clip:
    """Load a model in evaluation mode, from a folder in open_clip's ``local-dir:`` layout.

    With a file of ``weights``, ``name`` is a registered model instead. The file is safetensors, or torch's format, of
    which only tensors are read.
    """
    if weights is not None:
        check_registered(str(name))
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
            clip = _create(str(folder), f"local-dir:{folder}", fingerprint_of(folder))
    except Exception as error:  # open_clip passes on whatever JSON, safetensors and torch raise on damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} does not load as an open_clip model ({reason}): make or copy it again") from error
    clip.model.eval()
    return clip


def fingerprint_of(folder: Path) -> str:
    """Return a digest of the configuration and the weights in a folder of open_clip's ``local-dir:`` layout."""
    return _digest(folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def lock_towers(model: torch.nn.Module, towers: Sequence[str], unlocked: int) -> None:
    """Freeze the image tower, the text tower or both, except for their last ``unlocked`` groups of layers."""
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
        return _create(name, name, name + _digest(weights), pretrained=str(weights), **options)
    except Exception as error:  # see load_model
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{weights} does not load as weights of {name} ({reason}): name the model it is of") from error


def _create(name: str, location: str, fingerprint: str, **options: Any) -> Clip:
    """Build a model from a registered name or a ``local-dir:`` folder; open_clip's annotations allow other types."""
    model, augment, preprocess = open_clip.create_model_and_transforms(location, **options)
    tokenize = cast(Tokenizer, open_clip.get_tokenizer(location))
    model = cast(open_clip.CLIP, model)
    transforms = cast(tuple[Transform, Transform], (preprocess, augment))
    return Clip(name, model, transforms[0], tokenize, fingerprint, transforms[1], cut(transforms[0])[1])


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while part := file.read(2**22):
                digest.update(part)
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's warning, on the root logger, that a model to be trained has no pretrained weights."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
