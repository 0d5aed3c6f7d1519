"""Individual temperatures against torch's Adam and the KL ball, in one process and spread over gloo processes.

One spawn of four processes gives groups of one, two and four ranks; the tests compare what they saved with one process.
"""

import itertools
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import start_ranks

from drrho import KL, constrained_risk
from drrho.contrastive import contrastive_risk
from drrho.routes import BatchIndex
from drrho.temperature import GlobalTemperature, IndividualTemperatures
from drrho.validation import deferred_checks

ULP = 2.0**-23
LOW, INITIAL, HIGH, RATE = 0.05, 0.2, 0.6, 0.02
GROUPS = {1: [1], 2: [2, 3], 4: [0, 1, 2, 3]}
SAMPLES, STEPS, OCCURRENCES = 11, 6, 14  # on four ranks: blocks of 3, 3, 3, 2


def made(samples=SAMPLES, initial=INITIAL, *, learning_rate=RATE, low=LOW, high=HIGH, **options):
    return IndividualTemperatures(samples, initial, learning_rate=learning_rate, low=low, high=high, **options)


def stepped(temperatures, index, slopes, terms=None):
    """Step on a loss that is the mean of ``slope tau`` over ``terms`` terms; ``slopes`` ``[2, b]``."""
    taus = temperatures.lookup(index)
    if index.numel():
        (
            torch.cat([slope * tau for slope, tau in zip(slopes, taus, strict=True)]).sum() / (terms or 2 * len(index))
        ).backward()
    else:
        sum(tau.sum() for tau in taus).backward()
    return temperatures.step(index, taus)


def all_taus(temperatures, samples=SAMPLES):
    return torch.stack(temperatures.lookup(torch.arange(samples))).detach()


def features(pairs, width, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, pairs, width, generator=generator, dtype=torch.float64)
    image, text = torch.nn.functional.normalize(draw, dim=-1)
    return image, text


@pytest.mark.slow
@pytest.mark.parametrize("betas, eps", [((0.9, 0.999), 1e-8), ((0.5, 0.8), 1e-2), ((0.0, 0.5), 1e-8)])
def test_every_sample_follows_its_own_adam(betas, eps):
    """Each visited at times of its own, with moments and bias corrections of its own; bounds are met on the way."""
    temperatures = made(betas=betas, eps=eps)
    alone = [[torch.nn.Parameter(torch.tensor(INITIAL)) for _ in range(SAMPLES)] for _ in range(2)]
    adams = [[torch.optim.Adam([tau], lr=RATE, betas=betas, eps=eps) for tau in side] for side in alone]
    goals = torch.linspace(0.0, 0.7, 2 * SAMPLES).view(2, -1)
    generator = torch.Generator().manual_seed(0)
    moved = reached = 0
    for step in range(80):
        index = torch.randperm(SAMPLES, generator=generator)[: 1 + step % SAMPLES]
        noise = 0.1 * torch.randn(2, len(index), generator=generator)
        taus = temperatures.lookup(index)
        terms = [(tau - goals[side, index] + noise[side]) ** 2 for side, tau in enumerate(taus)]
        torch.cat(terms).mean().backward()
        moved += temperatures.step(index, taus)
        for side, (place, i) in itertools.product(range(2), enumerate(index.tolist())):
            tau = alone[side][i]
            adams[side][i].zero_grad()
            ((tau - goals[side, i] + noise[side, place]) ** 2).backward()
            adams[side][i].step()
            reached += int(tau.detach() < LOW) + int(tau.detach() > HIGH)
            tau.data.clamp_(LOW, HIGH)
        expected = torch.stack([torch.stack(side) for side in alone]).detach()
        # An error of an ulp in a gradient or tau moves a normalized step of RATE by some ulps, in each of 80 steps.
        torch.testing.assert_close(all_taus(temperatures), expected, rtol=80 * ULP, atol=80 * ULP * RATE)
    assert moved == reached > 0


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_first_step_is_the_learning_rate_whatever_the_gradients_size(size):
    temperatures = made(3)
    assert stepped(temperatures, torch.tensor([2, 0]), size * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == 0
    expected = torch.tensor([[INITIAL + RATE, INITIAL, INITIAL - RATE], [INITIAL - RATE, INITIAL, INITIAL + RATE]])
    torch.testing.assert_close(all_taus(temperatures, 3), expected, rtol=1e-4 * RATE, atol=0)


def test_gradients_are_those_of_the_samples_own_terms():
    """``rho - KL_i``, of which the first moment after one visit is a tenth."""
    image, text = features(6, 4, 1)
    temperatures, index = made(), torch.tensor([9, 2, 4, 0, 7, 5])
    taus = temperatures.lookup(index)
    step = contrastive_risk(image, text, taus, rho=0.3)
    step.value.backward()
    temperatures.step(index, taus)
    moments = temperatures.state_dict()["temperatures"][2:6, index].double()
    slopes = 0.3 - torch.stack(step.distances)
    torch.testing.assert_close(moments[:2], 0.1 * slopes, rtol=8 * ULP, atol=8 * ULP)
    torch.testing.assert_close(moments[2:], 1e-3 * slopes**2, rtol=8 * ULP, atol=8 * ULP)


@pytest.mark.slow
def test_learned_temperatures_reach_the_optimum_of_the_kl_ball():
    """Where tau is within its bounds, ``F_i + rho tau`` is the ball's risk; at a bound KL_i lies on its other side."""
    rho, low, high = 0.5, 0.3, 0.42
    image, text = features(8, 5, 2)
    # Once gradients are smaller than eps, steps shrink with them.
    temperatures, index = made(8, 0.35, low=low, high=high, learning_rate=2e-3, eps=2e-2), torch.arange(8)
    for _ in range(400):
        taus = temperatures.lookup(index)
        step = contrastive_risk(image, text, taus, rho=rho)
        step.value.backward()
        temperatures.step(index, taus)
    tau, distance = torch.cat(taus).detach(), torch.cat(step.distances)
    at_low, at_high = tau <= torch.tensor(low), tau >= torch.tensor(high)
    inside = ~(at_low | at_high)
    assert min(at_low.sum(), at_high.sum(), inside.sum()) >= 2
    assert (distance[at_low] < rho).all() and (distance[at_high] > rho).all()
    assert (distance[inside] - rho).abs().max() <= 1e-5
    matrix = image @ text.T
    for side, similarities in enumerate((matrix, matrix.T)):
        for i in range(8):
            if inside[8 * side + i]:
                losses = torch.cat([similarities[i, :i], similarities[i, i + 1 :]]) - similarities[i, i]
                ball = constrained_risk(losses, KL(), rho)
                assert tau[8 * side + i].item() == pytest.approx(ball.strength.item(), rel=1e-5)
                assert step.risks[side][i] + rho * tau[8 * side + i] == pytest.approx(ball.value.item(), abs=1e-9)


def test_entries_moved_by_the_projection_are_counted():
    temperatures = made(4, 0.1, low=0.09, high=0.11)
    slopes = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
    assert stepped(temperatures, torch.tensor([0, 1, 3]), slopes) == 3
    expected = torch.tensor([[0.09, 0.11, 0.1, 0.1], [0.1, 0.1, 0.1, 0.09]])
    torch.testing.assert_close(all_taus(temperatures, 4), expected, rtol=ULP, atol=0)
    assert stepped(made(4), torch.tensor([0, 1, 3]), slopes) == 0


def test_a_repeated_sample_takes_the_mean_of_its_steps():
    index = torch.tensor([1, 3, 1, 1])
    slopes = torch.tensor([[0.5, 2.0, -3.0, 0.1], [1.0, -0.2, 0.3, 4.0]])
    first = torch.tensor([[0.3, 1.0], [0.2, -1.0]])  # so that moments differ from zero
    parts = []
    for occurrence in (0, 2, 3):
        single = made(4)
        stepped(single, torch.tensor([1, 3]), first)
        stepped(single, index[[occurrence]], slopes[:, [occurrence]])
        parts.append(single.state_dict()["temperatures"][:, 1])
    states = []
    for order in itertools.permutations(range(4)):
        together = made(4)
        stepped(together, torch.tensor([1, 3]), first)
        assert stepped(together, index[list(order)], slopes[:, order]) == 0
        states.append(together.state_dict()["temperatures"])
    mean = torch.stack(parts).double().mean(0).float()
    for state in states:
        torch.testing.assert_close(state[:, 1], mean, rtol=4 * ULP, atol=4 * ULP**2)
        torch.testing.assert_close(state, states[0], rtol=ULP, atol=0)
    assert states[0][6].tolist() == [0, 2, 0, 2]


def test_a_repeated_sample_is_projected_once_after_the_mean():
    temperatures = made(2, 0.1, low=0.1, high=0.11)
    assert stepped(temperatures, torch.tensor([0, 0]), torch.tensor([[1.0, -1.0], [1.0, 1.0]])) == 1
    torch.testing.assert_close(all_taus(temperatures, 2), torch.full((2, 2), 0.1), rtol=ULP, atol=0)


def test_lookups_are_leaves_and_never_visited_samples_hold_the_initial_value():
    temperatures = made(5)
    stepped(temperatures, torch.tensor([1]), torch.ones(2, 1))
    taus = temperatures.lookup(torch.tensor([4, 4, 0]))
    assert all(tau.is_leaf and tau.requires_grad and tau.dtype == torch.float32 for tau in taus)
    assert all(tau.tolist() == [torch.tensor(INITIAL).item()] * 3 for tau in taus)
    taus[0].data.zero_()
    assert (temperatures.lookup(torch.tensor([4]))[0] > 0).all()


def test_an_empty_batch_changes_nothing():
    temperatures, before = made(5), made(5).state_dict()
    assert stepped(temperatures, torch.arange(0), torch.zeros(2, 0)) == 0
    assert torch.equal(temperatures.state_dict()["temperatures"], before["temperatures"])


def test_a_sample_costs_28_bytes():
    state = made(1000).state_dict()
    assert state["temperatures"].numel() * state["temperatures"].element_size() == 28 * 1000


def test_training_goes_on_from_a_state():
    first, second = made(), made()
    batches = list(all_batches())
    for index, slopes in batches[:3]:
        stepped(first, index, slopes)
    state = first.state_dict()
    second.load_state_dict(state)
    state["temperatures"].zero_()  # a copy
    for index, slopes in batches[3:]:
        assert stepped(first, index, slopes) == stepped(second, index, slopes)
    assert torch.equal(first.state_dict()["temperatures"], second.state_dict()["temperatures"])


GOOD = {"samples": 4, "initial": 0.1, "learning_rate": 0.01, "low": 0.01, "high": 1.0}
WRONG = [
    ({"samples": 0}, "samples must be >= 1, got 0"),
    ({"low": 0.0}, "low <= initial <= high.*got 0.0, 0.1 and 1.0"),
    ({"low": 1e-60}, "low <= initial <= high.*got 1e-60"),
    ({"low": 0.2}, "got 0.2, 0.1 and 1.0"),
    ({"high": 0.05}, "got 0.01, 0.1 and 0.05"),
    ({"high": math.inf}, "and inf"),
    ({"initial": math.nan}, "got 0.01, nan"),
    ({"learning_rate": 0.0}, "learning_rate must be finite and > 0, got 0.0"),
    ({"learning_rate": math.inf}, "learning_rate.*inf"),
    ({"eps": 0.0}, "eps must be finite and > 0, got 0.0"),
    ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ({"betas": (-0.1, 0.9)}, "betas.*-0.1"),
    ({"betas": (0.9,)}, r"betas.*\(0.9,\)"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_parameters_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        IndividualTemperatures(**{**GOOD, **change})


def filled(*gradients):
    """Temperatures of two samples with these gradients."""
    taus = []
    for gradient in gradients:
        tau = torch.full((len(gradient),) if gradient else (2,), 0.2, requires_grad=True)
        tau.grad = torch.tensor(gradient) if gradient else None
        taus.append(tau)
    return tuple(taus)


FINE = [0.1, 0.2]
REFUSED = [
    ([1, 5], filled(FINE, FINE), r"index must lie in \[0, 5\), got 5"),
    ([1.0, 2.0], filled(FINE, FINE), "integer dtype"),
    ([1, 4], filled(FINE, None), r"temperatures\[1\].grad must be filled by backward, got None.*lookup"),
    ([1, 4], filled(FINE, [0.1, math.nan]), r"temperatures\[1\].grad.*got nan for sample 4"),
    ([1, 4], filled([math.inf, 0.1], FINE), r"temperatures\[0\].grad.*got inf for sample 1"),
    ([1, 4], filled([0.1, 1e19], FINE), r"temperatures\[0\].grad.*square.*sample 4"),
    ([1, 4], filled(FINE, [0.1]), r"temperatures\[1\].grad.*shape \[2\] like index, got \[1\]"),
    ([1, 4], filled(FINE), "temperatures must be the pair of lookup, got 1"),
    ([1, 4], (filled(FINE)[0], 2 * filled(FINE)[0]), r"temperatures\[1\].grad must be filled by backward, got None"),
]


@pytest.mark.parametrize("index, taus, message", REFUSED)
def test_steps_that_cannot_be_taken_are_refused_and_change_nothing(index, taus, message):
    temperatures = made(5)
    with pytest.raises(ValueError, match=message):
        temperatures.step(torch.tensor(index), taus)
    assert torch.equal(temperatures.state_dict()["temperatures"], made(5).state_dict()["temperatures"])


DAMAGED = [
    (0, 0.75, r"temperatures of image anchors in \[0.05\d*, 0.6\d*\], got \[0.2\d*, 0.75\].*bounds"),
    (1, 0.01, "temperatures of text anchors"),
    (2, math.nan, "first moments of image anchors"),
    (5, -1.0, "second moments of text anchors"),
    (6, math.inf, "visits"),
]


@pytest.mark.parametrize("column, value, message", DAMAGED)
def test_states_that_no_training_leaves_are_refused(column, value, message):
    temperatures, state = made(), made().state_dict()
    state["temperatures"][column, 3] = value
    with pytest.raises(ValueError, match=message):
        temperatures.load_state_dict(state)
    assert torch.equal(temperatures.state_dict()["temperatures"], made().state_dict()["temperatures"])


def test_states_of_other_data_or_shape_are_refused():
    with pytest.raises(ValueError, match="individual temperatures for 11 samples, got 4"):
        made().load_state_dict(made(4).state_dict())
    with pytest.raises(ValueError, match=r"temperatures of shape \[7, rows\], got \[2, 11\]"):
        made().load_state_dict({"temperatures": torch.ones(2, 11)})


@pytest.mark.slow
def test_a_global_temperature_makes_the_mean_divergence_rho_and_goes_on_from_its_state():
    image, text = features(24, 8, 3)
    index = torch.arange(24)
    temperature = GlobalTemperature(0.3, learning_rate=0.02, low=0.01, high=2.0, eps=2e-2)
    for visit in range(600):
        tau = temperature.lookup(index)
        step = contrastive_risk(image, text, tau, rho=0.4)
        step.value.backward()
        assert temperature.step(index, tau) == 0
        if visit == 20:
            state = {key: value.clone() for key, value in temperature.state_dict().items()}
            after_20 = float(tau.detach())
    assert abs(torch.cat(step.distances).mean() - 0.4) <= 1e-4
    # Torch's own Adam, from the state of one in the middle.
    again = GlobalTemperature(0.3, learning_rate=0.02, low=0.01, high=2.0, eps=2e-2)
    again.load_state_dict(state)
    assert float(again.lookup(index).detach()) == after_20
    free = torch.nn.Parameter(torch.tensor(after_20))
    adam = torch.optim.Adam([free], lr=0.02, eps=2e-2)
    adam.state[free] = dict(
        zip(("exp_avg", "exp_avg_sq", "step"), state["temperature"][1:].float().unbind(), strict=True)
    )
    for _ in range(5):
        for tau in (free, again.lookup(index)):
            tau.grad = None
            contrastive_risk(image, text, tau, rho=0.4).value.backward()
        adam.step()
        again.step(index, tau)
        assert float(free.detach()) == float(again.lookup(index).detach())


def test_a_global_temperature_is_projected_and_refuses_what_it_cannot_step_with():
    temperature = GlobalTemperature(0.1, learning_rate=1.0, low=0.05, high=0.2)
    tau = temperature.lookup(torch.arange(2))
    with pytest.raises(ValueError, match=r"temperature\.grad must be filled by backward, and finite, got None"):
        temperature.step(torch.arange(2), tau)
    (tau * math.inf).backward()
    with pytest.raises(ValueError, match="finite, got inf"):
        temperature.step(torch.arange(2), tau)
    tau = temperature.lookup(torch.arange(2))
    assert float(tau.detach()) == pytest.approx(0.1)
    tau.backward()
    assert temperature.step(torch.arange(2), tau) == 1
    assert float(temperature.lookup(torch.arange(2)).detach()) == pytest.approx(0.05)
    with pytest.raises(ValueError, match=r"must hold a temperature in \[.*, got 0.3"):
        temperature.load_state_dict({"temperature": torch.tensor([0.3, 0.0, 0.0, 1.0])})
    with pytest.raises(ValueError, match="four finite numbers"):
        temperature.load_state_dict({"temperature": torch.tensor([0.1, math.nan, 0.0, 1.0])})
    with pytest.raises(ValueError, match="low, initial and high"):
        GlobalTemperature(0.3, learning_rate=1.0, low=0.05, high=0.2)


def all_batches():
    """What occurs in each step on all ranks: index with many repeats, and slopes of both directions."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        index = torch.randint(SAMPLES - 1, (OCCURRENCES,), generator=generator)  # the last one is never visited
        yield index, torch.randn(2, OCCURRENCES, generator=generator)


def pieces(step, world):
    """Each rank's part of a step, of uneven lengths; in step 1 all of it on the last rank."""
    generator = torch.Generator().manual_seed(100 * step + world)
    cuts = torch.randint(OCCURRENCES + 1, (world - 1,), generator=generator).sort().values.tolist()
    cuts = [0] * (world - 1) if step == 1 else cuts
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, OCCURRENCES], strict=True)]


def narrow(group=None):
    """Temperatures that meet their bounds within the steps."""
    return made(low=0.17, high=0.23, group=group)


def run_through(temperatures, rank=0, world=1):
    """Step on this rank's part of every batch; return how many entries were moved, and all taus, after each one."""
    answers = []
    for step, (index, slopes) in enumerate(all_batches()):
        piece = pieces(step, world)[rank]
        moved = stepped(temperatures, index[piece], slopes[:, piece], terms=2 * OCCURRENCES)
        answers.append((moved, all_taus(temperatures)))
    return answers


def trained(group=None, place=slice(None)):
    """All taus after steps on the contrastive risk, of which this rank has the pairs ``place``."""
    image, text = features(8, 4, 4)
    temperatures, index = made(group=group), torch.tensor([3, 0, 9, 5, 5, 10, 1, 7])
    for _ in range(5):
        taus = temperatures.lookup(index[place])
        contrastive_risk(image[place], text[place], taus, rho=0.3, group=group).value.backward()
        temperatures.step(index[place], taus)
    return all_taus(temperatures)


def trained_globally(group=None, place=slice(None)):
    """One temperature for all, learned from the contrastive risk of this rank's part."""
    image, text = features(12, 6, 8)
    temperature = GlobalTemperature(0.3, learning_rate=0.02, low=0.01, high=2.0, group=group)
    for _ in range(5):
        tau = temperature.lookup(torch.arange(12)[place])
        contrastive_risk(image[place], text[place], tau, rho=0.4, group=group).value.backward()
        temperature.step(torch.arange(12)[place], tau)
    return temperature.lookup(torch.arange(12)).detach().clone()


def refusals(temperatures, rank):
    """The messages about one rank's wrong index, gradient, missing gradient and state."""
    fine = torch.tensor([0, 1])
    whole = made(SAMPLES).state_dict()
    calls = [
        lambda: temperatures.lookup(torch.tensor([SAMPLES]) if rank == 1 else fine),
        lambda: temperatures.step(torch.tensor([0, SAMPLES]) if rank == 1 else fine, filled(FINE, FINE)),
        lambda: temperatures.step(fine, filled(FINE, [0.1, math.nan] if rank == 2 else FINE)),
        lambda: temperatures.step(fine, filled(FINE, None if rank == 3 else FINE)),
        lambda: temperatures.load_state_dict([whole] if rank else []),
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def loaded(path):
    return torch.load(path, mmap=True, weights_only=True)


def work(rank, folder):
    """One process: run through the steps in every group it is in, save the state, and load those of other groups."""
    torch.set_num_threads(1)
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=4, timeout=patience)
    try:
        folder = Path(folder)
        groups = {world: dist.new_group(ranks) for world, ranks in GROUPS.items()}
        places = {world: ranks.index(rank) for world, ranks in GROUPS.items() if rank in ranks}
        for world, place in places.items():
            temperatures = narrow(groups[world])
            torch.save(run_through(temperatures, place, world), folder / f"answers-{world}-{place}.pt")
            torch.save(temperatures.state_dict(), folder / f"state-{world}-{place}.pt")
        if 2 in places:
            part = slice(0, 5) if places[2] == 0 else slice(5, 8)
            torch.save(trained(groups[2], part), folder / f"trained-{places[2]}.pt")
            torch.save(
                trained_globally(groups[2], slice(5) if part.start == 0 else slice(5, 12)),
                folder / f"global-{places[2]}.pt",
            )
        for origin, world in itertools.pairwise([1, 2, 4, 1]):
            dist.barrier()  # the states to be read are written
            if world in places:
                source = "state" if origin == 1 else "moved"
                temperatures = made(group=groups[world])
                temperatures.load_state_dict([loaded(folder / f"{source}-{origin}-{k}.pt") for k in range(origin)])
                name = "returned" if world == 1 else "moved"
                torch.save(temperatures.state_dict(), folder / f"{name}-{world}-{places[world]}.pt")
        temperatures = made(group=groups[4])
        temperatures.load_state_dict(loaded(folder / f"moved-4-{rank}.pt"))  # its own rows suffice
        torch.save(refusals(temperatures, rank), folder / f"refusals-{rank}.pt")
        torch.save(temperatures.state_dict(), folder / f"unchanged-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder in which the ranks left their answers and states."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(work, (str(folder),), 4)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world", GROUPS)
def test_ranks_step_as_one_process(world, saved):
    temperatures = narrow()
    expected = run_through(temperatures)
    assert all(moved > 0 for moved, _ in expected[2:])
    for rank in range(world):
        answers = loaded(saved / f"answers-{world}-{rank}.pt")
        assert [moved for moved, _ in answers] == [moved for moved, _ in expected]
        for (_, found), (_, taus) in zip(answers, expected, strict=True):
            torch.testing.assert_close(found, taus, rtol=STEPS * ULP, atol=0)
    states = [loaded(saved / f"state-{world}-{rank}.pt")["temperatures"] for rank in range(world)]
    assert max(state.shape[1] for state in states) == math.ceil(SAMPLES / world)
    whole = temperatures.state_dict()["temperatures"]
    torch.testing.assert_close(torch.cat(states, 1), whole, rtol=STEPS * ULP, atol=STEPS * ULP**2)
    assert whole[:, -1].tolist() == [*all_taus(made(1), 1)[:, 0].tolist(), 0, 0, 0, 0, 0]


@pytest.mark.slow
def test_two_ranks_learn_from_the_contrastive_risk_what_one_process_learns(saved):
    expected = trained()
    assert (expected - INITIAL).abs().max() > 3 * RATE
    for rank in range(2):
        torch.testing.assert_close(loaded(saved / f"trained-{rank}.pt"), expected, rtol=50 * ULP, atol=0)
    for rank in range(2):
        tau = loaded(saved / f"global-{rank}.pt")
        torch.testing.assert_close(tau, trained_globally(), rtol=50 * ULP, atol=0)
        assert abs(float(tau) - 0.3) > RATE


@pytest.mark.slow
def test_states_go_from_one_rank_to_two_to_four_and_back_bit_for_bit(saved):
    before = loaded(saved / "state-1-0.pt")["temperatures"]
    assert torch.equal(loaded(saved / "returned-1-0.pt")["temperatures"], before)
    for world in (2, 4):
        states = [loaded(saved / f"moved-{world}-{rank}.pt")["temperatures"] for rank in range(world)]
        assert torch.equal(torch.cat(states, 1), before)


@pytest.mark.slow
def test_what_one_rank_refuses_all_refuse_and_nothing_changes(saved):
    culprits = [(1, "got 11"), (1, "got 11"), (2, "got nan for sample 1"), (3, "got None"), (0, "missing")]
    for rank in range(4):
        messages = loaded(saved / f"refusals-{rank}.pt")
        for (culprit, own), message in zip(culprits, messages, strict=True):
            assert (own if rank == culprit else f"rank {culprit} are refused") in message
        before, after = (loaded(saved / f"{name}-{rank}.pt")["temperatures"] for name in ("moved-4", "unchanged"))
        assert torch.equal(before, after)


def test_with_deferred_checks_a_gradient_that_is_not_finite_changes_nothing():
    temperatures, index = made(), BatchIndex.gathered([9, 2, 9, 4])
    with deferred_checks():
        moved = stepped(temperatures, torch.tensor([9, 2, 9, 4]), torch.randn(2, 4))
        assert isinstance(moved, torch.Tensor) and moved == 0
        before = temperatures.state_dict()["temperatures"]
        taus = temperatures.lookup(index)
        for tau, gradient in zip(taus, ([1.0, math.nan, 1.0, 1.0], [1.0, 1.0, math.inf, 1e30]), strict=True):
            tau.grad = torch.tensor(gradient)
        temperatures.step(index, taus)
    assert torch.equal(temperatures.state_dict()["temperatures"], before)  # 9 twice, 2, and 4 for its square


def test_with_deferred_checks_the_global_temperature_stays_without_a_gradient():
    temperature, alike = (GlobalTemperature(0.1, learning_rate=0.01, low=0.05, high=0.2) for _ in range(2))
    for slope in (1.0, math.nan, -2.0):
        with deferred_checks():
            tau = temperature.lookup([])
            (slope * tau).backward()
            moved = temperature.step([], tau, torch.tensor(0.5))
        assert isinstance(moved, torch.Tensor)
        if not math.isnan(slope):
            other = alike.lookup([])
            (slope * other).backward()
            alike.step([], other, 0.5)
    assert torch.equal(temperature.state_dict()["temperature"], alike.state_dict()["temperature"])
