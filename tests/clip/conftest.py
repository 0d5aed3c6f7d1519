"""A small real data set of glyphs, shared by the tests of the CLIP program."""

import pytest

from experiments.clip.glyphs import glyph_splits
from experiments.clip.models import SHIPPED_REFERENCE, load_model
from experiments.clip.shards import write_dataset


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    splits = {name: records[:150] for name, records in glyph_splits("swapped", 32, ("stixgeneral",)).items()}
    vocabulary = sorted({record.meta["name"] for records in splits.values() for record in records})
    folder = tmp_path_factory.mktemp("data") / "glyphs"
    return write_dataset(folder, splits, {"for": "tests"}, vocabulary=vocabulary, shard_size=64)


@pytest.fixture(scope="session")
def reference():
    return load_model(SHIPPED_REFERENCE)
