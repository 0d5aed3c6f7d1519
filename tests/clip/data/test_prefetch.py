"""Batches read one ahead: their order, errors and counts are those of the stream."""

import os
import signal
import time

import pytest
import torch
from tars import image_bytes, write_shards, write_tar

from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.data.batch import Batch
from experiments.clip.data.loader import Loader
from experiments.clip.data.prefetch import Prefetched
from experiments.clip.errors import UserError
from experiments.clip.models.clip import new_model

CPU = torch.device("cpu")


class Numbers:
    """A stream of batches with a number each, which counts those read and fails at one."""

    steps_per_epoch = 6

    def __init__(self, fails_at=None, error=None):
        self.read, self.closed, self._fails_at, self._error = 0, False, fails_at, error

    def batches(self, epoch, first):
        for step in range(first, self.steps_per_epoch):
            if step == self._fails_at:
                raise self._error
            self.read += 1
            number = torch.tensor([10 * epoch + step])
            yield Batch(number, number, number, {}, (number, number), 1)

    def state_dict(self):
        return {"read": self.read}

    def load_state_dict(self, state):
        self.read = state["read"]

    def close(self):
        self.closed = True


def test_batches_come_in_order_from_any_step_and_one_is_read_ahead():
    stream = Numbers()
    ahead = Prefetched(stream, CPU)
    assert ahead.steps_per_epoch == 6
    found = []
    for given, batch in enumerate(ahead.batches(1, 2), start=1):
        found.append(int(batch.index))
        assert stream.read == min(given + 1, 4)
        assert batch.size == 1 and batch.reference_inputs is not None
    assert found == [12, 13, 14, 15]
    assert [int(batch.index) for batch in ahead.batches(2, 5)] == [25]
    assert list(ahead.batches(0, 6)) == []


def test_counts_are_those_of_the_batches_given_not_of_those_read():
    ahead = Prefetched(Numbers(), CPU)
    assert ahead.state_dict() == {"read": 0}
    for given, _ in enumerate(ahead.batches(0, 0), start=1):
        assert ahead.state_dict() == {"read": given}
    ahead.load_state_dict({"read": 3})
    assert ahead.state_dict() == {"read": 3}
    next(ahead.batches(0, 0))
    assert ahead.state_dict() == {"read": 4}


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_an_error_is_raised_when_its_batch_is_due(fails_at):
    error = UserError("no such file")
    batches, given = Prefetched(Numbers(fails_at, error), CPU).batches(0, 0), []
    with pytest.raises(UserError) as raised:
        given.extend(int(batch.index) for batch in batches)
    assert raised.value is error and given == list(range(fails_at))
    assert next(batches, None) is None


def test_an_interruption_is_raised_at_once():
    with pytest.raises(KeyboardInterrupt):
        next(Prefetched(Numbers(1, KeyboardInterrupt()), CPU).batches(0, 0))


def test_what_has_begun_is_used_once_and_only_for_what_it_was_begun_for():
    stream = Numbers()
    ahead = Prefetched(stream, CPU)
    asked, batches = [], stream.batches
    stream.batches = lambda *place: asked.append(place) or batches(*place)
    ahead.begin(1, 2)
    assert asked == [(1, 2)]
    assert [int(batch.index) for batch in ahead.batches(1, 2)] == [12, 13, 14, 15]
    assert asked == [(1, 2)]
    assert len(list(ahead.batches(1, 2))) == 4
    assert asked == [(1, 2)] * 2
    ahead.begin(0, 0)
    assert [int(batch.index) for batch in ahead.batches(0, 5)] == [5]


@pytest.mark.slow
def test_workers_that_have_begun_read_before_a_batch_is_asked_for(catalog, clip, tmp_path):
    class Noting:
        def __call__(self, image):
            (tmp_path / f"{os.getpid()}").touch()
            return clip.preprocess(image)

    ahead = Prefetched(Loader(catalog, Noting(), clip.tokenize, batch_size=10, seed=0, workers=2), CPU)
    ahead.begin(0, 1)
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert any(tmp_path.iterdir())
    expected = loader(catalog, clip).batches(0, 1)
    assert all(torch.equal(a.index, b.index) for a, b in zip(ahead.batches(0, 1), expected, strict=True))
    ahead.close()


def test_closing_ends_the_stream():
    stream = Numbers()
    ahead = Prefetched(stream, CPU)
    next(ahead.batches(0, 0))
    ahead.close()
    assert stream.closed


@pytest.fixture(scope="module")
def clip():
    return new_model("glyph-micro", 0)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """Return 40 usable pairs and 8 that are not."""
    folder = tmp_path_factory.mktemp("mixed")
    write_shards(folder, [40])
    bad = [member for n in range(8) for member in ((f"{n}.png", b"no image"), (f"{n}.txt", b"x"))]
    write_tar(folder / "9.tar", bad)
    return make_catalog(str(folder / "*.tar"), folder / "catalog")


def loader(catalog, clip, **options):
    return Loader(catalog, clip.in_bytes(clip.augment), clip.tokenize, **{"batch_size": 10, "seed": 0, **options})


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_has_counted_what_an_uninterrupted_one_has(catalog, clip, workers):
    whole = Prefetched(loader(catalog, clip), CPU)
    expected = [(batch, whole.state_dict()) for epoch in (0, 1) for batch in whole.batches(epoch, 0)]
    for stop in (1, 4):
        first = Prefetched(loader(catalog, clip, workers=workers), CPU)
        batches = first.batches(0, 0)
        for _ in range(stop):
            next(batches)
        counts = first.state_dict()
        first.close()
        assert counts == expected[stop - 1][1]
        again = Prefetched(loader(catalog, clip, workers=workers), CPU)
        again.load_state_dict(counts)
        left = [(epoch, batch) for epoch, start in ((0, stop), (1, 0)) for batch in again.batches(epoch, start)]
        assert len(left) == len(expected) - stop
        for (_, found), (batch, _) in zip(left, expected[stop:], strict=True):
            assert torch.equal(found.image, batch.image) and torch.equal(found.index, batch.index)
        assert again.state_dict() == expected[-1][1]
        again.close()


class Killing:
    """A transform that kills its process on the image of one shade of red."""

    def __init__(self, transform, red):
        self._transform, self._red = transform, red

    def __call__(self, image):
        if image.getpixel((0, 0))[0] == self._red:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._transform(image)


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_in_one_line(clip, tmp_path):
    members = [m for n in range(40) for m in ((f"{n:02d}.png", image_bytes(n)), (f"{n:02d}.txt", b"x"))]
    catalog = make_catalog(write_tar(tmp_path / "x.tar", members), tmp_path / "c")
    transform = Killing(clip.in_bytes(clip.preprocess), 21)
    ahead = Prefetched(Loader(catalog, transform, clip.tokenize, batch_size=4, seed=0, workers=2), CPU)
    with pytest.raises(UserError, match=r"^a data worker died"):
        list(ahead.batches(0, 0))
    ahead.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_on_a_gpu_are_those_of_the_cpu(catalog, clip):
    device = torch.device("cuda")
    ahead = Prefetched(loader(catalog, clip, pin_memory=True), device)
    for batch, expected in zip(ahead.batches(0, 0), loader(catalog, clip).batches(0), strict=True):
        torch.cuda._sleep(10**7)
        assert batch.image.device.type == batch.text.device.type == batch.index.device.type == "cuda"
        assert torch.equal(batch.image.cpu(), expected.image) and torch.equal(batch.text.cpu(), expected.text)
