"""Batches of remote shards read in blocks: those of local shards in that order, each block asked for once."""

import pickle
import re

import pytest
import torch
from tars import write_shards

pytest.importorskip("aiohttp")

from experiments.benchmarks.remote import served
from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.data import lanes, loader
from experiments.clip.data.loader import Loader
from experiments.clip.errors import UserError
from experiments.clip.io import files
from experiments.clip.models.clip import new_model

SIZES = [40, 1, 25, 30, 17, 36, 40, 22]
TOTAL = sum(SIZES)


@pytest.fixture(scope="module")
def clip():
    return new_model("glyph-tiny", 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, SIZES)
    return folder


@pytest.fixture(scope="module")
def server(shards):
    with served(shards) as server:
        yield server


@pytest.fixture(scope="module")
def remote(server, tmp_path_factory):
    return make_catalog(f"{server.url}/{{00000..00007}}.tar", tmp_path_factory.mktemp("remote"))


@pytest.fixture(scope="module")
def local(shards, tmp_path_factory):
    return make_catalog(str(shards / "*.tar"), tmp_path_factory.mktemp("local"))


@pytest.fixture
def make(clip, monkeypatch, tmp_path):
    """Makes loaders of small blocks in several lanes."""
    monkeypatch.setattr(loader, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(loader, "LANE_VISITS", {"blocks": 4, "shards": 8})
    made = []

    def make(catalog, **options):
        defaults = {"batch_size": 16, "seed": 1, "reading": "blocks", "copies": tmp_path}
        made.append(Loader(catalog, clip.preprocess, clip.tokenize, **defaults | options))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert not list(tmp_path.iterdir())


def contents(batches):
    batches = list(batches)
    return [torch.cat([batch[i] for batch in batches]) for i in range(3)]


def gets(server):
    return [(path, stated) for method, path, stated in server.requests if method == "GET"]


@pytest.mark.parametrize("reading", ["blocks", "shards"])
@pytest.mark.parametrize("workers", [0, 3])
def test_remote_batches_are_those_of_local_shards_and_blocks_are_asked_for_once(
    make, server, local, remote, reading, workers
):
    expected = contents(make(local, reading=reading).batches(0))
    server.requests.clear()
    found = contents(make(remote, reading=reading, workers=workers).batches(0))
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
    assert sorted(found[2].tolist()) == list(range(TOTAL))
    asked = gets(server)
    if reading == "shards":  # once, but for those that two lanes share
        assert len(asked) <= len(SIZES) + 1 and all(stated == "" for _, stated in asked)
    else:
        assert len(set(asked)) == len(asked) <= 80


def test_ranks_divide_the_batch_and_the_requests(make, server, remote):
    server.requests.clear()
    full = list(make(remote).batches(3))
    alone = len(gets(server))
    server.requests.clear()
    parts = [list(make(remote, rank=rank, ranks=2).batches(3)) for rank in (0, 1)]
    assert len(gets(server)) == alone
    for batch, *own in zip(full, *parts, strict=True):
        assert all(torch.equal(torch.cat([part[i] for part in own]), batch[i]) for i in range(3))


@pytest.mark.slow
def test_a_run_resumes_in_the_middle_on_other_numbers_of_ranks_and_workers(make, remote):
    expected = [batch for epoch in (0, 1) for batch in make(remote).batches(epoch)]
    steps = len(expected) // 2
    position = 0
    stages = [(1, 0, 0, 0, 5), (3, 2, 0, 5, steps), (4, 0, 1, 0, 4), (2, 1, 1, 4, steps)]
    for ranks, workers, epoch, first, stop in stages:
        loaders = [make(remote, workers=workers, rank=rank, ranks=ranks) for rank in range(ranks)]
        streams = [each.batches(epoch, first) for each in loaders]
        for _ in range(first, stop):
            own = [next(stream) for stream in streams]
            assert all(torch.equal(torch.cat([part[i] for part in own]), expected[position][i]) for i in range(3))
            position += 1
        for each in loaders:
            each.close()
    assert position == len(expected)


def test_an_iteration_may_begin_again(make, remote):
    one = make(remote, workers=2)
    full = list(one.batches(0))
    for first in (7, 2, 2, 0):
        assert torch.equal(next(iter(one.batches(0, first))).index, full[first].index)


def test_few_blocks_are_kept(make, remote, tmp_path):
    own = make(remote, workers=1)
    most = 0
    for _ in own.batches(0):
        [folder] = tmp_path.iterdir()
        most = max(most, len([path for path in folder.iterdir() if not path.name.startswith(".")]))
    blocks = lanes.GROUP_BLOCKS["blocks"]
    assert 0 < most <= 4 * blocks * 3  # of 73: the group at hand, what comes next, and what others may be reading


def test_weights_and_resampling(make, local, remote):
    for options in ({"weights": [2]}, {"resampled": True, "epoch_samples": 100, "weights": [0.5]}):
        expected = contents(make(local, **options).batches(1))
        found = contents(make(remote, workers=2, **options).batches(1))
        assert torch.equal(found[2], expected[2]) and torch.equal(found[0], expected[0])


def test_a_shard_that_is_gone_is_named(make, shards, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(files, "WAITS", (0.0,))
    folder = tmp_path_factory.mktemp("other")
    write_shards(folder, [30])
    with served(folder) as server:
        catalog = make_catalog(f"{server.url}/00000.tar", folder / "catalog")
        (folder / "00000.tar").unlink()
        own = make(catalog, workers=1)
        with pytest.raises(UserError, match=r"cannot read http://.*/00000\.tar"):
            list(own.batches(0))
        own.close()


def test_a_server_without_ranges_serves_whole_shards_and_is_refused_otherwise(make, shards, local, tmp_path_factory):
    with served(shards, ranges=False) as server:
        catalog = make_catalog(f"{server.url}/{{00000..00007}}.tar", tmp_path_factory.mktemp("plain"))
        assert catalog.shards[0].samples == SIZES[0]
        host = re.escape(server.url.removeprefix("http://"))
        for reading in ("blocks", "random"):
            with pytest.raises(UserError, match=rf"the server {host} ignores requests for a part .*--reading shards"):
                list(make(catalog, reading=reading).batches(0))
        found = contents(make(catalog, reading="shards", workers=2).batches(0))
    assert torch.equal(found[2], contents(make(local, reading="shards").batches(0))[2])


def test_a_loader_can_be_sent_to_other_processes(make, remote):
    task = make(remote)._workers._task
    again = pickle.loads(pickle.dumps(task._feed))
    assert [rows.first for rows in again.ready(0, 0)] == [rows.first for rows in task._feed.ready(0, 0)]
