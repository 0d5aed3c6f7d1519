"""Steering in a loop: against the core for every divergence, in parts, over ranks, in mixed precision, and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from families import EVERY
from processes import start_ranks
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from drrho import KL, ChiSquare, CVaR, constrained_risk, drrho_risk, excess_losses, hybrid_risk, penalized_risk
from drrho.integrations import ReferenceLosses, Steering

N, NAN = 24, float("nan")
WAYS = {
    "radius": ({"radius": 0.2}, lambda z, divergence: constrained_risk(z, divergence, 0.2)),
    "strength": ({"strength": 0.5}, lambda z, divergence: penalized_risk(z, divergence, 0.5)),
    "both": ({"radius": 0.2, "strength": 0.5}, lambda z, divergence: hybrid_risk(z, divergence, 0.2, 0.5)),
    "rho": ({"rho": 3.0}, lambda z, divergence: drrho_risk(z, 0 * z, divergence, rho=3.0)),
}


def losses_and_reference(shape=(N,)):
    generator = torch.Generator().manual_seed(0)
    losses, reference = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return losses.requires_grad_(), reference


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EVERY)
def test_the_step_is_the_core(name, way):
    (arguments, core), divergence = WAYS[way], EVERY[name]
    losses, reference = losses_and_reference()
    step = Steering(divergence, coefficient=0.7, **arguments)(losses, reference)
    (gradient,) = torch.autograd.grad(step.loss, losses)
    risk = core(excess_losses(losses, reference, 0.7), divergence)
    assert step.loss.equal(step.value) and torch.allclose(step.value, risk.value, rtol=1e-12)
    assert torch.allclose(gradient, risk.weights, rtol=1e-6, atol=1e-12)
    assert step.weights.equal(risk.weights.detach()) and step.excess.equal((losses - 0.7 * reference).detach())
    assert not step.weights.requires_grad and not step.excess.requires_grad


def test_leading_dimensions_are_batches_of_their_own():
    losses, reference = losses_and_reference((3, N))
    step = Steering(KL(), strength=1.0)(losses, reference)
    assert step.value.shape == (3,) and step.weights.shape == (3, N)
    assert torch.allclose(step.loss, step.value.mean())


def test_base_weights_are_the_weights_without_steering():
    losses, reference = losses_and_reference()
    base = torch.softmax(torch.arange(N).double() / 5, 0)
    step = Steering(ChiSquare(), radius=0.0)(losses, reference, base_weights=base)
    assert torch.allclose(step.weights, base) and torch.allclose(step.value, base @ (losses - reference))


def test_reference_losses_are_looked_up_by_index(tmp_path):
    losses, _ = losses_and_reference((3,))
    stored = torch.arange(10.0)
    folder = ReferenceLosses.compute(tmp_path, stored.__getitem__, [(range(10), range(10))], 10, about={})
    index = torch.tensor([7, 0, 7])
    expected = Steering(CVaR(0.5))(losses, stored[index])
    for reference in (folder, stored):
        step = Steering(CVaR(0.5), reference=reference)(losses, index=index)
        assert step.value.equal(expected.value) and step.weights.equal(expected.weights)


@pytest.mark.parametrize("kind", [list, np.asarray, np.float32, torch.Tensor.requires_grad_], ids=str)
def test_the_references_losses_are_given_as_they_come(kind):
    losses, _ = losses_and_reference((3,))
    stored = torch.arange(10.0)
    expected = Steering(CVaR(0.5))(losses, stored[[7, 0, 7]])
    for index in ([7, 0, 7], np.array([7, 0, 7], np.uint8), torch.tensor([7, 0, 7], dtype=torch.int32)):
        step = Steering(CVaR(0.5), reference=kind(stored.clone()))(losses, index=index)
        assert torch.allclose(step.excess, expected.excess) and torch.allclose(step.weights, expected.weights)


@pytest.mark.parametrize(
    "index, message",
    [
        ([0, 10], r"index must lie in \[0, 10\), got 10: reference is of other data"),
        ([-1, 0], r"index must lie in \[0, 10\), got -1"),
        ([0.0, 1.0], r"index must have shape \[b\] and an integer dtype"),
        ([True, False], r"index must have shape \[b\] and an integer dtype"),
        ([[0, 1]], r"index must have shape \[b\] and an integer dtype"),
        ([0, 1, 2], r"reference_losses must have the shape of losses, \[2\], got \[3\]"),
    ],
)
def test_an_index_of_other_samples_is_refused(index, message):
    with pytest.raises(ValueError, match=message):
        Steering(KL(), strength=1.0, reference=torch.zeros(10))(torch.zeros(2), index=index)


@pytest.mark.parametrize("reference", [torch.zeros(3, 2), 1.0, [], [0.0, NAN], "losses"], ids=str)
def test_what_is_no_row_of_losses_is_no_reference(reference):
    with pytest.raises((ValueError, TypeError), match=r"^reference must "):
        Steering(KL(), strength=1.0, reference=reference)


def test_losses_of_sequences_are_looked_up_one_after_another(tmp_path):
    folder = ReferenceLosses.compute(tmp_path, lambda x: x, [([0, 1], torch.arange(5.0))], [2, 3], about={})
    losses, _ = losses_and_reference((5,))
    step = Steering(CVaR(0.5), reference=folder)(losses, index=[1, 0])
    assert torch.allclose(step.excess, losses.detach() - torch.tensor([2.0, 3, 4, 0, 1]))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "losses, reference, message",
    [
        ([1.0, NAN], [0.0, 0.0], r"^losses must be finite, got nan at index \[1\]"),
        ([1.0, float("inf")], [0.0, 0.0], r"^losses must be finite, got inf"),
        ([1.0, 2.0], [NAN, 0.0], r"^reference_losses must be finite, got nan at index \[0\]"),
        ([1.0, 2.0], [0.0], r"reference_losses must have the shape of losses, \[2\], got \[1\]"),
        ([1.0], [0.0], "losses must be of at least 2 samples to compare, got 1.*drop_last=True"),
        ([], [], r"losses must have shape \[..., n\] with n >= 1, got \[0\]"),
    ],
)
def test_what_cannot_be_weighed_is_refused(losses, reference, message):
    with pytest.raises(ValueError, match=message):
        Steering(KL(), strength=1.0)(torch.tensor(losses), torch.tensor(reference))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="losses must have a floating dtype"):
        Steering(KL(), strength=1.0)(torch.arange(3), torch.zeros(3))


def test_exactly_one_source_of_reference_losses():
    steering, losses = Steering(KL(), strength=1.0), torch.zeros(2)
    for arguments in ({}, {"reference_losses": losses, "index": [0, 1]}):
        with pytest.raises(ValueError, match="give reference_losses, or index"):
            steering(losses, **arguments)
    with pytest.raises(ValueError, match=r"index needs Steering\(reference"):
        steering(losses, index=[0, 1])


@pytest.mark.parametrize(
    "divergence, arguments, message",
    [
        (KL(), {}, "give radius, strength, both of these, or rho, got none"),
        (KL(), {"rho": 1.0, "radius": 1.0}, "got radius and rho"),
        (KL(), {"strength": -1.0}, "strength must be finite and >= 0, got -1.0"),
        (KL(), {"radius": NAN}, "radius must be finite and >= 0, got nan"),
        (CVaR(0.5), {"coefficient": NAN}, "coefficient must be finite, got nan"),
        (CVaR(0.5), {"group": "world"}, "group must be 'all', a process group or None, got 'world'"),
    ],
)
def test_one_risk_is_asked_for(divergence, arguments, message):
    with pytest.raises(ValueError, match=message):
        Steering(divergence, **arguments)


def test_a_divergence_is_a_divergence():
    with pytest.raises(TypeError, match="divergence must be a Divergence such as"):
        Steering("kl", strength=1.0)


# --- one loss curve, in whatever parts --------------------------------------------------------------------------------

STEPS, BATCH, RATE = 4, 16, 0.5


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, BATCH, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (STEPS, BATCH), generator=generator)
    return x.to(dtype), y, torch.rand(STEPS, BATCH, generator=generator, dtype=torch.float64).to(dtype)


def train(steering, parts=1, rank=0, world=1, dtype=torch.float64, autocast=False):
    """Train on this rank's part of each batch, in parts, and return the loss curve."""
    model, curve = network(dtype), []
    model = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for x, y, reference in zip(*data(dtype), strict=True):
        own = [part.chunk(world)[rank] for part in (x, y, reference)]
        pieces = list(zip(own[0].chunk(parts), own[1].chunk(parts), strict=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            step = steering.accumulate(
                model, lambda part: cross_entropy(model(part[0]), part[1], reduction="none"), pieces, own[2]
            )
        optimizer.step()
        optimizer.zero_grad()
        curve.append(step.value.detach())
    return torch.stack(curve)


def plain(steering):
    """The same without accumulation: a usual loop."""
    model, curve = network(), []
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for x, y, reference in zip(*data(), strict=True):
        step = steering(cross_entropy(model(x), y, reduction="none"), reference)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        curve.append(step.value.detach())
    return torch.stack(curve)


CURVES = {
    "KL": (KL(), {"strength": 0.5}),
    "chi-square": (ChiSquare(), {"rho": 3.0}),
    "CVaR": (CVaR(0.3), {}),
    "hybrid": (KL(), {"radius": 0.1, "strength": 0.2}),
}


def steering_of(name, **more):
    divergence, arguments = CURVES[name]
    return Steering(divergence, **arguments, **more)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("parts", [1, 2, 4, 16])
def test_parts_give_the_curve_of_the_batch(name, parts):
    expected = plain(steering_of(name))
    assert torch.allclose(train(steering_of(name), parts), expected, rtol=1e-6)
    assert expected.std() > 0.01  # the model changes


def test_live_reference_losses_come_with_the_losses():
    x, y, reference = (part[0] for part in data())
    model, steering = network(), steering_of("KL")

    def both(part):
        return cross_entropy(model(part[0]), part[1], reduction="none"), part[2]

    step = steering.accumulate(model, both, list(zip(x.chunk(4), y.chunk(4), reference.chunk(4), strict=True)))
    assert torch.allclose(step.value, plain(steering)[0], rtol=1e-12)


def test_autocast_changes_the_curve_only_by_its_rounding():
    expected = plain(steering_of("KL"))
    curves = [train(steering_of("KL"), parts, dtype=torch.float32, autocast=True) for parts in (1, 4)]
    assert torch.allclose(curves[0][0], curves[1][0], rtol=1e-6)
    assert torch.allclose(curves[0], curves[1], rtol=2e-3)  # gradients in bfloat16 are rounded in each part
    assert torch.allclose(curves[0].double(), expected, rtol=0.03)


def faults():
    """What each rank raises: nothing; when one of them has NaN; when one cannot look up the reference's losses."""
    rank, messages = dist.get_rank(), []
    steering = Steering(KL(), strength=1.0, reference=torch.zeros(2))
    for losses, own in (
        (torch.ones(2) / (rank or 1), {"reference_losses": torch.zeros(2)}),
        (torch.tensor([1.0, NAN if rank == 1 else 2.0]), {"reference_losses": torch.zeros(2)}),
        (torch.ones(2), {"index": [0, 2 if rank == 1 else 1]}),
    ):
        try:
            messages.append(steering(losses, **own).value.item())
        except ValueError as error:
            messages.append(str(error))
    return messages


def on_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    try:
        curves = {(name, parts): train(steering_of(name), parts, rank, world) for name in CURVES for parts in (1, 2)}
        alone = Steering(KL(), strength=1.0, group=None)(torch.arange(2.0) + rank, torch.zeros(2))
        torch.save((curves, faults(), alone.value, alone.loss), Path(folder) / f"{world}-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_curve_of_one_process(tmp_path, world):
    start_ranks(on_rank, (world, str(tmp_path)), world)
    for rank in range(world):
        curves, messages, value, loss = torch.load(tmp_path / f"{world}-{rank}.pt")
        for (name, _), curve in curves.items():
            assert torch.allclose(curve, plain(steering_of(name)), rtol=1e-6)
        assert isinstance(messages[0], float)
        for message, own in zip(messages[1:], ("got nan at index [1]", "index must lie in [0, 2), got 2"), strict=True):
            assert (own if rank == 1 else "1 of the other ranks refused their losses") in message
        assert value == loss and torch.allclose(
            value, (torch.arange(2.0) + rank).logsumexp(0) - torch.tensor(2.0).log()
        )
