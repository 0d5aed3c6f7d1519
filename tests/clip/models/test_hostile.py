"""A model folder is data: whatever its files say, no code runs, no other file is opened, no host is reached."""

import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.clip.models.clip import new_model
from experiments.clip.models.config import CONFIG_FILE
from experiments.clip.models.export import export_model
from experiments.clip.models.sources import WEIGHTS_FILE

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None

BERT = {"model_type": "roberta", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
BERT |= {"intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 80}


def plain(folder):
    """Change nothing."""
    return r"loaded \d+"


def text(**keys):
    """Return an attack that adds keys to the configuration of the text tower."""

    def change(folder):
        edit(folder, lambda config: config["model_cfg"]["text_cfg"].update(keys))

    return change


def vision(**keys):
    return lambda folder: edit(folder, lambda config: config["model_cfg"]["vision_cfg"].update(keys))


def preprocess(**keys):
    return lambda folder: edit(folder, lambda config: config["preprocess_cfg"].update(keys))


def edit(folder, change):
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def code(folder, file, key):
    """Name code in a file of transformers, as a folder from the hub may."""
    marker = folder.parent / "outside-ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').write('x')\nclass Evil: pass\n")
    (folder / file).write_text(json.dumps({"auto_map": {key: "evil.Evil"}, "model_type": "evil"}))


def with_code_in_tokenizer(trusted):
    def change(folder):
        text(hf_tokenizer_name="x", **({"tokenizer_kwargs": {"trust_remote_code": True}} if trusted else {}))(folder)
        code(folder, "tokenizer_config.json", "AutoTokenizer")
        words(folder / "tokenizer.json")

    return change


def with_code_in_text_tower(folder):
    text(hf_model_name="x", hf_tokenizer_name="x")(folder)
    code(folder, "config.json", "AutoConfig")
    words(folder / "tokenizer.json")


def with_paths_in_tokenizer(folder):
    text(hf_tokenizer_name="x")(folder)
    words(folder / "tokenizer.json")
    for name in ("vocab_file", "tokenizer_file", "merges_file", "special_tokens_map_file"):
        outside = folder.parent / f"outside-{name}"
        outside.write_text("{}")
        named = {name: str(outside), "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "a"}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))


def with_kernels_in_text_tower(folder):
    text(hf_model_name="../outside", hf_tokenizer_name="x")(folder)
    more = {"_attn_implementation": "outside/kernel", "attn_implementation": "outside/kernel"}
    (folder / "config.json").write_text(json.dumps(BERT | more | {"quantization_config": {"quant_method": "awq"}}))
    words(folder / "tokenizer.json")


def with_program_as_weights(folder):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder.parent / 'outside-ran'}",)

    (folder / WEIGHTS_FILE).unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"logit_scale": Evil()}))


def deep(folder):
    (folder / CONFIG_FILE).write_text('{"model_cfg":' + "[" * 100_000 + "]" * 100_000 + "}")


def large(folder):
    (folder / CONFIG_FILE).write_text(" " * 2**21 + "{}")


def words(path):
    """Write a tokenizer of a few words, as the tokenizers library stores it."""
    vocabulary = {"[UNK]": 0, "a": 1, "comma": 2}
    document = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    path.write_text(json.dumps(document | {"model": model}))


def gone(folder):
    (folder / WEIGHTS_FILE).unlink()


ATTACKS = {
    "nothing": (plain, r"loaded \d+"),
    "a vocabulary elsewhere": (text(tokenizer_kwargs={"bpe_path": "/outside.gz"}), "'bpe_path', which describes no"),
    "a corpus to download": (text(tokenizer_kwargs={"reduction_mask": "syntax"}), "reduction_mask cannot be 'syntax'"),
    "keywords that are none": (text(tokenizer_kwargs=[1]), "tokenizer_kwargs must hold options"),
    "a tokenizer of the hub": (text(hf_tokenizer_name="owner/name"), "no tokenizer.json, which its configuration"),
    "a text tower of the hub": (text(hf_model_name="owner/name"), "no config.json of it"),
    "a text tower elsewhere": (text(hf_model_name="/outside"), "no config.json of it"),
    "timm's hub": (vision(timm_model_name="hf-hub:owner/name"), "is none of timm's models"),
    "timm's folder": (vision(timm_model_name="local-dir:/outside"), "is none of timm's models"),
    "timm's name is a number": (vision(timm_model_name=7), "is none of timm's models"),
    "a key of no tower": (vision(checkpoint_path="/outside"), "'checkpoint_path', which describes no model"),
    "a key of no model": (lambda folder: edit(folder, lambda c: c["model_cfg"].update(x=1)), "'x', which describes no"),
    "no text tower": (lambda folder: edit(folder, lambda c: c["model_cfg"].pop("text_cfg")), "text_cfg must hold"),
    "a list": (lambda folder: (folder / CONFIG_FILE).write_text("[]"), "it holds no options"),
    "deep": (deep, "is no JSON as a model's configuration is"),
    "large": (large, "it is larger than"),
    "a million layers": (text(layers=10**6), "layers is 1000000, more than 512"),
    "a billion layers": (vision(layers=10**9), "out of all proportion"),
    "wide": (text(width=2**19), "numbers, its weights are"),
    "a mask of all pairs": (text(context_length=2**19), "numbers, its weights are"),
    "an image of a billion pixels": (vision(image_size=10**6), "image size must be 1 to 4096"),
    "infinite": (
        lambda folder: edit(folder, lambda c: c["model_cfg"].update(embed_dim=1e999)),
        "out of all proportion",
    ),
    "negative": (text(width=-4), "does not load as an open_clip model"),
    "a word for a number": (text(layers="/outside"), "does not load as an open_clip model"),
    "a nested value": (text(width={"a": 1}), "width cannot be"),
    "a mean that is no number": (preprocess(mean=[0, 1, float("nan")]), "mean must be three numbers"),
    "no deviation": (preprocess(std=[0, 1, 1]), "std must be positive"),
    "a mode that does not exist": (preprocess(mode="BGR"), "mode must be one of RGB"),
    "an interpolation that does not exist": (preprocess(interpolation="/outside"), "interpolation must be one of"),
    "a program as weights": (with_program_as_weights, "does not load as an open_clip model"),
    "no weights": (gone, "has no open_clip_model.safetensors"),
}
WITH_TRANSFORMERS = {
    "code in the tokenizer": (with_code_in_tokenizer(False), "needs code of its own"),
    "code in the tokenizer, trusted by the folder": (with_code_in_tokenizer(True), "'trust_remote_code', which"),
    "code in the text tower": (with_code_in_text_tower, "needs code of its own"),
    "paths in the tokenizer": (with_paths_in_tokenizer, r"loaded \d+"),
    "kernels in the text tower": (with_kernels_in_text_tower, "does not load as an open_clip model"),
}
if HAS_TRANSFORMERS:
    ATTACKS |= WITH_TRANSFORMERS


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Return what loading each hostile folder says and does, in one process without a terminal."""
    root = tmp_path_factory.mktemp("hostile")
    export_model(new_model("glyph-micro", 0), root / "whole")
    (root / "whole" / "manifest.json").unlink()  # which could be made for the hostile files
    folders = {}
    for number, (name, (change, _)) in enumerate(ATTACKS.items()):
        folders[name] = root / f"{number}"
        folders[name].mkdir()
        for path in (root / "whole").iterdir():
            (folders[name] / path.name).write_bytes(path.read_bytes())
        change(folders[name])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path)), "HF_HOME": str(root / "hub")}
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("hostile.py"))]
    process = subprocess.run(
        [*program, *map(str, folders.values())],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert not list(root.glob("outside-ran"))
    return dict(zip(ATTACKS, map(json.loads, process.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_a_folder_does_nothing_but_describe_a_model(told, name):
    said = told[name].pop("said")
    assert "\n" not in said
    assert re.search(ATTACKS[name][1], said), said
    assert told[name] == {}
