"""The contrastive risk against its definition, the core, and published input/output cases."""

import json
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from problems import agree, close, features, leaves
from processes import start_ranks

from drrho import KL, ChiSquare, CressieRead, CVaR, constrained_risk, hybrid_risk, penalized_risk, tiles
from drrho.contrastive import (
    anchor_risks,
    anchor_values,
    contrastive_risk,
    info_nce,
    project_temperature,
    two_level_risk,
)
from drrho.distillation import distillation_loss

CASES = np.load(Path(__file__).parent / "fixtures" / "contrastive_reference_cases.npz")


def excess(i, anchors, others, reference_anchors, reference_others):
    """Losses of anchor i over its negatives, one by one from the definition."""
    losses = []
    for j in range(len(anchors)):
        if j != i:
            target = anchors[i] @ others[j] - anchors[i] @ others[i]
            guide = reference_anchors[i] @ reference_others[j] - reference_anchors[i] @ reference_others[i]
            losses.append(target - guide)
    return torch.stack(losses)


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.3)])
def test_value_is_the_mean_of_penalized_risks_of_excess_pair_losses(divergence):
    image, text = features(9, 6, 0)
    ref_image, ref_text = features(9, 4, 1)
    step = contrastive_risk(image, text, 0.07, reference=(ref_image, ref_text), divergence=divergence)
    by_image = [penalized_risk(excess(i, image, text, ref_image, ref_text), divergence, 0.07).value for i in range(9)]
    by_text = [penalized_risk(excess(i, text, image, ref_text, ref_image), divergence, 0.07).value for i in range(9)]
    expected = (torch.stack(by_image).mean() + torch.stack(by_text).mean()) / 2
    assert abs(step.value - expected) <= 1e-10
    assert torch.allclose(step.risks[0], torch.stack(by_image), rtol=0, atol=1e-10)
    assert torch.allclose(step.risks[1], torch.stack(by_text), rtol=0, atol=1e-10)
    plain = anchor_risks(image, text, 0.07, reference=(ref_image, ref_text), divergence=divergence)
    assert torch.allclose(plain[1].value, torch.stack(by_text), rtol=0, atol=1e-10)


def test_kl_value_in_plain_numbers():
    image, text = features(5, 3, 2)
    ref_image, ref_text = features(5, 3, 3)
    step = contrastive_risk(image, text, 0.2, reference=(ref_image, ref_text))
    total = 0.0
    for a, b, ra, rb in ((image, text, ref_image, ref_text), (text, image, ref_text, ref_image)):
        for i in range(5):
            terms = []
            for j in range(5):
                if j != i:
                    shift = float(ra[i] @ rb[j] - ra[i] @ rb[i])
                    terms.append(math.exp((float(a[i] @ b[j] - a[i] @ b[i]) - shift) / 0.2))
            total += 0.2 * math.log(sum(terms) / 4)
    assert abs(float(step.value) - total / 10) <= 1e-12


@pytest.mark.parametrize("case", range(4))
def test_published_objective(case):
    """Running estimates and gradients of the published implementation, four sequences of steps.

    It divides by B where it averages g over B - 1 negatives, adds eps inside u, and sums the two directions.
    """
    meta = json.loads(str(CASES[f"{case}/meta"]))
    size, eps = meta["B"], meta["eps"]
    ratio = (size - 1) / size
    state = torch.full((2, meta["N"]), -torch.inf, dtype=torch.float64)
    for number in range(meta["steps"]):

        def stored(name, number=number):
            return torch.as_tensor(CASES[f"{case}/{number}/{name}"])

        image, text, index = stored("image").requires_grad_(), stored("text").requires_grad_(), stored("index")
        steered = f"{case}/{number}/ref_image" in CASES
        step = contrastive_risk(
            image,
            text,
            meta["tau"],
            reference=(stored("ref_image"), stored("ref_text")) if steered else None,
            log_u=(state[0, index], state[1, index]),
            gamma=float(stored("gamma")),
            eps=eps / ratio,
        )
        state[0, index], state[1, index] = step.log_u
        step.value.backward()
        for ours, name in zip(step.log_u, ("log_u_image", "log_u_text"), strict=True):
            converted = torch.logaddexp(ours + math.log(ratio), torch.tensor(eps, dtype=torch.float64).log())
            assert torch.allclose(converted, stored(name), rtol=0, atol=1e-10)
        for ours, name in ((image.grad, "grad_image"), (text.grad, "grad_text")):
            expected = stored(name)
            assert (2 * ours / ratio - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_gradient_of_a_full_batch_is_that_of_the_value():
    image, text = (part.requires_grad_() for part in features(6, 4, 4))
    reference = features(6, 4, 5)
    assert torch.autograd.gradcheck(lambda a, b: contrastive_risk(a, b, 0.1, reference=reference).value, (image, text))


def test_reference_equal_to_the_target_leaves_nothing_to_learn():
    image, text = features(7, 5, 6)
    step = contrastive_risk(image, text, 0.01, reference=(image, text))
    assert abs(step.value) <= 1e-15
    assert torch.cat(step.distances).abs().max() <= 1e-12  # uniform weights
    plain = anchor_risks(image, text, 0.01, reference=(image, text))
    assert torch.allclose(plain[0].weights, torch.full((7, 6), 1 / 6, dtype=torch.float64), rtol=1e-12)


def test_reference_gets_no_gradient():
    image, text = (part.requires_grad_() for part in features(4, 3, 7))
    reference = tuple(part.requires_grad_() for part in features(4, 3, 8))
    contrastive_risk(image, text, 0.1, reference=reference).value.backward()
    assert image.grad is not None
    assert reference[0].grad is None


def test_estimates_average_in_log_domain():
    image, text = features(6, 4, 9)
    first = contrastive_risk(image, text, 0.05)
    moved = contrastive_risk(text, image, 0.05, log_u=first.log_u, gamma=0.3)
    fresh = contrastive_risk(text, image, 0.05)
    for before, now, after in zip(first.log_u, fresh.log_u, moved.log_u, strict=True):
        assert torch.allclose(after.exp(), 0.7 * before.exp() + 0.3 * now.exp(), rtol=1e-12)


def test_adaptive_rate_is_the_proximal_step():
    image, text = features(6, 4, 9)
    before = contrastive_risk(image, text, 0.3).log_u
    moved = contrastive_risk(text, image, 0.3, log_u=before, log_step=-0.7)
    fresh = contrastive_risk(text, image, 0.3)
    alpha = math.exp(-0.7)
    for old, now, after in zip(before, fresh.log_u, moved.log_u, strict=True):
        u, g = old.exp(), now.exp()
        assert torch.allclose(after.exp(), (u + alpha * u * g) / (1 + alpha * u), rtol=1e-12)


def test_first_visit_takes_the_batch_whatever_gamma():
    image, text = features(6, 4, 10)
    never = (torch.full((6,), -torch.inf, dtype=torch.float64),) * 2
    assert torch.equal(
        contrastive_risk(image, text, 0.05, log_u=never, gamma=0.1).log_u[0],
        contrastive_risk(image, text, 0.05).log_u[0],
    )


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_similarities_stay_finite(size):
    image, text = features(6, 4, 11)
    image = (image * abs(size)).requires_grad_()
    step = contrastive_risk(image, text * math.copysign(1, size), 0.01, eps=1e-8)
    step.value.backward()
    assert torch.isfinite(step.value)
    assert torch.isfinite(image.grad).all()


def test_similarities_are_float32_under_autocast():
    image, text = features(8, 16, 12, torch.float32)
    plain = contrastive_risk(image, text, 0.01).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_risk(image, text, 0.01).value, plain)
    half = contrastive_risk(image.bfloat16(), text.bfloat16(), 0.01).value
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"gamma": 0.0}, "gamma.*0.0"),
        ({"gamma": 1.5}, "gamma.*1.5"),
        ({"eps": -1.0}, "eps.*-1.0"),
        ({"text": torch.ones(4, 3)}, r"\[5, 3\] and \[4, 3\]"),
        ({"image": torch.ones(1, 3), "text": torch.ones(1, 3)}, "b >= 2"),
        ({"image": torch.full((5, 3), torch.nan)}, "finite"),
        ({"reference": (torch.ones(4, 2), torch.ones(4, 2))}, "5 pairs.*got 4"),
        ({"log_u": (torch.zeros(4), torch.zeros(5))}, r"log_u\[0\].*\[5\].*\[4\]"),
        ({"log_u": (torch.full((5,), torch.nan), torch.zeros(5))}, "NaN"),
        ({"log_u": (torch.zeros(5), torch.zeros(5)), "divergence": ChiSquare()}, "KL"),
        ({"threshold": (torch.zeros(5), torch.zeros(5))}, "log_u for KL"),
        ({"temperature": torch.ones(4)}, r"\[5\], got \[4\]"),
        ({"temperature": (torch.ones(5), torch.tensor([1.0, 1.0, -2.0, 1.0, 1.0]))}, "temperature.*-2"),
        ({"coefficient": math.inf}, "coefficient.*inf"),
        ({"rho": -1.0}, "rho.*-1.0"),
        ({"log_step": 0.5, "gamma": 0.5}, "log_step.*0.5 with gamma=0.5"),
    ],
)
def test_refusals_name_argument_and_value(change, message):
    arguments = {"image": torch.eye(5)[:, :3], "text": torch.eye(5)[:, :3], "temperature": 0.1} | change
    with pytest.raises(ValueError, match=message):
        contrastive_risk(arguments.pop("image"), arguments.pop("text"), **arguments)


@pytest.mark.parametrize(
    "call",
    [contrastive_risk, info_nce, anchor_values, anchor_risks],
    ids=["contrastive_risk", "info_nce", "anchor_values", "anchor_risks"],
)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": np.eye(3)}, r"image must be a tensor \[b, d\], got ndarray"),
        ({"text": torch.eye(3).long()}, "text must have a floating dtype, got torch.int64"),
        ({"reference": torch.eye(3)}, "reference must be a pair of image and text features, got one tensor"),
        ({"reference": (torch.eye(3),)}, "reference must be a pair of image and text features, got 1 entries"),
        ({"reference": (torch.eye(3), torch.eye(3).bool())}, r"reference\[1\] must have a floating dtype"),
        ({"reference": (torch.eye(2), torch.eye(2))}, "reference must hold 3 pairs like image and text, got 2"),
        ({"coefficient": "adaptive"}, "coefficient must be a number or a scalar tensor, got 'adaptive'"),
        ({"coefficient": math.inf}, "coefficient must be finite, got inf"),
        ({"coefficient": 0.5, "reference": None}, "coefficient=0.5 needs a reference"),
        ({"coefficient": torch.tensor(0.5), "reference": None}, "needs a reference"),
    ],
)
def test_every_entry_refuses_what_is_no_pair(call, change, message):
    given = {"image": torch.eye(3), "text": torch.eye(3), "reference": (torch.eye(3), torch.eye(3))} | change
    with pytest.raises((ValueError, TypeError), match=message):
        call(given.pop("image"), given.pop("text"), 0.1, **given)


# --- tiles against the plain form ---------------------------------------------------------------------------------


def gradients(value, inputs):
    return torch.autograd.grad(value, inputs)


def test_a_shift_of_an_anchor_s_similarities_changes_nothing():
    image, text = features(9, 6, 31)
    plain = contrastive_risk(image, text, 0.1)
    # A direction in which all texts are 1 adds what the image holds there to all of its similarities.
    wide = torch.cat([image, torch.linspace(-5, 5, 9, dtype=torch.float64)[:, None]], 1)
    shifted = contrastive_risk(wide, torch.cat([text, torch.ones(9, 1, dtype=torch.float64)], 1), 0.1)
    assert torch.allclose(shifted.risks[0], plain.risks[0], rtol=0, atol=1e-12)


def test_bfloat16_features_are_compared_in_float32():
    image, text = features(30, 64, 32, torch.float32)
    exact = contrastive_risk(image, text, 0.05).value
    rounded = contrastive_risk(image.bfloat16(), text.bfloat16(), 0.05).value
    assert abs(rounded - exact) <= 2**-8  # that of the features, not of their products


# --- InfoNCE ----------------------------------------------------------------------------------------------------------


def test_info_nce_is_open_clip_s_loss_with_its_temperature_gradient():
    image, text, scale = leaves()
    expected = open_clip.ClipLoss()(image, text, scale)
    ours = info_nce(image, text, 1 / scale)
    assert abs(ours - expected) <= 1e-12 * abs(expected)
    agree(torch.autograd.grad(ours, leaves_of := (image, text, scale)), torch.autograd.grad(expected, leaves_of), 1e-12)


def test_steered_info_nce_is_the_cross_entropy_of_excess_similarities():
    image, text, scale = leaves()
    guide = features(17, 5, 1)
    logits = scale * (image @ text.T - 0.7 * (guide[0] @ guide[1].T))
    labels = torch.arange(17)
    expected = (
        torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)
    ) / 2
    ours = info_nce(image, text, 1 / scale, reference=guide, coefficient=0.7)
    agree(torch.autograd.grad(ours, parts := (image, text, scale)), torch.autograd.grad(expected, parts), 1e-12)
    assert abs(ours - expected) <= 1e-12 * abs(expected)


# --- temperature ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [KL(), ChiSquare()])
@pytest.mark.parametrize("individual", [False, True])
def test_temperature_gradient_by_differences(divergence, individual):
    image, text = features(8, 5, 40)
    reference = features(8, 5, 41)

    def value(*taus):
        tau = taus if individual else taus[0]
        return contrastive_risk(image, text, tau, reference=reference, divergence=divergence, rho=0.4).value

    taus = tuple(
        torch.linspace(low, 0.6, 8, dtype=torch.float64).requires_grad_() if individual
        else torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        for low in (0.2, 0.4)
    )  # fmt: skip
    assert torch.autograd.gradcheck(value, taus if individual else taus[:1])


@pytest.mark.slow
def test_a_learned_temperature_is_stationary_where_the_mean_divergence_is_rho():
    image, text = features(10, 5, 42)
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    rho = 0.3
    for _ in range(400):
        (slope,) = gradients(contrastive_risk(image, text, tau, rho=rho).value, (tau,))
        with torch.no_grad():
            tau -= 0.1 * slope
    step = contrastive_risk(image, text, tau, rho=rho)
    assert torch.cat(step.distances).mean() == pytest.approx(rho, rel=1e-6)
    one = contrastive_risk(image[:2], text[:2], 0.5, rho=rho)  # a single negative: no divergence to speak of
    assert torch.cat(one.distances).abs().max() <= 1e-12


def test_individual_temperatures_reach_the_kl_ball():
    """At the optimum of each anchor's own temperature its risk plus ``rho tau`` is the risk of the ball."""
    image, text = features(7, 5, 43)
    losses = (image @ text.T - (image * text).sum(1)[:, None])[0, 1:]
    ball = constrained_risk(losses, KL(), 0.2)
    tau = torch.full((7,), 0.3, dtype=torch.float64)
    tau[0] = ball.strength
    step = contrastive_risk(image, text, (tau, torch.full_like(tau, 0.3)))
    assert step.distances[0][0] == pytest.approx(0.2, rel=1e-9)
    assert step.risks[0][0] + 0.2 * tau[0] == pytest.approx(ball.value.item(), abs=1e-12)


def test_published_temperature_gradient_counts_the_similarities_twice():
    image, text = features(6, 4, 44)
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    (right,) = gradients(contrastive_risk(image, text, tau, rho=1.0).value, (tau,))
    step = contrastive_risk(image, text, tau, rho=1.0, published_temperature_gradient=True)
    (published,) = gradients(step.value, (tau,))
    mean_exponent = torch.stack([d + u for d, u in zip(step.distances, step.log_u, strict=True)]).mean()
    assert published == pytest.approx((right - mean_exponent).item(), rel=1e-9)


def test_risk_per_temperature_is_the_scaled_one_divided_and_its_estimator_follows_u():
    image, text = (part.requires_grad_() for part in features(9, 5, 33))
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    plain = contrastive_risk(image, text, tau, per_temperature=True).value
    expected = contrastive_risk(image, text, tau).value / tau
    inputs = (image, text, tau)
    close(gradients(plain, inputs), gradients(expected, inputs), 1e-12)
    # With estimates: mean_i g_i / u_i times the gradient of log g_i, u held.
    log_u = (torch.full((9,), 0.3, dtype=torch.float64), torch.full((9,), -0.4, dtype=torch.float64))
    step = contrastive_risk(image, text, tau, log_u=log_u, gamma=0.25, per_temperature=True)
    log_g = [risk.value / tau for risk in anchor_risks(image, text, tau)]
    weights = [torch.exp(g.detach() - u) for g, u in zip(log_g, step.log_u, strict=True)]
    estimator = sum((w * g).mean() for w, g in zip(weights, log_g, strict=True)) / 2
    close(gradients(step.value, inputs), gradients(estimator, inputs), 1e-12)
    with pytest.raises(ValueError, match=r"per_temperature needs divergence=KL\(\) and rho=0"):
        contrastive_risk(image, text, tau, per_temperature=True, rho=0.1)


def test_projection_counts_what_it_moves():
    tau = torch.tensor([0.001, 0.05, 3.0], requires_grad=True)
    assert project_temperature(tau, 0.01, 1.0) == 2
    assert tau.tolist() == pytest.approx([0.01, 0.05, 1.0])
    assert project_temperature(tau, 0.01, 1.0) == 0
    with pytest.raises(ValueError, match="low and high"):
        project_temperature(tau, 1.0, 0.5)
    with pytest.raises(ValueError, match="NaN"):
        project_temperature(torch.tensor([math.nan]), 0.1, 0.5)


# --- two levels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "outer, solve, options",
    [
        (KL(), lambda e: constrained_risk(e, KL(), 0.2), {"radius": 0.2}),
        (ChiSquare(), lambda e: penalized_risk(e, ChiSquare(), 0.1), {"strength": 0.1}),
        (KL(), lambda e: hybrid_risk(e, KL(), 0.1, 0.05), {"radius": 0.1, "strength": 0.05}),
        (CVaR(0.4), lambda e: constrained_risk(e, CVaR(0.4)), {}),
    ],
)
def test_two_levels_are_the_outer_risk_of_the_samples_excess(outer, solve, options):
    image, text = (part.requires_grad_() for part in features(10, 6, 45))
    reference = features(10, 4, 46)
    risk = two_level_risk(image, text, 0.1, outer, reference=reference, reference_temperature=0.2, **options)
    own, guide = anchor_risks(image, text, 0.1), anchor_risks(*reference, 0.2)
    plain = solve((own[0].value + own[1].value - guide[0].value - guide[1].value) / 2)
    assert abs(risk.value - plain.value) <= 1e-12
    assert torch.allclose(risk.weights, plain.weights, rtol=0, atol=1e-10)
    close(gradients(risk.value, (image, text)), gradients(plain.value, (image, text)), 1e-10)


def test_a_mismatched_pair_loses_weight():
    reference = features(12, 8, 47)
    image, text = features(12, 8, 48)
    # The reference's features agree with its captions but for the first two, which are exchanged.
    wrong = reference[0], reference[0][[1, 0, *range(2, 12)]]
    risk = two_level_risk(image, text, 0.1, KL(), reference=wrong, strength=0.3)
    assert risk.weights[:2].max() < risk.weights[2:].min()


def test_two_levels_need_a_radius_or_strength():
    image, text = features(4, 3, 49)
    with pytest.raises(ValueError, match="radius, strength or both"):
        two_level_risk(image, text, 0.1, KL(), reference=(image, text))


def test_anchor_values_are_what_contrastive_risk_averages():
    image, text = features(6, 4, 50)
    reference = features(6, 4, 51)
    first, second = anchor_values(image, text, 0.2, reference=reference, coefficient=0.5)
    step = contrastive_risk(image, text, 0.2, reference=reference, coefficient=0.5)
    assert torch.equal(first, step.risks[0])
    assert abs((first.mean() + second.mean()) / 2 - step.value) <= 1e-15


# --- running estimates ------------------------------------------------------------------------------------------------


def test_running_gradient_is_that_of_its_definition():
    image, text = (part.requires_grad_() for part in features(8, 5, 50))
    log_u = tuple(torch.linspace(low, 1.0, 8, dtype=torch.float64) for low in (-2.0, 0.0))
    step = contrastive_risk(image, text, 0.2, log_u=log_u, gamma=0.4, eps=1e-3)
    total = 0.0
    for anchors, others, before in ((image, text, log_u[0]), (text, image, log_u[1])):
        x = (anchors @ others.T - (anchors * others).sum(1)[:, None]) / 0.2
        off = ~torch.eye(8, dtype=torch.bool)
        g = torch.where(off, x.exp(), 0.0).sum(1) / 7
        u = (0.6 * before.exp() + 0.4 * g).detach()
        total = total + (0.2 * g / (1e-3 + u)).mean() / 2
    close(gradients(step.value, (image, text)), gradients(total, (image, text)), 1e-12)


@pytest.mark.slow
def test_stationary_bias_of_the_running_estimate():
    """At a fixed model ``E log u - log g`` is ``-(gamma / (2 - gamma)) Var(batch mean) / (2 g^2)``."""
    rng = np.random.default_rng(0)
    similarities = rng.normal(size=400)
    exponentials = np.exp(similarities)
    g, variance, batch, gamma = exponentials.mean(), exponentials.var(), 16, 0.1
    anchor = torch.ones(1, 1, dtype=torch.float64)
    log_u = torch.tensor([[math.log(g)]], dtype=torch.float64)
    held = []
    for _ in range(1500):
        drawn = torch.tensor(rng.choice(similarities, size=batch))[:, None]
        image = torch.cat([anchor, torch.zeros(batch, 1, dtype=torch.float64)])
        text = torch.cat([torch.zeros(1, 1, dtype=torch.float64), drawn])
        before = torch.full((batch + 1,), -torch.inf, dtype=torch.float64)
        before[0] = log_u
        step = contrastive_risk(image, text, 1.0, log_u=(before, torch.full_like(before, -torch.inf)), gamma=gamma)
        log_u = step.log_u[0][:1]
        held.append(log_u.item())
    held = np.array(held[100:])
    bias = np.mean(held - (np.exp(held) - g) / g) - math.log(g)  # E u = g, which takes most of the noise away
    expected = -gamma / (2 - gamma) * variance / batch / (2 * g**2)
    assert bias == pytest.approx(expected, rel=0.25)
    assert abs(bias) < 0.2 * variance / batch / (2 * g**2)  # far less than that of the batch alone


@pytest.mark.parametrize("divergence", [ChiSquare(), CVaR(0.3), CressieRead(1.5)])
def test_running_dual_variable(divergence):
    """The full batch at gamma = 1 is exact; with a lagging threshold the value is the dual objective there, above."""
    image, text = (part.requires_grad_() for part in features(12, 5, 51))
    exact = contrastive_risk(image, text, 0.2, divergence=divergence)
    never = (torch.full((12,), math.nan, dtype=torch.float64),) * 2
    fresh = contrastive_risk(image, text, 0.2, divergence=divergence, threshold=never, gamma=0.3)
    assert fresh.value == exact.value
    same = contrastive_risk(image, text, 0.2, divergence=divergence, threshold=exact.threshold, gamma=1.0)
    close(gradients(same.value, (image, text)), gradients(exact.value, (image, text)), 1e-12)
    moved = tuple(part + 0.05 for part in exact.threshold)
    lagging = contrastive_risk(image, text, 0.2, divergence=divergence, threshold=moved, gamma=0.5)
    for now, batch in zip(lagging.threshold, exact.threshold, strict=True):
        assert torch.allclose(now, batch + 0.025, rtol=0, atol=1e-12)
    assert lagging.value > exact.value - 1e-12
    first = lagging.threshold[0].detach()
    losses = image @ text.T - (image * text).sum(1)[:, None]
    losses = losses[~torch.eye(12, dtype=torch.bool)].view(12, 11)
    dual = first + 0.2 * divergence.conjugate((losses - first[:, None]) / 0.2).mean(1)
    assert torch.allclose(lagging.risks[0], dual.detach(), rtol=0, atol=1e-12)
    (ours,) = gradients(lagging.value, (image,))
    by_text = text @ image.T - (image * text).sum(1)[:, None]
    by_text = by_text[~torch.eye(12, dtype=torch.bool)].view(12, 11)
    second = lagging.threshold[1].detach()
    dual_text = second + 0.2 * divergence.conjugate((by_text - second[:, None]) / 0.2).mean(1)
    (expected,) = gradients((dual.mean() + dual_text.mean()) / 2, (image,))
    close([ours], [expected], 1e-12)


@pytest.mark.parametrize("kind", ["scalar", "pair"])
@pytest.mark.parametrize("divergence", [ChiSquare(), CressieRead(1.5), CressieRead(0.5)])
def test_derivative_in_a_learned_temperature_at_a_lagging_threshold(divergence, kind):
    """The one of the dual objective at the thresholds after the step; for samples never visited, that of the risk."""
    image, text = features(9, 5, 52)
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    temperature = tau if kind == "scalar" else (tau.expand(9), tau.expand(9))
    exact = contrastive_risk(image, text, 0.2, divergence=divergence)
    before = tuple(part + 0.3 for part in exact.threshold)
    before[1][:4] = math.nan
    step = contrastive_risk(image, text, temperature, divergence=divergence, threshold=before, gamma=0.1, rho=0.05)
    (ours,) = gradients(step.value, (tau,))
    expected = 0.05
    for side, similarity in enumerate((image @ text.T, text @ image.T)):
        losses = similarity - similarity.diagonal()[:, None]
        losses = losses[~torch.eye(9, dtype=torch.bool)].view(9, 8)
        eta = step.threshold[side].detach()[:, None]
        dual = (eta + tau * divergence.conjugate((losses - eta) / tau)).mean(1)
        # At a threshold that is the batch's own the dual objective has the slope of the risk.
        expected = expected + gradients(dual.mean(), (tau,))[0] / 2
    assert ours.item() == pytest.approx(expected.item(), rel=1e-10)


def test_a_threshold_outside_the_domain_of_the_conjugate_starts_anew():
    image, text = (part.requires_grad_() for part in features(9, 5, 53))
    divergence = CressieRead(0.5)
    exact = contrastive_risk(image, text, 0.2, divergence=divergence)
    before = tuple(part.clone() for part in exact.threshold)
    before[0][2] = -50.0
    step = contrastive_risk(image, text, 0.2, divergence=divergence, threshold=before, gamma=0.1)
    close([step.value.detach(), *step.threshold], [exact.value.detach(), *exact.threshold], 1e-10)
    close(gradients(step.value, (image, text)), gradients(exact.value, (image, text)), 1e-10)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch looks at it, between graphs
@pytest.mark.parametrize("divergence", [KL(), ChiSquare()])
def test_a_compiled_step_is_the_plain_step(divergence):
    torch.manual_seed(0)
    tower = torch.nn.Linear(8, 6)
    image, (_, text), guide = torch.randn(12, 8), features(12, 6, 70, torch.float32), features(12, 4, 71, torch.float32)

    def step(image, text):
        own = torch.nn.functional.normalize(tower(image), dim=1)
        risk = contrastive_risk(own, text, 0.1, reference=guide, divergence=divergence)
        return 2 * risk.value + distillation_loss(own, text, 0.1, reference=guide) + info_nce(own, text, 0.1)

    def weight_gradient(function):
        value = function(image, text)
        return value.detach(), *gradients(value, tower.parameters())

    expected = weight_gradient(step)
    close(weight_gradient(torch.compile(step)), expected, 1e-6)
    # The model around the losses is traced, and each loss is one call between its graphs.
    report = torch._dynamo.explain(step)(image, text)
    assert report.graph_break_count <= 3


# --- over ranks -------------------------------------------------------------------------------------------------------

SHARDS = {2: (5, 8), 3: (6, 0, 7), 4: (3, 1, 7, 2)}


def batch_of(dtype=torch.float64):
    reference = features(13, 4, 61, dtype)
    state = tuple(torch.linspace(low, 1.0, 13, dtype=dtype) for low in (-2.0, 0.0))
    return (*features(13, 6, 60, dtype), reference, state)


def sharded_answer(place, group, tau):
    """Value, gradients and state, of this rank's part, without and with running estimates."""
    results = []
    image, text, reference, state = batch_of()
    for options in (
        {},
        {"reference": tuple(part[place] for part in reference), "log_u": tuple(part[place] for part in state)},
    ):
        own = tuple(part[place].clone().requires_grad_() for part in (image, text))
        temperature = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
        step = contrastive_risk(*own, temperature, gamma=0.5, eps=1e-6, rho=0.2, group=group, **options)
        found = gradients(step.value, (*own, temperature))
        results.append([step.value.detach(), *found, *step.log_u, *step.distances])
    return results


def other_answer(place, group, divergence, gamma):
    """The same of another divergence, steered, with running dual variables."""
    image, text, reference, _ = batch_of()
    before = (torch.full((13,), 0.1, dtype=torch.float64), torch.full((13,), torch.nan, dtype=torch.float64))
    own = tuple(part[place].clone().requires_grad_() for part in (image, text))
    step = contrastive_risk(
        *own,
        0.3,
        reference=tuple(part[place] for part in reference),
        divergence=divergence,
        threshold=tuple(part[place] for part in before),
        gamma=gamma,
        group=group,
    )
    return [step.value.detach(), *gradients(step.value, own), *step.threshold, *step.risks, *step.distances]


OTHERS = [(ChiSquare(), 1.0), (ChiSquare(), 0.5), (CVaR(0.3), 0.5)]


def two_level_answer(place, group):
    image, text, reference, _ = batch_of()
    own = tuple(part[place].clone().requires_grad_() for part in (image, text))
    guide = tuple(part[place] for part in reference)
    risk = two_level_risk(*own, 0.1, ChiSquare(), reference=guide, radius=0.2, group=group)
    return [risk.value.detach(), risk.weights.detach(), *gradients(risk.value, own)]


def work(rank, world, folder):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    try:
        start = sum(SHARDS[world][:rank])
        place = slice(start, start + SHARDS[world][rank])
        answers = {}
        for tau in (0.002, 0.3):
            for tile in (10, 2**21):
                tiles.TILE, tiles.ROWS = tile, 1
                answers[tau, tile] = sharded_answer(place, dist.group.WORLD, tau)
        answers["two levels"] = two_level_answer(place, dist.group.WORLD)
        answers["others"] = [other_answer(place, dist.group.WORLD, *other) for other in OTHERS]
        torch.save(answers, Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_a_lone_pair_over_all_ranks_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        image, text = features(1, 3, 62)
        with pytest.raises(ValueError, match="at least 2 pairs over all ranks, got 1"):
            contrastive_risk(image, text, 0.1, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", SHARDS)
def test_ranks_give_the_value_and_gradients_of_one_process(world, tmp_path):
    start_ranks(work, (world, str(tmp_path)), world)
    answers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    total = sum(SHARDS[world])
    joint = [answer.pop("two levels") for answer in answers]
    expected = two_level_answer(slice(0, total), None)
    assert all(abs(part[0] - expected[0]) <= 1e-12 for part in joint)
    for field in (1, 2, 3):
        close([torch.cat([part[field] for part in joint])], [expected[field][:total]], 1e-9)
    parts = zip(*(answer.pop("others") for answer in answers), strict=True)
    for other, found in zip(OTHERS, parts, strict=True):
        value, *fields = other_answer(slice(0, total), None, *other)
        assert all(abs(part[0] - value) <= 1e-12 for part in found)
        joined = [torch.cat([part[number] for part in found]) for number in range(1, len(fields) + 1)]
        close(joined, [field[:total] for field in fields], 1e-12)
    for key in answers[0]:
        alone = [
            [field if field.ndim == 0 else field[:total] for field in result]
            for result in sharded_answer(slice(0, total), None, key[0])
        ]
        for number, expected in enumerate(alone):
            parts = [answer[key][number] for answer in answers]
            for rank_parts in parts:
                assert abs(rank_parts[0] - expected[0]) <= 1e-12 * abs(expected[0])
            tau_slope = sum(rank_parts[3] for rank_parts in parts)
            assert abs(tau_slope - expected[3]) <= 1e-9 * abs(expected[3])
            for place in (1, 2, 4, 5, 6, 7):
                joined = torch.cat([rank_parts[place] for rank_parts in parts])
                close([joined], [expected[place]], 1e-9)
