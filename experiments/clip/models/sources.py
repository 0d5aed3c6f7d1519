"""Which model a name means: registered, a folder, a file, or a repository of the hub; and which weights.

A model is named by a name that open_clip has registered, a folder in open_clip's ``local-dir:`` layout, ``glyphs`` or
``icons`` for the models that ship with this program,
``hf-hub:OWNER/NAME``, or a JSON file with an architecture; its weights by a file, a folder, ``hf-hub:OWNER/NAME``, or a
tag such as ``openai``. What is there under a name goes before what open_clip knows by it.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import open_clip

from ..errors import UserError, nearest
from ..io.checksums import MANIFEST, checksum, fault_of, write_manifest
from .config import CONFIG_FILE, Config, read_config, registered_config
from .options import SHIPPED
from .published import (
    HUB,
    WEIGHTS_FILES,
    hub_folder,
    hub_text_config,
    preprocess_of,
    quick_gelu_note,
    tag_config,
    tagged_weights,
    weights_in,
)
from .tokenizers import TEXT_CONFIG, vocabulary_files

WEIGHTS_FILE = WEIGHTS_FILES[0]
_CONFIGS = Path(__file__).parent / "configs"


@functools.cache
def register_models() -> None:
    """Add the glyph models to the names that open_clip knows, for this process."""
    open_clip.add_model_config(_CONFIGS)


def check_registered(name: str) -> None:
    """Raise a `UserError` if no registered model has this name."""
    register_models()
    if name not in open_clip.list_models():
        raise UserError(
            f"no model is called {name[:200]!r}{nearest(name, open_clip.list_models())}: name one of "
            "open_clip.list_models(), a glyph model, a folder in open_clip's local-dir layout, hf-hub:OWNER/NAME, or a "
            "JSON file with an architecture"
        )


class Source(NamedTuple):
    """Where the parts of a model are: the name that it was chosen by, its architecture, its weights, its tokenizer.

    ``folder`` has the tokenizer, ``text_tower`` the configuration of a text tower of transformers; None where both come
    with the registered name. ``preprocess`` is that of the weights, None where only their file can tell.
    """

    name: str
    config: Config
    weights: Path | None
    preprocess: dict[str, Any] | None
    config_file: Path | None = None
    folder: Path | None = None
    text_tower: Path | None = None
    vocabulary: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    is_registered: bool = False


def find_source(name: str, weights: str | None) -> Source:
    """Return where the parts of a model are, after downloads where the names ask for them.

    Raises
    ------
    UserError
        If nothing is called so, with the nearest names.
    """
    source = _find_model(name)
    return source if weights is None else _with_weights(source, weights)


def _find_model(name: str) -> Source:
    if "\0" in name:
        raise UserError(f"{name!r} cannot be the name of a model")
    # `Path.is_dir` raises an error for names that are too long.
    path, is_folder = Path(name), os.path.isdir(name)
    if name in SHIPPED and not (path / CONFIG_FILE).is_file():
        return _find_in_folder(str(SHIPPED[name]))
    if name.startswith(HUB) or (is_folder and (path / CONFIG_FILE).is_file()):
        return _find_in_folder(name)
    if path.suffix == ".json" and os.path.isfile(path):
        config, place = read_config(path), path.parent
        return Source(name, config, None, {}, path, place, place, _vocabulary(place, config))
    register_models()
    if is_folder and name not in open_clip.list_models():
        within = path / "model"
        advice = f"name {within}" if (within / CONFIG_FILE).is_file() else "name a run's model/, or a registered model"
        raise UserError(f"{path} has no {CONFIG_FILE}: {advice}")
    check_registered(name)
    return Source(name, registered_config(name), None, {}, is_registered=True)


def _find_in_folder(name: str) -> Source:
    folder = hub_folder(name) if name.startswith(HUB) else Path(name)
    config, weights = read_config(folder / CONFIG_FILE), weights_in(folder)
    if weights is None:
        raise UserError(f"{name} has no {WEIGHTS_FILE}: copy the weights there too")
    tower = folder
    if (hf_name := config.model["text_cfg"].get("hf_model_name")) and name.startswith(HUB):
        tower = hub_text_config(hf_name)
    vocabulary = _vocabulary(folder, config)
    return Source(name, config, weights, config.preprocess, folder / CONFIG_FILE, folder, tower, vocabulary)


def _vocabulary(folder: Path, config: Config) -> tuple[Path, ...]:
    return tuple(vocabulary_files(folder)) if config.model["text_cfg"].get("hf_tokenizer_name") else ()


def _with_weights(source: Source, weights: str) -> Source:
    """Return a model with other weights: a file, a folder, a repository of the hub, or a tag of its name."""
    name = source.name
    if os.path.isfile(weights):
        return source._replace(weights=Path(weights), preprocess=None)
    if weights.startswith(HUB) or os.path.isdir(weights):
        found = _find_in_folder(weights)
        note = quick_gelu_note(name, is_quick(found.config), is_quick(source.config), weights)
        source = source._replace(weights=found.weights, preprocess=found.preprocess, notes=(note,) * bool(note))
        return source._replace(folder=found.folder, vocabulary=found.vocabulary) if found.vocabulary else source
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not (entry := tag_config(name, weights)):
        known = f"tags are {', '.join(tags)}" if tags else "it has no tags"
        raise UserError(
            f"there is no file of weights {weights[:200]!r}, and no tag{nearest(weights, tags)} of {name} ({known}): "
            f"name a file that was saved for {name}"
        )
    note = quick_gelu_note(name, bool(entry.get("quick_gelu")), is_quick(source.config), weights)
    return source._replace(
        weights=tagged_weights(name, weights), preprocess=preprocess_of(entry), notes=(note,) * bool(note)
    )


def is_quick(config: Config) -> bool:
    """Whether a model has QuickGELU, as OpenAI's have."""
    return bool(config.model.get("quick_gelu"))


def write_model_manifest(folder: Path) -> None:
    """Write the checksums of a model folder's files."""
    write_manifest(folder, {name: checksum(folder / name) for name in _files_of(folder)})


def check_model_folder(folder: Path) -> None:
    """Refuse a model folder whose files are not as they were exported, where it has their checksums."""
    if (folder / MANIFEST).is_file() and (fault := fault_of(folder, _files_of(folder))):
        raise UserError(f"{folder} is damaged ({fault}): export or copy it again")


def _files_of(folder: Path) -> list[str]:
    weights = weights_in(folder)
    own = (CONFIG_FILE, TEXT_CONFIG, *([] if weights is None else [weights.name]))
    return [name for name in own if (folder / name).is_file()] + [path.name for path in vocabulary_files(folder)]
