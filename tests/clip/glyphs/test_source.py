"""The embedded pairs that a run trains on."""

import pytest
import torch

from experiments.clip.cli.options import Data, Train
from experiments.clip.errors import UserError
from experiments.clip.glyphs.source import ALONE, glyph_features, glyph_material, load_pairs, prepare
from experiments.clip.models.clip import new_model
from experiments.clip.reference.inputs import CachedGuide, margin_spread


def test_a_smaller_share_of_the_pairs_is_part_of_a_larger(glyph_cache, reference):
    data, clip = Data("swapped", "small", glyph_cache), new_model("glyph-tiny", 0)
    pairs = load_pairs(prepare(data), "train", clip)
    for fraction, samples in ((1.0, 150), (0.3, 45), (0.1, 15)):
        options = Train(model="glyph-tiny", fraction=fraction, data=data)
        material = glyph_material(options, clip, reference, ALONE)
        (batch,) = material.stream.batches(0, 0)
        assert (material.samples, material.identity["fraction"]) == (samples, fraction)
        assert sorted(batch.index.tolist()) == list(range(samples))
        assert torch.equal(batch.image, pairs.images(batch.index))
        # The automatic temperature rests on no pair outside of the share.
        features = glyph_features(reference, prepare(data), data.cache).rows(torch.arange(min(samples, 64)))
        assert isinstance(material.guide, CachedGuide)
        assert material.guide.spread() == pytest.approx(margin_spread(*features), rel=1e-5)
    with pytest.raises(UserError, match=r"--fraction 0\.007 leaves 1 of 150"):
        glyph_material(Train(data=data, fraction=0.007), clip, None, ALONE)
