"""Pairs and reference features that the tests of training share."""

import pytest

from experiments.clip.glyphs.source import glyph_features
from experiments.clip.glyphs.stream import PreparedPairs
from experiments.clip.models.clip import new_model


@pytest.fixture(scope="session")
def pairs(manifest):
    return PreparedPairs(manifest, "train", new_model("glyph-micro", 0))


@pytest.fixture(scope="session")
def features(manifest, reference, tmp_path_factory):
    return glyph_features(reference, manifest, tmp_path_factory.mktemp("features"))
