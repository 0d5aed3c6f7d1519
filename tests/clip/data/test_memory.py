"""Pairs that stay in memory: the bits of those that are read at every visit, read once."""

import pytest
import torch
from tars import pair, write_tar

from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.data import memory
from experiments.clip.data.loader import Loader
from experiments.clip.models.clip import new_model
from experiments.clip.reference.cache import cache_features, open_features


@pytest.fixture(scope="module")
def clip():
    return new_model("glyph-micro", 0)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    damaged = [("d.png", b"no image"), ("d.txt", b"caption")]
    write_tar(folder / "0.tar", [*(member for n in range(20) for member in pair(n)), *damaged])
    return make_catalog(str(folder / "*.tar"), folder / "catalog")


def make(catalog, clip, in_memory, **options):
    return Loader(
        catalog, clip.in_bytes(clip.preprocess), clip.tokenize, batch_size=8, seed=1, in_memory=in_memory, **options
    )


def test_batches_are_those_of_pairs_that_are_read_each_time(catalog, clip, monkeypatch):
    for options in ({}, {"rank": 1, "ranks": 2}, {"resampled": True, "epoch_samples": 60}):
        kept, read = make(catalog, clip, True, **options), make(catalog, clip, False, **options)
        for epoch in range(2):
            for one, other in zip(kept.batches(epoch), read.batches(epoch), strict=True):
                assert all(torch.equal(one[part], other[part]) for part in range(3))
                assert (one.skipped, one.size, one.text.dtype) == (other.skipped, other.size, other.text.dtype)


def test_a_sample_is_decoded_once(catalog, clip, monkeypatch):
    decoded = []
    original = memory.decode
    monkeypatch.setattr(memory, "decode", lambda raw: decoded.append(raw.index) or original(raw))
    loader = make(catalog, clip, True)
    for epoch in range(3):
        assert sum(sum(batch.skipped.values()) for batch in loader.batches(epoch)) == 1
    assert sorted(decoded) == list(range(21))


def test_cached_features_stand_beside(catalog, clip, tmp_path):
    clip.model.eval()
    cache_features(clip, catalog, tmp_path)
    features = open_features(clip, catalog, tmp_path)
    for batch in make(catalog, clip, True, reference=features).batches(0):
        assert all(
            torch.equal(one, other)
            for one, other in zip(batch.reference_inputs, features.rows(batch.index), strict=True)
        )


@pytest.mark.parametrize("options", [{"workers": 1}, {"reading": "blocks"}], ids=["workers", "blocks"])
def test_workers_and_blocks_are_refused(options, catalog, clip):
    with pytest.raises(ValueError, match="in_memory needs workers 0 and reading random"):
        make(catalog, clip, True, **options)
