"""The contrastive risk against its definition, the core, and published input/output cases."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from drrho import KL, ChiSquare, CVaR, penalized_risk
from drrho.contrastive import contrastive_risk

CASES = np.load(Path(__file__).parent / "fixtures" / "contrastive_reference_cases.npz")


def features(pairs, width, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, pairs, width, generator=generator, dtype=torch.float64)
    image, text = torch.nn.functional.normalize(draw, dim=-1).to(dtype)
    return image, text


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
    assert torch.allclose(step.risks[0].value, torch.stack(by_image), rtol=0, atol=1e-10)
    assert torch.allclose(step.risks[1].value, torch.stack(by_text), rtol=0, atol=1e-10)


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
    assert torch.allclose(step.risks[0].weights, torch.full((7, 6), 1 / 6, dtype=torch.float64), rtol=1e-12)


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
    ],
)
def test_refusals_name_argument_and_value(change, message):
    arguments = {"image": torch.eye(5)[:, :3], "text": torch.eye(5)[:, :3], "temperature": 0.1} | change
    with pytest.raises(ValueError, match=message):
        contrastive_risk(arguments.pop("image"), arguments.pop("text"), **arguments)
