"""Tokenizers and text towers of transformers: from a folder as it gives them itself, and where it is missing."""

import importlib.util
import json
import sys

import pytest
import torch

from experiments.clip.errors import UserError
from experiments.clip.models.clip import load_model, new_model
from experiments.clip.models.config import CONFIG_FILE
from experiments.clip.models.export import export_model
from experiments.clip.models.tokenizers import folder_tokenizer

has_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
TEXT = {"hf_tokenizer_name": "owner/name", "context_length": 12, "tokenizer_kwargs": {"clean": "canonicalize"}}
ROBERTA = {"model_type": "roberta", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
ROBERTA |= {"intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 20, "pad_token_id": 1}


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of words with marks at both ends, as published ones have, and names of files elsewhere."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "comma", "digit", "two", "a"]
    special = [
        {"id": i, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for i, word in enumerate(words[:4])
    ]
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    single += [{"SpecialToken": {"id": "</s>", "type_id": 0}}]
    ends = {name: {"id": name, "ids": [words.index(name)], "tokens": [name]} for name in ("<s>", "</s>")}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": ends},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<unk>"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>"}
    config |= {"name_or_path": "/outside", "special_tokens_map_file": "/outside", "chat_template": "{{ outside }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<s>", "eos_token": "</s>"}))
    return tmp_path


@has_transformers
def test_a_folders_tokenizer_is_the_one_of_transformers(folder):
    from transformers import AutoTokenizer

    captions = ["Comma, digit two.", "a digit that is unknown " * 9, ""]
    tokens = folder_tokenizer(folder, TEXT)(captions)
    clean = ["comma digit two", "a digit that is unknown " * 9, ""]
    own = AutoTokenizer.from_pretrained(str(folder))
    expected = own(clean, return_tensors="pt", max_length=12, padding="max_length", truncation=True).input_ids
    assert torch.equal(tokens, expected) and tokens[0].tolist() == [1, 4, 5, 6, 2, *[0] * 7]


@has_transformers
def test_a_model_with_a_text_tower_of_transformers_is_built_loaded_and_exported(folder, tmp_path):
    from open_clip.model import CustomTextCLIP

    config = new_model("glyph-micro", 0).config.model
    text = {**TEXT, "hf_model_name": "owner/name", "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
    (folder / "config.json").write_text(json.dumps(ROBERTA))
    (folder / "own.json").write_text(json.dumps({**config, "text_cfg": text}))
    clip = new_model(str(folder / "own.json"), 0)
    assert isinstance(clip.model, CustomTextCLIP)
    export_model(clip, tmp_path / "model")
    again = load_model(tmp_path / "model")
    clip.model.eval()
    assert torch.equal(again.encode_text(["comma", "digit two"]), clip.encode_text(["comma", "digit two"]))
    (tmp_path / "model" / "manifest.json").unlink()
    (tmp_path / "model" / "config.json").write_text(json.dumps(ROBERTA | {"hidden_size": 2**19}))
    with pytest.raises(UserError, match="numbers, its weights are"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("kind", ["mecab", "../../Evil", 7])
def test_a_class_that_is_none_is_refused(kind, folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(UserError, match="tokenizer_class"):
        folder_tokenizer(folder, TEXT)


def test_without_transformers_its_models_are_one_line(folder, monkeypatch):
    export_model(new_model("glyph-micro", 0), folder)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "owner/name"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("open_clip.hf_model.transformers", None)
    for load in (
        lambda: load_model(folder),
        lambda: new_model("ViT-B-16-SigLIP", 0),
        lambda: new_model("roberta-ViT-B-32", 0),
    ):
        with pytest.raises(UserError, match=r"transformers") as caught:
            load()
        assert "install" in str(caught.value) and "\n" not in str(caught.value)
