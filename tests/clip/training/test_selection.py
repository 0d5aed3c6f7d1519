"""Training on chosen pairs: which they are, and what the log says of them."""

import json

import numpy as np
import pytest
import torch
from training_runs import run

from drrho.contrastive import contrastive_risk
from experiments.clip.cli.building import build_method, build_selector
from experiments.clip.distributed import Ranks
from experiments.clip.glyphs.stream import epoch_order
from experiments.clip.models.clip import new_model
from experiments.clip.run import parse
from experiments.clip.training.methods import OpenCLIP, SigLIP
from experiments.clip.training.options import Selection
from experiments.clip.training.selection import Selector

CANDIDATES = 32  # of a step, of which 8 are trained on
SHORT = parse(["train", "--epochs", "1", "--batch-size", "8", "--lr", "1e-3", "--warmup", "2"]).optimization


def remembering(method):
    """Return a method like this one, and the samples and losses of its steps."""
    steps, losses = [], []

    class Remembering(type(method)):
        def loss(self, own, index, head, epoch, reference):
            loss = super().loss(own, index, head, epoch, reference)
            steps.append(index.own.tolist())
            losses.append(loss.value.item())
            return loss

    method.__class__ = Remembering
    return method, steps, losses


def matrices(clip, reference, pairs, features, index):
    """The logits of both models with all candidates, in float64."""
    with torch.no_grad():
        batch = pairs.batch(index)
        target = clip.encode_image(batch.image).double(), clip.encode_tokens(batch.text).double()
        guide = [part.double() for part in features.features(features.rows(index), torch.device("cpu"))]
        found = []
        for (image, text), model in ((target, clip.model), (guide, reference.model)):
            bias = 0.0 if model.logit_bias is None else model.logit_bias.double()
            found.append(image @ text.T * model.logit_scale.exp().double() + bias)
    return found


def own_losses(logits, chosen, sigmoid):
    """The loss of each candidate with the chosen as its negatives: none in JEST's first part, all in RHO's rule."""
    positive = logits.diagonal()
    others = torch.zeros_like(logits).index_fill_(1, torch.tensor(chosen, dtype=torch.int64), 1.0).bool()
    if sigmoid:
        others = others & ~torch.eye(len(logits), dtype=torch.bool)
        sides = [torch.log1p(side.exp()).where(others, 0.0).sum(1) for side in (logits, logits.T)]
        return torch.log1p((-positive).exp()) + sides[0] + sides[1]
    if not chosen:
        return -positive
    sides = [side.masked_fill(~others, -torch.inf).logsumexp(1) for side in (logits, logits.T)]
    return (sides[0] + sides[1]) / 2 - positive


@pytest.mark.slow
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("rule, parts", [("rho-top-k", 1), ("jest-top-k", 1), ("jest-top-k", 3), ("jest-top-k", 8)])
def test_the_first_step_is_on_the_pairs_that_a_plain_computation_chooses(
    rule, parts, sigmoid, pairs, features, reference, tmp_path
):
    clip = new_model("glyph-micro", 0, sigmoid=sigmoid)
    index = epoch_order(len(pairs), CANDIDATES, 0, 0)[0]
    target, guide = matrices(clip, reference, pairs, features, index)
    size = -(-len(index) // 4)
    expected = []
    for part in np.array_split(np.arange(size), parts):
        among = list(range(len(index))) if rule == "rho-top-k" else expected
        excess = own_losses(target, among, sigmoid) - own_losses(guide, among, sigmoid)
        left = sorted(set(range(len(index))) - set(expected), key=lambda i, excess=excess: -excess[i])
        expected += left[: len(part)]
    selection = Selection(rule, candidates=4, select_chunks=parts)
    selector = Selector(selection, "sigmoid" if sigmoid else "softmax", reference, 0, Ranks())
    method, steps, _ = remembering(SigLIP() if sigmoid else OpenCLIP())
    run(pairs, method, tmp_path / "c", features, optimization=SHORT, selector=selector)
    assert steps[0] == index[expected].tolist()
    assert sorted(map(len, steps)) == [8] * 5
    assert len({sample for step in steps for sample in step}) == 40  # each was a candidate once


@pytest.mark.slow
def test_draws_follow_from_seed_and_step_and_differ_between_steps(pairs, features, reference, tmp_path):
    def chosen(seed, name):
        selector = Selector(Selection("jest", candidates=4, select_chunks=4), "softmax", reference, seed, Ranks())
        method, steps, _ = remembering(OpenCLIP())
        run(pairs, method, tmp_path / name / "c", features, optimization=SHORT, selector=selector)
        return steps

    first, again, other = chosen(0, "a"), chosen(0, "b"), chosen(1, "c")
    assert first == again
    assert first[0] != other[0]  # of the same candidates
    places = [
        [order.tolist().index(sample) for sample in step]
        for order, step in zip(epoch_order(len(pairs), CANDIDATES, 0, 0), first, strict=True)
    ]
    assert len(set(map(tuple, places))) == 5


@pytest.mark.slow
def test_one_candidate_for_each_pair_is_training_on_all(pairs, features, reference, tmp_path):
    selector = Selector(Selection("rho-top-k", candidates=1), "softmax", reference, 0, Ranks())
    _, expected, _ = run(pairs, OpenCLIP(), tmp_path / "a" / "c", optimization=SHORT)
    _, found, _ = run(pairs, OpenCLIP(), tmp_path / "b" / "c", features, optimization=SHORT, selector=selector)
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], abs=1e-4)
    assert [r["samples_trained"] for r in found] == [r["samples_scored"] for r in found]


@pytest.mark.slow
def test_an_unsteered_method_gets_no_reference(pairs, features, reference, tmp_path):
    """FastCLIP on chosen pairs is what it is without a reference, not DRRho on them."""
    for method in ("fastclip", "drrho"):
        options = parse(["train", "--method", method, "--temperature", "0.1", "--select", "rho-top-k"])
        selector = build_selector(options, reference, Ranks())
        chosen, _ = build_method(options.loss, 1, len(pairs), reference, features, Ranks())
        chosen, steps, losses = remembering(chosen)
        run(pairs, chosen, tmp_path / method / "c", features, optimization=SHORT, selector=selector)
        index, clip = torch.tensor(steps[0]), new_model("glyph-micro", 0)
        with torch.no_grad():
            own = clip.encode_image(pairs.pixels[index]), clip.encode_tokens(pairs.batch(index).text)
            given = features.features(features.rows(index), own[0].device) if method == "drrho" else None
            expected = contrastive_risk(*own, 0.1, reference=given).value.item()
        assert losses[0] == pytest.approx(expected, abs=1e-5)


def test_the_log_says_how_learnable_the_chosen_are(pairs, features, reference, tmp_path):
    selector = Selector(Selection("rho-top-k", candidates=4), "softmax", reference, 0, Ranks())
    run(pairs, OpenCLIP(), tmp_path / "c", features, optimization=SHORT, selector=selector)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    assert [(line["samples_scored"], line["samples_trained"]) for line in steps] == [(90, 24), (150, 40)]
    assert all(line["learnability_chosen"] > line["learnability_candidates"] for line in steps)


def test_a_batch_of_fewer_pairs_than_chunks_is_chosen_one_by_one(pairs, features, reference, tmp_path):
    """It may lack samples that were skipped."""
    ends = []
    for chunks in (4, 3):
        selector = Selector(Selection("jest", candidates=50, select_chunks=chunks), "softmax", reference, 0, Ranks())
        clip, *_ = run(pairs, OpenCLIP(), tmp_path / str(chunks), features, optimization=SHORT, selector=selector)
        ends.append(clip.model.state_dict())
    assert selector.size(150) == 3 and all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_a_trainer_without_a_reference_is_refused(pairs, reference, tmp_path):
    selector = Selector(Selection("rho-top-k"), "softmax", reference, 0, Ranks())
    with pytest.raises(ValueError, match="give the trainer a reference"):
        run(pairs, OpenCLIP(), tmp_path / "b", optimization=SHORT, selector=selector)
