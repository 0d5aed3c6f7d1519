"""Weights from files of any format that CLIP models are published in; of a file only tensors are read.

=====================  ==============================================================================
safetensors            recognized by its header, whatever the file is called
torch's, zip or older  `torch.load` with ``weights_only``: state, or a training checkpoint that has it as ``state_dict``
TorchScript archive    OpenAI's own: tensors are read out of the archive, its program is not loaded
``.npz``               big_vision's SigLIP, read by open_clip
=====================  ==============================================================================
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors.torch import load_file
from torch import Tensor

# Parts of names that compiling, activation checkpointing and older sharding add.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# What an archive of OpenAI has beside weights.
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
_STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}
_MOST_NAMES = 10**6
_POSITIONS = "text.transformer.embeddings.position_ids"  # which older versions of transformers stored


class Weights(NamedTuple):
    """Tensors by the model's own names, the preprocessing that the file states, whether OpenAI's archive it is."""

    state: dict[str, Tensor]
    preprocess: dict[str, Any]
    is_archive: bool = False


def plain_name(name: str) -> str:
    """Return a weight's own name; DDP, `torch.compile`, sharding and averages of weights use longer ones."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[0] == "module" and len(parts) > 1:
        del parts[0]
    return ".".join(parts)


def is_big_vision(path: Path) -> bool:
    """Whether a file has the format of big_vision's models."""
    return path.suffix in (".npz", ".npy")


def read_weights(path: Path) -> Weights:
    """Read the weights in a file.

    Raises
    ------
    ValueError, and what safetensors, torch, zipfile and pickle raise
        If the file is damaged, or holds something else than tensors.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return Weights(_plain(_archive_tensors(archive)), {}, is_archive=True)
            for member in archive.infolist():
                _refuse_compressed(member)
            # torch reads flipped bits without a word.
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"it is damaged, the checksum of {damaged[:80]} in it differs")
    elif start[8:] == b"{":
        return Weights(_plain(load_file(path)), {})
    stored = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(stored, Mapping):
        raise ValueError(f"it holds {type(stored).__name__}, not weights by name")
    state = stored.get("state_dict", stored)
    preprocess = stored.get("preprocess_cfg") if state is not stored else None
    return Weights(_plain(state), dict(preprocess or {}))


def fill_model(model: torch.nn.Module, weights: Weights) -> None:
    """Copy weights into a model that open_clip has built, as `open_clip.load_checkpoint` does.

    Raises
    ------
    RuntimeError
        If they are of another model.
    """
    state: dict[str, Any] = convert_state_dict(model, weights.state)  # pyright: ignore[reportArgumentType]
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name)
        if name in state and own is not None:
            state[name] = state[name].reshape(own.shape)
    if getattr(model, "logit_bias", None) is not None and "logit_bias" not in state:
        state["logit_bias"] = torch.zeros_like(state["logit_scale"])  # softmax weights that a sigmoid loss continues
    if not hasattr(model, _POSITIONS):
        state.pop(_POSITIONS, None)
    if weights.is_archive:
        # An archive has the buffers too that the model makes itself.
        own_buffers = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
        for name in (*own_buffers, *_OPENAI_SIZES):
            state.pop(name, None)
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    model.load_state_dict(state)


def fill_from_big_vision(model: torch.nn.Module, path: Path) -> None:
    """Copy big_vision's weights into a model."""
    load_big_vision_weights(model, str(path))  # pyright: ignore[reportArgumentType]


def _plain(state: Any) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not state:
        raise ValueError("it holds no weights by name")
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"it holds {type(value).__name__} as {str(name)[:60]!r}, not weights by name")
        if name == "n_averaged":
            continue
        key = plain_name(name)
        if key in plain:
            raise ValueError(f"it has {name[:80]!r} and another name of {key[:80]!r}: the weights of two models")
        plain[key] = value
    return plain


class _Object:
    """What stands for an object of an archive's program: its attributes, none of its methods."""

    def __init__(self, *arguments: Any) -> None:
        self.attributes: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _ArchiveReader(pickle.Unpickler):
    """Reads the attributes in a TorchScript archive: its classes become `_Object`, and no other code is looked up."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive, self._folder = archive, folder
        super().__init__(io.BytesIO(self._member("data.pkl")))
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for what the archive names, or refuse it."""
        if module == "__torch__" or module.startswith("__torch__."):
            return _Object
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, kind: value,
            **{
                ("torch.jit._pickle", f"build_{kind}list"): lambda value: value
                for kind in ("int", "double", "bool", "tensor")
            },
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no model has")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the numbers that belong to a tensor, as they are in the archive."""
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it has something else than tensors")
        if key not in self._storages:
            content = self._member(f"data/{key}")
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._storages[key]

    def _member(self, name: str) -> bytearray:
        member = self._archive.getinfo(f"{self._folder}/{name}")
        _refuse_compressed(member)
        return bytearray(self._archive.read(member))


def _refuse_compressed(member: zipfile.ZipInfo) -> None:
    # A small file could hold more than the memory.
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename[:80]} in it is compressed, as torch compresses no tensors")


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)  # which refuses what is not in the storage


def _archive_tensors(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Return the tensors of a TorchScript archive by the names of the modules that have them."""
    place = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
    if place is None:
        raise ValueError("it has no data.pkl")
    found: dict[str, Tensor] = {}
    left: list[tuple[str, Any]] = [("", _ArchiveReader(archive, place.removesuffix("/data.pkl")).load())]
    while left:
        prefix, value = left.pop()
        if isinstance(value, Tensor):
            found[prefix] = value
        elif isinstance(value, _Object) and isinstance(value.attributes, Mapping):
            left += [(f"{prefix}.{name}" if prefix else str(name), each) for name, each in value.attributes.items()]
        # An object may be an attribute of itself.
        if len(left) + len(found) > _MOST_NAMES or len(prefix) > 1000:
            raise ValueError("its modules have no end")
    return found
