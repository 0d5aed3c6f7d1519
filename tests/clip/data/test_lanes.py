"""The order in lanes: every sample once, for any number of ranks, and every block asked for by one of them."""

import itertools
import re

import numpy as np
import pytest

from experiments.clip.data.lanes import Lanes
from experiments.clip.errors import UserError

UNEVEN = [1, 0, 7, 130, 64, 2, 0, 33]
TOTAL = sum(UNEVEN)
SIZES = [100 * count for count in UNEVEN]


def lanes(counts=UNEVEN, sizes=None, **options):
    defaults = {"seed": 1, "batch_size": 20, "block_bytes": 700, "lane_visits": 3, "group_blocks": 2}
    return Lanes(counts, [100 * n for n in counts] if sizes is None else sizes, **defaults | options)


@pytest.mark.parametrize("counts", [UNEVEN, [5], [1] * 40, [0, 3], [300], []])
@pytest.mark.parametrize("batch_size", [1, 20, 64, 1000])
@pytest.mark.parametrize("block_bytes", [1, 700, 5000, None])
def test_an_epoch_visits_every_sample_once(counts, batch_size, block_bytes):
    order = lanes(counts, batch_size=batch_size, block_bytes=block_bytes)
    visits = order.visits(0, 0, order.samples)
    assert sorted(visits.index) == list(range(sum(counts)))
    assert not visits.occurrence.any()


def test_weights_repeat_samples():
    weights = [1, 1, 3, 2, 1, 1, 1, 4]
    order = lanes(weights=weights)
    visits = order.visits(5, 0, order.samples)
    assert sorted(visits.index) == list(np.repeat(np.arange(TOTAL), np.repeat(weights, UNEVEN)))
    assert len({*zip(visits.index, visits.occurrence, strict=True)}) == order.samples
    assert visits.occurrence.max() == 3


@pytest.mark.parametrize("resampled", [False, True])
def test_any_part_is_that_part_of_the_full_epoch(resampled):
    options = {"weights": [2] * len(UNEVEN), "resampled": resampled}
    full = lanes(**options).visits(1, 0, TOTAL)
    order = lanes(**options)
    for start, stop in [(0, 0), (0, 1), (5, 200), (100, 101), (236, TOTAL), (TOTAL, TOTAL), (13, TOTAL)]:
        part = order.visits(1, start, stop)
        assert (part.index == full.index[start:stop]).all() and (part.occurrence == full.occurrence[start:stop]).all()


def test_seeds_and_epochs_differ_and_the_order_is_fixed():
    orders = [lanes(seed=seed).visits(epoch, 0, TOTAL).index for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(index) for index in orders}) == 4
    assert (lanes(seed=0).visits(0, 0, TOTAL).index == orders[0]).all()
    assert lanes(seed=0).visits(0, 0, 12).index.tolist() == orders[0][:12].tolist()


def steps_of(order, ranks):
    """Return for every step the positions of every rank."""
    edges = [0]
    for step in range(order.steps):
        size = order.samples // order.steps + (step < order.samples % order.steps)
        edges.append(edges[-1] + size)
    for step, (begin, end) in enumerate(itertools.pairwise(edges)):
        parts = [order.part(end - begin, rank, ranks) for rank in range(ranks)]
        yield step, [(begin + first, begin + stop) for first, stop in parts]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_parts_of_the_ranks_are_the_batch_and_their_blocks_hold_them(ranks):
    counts = [50, 3, 80, 41, 60] * 4
    order = lanes(counts, batch_size=96, lane_visits=8)
    full = order.visits(2, 0, order.samples).index
    seen = []
    for step, parts in steps_of(order, ranks):
        for start, stop in parts:
            index = order.visits(2, start, stop).index
            assert (index == full[start:stop]).all()
            seen += index.tolist()
            blocks = order.blocks(2, start, stop)
            assert len({(block.lane, block.number) for block in blocks}) == len(blocks)
            for sample in index:
                assert any(block.first <= sample < block.stop and block.until >= step for block in blocks)
    assert sorted(seen) == list(range(sum(counts)))


def asked(order, ranks):
    """Return the blocks that each rank asks for in an epoch, and the largest number that it has at a time."""
    found, most = [set() for _ in range(ranks)], 0
    for step, parts in steps_of(order, ranks):
        for rank, part in enumerate(parts):
            blocks = order.blocks(0, *part)
            assert all(block.until >= step for block in blocks)
            found[rank] |= set(blocks)
            most = max(most, len(blocks))
    return found, most


def test_each_block_is_read_by_one_rank_where_the_ranks_divide_the_lanes():
    """Blocks are cut in two at most at the ends of the lanes' stretches."""
    order = lanes([100] * 48, batch_size=192, lane_visits=16, block_bytes=1000)
    assert order.lanes == 12
    for ranks in (1, 2, 3, 4, 6, 12):
        found, most = asked(order, ranks)
        together = set().union(*found)
        assert sum(map(len, found)) == len(together) <= 480 + order.lanes
        assert most <= 2 * 2 * order.lanes // ranks  # at the end of a group, a lane has the next one too
    found, _ = asked(order, 8)  # 4 of the 8 ranks begin in the middle of a lane
    assert sum(map(len, found)) <= len(set().union(*found)) * (1 + 8 / 12)


def test_a_block_is_kept_until_its_last_visit():
    order = lanes([100] * 12, batch_size=96, lane_visits=16)
    last = {}
    for step, [part] in steps_of(order, 1):
        for block in order.blocks(0, *part):
            last[block] = step
    assert all(block.until == step for block, step in last.items())
    whole = sorted((block.first, block.stop) for block in last)
    assert [a for a, _ in whole] == [0, *(b for _, b in whole[:-1])] and whole[-1][1] == 1200


def test_a_batch_has_samples_of_many_shards_and_a_lane_of_few():
    order = lanes([100] * 64, batch_size=128, lane_visits=8, block_bytes=1000)
    first = order.visits(0, 0, 128).index // 100
    assert len(set(first)) >= 16
    assert len(set(order.visits(0, 0, 8).index // 100)) <= 2


@pytest.mark.slow
def test_places_are_uniform():
    """The step of sample 0 among 6, over many epochs: chi-square with 5 degrees of freedom, 99.9 % below 20.5."""
    order = lanes([20] * 6, batch_size=20, lane_visits=5, block_bytes=1000)
    places = [list(order.visits(epoch, 0, 120).index).index(0) // 20 for epoch in range(600)]
    counts = np.bincount(places, minlength=6)
    assert ((counts - 100) ** 2 / 100).sum() < 20.5


def test_resampling_follows_the_weights():
    counts = [100, 300, 50]
    order = lanes(counts, weights=[1.0, 0.5, 0.0], resampled=True, epoch_samples=20_000, batch_size=256)
    visits = order.visits(0, 0, 20_000)
    drawn = np.bincount(visits.index, minlength=450)
    assert drawn[400:].sum() == 0
    assert drawn[:100].sum() / 20_000 == pytest.approx(100 / 250, abs=0.04)
    assert len(set(visits.occurrence)) == 20_000


def test_a_catalog_of_a_billion_samples_is_laid_out_as_far_as_it_is_asked_for():
    order = Lanes([10_000] * 140_000, [500_000_000] * 140_000, seed=0, batch_size=32_768)
    assert (order.lanes, order.steps) == (1024, 42_725)
    part = order.part(32_768, 100, 512)
    assert part == (6400, 6464)
    blocks = order.blocks(3, *part)
    assert 2 <= len(blocks) <= 2 * 2 * 4 and all(block.stop - block.first <= 168 for block in blocks)
    assert len(set(order.visits(3, *part).index)) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.5]}, "integer >= 1, unless samples are drawn .*, got 1.5"),
        ({"weights": [0], "resampled": True}, "all weights are 0"),
        ({"block_bytes": 0}, "at least 1 byte, got 0"),
        ({"epoch_samples": 7}, "7 samples per epoch: only resampling"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        lanes([10], **options)


def test_positions_outside_the_epoch():
    with pytest.raises(ValueError, match=re.escape("the positions 3 to 11 must lie between 0 and 10")):
        lanes([10]).visits(0, 3, 11)
