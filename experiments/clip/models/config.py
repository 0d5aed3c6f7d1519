"""Configurations of models as data: what open_clip builds from them names no code, no file and no host.

open_clip and transformers pass what a configuration holds on to constructors that import code named there, open files,
ask at the terminal and download. So a configuration that does not come with open_clip is checked here first, and
open_clip builds the model from the copy that passed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg

from ..errors import UserError

CONFIG_FILE = "open_clip_config.json"

_LARGEST_FILE = 2**20  # bytes of a configuration
_LARGEST = 2**20  # of a number in it, such as a vocabulary's size
_DEEPEST = 512  # layers of a tower
_LARGEST_IMAGE = 4096  # pixels of a side
_PARTS: dict[str, type] = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
_TOP = ("embed_dim", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias", *_PARTS)
_KEYWORDS = ("act_kwargs", "norm_kwargs")
#: What each tokenizer may be given. Others name code, files, or a corpus to download.
_TOKENIZER_KEYWORDS = {
    False: {"clean": str, "reduction_mask": str, "additional_special_tokens": list},
    True: {"clean": str, "strip_sep_token": bool, "language": str, "padding_side": str, "legacy": bool},
}
_MASKS = ("simple", "random", "shuffle")  # not "syntax", which downloads
_PREPROCESS = tuple(field.name for field in dataclasses.fields(PreprocessCfg))
_CHOICES = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
}


class Config(NamedTuple):
    """The architecture, in open_clip's ``model_cfg``, and the preprocessing that its weights were trained with."""

    model: dict[str, Any]
    preprocess: dict[str, Any]


def registered_config(name: str) -> Config:
    """Return the configuration of a model that open_clip knows by name."""
    config = open_clip.get_model_config(name)
    assert config is not None
    return Config(config, {})


def read_config(path: Path) -> Config:
    """Read a configuration from a file, of a model folder or with the architecture alone, and check it.

    Raises
    ------
    UserError
        If it is no configuration, or would do more than describe a model.
    """
    document = read_json(path)
    try:
        model = document.get("model_cfg", document)
        preprocess = document.get("preprocess_cfg") or {}
        _check_model(model)
        _check_preprocess(preprocess)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no configuration of a model: {error}") from error
    return Config(model, _known(preprocess))


def checked_preprocess(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a preprocessing that a file of weights, or a user, states.

    Raises
    ------
    UserError
        If it is none.
    """
    try:
        _check_preprocess(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"the preprocessing of images is not possible: {error}") from error
    return _known(values)


def _known(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in preprocess.items() if key in _PREPROCESS and value is not None}


def read_json(path: Path) -> dict[str, Any]:
    """Return a small JSON object that somebody else may have written."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"it is larger than {_LARGEST_FILE} bytes")
        document = json.loads(content)
        if not isinstance(document, dict):
            raise ValueError("it holds no options")
        return document
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON as a model's configuration is ({error}): copy it again") from error


def write_config(folder: Path, config: Config) -> None:
    """Write a configuration as open_clip's ``local-dir:`` layout has it."""
    document = {"model_cfg": config.model, "preprocess_cfg": config.preprocess}
    (folder / CONFIG_FILE).write_text(json.dumps(document))


def _check_model(model: Any) -> None:
    _check_keys(model, "model_cfg", _TOP)
    for part, kind in _PARTS.items():
        if part == "multimodal_cfg" and part not in model:
            continue
        values = model.get(part)
        _check_keys(values, part, [field.name for field in dataclasses.fields(kind)])
        for key, value in values.items():
            if key != "tokenizer_kwargs":
                _check_value(f"{part}.{key}", value, is_group=key in _KEYWORDS)
        if isinstance(layers := values.get("layers", 0), int) and layers > _DEEPEST:
            raise ValueError(f"{part}.layers is {layers}, more than {_DEEPEST}")
    for key in model.keys() - _PARTS.keys():
        _check_value(key, model[key])
    _check_image_size(model["vision_cfg"].get("image_size", 224))
    _check_timm(model["vision_cfg"].get("timm_model_name"))
    _check_tokenizer(model["text_cfg"])


def _check_keys(values: Any, part: str, known: Any) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{part} must hold options, got {str(values)[:40]!r}")
    if unknown := sorted(map(str, values.keys() - set(known))):
        raise ValueError(f"{part} has {unknown[0][:60]!r}, which describes no model")


def _check_value(name: str, value: Any, *, is_group: bool = False) -> None:
    """Refuse a value that is not a number, a word or a short list of numbers."""
    if is_group and isinstance(value, Mapping):
        for key, each in value.items():
            _check_value(f"{name}.{key}", each)
    elif isinstance(value, list) and len(value) <= 8 and all(isinstance(each, int) for each in value):
        for each in value:
            _check_value(name, each)
    elif isinstance(value, float | int):
        if not math.isfinite(value) or abs(value) > _LARGEST:
            raise ValueError(f"{name} is {value}, out of all proportion")
    elif not (value is None or isinstance(value, str)):
        raise ValueError(f"{name} cannot be {str(value)[:60]!r}")


def _check_image_size(size: Any) -> None:
    sides = size if isinstance(size, list | tuple) else [size]
    if len(sides) not in (1, 2) or not all(isinstance(side, int) and 0 < side <= _LARGEST_IMAGE for side in sides):
        raise ValueError(f"the image size must be 1 to {_LARGEST_IMAGE} pixels, got {size}")


def _check_timm(name: Any) -> None:
    if name is None:
        return
    import timm

    # timm takes places too: of a folder, or of a repository.
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"vision_cfg.timm_model_name {str(name)[:60]!r} is none of timm's models")


def _check_tokenizer(text: Mapping[str, Any]) -> None:
    keywords = text.get("tokenizer_kwargs") or {}
    known = _TOKENIZER_KEYWORDS[bool(text.get("hf_tokenizer_name"))]
    _check_keys(keywords, "text_cfg.tokenizer_kwargs", known)
    for key, value in keywords.items():
        if not isinstance(value, known[key]) or (key == "reduction_mask" and value not in _MASKS):
            raise ValueError(f"text_cfg.tokenizer_kwargs.{key} cannot be {str(value)[:60]!r}")


def _check_preprocess(values: Any) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"preprocess_cfg must hold options, got {str(values)[:40]!r}")
    for key in ("mean", "std"):
        numbers = values.get(key)
        if numbers is None:
            continue
        is_right = isinstance(numbers, list | tuple) and len(numbers) == 3
        if not is_right or not all(isinstance(each, float | int) and math.isfinite(each) for each in numbers):
            raise ValueError(f"preprocess_cfg.{key} must be three numbers, got {str(numbers)[:60]}")
        if key == "std" and min(numbers) <= 0:
            raise ValueError(f"preprocess_cfg.std must be positive, got {numbers}")
    for key, choices in _CHOICES.items():
        if values.get(key) is not None and values[key] not in choices:
            raise ValueError(f"preprocess_cfg.{key} must be one of {', '.join(choices)}, got {str(values[key])[:60]!r}")
    if values.get("size") is not None:
        _check_image_size(values["size"])
    if not isinstance(values.get("fill_color", 0), int):
        raise ValueError(f"preprocess_cfg.fill_color must be a whole number, got {str(values['fill_color'])[:60]!r}")
