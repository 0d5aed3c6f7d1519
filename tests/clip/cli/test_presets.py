"""Presets against the published settings."""

import dataclasses
import json
from pathlib import Path

import pytest

from drrho.running import published_final_gamma
from experiments.clip.cli.parser import as_settings, load_config, save_config
from experiments.clip.cli.presets import PRESETS, is_of_embedded_pairs
from experiments.clip.errors import UserError
from experiments.clip.run import parse

PUBLISHED = json.loads((Path(__file__).parents[2] / "fixtures" / "published_hyperparameters.json").read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_kept_and_read_back(name, tmp_path):
    save_config(tmp_path / "config.json", PRESETS[name])
    assert as_settings(load_config(tmp_path / "config.json")) == as_settings(PRESETS[name])


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


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_for_its_own_pairs_and_for_no_others(name):
    words = ["train", "--preset", name]
    if is_of_embedded_pairs(name):
        assert parse(words) == PRESETS[name]
        with pytest.raises(UserError, match=f"--preset {name} has the settings of the embedded pairs"):
            parse([*words, "--catalog", "c"])
    else:
        options = parse([*words, "--catalog", "c"])
        assert options == dataclasses.replace(PRESETS[name], shards=options.shards) and options.source == "catalog"
