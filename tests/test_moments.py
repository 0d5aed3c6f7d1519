"""Moments against exact and two-pass formulas, in parts that are merged in any order and over ranks."""

import math
from datetime import timedelta
from fractions import Fraction
from functools import reduce
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import HARD, hard_cases, near, paired_sample, pairs
from processes import start_ranks
from scipy import stats

from drrho.moments import Moments, PairedMoments, gather, merge, moments, paired_moments


def same_moments(actual, expected, relative=1e-12):
    """Every central sum, relative to the same sum of absolute values, which is at most n range^k."""
    __tracebackhide__ = True
    assert actual.count == expected.count
    spread = expected.maximum - expected.minimum
    near(actual.mean, expected.mean, relative * spread + 2.0**-52 * abs(expected.mean))
    for order in (2, 3, 4):
        power = expected.m4 ** (order / 4) * expected.count ** (1 - order / 4)
        near(getattr(actual, f"m{order}"), getattr(expected, f"m{order}"), relative * power)
    for name in ("minimum", "maximum", "ties_at_minimum", "ties_at_maximum"):
        assert getattr(actual, name) == getattr(expected, name)


def same_pairs(actual, expected):
    __tracebackhide__ = True
    for channel in ("losses", "reference", "excess"):
        same_moments(getattr(actual, channel), getattr(expected, channel))
    near(actual.cross, expected.cross, 1e-12 * math.sqrt(expected.losses.m2 * expected.reference.m2))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    pair=pairs(max_size=16),
    cuts=st.lists(st.integers(0, 16), max_size=4),
    order=st.randoms(use_true_random=False),
    offset=st.sampled_from([0.0, 1e3, 1e8]),
)
def test_merged_parts_are_the_whole_in_any_order(pair, cuts, order, offset):
    losses, reference = (np.array(row) + offset for row in pair)
    ends = sorted({0, len(losses), *(min(cut, len(losses)) for cut in cuts)})
    parts = [paired_moments(losses[i:j], reference[i:j]) for i, j in pairwise(ends)]
    parts += [PairedMoments.empty()]
    order.shuffle(parts)
    same_pairs(reduce(merge, parts), paired_moments(losses, reference))
    same_moments(reduce(merge, parts).losses, moments(losses))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(rows=st.lists(pairs(max_size=5), min_size=3, max_size=3))
def test_merge_is_associative_and_commutative(rows):
    a, b, c = (paired_moments(*row) for row in rows)
    same_pairs(merge(merge(a, b), c), merge(a, merge(b, c)))
    same_pairs(merge(a, b), merge(b, a))


def test_the_empty_state_is_the_identity_bit_for_bit():
    for state in (moments([1.0, 2.5, 2.5]), paired_moments(*paired_sample())):
        empty = type(state).empty()
        assert merge(state, empty) is state and merge(empty, state) is state
        assert merge(empty, empty).count == 0
    assert math.isnan(Moments.empty().mean) and math.isnan(Moments.empty().variance)
    assert (Moments.empty().minimum, Moments.empty().maximum) == (math.inf, -math.inf)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(pair=pairs(max_size=8), offset=st.sampled_from([0, -(10**3), 10**8]))
def test_moments_are_exact_to_rounding(pair, offset):
    """Against rational arithmetic: the losses are multiples of 1/64, so that offset and excess are exact too."""
    rows = [[Fraction(x) + offset for x in row] for row in pair]
    rows.append([x - y for x, y in zip(*rows, strict=True)])
    state = paired_moments(*([float(x) for x in row] for row in rows[:2]))
    centered = []
    for channel, row in zip((state.losses, state.reference, state.excess), rows, strict=True):
        mean = sum(row) / len(row)
        centered.append([x - mean for x in row])
        assert channel.mean == pytest.approx(float(mean), rel=2.0**-51, abs=1e-15)
        for order in (2, 3, 4):
            size = float(sum(abs(x) ** order for x in centered[-1]))
            near(getattr(channel, f"m{order}"), float(sum(x**order for x in centered[-1])), 1e-13 * size)
    size = math.sqrt(state.losses.m2 * state.reference.m2)
    near(state.cross, float(sum(x * y for x, y in zip(*centered[:2], strict=True))), 1e-13 * size)


@pytest.mark.parametrize("losses", [z for _, z in hard_cases(varied=True)], ids=[k for k, _ in hard_cases(varied=True)])
def test_shape_numbers_against_scipy(losses):
    state, centered = moments(losses), losses - losses[0]  # scipy centers less carefully
    unit = centered / np.abs(centered).max()
    assert state.skewness == pytest.approx(stats.skew(unit), rel=1e-9, abs=1e-9)
    assert state.kurtosis == pytest.approx(stats.kurtosis(unit, fisher=False), rel=1e-9)
    assert state.variance == pytest.approx(np.var(centered, ddof=1), rel=1e-10)
    assert state.population_variance == pytest.approx(np.var(centered), rel=1e-10)
    low, high = losses.min(), losses.max()
    assert (state.minimum, state.maximum) == (low, high)
    assert (state.ties_at_minimum, state.ties_at_maximum) == ((losses == low).sum(), (losses == high).sum())


@pytest.mark.parametrize("name", ["constant", "constant not representable", "single", "zeros"])
def test_equal_losses_have_no_spread(name):
    state = moments(HARD[name])
    assert state.m2 == state.m3 == state.m4 == 0
    assert state.ties_at_minimum == state.ties_at_maximum == len(HARD[name])
    assert math.isnan(state.skewness) and math.isnan(state.kurtosis)
    assert math.isnan(state.variance) == (len(HARD[name]) == 1)


def test_chunks_do_not_matter(monkeypatch):
    losses, reference = paired_sample(n=1001, offset=1e6)
    whole = paired_moments(losses, reference)
    monkeypatch.setattr("drrho.moments.CHUNK", 64)
    same_pairs(paired_moments(losses, reference), whole)
    same_moments(moments(losses), whole.losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_floating_tensor_is_accumulated_in_float64(dtype):
    losses = torch.as_tensor(paired_sample()[0]).to(dtype).reshape(6, 10).requires_grad_()
    same_moments(moments(losses), moments(losses.detach().double().flatten().numpy()), relative=1e-15)


SHARDS = ((0, 23), (23, 60))


def work(rank, folder):
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=patience)
    try:
        losses, reference = (row[slice(*SHARDS[rank])] for row in paired_sample(offset=1e4))
        paired = gather(paired_moments(losses, reference), dist.group.WORLD)
        single = gather(moments(losses) if rank else Moments.empty())
        np.savez(Path(folder) / f"{rank}.npz", *vars(paired).values(), *vars(single).values())
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_the_moments_of_all_samples(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    other = start_ranks(work, (str(tmp_path),), 1, join=False)
    work(1, str(tmp_path))
    while not other.join():
        pass
    first, second = (list(np.load(tmp_path / f"{rank}.npz").values()) for rank in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))  # the same bits
    losses, reference = paired_sample(offset=1e4)
    size = len(first) // 2
    same_pairs(PairedMoments(int(first[0]), *first[1:size]), paired_moments(losses, reference))
    same_moments(Moments(int(first[size]), *first[size + 1 :]), moments(losses[slice(*SHARDS[1])]))


GOOD = [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: moments([1.0, math.inf]), ValueError, "losses must be finite, got inf"),
        (lambda: moments([1.0, -1e308]), ValueError, r"losses must be at most 2\^1021 .* got 1e\+308"),
        (lambda: moments([]), ValueError, "losses must have shape"),
        (lambda: paired_moments(torch.arange(3), GOOD), TypeError, "losses must have a floating dtype"),
        (lambda: paired_moments(GOOD, "abc"), TypeError, "reference_losses must be numbers"),
        (lambda: merge(moments(GOOD), paired_moments(GOOD, GOOD)), TypeError, "Moments and PairedMoments"),
    ],
)
def test_refusals_name_argument_and_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
