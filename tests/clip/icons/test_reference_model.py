"""The model that ships with the icons: small, whole, and what its card says."""

import json

import pytest
import torch
from PIL import Image

from experiments.clip.cli.presets import PRESETS
from experiments.clip.io.checksums import fault_of
from experiments.clip.models.clip import load_model
from experiments.clip.models.config import CONFIG_FILE
from experiments.clip.models.options import SHIPPED
from experiments.clip.models.sources import WEIGHTS_FILE, register_models
from experiments.clip.run import parse

FOLDER = SHIPPED["icons"]


def test_it_is_at_most_eight_megabytes_and_as_it_was_exported():
    assert (FOLDER / WEIGHTS_FILE).stat().st_size <= 8_000_000
    assert fault_of(FOLDER, [CONFIG_FILE, WEIGHTS_FILE]) == ""


def test_its_card_names_data_licenses_and_the_command_that_made_it():
    card = (FOLDER / "README.md").read_text()
    assert "--preset icon-reference" in card
    assert "(ATTRIBUTION.md)" in card
    listed = [line for line in (FOLDER / "ATTRIBUTION.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert f"{len(listed)} sets" in card
    assert sum(int(line.split(" | ")[1]) for line in listed) == 158_634
    words = ["train", "--preset", "icon-reference", "--catalog", "c"]
    assert parse(words).optimization == PRESETS["icon-reference"].optimization


@torch.no_grad()
def test_it_is_the_architecture_of_the_preset_and_prefers_the_right_name():
    import open_clip

    clip = load_model("icons")
    register_models()
    known = open_clip.get_model_config(PRESETS["icon-reference"].model)
    stored = json.loads((FOLDER / CONFIG_FILE).read_text())["model_cfg"]
    assert known.items() <= stored.items()
    assert sum(each.numel() for each in clip.model.parameters()) < 4_000_000
    picture = Image.new("RGB", (64, 64), "white")
    for row in range(28, 36):  # a horizontal bar
        for column in range(8, 56):
            picture.putpixel((column, row), (0, 0, 0))
    image = clip.encode_image(clip.preprocess(picture)[None])
    names = ["minus", "face with tears of joy", "musical note", "shopping cart"]
    scores = (image @ clip.encode_text(names).T)[0]
    assert scores.argmax() == 0
    assert image.norm().item() == pytest.approx(1, abs=1e-5)
