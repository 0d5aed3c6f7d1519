"""The number of a sample by its shard and key: that of the catalog, or an error."""

import pytest
import webdataset

from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.catalog.keys import SampleKeys
from experiments.clip.data.reader import Reader
from experiments.clip.errors import UserError
from tests.clip.tars import pair, write_shards, write_tar


@pytest.fixture
def catalog(tmp_path):
    write_shards(tmp_path / "data", [3, 4])
    more = [member for number, key in ((7, "b/x"), (8, "é 1"), (9, "a")) for member in pair(number, key)]
    paths = [*sorted((tmp_path / "data").iterdir()), write_tar(tmp_path / "other" / "more.tar", more)]
    return make_catalog(paths, tmp_path / "catalog")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_every_sample_that_webdataset_names_is_found(catalog):
    number = SampleKeys(catalog)
    found = []
    for shard in catalog.shards:
        for sample in webdataset.WebDataset(shard.path, shardshuffle=False, empty_check=False):
            found.append(number(sample["__url__"], sample["__key__"]))
            assert Reader(catalog).read(found[-1]).key == sample["__key__"]
    assert found == list(range(len(catalog)))


def test_what_is_not_there_is_an_error(catalog):
    number, shard = SampleKeys(catalog), catalog.shards[0].path
    for key in ("00003", "", "zzz", "0000"):
        with pytest.raises(UserError, match=f"has no sample '{key}' in the catalog: make the catalog of the data anew"):
            number(shard, key)
    with pytest.raises(UserError, match=r"elsewhere\.tar is not a shard of the catalog"):
        number("elsewhere.tar", "00001")


def test_samples_that_a_key_does_not_tell_apart_are_an_error(tmp_path):
    twice = write_tar(tmp_path / "twice.tar", [*pair(0, "a"), *pair(1, "b"), *pair(2, "a")])
    number = SampleKeys(make_catalog([twice], tmp_path / "catalog"))
    assert number(str(twice), "b") == 1
    with pytest.raises(UserError, match="two samples 'a', which cannot be told apart"):
        number(str(twice), "a")


def test_shards_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / folder / "0.tar", pair(k, "k")) for k, folder in enumerate(("a", "b"))]
    number = SampleKeys(make_catalog(paths, tmp_path / "catalog"))
    assert [number(str(path), "k") for path in paths] == [0, 1]
    monkeypatch.chdir(tmp_path)
    assert number("b/0.tar", "k") == 1
    with pytest.raises(UserError, match="is not a shard of the catalog"):
        number("c/0.tar", "k")
