"""The reference that is run beside the target: its own inputs of the target's pairs, in parts, in any process."""

import pickle

import pytest
import torch
from PIL import Image

from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.data.draws import random_state_restored, visit_draws
from experiments.clip.data.loader import Loader
from experiments.clip.data.reader import first_pairs
from experiments.clip.models.clip import load_model, new_model
from experiments.clip.reference.live import LiveReference
from experiments.clip.reference.margins import margin_spread
from experiments.clip.training.options import SHIPPED_REFERENCE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def catalog(manifest, tmp_path_factory):
    shards = [str(manifest.folder / shard.name) for shard in manifest.splits["train"].shards]
    return make_catalog(shards, tmp_path_factory.mktemp("catalog"))


def test_a_live_reference_has_its_own_size_and_tokens(catalog, reference):
    """The target takes 64 pixels and another length of context; what the reference gets is the reference's."""
    target = new_model("glyph-small", 0, force_image_size=64, force_context_length=9)
    beside = LiveReference(reference, 1, list)
    loader = Loader(catalog, target.augment, target.tokenize, batch_size=30, seed=0, reference=beside)
    batch = next(iter(loader.batches(0)))
    assert batch.image.shape[2:] == (64, 64) and batch.reference_inputs[0].shape[2:] == (32, 32)
    assert batch.reference_inputs[1].shape[1] == reference.model.context_length
    image, _ = beside.features(batch.reference_inputs, torch.device("cpu"))
    assert image.shape == (30, 64)


def test_features_do_not_depend_on_the_number_of_parts(catalog, reference):
    images, captions = zip(*first_pairs(catalog, 7), strict=True)
    inputs = torch.stack([reference.preprocess(image) for image in images]), reference.tokenize(list(captions))
    one, three, many = (LiveReference(reference, parts, list).features(inputs, CPU) for parts in (1, 3, 100))
    for parts in (three, many):
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(parts, one, strict=True))
    empty = LiveReference(reference, 3, list).empty_inputs()
    assert [part.shape for part in LiveReference(reference, 3, list).features(empty, CPU)] == [(0, 64), (0, 64)]


def test_a_copy_in_another_process_prepares_the_same_inputs_without_weights(catalog, reference):
    beside = LiveReference(reference, 1, lambda count: [])
    packed = pickle.dumps(beside)
    assert len(packed) < 10_000_000 and pickle.loads(packed)._clip.model is None
    [(image, _)] = first_pairs(catalog, 1)
    draws = visit_draws(0, 0, 0, 0)
    with random_state_restored():
        assert torch.equal(pickle.loads(packed).image(image, draws), beside.image(image, draws))
    assert beside.draws(0, draws) == draws


@pytest.mark.slow
@torch.no_grad()
def test_the_spread_is_over_the_first_pairs_without_augmentation(catalog, reference):
    asked = []

    def first(count):
        asked.append(count)
        return first_pairs(catalog, count)

    images, captions = zip(*first_pairs(catalog, 70), strict=True)
    image = reference.encode_image(torch.stack([reference.preprocess(each) for each in images]))
    expected = margin_spread(image, reference.encode_text(captions))
    assert LiveReference(reference, 1, first).margin_spread(70) == pytest.approx(expected, rel=1e-5)
    LiveReference(reference, 1, first).margin_spread(10_000)
    assert asked == [70, 1024]


@pytest.mark.slow
def test_a_compiled_reference_has_the_features_of_one_that_is_not(monkeypatch):
    generating = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: generating(function, backend="aot_eager"))
    plain, compiled = load_model(SHIPPED_REFERENCE), load_model(SHIPPED_REFERENCE)
    compiled.compile()
    images = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = images, plain.tokenize(["latin small letter a", "digit one", "letter b"] * 3)
    both = (LiveReference(each, 2, list).features(inputs, CPU) for each in (plain, compiled))
    for expected, found in zip(*both, strict=True):
        assert torch.equal(found, expected)
    pairs = [(Image.new("RGB", (40, 40), (9 * k, 80, 90)), f"letter {k}") for k in range(5)]
    spreads = [LiveReference(each, 1, lambda count: pairs).margin_spread(5) for each in (plain, compiled)]
    assert spreads[0] == spreads[1]
