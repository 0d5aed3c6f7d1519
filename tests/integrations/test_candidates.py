"""Steered risks of anchors over candidates of any number, held equal to the core's and to their definitions."""

import math

import pytest
import torch
from families import EVERY
from torch.nn.functional import cross_entropy, normalize

from drrho import KL, ChiSquare, CVaR, penalized_risk
from drrho.contrastive import anchor_risks, contrastive_risk
from drrho.integrations.candidates import Candidates, cosine

GIST = ("query_to_doc", "query_to_query", "doc_to_doc")


def columns(count=2, rows=9, width=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator, dtype=dtype) for _ in range(count)]


def losses(candidates, own, guides=(), part=None):
    rows = torch.arange(len(own[0]))
    return candidates.losses(own, guides, rows if part is None else rows[part])


@pytest.mark.parametrize("divergence", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("coefficient", [0.0, 0.5, 1.0])
def test_both_directions_are_the_contrastive_risk(divergence, coefficient):
    own, guides = columns(), columns(width=4, seed=1)
    for each in own:
        each.requires_grad_()
    steer = {"divergence": divergence, "coefficient": coefficient}
    directions = ("query_to_doc", "doc_to_query")
    mine = losses(Candidates(**steer, scale=10.0, directions=directions, per_direction=True), own, guides).mean()
    unit, reference = ([normalize(each, dim=-1) for each in pair] for pair in (own, guides))
    step = contrastive_risk(*unit, 0.1, reference=reference, include_positive=True, **steer)
    expected = step.value / 0.1 + (math.log(9) if divergence.has_exponential_weights else 0.0)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-9)
    for one, other in zip(*(torch.autograd.grad(value, own) for value in (mine, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_hard_negatives_are_further_candidates():
    own, guides = columns(4), columns(4, width=4, seed=1)
    s, r = (cosine(anchor, torch.cat(rest)) for anchor, *rest in (own, guides))
    place = torch.arange(9)
    excess = (s - s[place, place, None]) - 0.7 * (r - r[place, place, None])
    for divergence in (KL(), ChiSquare(), CVaR(0.3)):
        found = losses(Candidates(divergence, 0.7, scale=5.0), own, guides)
        constant = math.log(27) if divergence == KL() else 0.0
        expected = 5 * penalized_risk(excess, divergence, 0.2).value + constant
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    found = losses(Candidates(KL(), 0.7, scale=5.0), own, guides)
    torch.testing.assert_close(found, cross_entropy(5 * (s - 0.7 * r), place, reduction="none"))


@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("directions", [("query_to_doc",), GIST], ids=len)
def test_a_growing_coefficient_tends_to_the_mask(strategy, directions):
    own, guides = columns(seed=2), columns(width=4, seed=3)
    shared = {"margin": 0.05, "margin_strategy": strategy, "directions": directions}
    hard = losses(Candidates(coefficient=math.inf, **shared), own, guides)
    errors = [(losses(Candidates(coefficient=c, **shared), own, guides) - hard).abs().max() for c in (1.0, 10.0, 1e3)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-2
    assert errors[-1] < 1e-9
    assert (hard - losses(Candidates(directions=directions), own)).abs().max() > 1e-2  # the mask leaves something out


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.3)], ids=str)
def test_what_the_mask_leaves_out_has_no_weight(divergence):
    own, guides = columns(), columns(width=4, seed=1)
    r = cosine(*guides)
    keep = (r <= r.diagonal()[:, None]) | torch.eye(9, dtype=torch.bool)
    s = cosine(*own)
    for row, found in enumerate(losses(Candidates(divergence, math.inf, 0.0, scale=5.0), own, guides)):
        kept = (s[row] - s[row, row])[keep[row]]
        constant = math.log(len(kept)) if divergence == KL() else 0.0
        torch.testing.assert_close(found, 5 * penalized_risk(kept, divergence, 0.2).value + constant)


def test_parts_of_the_anchors_are_those_of_the_whole():
    own, guides = columns(3), columns(3, width=4, seed=1)
    candidates = Candidates(margin=0.1, directions=(*GIST, "doc_to_query"))
    parts = [losses(candidates, own, guides, part) for part in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(torch.cat(parts), losses(candidates, own, guides))


def test_narrow_embeddings_are_compared_in_float32():
    own, guides = ([each.bfloat16() for each in columns(seed=seed)] for seed in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(Candidates(scale=100.0), own, guides)
    expected = losses(Candidates(scale=100.0), *([each.float() for each in part] for part in (own, guides)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_weights_are_those_of_the_core():
    own, guides = ([normalize(each, dim=-1) for each in columns(seed=seed)] for seed in (0, 1))
    scores = cosine(*own).requires_grad_()
    similarity = lambda left, right: scores[: len(left), : len(right)]  # noqa: E731
    Candidates(scale=10.0).losses(own, guides, torch.arange(9), similarity).sum().backward()
    first, _ = anchor_risks(*own, 0.1, reference=tuple(guides), include_positive=True)
    torch.testing.assert_close(scores.grad / 10 + torch.eye(9), first.weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": math.nan}, "coefficient must be finite, or infinite with a margin, got nan"),
        ({"coefficient": math.inf}, "coefficient must be finite, or infinite with a margin, got inf"),
        ({"coefficient": -math.inf, "margin": 0.0}, "coefficient must be finite, or infinite with a margin, got -inf"),
        ({"margin": math.nan}, "margin must be finite, got nan"),
        ({"margin_strategy": "percentile"}, "margin_strategy must be 'absolute' or 'relative', got 'percentile'"),
        ({"scale": 0.0}, "scale must be finite and > 0, got 0.0"),
        ({"scale": math.inf}, "scale must be finite and > 0, got inf"),
        ({"divergence": "kl"}, "divergence must be a Divergence such as KL"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Candidates(**options)


def test_batches_that_cannot_be_compared_are_refused():
    own = columns()
    with pytest.raises(ValueError, match="one pair has no negatives: leave it out"):
        losses(Candidates(), columns(rows=1))
    assert losses(Candidates(), columns(3, rows=1)).shape == (1,)
    with pytest.raises(ValueError, match=r"an anchor, a positive .* got 1 columns"):
        losses(Candidates(), own[:1])
    with pytest.raises(ValueError, match="must embed the 2 columns of 9 texts"):
        losses(Candidates(), own, columns(3))
    with pytest.raises(ValueError, match="must embed the 2 columns of 9 texts"):
        losses(Candidates(), own, columns(rows=8))
    for bad in (math.nan, math.inf):
        guides = columns()
        guides[1][3, 2] = bad
        with pytest.raises(ValueError, match="the guide's embeddings are not finite"):
            losses(Candidates(), own, guides)
