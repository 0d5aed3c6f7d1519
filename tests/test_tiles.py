"""Tiles of the similarity matrix against the plain form of the contrastive risk."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import close, features

from drrho import tiles
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
    steered=st.sampled_from([None, 1.0, 0.3, 0.0]),
    include_positive=st.booleans(),
    individual=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_tiles_are_the_plain_form(pairs, temperature, tile, steered, include_positive, individual, dtype):
    image, text = (part.requires_grad_() for part in features(pairs, 7, pairs, dtype))
    tau = torch.tensor(temperature, dtype=dtype)
    taus = (tau * torch.linspace(0.5, 2, pairs, dtype=dtype), tau * torch.linspace(3, 1, pairs, dtype=dtype))
    options = {
        "reference": None if steered is None else features(pairs, 5, pairs + 1, dtype),
        "coefficient": 1.0 if steered is None else steered,
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
