"""Models through open_clip: preprocessing, export, refusal of damaged folders."""

import open_clip
import pytest
import torch

from experiments.clip.errors import UserError
from experiments.clip.glyphs.dataset import read_samples
from experiments.clip.glyphs.stream import PreparedPairs
from experiments.clip.models.clip import WEIGHTS_FILE, load_model, new_model
from experiments.clip.models.export import export_model
from experiments.clip.training.options import SHIPPED_REFERENCE


def test_pairs_in_memory_are_open_clips_preprocessing_row_by_row(manifest):
    clip = new_model("glyph-small", 0)
    pairs = PreparedPairs(manifest, "train", clip)
    samples = list(read_samples(manifest, "train"))
    batch = pairs.batch(torch.tensor([149, 0, 63, 64]))
    for row, index in enumerate(batch.index.tolist()):
        assert torch.allclose(batch.image[row], clip.preprocess(samples[index].image), rtol=0, atol=1e-6)
        assert torch.equal(batch.text[row], clip.tokenize([samples[index].caption])[0])


def test_prepared_pairs_are_kept_and_made_again_where_they_are_damaged(manifest):
    clip = new_model("glyph-small", 0)
    PreparedPairs(manifest, "test", clip)
    first = PreparedPairs(manifest, "test", clip)  # from the kept file, whoever made it
    [kept] = manifest.folder.glob("prepared-test-*")
    whole = kept.read_bytes()
    calls: list[int] = []
    again = PreparedPairs(manifest, "test", clip, calls.append)
    assert not calls  # nothing was decoded
    assert torch.equal(first.pixels, again.pixels)
    assert (first.captions, first.names) == (again.captions, again.names)
    for damaged in (b"", whole[:-1], whole[:-100] + bytes(100), whole.replace(b"letter", b"Letter", 1)):
        kept.write_bytes(damaged)
        again = PreparedPairs(manifest, "test", clip, calls.append)
        assert calls.pop() == len(first)
        assert torch.equal(first.pixels, again.pixels) and first.captions == again.captions


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
