"""The order of an epoch: every sample once, or by weights, in blocks, as a pure function of seed and epoch."""

import hashlib
import re

import numpy as np
import pytest

from experiments.clip.data.order import Order
from experiments.clip.errors import UserError

UNEVEN = [1, 0, 7, 130, 64, 2, 0, 33]


@pytest.mark.parametrize("counts", [UNEVEN, [5], [1] * 40, [0, 3], []])
@pytest.mark.parametrize("block_shards", [1, 3, 100])
def test_an_epoch_visits_every_sample_once(counts, block_shards):
    order = Order(counts, seed=1, block_shards=block_shards)
    visits = order.visits(0, 0, order.samples)
    assert sorted(visits.index) == list(range(sum(counts)))
    assert not visits.occurrence.any()


def test_weights_repeat_samples():
    order = Order(UNEVEN, seed=0, weights=[1, 1, 3, 2, 1, 1, 1, 4], block_shards=3)
    visits = order.visits(5, 0, order.samples)
    expected = np.repeat(np.arange(sum(UNEVEN)), np.repeat([1, 1, 3, 2, 1, 1, 1, 4], UNEVEN))
    assert sorted(visits.index) == list(expected)
    assert len({*zip(visits.index, visits.occurrence, strict=True)}) == order.samples
    assert visits.occurrence.max() == 3


@pytest.mark.parametrize("resampled", [False, True])
def test_any_part_is_that_part_of_the_full_epoch(resampled):
    options = {"seed": 3, "weights": [2] * len(UNEVEN), "block_shards": 2, "resampled": resampled}
    full = Order(UNEVEN, **options).visits(1, 0, 237)
    order = Order(UNEVEN, **options)
    for start, stop in [(0, 0), (0, 1), (5, 200), (100, 101), (236, 237), (237, 237), (13, 237)]:
        part = order.visits(1, start, stop)
        assert (part.index == full.index[start:stop]).all() and (part.occurrence == full.occurrence[start:stop]).all()


def test_seeds_epochs_and_blocks_differ():
    orders = [Order([50] * 8, seed=seed, block_shards=4).visits(epoch, 0, 400) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(visits.index) for visits in orders}) == 4
    first, second = np.split(orders[0].index % 50, 2)
    assert (first != second).any()


def test_shuffling_is_uniform_within_a_block():
    # The place of sample 0 among 6, over many epochs: chi-square with 5 degrees of freedom, 99.9 % below 20.5.
    order = Order([2, 3, 1], seed=0)
    places = [list(order.visits(epoch, 0, 6).index).index(0) for epoch in range(1200)]
    counts = np.bincount(places, minlength=6)
    assert ((counts - 200) ** 2 / 200).sum() < 20.5


def test_blocks_are_local():
    order = Order([10] * 64, seed=0, block_shards=8)
    shards = order.visits(0, 0, 80).index // 10
    assert len(set(shards)) == 8


def test_resampling_follows_the_weights():
    counts, weights = [100, 300, 50], [1.0, 0.5, 0.0]
    order = Order(counts, seed=0, weights=weights, resampled=True, block_shards=2, epoch_samples=40_000)
    visits = order.visits(0, 0, 40_000)
    drawn = np.bincount(visits.index, minlength=450)
    assert drawn[400:].sum() == 0
    # Two of three draws of a shard fall on the second; shards are drawn 2 per 300 visits, so about 270 times.
    assert drawn[:100].sum() / 40_000 == pytest.approx(100 / 250, abs=0.12)
    assert len(set(visits.occurrence)) == 40_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.5]}, "the weight of a source must be an integer >= 1, unless samples are drawn .*, got 1.5"),
        ({"weights": [0]}, "integer >= 1"),
        ({"weights": [-1], "resampled": True}, "a number >= 0, got -1"),
        ({"weights": [float("nan")], "resampled": True}, "got nan"),
        ({"weights": [0], "resampled": True}, "all weights are 0"),
        ({"block_shards": 0}, "at least 1 shard, got 0"),
        ({"epoch_samples": 7}, "7 samples per epoch: only resampling"),
        ({"epoch_samples": 0, "resampled": True}, "0 samples per epoch"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        Order([10], seed=0, **options)


def test_positions_outside_the_epoch():
    with pytest.raises(ValueError, match=re.escape("the positions 3 to 11 must lie between 0 and 10")):
        Order([10], seed=0).visits(0, 3, 11)


@pytest.mark.parametrize(
    ("options", "digest"),
    [
        ({}, "1e79463edc4f5324"),
        ({"weights": [1, 1, 3, 2, 1, 1, 1, 4]}, "7bd4f03281dd1c84"),
        ({"resampled": True, "weights": [0.5] * 8, "epoch_samples": 500}, "b5304ac737e3d4e9"),
    ],
)
def test_the_order_is_that_of_earlier_runs(options, digest):
    order = Order(UNEVEN, seed=3, block_shards=3, **options)
    visits = np.stack(order.visits(2, 0, order.samples)).astype("<i8")
    assert hashlib.sha256(visits.tobytes()).hexdigest()[:16] == digest
