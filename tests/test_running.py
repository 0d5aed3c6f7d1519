"""Running estimates in one process and spread over gloo processes, and the schedule of their rate.

One spawn of four processes gives groups of one, two and four ranks; the tests compare what they saved with one process.
"""

import math
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import start_ranks

from drrho.routes import BatchIndex
from drrho.running import (
    RunningEstimates,
    RunningThresholds,
    adaptive_log_rates,
    cosine_gamma,
    moving_average,
    published_final_gamma,
)
from drrho.validation import deferred_checks

ULP = 2.0**-23
GROUPS = {1: [1], 2: [2, 3], 4: [0, 1, 2, 3]}
SAMPLES = (11, 5)  # on four ranks: blocks of 3, 3, 3, 2 and of 2, 2, 1, 0
STEPS, OCCURRENCES = 6, 14


def test_a_sample_keeps_its_own_row():
    estimates = RunningEstimates(5)
    estimates.update(torch.tensor([3, 0]), (torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.0])))
    image, text = estimates.lookup(torch.arange(5))
    assert image.tolist() == [-1.0, -torch.inf, -torch.inf, 0.5, -torch.inf]
    assert text.tolist() == [0.0, -torch.inf, -torch.inf, 2.0, -torch.inf]
    assert estimates.visited == 2


def test_state_survives_a_round_trip_and_is_a_copy():
    estimates, other = RunningEstimates(3), RunningEstimates(3)
    estimates.update(torch.tensor([1]), (torch.tensor([4.0]), torch.tensor([5.0])))
    state = estimates.state_dict()
    other.load_state_dict(state)
    state["log_u"].zero_()
    assert other.lookup(torch.tensor([1]))[1].tolist() == [5.0]
    assert estimates.lookup(torch.tensor([0]))[0].tolist() == [-torch.inf]


WRONG = [
    ([5], r"\[0, 5\), got 5"),
    ([2, -1], "got -1"),
    ([[2]], r"\[b\].*\[1, 1\]"),
    ([0.0], "integer dtype.*float32"),
    ([True], "integer dtype.*bool"),
]


@pytest.mark.parametrize("index, message", WRONG)
def test_wrong_indices_are_refused_and_change_nothing(index, message):
    estimates, index = RunningEstimates(5), torch.tensor(index)
    values = torch.zeros(index.shape)
    with pytest.raises(ValueError, match=message):
        estimates.update(index, (values, values))
    with pytest.raises(ValueError, match=message):
        estimates.lookup(index)
    assert estimates.visited == 0


def test_estimates_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"log_u\[1\] must have shape \[2\] like index, got \[3\]"):
        RunningEstimates(5).update(torch.tensor([0, 1]), (torch.zeros(2), torch.zeros(3)))


def test_non_finite_estimates_are_refused_by_sample():
    estimates = RunningEstimates(5)
    with pytest.raises(ValueError, match="sample 4"):
        estimates.update(torch.tensor([1, 4]), (torch.tensor([0.0, torch.nan]), torch.zeros(2)))
    assert estimates.visited == 0


def test_estimates_must_be_finite_in_the_float32_that_keeps_them():
    estimates = RunningEstimates(2)
    large, fine = torch.tensor([1e39], dtype=torch.float64), torch.tensor([math.pi], dtype=torch.float64)
    with pytest.raises(ValueError, match="finite in float32"):
        estimates.update(torch.tensor([0]), (large, fine))
    estimates.update(torch.tensor([0]), (fine, -fine))
    assert estimates.lookup(torch.tensor([0]))[0].item() == pytest.approx(math.pi, rel=2.0**-24, abs=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_an_index_of_any_integer_dtype_and_length(dtype):
    estimates = RunningEstimates(300)
    for index in (torch.tensor([255, 0], dtype=dtype), torch.tensor([], dtype=dtype)):
        estimates.update(index, (torch.ones(len(index)), torch.zeros(len(index))))
        assert estimates.lookup(index)[0].tolist() == [1.0] * len(index)
    assert estimates.visited == 2


def test_the_state_records_no_graph():
    estimates = RunningEstimates(2)
    values = torch.zeros(1, requires_grad=True)
    estimates.update(torch.tensor([0]), (values, values))
    assert not estimates.lookup(torch.tensor([0]))[0].requires_grad


def test_state_of_other_data_is_refused():
    with pytest.raises(ValueError, match="3 samples"):
        RunningEstimates(3).load_state_dict(RunningEstimates(4).state_dict())


def part(start, stop, samples=6):
    """A state of the samples from start to stop, each with its number."""
    log_u = torch.arange(start, stop, dtype=torch.float32).expand(2, -1).clone()
    return {"log_u": log_u, "offset": torch.tensor(start), "samples": torch.tensor(samples)}


def test_parts_load_in_any_order():
    estimates = RunningEstimates(6)
    estimates.load_state_dict([part(4, 6), part(6, 6), part(0, 3), part(3, 4)])
    assert estimates.lookup(torch.arange(6))[1].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_state_of_all_samples_needs_no_offset():
    estimates = RunningEstimates(6)
    estimates.load_state_dict({"log_u": part(0, 6)["log_u"]})
    assert estimates.lookup(torch.arange(6))[0].tolist() == [0, 1, 2, 3, 4, 5]


def damaged(value):
    state = part(3, 6)
    state["log_u"][1, 2] = value
    return state


REFUSED = {
    "nothing": ([], r"\[0, 6\) are missing"),
    "gap at the start": ([part(2, 6)], r"\[0, 2\) are missing"),
    "gap inside": ([part(0, 2), part(5, 6)], r"\[2, 5\) are missing"),
    "gap at the end": (part(0, 4), r"\[4, 6\) are missing"),
    "overlap": ([part(0, 4), part(2, 6)], r"overlap, got samples \[2, 4\) twice"),
    "twice": ([part(0, 6), part(0, 6)], r"overlap, got samples \[0, 6\) twice"),
    "past the end": ([part(0, 4), part(4, 8)], r"\[0, 6\), got \[4, 8\)"),
    "other data": ([part(0, 3), part(3, 6, samples=7)], "6 samples, got 7"),
    "one direction": ([{"log_u": torch.zeros(1, 6)}], r"\[2, rows\], got \[1, 6\]"),
    "NaN": ([part(0, 3), damaged(torch.nan)], "maximum of nan"),
    "inf": ([part(0, 3), damaged(torch.inf)], "maximum of inf"),
}


@pytest.mark.parametrize("states, message", REFUSED.values(), ids=REFUSED)
def test_states_that_are_not_all_samples_once_are_refused_and_change_nothing(states, message):
    estimates = RunningEstimates(6)
    with pytest.raises(ValueError, match=message):
        estimates.load_state_dict(states)
    assert estimates.visited == 0


def batches(samples):
    """What occurs in each step on all ranks: index with many repeats, and estimates of both directions."""
    generator = torch.Generator().manual_seed(samples)
    for _ in range(STEPS):
        index = torch.randint(samples - 1, (OCCURRENCES,), generator=generator)  # the last one is never visited
        yield index, 4 * torch.randn(2, OCCURRENCES, generator=generator)


def pieces(step, world):
    """Each rank's part of a step, of uneven lengths; in step 1 all of it on the last rank."""
    generator = torch.Generator().manual_seed(100 * step + world)
    cuts = torch.randint(OCCURRENCES + 1, (world - 1,), generator=generator).sort().values.tolist()
    cuts = [0] * (world - 1) if step == 1 else cuts
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, OCCURRENCES], strict=True)]


def questions(samples, rank):
    """Samples that a rank looks up: another number on each, with repeats, none at all on the second."""
    return torch.arange(3 * rank + samples).flip(0) % samples if rank != 1 else torch.arange(0)


def run_through(estimates, rank=0, world=1):
    """Update by this rank's part of every step; return its lookups after each one."""
    answers = []
    for step, (index, log_u) in enumerate(batches(len(estimates))):
        piece = pieces(step, world)[rank]
        estimates.update(index[piece], (log_u[0, piece], log_u[1, piece]))
        answers.append(torch.stack(estimates.lookup(questions(len(estimates), rank))))
    return answers


def refusals(estimates, rank):
    """The messages about one rank's wrong index, estimate and state."""
    fine = torch.tensor([0])
    wrong_index = torch.tensor([len(estimates)]) if rank == 1 else fine
    wrong_value = torch.tensor([torch.nan if rank == 2 else 0.0])
    whole = {"log_u": torch.zeros(2, len(estimates))}
    calls = [
        lambda: estimates.lookup(wrong_index),
        lambda: estimates.update(wrong_index, (fine.float(), fine.float())),
        lambda: estimates.update(fine, (fine.float(), wrong_value)),
        lambda: estimates.load_state_dict([whole] if rank else []),
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
        mine = [world for world, ranks in GROUPS.items() if rank in ranks]
        for samples in SAMPLES:
            for world in mine:
                group, place = groups[world], GROUPS[world].index(rank)
                estimates = RunningEstimates(samples, group=group)
                answers = run_through(estimates, place, world)
                torch.save((answers, estimates.visited), folder / f"answers-{samples}-{world}-{place}.pt")
                torch.save(estimates.state_dict(), folder / f"state-{samples}-{world}-{place}.pt")
            dist.barrier()
            # From one rank to two, from two to four, from four to two; each process saves what it then holds.
            for origin, world in ((1, 2), (2, 4), (4, 2)):
                if world in mine:
                    states = [loaded(folder / f"state-{samples}-{origin}-{k}.pt") for k in range(origin)]
                    estimates = RunningEstimates(samples, group=groups[world])
                    estimates.load_state_dict(states)
                    place = GROUPS[world].index(rank)
                    torch.save(estimates.state_dict(), folder / f"moved-{samples}-{origin}-{world}-{place}.pt")
        estimates = RunningEstimates(5, group=groups[4])
        estimates.load_state_dict(loaded(folder / f"state-5-4-{rank}.pt"))  # its own rows suffice
        torch.save(refusals(estimates, rank), folder / f"refusals-{rank}.pt")
        torch.save(estimates.state_dict(), folder / f"moved-5-4-4-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "index",
    [[2, 0], (2, 0), np.array([2, 0]), np.array([0, 2], dtype=np.int32)[::-1], np.array([2, 0], dtype=np.uint8)],
)
@pytest.mark.parametrize("kind", [RunningEstimates, RunningThresholds])
def test_an_index_may_be_any_sequence_of_integers(kind, index):
    estimates, same = kind(4), kind(4)
    estimates.update(index, ([0.5, -1.0], np.array([2.0, 0.0])))
    same.update(torch.tensor([2, 0]), (torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.0])))
    for found, expected in zip(estimates.lookup(index), same.lookup(torch.tensor([2, 0])), strict=True):
        assert torch.equal(found, expected)
    assert [len(part) for part in estimates.lookup([])] == [0, 0]


@pytest.mark.parametrize("index", [[0.0, 1.0], np.array([True, False]), "ab", [[0]], 3, [0, 1j], torch.tensor([1j])])
def test_an_index_of_something_else_is_refused_by_name(index):
    with pytest.raises(ValueError, match="index must have shape"):
        RunningEstimates(4).lookup(index)
    with pytest.raises(ValueError, match="index must have shape"):
        RunningEstimates(4).update(index, (torch.zeros(1), torch.zeros(1)))


def test_estimates_that_are_no_numbers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"log_u\[1\] must be real"):
        RunningEstimates(4).update([1], ([0.0], [1j]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder in which the ranks left their answers and states."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(work, (str(folder),), 4)
    return folder


every_size = pytest.mark.parametrize("samples", SAMPLES)
every_world = pytest.mark.parametrize("world", GROUPS)


@every_size
def test_repeats_get_the_mean_of_their_u(samples):
    expected = [-math.inf] * samples
    estimates = RunningEstimates(samples)
    for index, log_u in batches(samples):
        estimates.update(index, (log_u[0], log_u[1]))
        for i in set(index.tolist()):
            expected[i] = math.log(fmean(math.exp(value) for value in log_u[1, index == i].tolist()))
        assert estimates.lookup(torch.arange(samples))[1].tolist() == pytest.approx(expected, rel=ULP, abs=1e-15)
    assert expected[-1] == -math.inf


def test_repeats_take_one_step_by_the_mean_of_their_g():
    index, log_g = torch.tensor([1, 1, 0, 1]), torch.tensor([0.5, -2.0, 3.0, 1.0])
    apart, together = RunningEstimates(2), RunningEstimates(2)
    mean = torch.stack([log_g[2], torch.logsumexp(log_g[[0, 1, 3]], 0) - math.log(3)])
    for _ in range(2):  # a first visit, and a later one
        for estimates, i, g in ((apart, index, log_g), (together, torch.arange(2), mean)):
            fresh = moving_average(estimates.lookup(i)[0], g, math.log(0.3), math.log(0.7))
            estimates.update(i, (fresh, fresh))
    torch.testing.assert_close(apart.lookup(torch.arange(2)), together.lookup(torch.arange(2)), rtol=4 * ULP, atol=0)


def test_repeats_far_apart_neither_overflow_nor_vanish():
    estimates = RunningEstimates(1)
    estimates.update(torch.tensor([0, 0]), (torch.tensor([3e4, -3e4]), torch.tensor([-3e38, -3e38])))
    image, text = estimates.lookup(torch.tensor([0]))
    assert image.item() == pytest.approx(3e4 - math.log(2), rel=ULP)
    assert text.item() == pytest.approx(-3e38, rel=ULP)


@pytest.mark.slow
@every_world
@every_size
def test_ranks_answer_as_one_process(samples, world, saved):
    estimates = RunningEstimates(samples)
    for step, (index, log_u) in enumerate(batches(samples)):
        estimates.update(index, (log_u[0], log_u[1]))
        for rank in range(world):
            answers, visited = loaded(saved / f"answers-{samples}-{world}-{rank}.pt")
            expected = torch.stack(estimates.lookup(questions(samples, rank)))
            torch.testing.assert_close(answers[step], expected, rtol=ULP, atol=1e-15)  # -inf included
    assert visited == estimates.visited < samples


@pytest.mark.slow
@every_world
@every_size
def test_a_rank_keeps_its_share(samples, world, saved):
    states = [loaded(saved / f"state-{samples}-{world}-{rank}.pt") for rank in range(world)]
    assert all(state["log_u"].dtype == torch.float32 for state in states)
    assert max(state["log_u"].shape[1] for state in states) == math.ceil(samples / world)
    assert sum(state["log_u"].shape[1] for state in states) == samples


@pytest.mark.slow
@pytest.mark.parametrize("origin, world", [(1, 2), (2, 4), (4, 2)])
@every_size
def test_any_number_of_ranks_loads_any_other_bit_for_bit(samples, origin, world, saved):
    before, after = RunningEstimates(samples), RunningEstimates(samples)
    before.load_state_dict([loaded(saved / f"state-{samples}-{origin}-{rank}.pt") for rank in range(origin)])
    after.load_state_dict([loaded(saved / f"moved-{samples}-{origin}-{world}-{rank}.pt") for rank in range(world)])
    assert torch.equal(before.state_dict()["log_u"], after.state_dict()["log_u"])
    assert after.lookup(torch.tensor([samples - 1]))[0].item() == -math.inf


@pytest.mark.slow
def test_what_one_rank_refuses_all_refuse_and_nothing_changes(saved):
    culprits = {1: "got 5", 2: "finite", 0: "missing"}
    for rank in range(4):
        messages = loaded(saved / f"refusals-{rank}.pt")
        for culprit, message in zip((1, 1, 2, 0), messages, strict=True):
            assert (culprits[culprit] if rank == culprit else f"rank {culprit} are refused") in message
        before, after = (loaded(saved / f"{name}-{rank}.pt") for name in ("state-5-4", "moved-5-4-4"))
        assert torch.equal(before["log_u"], after["log_u"])


def test_thresholds_are_kept_by_sample_and_repeats_get_the_mean():
    thresholds = RunningThresholds(5)
    assert len(thresholds) == 5
    index = torch.tensor([3, 0, 3])
    thresholds.update(index, (torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.0, 0.5])))
    image, text = thresholds.lookup(torch.tensor([0, 3, 4]))
    assert image[:2].tolist() == [-2.0, 2.0]
    assert text[:2].tolist() == [0.0, 0.5]
    assert bool(image[2].isnan()) and bool(text[2].isnan())
    again = RunningThresholds(5)
    again.load_state_dict(thresholds.state_dict())
    assert torch.equal(again.lookup(index)[0], thresholds.lookup(index)[0])
    with pytest.raises(
        ValueError, match=r"threshold\[1\] must be finite in float32 after a step, got nan for sample 0"
    ):
        thresholds.update(torch.tensor([0]), (torch.tensor([1.0]), torch.tensor([math.nan])))
    assert thresholds.lookup(torch.tensor([0]))[0].tolist() == [-2.0]
    with pytest.raises(ValueError, match="state must not hold infinite thresholds"):
        again.load_state_dict({"threshold": torch.full((2, 5), math.inf)})


def test_adaptive_rates_are_the_proximal_step_and_one_at_the_first_visit():
    log_u = torch.tensor([-torch.inf, -80.0, -1.0, 0.0, 2.0, 90.0], dtype=torch.float64)
    log_rate, log_keep = adaptive_log_rates(log_u, math.log(0.5))
    u = log_u[1:].exp()
    torch.testing.assert_close(log_rate[1:].exp(), 0.5 * u / (1 + 0.5 * u))
    torch.testing.assert_close(log_keep[1:].exp(), 1 / (1 + 0.5 * u))
    assert (log_rate[0].item(), log_keep[0].item()) == (0.0, -math.inf)
    g = torch.tensor(3.0, dtype=torch.float64)
    fresh = moving_average(log_u, g.log(), log_rate, log_keep)
    assert fresh[0].item() == g.log().item()
    torch.testing.assert_close(fresh[1:], torch.log((u + 0.5 * u * g) / (1 + 0.5 * u)))


def test_gamma_decays_from_one_to_final():
    values = [cosine_gamma(epoch, 5, 0.2) for epoch in range(5)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.2)
    assert values[2] == pytest.approx(0.6)
    assert values == sorted(values, reverse=True)
    assert cosine_gamma(0, 1, 0.2) == 1.0


def test_published_rule():
    assert published_final_gamma(7) == 1.0
    assert published_final_gamma(30) == pytest.approx(4.177 * 30**-0.7265)


@pytest.mark.parametrize("kind", [RunningEstimates, RunningThresholds])
def test_with_deferred_checks_an_estimate_that_is_not_finite_changes_nothing(kind):
    estimates, index = kind(5), BatchIndex.gathered([3, 0, 4, 4])
    estimates.update(index, (torch.tensor([0.5, -1.0, 1.0, 1.0]), torch.tensor([2.0, 0.0, 1.0, 1.0])))
    before = estimates.state_dict()
    with deferred_checks():
        estimates.update(index, (torch.tensor([1.0, math.nan, 2.0, 2.0]), torch.tensor([1e39, 3.0, 2.0, math.inf])))
    after = estimates.state_dict()
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)
    with deferred_checks():
        estimates.update(index, (torch.tensor([1.0, math.nan, 2.0, 4.0]), torch.tensor([1.5, 3.0, 2.0, 2.0])))
    image, text = (part.tolist() for part in estimates.lookup(index))
    mean = 3.0 if kind is RunningThresholds else math.log((math.exp(2.0) + math.exp(4.0)) / 2)
    assert image == pytest.approx([1.0, -1.0, mean, mean]) and text == pytest.approx([1.5, 0.0, 2.0, 2.0])


def test_a_batch_of_other_ranks_or_samples_is_refused():
    estimates = RunningEstimates(5)
    with pytest.raises(ValueError, match="index must be of the 1 ranks of the group, got one of 2"):
        estimates.lookup(BatchIndex([np.array([0]), np.array([1])]))
    with pytest.raises(ValueError, match=r"\[0, 5\), got 7"):
        estimates.lookup(BatchIndex.gathered([2, 7]))
