"""Risks over negatives for divergences other than KL, from tiles of anchors, against the plain form."""

import pytest
import torch
from problems import close, features

from drrho import ChiSquare, CressieRead, CVaR, negatives, tiles
from drrho.contrastive import anchor_risks, contrastive_risk


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [ChiSquare(), CVaR(0.3), CressieRead(0.5), CressieRead(1.5)])
@pytest.mark.parametrize("tile", [1, 50, 2**21])
@pytest.mark.parametrize("include_positive", [False, True])
def test_tiles_of_other_divergences(divergence, tile, include_positive, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", tile)
    monkeypatch.setattr(tiles, "ROWS", 1)
    image, text = (part.requires_grad_() for part in features(15, 6, 20))
    options = {"reference": features(15, 4, 21), "divergence": divergence, "include_positive": include_positive}
    step = contrastive_risk(image, text, 0.2, **options)
    first, second = anchor_risks(image, text, 0.2, **options)
    plain = (first.value.mean() + second.value.mean()) / 2
    assert abs(step.value - plain) <= 1e-14
    close(torch.autograd.grad(step.value, (image, text)), torch.autograd.grad(plain, (image, text)), 1e-12)
    for threshold, risk in zip(step.threshold, (first, second), strict=True):
        assert torch.allclose(threshold, risk.threshold, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tile", [1, 2**21])
def test_a_graph_that_is_kept_gives_the_gradient_twice(tile, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", tile)
    monkeypatch.setattr(tiles, "ROWS", 1)
    inputs = tuple(part.requires_grad_() for part in features(12, 4, 3))
    value = contrastive_risk(*inputs, 0.1, divergence=ChiSquare()).value
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(value, inputs), first))


@pytest.mark.parametrize("tile, solved", [(10, 12), (2**21, 2)])
def test_anchors_of_one_tile_are_solved_once(tile, solved, monkeypatch):
    """A tile in each direction, whose weights are kept; of many tiles, all are solved again."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return penalized_risk(*arguments)

    penalized_risk = negatives.penalized_risk
    monkeypatch.setattr(negatives, "penalized_risk", counted)
    monkeypatch.setattr(tiles, "TILE", tile)
    monkeypatch.setattr(tiles, "ROWS", 2)
    image, text = (part.requires_grad_() for part in features(6, 4, 3))
    contrastive_risk(image, text, 0.1, divergence=ChiSquare()).value.backward()
    assert len(calls) == solved
