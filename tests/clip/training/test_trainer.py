"""The trainer on real pairs: what a step computes, and resuming without loss."""

import dataclasses
import json
import math

import pytest
import torch
from families import thorough
from training_runs import SETTINGS, SHORT, built, contrastive, run

from experiments.clip.errors import Interrupted, UserError
from experiments.clip.glyphs.stream import PreparedPairs, epoch_order
from experiments.clip.models.clip import load_model, new_model
from experiments.clip.models.export import export_model
from experiments.clip.training.methods import SigLIP
from experiments.clip.training.options import Optimization
from experiments.clip.training.state import best_record


@pytest.mark.parametrize("name", thorough(SETTINGS, ("drrho",)))
def test_stopped_anywhere_and_resumed_ends_at_the_same_bits(name, pairs, features, reference, tmp_path):
    """Every method, as the command line builds it."""
    given = (pairs, features, reference)
    whole, history, _ = run(pairs, checkpoints=tmp_path / "whole" / "c", **built(name, *given))
    checkpoint = tmp_path / "parts" / "c"
    for steps in (3, 4):
        left = iter([False] * (steps - 1) + [True])
        with pytest.raises(Interrupted, match="of 10"):
            run(pairs, checkpoints=checkpoint, stop=lambda left=left: next(left), **built(name, *given))
    resumed, again, _ = run(pairs, checkpoints=checkpoint, **built(name, *given))
    assert again == history
    trained = [75, 150] if "on" in name.split() else [150, 300]
    assert [(r["samples_scored"], r["samples_trained"]) for r in history] == list(zip([150, 300], trained, strict=True))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert all(math.isfinite(value) for record in history for value in record.values())


@pytest.mark.parametrize("name", thorough(SETTINGS, ("drrho", "siglip on jest")))
def test_a_pair_alone_in_its_batch_is_passed_over(name, pairs, features, reference, tmp_path):
    """Of 7 pairs in batches of 2 the last is alone, once in an epoch; the other steps are taken."""
    selects, few = " on " in name, pairs.first(7)
    optimization = dataclasses.replace(SHORT, batch_size=4 if selects else 2)
    given = built(name, few, features, reference, optimization)
    clip, history, _ = run(few, checkpoints=tmp_path / "c", **given)
    assert all(bool(value.isfinite().all()) for value in clip.model.state_dict().values())
    chosen = 4 if selects else 6  # of two batches with selection, of 4 and 3 candidates, two each
    assert [(r["samples_scored"], r["samples_trained"]) for r in history] == [(7, chosen), (14, 2 * chosen)]
    assert all(math.isfinite(record["loss"]) for record in history)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(line.get("skipped/alone in its batch", 0) for line in lines) == (0 if selects else 2)


def test_a_run_in_which_every_pair_is_alone_says_so(pairs, tmp_path):
    with pytest.raises(UserError, match="none of the 2 steps had 2 pairs to compare"):
        run(pairs.first(1), contrastive(), tmp_path / "c")


@pytest.mark.slow
def test_a_model_with_a_sigmoid_head_is_exported_with_it(pairs, tmp_path):
    clip, *_ = run(pairs, SigLIP(), tmp_path / "c")
    export_model(clip, tmp_path / "model")
    again = load_model(tmp_path / "model").model
    assert torch.equal(again.logit_bias, clip.model.logit_bias)
    assert float(again.logit_bias.detach()) != -10.0


@pytest.mark.slow
def test_training_lowers_the_loss(manifest, tmp_path):
    clip = new_model("glyph-small", 0)
    pairs = PreparedPairs(manifest, "train", clip)
    _, history, _ = run(
        pairs,
        contrastive(len(pairs), 12),
        tmp_path / "c",
        clip=clip,
        optimization=Optimization(epochs=12, batch_size=32, lr=2e-3, warmup=5),
    )
    assert history[-1]["loss"] < history[0]["loss"] - 0.01


class Poisoned(PreparedPairs):
    """The pairs as floats, of which sample 77 has an image that is not finite."""

    def __init__(self, pairs):
        self.__dict__ = pairs.__dict__

    def batch(self, index, size=0):
        batch = super().batch(index, size)
        images = batch.image.float() / 255
        images[index == 77] = torch.inf
        return batch._replace(image=images)


@pytest.mark.slow
def test_a_step_that_is_not_finite_ends_the_run_or_is_passed_over_and_its_samples_are_written_down(pairs, tmp_path):
    poisoned = Poisoned(pairs)
    for name in "abd":
        (tmp_path / name).mkdir()
    (wrong,) = [k for k, batch in enumerate(epoch_order(150, 32, 0, 0)) if 77 in batch]
    with pytest.raises(
        UserError, match=f"the features are not finite at step {wrong}, whose samples are in .*nonfinite"
    ):
        run(poisoned, contrastive(), tmp_path / "a" / "c")
    (line,) = (tmp_path / "a" / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line)["samples"] == epoch_order(150, 32, 0, 0)[wrong].tolist()
    clip, history, _ = run(poisoned, contrastive(), tmp_path / "b" / "c", limit=2)
    assert all(bool(torch.isfinite(value).all()) for value in clip.model.state_dict().values())
    assert len((tmp_path / "b" / "nonfinite.jsonl").read_text().splitlines()) == 2
    assert history[-1]["step"] == 10
    with pytest.raises(UserError, match="the features are not finite at step"):
        run(poisoned, contrastive(), tmp_path / "d" / "c", limit=1)


@pytest.mark.parametrize(
    "metric, values, best",
    [
        ("imagenet1k/acc1", (0.1, 0.3, 0.3, 0.2), 2),
        ("held_out/loss", (3.0, 1.0, 2.0, 1.0), 2),
        ("held_out/image_to_text_mean_rank", (8.0, 9.0, 5.0, 5.0), 3),
        ("held_out/image_to_text_R@1", (0.0, 0.0, 0.1, 0.2), 4),
    ],
)
def test_the_best_validation_is_the_lowest_of_losses_and_ranks(metric, values, best):
    history = [{"step": step, metric: value} for step, value in enumerate(values, 1)]
    assert best_record(history, metric)["step"] == best


class Wrong:
    """A reference whose features of sample 77 are not finite."""

    def __init__(self, features):
        self._features = features

    def __getattr__(self, name):
        return getattr(self._features, name)

    def rows(self, index, view=0):
        image, text = self._features.rows(index, view)
        return torch.where((index == 77)[:, None], torch.nan, image), text

    def collate(self, index, draws, images, captions):
        return self.rows(index)


@pytest.mark.slow
def test_a_step_with_reference_features_that_are_not_finite_is_passed_over_and_written_down(pairs, features, tmp_path):
    (tmp_path / "a").mkdir()
    clip, _, _ = run(pairs, contrastive(), tmp_path / "a" / "c", features=Wrong(features), limit=2)
    lines = (tmp_path / "a" / "nonfinite.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(77 in json.loads(line)["samples"] for line in lines)
    assert all(bool(torch.isfinite(value).all()) for value in clip.model.state_dict().values())
