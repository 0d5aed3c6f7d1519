"""What published weights were trained with; test_sources.py loads them."""

from experiments.clip.models.published import (
    OPENAI,
    preprocess_of,
    preprocess_of_file,
    quick_gelu_note,
    tag_config,
    weights_in,
)


def test_openais_weights_have_openais_preprocessing():
    assert preprocess_of(tag_config("ViT-B-32", "openai")) == OPENAI
    assert tag_config("ViT-B-32", "unheard-of") == {}


def test_weights_of_siglip_have_their_own(tmp_path):
    found, note = preprocess_of_file("ViT-B-16-SigLIP", tmp_path / "weights.pt")
    assert (found["mean"], found["resize_mode"], note) == ((0.5, 0.5, 0.5), "squash", "")


def test_another_activation_is_said_with_the_model_to_take():
    assert quick_gelu_note("ViT-B-32", True, True, "w.pt") == ""
    note = quick_gelu_note("ViT-B-32", True, False, "w.pt")
    assert note.endswith("w.pt was trained with QuickGELU, ViT-B-32 has GELU: take the model ViT-B-32-quickgelu")
    assert quick_gelu_note("ViT-B-32-quickgelu", False, True, "w.pt").endswith("take the model ViT-B-32")


def test_the_weights_of_a_folder_are_those_that_run_no_code(tmp_path):
    assert weights_in(tmp_path) is None
    (tmp_path / "open_clip_pytorch_model.bin").touch()
    assert weights_in(tmp_path) == tmp_path / "open_clip_pytorch_model.bin"
    (tmp_path / "open_clip_model.safetensors").touch()
    assert weights_in(tmp_path) == tmp_path / "open_clip_model.safetensors"
