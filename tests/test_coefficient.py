"""The adaptive coefficient of the reference against its definition."""

import math

import pytest
import torch
from problems import features
from torch.nn.functional import normalize

from drrho.coefficient import AdaptiveCoefficient, covariances_within_anchors, within_anchors
from drrho.contrastive import contrastive_risk
from drrho.validation import deferred_checks


def moments_by_definition(a, b):
    """Covariance over each anchor's negatives, one anchor after the other, and the mean over all of a side."""
    first, second = a[0] @ a[1].T, b[0] @ b[1].T
    sides = []
    for s, r in ((first, second), (first.T, second.T)):
        total = []
        for i in range(len(s)):
            negatives = [j for j in range(len(s)) if j != i]
            x, y = s[i, negatives] - s[i, i], r[i, negatives] - r[i, i]
            total.append(((x - x.mean()) * (y - y.mean())).mean())
        sides.append(torch.stack(total).mean().item())
    return sides


@pytest.mark.parametrize("pairs", [2, 3, 19])
def test_moments_are_those_of_the_negatives_by_side(pairs):
    own, guide = features(pairs, 6, 5), features(pairs, 4, 6)
    for model in (guide, own):
        expected = moments_by_definition(model, guide)
        assert within_anchors(model, guide) == pytest.approx(expected, abs=1e-13)


def test_coefficient_minimizes_the_variance_of_the_excess():
    own, guide = features(40, 6, 7), features(40, 4, 8)
    own = tuple(normalize(torch.cat([x, 0.8 * y], 1), dim=1) for x, y in zip(own, guide, strict=True))
    best = AdaptiveCoefficient().update(*own, reference=guide)
    assert 0.1 < best < 0.9

    def spread(c):
        pairs = (own, own), (own, guide), (guide, guide)
        first, second, third = (sum(moments_by_definition(*models)) / 2 for models in pairs)
        return first - 2 * c * second + c * c * third

    assert spread(best) <= min(spread(best - 1e-3), spread(best + 1e-3))
    # Subtracting it is what the option does.
    step = contrastive_risk(*own, 0.1, reference=guide, coefficient=best)
    assert step.risks[0].mean() < contrastive_risk(*own, 0.1).risks[0].mean()


def test_coefficient_averages_is_clipped_and_comes_back_from_its_state():
    guide = features(20, 4, 9)
    opposite = (guide[0], -guide[1])
    coefficient = AdaptiveCoefficient(rate=0.25)
    assert coefficient.value == 0.0
    assert coefficient.update(*guide, reference=guide) == pytest.approx(1.0, abs=1e-12)
    assert coefficient.update(*opposite, reference=guide) == pytest.approx(0.75 - 0.25, abs=1e-12)
    again = AdaptiveCoefficient(rate=0.25)
    again.load_state_dict(coefficient.state_dict())
    assert again.value == coefficient.value
    for _ in range(9):
        coefficient.update(*opposite, reference=guide)
        again.update(*opposite, reference=guide)
    assert coefficient.value == again.value == 0.0
    doubled = AdaptiveCoefficient()
    assert doubled.update(3 * guide[0], guide[1], reference=guide) == 1.0
    constant = torch.ones_like(guide[0]) / 2
    assert AdaptiveCoefficient().update(*guide, reference=(constant, constant)) == 0.0


@pytest.mark.parametrize("spread", [1.0, 3e-2, 3e-3, 1e-3])
def test_coefficient_of_features_that_lie_close_together(spread):
    """As those of an untrained model do: similarities in float32 then differ in their last digits."""
    generator = torch.Generator().manual_seed(3)

    def drawn(columns, noise):
        center = torch.randn(1, columns, generator=generator, dtype=torch.float64)
        return normalize(center + spread * noise, dim=1).float()

    noise = torch.randn(512, 64, generator=generator, dtype=torch.float64)
    guide = drawn(64, noise), drawn(64, 0.5 * noise + torch.randn(512, 64, generator=generator, dtype=torch.float64))
    mixed = 0.3 * noise + torch.randn(512, 64, generator=generator, dtype=torch.float64)
    own = drawn(64, mixed), drawn(64, noise)
    exact = AdaptiveCoefficient()
    exact.update(*(x.double() for x in own), reference=(guide[0].double(), guide[1].double()))
    expected = exact.state_dict()["moments"]
    found = AdaptiveCoefficient()
    found.update(*own, reference=guide)
    assert torch.allclose(found.state_dict()["moments"], expected, rtol=1e-4, atol=1e-5 * float(expected[1]))
    pairs = [(own, guide), (guide, guide)]
    by_definition = [
        sum(moments_by_definition(*([x[:24].double() for x in model] for model in models))) / 2 for models in pairs
    ]
    few = AdaptiveCoefficient()
    few.update(*(x[:24] for x in own), reference=(guide[0][:24], guide[1][:24]))
    assert few.state_dict()["moments"].tolist() == pytest.approx(by_definition, rel=1e-4, abs=1e-5 * by_definition[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_features_of_the_reference_have_coefficient_zero(dtype):
    guide = features(20, 6, 11)
    constant = normalize(torch.tensor([[0.3, -0.7, 0.11, 0.2]], dtype=dtype), dim=1).expand(20, 4)
    assert AdaptiveCoefficient().update(*guide, reference=(constant, constant)) == 0.0


def test_coefficient_refusals_leave_it_as_it_was():
    guide = features(8, 4, 10)
    coefficient = AdaptiveCoefficient()
    coefficient.update(*guide, reference=guide)
    with pytest.raises(ValueError, match="must be finite"):
        coefficient.update(guide[0] * math.inf, guide[1], reference=guide)
    with pytest.raises(ValueError, match="moments"):
        coefficient.load_state_dict({"moments": torch.tensor([1.0, math.inf])})
    assert coefficient.value == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ValueError, match=r"rate must lie in \(0, 1\], got 0"):
        AdaptiveCoefficient(0)


def test_with_deferred_checks_the_coefficient_is_a_tensor_and_nan_changes_nothing():
    own, guide = features(20, 6, 9), features(20, 4, 10)
    there, here = AdaptiveCoefficient(), AdaptiveCoefficient()
    with deferred_checks():
        found = there.update(*own, reference=guide)
        wrong = there.update(own[0] * math.nan, own[1], reference=guide)
    assert isinstance(found, torch.Tensor) and found.item() == here.update(*own, reference=guide)
    assert wrong.isnan() and torch.equal(there.moments, here.moments)
    steps = [contrastive_risk(*own, 0.1, reference=guide, coefficient=c) for c in (found, found.item())]
    torch.testing.assert_close(steps[0].value, steps[1].value, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="coefficient must be finite, got nan"):
        contrastive_risk(*own, 0.1, reference=guide, coefficient=wrong)


def test_covariances_of_several_models_are_those_of_each():
    own, guide = features(9, 6, 1), features(9, 4, 2)
    pairs = [(own, own), (own, guide), (guide, guide)]
    expected = torch.tensor([within_anchors(*models) for models in pairs], dtype=torch.float64)
    torch.testing.assert_close(covariances_within_anchors(pairs), expected, rtol=1e-14, atol=0)
