"""The embedded pairs that a run trains on."""

import pytest
import torch

from experiments.clip.cli.options import Data, Train
from experiments.clip.distributed import ONE_PROCESS
from experiments.clip.errors import UserError
from experiments.clip.glyphs.source import glyph_features, load_pairs, open_data, prepare
from experiments.clip.icons.options import Prepare
from experiments.clip.icons.source import run_prepare
from experiments.clip.models.clip import new_model
from experiments.clip.reference.cache import CachedReference
from experiments.clip.reference.margins import margin_spread


@pytest.mark.slow
def test_a_smaller_share_of_the_pairs_is_part_of_a_larger(glyph_cache, reference):
    data, clip = Data("swapped", "small", glyph_cache), new_model("glyph-tiny", 0)
    pairs = load_pairs(prepare(data), "train", clip)
    for fraction, samples in ((1.0, 150), (0.3, 45), (0.1, 15)):
        options = Train(model="glyph-tiny", fraction=fraction, data=data)
        opened = open_data(options, clip, reference, ONE_PROCESS)
        (batch,) = opened.stream.batches(0, 0)
        assert (opened.samples, opened.identity["fraction"]) == (samples, fraction)
        assert sorted(batch.index.tolist()) == list(range(samples))
        assert torch.equal(batch.image, pairs.pixels[batch.index])
        # The automatic temperature rests on no pair outside of the share.
        features = glyph_features(reference, prepare(data), data.cache).rows(torch.arange(min(samples, 64)))
        assert isinstance(opened.reference, CachedReference)
        assert opened.reference.margin_spread(samples) == pytest.approx(margin_spread(*features), rel=1e-5)
    with pytest.raises(UserError, match=r"--fraction 0\.007 leaves 1 of 150"):
        open_data(Train(data=data, fraction=0.007), clip, None, ONE_PROCESS)


def test_the_command_says_that_it_reuses_what_is_there(glyph_cache, capsys):
    run_prepare(Prepare(data=Data("swapped", "small", glyph_cache)))
    assert "reusing" in capsys.readouterr().out
