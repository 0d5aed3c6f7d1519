"""Exporting trained weights as files that open_clip and CLIP_benchmark load unchanged.

=====================  ==============================================================================
a bundle, a folder     ``create_model_and_transforms("local-dir:FOLDER")``: architecture, weights, preprocessing and
                       tokenizer, for any model; ``clip_benchmark eval --model local-dir:FOLDER --output FILE``
a checkpoint, a file   ``create_model_and_transforms(NAME, pretrained=PATH)``, where NAME is registered;
                       ``clip_benchmark eval --model NAME --pretrained PATH`` for open_clip's own models
=====================  ==============================================================================

A checkpoint does not determine the preprocessing: open_clip uses the default of the name. The glyph models are
registered only in this program, once it has made a model or called `models.sources.register_models`;
so CLIP_benchmark's command needs a bundle of them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save
from torch import Tensor

from ..errors import UserError
from ..io.checksums import MANIFEST
from ..io.files import write_atomically
from .clip import Clip
from .config import CONFIG_FILE
from .sources import WEIGHTS_FILE, check_registered, write_model_manifest
from .tokenizers import TEXT_CONFIG
from .weights import plain_name


def plain_state(state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return weights under the model's own names, on the CPU; floating-point ones are converted to ``dtype``.

    DDP, `torch.compile` and the like, and the averages of `torch.optim.swa_utils.AveragedModel` use other names, which
    are translated. Each tensor has storage of its own.
    """
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "n_averaged":
            continue
        key = plain_name(name)
        if key in plain:
            raise ValueError(f"state has {name!r} and another name of {key!r}: pass the weights of one model")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"the weights {key} are not finite: take an earlier checkpoint")
        value = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype, copy=True)
        # Sharded parameters cannot be scalars, so these have the shape [1] there.
        plain[key] = value.reshape(()) if key in ("logit_scale", "logit_bias") else value.contiguous()
    return plain


def export_bundle(
    name: str,
    state: Mapping[str, Tensor],
    preprocess: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    config: Mapping[str, Any] | None = None,
    vocabulary: Sequence[Path] = (),
) -> None:
    """Write a folder that ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` loads.

    Parameters
    ----------
    name
        The registered model.
    state
        The model's weights, or an average of them, as full tensors.
    preprocess
        The model's preprocessing, as returned by ``open_clip.get_model_preprocess_cfg``.
    folder
        Where ``open_clip_config.json`` and ``open_clip_model.safetensors`` are written.
    dtype
        Type of the floating-point weights in the file.
    config
        The architecture, in open_clip's ``model_cfg``, where it is not the registered one.
    vocabulary
        Files of a tokenizer that does not come with open_clip.
    """
    plain = plain_state(state, dtype)
    # open_clip builds a logit bias only if the configuration has its initial value.
    head = {"init_logit_bias": plain["logit_bias"].item()} if "logit_bias" in plain else {}
    document = {"model_cfg": {**(config or _config(name)), **head}, "preprocess_cfg": dict(preprocess)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in vocabulary:
        write_atomically(folder / path.name, path.read_bytes())
    write_atomically(folder / WEIGHTS_FILE, save(plain, {"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, json.dumps(document, indent=2).encode() + b"\n")
    write_model_manifest(folder)


def export_checkpoint(
    name: str,
    state: Mapping[str, Tensor],
    preprocess: Mapping[str, Any],
    path: Path,
    *,
    epoch: int,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a file that ``open_clip.create_model_and_transforms(name, pretrained=PATH)`` loads.

    The file holds ``state_dict``, ``epoch``, ``name`` and ``preprocess_cfg``: only tensors and plain types. The logit
    bias of a sigmoid loss is left out if the registered model has none: no ranking depends on it, and open_clip refuses
    it.

    Parameters
    ----------
    name, state, preprocess, dtype, config
        As for `export_bundle`.
    path
        The file, named ``epoch_K.pt`` by convention.
    epoch
        Number of epochs that the weights have been trained.
    """
    plain = plain_state(state, dtype)
    if "init_logit_bias" not in (config or _config(name)):
        plain.pop("logit_bias", None)
    data = io.BytesIO()
    torch.save({"state_dict": plain, "epoch": epoch, "name": name, "preprocess_cfg": dict(preprocess)}, data)
    write_atomically(path, data.getvalue())


def export_model(
    clip: Clip, folder: Path, dtype: torch.dtype = torch.float32, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write ``clip`` as a bundle, with ``weights`` (full tensors) in place of the model's own if given."""
    state = clip.model.state_dict() if weights is None else weights
    preprocess = open_clip.get_model_preprocess_cfg(clip.model)
    architecture = clip.config.model
    export_bundle(clip.name, state, preprocess, folder, dtype, config=architecture, vocabulary=clip.vocabulary)
    if isinstance(clip.tokenize, HFTokenizer) and not clip.vocabulary:
        clip.tokenize.save_pretrained(str(folder))
    if (tower := getattr(getattr(clip.model, "text", None), "config", None)) is not None:  # one of transformers
        write_atomically(folder / TEXT_CONFIG, tower.to_json_string().encode())
    write_model_manifest(folder)


def _config(name: str) -> dict[str, Any]:
    check_registered(name)
    config = open_clip.get_model_config(name)
    assert config is not None
    return config
