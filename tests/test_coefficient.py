"""The estimated coefficients of the reference against their definitions."""

import math

import pytest
import torch
import torch.distributed as dist
from problems import features
from processes import start_ranks
from scipy.optimize import minimize_scalar
from torch.nn.functional import normalize

from drrho.coefficient import AdaptiveCoefficient, ScheduledCoefficient, covariances_within_anchors, within_anchors
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


def knowing(pairs, noise, seed=0, columns=8):
    """Features whose texts are the images' with noise: the more, the less the model knows."""
    truth, other = (
        torch.randn(pairs, columns, generator=torch.Generator().manual_seed(each), dtype=torch.float64)
        for each in (100, seed)
    )
    return normalize(truth, dim=1), normalize(truth + noise * other, dim=1)


def knowledge_by_search(features):
    """What features know of their pairs in nats, by a minimizer that knows nothing of Newton's steps."""
    image, text = features
    scores = torch.cat([image @ text.T, text @ image.T])
    scores = scores - scores.mean(1, keepdim=True)
    scores = scores / scores.square().mean().sqrt()
    true = torch.arange(len(scores)) % len(image)

    def likelihood(weight):
        return -torch.nn.functional.cross_entropy(weight * scores, true).item()

    found = minimize_scalar(lambda weight: 1e-3 / 2 * weight**2 - likelihood(weight), bounds=(0, 60), method="bounded")
    return likelihood(found.x) + math.log(len(image))


def scheduled(own, guide, held_out=None, **options):
    """A coefficient that has observed pairs, of a batch by default, and then been updated with a batch."""
    coefficient = ScheduledCoefficient(**options)
    target, reference = held_out or (own, guide)
    coefficient.observe(*target, reference=reference)
    coefficient.update(*own, reference=guide)
    return coefficient


@pytest.mark.parametrize("noises", [(1.0, 0.4), (0.4, 1.0), (3.0, 0.2), (0.01, 0.3)])
def test_the_scheduled_coefficient_is_that_of_its_definition(noises):
    own, guide = knowing(40, noises[0]), knowing(40, noises[1], seed=1)
    lead = 1 - knowledge_by_search(own) / knowledge_by_search(guide)
    adaptive = AdaptiveCoefficient().update(*own, reference=guide)
    found = scheduled(own, guide, largest=0.7)
    assert found.moments[2:].tolist() == pytest.approx([knowledge_by_search(own), knowledge_by_search(guide)], rel=1e-4)
    assert found.value == pytest.approx(0.7 * adaptive * min(max(2 * lead, 0), 1), abs=1e-4)
    assert (found.value > 0.01) == (noises[1] < noises[0])


def test_the_scheduled_coefficient_falls_to_zero_as_the_target_passes_the_reference_on_held_out_pairs():
    guide, batch = knowing(64, 1.0, seed=1), knowing(64, 0.2)
    known, values = [], []
    for noise in (3.0, 2.0, 1.4, 1.0, 0.5):
        coefficient = scheduled(batch, guide, (knowing(64, noise), guide))
        known.append(coefficient.moments[2].item())
        values.append(coefficient.value)
    assert known == sorted(known)  # whatever the target knows of the batch
    assert values == sorted(values, reverse=True) and values[0] > 0.1 and values[-1] == 0
    assert ScheduledCoefficient().value == 0


def test_the_scheduled_coefficient_of_what_tells_nothing_apart_is_zero():
    guide, constant = knowing(64, 0.5), torch.ones(64, 4, dtype=torch.float64) / 2
    assert scheduled(guide, (constant, constant)).value == 0
    assert scheduled(features(64, 8, 5), features(64, 8, 3)).value < 0.02
    assert scheduled((constant, constant), guide).value == 0  # nothing agrees with the reference
    turned = scheduled(constant_and(guide), (guide[0], -guide[1]))
    assert turned.moments[3] == 0 and turned.value == 0  # it knows the pairs only by what they are not
    # Pairs that are told apart without error have a likelihood all the same.
    perfect = scheduled(knowing(64, 0.0), guide)
    assert perfect.value == 0 and perfect.moments[2] == pytest.approx(math.log(64), abs=0.05)


def constant_and(guide):
    """Features that know a little of what the guide does."""
    return guide[0], normalize(guide[1] + 5 * features(64, 8, 7)[1], dim=1)


def test_a_scheduled_coefficient_has_a_state_and_asks_for_held_out_pairs():
    own, guide = knowing(64, 2.0), knowing(64, 0.5, seed=1)
    with pytest.raises(ValueError, match=r"no held-out pairs were observed.*call observe\(\)"):
        ScheduledCoefficient().update(*own, reference=guide)
    first = scheduled(own, guide)
    again = ScheduledCoefficient()
    again.load_state_dict(first.state_dict())
    assert again.value == first.value > 0
    observed = ScheduledCoefficient()
    observed.observe(*own, reference=guide)
    again.load_state_dict(observed.state_dict())  # before the first batch
    again.update(*own, reference=guide)
    assert again.value == first.value
    with pytest.raises(ValueError, match="moments, 4 numbers, finite or NaN"):
        again.load_state_dict(AdaptiveCoefficient().state_dict())
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="largest must lie in"):
            ScheduledCoefficient(largest=wrong)
    with pytest.raises(ValueError, match="at least 2 pairs, which are compared, got 1"):
        again.observe(own[0][:1], own[1][:1], reference=(guide[0][:1], guide[1][:1]))
    again.observe(own[0] * math.nan, own[1], reference=guide)  # changes nothing
    with pytest.raises(ValueError, match="must be finite"):
        again.update(own[0] * math.nan, own[1], reference=guide)
    assert again.value == first.value
    with deferred_checks():
        found = again.update(*own, reference=guide)
        wrong = again.update(own[0] * math.nan, own[1], reference=guide)
    assert isinstance(found, torch.Tensor) and found.item() == again.value and wrong.isnan()


def test_until_finite_pairs_are_observed_the_scheduled_coefficient_is_0():
    own, guide = knowing(64, 2.0), knowing(64, 0.5, seed=1)
    coefficient = ScheduledCoefficient()
    coefficient.observe(own[0] * math.nan, own[1], reference=guide)
    assert coefficient.update(*own, reference=guide) == 0
    coefficient.observe(*own, reference=guide)
    assert coefficient.value == scheduled(own, guide).value > 0


def _on_a_rank(rank, counts, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/start", rank=rank, world_size=len(counts))
    own, guide = knowing(40, 2.0), knowing(40, 0.5, seed=1)
    place = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    coefficient = ScheduledCoefficient()
    coefficient.observe(*own, reference=guide, group=dist.group.WORLD)
    batch = own[0][place], own[1][place]
    coefficient.update(*batch, reference=(guide[0][place], guide[1][place]), group=dist.group.WORLD)
    torch.testing.assert_close(coefficient.moments, scheduled(own, guide).moments, rtol=1e-12, atol=1e-14)
    dist.destroy_process_group()


@pytest.mark.parametrize("counts", [(25, 15), (10, 20, 10), (40, 0)])
def test_ranks_have_the_scheduled_coefficient_of_the_whole_batch(counts, tmp_path):
    start_ranks(_on_a_rank, (counts, str(tmp_path)), len(counts))
