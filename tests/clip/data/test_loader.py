"""The stream of batches: the same for any number of ranks and workers, from any step on, with skips counted."""

import random
import re
import time
from collections import Counter

import corpus
import numpy as np
import open_clip
import pytest
import torch
from tars import image_bytes, pair, write_shards, write_tar

from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.data import loader as loader_module
from experiments.clip.data.loader import Loader
from experiments.clip.data.reader import SKIPS_ALLOWED, Reader, decode
from experiments.clip.errors import UserError
from experiments.clip.models.clip import new_model

UNEVEN = [9, 1, 30, 4, 17, 2]
TOTAL = sum(UNEVEN)


@pytest.fixture(scope="module")
def clip():
    return new_model("glyph-small", 0)


@pytest.fixture(scope="module")
def augment():
    return open_clip.image_transform(32, is_train=True, aug_cfg={"scale": (0.3, 1.0)})


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    write_shards(folder, UNEVEN)
    return make_catalog(str(folder / "*.tar"), folder / "catalog")


@pytest.fixture
def make(catalog, clip):
    """Makes loaders, of the uneven shards by default, whose workers end after the test."""
    made = []

    def make(source=catalog, transform=clip.preprocess, **options):
        defaults = {"batch_size": 8, "seed": 1, "block_shards": 3}
        made.append(Loader(source, transform, clip.tokenize, **defaults | options))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def equal(one, other):
    return all(torch.equal(one[i], other[i]) for i in range(3)) and one.skipped == other.skipped


def test_batches_are_open_clips_own_preprocessing(make, catalog, clip):
    [batch] = make(batch_size=100).batches(0)
    reader = Reader(catalog)
    pairs = [decode(reader.read(int(index))) for index in batch.index]
    assert torch.equal(batch.image, torch.stack([clip.preprocess(sample.image) for sample in pairs]))
    assert torch.equal(batch.text, clip.tokenize([sample.caption for sample in pairs]))
    assert batch.image.shape == (TOTAL, 3, 32, 32) and batch.index.dtype == torch.int64 and batch.skipped == {}


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(1, 0), (1, 1), (1, 3), (2, 0), (2, 1), (4, 0)]
    + [pytest.param(*both, marks=pytest.mark.slow) for both in ((2, 3), (4, 1), (4, 3))],
)
def test_the_stream_does_not_depend_on_workers_and_ranks(make, augment, workers, ranks):
    full = list(make(transform=augment).batches(0))
    assert [len(batch.index) for batch in full] == [8] * 7 + [7]
    assert sorted(torch.cat([batch.index for batch in full]).tolist()) == list(range(TOTAL))
    loaders = [make(transform=augment, workers=workers, rank=rank, ranks=ranks) for rank in range(ranks)]
    for expected, *parts in zip(full, *(loader.batches(0) for loader in loaders), strict=True):
        assert {len(part.index) for part in parts} <= {8 // ranks, 8 // ranks - 1}
        joined = [torch.cat([part[i] for part in parts]) for i in range(3)]
        assert all(torch.equal(joined[i], expected[i]) for i in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_starting_anywhere_gives_the_tail(make, augment, workers):
    loader = make(transform=augment, workers=workers)
    full = {epoch: list(loader.batches(epoch)) for epoch in (0, 1)}
    assert not torch.equal(full[0][0].index, full[1][0].index)
    for epoch, first in [(1, 5), (0, 0), (0, 7), (0, 8), (1, 3)]:
        tail = list(loader.batches(epoch, first))
        assert len(tail) == 8 - first
        assert all(equal(*both) for both in zip(tail, full[epoch][first:], strict=True))


@pytest.mark.slow
def test_a_run_moved_between_numbers_of_ranks_and_workers_sees_every_sample_once_in_one_order(make, augment):
    """1 -> 2 -> 1 ranks and 0 -> 3 -> 1 workers, moved in the middle of epochs."""
    expected = [batch for epoch in (0, 1) for batch in make(transform=augment).batches(epoch)]
    assert sorted(torch.cat([batch.index for batch in expected[:8]]).tolist()) == list(range(TOTAL))
    stages = [(1, 0, 0, 0, 3), (2, 3, 0, 3, 8), (2, 3, 1, 0, 2), (1, 1, 1, 2, 8)]
    position = 0
    for ranks, workers, epoch, first, stop in stages:
        loaders = [make(transform=augment, workers=workers, rank=rank, ranks=ranks) for rank in range(ranks)]
        parts = [loader.batches(epoch, first) for loader in loaders]
        for _ in range(first, stop):
            own = [next(part) for part in parts]
            for i in range(3):
                assert torch.equal(torch.cat([batch[i] for batch in own]), expected[position][i])
            position += 1
        for loader in loaders:
            loader.close()
    assert position == len(expected)


def test_an_abandoned_iteration_leaves_nothing_behind(make):
    loader = make(workers=2)
    full = list(make().batches(0))
    for _ in range(3):
        assert equal(next(iter(loader.batches(0, 2))), full[2])
    assert equal(next(iter(loader.batches(0, 6))), full[6])


def test_starting_late_reads_nothing_before(make, monkeypatch):
    read = []
    original = Reader.read_many
    monkeypatch.setattr(Reader, "read_many", lambda self, own, *held: read.extend(own) or original(self, own))
    [batch] = make().batches(3, 7)
    assert read == batch.index.tolist()


def test_weights_repeat_samples_with_other_augmentations(clip, augment, tmp_path):
    write_shards(tmp_path, [6, 3])
    catalog = make_catalog(f"{tmp_path}/00000.tar::{tmp_path}/00001.tar", tmp_path / "catalog")
    options = {"batch_size": 100, "seed": 0, "weights": [1, 2]}
    [batch] = Loader(catalog, augment, clip.tokenize, **options).batches(0)
    assert sorted(batch.index.tolist()) == [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8]
    one, other = batch.image[batch.index == 7]
    noise = Loader(catalog, lambda image: torch.rand(2), clip.tokenize, **options)
    [draws] = noise.batches(0)
    one, other = draws.image[draws.index == 7]
    assert not torch.equal(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_resampling_is_exact_too(make, augment, workers):
    options = {"resampled": True, "epoch_samples": 41, "transform": augment}
    full = list(make(**options).batches(2))
    assert sum(len(batch.index) for batch in full) == 41
    tail = list(make(**options, workers=workers).batches(2, 4))
    assert all(equal(*both) for both in zip(tail, full[4:], strict=True))


def draw_from_everywhere(image):
    return torch.tensor([torch.rand(()), np.random.rand(), random.random()])  # noqa: NPY002


def test_global_random_states_stay(make):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    expected = draw_from_everywhere(None)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    batches = {}
    for workers in (0, 2):
        loader = make(workers=workers, transform=draw_from_everywhere)
        batches[workers] = torch.cat([batch.image for batch in loader.batches(0)])
        assert torch.equal(draw_from_everywhere(None), expected) or workers
        if not workers:
            torch.manual_seed(5)
            np.random.seed(5)  # noqa: NPY002
            random.seed(5)
    assert torch.equal(batches[0], batches[2])
    assert len(batches[0].unique()) == batches[0].numel()
    again = torch.cat([batch.image for batch in make(transform=draw_from_everywhere).batches(1)])
    assert not set(again.flatten().tolist()) & set(batches[0].flatten().tolist())


def test_captions_of_weighted_sources_are_a_function_of_the_visit(make, tmp_path):
    members = [m for n in range(300) for m in (*pair(n, caption=b"short"), (f"{n:05d}.alt", b"a longer one"))]
    path = write_tar(tmp_path / "x.tar", members)
    source = make_catalog(path, tmp_path / "catalog", caption_key=("txt", "alt"))

    def are_short(weights, size):
        batches = list(make(source, batch_size=size, caption_weights=weights).batches(0))
        index = torch.cat([batch.index for batch in batches])
        return (torch.cat([batch.text for batch in batches])[index.argsort()] != 0).sum(1) < 4

    often, seldom = are_short((9, 1), 300), are_short((1, 9), 300)
    assert 244 <= often.sum() <= 296 and 4 <= seldom.sum() <= 56  # 270 and 30, within five deviations
    assert torch.equal(often, are_short((9, 1), 7))


def test_captions_are_chosen_for_each_epoch(clip, tmp_path):
    members = [m for n in range(30) for m in [*pair(n, caption=b"first"), (f"{n:05d}.alt", b"second")]]
    catalog = make_catalog(write_tar(tmp_path / "x.tar", members), tmp_path / "c", caption_key=("txt", "alt"))
    loader = Loader(catalog, clip.preprocess, clip.tokenize, batch_size=30, seed=0)
    first = clip.tokenize(["first"])
    chosen = []
    for epoch in (0, 0, 1):
        [batch] = loader.batches(epoch)
        chosen.append((batch.text == first).all(1)[batch.index.argsort()])
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    assert 5 < chosen[0].sum() < 25


def mixed(folder, good, bad):
    """A catalog with ``good`` usable pairs and ``bad`` unusable ones, the latter in the last shard."""
    folder.mkdir(exist_ok=True)
    write_shards(folder, [good])
    kinds = [
        lambda n: [(f"{n}.png", b"no image"), (f"{n}.txt", b"x")],
        lambda n: [(f"{n}.png", image_bytes()), (f"{n}.txt", b" ")],
        lambda n: [(f"{n}.png", image_bytes()), (f"{n}.txt", b"\xff")],
        lambda n: [(f"{n}.png", image_bytes(size=(500, 1))), (f"{n}.txt", b"x")],
    ]
    write_tar(folder / "9.tar", [member for n in range(bad) for member in kinds[n % 4](n)])
    return make_catalog(str(folder / "*.tar"), folder / "catalog")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_skips_make_batches_smaller_and_are_counted(make, tmp_path, workers):
    catalog = mixed(tmp_path, 200, 8)
    loader = make(catalog, batch_size=50, workers=workers)
    batches = list(loader.batches(0))
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(200))
    assert sum(sum(batch.skipped.values()) for batch in batches) == 8
    assert loader.skipped == {
        "unreadable image": 2,
        "empty caption": 2,
        "invalid caption": 2,
        "extreme aspect ratio": 2,
    }


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_batch_says_how_many_rows_the_largest_has(make, ranks):
    """Of 63 samples in 7 batches of 9 and 10 in 63 // 9, whatever is skipped."""
    for size, largest in ((8, 8), (10, 9), (100, 63)):
        parts = [list(make(batch_size=size, rank=rank, ranks=ranks).batches(0)) for rank in range(ranks)]
        stated = {batch.size for part in parts for batch in part}
        assert stated == {max(len(batch.index) for part in parts for batch in part)} == {-(-largest // ranks)}


def test_a_batch_in_bytes_is_the_batch_of_floats(make, clip, tmp_path):
    """From shards of JPEG, in the bytes that a step is thought to take."""
    members = [m for n in range(6) for m in ((f"{n}.jpg", image_bytes(9 * n, (40, 30), "JPEG")), (f"{n}.txt", b"x"))]
    catalog = make_catalog(write_tar(tmp_path / "x.tar", members), tmp_path / "c")
    [pixels] = make(catalog, clip.in_bytes(clip.augment)).batches(0)
    [floats] = make(catalog, clip.augment).batches(0)
    assert torch.equal(clip.prepared(pixels.image), floats.image) and torch.equal(pixels.index, floats.index)
    assert pixels.image.dtype == torch.uint8 and pixels.text.dtype == torch.int32
    assert pixels.image.nbytes == 6 * 3 * 32 * 32 and pixels.text.nbytes == 6 * 4 * pixels.text.shape[1]


@pytest.mark.slow
def test_too_many_skips_stop_the_run(make, tmp_path, monkeypatch):
    catalog = mixed(tmp_path, 200, 40)
    monkeypatch.setattr(loader_module, "SKIPS_ALLOWED", 10)
    with pytest.raises(UserError, match=r"\d+ of the \d+ samples so far cannot be used \(.*: \d+.*\): .* of 0.1$"):
        list(make(catalog, batch_size=50, workers=1).batches(0))
    assert len(list(make(catalog, batch_size=50, skip_limit=0.4).batches(0))) == 5


@pytest.mark.slow
def test_skips_before_an_interruption_count(make, tmp_path, monkeypatch):
    catalog = mixed(tmp_path, 200, 16)
    monkeypatch.setattr(loader_module, "SKIPS_ALLOWED", 10)
    full = make(catalog, batch_size=18, skip_limit=0.05)
    with pytest.raises(UserError, match="samples so far") as refusal:
        list(full.batches(0))
    counts: dict[str, int] = {}
    with pytest.raises(UserError) as again:
        for step in range(12):
            part = make(catalog, batch_size=18, skip_limit=0.05)
            part.load_state_dict(counts)
            next(part.batches(0, step))
            counts = part.state_dict()
            assert sum(counts.values()) - counts["seen"] == part.skipped.total()
    assert str(again.value) == str(refusal.value)


@pytest.fixture(scope="module")
def unusable(tmp_path_factory):
    return mixed(tmp_path_factory.mktemp("unusable"), 0, 1000)


@pytest.mark.parametrize("workers, place", [(0, {}), (2, {}), (0, {"rank": 1, "ranks": 2})])
def test_samples_none_of_which_is_valid_are_an_error_soon(make, unusable, workers, place):
    """Once they are more than may always be skipped; a batch without a sample is none."""
    started, batches = time.monotonic(), []
    with pytest.raises(
        UserError, match=r"\d+ of the \d+ samples so far cannot be used \(.*\): correct the data"
    ) as error:
        for batch in make(unusable, batch_size=16, workers=workers, **place).batches(0):
            batches.append(len(batch.index))
    counts = Counter({reason: int(count) for reason, count in re.findall(r"([a-z][a-z ]*): (\d+)", str(error.value))})
    assert counts.total() > SKIPS_ALLOWED and counts["unreadable image"] > 0
    assert batches == [0] * (SKIPS_ALLOWED * len(place or "1") // 16)
    assert time.monotonic() - started < 10


def test_an_empty_part_has_the_shapes_of_the_others(make, tmp_path):
    catalog = mixed(tmp_path, 12, 12)
    parts = [list(make(catalog, batch_size=4, rank=rank, ranks=4).batches(0)) for rank in range(4)]
    empty = next(batch for part in parts for batch in part if not len(batch.index))
    assert empty.image.shape == (0, 3, 32, 32) and empty.text.shape[0] == 0 and sum(empty.skipped.values()) == 1
    assert {batch.text.shape[1] for part in parts for batch in part} == {empty.text.shape[1]}


@pytest.mark.parametrize("workers", [0, 2])
def test_lost_shards_are_reported_in_one_line(make, tmp_path, workers):
    paths = write_shards(tmp_path, [5, 5])
    catalog = make_catalog(str(tmp_path / "*.tar"), tmp_path / "catalog")
    paths[1].unlink()
    with pytest.raises(UserError, match=r"^cannot read .*00001.tar \(No such file or directory\): .*$") as raised:
        list(make(catalog, workers=workers).batches(0))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 3, "ranks": 4}, UserError, "at least the number of ranks, 4, got 3"),
        ({"rank": 2, "ranks": 2}, ValueError, "rank must be from 0 to 1, got 2"),
        ({"weights": [1, 2]}, UserError, "there are 2 weights for 1 sources"),
        ({"weights": [0.5]}, UserError, "integer >= 1"),
    ],
)
def test_wrong_options(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_a_step_outside_the_epoch(make):
    with pytest.raises(ValueError, match=re.escape("first must be from 0 to 8, got 9")):
        next(make().batches(0, 9))


@pytest.mark.slow
def test_damaged_shards_give_the_same_batches_for_any_number_of_workers(tmp_path, clip):
    """Batches and skips agree, also with more workers than shards."""
    contents = [*corpus.IMAGES.values(), *((corpus.image(), wanted) for _, wanted in corpus.IMAGES.values())]
    members = [m for n, (data, _) in enumerate(contents) for m in ((f"{n}.jpg", data), (f"{n}.txt", b"x"))]
    data = corpus.archive(members)
    (tmp_path / "0.tar").write_bytes(data)
    (tmp_path / "1.tar").write_bytes(data[: len(data) // 3])
    (tmp_path / "2.tar").write_bytes(b"no tar")
    catalog = make_catalog(str(tmp_path / "*.tar"), tmp_path / "catalog")
    assert catalog.left_out["damaged shard"] == 2
    batches, skipped = {}, {}
    for workers in (0, 2, 4):
        loader = Loader(catalog, clip.preprocess, clip.tokenize, batch_size=20, seed=0, workers=workers, skip_limit=1.0)
        try:
            batches[workers] = list(loader.batches(0))
        finally:
            loader.close()
        skipped[workers] = loader.skipped
    delivered = sum(len(batch.index) for batch in batches[0])
    assert delivered + skipped[0].total() == len(catalog) and skipped[0].total() > 40
    assert skipped[0] == skipped[2] == skipped[4]
    for workers in (2, 4):
        for one, other in zip(batches[0], batches[workers], strict=True):
            assert all(torch.equal(one[i], other[i]) for i in range(3)) and one.skipped == other.skipped
