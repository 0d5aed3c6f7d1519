"""The one place through which data enter a training."""

from datetime import timedelta
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
from processes import start_ranks
from tars import image_bytes, write_shards, write_tar
from task_folders import DATACOMP, classification, write_catalog

from experiments.clip.catalog.catalog import check_shards, make_catalog
from experiments.clip.cli.options import SOURCES
from experiments.clip.cli.sources import (
    embedded_pairs,
    open_shared_catalog,
    open_training_data,
    open_validation,
    read_image,
    shown_samples,
)
from experiments.clip.data.loader import Loader
from experiments.clip.distributed import ONE_PROCESS, Ranks
from experiments.clip.errors import UserError
from experiments.clip.evaluation.encoding import Encoder
from experiments.clip.glyphs import source as glyph_source
from experiments.clip.glyphs.stream import MemoryStream
from experiments.clip.icons import pairs as icon_pairs
from experiments.clip.models.clip import new_model
from experiments.clip.reference.cache import cache_features, open_features
from experiments.clip.run import parse
from experiments.clip.training.options import SHIPPED_REFERENCE

MODEL = ("--model", "glyph-micro", "--workers", "0")


@pytest.fixture(scope="module")
def clip():
    return new_model("glyph-micro", 0)


def test_the_options_choose_the_source(clip, glyph_cache, tmp_path):
    embedded = ["--size", "small", "--cache", str(glyph_cache)]
    data = open_training_data(parse(["train", "--method", "openclip", *embedded]), clip, None, ONE_PROCESS)
    assert isinstance(data.stream, MemoryStream) and data.samples == 150 and data.reference is None
    make_catalog("synthetic:20:32", tmp_path / "catalog")
    words = ["train", "--method", "openclip", "--catalog", str(tmp_path / "catalog"), "--batch-size", "5", *MODEL]
    data = open_training_data(parse(words), clip, None, ONE_PROCESS)
    assert isinstance(data.stream, Loader) and data.samples == 20 and data.stream.steps_per_epoch == 4
    assert data.identity["block_shards"] == 16 and data.validate() == {}
    data.stream.close()


def test_a_reference_beside_a_catalog_runs_or_is_cached(clip, reference, tmp_path):
    make_catalog("synthetic:20:32", tmp_path / "catalog")
    words = ["train", "--catalog", str(tmp_path / "catalog"), "--batch-size", "5", *MODEL]
    words += ["--reference", str(SHIPPED_REFERENCE)]
    data = open_training_data(parse(words), clip, reference, ONE_PROCESS)
    assert data.identity["reference_views"] == "live" and data.reference is not None
    data.stream.close()
    with pytest.raises(UserError, match=r"reference features .* are missing"):
        open_training_data(
            parse([*words, "--reference-features", str(tmp_path / "none")]), clip, reference, ONE_PROCESS
        )


def test_a_scheduled_coefficient_is_shown_held_out_pairs(clip, reference, glyph_cache, tmp_path):
    write_shards(tmp_path / "shards", [9, 11])
    made = make_catalog(str(tmp_path / "shards" / "*.tar"), tmp_path / "held-out")
    make_catalog("synthetic:20:32", tmp_path / "catalog")
    words = ["train", "--batch-size", "5", "--coefficient", "scheduled", "--reference", str(SHIPPED_REFERENCE)]
    of_catalog = [*words, *MODEL, "--catalog", str(tmp_path / "catalog")]
    with pytest.raises(
        UserError, match="scheduled is measured on held-out pairs: give a catalog of some as --val-data"
    ):
        parse(of_catalog)
    of_catalog += ["--val-data", str(tmp_path / "held-out")]
    data = open_training_data(parse(of_catalog), clip, reference, ONE_PROCESS)
    data.stream.close()
    cache_features(reference, made, tmp_path / "features")
    cached = open_features(reference, made, tmp_path / "features")
    for ours, theirs in zip(data.held_out.reference, cached.rows(torch.arange(20)), strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=2e-3)  # the cache has half precision
    assert data.identity["held_out"] == made.fingerprint  # a run that is resumed must have the same
    assert data.held_out.image.dtype == torch.uint8 and len(data.held_out.image) == len(data.held_out.text) == 20
    several = parse([*of_catalog, "--more-references", str(SHIPPED_REFERENCE)])
    both = open_training_data(several, clip, reference, ONE_PROCESS)
    both.stream.close()
    for one, two in zip(data.held_out.reference, both.held_out.reference, strict=True):
        torch.testing.assert_close(torch.cat([one, one], 1) / 2**0.5, two)
    write_tar(tmp_path / "0.tar", [("a.png", image_bytes()), ("a.txt", b"a"), ("b.png", b""), ("b.txt", b"b")])
    make_catalog(str(tmp_path / "0.tar"), tmp_path / "held-out")
    with pytest.raises(UserError, match=r"compares held-out pairs, of which .*held-out has 1 that can be used"):
        open_training_data(parse(of_catalog), clip, reference, ONE_PROCESS)
    with pytest.raises(
        UserError, match=r"another model, which --self-reference 0.9 has not: give a number or adaptive"
    ):
        parse(["train", "--coefficient", "scheduled", "--self-reference", "0.9", "--temperature", "0.1"])
    glyphs = parse([*words, "--model", "glyph-micro", "--size", "small", "--cache", str(glyph_cache)])
    shown = open_training_data(glyphs, reference, reference, ONE_PROCESS).held_out
    assert 2 <= len(shown.image) == len(shown.text) == len(shown.reference[0]) <= 512
    own = reference.features_in_parts(shown.image, shown.text)  # here it is the target too
    for ours, theirs in zip(own, shown.reference, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert open_training_data(parse(glyphs_alone(glyph_cache)), clip, reference, ONE_PROCESS).held_out is None


def glyphs_alone(cache):
    """A run that no held-out pairs are shown to."""
    return ["train", "--model", "glyph-micro", "--size", "small", "--cache", str(cache), "--batch-size", "5"]


def test_small_pictures_stay_in_memory_where_they_are_local_and_have_one_view(clip, reference, tmp_path):
    write_shards(tmp_path / "shards", [9, 11])
    made = make_catalog(str(tmp_path / "shards" / "*.tar"), tmp_path / "catalog")
    words = ["train", "--catalog", str(tmp_path / "catalog"), "--batch-size", "5", "--in-memory", *MODEL[:2]]
    data = open_training_data(parse([*words, "--method", "openclip"]), clip, None, ONE_PROCESS)
    assert data.identity["in_memory"] is True
    assert sorted(int(k) for batch in data.stream.batches(0, 0) for k in batch.index) == list(range(20))
    cache_features(reference, made, tmp_path / "features", views=2)
    words += ["--reference", str(SHIPPED_REFERENCE), "--reference-features", str(tmp_path / "features")]
    with pytest.raises(UserError, match="--in-memory shows one view of a pair, the features have 2"):
        open_training_data(parse(words), clip, reference, ONE_PROCESS)


def test_remote_shards_do_not_stay_in_memory(clip, tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", image_bytes()), ("a.txt", b"a")])
    with fsspec.open("memory://kept/0.tar", "wb") as file:
        file.write((tmp_path / "0.tar").read_bytes())
    make_catalog("memory://kept/0.tar", tmp_path / "catalog")
    words = ["train", "--catalog", str(tmp_path / "catalog"), "--in-memory", "--method", "openclip", *MODEL[:2]]
    with pytest.raises(UserError, match="--in-memory reads local shards"):
        open_training_data(parse(words), clip, None, ONE_PROCESS)


def test_samples_are_shown_with_what_their_json_says(tmp_path):
    members = [("a.png", image_bytes(5)), ("a.txt", b"a cat"), ("a.json", b'{"license": "MIT", "set": "x"}')]
    write_tar(
        tmp_path / "0.tar", [*members, ("b.png", b"no image"), ("b.txt", b"b"), ("b.json", b'{"license": "MIT"}')]
    )
    made = make_catalog(str(tmp_path / "0.tar"), tmp_path / "catalog", caption_key=("txt", "json:license"))
    [shown] = shown_samples(made, [0])
    assert (shown.image.getpixel((0, 0)), shown.caption) == ((5, 0, 7), "a cat")
    assert shown.details == {"license": "MIT", "set": "x"}
    with pytest.raises(UserError, match=r"the sample 1 of .* cannot be shown"):
        shown_samples(made, [1])
    plain = make_catalog(str(tmp_path / "0.tar"), tmp_path / "plain")
    assert shown_samples(plain, [0])[0].details == {}


def test_a_picture_is_read_or_named(tmp_path):
    (tmp_path / "a.png").write_bytes(image_bytes(3))
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (3, 0, 7)
    for path, reason in ((tmp_path, "cannot be read"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(UserError, match=reason):
            read_image(path)


def test_captions_are_weighted_by_their_sources(clip, reference, tmp_path):
    members = [("a.png", image_bytes(1)), ("a.txt", b"txt"), ("a.alt", b"alt")]
    shard = write_tar(tmp_path / "x.tar", members)
    make_catalog(shard, tmp_path / "catalog", caption_key=("txt", "alt"))
    words = ["train", *MODEL, "--catalog", str(tmp_path / "catalog"), "--caption-weights"]
    plain = ["--method", "openclip"]
    data = open_training_data(parse([*words, "1::3", *plain]), clip, None, ONE_PROCESS)
    assert data.identity["caption_weights"] == [1, 3]
    for text, message in (
        ("1", "there are 1 weights, '1', for 2 sources of captions: give one for each"),
        ("1::0", "must be positive: make the catalog without"),
        ("1::x", "must be numbers joined by ::"),
    ):
        with pytest.raises(UserError, match=message):
            open_training_data(parse([*words, text, *plain]), clip, None, ONE_PROCESS)
    (tmp_path / "t.csv").write_text("filepath,title\na.png,x\n")
    make_catalog([shard, tmp_path / "t.csv"], tmp_path / "catalog", caption_key=("txt", "alt"))
    with pytest.raises(UserError, match="of which this catalog's data has 1 or 2: leave them out"):
        open_training_data(parse([*words, "1::3", *plain]), clip, None, ONE_PROCESS)
    with pytest.raises(UserError, match="--caption-weights 1::3 has no part in this run: it is for runs without"):
        parse([*words, "1::3", "--reference", "r", "--reference-features", "f"])


def test_tasks_that_are_no_folder_are_refused_before_anything_is_read(clip, tmp_path):
    words = ["train", "--method", "openclip", *MODEL, "--catalog", str(tmp_path), "--tasks", str(tmp_path / "none")]
    with pytest.raises(UserError, match=r"--tasks .*none is no folder"):
        open_training_data(parse(words), clip, None, ONE_PROCESS)


def test_what_is_wrong_with_tasks_and_held_out_pairs_is_said_before_anything_is_read(clip, tmp_path):
    words = ["train", "--method", "openclip", *MODEL, "--catalog", "nowhere"]
    damaged = classification(tmp_path / "damaged")
    (damaged / "test" / "1.tar").write_bytes(b"damaged")
    for more, message in (
        (["--tasks", str(damaged)], r"1\.tar is damaged"),
        (["--tasks", str(classification(tmp_path / "held_out")), "--val-data", "x"], "has a folder called held_out"),
        (["--val-data", str(tmp_path / "none")], "none"),
    ):
        with pytest.raises(UserError, match=message):
            open_training_data(parse([*words, *more]), clip, None, ONE_PROCESS)


def test_a_validation_has_the_metrics_that_it_names(clip, tmp_path):
    names = [DATACOMP[name](tmp_path) for name in ("wds_wilds-fmow_test", "wds_winogavil_test")]
    write_catalog(tmp_path)
    validation = open_validation(names, tmp_path / "catalog")
    assert list(validation.scores(Encoder(clip), 0.1)) == validation.metrics()
    assert {"wds_wilds-fmow_test/acc_worst_region", "held_out/loss"} <= set(validation.metrics())


def test_pairs_that_are_drawn_are_glyphs_or_icons():
    assert embedded_pairs("glyphs") is glyph_source
    assert embedded_pairs("icons") is icon_pairs
    assert set(SOURCES) == {"catalog", "glyphs", "icons"}


def test_remote_shards_are_read_in_blocks_unless_an_option_says_otherwise(clip, tmp_path):
    base = f"memory://{tmp_path.name}"
    [path] = write_shards(tmp_path / "data", [30])
    with fsspec.open(f"{base}/0.tar", "wb") as file:
        file.write(path.read_bytes())
    for name, pattern in (("remote", f"{base}/0.tar"), ("local", str(path))):
        make_catalog(pattern, tmp_path / name)

    def opened(name, *more):
        words = ["train", "--model", "glyph-micro", "--method", "openclip", "--catalog", str(tmp_path / name)]
        words += ["--batch-size", "10", *more]
        data = open_training_data(parse(words), clip, None, ONE_PROCESS)
        index = [index for batch in data.stream.batches(0, 0) for index in batch.index.tolist()]
        data.stream.close()
        assert sorted(index) == list(range(30))
        drawn = {"resampled", "epoch_samples"}
        return {key: value for key, value in data.identity.items() if key not in {"data", "weights", *drawn}}, index

    blocks, random = opened("remote"), opened("local")
    assert blocks[0] == {"reading": "blocks"} and random[0] == {"block_shards": 16} and blocks[1] != random[1]
    assert opened("remote", "--reading", "random") == random
    assert opened("local", "--reading", "blocks") == blocks
    assert opened("remote", "--block-folder", str(tmp_path / "blocks")) == blocks
    assert not list((tmp_path / "blocks").iterdir())
    assert opened("remote", "--reading", "shards")[0] == {"reading": "shards"}
    with pytest.raises(UserError, match=r"--block-shards 4 has no part in this run: it is for --reading random"):
        opened("remote", "--block-shards", "4")
    with pytest.raises(UserError, match=r"--block-folder x has no part in this run: it is for --reading blocks"):
        opened("local", "--block-folder", "x")


def test_shards_are_checked_by_their_numbers(tmp_path):
    paths = write_shards(tmp_path / "data", [2, 3, 1])
    catalog = make_catalog([str(path) for path in paths], tmp_path / "catalog")
    assert open_shared_catalog(tmp_path / "catalog", ONE_PROCESS) == catalog
    paths[1].unlink()
    check_shards(catalog, [0, 2])
    with pytest.raises(UserError, match=r"00001\.tar is missing: make it again"):
        check_shards(catalog, [1])
    with pytest.raises(UserError, match=r"00001\.tar is missing: make it again"):
        open_shared_catalog(tmp_path / "catalog", ONE_PROCESS)


def open_on_ranks(rank, folder):
    folder = Path(folder)
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=patience)
    try:
        said = "nothing"
        try:
            open_shared_catalog(folder / "catalog", Ranks(rank, 2, torch.device("cpu"), dist.group.WORLD))
        except UserError as error:
            said = str(error)
        (folder / f"{rank}.txt").write_text(said)
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_what_one_rank_finds_stops_all(tmp_path):
    """Each rank opens its part of the shards, not all of them."""
    paths = write_shards(tmp_path / "data", [2, 3, 1])
    make_catalog([str(path) for path in paths], tmp_path / "catalog")
    paths[1].unlink()
    start_ranks(open_on_ranks, (str(tmp_path),), 2)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == "stopped because rank 1 did: see its message" and "00001.tar is missing" in said[1]


def test_a_server_without_ranges_is_refused_at_the_start_unless_shards_are_read_as_a_whole(clip, tmp_path):
    pytest.importorskip("aiohttp")
    from experiments.benchmarks.remote import served

    write_shards(tmp_path / "data", [20, 10])
    with served(tmp_path / "data", ranges=False) as server:
        make_catalog(f"{server.url}/{{00000,00001}}.tar", tmp_path / "catalog")
        words = [
            "train",
            "--model",
            "glyph-micro",
            "--method",
            "openclip",
            "--catalog",
            str(tmp_path / "catalog"),
            "--batch-size",
            "10",
        ]
        server.requests.clear()
        with pytest.raises(UserError, match=r"the server 127.0.0.1:\d+ ignores requests for a part of a file"):
            open_training_data(parse(words), clip, None, ONE_PROCESS)
        assert [stated for method, _, stated in server.requests if method == "GET"] == ["bytes=0-0"]
        data = open_training_data(parse([*words, "--reading", "shards"]), clip, None, ONE_PROCESS)
        index = [index for batch in data.stream.batches(0, 0) for index in batch.index.tolist()]
        data.stream.close()
    assert sorted(index) == list(range(30))


def test_held_out_pairs_without_an_image_are_refused_before_any_work(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("filepath,title\n" + "".join(f"C:\\images\\{number}.png,a picture\n" for number in range(30)))
    make_catalog(table, tmp_path / "catalog")
    with pytest.raises(UserError, match=r"none of the first 16 pairs of --val-data .*catalog can be used"):
        open_validation((), tmp_path / "catalog")
