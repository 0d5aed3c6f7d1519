"""The numbers of the samples in open_clip_train's batches: those of the samples, in every order and process."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from drrho.integrations.sample_numbers import numbered
from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.catalog.keys import SampleKeys
from tests.clip.tars import write_shards


def loader(samples=20, **more):
    return DataLoader(TensorDataset(torch.arange(samples), -torch.arange(samples)), 6, **more)


@pytest.mark.parametrize(
    "more",
    [{"shuffle": True, "drop_last": True}, {}, {"shuffle": True, "num_workers": 2, "persistent_workers": True}],
    ids=["shuffled", "in order", "in workers"],
)
def test_a_sample_is_numbered_by_its_place_and_batches_stay_the_same(more):
    plain, found = loader(**more), numbered(loader(**more))
    for _ in range(2):
        torch.manual_seed(3)
        expected = list(plain)
        torch.manual_seed(3)
        batches = list(found)
        assert len(batches) == len(expected)
        for (image, text, index), (its_image, its_text) in zip(batches, expected, strict=True):
            assert torch.equal(image, its_image) and torch.equal(text, its_text) and torch.equal(index, image)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(1, 2)])


def test_other_loaders_are_refused():
    with pytest.raises(ValueError, match="features of 19 samples, the data set has 20: cache it again"):
        numbered(loader(), known=lambda: 19)
    assert numbered(loader(), known=lambda: 20) is not None
    for other in (DataLoader(Stream()), [(1, 2)], SimpleNamespace(pipeline=[])):
        with pytest.raises(ValueError, match="the loader must be one of open_clip_train's, got"):
            numbered(other)
    with pytest.raises(ValueError, match="by torch's default_collate"):
        numbered(loader(collate_fn=lambda samples: samples))


@pytest.mark.filterwarnings("default")  # webdataset leaves files open
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_of_a_webdataset_is_numbered_by_shard_and_key(workers, tmp_path):
    pytest.importorskip("pandas", reason="open_clip_train.data needs pandas, which the extra integrations brings")
    from open_clip_train.data import get_wds_dataset

    write_shards(tmp_path / "data", [5, 7])
    paths = sorted((tmp_path / "data").iterdir())
    options = {"train_data": None, "val_data": "::".join(map(str, paths)), "val_num_samples": 12}
    more = {"batch_size": 4, "workers": workers, "world_size": 1, "seed": 0, "train_num_samples": None}

    def made():
        def tokenize(text):
            return torch.tensor([[int(text.split()[1])]])

        arguments = SimpleNamespace(**options, **more)
        return get_wds_dataset(arguments, lambda image: torch.zeros(1), is_train=False, tokenizer=tokenize).dataloader

    with pytest.raises(ValueError, match=r"such as SampleKeys\(catalog\), for a webdataset"):
        numbered(made())
    index = SampleKeys(make_catalog(paths, tmp_path / "catalog"))
    batches = list(numbered(made(), index))
    assert sorted(torch.cat([number for *_, number in batches]).tolist()) == list(range(12))
    for _, text, number in batches:
        assert torch.equal(text[:, 0], number)  # the caption of sample i is "caption i"
