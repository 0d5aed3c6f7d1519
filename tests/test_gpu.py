"""The library's laws on a GPU: every risk, the contrastive risk, running estimates and selection on CUDA tensors.

Everything here needs CUDA and is skipped elsewhere. The independent solvers and tolerances are those of the tests on
the CPU (`oracles.py`, `problems.py`, `families.py`).
"""

import math

import numpy as np
import oracles
import pytest
import torch
from families import EVERY, SMOOTH
from problems import HARD, features, ratio_tolerance, scale_of, tensor, value_tolerance

from drrho import KL, ChiSquare, CVaR, constrained_risk, penalized_risk
from drrho.contrastive import anchor_risks, contrastive_risk, info_nce
from drrho.risk import hybrid_risk
from drrho.running import RunningEstimates, RunningThresholds
from drrho.selection import joint_selection, sample, top_k

pytestmark = pytest.mark.gpu

#: Rows whose answer is decided by ties, cancellation or scale, and ordinary ones.
ROWS = ("normal", "heavy tail", "tied maxima", "ties everywhere", "offset 1e8", "scale 1e-8", "single", "constant")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_row = pytest.mark.parametrize("losses", [HARD[name] for name in ROWS], ids=ROWS)
every_divergence = pytest.mark.parametrize("name", EVERY)
LONG = {"one long row": (100_003,), "rows": (64, 1024), "wide rows": (3, 20_000), "deep": (2, 3, 257)}
every_shape = pytest.mark.parametrize("shape", LONG.values(), ids=LONG.keys())


def on_device(losses, dtype):
    """Return the losses as the device has them, and as an oracle sees what the device was given."""
    given = tensor(losses, torch.float64).to("cuda", dtype)
    return given, given.double().cpu().numpy()


def drawn(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64).exp() - 2).to("cuda", dtype)


def forms(divergence):
    """Yield every form of a risk."""
    for radius in (1e-8, 0.05, 2.0):
        yield lambda z, radius=radius: constrained_risk(z, divergence, radius)
    for strength in (0.3, 5.0):
        yield lambda z, strength=strength: penalized_risk(z, divergence, strength)
    if divergence.has_radius:
        yield lambda z: hybrid_risk(z, divergence, 0.05, 0.3)


# --- against independent solvers ----------------------------------------------------------------------------------

EXACT = {
    "kl ball": (lambda z: constrained_risk(z, KL(), 0.3), lambda z: oracles.kl_ball(z, 0.3)),
    "chi2 ball": (lambda z: constrained_risk(z, ChiSquare(), 0.3), lambda z: oracles.chi_square_ball(z, 0.3)),
    "kl ball, tiny": (lambda z: constrained_risk(z, KL(), 1e-8), lambda z: oracles.kl_ball(z, 1e-8)),
    "chi2 ball, tiny": (lambda z: constrained_risk(z, ChiSquare(), 1e-8), lambda z: oracles.chi_square_ball(z, 1e-8)),
    "cvar": (lambda z: constrained_risk(z, CVaR(0.35)), lambda z: oracles.cvar(z, 0.35)),
    "tv ball": (lambda z: constrained_risk(z, EVERY["tv"], 0.3), lambda z: oracles.total_variation_ball(z, 0.3)),
    "order 0.5 ball": (
        lambda z: constrained_risk(z, EVERY["order 0.5"], 0.3),
        lambda z: oracles.power_ball(z, 0.3, 0.5),
    ),
    "order 3 ball": (lambda z: constrained_risk(z, EVERY["order 3"], 0.3), lambda z: oracles.power_ball(z, 0.3, 3.0)),
}


@every_dtype
@every_row
@pytest.mark.parametrize("solve, exact", EXACT.values(), ids=EXACT.keys())
def test_risk_is_that_of_an_independent_solver(solve, exact, losses, dtype):
    z, seen = on_device(losses, dtype)
    risk, expected = solve(z), exact(seen)
    assert abs(float(risk.value) - expected.value) <= value_tolerance(seen, dtype)
    weights = risk.weights.double().cpu().numpy() * len(seen)
    tolerance = ratio_tolerance(seen, expected.weights * len(seen), float(risk.strength), dtype)
    assert np.all(np.abs(weights - expected.weights * len(seen)) <= 100 * tolerance)


@every_row
@pytest.mark.parametrize("name", SMOOTH)
def test_certificate_holds_in_exact_arithmetic(name, losses):
    family, (z, seen) = SMOOTH[name], on_device(losses, torch.float64)
    risk = constrained_risk(z, family.divergence, 0.3)
    strength, threshold = float(risk.strength), float(risk.threshold)
    if not math.isfinite(strength) or strength == 0:
        return
    weights = risk.weights.tolist()
    proof = oracles.certify(family.phi, family.conjugate, seen, weights, strength, threshold, 0.3, cap=family.cap)
    tolerance = 1e-10 * scale_of(seen)
    assert proof.primal <= float(risk.premium) + tolerance
    assert float(risk.premium) <= proof.bound + tolerance
    assert proof.bound - proof.primal <= tolerance
    assert proof.divergence <= 0.3 * (1 + 1e-8)


# --- laws -----------------------------------------------------------------------------------------------------------


@every_dtype
@every_shape
@every_divergence
def test_answer_is_a_certified_distribution_that_attains_the_value(name, shape, dtype):
    z = drawn(shape, dtype)
    wide = z.double()
    span = float(wide.amax() - wide.amin())
    close = {torch.float64: 1e-11, torch.float32: 1e-5}[dtype] * span
    for solve in forms(EVERY[name]):
        risk = solve(z)
        weights = risk.weights.double()
        assert all(field.is_cuda and field.dtype == dtype for field in risk)
        assert float(weights.amin()) >= 0
        assert float((weights.sum(-1) - 1).abs().amax()) <= close / span
        assert float(risk.gap.double().abs().amax()) <= close
        assert float((wide.mean(-1) + risk.premium.double() - risk.value.double()).abs().amax()) <= close
        attained = (weights * wide).sum(-1)
        assert bool((risk.value.double() <= attained + close).all())
        assert bool((attained <= wide.amax(-1) + close).all())


@every_shape
@every_divergence
def test_gradient_is_the_weights(name, shape):
    z = drawn(shape).requires_grad_()
    for solve in forms(EVERY[name]):
        risk = solve(z)
        (gradient,) = torch.autograd.grad(risk.value.sum(), z)
        assert float((gradient - risk.weights.detach()).abs().amax()) <= 1e-12


@every_shape
@every_divergence
def test_value_follows_shift_and_scale(name, shape):
    z = drawn(shape)
    span = float(z.amax() - z.amin())
    plain = constrained_risk(z, EVERY[name], 0.05).value
    moved = constrained_risk(8 * z + 64, EVERY[name], 0.05).value
    assert float((moved - 8 * plain - 64).abs().amax()) <= 1e-11 * (8 * span + 64)


@every_shape
@every_divergence
def test_order_of_losses_does_not_matter(name, shape):
    z = drawn(shape)
    order = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(1)).cuda()
    for solve in forms(EVERY[name]):
        plain, permuted = solve(z), solve(z[..., order])
        assert float((plain.value - permuted.value).abs().amax()) <= 1e-11 * float(z.amax() - z.amin())
        assert float((plain.weights[..., order] - permuted.weights).abs().amax()) <= 1e-9


@every_shape
@every_divergence
def test_same_call_gives_the_same_bits(name, shape):
    z = drawn(shape, torch.float32)
    for solve in forms(EVERY[name]):
        first, second = solve(z), solve(z)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@every_shape
@every_divergence
def test_base_weights_that_are_uniform_change_nothing_and_those_of_zero_leave_out(name, shape):
    z = drawn(shape)
    n = shape[-1]
    plain = constrained_risk(z, EVERY[name], 0.05)
    uniform = constrained_risk(z, EVERY[name], 0.05, base_weights=torch.full((n,), 1 / n, device="cuda"))
    assert float((plain.value - uniform.value).abs().amax()) <= 1e-11 * float(z.amax() - z.amin())
    half = torch.zeros(n, dtype=torch.float64, device="cuda")
    half[: n // 2] = 1 / (n // 2)
    part = constrained_risk(z[..., : n // 2], EVERY[name], 0.05)
    zeros = constrained_risk(z, EVERY[name], 0.05, base_weights=half)
    assert float((part.value - zeros.value).abs().amax()) <= 1e-10 * float(z.amax() - z.amin())
    assert float(zeros.weights[..., n // 2 :].abs().amax()) == 0


@every_divergence
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_losses_of_sixteen_bits_are_solved_in_float32(name, half):
    z = drawn((64, 1000)).clamp(max=50).to(half)
    found, expected = (constrained_risk(part, EVERY[name], 0.05) for part in (z, z.float()))
    assert found.value.dtype == torch.float32
    assert torch.allclose(found.value, expected.value, rtol=1e-6, atol=1e-6)
    assert torch.allclose(found.weights, expected.weights, rtol=1e-4, atol=1e-7)


@every_divergence
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("shape", [(1000,), (64, 1024), (100_003,)], ids=["row", "rows", "long"])
def test_losses_that_are_not_finite_are_refused_by_name(name, bad, shape):
    z = drawn(shape, torch.float32)
    z.view(-1)[-1] = bad
    with pytest.raises(ValueError, match="losses"):
        constrained_risk(z, EVERY[name], 0.05)


@pytest.mark.parametrize("radius", [-0.1, math.nan, math.inf])
def test_radius_that_means_nothing_is_refused_by_name(radius):
    for given in (radius, torch.full((64,), radius, device="cuda")):
        with pytest.raises(ValueError, match="radius"):
            constrained_risk(drawn((64, 128)), KL(), given)


# --- the contrastive risk, running estimates, selection ---------------------------------------------------------------

DIVERGENCES = {"kl": KL(), "chi2": ChiSquare(), "cvar": CVaR(0.1)}
PRECISE = {torch.float64: 1e-11, torch.float32: 2e-5}


def unit(dtype, pairs=193, width=64, seed=0):
    image, text = features(pairs, width, seed)
    return image.to("cuda", dtype).requires_grad_(), text.to("cuda", dtype).requires_grad_()


@every_dtype
@pytest.mark.parametrize("steered", [False, True], ids=["plain", "steered"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_contrastive_risk_is_that_of_its_definition(name, steered, dtype):
    image, text = unit(dtype)
    reference = tuple(part.detach() for part in unit(dtype, width=32, seed=1)) if steered else None
    options = {"reference": reference, "divergence": DIVERGENCES[name]}
    value = contrastive_risk(image, text, 0.07, **options).value
    wide = [part.detach().double().requires_grad_() for part in (image, text)]
    beside = {**options, "reference": tuple(part.double() for part in reference)} if reference else options
    both = anchor_risks(*wide, 0.07, **beside)
    expected = (both[0].value.mean() + both[1].value.mean()) / 2
    assert abs(float(value) - float(expected)) <= PRECISE[dtype]
    found, exact = torch.autograd.grad(value, (image, text)), torch.autograd.grad(expected, wide)
    for ours, theirs in zip(found, exact, strict=True):
        assert float((ours - theirs).norm()) <= 100 * PRECISE[dtype] * float(theirs.norm())


@every_dtype
def test_info_nce_is_the_cross_entropy_of_the_pairs(dtype):
    image, text = unit(dtype)
    logits = image.double() @ text.double().T / 0.07
    labels = torch.arange(len(logits), device="cuda")
    expected = sum(torch.nn.functional.cross_entropy(matrix, labels) for matrix in (logits, logits.T)) / 2
    assert abs(float(info_nce(image, text, 0.07)) - float(expected)) <= 10 * PRECISE[dtype]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_steps_with_running_state_are_those_of_the_cpu(name):
    divergence = DIVERGENCES[name]
    is_kl = divergence.has_exponential_weights
    ends = []
    for device in ("cpu", "cuda"):
        running = (RunningEstimates if is_kl else RunningThresholds)(500, device=device)
        values = []
        for step in range(3):
            image, text = (part.detach().to(device).requires_grad_() for part in unit(torch.float64, seed=step))
            index = torch.arange(step, step + 2 * len(image), 2, device=device)
            state = {"log_u" if is_kl else "threshold": running.lookup(index)}
            found = contrastive_risk(image, text, 0.07, divergence=divergence, gamma=0.6, **state)
            running.update(index, found.log_u if is_kl else found.threshold)
            values += [found.value.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(found.value, (image, text)))]
        ends.append((*values, *(part.cpu() for part in running.lookup(torch.arange(500, device=device)))))
    for ours, expected in zip(*reversed(ends), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_samples_that_occur_twice_get_the_mean_of_their_estimates():
    running = RunningEstimates(10, device="cuda")
    index = torch.tensor([3, 7, 3], device="cuda")
    u = torch.tensor([1.0, 5.0, 3.0], device="cuda")
    running.update(index, (u.log(), u.log()))
    image, _ = running.lookup(torch.tensor([3, 7, 0], device="cuda"))
    assert image.exp().tolist() == pytest.approx([2.0, 5.0, 0.0])


def test_selection_chooses_what_the_cpu_chooses():
    scores = drawn((1000,), torch.float32)
    assert torch.equal(top_k(scores, 100).cpu(), top_k(scores.cpu(), 100))
    assert torch.equal(sample(scores, 100, seed=3).cpu(), sample(scores.cpu(), 100, seed=3))
    matrix = drawn((200, 200), torch.float64)
    chosen = [joint_selection(part, 40, chunks=4, seed=1, temperature=0.0) for part in (matrix, matrix.cpu())]
    assert torch.equal(chosen[0].cpu(), chosen[1])
