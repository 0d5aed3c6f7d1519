"""Tokenizers of model folders, and the text towers of transformers: loaded from copies that hold data alone.

transformers imports code that a ``tokenizer_config.json`` or ``config.json`` names, after a question at the terminal if
it was not told otherwise. Both are copied here without any key but those that describe vocabularies and sizes; a folder
that cannot do without code of its own is refused.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import open_clip
from open_clip.hf_configs import arch_dict
from open_clip.tokenizer import HFTokenizer

from ..errors import UserError
from .config import read_json

#: Files that hold a vocabulary, by the names that transformers looks for.
VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"),
)
TOKENIZER_CONFIG, TEXT_CONFIG = "tokenizer_config.json", "config.json"

_TOKENIZER_CLASS = re.compile(r"[A-Za-z0-9]+Tokenizer(Fast)?|TokenizersBackend")
_TOKENIZER_KEYS = frozenset(
    "model_max_length padding_side truncation_side do_lower_case do_basic_tokenize strip_accents keep_accents "
    "tokenize_chinese_chars add_prefix_space trim_offsets add_bos_token add_eos_token legacy legacy_behaviour "
    "clean_up_tokenization_spaces spaces_between_special_tokens split_special_tokens extra_ids errors src_lang "
    "tgt_lang added_tokens_decoder model_input_names tokenizer_class".split()
)
_TOKENS = re.compile(r"\w+_tokens?")
_TEXT_WORDS = ("model_type", "hidden_act", "feed_forward_proj", "dense_act_fn", "activation_function")


def folder_tokenizer(folder: Path, text: Mapping[str, Any]) -> Any:
    """Return the tokenizer of a folder whose configuration, of the text tower, was checked."""
    keywords = dict(text.get("tokenizer_kwargs") or {})
    length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    if not text.get("hf_tokenizer_name"):
        return open_clip.SimpleTokenizer(context_length=length, **keywords)
    with _without_code(folder) as place:
        if not any((place / name).is_file() for name in VOCABULARIES):
            raise UserError(f"{folder} has no tokenizer.json, which its configuration supposes: copy it there too")
        return HFTokenizer(
            str(place),
            context_length=length,
            tokenizer_mode=text.get("tokenizer_mode"),
            trust_remote_code=False,
            local_files_only=True,
            **keywords,
        )


def registered_tokenizer(name: str, text: Mapping[str, Any]) -> Any:
    """Return the tokenizer of a registered model, which the hub may have to give."""
    keywords: dict[str, Any] = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    return open_clip.get_tokenizer(name, context_length=text.get("context_length"), **keywords)


def vocabulary_files(folder: Path) -> list[Path]:
    """Return the files of a folder that its tokenizer is made from."""
    return [path for name in (*VOCABULARIES, TOKENIZER_CONFIG) if (path := folder / name).is_file()]


@contextmanager
def text_tower_config(folder: Path, name: str) -> Iterator[str]:
    """Yield the place of a copy of the configuration, in a folder, of a text tower of transformers."""
    path = folder / TEXT_CONFIG
    if not path.is_file():
        raise UserError(
            f"{folder} has a text tower of transformers, {name[:60]!r}, and no {TEXT_CONFIG} of it: copy that there "
            "too, or name the model by hf-hub:"
        )
    stored = read_json(path)
    _refuse_code(path, stored)
    if stored.get("model_type") not in arch_dict:
        raise UserError(f"{path} is of no text tower that open_clip knows: {', '.join(arch_dict)}")
    kept = {key: value for key, value in stored.items() if _describes_text_tower(key, value)}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / TEXT_CONFIG).write_text(json.dumps(kept))
        yield place


def _describes_text_tower(key: str, value: Any) -> bool:
    return not key.startswith("_") and (
        value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and key in _TEXT_WORDS)
    )


@contextmanager
def _without_code(folder: Path) -> Iterator[Path]:
    """Yield a folder with links to the vocabularies and the rest of the tokenizer's configuration."""
    path = folder / TOKENIZER_CONFIG
    stored = read_json(path) if path.is_file() else {}
    _refuse_code(path, stored)
    kept = {key: value for key, value in stored.items() if key in _TOKENIZER_KEYS or _TOKENS.fullmatch(key)}
    kind = kept.get("tokenizer_class", "PreTrainedTokenizerFast")
    if not isinstance(kind, str) or not _TOKENIZER_CLASS.fullmatch(kind):
        raise UserError(f"{path} has the tokenizer_class {str(kind)[:60]!r}, which is none of transformers'")
    with tempfile.TemporaryDirectory() as place:
        for name in VOCABULARIES:
            if (folder / name).is_file():
                (Path(place) / name).symlink_to((folder / name).resolve())
        (Path(place) / TOKENIZER_CONFIG).write_text(json.dumps(cast(Any, kept)))
        yield Path(place)


def _refuse_code(path: Path, stored: Mapping[str, Any]) -> None:
    if stored.get("auto_map"):
        raise UserError(f"{path} needs code of its own (auto_map), and models here are data: convert the model")
