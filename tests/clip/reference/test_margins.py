"""The spread of margins, against its definition."""

import pytest
import torch

from experiments.clip.reference.margins import margin_spread


def test_spread_is_that_of_the_margins_of_different_pairs():
    image, text = torch.nn.functional.normalize(torch.randn(2, 6, 4), dim=-1)
    margins = [float(image[i] @ text[j] - image[i] @ text[i]) for i in range(6) for j in range(6) if i != j]
    assert margin_spread(image, text) == pytest.approx(torch.tensor(margins).std().item(), rel=1e-5)
    assert margin_spread(image.half(), text.half()) == pytest.approx(torch.tensor(margins).std().item(), rel=1e-2)
