"""The advisor: measures beside loops, weights that are recovered, groups that are left out, advice that says no."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from drrho.advice import (
    BATCH,
    Advice,
    Advisor,
    Finished,
    Intervention,
    Knowledge,
    Prediction,
    extrapolated_level,
    knowledge,
    log_odds,
    predictors,
    told_apart,
    with_least_unrecognized,
)

MENU = [
    *(Intervention(c, tau, "kl") for c in (0.5, 1.0, 1.5) for tau in (0.08, 0.125, 0.2)),
    *(Intervention(1.0, tau, "chi-square") for tau in (0.0125, 0.025, 0.1)),
    *(Intervention(select=name, candidates=k) for name in ("jest", "jest-top-k", "rho-top-k") for k in (2, 5)),
    Intervention(1.0, 0.15, "kl", "jest", 5),
]


def features(n, d=16, seed=0, noise=0.25):
    generator = torch.Generator().manual_seed(seed)
    text = normalize(torch.randn(n, d, generator=generator), dim=1)
    return normalize(text + noise * torch.randn(n, d, generator=generator), dim=1), text


def known(accuracy=0.9, unrecognized=0.1):
    return Knowledge(4096, accuracy, unrecognized, 0.0, 0.25)


def trainings(groups=6, seed=0, error=1e-3):
    """Trainings whose gains follow weights exactly: those weights, and the trainings."""
    rng = np.random.default_rng(seed)
    names = {name for how in MENU for name in predictors(how, known(), 0.0)}
    weights = {name: float(rng.normal(scale=0.3)) for name in sorted(names)}
    advisor, found = Advisor(weights, {}), []
    for group in range(groups):
        own, level, twin = known(rng.uniform(0.3, 0.6), rng.uniform(0, 0.4)), rng.normal(), rng.uniform(0.05, 0.4)
        for how in MENU:
            odds = twin / (1 - twin) * math.exp(advisor.log_odds(how, own, level))
            found.append(Finished(str(group), how, own, level, twin, odds / (1 + odds), error))
    return weights, found


def test_pairs_are_told_apart_as_by_a_loop():
    image, text = features(40)
    text[7] = text[3]
    expected = [
        all((image[i] @ text[i]) > (image[i] @ text[j]) for j in range(40) if not torch.equal(text[i], text[j]))
        for i in range(40)
    ]
    assert told_apart(image, text).tolist() == expected
    assert 0 < sum(expected) < 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_captions_count_neither_for_nor_against_in_any_precision_and_scale(dtype):
    image, text = features(256, d=64)
    text = text[torch.arange(256) // 2]
    found = knowledge(3 * image.to(dtype), 5 * text.to(dtype))
    assert found.duplicates == pytest.approx(1 / 255, rel=0.5)
    assert found.accuracy == pytest.approx(knowledge(image, text).accuracy, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_swapped_captions_are_found_as_unrecognized(share):
    image, text = features(8192, d=32)
    wrong = torch.arange(round(share * 8192))
    text[wrong] = text[wrong.roll(1)]
    found = knowledge(image, text)
    assert found.unrecognized == pytest.approx(share, abs=0.02)
    assert found.level == pytest.approx(knowledge(*features(8192, d=32)).level, abs=0.25)  # of those that are right


def test_knowledge_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match=f"n >= {BATCH} pairs"):
        knowledge(*features(100))
    image, text = features(128)
    with pytest.raises(ValueError, match="NaN or infinite"):
        knowledge(image / 0, text)


def test_a_level_goes_along_the_curve_and_does_not_depend_on_its_speed():
    curve = [(1e3, -4.0), (1e4, -2.0), (1e5, 1.0), (1e6, 2.0)]
    hits = round(1e6 / (1 + math.exp(1.0)))  # level -1
    same = extrapolated_level(hits, 1_000_000, 5e4, 5e4, curve)
    assert same == pytest.approx(-1.0, abs=1e-5)
    slow = extrapolated_level(hits, 1_000_000, 5e5, 5e6, curve)
    assert slow == pytest.approx(extrapolated_level(hits, 1_000_000, 5e4, 5e5, curve))
    assert extrapolated_level(hits, 1_000_000, 5e4, 1e12, curve) == 2.0


@pytest.mark.parametrize(("hits", "scored"), [(8, 1024), (19, 1024), (0, 0), (4, 128)])
def test_a_probe_near_chance_cannot_tell(hits, scored):
    assert extrapolated_level(hits, scored, 1e4, 1e6, [(1e3, -5.0), (1e6, 2.0)]) is None
    assert extrapolated_level(900, 1024, 1e4, 1e6, [(1e3, -5.0), (1e6, 2.0)]) is not None


def test_weights_are_recovered_where_gains_follow_them():
    weights, finished = trainings()
    fitted = Advisor.fitted(finished, ridge=1e-9)
    assert {name: fitted.weights[name] for name in weights} == pytest.approx(weights, abs=1e-3)
    assert max(fitted.half_widths.values()) < 1e-2
    one = finished[5]
    assert fitted.predict("a", one.how, one.reference, one.twin, one.level).points == pytest.approx(one.gain, abs=0.01)


def test_a_left_out_group_has_no_part_in_its_own_predictions():
    _, finished = trainings()
    other = [each._replace(score=0.9) if each.group == "2" else each for each in finished]
    before, after = (
        {(e.group, e.how): x for e, x in Advisor.left_out(rows, lambda each: each.group)} for rows in (finished, other)
    )
    assert all(before[key] == after[key] for key in before if key[0] == "2")
    assert any(before[key] != after[key] for key in before if key[0] != "2")


def test_a_kind_of_intervention_that_no_other_group_has_is_not_predicted():
    _, finished = trainings()
    rows = [each for each in finished if each.group == "0" or not each.how.selects]
    found = dict(((e.group, e.how), x) for e, x in Advisor.left_out(rows, lambda each: each.group))
    assert all(math.isnan(x) == how.selects for (group, how), x in found.items() if group == "0")
    assert Advisor.fitted(rows).half_widths["select"] == math.inf
    with pytest.raises(ValueError, match="at least 2 groups"):
        Advisor.fitted(rows[:1])


def test_the_spread_is_that_of_the_similarities_with_other_captions():
    image, text = features(128)
    similarity = torch.nn.functional.normalize(image, dim=1) @ torch.nn.functional.normalize(text, dim=1).T
    rows = similarity[~torch.eye(128, dtype=torch.bool)].view(128, 127).double()
    expected = rows.var(1, correction=0).mean().sqrt().item()
    assert knowledge(image, text).spread == pytest.approx(expected, rel=1e-5)
    # Neither wrong captions nor those that several pairs have change it.
    assert knowledge(image, text.roll(1, 0)).spread == pytest.approx(expected, rel=0.1)
    assert knowledge(image.repeat(2, 1), text.repeat(2, 1)).spread == pytest.approx(expected, rel=0.1)


def test_intervals_hold_what_is_of_the_same_kind():
    rng = np.random.default_rng(0)
    _, finished = trainings(groups=40)
    noisy = [
        each._replace(score=1 / (1 + math.exp(-(log_odds(each.score) + rng.normal(scale=0.3))))) for each in finished
    ]
    fitted = Advisor.fitted(noisy[: 20 * len(MENU)])
    within = [
        low <= each.gain <= high
        for each in noisy[20 * len(MENU) :]
        for *_, low, high in [fitted.predict("", each.how, each.reference, each.twin, each.level)]
    ]
    assert 0.9 < np.mean(within) <= 1


def test_the_advice_is_the_largest_gain_or_none():
    gains = {"steer": 0.2, "lead": 0.5}
    advisor = Advisor(gains, {"steer": 0.1, "select": 0.1})
    menu = [Intervention(c, 0.14, "kl") for c in (0.5, 1.0)]
    early = advisor.advise({"a": known(0.8)}, menu, twin=0.1, level=-1.0)
    assert early.recommended is not None
    assert early.recommended.how.coefficient == 1.0
    late = advisor.advise({"a": known(0.8)}, menu, twin=0.5, level=5.0)
    assert (late.recommended, str(late)) == (None, "do not steer")
    assert [each.points for each in late.predictions] == sorted(
        (each.points for each in late.predictions), reverse=True
    )
    assert "includes 0" in str(Advice((Prediction("a", menu[0], 1.0, -1.0, 2.0),)))
    assert "includes 0" not in str(Advice((Prediction("a", menu[0], 1.0, 0.5, 2.0),)))
    with pytest.raises(ValueError, match="twin must be a share"):
        advisor.advise({"a": known()}, menu, twin=14.8, level=0.0)


def test_a_reference_that_knows_nothing_is_not_judged():
    """Its pairs look like those of data whose captions are all wrong, of which steering would help most."""
    _, finished = trainings()
    fitted = Advisor.fitted(finished)
    ignorant = knowledge(features(1024)[0], features(1024, seed=1)[1])
    assert ignorant.unrecognized > 0.9
    assert not fitted.judges(ignorant)
    assert fitted.judges(finished[0].reference)
    assert fitted.advise({"a": ignorant}, MENU, twin=0.1, level=0.0).recommended is None


def test_what_one_reference_recognizes_is_right_for_all():
    image, text = features(4096, d=32)
    wrong = torch.arange(1229)  # 30 %
    text[wrong] = text[wrong.roll(1)]
    weak = knowledge(normalize(image + torch.randn(4096, 32, generator=torch.Generator().manual_seed(3)), dim=1), text)
    strong = knowledge(image, text)
    assert weak.unrecognized > strong.unrecognized + 0.02
    together = with_least_unrecognized({"weak": weak, "strong": strong})
    assert together["weak"].unrecognized == together["strong"].unrecognized == strong.unrecognized
    assert together["weak"].level < weak.level
    assert with_least_unrecognized({}) == {}


def test_a_selection_costs_its_candidates():
    assert [how.cost for how in (MENU[0], Intervention(select="jest", candidates=3))] == [1.0, 2.0]
