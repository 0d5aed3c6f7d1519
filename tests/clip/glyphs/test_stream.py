"""Pairs in memory: open_clip's own preprocessing, kept in a file that is made again if it is damaged."""

import torch

from experiments.clip.glyphs.dataset import read_samples
from experiments.clip.glyphs.stream import Pairs
from experiments.clip.models.clip import new_model


def test_pairs_in_memory_are_open_clips_preprocessing_row_by_row(manifest):
    clip = new_model("glyph-small", 0)
    pairs = Pairs(manifest, "train", clip)
    samples = list(read_samples(manifest, "train"))
    batch = pairs.batch(torch.tensor([149, 0, 63, 64]))
    for row, index in enumerate(batch.index.tolist()):
        assert torch.allclose(batch.image[row], clip.preprocess(samples[index].image), rtol=0, atol=1e-6)
        assert torch.equal(batch.text[row], clip.tokenize([samples[index].caption])[0])


def test_prepared_pairs_are_kept_and_made_again_where_they_are_damaged(manifest):
    clip = new_model("glyph-small", 0)
    Pairs(manifest, "test", clip)
    first = Pairs(manifest, "test", clip)  # from the kept file, whoever made it
    [kept] = manifest.folder.glob("prepared-test-*")
    whole = kept.read_bytes()
    calls: list[int] = []
    again = Pairs(manifest, "test", clip, calls.append)
    assert not calls  # nothing was decoded
    assert torch.equal(first.pixels, again.pixels)
    assert (first.captions, first.names) == (again.captions, again.names)
    for damaged in (b"", whole[:-1], whole[:-100] + bytes(100), whole.replace(b"letter", b"Letter", 1)):
        kept.write_bytes(damaged)
        again = Pairs(manifest, "test", clip, calls.append)
        assert calls.pop() == len(first)
        assert torch.equal(first.pixels, again.pixels) and first.captions == again.captions
