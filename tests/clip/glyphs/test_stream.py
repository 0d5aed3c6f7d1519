"""Pairs in memory: a model's own preprocessing, kept for the next run, and the batches of an epoch."""

import pytest
import torch

from experiments.clip.glyphs.dataset import read_samples
from experiments.clip.glyphs.stream import MemoryStream, PreparedPairs, epoch_order
from experiments.clip.models.clip import new_model


def test_pairs_in_memory_are_open_clips_preprocessing_row_by_row(manifest):
    clip = new_model("glyph-small", 0)
    pairs = PreparedPairs(manifest, "train", clip)
    samples = list(read_samples(manifest, "train"))
    batch = pairs.batch(torch.tensor([149, 0, 63, 64]))
    for row, index in enumerate(batch.index.tolist()):
        assert torch.equal(clip.prepared(batch.image[row][None])[0], clip.preprocess(samples[index].image))
        assert torch.equal(clip.prepared_tokens(batch.text[row]), clip.tokenize([samples[index].caption])[0])


@pytest.mark.slow
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


def test_every_sample_once_per_epoch_in_batches_of_even_size():
    order = epoch_order(150, 32, seed=1, epoch=3)
    assert sorted(torch.cat(order).tolist()) == list(range(150))
    assert {len(batch) for batch in order} == {30}
    assert {len(batch) for batch in epoch_order(151, 32, seed=1, epoch=3)} == {30, 31}
    again, later = epoch_order(150, 32, seed=1, epoch=3), epoch_order(150, 32, seed=1, epoch=4)
    assert all(torch.equal(a, b) for a, b in zip(order, again, strict=True))
    assert not torch.equal(order[0], later[0])


def test_ranks_have_contiguous_parts_of_the_batches_of_one(manifest):
    pairs = PreparedPairs(manifest, "train", new_model("glyph-small", 0)).first(70)
    alone = [batch.index for batch in MemoryStream(pairs, 16, seed=3).batches(epoch=1, first=2)]
    parts = [[batch.index for batch in MemoryStream(pairs, 16, 3, rank, 3).batches(1, 2)] for rank in range(3)]
    assert len(alone) == 3  # of five batches, without the first two
    for whole, *shares in zip(alone, *parts, strict=True):
        assert torch.equal(whole, torch.cat(shares))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
