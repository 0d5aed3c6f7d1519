"""The probe: pairs are scored before they are trained on, late batches count, what is wrong is named."""

from dataclasses import replace

import pytest
import torch

from drrho.advice import BATCH
from experiments.clip.data.batch import Batch
from experiments.clip.errors import UserError
from experiments.clip.models.clip import new_model
from experiments.clip.training.options import Optimization
from experiments.clip.training.probe import run_probe

OPTIONS = Optimization(lr=1e-3, betas=(0.9, 0.98), adam_eps=1e-6)


def batch(clip, size=BATCH, seed=0):
    """Noise with a name of its own."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = clip.tokenize([f"{number * 7919 % 4096:x} {number}" for number in range(size)]).to(torch.int32)
    return Batch(image, text, torch.arange(size))


@pytest.fixture
def clip():
    return new_model("glyph-micro", 0)


def test_a_pair_is_scored_before_it_is_trained_on(clip):
    """The first time pairs are seen they are at chance, however well they are learned afterwards."""
    once = run_probe(clip, iter([batch(clip)]), 1, OPTIONS)
    assert (once.seen, once.scored) == (0, BATCH)
    assert once.hits < 10
    again = run_probe(clip, iter([batch(clip)] * 45), 45, replace(OPTIONS, lr=3e-3))
    assert again.seen == pytest.approx(BATCH * 37)  # of the last 15 of 45 batches
    assert again.scored == 15 * BATCH
    assert again.hits > 150  # they are the same pairs


def test_small_batches_are_not_counted(clip):
    probe = run_probe(clip, iter([batch(clip, 90), batch(clip, 90, seed=1)]), 2, OPTIONS)
    assert probe == (0, 0, 0)


def test_data_that_end_and_losses_that_are_not_finite_are_named(clip):
    with pytest.raises(UserError, match="takes 3 steps, and the data end after 1"):
        run_probe(clip, iter([batch(clip, 16)]), 3, OPTIONS)
    with torch.no_grad():
        clip.model.logit_scale.fill_(torch.nan)
    with pytest.raises(UserError, match=r"breaks off at step 0 .*: lower --lr"):
        run_probe(clip, iter([batch(clip, 16)]), 1, OPTIONS)
