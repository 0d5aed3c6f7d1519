"""Tiles of the similarity matrix against the plain form of the contrastive risk."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import close, features

from drrho import ChiSquare, CressieRead, CVaR, tiles
from drrho.contrastive import (
    anchor_risks,
    contrastive_risk,
)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    pairs=st.integers(2, 40),
    temperature=st.floats(-3, 1).map(lambda power: 10**power),
    tile=st.sampled_from([1, 7, 64, 2**21]),
    steered=st.booleans(),
    coefficient=st.sampled_from([1.0, 0.3, 0.0]),
    include_positive=st.booleans(),
    individual=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_tiles_are_the_plain_form(pairs, temperature, tile, steered, coefficient, include_positive, individual, dtype):
    image, text = (part.requires_grad_() for part in features(pairs, 7, pairs, dtype))
    tau = torch.tensor(temperature, dtype=dtype)
    taus = (tau * torch.linspace(0.5, 2, pairs, dtype=dtype), tau * torch.linspace(3, 1, pairs, dtype=dtype))
    options = {
        "reference": features(pairs, 5, pairs + 1, dtype) if steered else None,
        "coefficient": coefficient,
        "include_positive": include_positive,
    }
    held, (tiles.TILE, tiles.ROWS) = (tiles.TILE, tiles.ROWS), (tile, 1)
    try:
        step = contrastive_risk(image, text, taus if individual else tau, **options)
        ours = torch.autograd.grad(step.value, (image, text))
    finally:
        tiles.TILE, tiles.ROWS = held
    first, second = anchor_risks(image, text, taus if individual else tau, **options)
    plain = (first.value.mean() + second.value.mean()) / 2
    # Sums of b exponentials are known to eps, and so their logarithms absolutely.
    eps = torch.finfo(dtype).eps
    absolute = 8 * eps * (float(max(map(torch.max, taus))) * math.log(2 * pairs) + 4)
    assert abs(step.value - plain) <= absolute
    close(ours, torch.autograd.grad(plain, (image, text)), 64 * eps * (1 + 2 / float(min(map(torch.min, taus)))))
    for ours, theirs in zip(step.risks, (first, second), strict=True):
        assert (ours - theirs.value).abs().max() <= absolute


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
