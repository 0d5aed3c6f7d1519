"""A guide's embeddings, computed once: every row where it belongs, or an error."""

import copy

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra integrations (make test-integrations)")
pytestmark = pytest.mark.filterwarnings("default")

from datasets import Dataset, DatasetDict  # noqa: E402
from integrations.embedders import FOUR, embedder  # noqa: E402

from drrho.integrations import guide_embeddings  # noqa: E402
from drrho.integrations.guide_embeddings import GuideEmbeddings  # noqa: E402

NAMES = ("anchor", "positive", "negative", "other")


def dataset(copies=1, first=0):
    return Dataset.from_dict({name: list(texts)[first:] * copies for name, texts in zip(NAMES, FOUR, strict=True)})


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    return embedder(tmp_path_factory.mktemp("guide"))


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(guide_embeddings, "ROWS", 3)


def rows(embeddings, labels):
    return embeddings.embeddings([{"input_ids": torch.zeros(1)}] * 4, labels)


def test_row_i_is_the_guide_on_sample_i(guide, tmp_path):
    cached = GuideEmbeddings.cached(tmp_path, guide, dataset())
    labels = torch.tensor(cached.dataset["label"])
    for order in ([5, 0, 6, 2, 2], [3]):
        found = rows(cached, labels[order])
        for column, texts in zip(found, FOUR, strict=True):
            expected = torch.as_tensor(guide.encode([texts[i] for i in order]))
            torch.testing.assert_close(column, expected.float(), rtol=1e-5, atol=1e-5)
    assert cached.dataset.column_names == [*NAMES, "label"]
    assert "GuideEmbeddings(guide=" in repr(cached)


def test_several_datasets_share_a_cache(guide, tmp_path):
    data = DatasetDict({"train": dataset(2), "eval": dataset(first=5)})
    cached = GuideEmbeddings.cached(tmp_path, guide, data)
    for name in data:
        labels = torch.tensor(cached.dataset[name]["label"])
        expected = torch.as_tensor(guide.encode(list(data[name]["anchor"]))).float()
        torch.testing.assert_close(rows(cached, labels)[0], expected, rtol=1e-5, atol=1e-5)


class Counting:
    """A guide that counts what it embeds, or fails after so many calls."""

    def __init__(self, guide, calls=10**9):
        self._guide, self.texts, self._calls = guide, 0, calls

    def __getattr__(self, name):
        return getattr(self._guide, name)

    def encode(self, texts, **more):
        if self._calls == 0:
            raise OSError("the machine is switched off")
        self.texts, self._calls = self.texts + len(texts), self._calls - 1
        return self._guide.encode(texts, **more)


def test_an_interrupted_computation_goes_on(guide, tmp_path):
    with pytest.raises(OSError, match="switched off"):
        GuideEmbeddings.cached(tmp_path, Counting(guide, 3), dataset())
    again = Counting(guide)
    cached = GuideEmbeddings.cached(tmp_path, again, dataset())
    assert again.texts == 1 + 4 * 1  # one to learn the width, and the last of three parts of 3, 3 and 1 samples
    once = Counting(guide)
    GuideEmbeddings.cached(tmp_path, once, dataset())
    assert once.texts == 1
    expected = torch.as_tensor(guide.encode(list(FOUR[1]))).float()
    torch.testing.assert_close(rows(cached, torch.tensor(cached.dataset["label"]))[1], expected, rtol=1e-5, atol=1e-5)


def test_a_cache_of_something_else_is_refused(guide, tmp_path):
    GuideEmbeddings.cached(tmp_path / "cache", guide, dataset())
    other = embedder(tmp_path / "other", seed=1)
    changed = dataset().map(lambda row, k: {"anchor": row["anchor"] + " w1" * (k == 6)}, with_indices=True)
    for what, arguments in (
        ("guide", (other, dataset())),
        ("data", (guide, changed)),
        ("data", (guide, dataset(2))),
        ("guide", (copy.deepcopy(guide).bfloat16(), dataset())),
        ("columns", (guide, dataset().rename_column("other", "negative_2"))),
    ):
        with pytest.raises(ValueError, match=f"something else: '{what}' is .* there and .* here; choose another"):
            GuideEmbeddings.cached(tmp_path / "cache", *arguments)


def test_labels_of_other_data_are_refused(guide, tmp_path):
    one, other = (GuideEmbeddings.cached(tmp_path / str(k), guide, dataset(first=k)) for k in range(2))
    good = torch.tensor(one.dataset["label"])
    for labels in (None, torch.arange(7), good.double(), good[:, None], torch.tensor(other.dataset["label"])):
        with pytest.raises(ValueError, match=r"train on guide\.dataset"):
            rows(one, labels)
    with pytest.raises(ValueError, match="of the columns anchor, positive, negative, other, got a batch of 2"):
        one.embeddings([{"input_ids": good}] * 2, good)


def test_data_with_labels_or_without_text_are_refused(guide, tmp_path):
    with pytest.raises(ValueError, match="the dataset has the column 'label', which this loss does not use"):
        GuideEmbeddings.cached(tmp_path, guide, dataset().add_column("label", list(range(7))))
    with pytest.raises(ValueError, match="all columns must hold text, got int"):
        GuideEmbeddings.cached(tmp_path, guide, dataset().add_column("number", list(range(7))))
    with pytest.raises(ValueError, match="all datasets must have the columns"):
        GuideEmbeddings.cached(tmp_path, guide, {"a": dataset(), "b": dataset().remove_columns("other")})


def test_damaged_rows_are_refused(guide, tmp_path):
    cached = GuideEmbeddings.cached(tmp_path, guide, dataset())
    path = tmp_path / "losses.f32"
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"losses\.f32 is damaged between bytes 0 and 4096"):
        rows(GuideEmbeddings.cached(tmp_path, guide, dataset()), torch.tensor(cached.dataset["label"]))


def test_a_guide_that_is_not_finite_is_refused(tmp_path):
    broken = embedder(tmp_path)
    next(broken.parameters()).data[:] = float("nan")
    with pytest.raises(ValueError, match="the guide's embeddings are not finite: check its weights"):
        GuideEmbeddings.cached(tmp_path / "cache", broken, dataset())
    assert not (tmp_path / "cache").exists()
