"""Models through open_clip: preprocessing, export, refusal of damaged folders."""

import open_clip
import pytest
import torch

from experiments.clip.errors import UserError
from experiments.clip.models.clip import SHIPPED_REFERENCE, WEIGHTS_FILE, load_model, new_model
from experiments.clip.models.export import export_model


def test_weights_follow_the_seed():
    one, same, other = (new_model("glyph-small", seed).model.visual.conv1.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_export_loads_in_open_clip_and_gives_the_same_features(tmp_path):
    clip = new_model("glyph-small", 3)
    export_model(clip, tmp_path)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    again, _, _ = open_clip.create_model_and_transforms("glyph-small", pretrained=str(tmp_path / WEIGHTS_FILE))
    image = torch.randn(2, 3, 32, 32)
    expected = clip.model.encode_image(image)
    assert torch.equal(model.encode_image(image), expected)
    assert torch.equal(again.encode_image(image), expected)


def test_shipped_reference_is_small_and_names_itself(reference):
    weights = SHIPPED_REFERENCE / WEIGHTS_FILE
    assert weights.stat().st_size < 8e6
    assert len(reference.fingerprint) == 64


def test_unknown_model_is_refused():
    with pytest.raises(UserError, match="glyph-huge"):
        new_model("glyph-huge", 0)


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no open_clip_config"):
        load_model(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    export_model(new_model("glyph-small", 0), tmp_path)
    weights = tmp_path / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="does not load"):
        load_model(tmp_path)
