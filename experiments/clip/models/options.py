"""Options of what a model takes: image size, context length, normalization and augmentation; off by default."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import UserError
from ..ranges import AtLeast, Range

#: The models that ship with the checkout, in open_clip's local-dir layout, by the names that options take for them.
SHIPPED = {name: Path(__file__).parents[1] / name / "reference_model" for name in ("glyphs", "icons")}


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _are_numbers(*counts: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and len(value) in counts and all(_is_number(each) for each in value)


_FINITE = Range("three finite numbers", _are_numbers(3))
_POSITIVE = Range("three positive numbers", lambda value: _are_numbers(3)(value) and min(value) > 0)


def _is_interval(value: Any) -> bool:
    return _are_numbers(2)(value) and 0 < value[0] <= value[1]


#: What open_clip's augmentation takes, and whether it takes it without timm's.
_AUGMENTATION: dict[str, tuple[str, Callable[[Any], bool], bool]] = {
    "scale": ("an interval like (0.4,1.0)", _is_interval, True),
    "ratio": ("an interval like (0.75,1.33)", _is_interval, False),
    "color_jitter": ("one, three or four numbers", lambda x: _is_number(x) or _are_numbers(3, 4)(x), True),
    "color_jitter_prob": ("in [0, 1]", _is_share, True),
    "gray_scale_prob": ("in [0, 1]", _is_share, True),
    "re_prob": ("in [0, 1]", _is_share, False),
    "re_count": ("a number from 1 on", lambda value: _is_number(value) and value >= 1, False),
    "use_timm": ("True or False", lambda value: isinstance(value, bool), True),
}


@dataclass(frozen=True)
class ModelInputs:
    """What the model takes."""

    force_image_size: Annotated[int | None, AtLeast(1)] = None
    """Pixels of the image's side, where it differs from the model's own; positions that were learned are resized."""
    force_context_length: Annotated[int | None, AtLeast(3)] = None
    """Tokens of a caption, where it differs from the model's own."""
    image_mean: Annotated[tuple[float, float, float] | None, _FINITE] = None
    """Mean of the pixels by channel; by default what --pretrained was published with, else OpenAI's."""
    image_std: Annotated[tuple[float, float, float] | None, _POSITIVE] = None
    """Deviation of the pixels by channel, likewise."""
    image_interpolation: Literal["bicubic", "bilinear", "random"] | None = None
    """How images are resized, likewise."""
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """Which side gets the model's size in evaluation, likewise."""
    aug_cfg: tuple[str, ...] = ()
    """Augmentation as open_clip's, like scale=(0.4,1.0) color_jitter=(0.32,0.32,0.32,0.08) color_jitter_prob=0.8
    gray_scale_prob=0.2, or use_timm=True with timm's."""

    def check_together(self) -> None:
        """Refuse an augmentation that open_clip does not know, or would ignore."""
        augmentation(self.aug_cfg)


def augmentation(words: tuple[str, ...]) -> dict[str, Any]:
    """Return open_clip's augmentation from words like ``scale=(0.4,1.0)``."""
    found = dict(map(_entry, words))
    for key in found:
        if not _AUGMENTATION[key][2] and not found.get("use_timm"):
            raise UserError(f"--aug-cfg {key} is for timm's augmentation: add use_timm=True")
        if key.endswith("_prob") and key != "re_prob" and found.get("use_timm"):
            raise UserError(f"--aug-cfg {key} is for open_clip's own augmentation: leave out use_timm=True")
    if ("color_jitter" in found) != ("color_jitter_prob" in found) and not found.get("use_timm"):
        raise UserError("--aug-cfg color_jitter and color_jitter_prob need each other without use_timm=True")
    if not found.get("use_timm") and "color_jitter" in found and not _are_numbers(4)(found["color_jitter"]):
        raise UserError("--aug-cfg color_jitter must be four numbers without use_timm=True")
    return found


def geometry(words: tuple[str, ...]) -> dict[str, Any]:
    """Return the part of an augmentation that says where to crop, which a reference beside the target shares."""
    return {key: value for key, value in augmentation(words).items() if key in ("scale", "ratio", "use_timm")}


def _entry(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if key not in _AUGMENTATION or not equals:
        raise UserError(f"--aug-cfg takes KEY=VALUE of {', '.join(_AUGMENTATION)}, got {word[:80]!r}")
    meaning, allows, _ = _AUGMENTATION[key]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if isinstance(value, list):
        value = tuple(value)
    if not allows(value):
        raise UserError(f"--aug-cfg {key} must be {meaning}, got {text[:80]!r}")
    return key, value
