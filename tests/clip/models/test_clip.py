"""Models through open_clip: seeds, folders, files of weights, locked towers, and refusal of what is damaged."""

import logging

import open_clip
import pytest
import torch
from timm.layers import FrozenBatchNormAct2d

from experiments.clip.errors import UserError
from experiments.clip.models.clip import at_least_one, load_model, lock_towers, new_model
from experiments.clip.models.export import export_model
from experiments.clip.models.sources import WEIGHTS_FILE, register_models
from experiments.clip.training.options import SHIPPED_REFERENCE


def test_weights_follow_the_seed():
    one, same, other = (new_model("glyph-small", seed).model.visual.conv1.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


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
    with pytest.raises(UserError, match=r"is damaged \(open_clip_model.safetensors is not as it was written"):
        load_model(tmp_path)
    (tmp_path / "manifest.json").unlink()  # as in a folder from elsewhere
    with pytest.raises(UserError, match="does not load"):
        load_model(tmp_path)


@pytest.mark.slow
def test_a_registered_model_with_a_file_of_weights_is_loaded(reference, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in reference.model.state_dict().items()}}, path)
    clip = load_model("glyph-base", path)
    for key, value in reference.model.state_dict().items():
        assert torch.equal(clip.model.state_dict()[key], value)
    assert clip.fingerprint != reference.fingerprint and not clip.model.training
    for name, file, message in (
        ("glyph-small", path, "does not load as weights of glyph-small"),
        ("glyph-base", tmp_path / "none.pt", "there is no file of weights"),
        ("nosuch", path, "no model is called 'nosuch'"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(name, file)


def test_registering_the_glyph_models_again_changes_nothing():
    register_models()
    before = open_clip.list_models()
    assert {"glyph-small", "glyph-base"} <= set(before)
    register_models()
    assert open_clip.list_models() == before


@pytest.mark.slow
@pytest.mark.parametrize("level", [logging.NOTSET, logging.INFO, logging.ERROR])
def test_a_users_logging_and_random_state_are_restored(level):
    before, state = logging.root.manager.disable, torch.random.get_rng_state()
    logging.disable(level)
    try:
        new_model("glyph-small", 0)
        assert logging.root.manager.disable == level
    finally:
        logging.disable(before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_images_and_no_captions_have_no_features():
    clip = new_model("glyph-small", 0)
    image, text = clip.encode_image(torch.empty(0, 3, 32, 32)), clip.encode_tokens(clip.tokenize(["x"])[:0])
    assert image.shape == text.shape == (0, clip.encode_text(["x"]).shape[1])
    assert at_least_one(torch.ones(2, 3)).shape == (2, 3) and at_least_one(torch.ones(0, 3)).shape == (1, 3)


def test_locked_towers_are_frozen_except_for_their_last_groups():
    model = new_model("glyph-small", 0).model
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    lock_towers(model, {"image": 0})
    left = {name for name, each in model.named_parameters() if each.requires_grad}
    assert left == {name for name in trained if not name.startswith("visual.")}
    with pytest.raises(UserError, match=r"this model's text tower cannot be locked .*: choose another --model"):
        lock_towers(torch.nn.Linear(1, 1), {"text": 0})


@pytest.mark.parametrize("name, image", [("icon-public", {}), ("RN50", {"force_image_size": 64})])
def test_a_locked_tower_with_batch_normalization_computes_the_same_also_in_training(name, image):
    """timm's normalizations have an activation, which is not to be lost, and statistics, which are to stay."""
    model = new_model(name, 0, **image).model
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval().encode_image(pixels)
        lock_towers(model, {"image": 0})
        for _ in range(2):
            assert torch.allclose(model.train().encode_image(pixels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Importing from timm.models.helpers:FutureWarning")  # by open_clip
def test_only_the_normalizations_of_locked_groups_keep_their_statistics():
    model = new_model("icon-public", 0).model
    lock_towers(model, {"image": 2})
    left = [each for each in model.visual.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    assert left and all(parameter.requires_grad for each in left for parameter in each.parameters())
    assert any(isinstance(each, FrozenBatchNormAct2d) for each in model.visual.modules())
