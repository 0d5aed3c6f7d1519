"""Rows spread over real processes: every rank gets the whole row's risk, its own part of the weights and gradients.

One spawn of gloo processes solves all cases and leaves its answers in files; the tests compare them with one process.
"""

from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from families import EVERY, KINDS
from problems import tensor, value_tolerance
from processes import start_ranks

from drrho import KL, ChiSquare, constrained_risk, drrho_risk, hybrid_risk, penalized_risk

SHARDS = {2: (5, 12), 4: (1, 7, 3, 6)}
N = 17


def _row(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, dtype=torch.float64, generator=generator)


def _ties():
    z = _row(1)
    z[[2, 8, 15]] = z.max() + 0.25
    return z


def _base():
    counts = torch.arange(N, dtype=torch.float64) % 4  # some zero
    counts[0] += 64 - counts.sum()
    return counts / 64


ROWS = {
    "row": _row(),
    "ties": _ties(),
    "constant": torch.full((N,), 0.1, dtype=torch.float64),
    "offset": _row(2) + 2.0**20,
    "batch": torch.stack([_row(3), torch.full((N,), 4.0, dtype=torch.float64), 1e-6 * _row(4)]),
}
SOLVERS = {"ball": constrained_risk, "penalty": penalized_risk, "hybrid": partial(hybrid_risk, strength=0.4)}
PER_ROW = tensor([0.3, 0.2, 1e-6])


def _cases():
    """Key to (solver name, divergence name, row name, parameter, weighted)."""
    cases = {}
    for divergence in KINDS:
        for solver in SOLVERS:
            cases[f"{solver}-{divergence}-batch"] = (solver, divergence, "batch", PER_ROW, False)
        cases[f"ball-{divergence}-row"] = ("ball", divergence, "row", 0.2, False)
        cases[f"ball-{divergence}-weighted"] = ("ball", divergence, "row", 0.2, True)
    for divergence in ("kl", "chi2", "cvar", "tv", "order 0.5", "capped kl 0.3"):
        for row in ("ties", "constant", "offset"):
            cases[f"ball-{divergence}-{row}"] = ("ball", divergence, row, 0.2, False)
        cases[f"penalty-{divergence}-weighted"] = ("penalty", divergence, "row", 0.9, True)
        cases[f"hybrid-{divergence}-weighted"] = ("hybrid", divergence, "row", 0.15, True)
        cases[f"ball-{divergence}-past the maximum"] = ("ball", divergence, "ties", 50.0, False)
        cases[f"ball-{divergence}-small"] = ("ball", divergence, "row", 1e-8, False)
    return cases


CASES = _cases()
THIRD = ("kl", "chi2", "order 0.5")
FIELDS = ("value", "weights", "premium", "threshold", "strength", "gap")


def cases(world):
    """All on two ranks; on more, where only the sums are others, every divergence once."""
    return [key for key, case in CASES.items() if world == 2 or (case[0] == "hybrid" and case[2] == "batch")]


def _direction(shape):
    return torch.linspace(-1, 2, shape[-1], dtype=torch.float64).expand(shape)


def answer(case, piece=slice(None), group=None):
    """Fields, gradient and Hessian-vector product of one case, all for the given piece of the last dimension."""
    solver, divergence, row, parameter, weighted = case
    losses = ROWS[row][..., piece].clone().requires_grad_()
    base = _base()[piece] if weighted else None
    given = torch.as_tensor(parameter, dtype=torch.float64).clone().requires_grad_()
    risk = SOLVERS[solver](losses, EVERY[divergence], given, base_weights=base, group=group)
    result = {name: field.detach() for name, field in zip(FIELDS, risk, strict=True)}
    gradient, result["by parameter"] = torch.autograd.grad(
        risk.value.sum(), (losses, given), create_graph=True, allow_unused=True, materialize_grads=True
    )
    result["gradient"] = gradient.detach()
    result["by parameter"] = result["by parameter"].detach()
    if gradient.requires_grad:
        along = (gradient * _direction(ROWS[row].shape)[..., piece]).sum()
        (second,) = torch.autograd.grad(along, losses, allow_unused=True, materialize_grads=True)
        result["second"] = second
    return result


def third_derivative(divergence, piece=slice(None), group=None):
    """Along one direction, or None where it is refused."""
    losses, along = ROWS["row"][piece].clone().requires_grad_(), _direction((N,))[piece]
    derivative = constrained_risk(losses, EVERY[divergence], 0.2, group=group).value
    try:
        for _ in range(2):
            (derivative,) = torch.autograd.grad(derivative, losses, create_graph=True)
            derivative = (derivative * along).sum()
        return torch.autograd.grad(derivative, losses)[0]
    except RuntimeError:
        return None


def refusal(piece, group):
    """The message about base weights whose parts do not sum to one over all ranks."""
    try:
        constrained_risk(ROWS["row"][piece], KL(), 0.1, base_weights=_base()[piece] / 2, group=group)
    except ValueError as error:
        return str(error)
    return "accepted"


def refusal_of_a_loss(rank, piece, group):
    """The message about a loss that is NaN on one rank, and then the risk without it, on which all ranks still meet."""
    losses = ROWS["row"][piece].clone()
    losses[0] = torch.nan if rank == 1 else losses[0]
    try:
        constrained_risk(losses, KL(), 0.1, group=group)
    except ValueError as error:
        return str(error), constrained_risk(ROWS["row"][piece], KL(), 0.1, group=group).value
    return "accepted", None


def work(rank, world, folder):
    """One process: solve every case on this rank's piece."""
    torch.set_num_threads(1)
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=patience)
    try:
        group = dist.group.WORLD
        start = sum(SHARDS[world][:rank])
        piece = slice(start, start + SHARDS[world][rank])
        answers = {}
        for key in cases(world):
            answers[key] = answer(CASES[key], piece, group)
        losses, reference = ROWS["row"][piece], _row(9)[piece]
        answers["drrho"] = drrho_risk(losses, reference, ChiSquare(), rho=2.0, group=group)._asdict()
        answers["third"] = {name: third_derivative(name, piece, group) for name in THIRD}
        answers["refusal"] = refusal(piece, group)
        answers["refusal of a loss"] = refusal_of_a_loss(rank, piece, group)
        torch.save(answers, Path(folder) / f"answers{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


every_world = pytest.mark.parametrize("world", SHARDS)
every_case = pytest.mark.parametrize("world, key", [(world, key) for world in SHARDS for key in cases(world)])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Answers of every rank, by the number of ranks."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    answers = {}
    for world in SHARDS:
        folder = tmp_path_factory.mktemp("ranks")
        start_ranks(work, (world, str(folder)), world)
        answers[world] = [torch.load(folder / f"answers{rank}.pt") for rank in range(world)]
    return answers


def joined(answers, key, field):
    return torch.cat([of_rank[key][field] for of_rank in answers], dim=-1)


@pytest.fixture(scope="module")
def alone():
    """The same cases in one process."""
    return {key: answer(case) for key, case in CASES.items()}


def close(actual, expected, tolerance):
    __tracebackhide__ = True
    actual, expected = np.asarray(actual), np.asarray(expected)
    same = actual == expected  # also infinities
    with np.errstate(invalid="ignore"):
        assert np.all(same | (np.abs(actual - expected) <= np.asarray(tolerance))), f"{actual} is not {expected}"


@pytest.mark.slow
@every_case
def test_every_rank_has_the_global_solution(world, key, ranks, alone):
    expected = alone[key]
    losses = ROWS[CASES[key][2]]
    tolerance = np.array([value_tolerance(row) for row in losses.reshape(-1, N)]).reshape(losses.shape[:-1])
    for answers in ranks[world]:
        mine = answers[key]
        close(mine["value"], expected["value"], tolerance)
        close(mine["premium"], expected["premium"], 1e-11 * expected["premium"].numpy())
        close(mine["strength"], expected["strength"], 1e-8 * expected["strength"].numpy())
        close(mine["threshold"], expected["threshold"], 1e-8 * expected["threshold"].abs().numpy() + tolerance)
        # A dual with a strength above the range of the losses rounds by eps of the strength.
        strength = expected["strength"].nan_to_num(posinf=0.0).numpy()
        close(mine["gap"], 0.0, tolerance + 16 * 2.0**-52 * strength)
        close(mine["by parameter"], expected["by parameter"], 1e-8 * expected["by parameter"].abs().numpy() + 1e-15)
        for field in ("value", "premium", "threshold", "strength", "gap", "by parameter"):
            assert torch.equal(mine[field], ranks[world][0][key][field])  # the same bits on every rank


@pytest.mark.slow
@every_case
def test_each_rank_has_its_part_of_weights_and_gradient(world, key, ranks, alone):
    expected = alone[key]
    weights = joined(ranks[world], key, "weights")
    close(weights, expected["weights"], 1e-11)
    close(weights.sum(-1), 1.0, 1e-12)
    close(joined(ranks[world], key, "gradient"), weights, 1e-13)


@pytest.mark.slow
@every_case
def test_each_rank_has_its_part_of_the_second_derivative(world, key, ranks, alone):
    expected = alone[key]
    if "second" not in expected:
        assert all("second" not in answers[key] for answers in ranks[world])
        return
    size = expected["second"].abs().max(-1, keepdim=True).values.numpy()
    close(joined(ranks[world], key, "second"), expected["second"], 1e-8 * size + 1e-300)


@pytest.mark.slow
@every_world
@pytest.mark.parametrize("name", THIRD)
def test_the_third_derivative_is_right_or_refused(name, world, ranks):
    pieces = [answers["third"][name] for answers in ranks[world]]
    if any(piece is None for piece in pieces):
        assert all(piece is None for piece in pieces)
        return
    expected = third_derivative(name)
    close(torch.cat(pieces), expected, 1e-8 * expected.abs().max().item())


@pytest.mark.slow
@every_world
def test_rho_counts_the_samples_of_all_ranks(world, ranks):
    expected = drrho_risk(ROWS["row"], _row(9), ChiSquare(), rho=2.0)
    for answers in ranks[world]:
        close(answers["drrho"]["value"], expected.value, value_tolerance(ROWS["row"]))
    close(joined(ranks[world], "drrho", "weights"), expected.weights, 1e-12)


@pytest.mark.slow
@every_world
def test_base_weights_must_sum_to_one_over_all_ranks(world, ranks):
    for answers in ranks[world]:
        assert "base_weights" in answers["refusal"]
        assert "0.5" in answers["refusal"]


@pytest.mark.slow
@every_world
def test_a_loss_that_is_not_finite_is_refused_on_every_rank(world, ranks, alone):
    expected = constrained_risk(ROWS["row"], KL(), 0.1).value
    for rank, answers in enumerate(ranks[world]):
        message, value = answers["refusal of a loss"]
        assert "got nan at index [0]" in message if rank == 1 else "on every rank" in message
        close(value, expected, 1e-12)
