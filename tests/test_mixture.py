"""Several references: their mixtures against sums of similarities, learned weights against an independent optimizer."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import start_ranks
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from scipy.special import logsumexp

from drrho import KL, ChiSquare, penalized_risk
from drrho.contrastive import anchor_risks, contrastive_risk
from drrho.mixture import ReferenceMixture, mixed_references
from drrho.validation import deferred_checks

N = 24


def unit(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def guides(rows=slice(None)):
    """Three references: one that knows the pairs, one that knows them less, and one that knows nothing."""
    image = unit(N, 8, seed=0)
    found = [(image, torch.nn.functional.normalize(image + noise * unit(N, 8, seed=1), dim=-1)) for noise in (0.7, 1.5)]
    found.append((unit(N, 5, seed=2), unit(N, 5, seed=3)))
    return [(image[rows], text[rows]) for image, text in found]


def negative_log_likelihood(scales):
    """InfoNCE of the stacked similarities, in NumPy."""
    x = sum(scale * (image @ text.T).numpy() for scale, (image, text) in zip(scales, guides(), strict=True))
    return (logsumexp(x, 0) + logsumexp(x, 1) - 2 * np.diag(x)).mean() / 2


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
def test_a_mixture_has_the_weighted_mean_of_the_similarities_and_unit_norm(weights):
    image, text = mixed_references(guides(), weights)
    given = weights or [1 / 3] * 3
    expected = sum(w * a @ b.T for w, (a, b) in zip(given, guides(), strict=True))
    assert torch.allclose(image @ text.T, expected, rtol=0, atol=1e-12)
    for side in (image, text):
        assert torch.allclose(side.norm(dim=1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-12)


def test_weights_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"weights must have one entry for each of the 3 references, got \[2\]"):
        mixed_references(guides(), [0.5, 0.5])
    with pytest.raises(ValueError, match="references must hold at least one pair"):
        mixed_references([])


def test_the_gradient_is_that_of_the_likelihood_by_differences():
    start = np.array([9.0, 5.0, 2.0])
    found = ReferenceMixture((3 * start).tolist()).gradient(guides())
    for k in range(3):
        step = np.zeros(3)
        step[k] = 1e-5
        up, down = (negative_log_likelihood(start * np.exp(sign * step)) for sign in (1, -1))
        assert found[k].item() == pytest.approx((up - down) / 2e-5, abs=1e-8)


@pytest.mark.slow
def test_learned_weights_are_those_of_the_greatest_likelihood():
    best = minimize(lambda log: negative_log_likelihood(np.exp(log)), np.zeros(3), method="L-BFGS-B", tol=1e-14)
    mixture = ReferenceMixture([10.0, 10.0, 10.0], learning_rate=0.1)
    for _ in range(300):
        mixture.step(mixture.gradient(guides()))
    expected = np.exp(best.x) / np.exp(best.x).sum()
    assert mixture.weights.numpy() == pytest.approx(expected, abs=5e-3)
    assert expected[0] > 0.9


def test_a_state_goes_on_at_the_same_bits_and_a_wrong_one_is_refused():
    whole, first, again = (ReferenceMixture([10.0, 4.0, 2.0], learning_rate=0.1) for _ in range(3))
    for _ in range(6):
        whole.step(whole.gradient(guides()))
    for _ in range(3):
        first.step(first.gradient(guides()))
    again.load_state_dict(first.state_dict())
    for _ in range(3):
        again.step(again.gradient(guides()))
    assert torch.equal(again.state_dict()["mixture"], whole.state_dict()["mixture"])
    for state in ({}, ReferenceMixture([1.0, 2.0]).state_dict(), {"mixture": torch.full((4, 3), torch.nan)}):
        with pytest.raises(ValueError, match=r"state must hold mixture, finite numbers \[4, 3\]"):
            again.load_state_dict(state)


def test_a_gradient_that_is_not_finite_changes_nothing():
    mixture, wrong = ReferenceMixture([10.0, 4.0]), torch.tensor([0.1, torch.nan], dtype=torch.float64)
    before = mixture.state_dict()["mixture"]
    with pytest.raises(ValueError, match="gradient must be finite"):
        mixture.step(wrong)
    with deferred_checks():
        mixture.step(wrong)
    assert torch.equal(mixture.state_dict()["mixture"], before)


@pytest.mark.parametrize("scales, rate", [([], 0.1), ([1.0, 0.0], 0.1), ([1.0, float("inf")], 0.1), ([1.0], 0.0)])
def test_scales_and_rates_out_of_range_are_refused(scales, rate):
    with pytest.raises(ValueError, match="scales must be" if rate else "learning_rate must be"):
        ReferenceMixture(scales, learning_rate=rate)


def answer(rows, counts=None, group=None):
    """Gradient of the mixture, and the worst case of all references with its gradients."""
    own = [part[rows].clone().requires_grad_() for part in unit(2, N, 6, seed=5)]
    found = {"mixture": ReferenceMixture([10.0, 6.0, 4.0], group=group).gradient(guides(rows), counts)}
    for name, divergence in (("kl", KL()), ("chi-square", ChiSquare())):
        options = {"divergence": divergence, "coefficient": 0.7, "group": group, "counts": counts}
        step = contrastive_risk(own[0], own[1], 0.1, reference=guides(rows), **options)
        image, text = torch.autograd.grad(step.value, own)
        found |= {f"{name}.value": step.value.detach(), f"{name}.image": image, f"{name}.text": text}
    return found


def on_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(0, 9) if rank == 0 else slice(9, N)
    save_file(answer(rows, [9, N - 9], dist.group.WORLD), folder / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_have_the_mixture_and_the_worst_case_of_one_process(tmp_path):
    start_ranks(on_rank, (tmp_path,), 2)
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, expected in answer(slice(None)).items():
        found = torch.cat([one[name], two[name]]) if expected.ndim == 2 else one[name]
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12), name
        assert expected.ndim == 2 or torch.equal(one[name], two[name])


@pytest.mark.parametrize("coefficient", [1.0, 0.5, -0.5, torch.tensor(0.5, dtype=torch.float64)])
@pytest.mark.parametrize("divergence", [KL(), ChiSquare()])
def test_the_worst_case_is_that_of_the_largest_excess_of_each_pair(divergence, coefficient):
    image, text = unit(2, N, 6, seed=5)
    image.requires_grad_()
    step = contrastive_risk(image, text, 0.1, reference=guides(), divergence=divergence, coefficient=coefficient)
    c, total = float(coefficient), 0.0
    s, others = image @ text.T, [a @ b.T for a, b in guides()]
    for transposed in (False, True):
        of_target, of_guides = (s.T, [r.T for r in others]) if transposed else (s, others)
        for i in range(N):
            kept = [j for j in range(N) if j != i]
            losses = [(of_target[i] - of_target[i, i]) - c * (r[i] - r[i, i]) for r in of_guides]
            losses = torch.stack(losses).amax(0)[kept]
            total = total + penalized_risk(losses, divergence, 0.1).value
    expected = total / (2 * N)
    assert step.value.item() == pytest.approx(expected.item(), rel=1e-9)
    one, other = (torch.autograd.grad(value, image, retain_graph=True)[0] for value in (step.value, expected))
    assert torch.allclose(one, other, rtol=1e-6, atol=1e-10)
    if not isinstance(coefficient, torch.Tensor):
        plain = anchor_risks(image, text, 0.1, reference=guides(), divergence=divergence, coefficient=c)
        assert torch.allclose(plain[0].value, step.risks[0], rtol=1e-9)


def test_the_worst_case_of_one_reference_is_steering_by_it_with_the_running_state():
    image, text = unit(2, N, 6, seed=5)
    (guide, *_), log_u = guides(), (torch.linspace(-1, 1, N, dtype=torch.float64), torch.full((N,), -torch.inf))
    for options in ({"divergence": KL(), "log_u": log_u, "gamma": 0.6}, {"divergence": ChiSquare()}):
        one, list_of_one = (
            contrastive_risk(image, text, 0.1, reference=reference, **options) for reference in (guide, [guide])
        )
        assert list_of_one.value.item() == pytest.approx(one.value.item(), rel=1e-12)
        for before, after in zip(one.log_u or one.threshold, list_of_one.log_u or list_of_one.threshold, strict=True):
            assert torch.allclose(before, after, rtol=1e-9, atol=1e-12)


def test_no_reference_in_a_list_or_one_of_other_pairs_is_refused():
    image, text = unit(2, N, 6, seed=5)
    with pytest.raises(ValueError, match="reference must hold at least one pair of features"):
        contrastive_risk(image, text, 0.1, reference=[])
    first, *_ = guides()
    with pytest.raises(ValueError, match=f"reference must hold {N} pairs like image and text, got 5"):
        contrastive_risk(image, text, 0.1, reference=[first, (first[0][:5], first[1][:5])])


def test_a_list_of_two_tensors_is_one_pair():
    image, text = unit(2, N, 6, seed=5)
    guide, *_ = guides()
    for options in ({}, {"divergence": ChiSquare()}):
        steps = [contrastive_risk(image, text, 0.1, reference=reference, **options) for reference in (guide, [*guide])]
        assert torch.equal(steps[0].value, steps[1].value)


@pytest.mark.parametrize("weights", [[1.5, -0.5], [1.0, 1.0], [math.nan, 1.0]])
def test_weights_that_are_no_shares_are_refused(weights):
    features = torch.nn.functional.normalize(torch.randn(2, 2, 5, 8), dim=-1)
    with pytest.raises(ValueError, match="weights must not be negative and must add up to 1"):
        mixed_references([tuple(each) for each in features], weights)
