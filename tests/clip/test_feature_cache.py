"""The reference's cached features: every row where it belongs, or an error."""

import dataclasses

import pytest
import torch

from experiments.clip.errors import UserError
from experiments.clip.feature_cache import FeatureCache, cache_features, open_features
from experiments.clip.shards import read_samples


@pytest.fixture
def cached(manifest, reference, tmp_path):
    assert cache_features(reference, manifest, "train", tmp_path) == 150
    return tmp_path


@torch.no_grad()
def test_row_i_is_the_reference_on_sample_i(manifest, reference, cached):
    features = open_features(reference, manifest, "train", cached)
    samples = list(read_samples(manifest, "train"))
    chosen = torch.tensor([149, 0, 63, 64, 65, 128])
    image, text = features.rows(chosen)
    for row, index in enumerate(chosen.tolist()):
        pixels = reference.preprocess(samples[index].image)[None]
        assert torch.allclose(image[row], reference.encode_image(pixels)[0], rtol=0, atol=1e-3)
        assert torch.allclose(text[row], reference.encode_text([samples[index].caption])[0], rtol=0, atol=1e-3)


def test_finished_shards_are_kept_and_missing_ones_made(manifest, reference, cached):
    files = sorted(cached.iterdir())
    files[1].unlink()
    assert cache_features(reference, manifest, "train", cached) == 64
    assert cache_features(reference, manifest, "train", cached) == 0


def test_missing_file_is_refused(manifest, reference, cached):
    sorted(cached.iterdir())[0].unlink()
    with pytest.raises(UserError, match="missing"):
        open_features(reference, manifest, "train", cached)


def test_features_of_another_reference_or_other_data_are_refused(manifest, reference, cached):
    other = dataclasses.replace(reference, fingerprint="0" * 64)
    with pytest.raises(UserError, match="another reference"):
        open_features(other, manifest, "train", cached)
    with pytest.raises(UserError, match="another data"):
        open_features(reference, dataclasses.replace(manifest, fingerprint="0" * 64), "train", cached)


def test_damaged_file_is_refused(manifest, reference, cached):
    path = sorted(cached.iterdir())[2]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        open_features(reference, manifest, "train", cached)


@pytest.mark.parametrize("index", [1, -1, 3])
def test_absent_row_is_an_error_never_a_zero(index):
    cache = FeatureCache(torch.ones(3, 2), torch.ones(3, 2), torch.tensor([True, False, True]))
    with pytest.raises(UserError, match=f"sample {index}"):
        cache.rows(torch.tensor([0, index]))


def test_spread_is_that_of_the_margins_of_different_pairs():
    image, text = torch.nn.functional.normalize(torch.randn(2, 6, 4), dim=-1)
    margins = [float(image[i] @ text[j] - image[i] @ text[i]) for i in range(6) for j in range(6) if i != j]
    spread = FeatureCache(image, text, torch.ones(6, dtype=torch.bool)).spread()
    assert spread == pytest.approx(torch.tensor(margins).std().item(), rel=1e-5)
