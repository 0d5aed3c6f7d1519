"""The reference's cached features: every row where it belongs, or an error; views that the target sees too."""

import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from experiments.clip.data.catalog import make_catalog
from experiments.clip.data.draws import view_draws, visit_draws
from experiments.clip.data.loader import Loader
from experiments.clip.data.reader import Reader, decode
from experiments.clip.distributed import Ranks
from experiments.clip.errors import UserError
from experiments.clip.models.clip import load_model, new_model
from experiments.clip.reference.cache import cache_features, open_features
from experiments.clip.reference.inputs import CachedReference, LiveReference, margin_spread
from tests.clip.tars import write_tar


@pytest.fixture(scope="module")
def catalog(manifest, tmp_path_factory):
    shards = [str(manifest.folder / shard.name) for shard in manifest.splits["train"].shards]
    return make_catalog(shards, tmp_path_factory.mktemp("catalog"))


@pytest.fixture(scope="module")
def cached(catalog, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    assert cache_features(reference, catalog, folder, batch_size=50) == 150
    return folder


def contents(path):
    """Metadata and tensors; the order of metadata in the file is arbitrary."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key).tolist() for key in file.keys()}


@pytest.fixture
def copied(cached, tmp_path):
    for path in cached.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def noise(seed, pixels=48):
    """Every crop of it is another image."""
    stream = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def samples(catalog, indices, draw=0):
    return [decode(raw, draw) for raw in Reader(catalog).read_many(indices)]


@torch.no_grad()
def test_row_i_is_the_reference_on_sample_i(catalog, reference, cached):
    features = open_features(reference, catalog, cached)
    chosen = [149, 0, 63, 64, 65, 128, 0]
    image, text = features.rows(torch.tensor(chosen))
    assert image.dtype == torch.float16
    for row, pair in enumerate(samples(catalog, chosen)):
        pixels = reference.preprocess(pair.image)[None]
        assert torch.allclose(image[row].float(), reference.encode_image(pixels)[0], rtol=0, atol=1e-3)
        assert torch.allclose(text[row].float(), reference.encode_text([pair.caption])[0], rtol=0, atol=1e-3)
    again = pickle.loads(pickle.dumps(features))  # as a worker that is spawned gets it
    assert torch.equal(again.rows(torch.tensor(chosen))[0], image)


def test_finished_files_are_kept_and_missing_ones_made(catalog, reference, copied):
    files = sorted(copied.iterdir())
    before = contents(files[1])
    files[1].unlink()
    assert cache_features(reference, catalog, copied, batch_size=50) == 64
    assert contents(files[1]) == before
    assert cache_features(reference, catalog, copied) == 0


def test_ranks_and_workers_make_the_same_files(catalog, reference, cached, tmp_path):
    made = [
        cache_features(reference, catalog, tmp_path, batch_size=50, workers=rank, ranks=Ranks(rank, 2))
        for rank in (0, 1)
    ]
    assert sorted(made) == [64, 86]
    for path in cached.iterdir():
        assert contents(tmp_path / path.name) == contents(path)


def test_missing_file_is_refused(catalog, reference, copied):
    sorted(copied.iterdir())[1].unlink()
    with pytest.raises(UserError, match=r"features-00001\.safetensors are missing"):
        open_features(reference, catalog, copied)


def test_features_of_another_reference_other_data_or_views_are_refused(catalog, reference, copied):
    other = dataclasses.replace(reference, fingerprint="0" * 64)
    with pytest.raises(UserError, match="another reference"):
        open_features(other, catalog, copied)
    with pytest.raises(UserError, match="another data"):
        open_features(reference, dataclasses.replace(catalog, fingerprint="0" * 64), copied)
    sorted(copied.iterdir())[1].unlink()
    with pytest.raises(UserError, match="another views, 1 instead of 2"):
        cache_features(reference, catalog, copied, views=2)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_damaged_file_is_refused(catalog, reference, copied, size):
    path = sorted(copied.iterdir())[2]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="damaged"):
        open_features(reference, catalog, copied)


def test_a_sample_that_cannot_be_read_has_no_row_and_asking_for_it_is_an_error(reference, tmp_path):
    members = []
    for k in range(6):
        members += [(f"{k}.png", b"no image" if k in (0, 3) else noise(k)), (f"{k}.txt", b"letter a")]
    write_tar(tmp_path / "0.tar", members)
    catalog = make_catalog(str(tmp_path / "0.tar"), tmp_path / "catalog")
    cache_features(reference, catalog, tmp_path / "features")
    features = open_features(reference, catalog, tmp_path / "features")
    assert features.rows(torch.tensor([1, 2, 4, 5]))[0].float().norm(dim=1) == pytest.approx(1, abs=1e-2)
    assert len(features.first(1024)[0]) == 4
    for index in (0, 3, 6, -1):
        with pytest.raises(UserError, match=f"sample {index} are missing"):
            features.rows(torch.tensor([1, index]))
    loader = Loader(
        catalog,
        reference.augment,
        reference.tokenize,
        batch_size=3,
        seed=0,
        reference=CachedReference(features),
        skip_limit=1,
    )
    reference_inputs = [batch.reference_inputs[0] for batch in loader.batches(0) if len(batch.index)]
    assert sum(map(len, reference_inputs)) == 4 == 6 - loader.skipped.total()


@torch.no_grad()
def test_the_target_sees_the_crop_and_caption_of_the_view_that_is_looked_up(reference, tmp_path):
    """A reference that is also the target's architecture and size: its features of the batch are those it carries."""
    members = []
    for k in range(5):
        members += [(f"{k}.png", noise(k)), (f"{k}.json", b'{"c": ["letter a", "digit two", "arrow"]}')]
    write_tar(tmp_path / "0.tar", members)
    catalog = make_catalog(str(tmp_path / "0.tar"), tmp_path / "catalog", caption_key="json:c")
    cache_features(reference, catalog, tmp_path / "features", views=3)
    features = open_features(reference, catalog, tmp_path / "features")
    assert features.views == 3
    seen = set()

    def check(guide, epochs):
        loader = Loader(catalog, reference.augment, reference.tokenize, batch_size=5, seed=0, reference=guide)
        for epoch in range(epochs):
            (batch,) = loader.batches(epoch)
            image, text = guide.features(batch.reference_inputs, torch.device("cpu"))
            assert torch.allclose(reference.encode_image(batch.image), image, rtol=0, atol=1e-3)
            assert torch.allclose(reference.encode_tokens(batch.text), text, rtol=0, atol=1e-3)
            seen.update(tuple(row.tolist()) for row in image)

    check(CachedReference(features), 20)
    assert len(seen) == 15  # every view of every sample
    check(LiveReference(reference, 2, list), 2)
    assert len(seen) == 25


def test_one_view_goes_with_the_first_caption_and_free_crops(catalog, reference, cached):
    features = open_features(reference, catalog, cached)
    draws = visit_draws(0, 1, 7, 0)
    assert features.draws(7, draws) == draws._replace(choice=0)
    assert view_draws(7, 2) == view_draws(7, 2) != view_draws(8, 2)


def test_a_live_reference_has_its_own_size_and_tokens(catalog, reference):
    """The target takes 64 pixels and another length of context; what the reference gets is the reference's."""
    target = new_model("glyph-small", 0, force_image_size=64, force_context_length=9)
    guide = LiveReference(reference, 1, list)
    loader = Loader(catalog, target.augment, target.tokenize, batch_size=30, seed=0, workers=1, reference=guide)
    batch = next(iter(loader.batches(0)))
    loader.close()
    assert batch.image.shape[2:] == (64, 64) and batch.reference_inputs[0].shape[2:] == (32, 32)
    assert batch.reference_inputs[1].shape[1] == reference.model.context_length
    image, _ = guide.features(batch.reference_inputs, torch.device("cpu"))
    assert image.shape == (30, 64)


def test_spread_is_that_of_the_margins_of_different_pairs(catalog, reference, cached):
    image, text = torch.nn.functional.normalize(torch.randn(2, 6, 4), dim=-1)
    margins = [float(image[i] @ text[j] - image[i] @ text[i]) for i in range(6) for j in range(6) if i != j]
    assert margin_spread(image, text) == pytest.approx(torch.tensor(margins).std().item(), rel=1e-5)
    pairs = [(pair.image, pair.caption) for pair in samples(catalog, range(150))]
    features = open_features(reference, catalog, cached)
    first = features.rows(torch.arange(64))
    assert CachedReference(features).margin_spread() == pytest.approx(margin_spread(*first), rel=1e-5)
    assert LiveReference(reference, 1, lambda: pairs[:64]).margin_spread() == pytest.approx(
        margin_spread(*first), rel=1e-2
    )


def test_a_registered_model_with_a_file_of_weights_is_a_reference(reference, tmp_path):
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
