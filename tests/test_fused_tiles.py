"""The contrastive risk by fused kernels, which Triton's interpreter runs where there is no GPU."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from problems import features
from processes import start_ranks

from drrho import tiles
from drrho.contrastive import anchor_risks, contrastive_risk

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # its interpreter computes with infinities by NumPy
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPERATURES = [0.01, 0.07, 1.0]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Compute all tiles by the kernels, also on the CPU."""
    from drrho import fused_tiles

    def widened(left, right, total, **how):
        product(left.to(total.dtype), right.to(total.dtype), total, **how)

    product = fused_tiles._add_product
    monkeypatch.setattr(tiles, "KERNEL_DEVICES", {DEVICE})
    if DEVICE == "cpu":  # which has no products of bfloat16 with sums in float32
        monkeypatch.setattr(fused_tiles, "_add_product", widened)


def problem(pairs, steered, individual, size=1.0):
    """Features in float64, those of the reference and temperatures."""
    image, text = (part * size for part in features(pairs, 16, pairs))
    rising = torch.linspace(1, 2, pairs, dtype=torch.float64)
    reference = features(pairs, 5, pairs + 1) if steered else None
    return image, text, reference, (rising, rising.flip(0)) if individual else 1


def answers(image, text, reference, tau, dtype, **options):
    """Value, gradients, distances and log g: those of the plain form in float64, or those of the kernels in float32."""
    convert = lambda part: part.detach().to(DEVICE, dtype)  # noqa: E731
    image, text = (convert(part).requires_grad_() for part in (image, text))
    reference = None if reference is None else tuple(map(convert, reference))
    tau = tuple(map(convert, tau)) if isinstance(tau, tuple) else tau
    if dtype == torch.float64:
        risks = anchor_risks(image, text, tau, reference=reference, **options)
        value, found = sum(risk.value.mean() for risk in risks) / 2, [risk.value for risk in risks]
    else:
        step = contrastive_risk(image, text, tau, reference=reference, **options)
        value, found = step.value, step.risks
    return value.detach(), torch.stack(tuple(found)).detach(), torch.autograd.grad(value, (image, text))


def check(exact, found, size, tau):
    """Exponents of size s are known to ``eps s``, so are the logarithms of their sums and the relative weights."""
    eps = 2.0**-23 * (size / tau + 8)
    assert abs(found[0] - exact[0]) <= eps * tau
    assert (found[1] - exact[1]).abs().max() <= 4 * eps * tau
    for ours, theirs in zip(found[2], exact[2], strict=True):
        assert (ours - theirs).norm() <= 4 * eps * theirs.norm()


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("include_positive", [False, True])
@pytest.mark.parametrize("individual", [False, True])
@pytest.mark.parametrize("pairs", [2, 3, 65, 77, pytest.param(300, marks=pytest.mark.slow)])
def test_kernels_are_the_plain_form(pairs, individual, include_positive, steered, tau):
    image, text, reference, factor = problem(pairs, steered, individual)
    taus = tuple(tau * part for part in factor) if individual else tau
    options = {
        "reference": reference,
        "tau": taus,
        "include_positive": include_positive,
        "coefficient": 0.7 if steered else 1.0,
    }
    exact, found = (answers(image, text, dtype=dtype, **options) for dtype in (torch.float64, torch.float32))
    check(exact, found, 2.0, tau)


@pytest.mark.parametrize("size", [30.0, 1e3])
@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_features_of_any_size(size, shift):
    """Exponents of thousands neither overflow nor vanish, also where all of an anchor's are far below another's."""
    image, text, reference, _ = problem(40, True, False)
    image = image * torch.linspace(0.01, 1, 40, dtype=torch.float64)[:, None] * size
    text = text + shift * image[0] / size
    exact, found = (answers(image, text, reference, 0.05, dtype) for dtype in (torch.float64, torch.float32))
    check(exact, found, 2 * size, 0.05)


@pytest.mark.parametrize("pairs, tile, side", [(300, 2**13, 96), (300, 2**14, 300), (200, 2**10, 8)])
def test_a_matrix_of_many_tiles(pairs, tile, side, monkeypatch):
    from drrho import fused_tiles

    image, text, reference, taus = problem(pairs, True, True)
    once = answers(image, text, reference, taus, torch.float32)
    monkeypatch.setattr(fused_tiles, "KERNEL_TILE", tile)
    monkeypatch.setattr(fused_tiles, "SIDE", side)
    found = answers(image, text, reference, taus, torch.float32)
    check(answers(image, text, reference, taus, torch.float64), found, 2.0, 1.0)
    check(once, found, 2.0, 1.0)


def test_the_same_bits_again():
    image, text, reference, taus = problem(150, True, True)
    first, second = (answers(image, text, reference, taus, torch.float32) for _ in range(2))
    assert torch.equal(first[1], second[1])
    assert all(map(torch.equal, first[2], second[2]))


def test_a_graph_that_is_kept_gives_the_gradient_twice():
    """The kept matrix is replaced by its weights, and computed anew for the second backward pass."""
    image, text = (part.float().to(DEVICE).requires_grad_() for part in features(50, 8, 0))
    value = contrastive_risk(image, text, 0.1).value
    first = torch.autograd.grad(value, (image, text), retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(value, (image, text)), first, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)


def test_running_estimates_and_temperature():
    """Every output, and the gradient of the temperature, agree with those of torch's operations."""
    image, text, reference, _ = problem(60, True, False)
    results = []
    for dtype in (torch.float64, torch.float32):
        parts = [part.to(DEVICE, dtype).requires_grad_() for part in (image, text)]
        tau = torch.tensor(0.1, device=DEVICE, dtype=dtype, requires_grad=True)
        log_u = tuple(torch.linspace(low, 1, 60, device=DEVICE, dtype=dtype) for low in (-3, 2))
        guide = tuple(part.to(DEVICE, dtype) for part in reference)
        step = contrastive_risk(*parts, tau, reference=guide, log_u=log_u, gamma=0.4, eps=1e-3, rho=0.5)
        slopes = torch.autograd.grad(step.value, (*parts, tau))
        results.append([step.value.detach(), *slopes, *step.log_u, *step.risks, *step.distances])
    for exact, found in zip(*results, strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).norm() <= 2e-5 * exact.norm()


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("guide", [None, torch.bfloat16, torch.float32])
def test_features_in_bfloat16_are_multiplied_as_they_are(guide, tau, monkeypatch):
    """Similarities are those of the given features in float32, and gradients are rounded to bfloat16 at the end."""
    from drrho import fused_tiles

    image, text, reference, _ = problem(130, True, False)
    image, text = (part.to(DEVICE, torch.bfloat16).requires_grad_() for part in (image, text))
    wide = [part.detach().float().requires_grad_() for part in (image, text)]
    reference = None if guide is None else tuple(part.to(DEVICE, guide) for part in reference)
    steer = {"reference": reference, "coefficient": 1.0 if guide is None else 0.7}
    step = contrastive_risk(image, text, tau, **steer)
    exact = contrastive_risk(*wide, tau, **steer)
    assert abs(step.value - exact.value) <= 1e-6
    to_narrow, to_wide = torch.autograd.grad(step.value, (image, text)), torch.autograd.grad(exact.value, wide)
    for ours, theirs in zip(to_narrow, to_wide, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ((ours - theirs).abs() <= 2**-8 * theirs.abs() + 2**-14 * theirs.abs().max()).all()
    monkeypatch.setattr(fused_tiles, "KERNEL_TILE", 2**12)
    monkeypatch.setattr(fused_tiles, "SIDE", 64)
    tiled = contrastive_risk(image, text, tau, **steer)
    assert abs(tiled.value - exact.value) <= 1e-6


def test_kernels_are_used():
    from drrho.fused_tiles import FusedTiles

    image, text = (part.float().to(DEVICE) for part in features(5, 3, 0))
    rate = image.new_ones(())
    pairs = tiles.Pairs(image, text, (rate, rate))
    assert isinstance(tiles._matrix(pairs), FusedTiles)
    assert not isinstance(tiles._matrix(pairs._replace(image=image.double())), FusedTiles)


# --- ranks ------------------------------------------------------------------------------------------------------------

SHARDS = {2: [30, 41], 3: [0, 8, 63]}


def work(rank, world, folder):
    torch.set_num_threads(1)
    tiles.KERNEL_DEVICES = {"cpu"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        start = sum(SHARDS[world][:rank])
        place = slice(start, start + SHARDS[world][rank])
        torch.save(part_of(place, dist.group.WORLD), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def part_of(place, group):
    """Value, gradients and distances of some of the pairs, each with its own temperature."""
    image, text, reference, taus = problem(71, True, True)
    image, text = (part[place].float().requires_grad_() for part in (image, text))
    reference, taus = (tuple(part[place].float() for part in pair) for pair in (reference, taus))
    step = contrastive_risk(image, text, tuple(0.03 * part for part in taus), reference=reference, group=group)
    return [step.value.detach(), *torch.autograd.grad(step.value, (image, text)), *step.distances]


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="ranks of the CPU")
@pytest.mark.parametrize("world", SHARDS)
def test_ranks_give_the_answers_of_one_process(world, tmp_path):
    start_ranks(work, (world, str(tmp_path)), world)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    value, *alone = part_of(slice(0, 71), None)
    for number, expected in enumerate(alone, start=1):
        joined = torch.cat([part[number] for part in parts])
        assert (joined - expected).norm() <= 1e-5 * expected.norm()
    assert all(math.isclose(part[0], value, rel_tol=1e-5) for part in parts)
