"""A small real data set of glyphs, shared by the tests of the CLIP program."""

import pytest

from experiments.clip.cli.options import Data
from experiments.clip.glyphs.dataset import write_dataset
from experiments.clip.glyphs.drawing import glyph_splits
from experiments.clip.glyphs.source import dataset_folder, dataset_settings
from experiments.clip.models.clip import load_model
from experiments.clip.training.options import SHIPPED_REFERENCE


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    splits = {name: records[:150] for name, records in glyph_splits("swapped", 32, ("stixgeneral",)).items()}
    vocabulary = sorted({record.meta["name"] for records in splits.values() for record in records})
    folder = tmp_path_factory.mktemp("data") / "glyphs"
    return write_dataset(folder, splits, {"for": "tests"}, vocabulary=vocabulary, shard_size=64)


@pytest.fixture(scope="session")
def glyph_cache(tmp_path_factory):
    """A --cache whose --captions swapped --size small are 150 pairs a split, drawn in a second."""
    data = Data("swapped", "small", tmp_path_factory.mktemp("cache"))
    splits = {name: records[:150] for name, records in glyph_splits("swapped", 32, ("stixgeneral",)).items()}
    vocabulary = sorted({record.meta["name"] for records in splits.values() for record in records})
    write_dataset(dataset_folder(data), splits, dataset_settings(data), vocabulary=vocabulary, shard_size=64)
    return data.cache


@pytest.fixture(scope="session")
def reference():
    return load_model(SHIPPED_REFERENCE)
