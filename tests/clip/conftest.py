"""A small real data set of glyphs, shared by the tests of the CLIP program."""

from multiprocessing import set_forkserver_preload

import pytest

from experiments.clip.cli.options import Data
from experiments.clip.glyphs.dataset import write_dataset
from experiments.clip.glyphs.drawing import glyph_splits
from experiments.clip.glyphs.source import dataset_folder, dataset_settings
from experiments.clip.glyphs.tasks import write_glyph_tasks
from experiments.clip.models.clip import load_model
from experiments.clip.training.options import SHIPPED_REFERENCE
from tests.clip.launched import PRELOADED

set_forkserver_preload(PRELOADED)


@pytest.fixture(scope="session")
def few_glyphs():
    """Return 150 pairs a split, drawn in a second, and the names of all."""
    splits = {name: pairs[:150] for name, pairs in glyph_splits("swapped", 32, ("stixgeneral",)).items()}
    return splits, sorted({pair.meta["name"] for pairs in splits.values() for pair in pairs})


@pytest.fixture(scope="session")
def manifest(few_glyphs, tmp_path_factory):
    splits, vocabulary = few_glyphs
    folder = tmp_path_factory.mktemp("data") / "glyphs"
    return write_dataset(folder, splits, {"for": "tests"}, vocabulary=vocabulary, shard_size=64)


@pytest.fixture(scope="session")
def glyph_cache(few_glyphs, tmp_path_factory):
    """Return a --cache whose --captions swapped are the few glyphs, of either --size."""
    cache = tmp_path_factory.mktemp("cache")
    splits, vocabulary = few_glyphs
    for data in (Data("swapped", "small", cache), Data("swapped", "full", cache)):
        write_dataset(dataset_folder(data), splits, dataset_settings(data), vocabulary=vocabulary, shard_size=64)
    return cache


@pytest.fixture(scope="session")
def glyph_tasks(manifest, tmp_path_factory):
    """Return the folders of the tasks of the few glyphs, by name."""
    folder = tmp_path_factory.mktemp("tasks") / "glyphs"
    return {path.name: path for path in write_glyph_tasks(manifest, folder, shard_size=64)}


@pytest.fixture(scope="session")
def reference():
    return load_model(SHIPPED_REFERENCE)
