"""Options kept and repeated, and presets against the published settings."""

import dataclasses
import json
from pathlib import Path

import pytest

from drrho.running import published_final_gamma
from experiments.clip.cli.parser import as_settings, load_config, save_config
from experiments.clip.cli.presets import PRESETS
from experiments.clip.errors import UserError
from experiments.clip.run import parse

PUBLISHED = json.loads((Path(__file__).parents[2] / "fixtures" / "published_hyperparameters.json").read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_kept_and_read_back(name, tmp_path):
    save_config(tmp_path / "config.json", PRESETS[name])
    assert as_settings(load_config(tmp_path / "config.json")) == as_settings(PRESETS[name])


def test_a_configuration_keeps_every_option_and_is_overridden_by_later_ones(tmp_path):
    words = ["train", "--method", "fastclip", "--temperature", "0.05", "--temperature-scheme", "individual"]
    words += ["--rho", "2", "--catalog", "there", "--tasks", "a b", "c", "--lock", "image", "--ema", "0.99"]
    words += ["--compile", "--betas", "0.8", "0.9", "--logs", "jsonl"]
    options = parse(words)
    path = tmp_path / "config.json"
    save_config(path, options)
    assert parse(["train", "--config", str(path)]) == options
    later = parse(["train", f"--config={path}", "--seed", "5", "--no-compile"])
    assert later == dataclasses.replace(
        options, seed=5, execution=dataclasses.replace(options.execution, compile=False)
    )


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


@pytest.mark.parametrize(
    "preset, published",
    [
        ("drrho-dfn192m", "drrho_dfn192m"),
        ("fastclip-dfn192m", "fastclip_dfn192m"),
        ("fastclip-cc3m", "fastclip_v3_cc3m"),
        ("fastclip-cc12m", "fastclip_v3_cc12m"),
        ("fastclip-laion400m", "fastclip_v3_laion400m"),
    ],
)
def test_presets_are_the_published_settings(preset, published):
    options, wanted = PRESETS[preset], PUBLISHED[published]
    optimization, loss = options.optimization, options.loss
    found = {
        "model": options.model,
        "global_batch": optimization.batch_size,
        "epochs": optimization.epochs,
        "lr": optimization.lr,
        "lr_min": optimization.lr_min,
        "lr_temperature": loss.temperature_lr,
        "weight_decay": optimization.weight_decay,
        "warmup_steps": optimization.warmup,
        "temperature": loss.temperature,
        "rho": loss.rho,
        "eps": loss.eps,
        "gamma": loss.final_gamma,
        "gamma_decay_epochs": loss.gamma_epochs,
    }
    numbers = {key: value for key, value in wanted.items() if key in found and key != "gamma"}
    assert {key: found[key] for key in numbers} == numbers
    adam = PUBLISHED["adamw"]["resnet" if wanted["model"].startswith("RN") else "vit"]
    assert [optimization.betas, optimization.adam_eps] == [tuple(adam["betas"]), adam["eps"]]
    if isinstance(wanted.get("gamma"), float):
        assert loss.final_gamma == wanted["gamma"]
    else:  # by the published rule
        assert loss.final_gamma == published_final_gamma(optimization.epochs)


def test_presets_of_published_recipes_want_the_users_data():
    with pytest.raises(UserError, match="--preset fastclip-cc3m is for your own data: add --catalog"):
        parse(["train", "--preset", "fastclip-cc3m"])
    assert parse(["plan", "--preset", "datacomp-small"]).train == PRESETS["datacomp-small"]
    seen = {name: o.shards.epoch_samples * o.optimization.epochs for name, o in PRESETS.items() if "datacomp" in name}
    assert list(seen.values()) == [12_800_000, 128_000_000, 1_280_000_000, 12_800_000_000]


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--lock", "image", "text"], "leaves nothing to train"),
        (["train", "--unlocked-groups", "1"], "--unlocked-groups 1 has no part in this run: it is for --lock"),
        (["train", "--patch-dropout", "1"], r"--patch-dropout must be in \[0, 1\), got 1"),
        (["train", "--gamma-epochs", "-1"], "--gamma-epochs must be >= 0, got -1"),
        (["train", "--distill-own-temperature"], "--distill-own-temperature True has no part.*it is for --distill"),
        (
            ["train", "--distill", "1", "--distill-own-temperature", "--temperature-scheme", "individual"],
            "--distill-own-temperature True has no part.*one temperature for all samples",
        ),
        (["train", "--temperature-lr-schedule", "model"], "--temperature-lr-schedule model has no part"),
        (["train", "--published-temperature-gradient"], "--published-temperature-gradient True has no part"),
        (["train", "--reference-features", "f"], "--reference-features f has no part in this run: it is for --catalog"),
        (
            ["train", "--method", "openclip", "--catalog", "c", "--reference-features", "f"],
            "--reference-features f has no part in this run: it is for --method drrho",
        ),
        (["train", "--candidates", "4"], "--candidates 4 has no part in this run: it is for --select jest, jest-top-k"),
        (
            ["train", "--select", "rho-top-k", "--select-chunks", "4"],
            "--select-chunks 4 has no part.*jest or jest-top-k",
        ),
        (["train", "--select", "jest-top-k", "--select-temperature", "2"], "--select-temperature 2.0 has no part"),
        (["train", "--select", "jest", "--candidates", "1"], "--candidates must be at least 2.*got 1"),
        (["train", "--select", "jest", "--select-chunks", "0"], "--select-chunks must be between 1 and.*512, got 0"),
        (
            ["train", "--select", "jest", "--batch-size", "8"],
            "--select-chunks must be between 1 and --batch-size 8, got 16",
        ),
        (["train", "--select", "jest", "--select-temperature", "0"], "--select-temperature must be positive.*got 0"),
        (
            ["train", "--select", "jest", "--method", "fastclip", "--temperature-scheme", "individual"],
            "--select jest compares pairs at one temperature.*individual",
        ),
        (["cache-reference", "--views", "0"], "--views must be at least 1, got 0"),
        (["cache-reference", "--views", "2"], "--views 2 has no part in this run: it is for --catalog"),
        (["cache-reference", "--catalog", "c", "--captions", "vague"], "--catalog takes the place of --captions"),
    ],
)
def test_options_that_contradict_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse(words)


def test_a_selection_needs_a_reference_whatever_the_method():
    for method in ("openclip", "siglip", "fastclip"):
        options = parse(["train", "--method", method, "--select", "rho-top-k", "--reference", "there"])
        assert options.needs_reference and not options.loss.needs_reference
        assert options.pairs_per_step == 5 * options.optimization.batch_size
    assert not parse(["train", "--method", "openclip"]).needs_reference


def test_a_share_of_the_pairs_is_refused_where_it_has_no_part():
    assert parse(["train", "--fraction", "0.25"]).fraction == 0.25
    for words, message in (
        (["train", "--fraction", "0"], r"--fraction must be in \(0, 1\], got 0.0"),
        (["train", "--fraction", "1.5"], r"--fraction must be in \(0, 1\], got 1.5"),
        (["train", "--fraction", "0.5", "--catalog", "c"], "--catalog takes the place of --split, --fraction"),
        (["plan", "--fraction", "0.5"], "--fraction 0.5 has no part in a plan: give --samples"),
        (["evaluate", "there", "--fraction", "0.5"], "Unrecognized options: --fraction"),
    ):
        with pytest.raises(UserError, match=message):
            parse(words)
