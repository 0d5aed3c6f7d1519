"""open_clip models with their preprocessing and tokenizer: new ones, and those with published weights."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from .config import CONFIG_FILE, Config, checked_preprocess, write_config
from .pixels import Normalization, Transform, cut
from .published import OPENAI, preprocess_of_file, quick_gelu_note
from .sources import WEIGHTS_FILE, Source, check_model_folder, find_source, is_quick
from .tokenizers import folder_tokenizer, registered_tokenizer, text_tower_config
from .weights import Weights, fill_from_big_vision, fill_model, is_big_vision, read_weights

_PART = 64  # pairs that go through a model at a time, of many that are compared
_SIGMOID_BIAS = -10.0
# How many numbers more than its weights take bytes a model may have: buffers, and biases that are added.
_MORE_NUMBERS = 2**24

Tokenizer = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Clip:
    """A model with the functions that prepare images and captions for it.

    Attributes
    ----------
    name : str
        What the model was chosen by: a registered name, a folder, a configuration file, or a repository of the hub.
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
    config : Config
        The architecture, as exports describe it.
    vocabulary : sequence of paths
        Files that the tokenizer is made from, beside those that come with open_clip.
    notes : sequence of str
        What to say about the model to whoever chose it.
    """

    name: str
    model: open_clip.CLIP
    preprocess: Transform
    tokenize: Tokenizer
    fingerprint: str
    augment: Transform
    normalization: Normalization | None
    config: Config
    vocabulary: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

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

    @torch.no_grad()
    def features_in_parts(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit features ``[m, d]`` of images and of tokenized captions in float32, encoded a few at a time."""
        with torch.compiler.set_stance("force_eager"):  # towers are compiled for the batches of training
            image = torch.cat([self.encode_image(part) for part in images.split(_PART)])
            text = torch.cat([self.encode_tokens(part) for part in tokens.split(_PART)])
        return image.float(), text.float()


def at_least_one(inputs: Tensor) -> Tensor:
    """Return inputs ``[b, ...]`` as they are, or one zero if b = 0: open_clip's towers take no empty batch."""
    return inputs if len(inputs) else inputs.new_zeros(1, *inputs.shape[1:])


def new_model(
    name: str,
    seed: int,
    *,
    sigmoid: bool = False,
    weights: str | Path | None = None,
    image: Mapping[str, Any] | None = None,
    **options: Any,
) -> Clip:
    """Build a model in training mode, with weights drawn from ``seed`` where none are published under its name.

    With ``sigmoid`` it has SigLIP's head, whose logit bias starts at -10 and whose scale starts at 10.

    Parameters
    ----------
    name, weights
        See the module.
    image
        Preprocessing that differs from what the weights were published with: ``mean``, ``std``, ``interpolation``,
        ``resize_mode``; and ``aug_cfg``, open_clip's augmentation in training.
    options
        Passed to ``open_clip.create_model``.
    """
    head = {"init_logit_bias": _SIGMOID_BIAS, "init_logit_scale": math.log(10)} if sigmoid else {}
    source = find_source(str(name), None if weights is None else str(weights))
    if "multimodal_cfg" in source.config.model:
        raise UserError(f"{name} writes captions (CoCa), which is not trained here: choose a model of two towers")
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        return _build(source, dict(image or {}), **head, **options)


def load_model(name: str | Path, weights: str | Path | None = None, image: Mapping[str, Any] | None = None) -> Clip:
    """Load a model with its published weights, in evaluation mode; see `new_model`.

    Only tensors are read from files of weights, and nothing but an architecture from a configuration: no code that they
    name is run, no other file is opened, and no host is reached but for a tag or ``hf-hub:``.
    """
    source = find_source(str(name), None if weights is None else str(weights))
    if source.weights is None:
        raise UserError(f"{name} names no weights: give a file or a tag of them, or a folder with {WEIGHTS_FILE}")
    with _quiet():
        clip = _build(source, dict(image or {}))
    clip.model.eval()
    return clip


def fingerprint_of(folder: Path) -> str:
    """Return a digest of configuration, weights and vocabulary in a folder of open_clip's ``local-dir:`` layout."""
    source = find_source(str(folder), None)
    assert source.weights is not None
    return _digest(folder / CONFIG_FILE, source.weights, *source.vocabulary)


def _build(source: Source, image: dict[str, Any], **options: Any) -> Clip:
    """Build a model from its parts; an error names the part that does not fit."""
    augmentation = image.pop("aug_cfg", None)
    size, length = options.pop("force_image_size", None), options.pop("force_context_length", None)
    config = _resized(source.config, size, length)
    weights, of_weights, notes = _read(source)
    forced = checked_preprocess({key: value for key, value in image.items() if value is not None})
    preprocess = {**config.preprocess, **of_weights, **forced}
    try:
        tokenize = _tokenizer(source, config.model["text_cfg"])
        model = _created(source, config, **options)
        if source.weights is not None:
            _fill(model, source, weights)
        if size is not None:
            _check_size(model, size, source.name)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{source.name} needs another package ({_reason(error)}): install it") from error
    except Exception as error:  # open_clip, timm and transformers pass on whatever they meet
        raise UserError(f"{_described(source)} ({_reason(error)})") from error
    preprocess = {**asdict(PreprocessCfg()), **preprocess, "size": model.visual.image_size}
    set_model_preprocess_cfg(model, preprocess)
    shown = PreprocessCfg(**preprocess)
    plain = cast(Transform, image_transform_v2(shown, is_train=False))
    return Clip(
        source.name,
        model,
        plain,
        tokenize,
        _fingerprint(source, preprocess, size=size, length=length),
        _augmenting(shown, augmentation),
        cut(plain)[1],
        config,
        source.vocabulary,
        source.notes + notes,
    )


def _augmenting(config: PreprocessCfg, augmentation: Mapping[str, Any] | None) -> Transform:
    with warnings.catch_warnings():
        # open_clip warns of what belongs to a part that it has used.
        warnings.simplefilter("ignore")
        made = image_transform_v2(config, is_train=True, aug_cfg=dict(augmentation) if augmentation else None)
    return cast(Transform, made)


def _resized(config: Config, size: int | None, length: int | None) -> Config:
    """Return the configuration with another image size and context length."""
    model = deepcopy(config.model)
    if size is not None:
        model["vision_cfg"]["image_size"] = size
    if length is not None:
        model["text_cfg"]["context_length"] = length
    return Config(model, config.preprocess)


def _read(source: Source) -> tuple[Weights | None, dict[str, Any], tuple[str, ...]]:
    """Return the weights, the preprocessing that they were published with, and what to say of them."""
    path = source.weights
    if path is None:
        return None, {}, ()
    if (path.parent / CONFIG_FILE).is_file():
        check_model_folder(path.parent)
    try:
        weights = None if is_big_vision(path) else read_weights(path)
    except Exception as error:  # safetensors, torch, zipfile and pickle raise their own
        raise UserError(f"{_described(source)} ({_reason(error)})") from error
    if source.preprocess is not None:
        return weights, source.preprocess, ()
    if weights is not None and weights.preprocess:
        return weights, checked_preprocess(weights.preprocess), ()
    if weights is not None and weights.is_archive:
        note = quick_gelu_note(source.name, True, is_quick(source.config), str(path))
        return weights, OPENAI, (note,) * bool(note)
    preprocess, note = preprocess_of_file(source.name, path)
    return weights, source.config.preprocess or preprocess, (note,) * bool(note)


def _created(source: Source, config: Config, **options: Any) -> open_clip.CLIP:
    """Let open_clip build the model from a configuration that was checked."""
    written = deepcopy(config.model)
    text = written["text_cfg"]
    with ExitStack() as places:
        if source.text_tower is not None and (name := text.get("hf_model_name")):
            text["hf_model_name"] = places.enter_context(text_tower_config(source.text_tower, name))
        place = places.enter_context(tempfile.TemporaryDirectory())
        write_config(Path(place), Config(written, config.preprocess))
        create = functools.partial(open_clip.create_model, f"local-dir:{place}", **options)
        if source.weights is None:
            return cast(open_clip.CLIP, create(pretrained_text=source.is_registered))
        if not source.is_registered:
            with torch.device("meta"):
                _refuse_larger_than_weights(create(pretrained_text=False, device="meta"), source.weights)
        return cast(open_clip.CLIP, create(pretrained_text=False))


def _refuse_larger_than_weights(model: torch.nn.Module, weights: Path) -> None:
    numbers = sum(each.numel() for each in (*model.parameters(), *model.buffers()))
    if numbers > (size := weights.stat().st_size) + _MORE_NUMBERS:
        raise ValueError(f"its configuration has {numbers} numbers, its weights are {size} bytes")


def _fill(model: open_clip.CLIP, source: Source, weights: Weights | None) -> None:
    if weights is None:
        assert source.weights is not None
        fill_from_big_vision(model, source.weights)
    else:
        fill_model(model, weights)


def _check_size(model: open_clip.CLIP, size: int, name: str) -> None:
    """Give a tower of timm another image size, unless open_clip could not load it again."""
    if not isinstance(model.visual, TimmModel):
        return
    before = {key: value.shape for key, value in model.visual.state_dict().items()}
    model.visual.set_input_size(size)
    if before != {key: value.shape for key, value in model.visual.state_dict().items()}:
        raise UserError(
            f"--force-image-size {size} changes the weights of {name}, a tower of timm's that open_clip builds in one "
            "size: choose the registered model of that size"
        )


def _tokenizer(source: Source, text: Mapping[str, Any]) -> Tokenizer:
    if source.folder is None:
        return cast(Tokenizer, registered_tokenizer(source.name, text))
    return cast(Tokenizer, folder_tokenizer(source.folder, text))


def _fingerprint(source: Source, preprocess: Mapping[str, Any], **forced: int | None) -> str:
    """Return a digest of all that the model's features depend on, beside the registered name of a new one."""
    files = [path for path in (source.config_file, source.weights, *source.vocabulary) if path is not None]
    digest = (source.name * source.is_registered + _digest(*files)) if files else ""
    usual = {**asdict(PreprocessCfg()), **source.config.preprocess}
    changed: dict[str, Any] = {key: value for key, value in forced.items() if value is not None}
    changed |= {
        key: value for key, value in preprocess.items() if key != "size" and _as_json(value) != _as_json(usual[key])
    }
    return digest + (hashlib.sha256(_as_json(changed)).hexdigest() if changed else "")


def _as_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _described(source: Source) -> str:
    """Return what to say where a model cannot be built; the reason follows in parentheses."""
    if source.weights is None:
        return f"the model {source.name} cannot be built"
    if source.config_file is not None and source.weights.parent == source.config_file.parent:
        return f"{source.name} does not load as an open_clip model, make or copy it again"
    return f"{source.weights} does not load as weights of {source.name}, name the model that it is of"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def lock_towers(model: torch.nn.Module, unlocked: Mapping[str, int]) -> None:
    """Freeze the towers ``image`` and ``text`` that are named, except for so many groups of layers, the last."""
    for tower, groups in unlocked.items():
        lock = getattr(model, f"lock_{tower}_tower", None)
        try:
            if lock is None:
                raise NotImplementedError(f"it has no lock_{tower}_tower")
            lock(groups, tower == "text")  # gains of a text tower too
        except (NotImplementedError, AssertionError, AttributeError) as error:
            raise UserError(f"this model's {tower} tower cannot be locked ({error}): choose another --model") from error
    if "image" in unlocked:
        _freeze_running_statistics(cast(torch.nn.Module, model.visual))


def _freeze_running_statistics(tower: torch.nn.Module) -> None:
    """Replace each batch normalization of locked layers by one whose statistics stay.

    open_clip's own way to do so loses the activation that timm's normalizations end with.
    """
    for name, module in list(tower.named_modules()):
        if isinstance(module, _BatchNorm) and not any(each.requires_grad for each in module.parameters()):
            tower.set_submodule(name, freeze_batch_norm_2d(module))


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
