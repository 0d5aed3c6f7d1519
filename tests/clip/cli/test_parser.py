"""The command line, and the configuration that a run keeps."""

import dataclasses
import json

import pytest

from experiments.clip.cli.options import Train
from experiments.clip.cli.parser import as_settings, as_words, from_dict, save_config
from experiments.clip.errors import UserError
from experiments.clip.run import parse
from experiments.clip.training.options import SHIPPED_REFERENCE


def test_a_configuration_keeps_every_option_and_is_overridden_by_later_ones(tmp_path):
    words = ["train", "--method", "fastclip", "--temperature", "0.05", "--temperature-scheme", "individual"]
    words += ["--rho", "2", "--catalog", "there", "--model", "RN50", "--tasks", "a b", "c", "--lock", "image"]
    words += ["--compile", "--betas", "0.8", "0.9", "--logs", "jsonl", "--ema", "0.99"]
    words += ["--image-mean", "0.5", "0.5", "0.5"]
    options = parse(words)
    path = tmp_path / "config.json"
    save_config(path, options)
    assert parse(["train", "--config", str(path)]) == options
    later = parse(["train", f"--config={path}", "--seed", "5", "--no-compile"])
    assert later == dataclasses.replace(
        options, seed=5, execution=dataclasses.replace(options.execution, compile=False)
    )


def test_compile_stands_alone_or_has_a_mode(tmp_path):
    for words, expected in (
        ([], False),
        (["--compile"], True),
        (["--compile", "--seed", "3"], True),
        (["--compile", "reduce-overhead"], "reduce-overhead"),
        (["--compile=reduce-overhead", "--seed", "3"], "reduce-overhead"),
        (["--compile", "--no-compile"], False),
    ):
        options = parse(["train", *words])
        assert options.execution.compile == expected
        assert parse(["train", *as_words(options)]) == options
        save_config(tmp_path / "config.json", options)
        assert parse(["train", "--config", str(tmp_path / "config.json")]) == options
    assert parse(["plan", "--compile"]).train.execution.compile is True
    with pytest.raises(UserError, match="Unrecognized options: often"):
        parse(["train", "--compile", "often"])


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("{", "is not the config.json of a run"),
        ("[]", "is not the config.json of a run"),
        ('{"nosuch": 1}', "unknown option nosuch"),
        ('{"optimization": {"epochs": "many"}}', "epochs.*many"),
        ('{"optimization": {"epochs": 0}}', "--epochs must be at least 1, got 0"),
        ('{"data": 3}', "is not the config.json of a run"),
    ],
)
def test_a_configuration_that_is_none_is_refused(content, message, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        parse(["train", "--config", str(path)])
    with pytest.raises(UserError, match="both say where to start from"):
        parse(["train", "--config", str(path), "--preset", "glyph-steered"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["train", "--epohcs", "3"],
            r"Unrecognized options: --epohcs, 3 \(nearest: --epochs\): see `run.py train --help`",
        ),
        (["train", "--epochs"], "--epochs needs a value"),
        (["train", "--betas", "0.9"], "--betas needs FLOAT FLOAT, got '0.9'"),
        (["train", "--image-mean", "0.9", "x", "0.1"], "--image-mean needs FLOAT FLOAT FLOAT, got '0.9', 'x', '0.1'"),
        (["train", "--epochs", "many"], "--epochs: .*'many'"),
        (["train", "--temperature", "warm"], "--temperature needs FLOAT or auto, got 'warm'"),
        (["train", "--method", "clip"], "--method must be one of openclip, siglip, .*, got 'clip'"),
        (["train", "--precision", "amp"], "--precision must be one of (float32|float16|bfloat16|, )+, got 'amp'"),
        (["evaluate"], "Missing: MODEL|Missing: .*"),
        (["study", "--seed", "3"], "--seed 3 has no part in this run: it is for --check"),
    ],
)
def test_what_cannot_be_parsed_is_told_in_one_line(words, message):
    with pytest.raises(UserError, match=message) as refused:
        parse(words)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--method", "siglip", "--compile", "--precision", "bfloat16"],
        ["--catalog", "c", "--model", "m", "--reference", "r", "--tasks", "a", "b", "--workers", "0", "--lr", "2e-3"],
        ["--catalog", "c", "--model", "m", "--method", "openclip", "--source-weights", "1::2", "--resampled"],
        ["--betas", "0.8", "0.9", "--image-std", "0.5", "0.5", "0.5", "--precision", "bfloat16", "--warmup", "7"],
        ["--method", "fastclip", "--temperature", "0.05", "--temperature-scheme", "global", "--rho", "2"],
        ["--divergence", "cvar", "--level", "0.3", "--coefficient", "adaptive", "--gamma-epochs", "3"],
        ["--select", "jest", "--candidates", "2", "--pretrained", "weights.pt", "--lock", "image"],
        ["--optimizer", "lion", "--schedule", "cooldown", "--cooldown-steps", "5", "--lr-min", "1e-5", "--ema", "0.9"],
    ],
)
def test_options_survive_as_words_and_as_a_configuration(words):
    options = parse(["train", *words])
    assert parse(["train", *as_words(options)]) == options
    assert from_dict(Train, json.loads(json.dumps(as_settings(options)))) == options


@pytest.mark.parametrize("method", ["drrho", "openclip"])
@pytest.mark.parametrize("place", ["experiments/clip/reference", "experiments/clip/glyphs/reference_model"])
def test_a_configuration_of_an_earlier_version_finds_the_shipped_reference(place, method, tmp_path):
    """They name it, whether it steers or not."""
    options = parse(["train", "--method", method])
    stored = as_settings(options)
    stored["loss"]["reference"] = place
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert parse(["train", "--config", str(tmp_path / "config.json")]) == options
    assert options.reference == SHIPPED_REFERENCE


def test_the_embedded_pairs_and_a_catalog_start_from_their_own_settings():
    glyphs = parse(["train"])
    assert (glyphs.model, glyphs.optimization.lr, glyphs.optimization.warmup) == ("glyph-small", 2e-3, 50)
    assert (glyphs.optimization.epochs, glyphs.execution.precision) == (16, "float32")
    own = parse(["train", "--model", "RN50", "--method", "openclip", "--catalog=there"])
    assert (own.optimization.lr, own.optimization.epochs, own.optimization.warmup) == (5e-4, 32, None)
    assert (own.execution.precision, own.shards.workers, own.optimization.betas) == (None, None, None)
    assert parse(["plan", "--model", "RN50", "--samples", "1000"]).train.execution.precision is None
    assert parse(["plan"]).train.model == "glyph-small"


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--catalog", "c"], "--catalog needs --model: the model to train, like ViT-B-32"),
        (["train", "--catalog", "c", "--model", "m"], "--method drrho needs --reference: the model that steers"),
        (["train", "--catalog=c", "--model", "m", "--method", "two-level"], "--method two-level needs --reference"),
        (["train", "--catalog", "c", "--model", "m", "--method", "openclip", "--distill", "1"], "--distill needs"),
        (["train", "--catalog", "c", "--model", "m", "--method", "siglip", "--select", "jest"], "--select jest needs"),
        (["train", "--preset", "glyph-steered", "--catalog", "c"], "--preset glyph-steered has the settings of the em"),
        (["cache-reference", "--catalog", "c"], "--catalog needs --reference: the model whose features to store"),
        (["plan", "--samples", "1000"], "a plan of your own data needs --model, or a --preset"),
    ],
)
def test_nothing_of_the_embedded_pairs_is_taken_for_own_data(words, message):
    with pytest.raises(UserError, match=message):
        parse(words)


def test_a_configuration_of_the_embedded_pairs_is_refused_for_own_data(tmp_path):
    save_config(tmp_path / "config.json", parse(["train"]))
    with pytest.raises(UserError, match=r"--config .* has the settings of the embedded pairs: leave it out"):
        parse(["train", "--config", str(tmp_path / "config.json"), "--catalog", "c"])
