"""The simulation of many ranks, in small, and its table in the trainer's page."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.benchmarks import many_ranks
from experiments.benchmarks.many_ranks import BEGIN, END, README, RESULTS, Scale, asked, batches_agree, visited_once
from experiments.clip.catalog.catalog import IMAGE_KEYS, open_catalog, write_catalog
from experiments.clip.catalog.sources import TarPattern

SMALL = Scale(samples=60_000, shards=60, batch_size=1024, ranks=8, ranks_later=6)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalog")
    return write_catalog(folder, [TarPattern("s3://pool/*.tar")], IMAGE_KEYS, ("txt",), many_ranks.shards_of(SMALL))


@pytest.fixture(scope="module")
def order(catalog):
    return many_ranks.order_of(catalog, SMALL)


def test_the_catalog_has_the_samples_and_opens(catalog):
    assert len(catalog) == SMALL.samples and len(catalog.shards) == 60
    assert open_catalog(catalog.folder, verify=False) == catalog
    first = np.cumsum(catalog.shards.samples) - catalog.shards.samples
    assert (catalog.shards.firsts == first).all()


def test_every_sample_is_visited_once_and_a_gap_is_seen(order, monkeypatch):
    assert visited_once(order, SMALL.samples)
    visits = order.lane_visits(0, 3)
    twice = visits._replace(index=np.concatenate([visits.index[:-1], visits.index[:1]]))
    original = order.lane_visits
    monkeypatch.setattr(order, "lane_visits", lambda epoch, lane: twice if lane == 3 else original(epoch, lane))
    assert not visited_once(order, SMALL.samples)


def test_the_lanes_are_what_the_batches_consist_of(order):
    whole = order.visits(0, 0, order.samples).index
    assert sorted(whole) == sorted(np.concatenate([order.lane_visits(0, k).index for k in range(order.lanes)]))


@pytest.mark.parametrize("ranks", [1, 6, 8])
def test_ranks_have_the_batches_of_one_process(order, ranks):
    assert batches_agree(order, (0, 17, SMALL.steps - 1), ranks)


def test_a_rank_asks_for_its_part(order):
    """All ranks together ask for all data, and a little twice where lanes are divided."""
    found = [asked(order, range(SMALL.steps), rank, 8) for rank in range(8)]
    assert sum(each.visits for each in found) == SMALL.samples
    assert SMALL.samples <= sum(each.samples for each in found) < 1.2 * SMALL.samples
    assert max(each.shards for each in found) < 15  # of 60; 7.5 where nothing is divided
    assert max(each.held for each in found) < 0.2 * SMALL.samples


def test_a_rank_starts_in_the_middle(catalog):
    found = many_ranks.started(catalog.folder, SMALL, 5, 6, 30)
    assert 0 <= found["catalog"] < 5 and 0 <= found["order"] < 5 and found["bytes"] < 10**8


@pytest.mark.slow  # ranks in processes of their own
def test_the_command_writes_its_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nearlier table\n{END}\n\nafter\n")
    scale = json.dumps(dataclasses.asdict(SMALL))
    words = ["--scale", scale, "--walks", "1", "--batches", "1"]
    assert many_ranks.main([*words, "--output", str(tmp_path / "t.md"), "--page", str(page)]) == 0
    table = page.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert table in (tmp_path / "t.md").read_text() and "earlier table" not in page.read_text()
    assert page.read_text().startswith("before\n\n") and page.read_text().endswith("\n\nafter\n")
    assert "every one of 60,000 samples visited once | yes" in table and "NOT" not in table


def test_the_page_has_the_table_of_the_results():
    table = README.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert table and table in RESULTS.read_text()
