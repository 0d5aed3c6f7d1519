"""The reference's cached features: every row where it belongs, or an error; views that the target sees too."""

import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from experiments.clip.catalog.catalog import make_catalog, shard_digest
from experiments.clip.data.draws import visit_draws
from experiments.clip.data.loader import Loader
from experiments.clip.data.reader import Reader, decode
from experiments.clip.distributed import Ranks
from experiments.clip.errors import UserError
from experiments.clip.reference import cache as cache_module
from experiments.clip.reference.cache import cache_features, open_features
from experiments.clip.reference.live import LiveReference
from experiments.clip.reference.margins import margin_spread
from tests.clip.tars import write_tar


@pytest.fixture(scope="module")
def catalog(manifest, tmp_path_factory):
    shards = [str(manifest.folder / shard.name) for shard in manifest.splits["train"].shards]
    return make_catalog(shards, tmp_path_factory.mktemp("catalog"))


@pytest.fixture(scope="module")
def cached(catalog, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    assert cache_features(reference, catalog, folder, batch_size=50) == 150
    return folder


def in_order(catalog, folder):
    """The files of the shards."""
    return [folder / f"features-{shard_digest(catalog, shard)[:32]}.safetensors" for shard in catalog.shards]


def contents(path):
    """Metadata and tensors; the order of metadata in the file is arbitrary."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key).tolist() for key in file.keys()}


@pytest.fixture
def copied(cached, tmp_path):
    for path in cached.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def noise(seed, pixels=48):
    """Every crop of it is another image."""
    stream = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def samples(catalog, indices, draw=0):
    return [decode(raw, draw) for raw in Reader(catalog).read_many(indices)]


@pytest.mark.slow
@torch.no_grad()
def test_row_i_is_the_reference_on_sample_i(catalog, reference, cached):
    features = open_features(reference, catalog, cached)
    chosen = [149, 0, 63, 64, 65, 128, 0]
    image, text = features.rows(torch.tensor(chosen))
    assert image.dtype == torch.float16
    for row, pair in enumerate(samples(catalog, chosen)):
        pixels = reference.preprocess(pair.image)[None]
        assert torch.allclose(image[row].float(), reference.encode_image(pixels)[0], rtol=0, atol=1e-3)
        assert torch.allclose(text[row].float(), reference.encode_text([pair.caption])[0], rtol=0, atol=1e-3)
    again = pickle.loads(pickle.dumps(features))  # as a worker that is spawned gets it
    assert torch.equal(again.rows(torch.tensor(chosen))[0], image)


def test_finished_files_are_kept_and_missing_ones_made(catalog, reference, copied):
    files = in_order(catalog, copied)
    before = contents(files[1])
    files[1].unlink()
    assert cache_features(reference, catalog, copied, batch_size=50) == 64
    assert contents(files[1]) == before
    assert cache_features(reference, catalog, copied) == 0


@pytest.mark.slow
def test_ranks_and_workers_make_the_same_files(catalog, reference, cached, tmp_path):
    made = [
        cache_features(reference, catalog, tmp_path, batch_size=50, workers=rank, ranks=Ranks(rank, 2))
        for rank in (0, 1)
    ]
    assert sorted(made) == [64, 86]
    for path in cached.iterdir():
        assert contents(tmp_path / path.name) == contents(path)


def test_towers_in_bfloat16_give_features_near_those_of_float32_and_say_so(catalog, reference, cached, tmp_path):
    cache_features(reference, catalog, tmp_path, towers="bfloat16")
    near, exact = (open_features(reference, catalog, folder).rows(torch.arange(150)) for folder in (tmp_path, cached))
    for found, expected in zip(near, exact, strict=True):
        difference = (found.float() - expected.float()).abs().max()
        assert 0 < difference < 2**-6
    path = min(tmp_path.iterdir())
    assert contents(path)[0]["towers"] == "bfloat16"
    with pytest.raises(UserError, match="another towers, bfloat16 instead of float32"):
        cache_features(reference, catalog, tmp_path)


def test_files_that_do_not_name_the_towers_precision_are_of_float32(catalog, reference, copied):
    for path in copied.iterdir():
        metadata, _ = contents(path)
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        del metadata["towers"]
        save_file(tensors, path, metadata)
    assert len(open_features(reference, catalog, copied)) == 150
    assert cache_features(reference, catalog, copied) == 0


def test_readers_go_on_over_the_ends_of_shards(catalog, reference, tmp_path, monkeypatch):
    """When a shard's file is written, samples of the next one have been read; errors of writing are raised."""
    read, states = [], []
    original, write = Reader.read_many, cache_module.write_atomically
    monkeypatch.setattr(Reader, "read_many", lambda self, indices: read.extend(indices) or original(self, indices))
    monkeypatch.setattr(cache_module, "write_atomically", lambda *given: states.append(max(read)) or write(*given))
    cache_features(reference, catalog, tmp_path, batch_size=32)
    assert [shard.samples for shard in catalog.shards] == [64, 64, 22]
    assert states[0] >= 64 and states[1] >= 128 and len(states) == 3

    def failing(path, data):
        raise UserError("the disk is full")

    monkeypatch.setattr(cache_module, "write_atomically", failing)
    with pytest.raises(UserError, match="the disk is full"):
        cache_features(reference, catalog, tmp_path / "other", batch_size=32)


def test_missing_file_is_refused(catalog, reference, copied):
    in_order(catalog, copied)[1].unlink()
    with pytest.raises(UserError, match=rf"features of {catalog.shards[1].path} are missing in {copied}"):
        open_features(reference, catalog, copied)


@pytest.mark.parametrize("views", [1, 2])
def test_features_stay_where_shards_are_added_before_and_after(reference, tmp_path, views):
    """Whatever place a shard has in a catalog, and whatever it is called there, its file is not computed again."""
    for shard in range(5):
        members = [m for k in range(4) for m in ((f"{k}.png", noise(10 * shard + k)), (f"{k}.txt", b"letter a"))]
        write_tar(tmp_path / f"{shard}.tar", members)
    folder = tmp_path / "features"
    first = make_catalog(str(tmp_path / "{1,3}.tar"), tmp_path / "catalog")
    assert cache_features(reference, first, folder, views=views) == 8
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    grown = make_catalog(str(tmp_path / "{0..4}.tar"), tmp_path / "catalog")
    assert cache_features(reference, grown, folder, views=views) == 12
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    before, after = (open_features(reference, each, folder) for each in (first, grown))
    for view in range(views):
        old, new = before.rows(torch.arange(8), view), after.rows(torch.tensor([*range(4, 8), *range(12, 16)]), view)
        assert all(torch.equal(*both) for both in zip(old, new, strict=True))
    draws = visit_draws(0, 0, 0, 0)
    assert before.draws(5, draws) == after.draws(13, draws)
    loader = Loader(grown, reference.augment, reference.tokenize, batch_size=20, seed=0, reference=after)
    [batch] = loader.batches(0)
    found = after.features(batch.reference_inputs, torch.device("cpu"))[0]
    if views > 1:
        with torch.no_grad():
            assert torch.allclose(reference.encode_image(batch.image), found, rtol=0, atol=1e-3)
    assert open_features(reference, grown, folder).views == views


def test_features_of_a_shard_whose_contents_changed_are_refused_where_checksums_are_kept(reference, tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", noise(1)), ("0.txt", b"letter a")])
    folder = tmp_path / "features"
    cache_features(reference, make_catalog(str(tmp_path / "0.tar"), tmp_path / "one", checksums=True), folder)
    write_tar(tmp_path / "0.tar", [("0.png", noise(1)), ("0.txt", b"letter b")])
    assert cache_features(reference, make_catalog(str(tmp_path / "0.tar"), tmp_path / "two"), folder) == 0
    changed = make_catalog(str(tmp_path / "0.tar"), tmp_path / "three", checksums=True)
    for use in (open_features, cache_features):
        with pytest.raises(UserError, match=r"made for another checksum, .* delete the file"):
            use(reference, changed, folder)


def test_features_of_another_reference_other_data_or_views_are_refused(catalog, reference, copied):
    other = dataclasses.replace(reference, fingerprint="0" * 64)
    with pytest.raises(UserError, match="another reference"):
        open_features(other, catalog, copied)
    with pytest.raises(UserError, match=r"features of .* are missing"):
        open_features(reference, dataclasses.replace(catalog, caption_keys=("alt",)), copied)
    in_order(catalog, copied)[1].unlink()
    with pytest.raises(UserError, match="another views, 1 instead of 2"):
        cache_features(reference, catalog, copied, views=2)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_damaged_file_is_refused(catalog, reference, copied, size):
    path = in_order(catalog, copied)[2]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="damaged"):
        open_features(reference, catalog, copied)


def test_a_sample_that_cannot_be_read_has_no_row_and_asking_for_it_is_an_error(reference, tmp_path):
    members = []
    for k in range(6):
        members += [(f"{k}.png", b"no image" if k in (0, 3) else noise(k)), (f"{k}.txt", b"letter a")]
    write_tar(tmp_path / "0.tar", members)
    catalog = make_catalog(str(tmp_path / "0.tar"), tmp_path / "catalog")
    cache_features(reference, catalog, tmp_path / "features")
    features = open_features(reference, catalog, tmp_path / "features")
    assert features.rows(torch.tensor([1, 2, 4, 5]))[0].float().norm(dim=1) == pytest.approx(1, abs=1e-2)
    assert len(features.first(1024)[0]) == 4
    [(indices, image, text)] = features.parts()
    assert indices.tolist() == [1, 2, 4, 5] and image.dtype == text.dtype == torch.float32
    assert torch.equal(image, features.rows(indices)[0].float()) and torch.equal(
        text, features.rows(indices)[1].float()
    )
    for index in (0, 3, 6, -1):
        with pytest.raises(UserError, match=f"sample {index} are missing"):
            features.rows(torch.tensor([1, index]))
    loader = Loader(
        catalog,
        reference.augment,
        reference.tokenize,
        batch_size=3,
        seed=0,
        reference=features,
        skip_limit=1,
    )
    reference_inputs = [batch.reference_inputs[0] for batch in loader.batches(0) if len(batch.index)]
    assert sum(map(len, reference_inputs)) == 4 == 6 - loader.skipped.total()


@pytest.mark.slow
@torch.no_grad()
def test_the_target_sees_the_crop_and_caption_of_the_view_that_is_looked_up(reference, tmp_path):
    """A reference that is also the target's architecture and size: its features of the batch are those it carries."""
    members = []
    for k in range(5):
        members += [(f"{k}.png", noise(k)), (f"{k}.json", b'{"c": ["letter a", "digit two", "arrow"]}')]
    write_tar(tmp_path / "0.tar", members)
    catalog = make_catalog(str(tmp_path / "0.tar"), tmp_path / "catalog", caption_key="json:c")
    cache_features(reference, catalog, tmp_path / "features", views=3)
    features = open_features(reference, catalog, tmp_path / "features")
    assert features.views == 3
    seen = set()

    def check(beside, epochs):
        loader = Loader(catalog, reference.augment, reference.tokenize, batch_size=5, seed=0, reference=beside)
        for epoch in range(epochs):
            (batch,) = loader.batches(epoch)
            image, text = beside.features(batch.reference_inputs, torch.device("cpu"))
            assert torch.allclose(reference.encode_image(batch.image), image, rtol=0, atol=1e-3)
            assert torch.allclose(reference.encode_tokens(batch.text), text, rtol=0, atol=1e-3)
            seen.update(tuple(row.tolist()) for row in image)

    check(features, 20)
    assert len(seen) == 15  # every view of every sample
    check(LiveReference(reference, 2, list), 2)
    assert len(seen) == 25


def test_one_view_goes_with_the_first_caption_and_free_crops(catalog, reference, cached):
    features = open_features(reference, catalog, cached)
    draws = visit_draws(0, 1, 7, 0)
    assert features.draws(7, draws) == draws._replace(choice=0)


def test_the_spread_is_over_the_first_rows_of_the_first_file(catalog, reference, cached):
    features = open_features(reference, catalog, cached)
    for pairs, rows in ((10, 10), (64, 64), (10_000, 64)):
        expected = margin_spread(*features.rows(torch.arange(rows)))
        assert features.margin_spread(pairs) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["features", "present", "checksums"])
def test_a_flipped_bit_in_a_row_is_refused_by_name_when_the_row_is_read(name, catalog, reference, copied):
    path = in_order(catalog, copied)[1]
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
    start, end = entry["data_offsets"]
    content = bytearray(path.read_bytes())
    row = (end - start) // entry["shape"][0]
    content[8 + size + start + 3 * row] ^= 1  # of the file's row 3, sample 67
    path.write_bytes(content)
    features = open_features(reference, catalog, copied)
    features.rows(torch.tensor([0, 66, 68, 149]))
    with pytest.raises(UserError, match=r"sample 67.*(checksum differs|are missing)"):
        features.rows(torch.tensor([1, 67]))


def test_files_of_an_earlier_version_have_no_checksums(catalog, reference, copied):
    path = in_order(catalog, copied)[0]
    with safe_open(path, "pt") as file:
        kept = {key: file.get_tensor(key) for key in ("features", "present")}, file.metadata()
    before = open_features(reference, catalog, copied).rows(torch.tensor([5]))
    save_file(*kept[:1], path, kept[1])
    after = open_features(reference, catalog, copied).rows(torch.tensor([5]))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("shape", [[10**12, 1, 2, 64], [-1, 1, 2, 64], "x", [64], None])
def test_a_forged_shape_is_one_line(shape, catalog, reference, copied):
    path = in_order(catalog, copied)[0]
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["features"]["shape"] = shape
    forged = json.dumps(header).encode()
    path.write_bytes(len(forged).to_bytes(8, "little") + forged + content[8 + size :])
    with pytest.raises(UserError, match="reference features"):
        open_features(reference, catalog, copied).rows(torch.tensor([0]))
