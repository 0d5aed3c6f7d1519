"""The one place through which data enter a training."""

import fsspec
import pytest
from tars import write_shards
from task_folders import DATACOMP, classification, write_catalog

from experiments.clip.catalog import catalog as catalog_module
from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.cli.options import SOURCES
from experiments.clip.cli.sources import embedded_pairs, open_shared_catalog, open_training_data, open_validation
from experiments.clip.data.loader import Loader
from experiments.clip.distributed import ONE_PROCESS, Ranks
from experiments.clip.errors import UserError
from experiments.clip.evaluation.encoding import Encoder
from experiments.clip.glyphs import source as glyph_source
from experiments.clip.glyphs.stream import MemoryStream
from experiments.clip.models.clip import new_model
from experiments.clip.run import parse


@pytest.fixture(scope="module")
def clip():
    return new_model("glyph-micro", 0)


def test_the_options_choose_the_source(clip, glyph_cache, tmp_path):
    embedded = ["--size", "small", "--cache", str(glyph_cache)]
    data = open_training_data(parse(["train", "--method", "openclip", *embedded]), clip, None, ONE_PROCESS)
    assert isinstance(data.stream, MemoryStream) and data.samples == 150 and data.reference is None
    make_catalog("synthetic:20:32", tmp_path / "catalog")
    words = ["train", "--method", "openclip", "--catalog", str(tmp_path / "catalog"), "--batch-size", "5"]
    data = open_training_data(parse(words), clip, None, ONE_PROCESS)
    assert isinstance(data.stream, Loader) and data.samples == 20 and data.stream.steps_per_epoch == 4
    assert data.identity["block_shards"] == 16 and data.validate() == {}
    data.stream.close()


def test_a_reference_beside_a_catalog_runs_or_is_cached(clip, reference, tmp_path):
    make_catalog("synthetic:20:32", tmp_path / "catalog")
    words = ["train", "--catalog", str(tmp_path / "catalog"), "--batch-size", "5"]
    data = open_training_data(parse(words), clip, reference, ONE_PROCESS)
    assert data.identity["reference_views"] == "live" and data.reference is not None
    data.stream.close()
    with pytest.raises(UserError, match=r"reference features .* are missing"):
        open_training_data(
            parse([*words, "--reference-features", str(tmp_path / "none")]), clip, reference, ONE_PROCESS
        )


def test_tasks_that_are_no_folder_are_refused_before_anything_is_read(clip, tmp_path):
    words = ["train", "--method", "openclip", "--catalog", str(tmp_path), "--tasks", str(tmp_path / "none")]
    with pytest.raises(UserError, match=r"--tasks .*none is no folder"):
        open_training_data(parse(words), clip, None, ONE_PROCESS)


def test_what_is_wrong_with_tasks_and_held_out_pairs_is_said_before_anything_is_read(clip, tmp_path):
    words = ["train", "--method", "openclip", "--catalog", "nowhere"]
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


def test_the_embedded_pairs_are_the_glyphs():
    assert embedded_pairs() is glyph_source
    assert set(SOURCES) == {"catalog", "glyphs"}


def test_remote_shards_are_read_in_blocks_unless_an_option_says_otherwise(clip, tmp_path):
    base = f"memory://{tmp_path.name}"
    [path] = write_shards(tmp_path / "data", [30])
    with fsspec.open(f"{base}/0.tar", "wb") as file:
        file.write(path.read_bytes())
    for name, pattern in (("remote", f"{base}/0.tar"), ("local", str(path))):
        make_catalog(pattern, tmp_path / name)

    def opened(name, *more):
        words = ["train", "--method", "openclip", "--catalog", str(tmp_path / name), "--batch-size", "10", *more]
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


def test_the_first_rank_looks_at_the_shards_and_the_others_wait(tmp_path, monkeypatch):
    paths = write_shards(tmp_path / "data", [3, 3])
    make_catalog(str(tmp_path / "data/*.tar"), tmp_path / "catalog")
    looked = []
    original = catalog_module._problem
    monkeypatch.setattr(catalog_module, "_problem", lambda *given: looked.append(given[1].path) or original(*given))
    open_shared_catalog(tmp_path / "catalog", Ranks(1, 2))
    assert looked == []
    open_shared_catalog(tmp_path / "catalog", Ranks(0, 2))
    assert sorted(looked) == [str(path) for path in paths]
    paths[0].unlink()
    with pytest.raises(UserError, match=r"00000.tar is missing"):
        open_shared_catalog(tmp_path / "catalog", Ranks(0, 2))


def test_a_server_without_ranges_is_refused_at_the_start_unless_shards_are_read_as_a_whole(clip, tmp_path):
    pytest.importorskip("aiohttp")
    from experiments.benchmarks.remote import served

    write_shards(tmp_path / "data", [20, 10])
    with served(tmp_path / "data", ranges=False) as server:
        make_catalog(f"{server.url}/{{00000,00001}}.tar", tmp_path / "catalog")
        words = ["train", "--method", "openclip", "--catalog", str(tmp_path / "catalog"), "--batch-size", "10"]
        server.requests.clear()
        with pytest.raises(UserError, match=r"the server 127.0.0.1:\d+ ignores requests for a part of a file"):
            open_training_data(parse(words), clip, None, ONE_PROCESS)
        assert [stated for method, _, stated in server.requests if method == "GET"] == ["bytes=0-0"]
        data = open_training_data(parse([*words, "--reading", "shards"]), clip, None, ONE_PROCESS)
        index = [index for batch in data.stream.batches(0, 0) for index in batch.index.tolist()]
        data.stream.close()
    assert sorted(index) == list(range(30))
