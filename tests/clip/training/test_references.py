"""The target's own average as the reference, and a mixture of several: what they are, what a step makes of them."""

import dataclasses
import json

import pytest
import torch
from training_runs import HEAD, SHORT, contrastive, run, trainer_of

from drrho.mixture import mixed_references
from drrho.routes import BatchIndex
from drrho.validation import deferred_checks
from experiments.clip.distributed import ONE_PROCESS
from experiments.clip.models.clip import new_model
from experiments.clip.training.methods import Outcome
from experiments.clip.training.optimization import MovingAverage
from experiments.clip.training.options import Execution
from experiments.clip.training.references import Mixed, SelfReference


def moved(clip, by):
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(by)


def test_its_features_are_those_of_the_averaged_weights_in_evaluation_mode(pairs):
    clip = new_model("glyph-micro", 0, force_patch_dropout=0.5)
    own = SelfReference(clip, 0.5, Execution(), ONE_PROCESS)
    expected = MovingAverage(clip.model.state_dict(), 0.5)
    for step in range(3):
        moved(clip, 0.01 * (step + 1))
        for average in (own.average, expected):
            average.update(clip.model.state_dict(), torch.tensor(step != 1))
    averaged = new_model("glyph-micro", 1)
    averaged.model.load_state_dict(expected.average)
    averaged.model.eval()
    index = torch.arange(9)
    batch = pairs.batch(index)
    with torch.no_grad():
        wanted = averaged.encode_image(batch.image), averaged.encode_tokens(batch.text)
    for parts in (1, 3):
        found = own.features(batch, BatchIndex.gathered(index), parts)
        for side, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert torch.allclose(one, other, rtol=0, atol=1e-5), (parts, side)
            assert not one.requires_grad
    assert clip.model.training and all(each.requires_grad for each in clip.model.parameters())


def test_a_run_follows_its_own_average_and_begins_with_equal_weights_of_all_negatives(pairs, tmp_path):
    """At the first step both models are one: no negative is preferred. The average is that of ``--ema``."""
    optimization = dataclasses.replace(SHORT, ema=0.9)
    trainer = trainer_of(pairs, contrastive(), tmp_path / "c", optimization=optimization, self_reference=0.9)
    trainer.fit()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[0]["effective_negatives"] > log[-2]["effective_negatives"]
    state = trainer.state
    assert state.self_reference.average.keys() == state.average.average.keys()
    for key, value in state.average.average.items():
        assert torch.equal(value, state.self_reference.average[key]), key
    image, text = torch.nn.functional.normalize(torch.randn(2, 6, 4), dim=-1)
    index = BatchIndex.gathered(torch.arange(6))
    found = contrastive().loss((image, text), index, HEAD, 0, (image, text))
    effective = found.log["effective_negatives"]
    assert effective.finish(effective.part.item()) == pytest.approx(5)


def test_a_run_with_its_average_is_another_than_one_without(pairs, tmp_path):
    _, plain, _ = run(pairs, contrastive(), tmp_path / "a" / "c")
    _, steered, _ = run(pairs, contrastive(), tmp_path / "b" / "c", self_reference=0.9)
    assert plain[-1]["loss"] != steered[-1]["loss"]


def test_a_mixture_steers_by_its_weights_from_before_the_step_and_learns_after_it():
    generator = torch.Generator().manual_seed(0)
    own, good, noise = torch.nn.functional.normalize(torch.randn(3, 8, 6, generator=generator), dim=-1)
    other = torch.nn.functional.normalize(torch.randn(8, 6, generator=generator), dim=-1)
    guides = [(good, good), (good, noise)]
    side_by_side, index = mixed_references(guides), BatchIndex.gathered(torch.arange(8))
    method = Mixed(contrastive(8), (6, 6), [10.0, 10.0])
    for weights in ([0.5, 0.5], None):
        found = method.loss((own, other), index, HEAD, 0, side_by_side)
        expected = [found.log[f"reference_weight/{k}"].item() for k in range(2)]
        assert weights is None or expected == pytest.approx(weights)
        fresh = contrastive(8).loss((own, other), index, HEAD, 0, mixed_references(guides, expected))
        if weights is not None:
            assert found.value.item() == pytest.approx(fresh.value.item(), rel=1e-5)
            with deferred_checks():
                method.step(found, 1.0, 1.0, Outcome(torch.tensor(False), torch.tensor(False)))
            assert method.loss((own, other), index, HEAD, 0, side_by_side).log["reference_weight/0"].item() == 0.5
            method.step(found, 1.0, 1.0, Outcome(torch.tensor(True), torch.tensor(True)))
        else:
            assert expected[0] > 0.5
    again = Mixed(contrastive(8), (6, 6), [10.0, 10.0])
    again.load_state_dict([method.state_dict()])
    assert torch.equal(again.state_dict()["mixture"], method.state_dict()["mixture"])
    assert again.state_dict().keys() == {"running.log_u", "running.offset", "running.samples", "mixture"}
