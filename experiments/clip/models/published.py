"""Published weights: tags, models on the Hugging Face hub, and the preprocessing that each was trained with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import open_clip
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.pretrained import download_pretrained, get_pretrained_cfg

from ..errors import UserError
from .config import CONFIG_FILE
from .tokenizers import TEXT_CONFIG, TOKENIZER_CONFIG, VOCABULARIES

#: How a model on the hub is named.
HUB = "hf-hub:"
#: Files of weights in a folder, the preferred one first.
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
#: OpenAI's own preprocessing, and of whoever follows it.
OPENAI: dict[str, Any] = {
    "mean": OPENAI_DATASET_MEAN,
    "std": OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def tag_config(name: str, tag: str) -> dict[str, Any]:
    """Return what open_clip knows of a registered model's weights with that tag; empty if there are none."""
    return dict(get_pretrained_cfg(name, tag))


def tagged_weights(name: str, tag: str) -> Path:
    """Return the file of the weights with that tag, downloaded unless it is there from an earlier time."""
    try:
        return Path(download_pretrained(tag_config(name, tag)))
    except Exception as error:  # whatever the hub's client and urllib raise
        raise UserError(f"cannot fetch the weights {tag} of {name} ({_reason(error)}): name a file of them") from error


def hub_folder(name: str) -> Path:
    """Return a folder with the files of a model on the hub, downloaded unless they are there from an earlier time."""
    folder = _snapshot(name, [CONFIG_FILE, WEIGHTS_FILES[0], TEXT_CONFIG, TOKENIZER_CONFIG, *VOCABULARIES])
    if weights_in(folder) is None:
        folder = _snapshot(name, list(WEIGHTS_FILES))
    return folder


def hub_text_config(name: str) -> Path:
    """Return a folder with the configuration of a text tower on the hub."""
    return _snapshot(name, [TEXT_CONFIG])


def weights_in(folder: Path) -> Path | None:
    """Return the file of weights in a folder, if there is one."""
    return next((path for name in WEIGHTS_FILES if (path := folder / name).is_file()), None)


def preprocess_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a tag's entry that is preprocessing, in full."""
    return OPENAI | {key: value for key in OPENAI if (value := config.get(key)) is not None}


def preprocess_of_file(name: str, path: Path) -> tuple[dict[str, Any], str]:
    """Return the preprocessing of a registered model's weights in a file that states none, and what to say of it.

    It is that of the published file of this name, or the one that all published weights of the model share.
    """
    entries = {tag: tag_config(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    for entry in entries.values():
        if os.path.basename(entry.get("url") or "/") == path.name:
            return preprocess_of(entry), ""
    known = [preprocess_of(entry) for entry in entries.values()]
    if all(each == known[0] for each in known):
        return (known[0] if known else OPENAI), ""
    return OPENAI, (
        f"weights of {name} were published with several means and deviations of pixels: {path.name} gets OpenAI's; "
        f"name a tag ({', '.join(entries)}), or give --image-mean and --image-std"
    )


def quick_gelu_note(name: str, trained_with: bool, has: bool, weights: str) -> str:
    """Return what to say where weights were trained with another activation than the model's; empty if they fit."""
    if trained_with == has:
        return ""
    names = {False: "GELU", True: "QuickGELU"}
    other = f"{name}-quickgelu" if trained_with else name.removesuffix("-quickgelu")
    advice = f": take the model {other}" if other in open_clip.list_models() else ""
    return f"QuickGELU mismatch: {weights} was trained with {names[trained_with]}, {name} has {names[has]}{advice}"


def _snapshot(name: str, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name.removeprefix(HUB), allow_patterns=patterns))
    except Exception as error:  # whatever the hub's client raises
        raise UserError(f"cannot fetch {name} from the Hugging Face hub ({_reason(error)}): name a folder") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
