"""The embedded pairs that a run trains on."""

import subprocess
import sys

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


@pytest.mark.slow
def test_a_run_waits_for_the_features_of_its_own_reference_alone(glyph_cache, reference, tmp_path):
    """Another process computes those of another reference on the same pairs."""
    manifest = prepare(Data("swapped", "small", glyph_cache))
    glyph_features(reference, manifest, tmp_path)
    (own,) = tmp_path.glob(".features-*.lock")
    other = own.with_name(own.name.replace(reference.fingerprint[:12], "another"))
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold, other], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout.readline() == "1\n"
        assert other != own and len(glyph_features(reference, manifest, tmp_path)) == 150
        process.communicate("\n")
