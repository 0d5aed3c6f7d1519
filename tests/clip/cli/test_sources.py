"""The one place through which data enter a training."""

import pytest
from task_folders import DATACOMP, classification, write_catalog

from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.cli.options import SOURCES
from experiments.clip.cli.sources import embedded_pairs, open_training_data, open_validation
from experiments.clip.data.loader import Loader
from experiments.clip.distributed import ONE_PROCESS
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
