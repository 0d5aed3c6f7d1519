"""A guide's embeddings, computed once: every row where it belongs, or an error."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
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


def test_float16_takes_half_the_space(guide, tmp_path):
    wide, narrow = (
        GuideEmbeddings.cached(tmp_path / kind, guide, dataset(), precision=kind) for kind in ("float32", "float16")
    )
    first, second = (rows(each, torch.tensor(each.dataset["label"]))[0] for each in (wide, narrow))
    assert 0 < (first - second).abs().max() < 1e-3 * first.abs().max()


def test_an_interrupted_computation_goes_on(guide, tmp_path):
    GuideEmbeddings.cached(tmp_path, guide, dataset())
    files = sorted(tmp_path.iterdir())
    kept, stamp = files[1].read_bytes(), files[0].stat().st_mtime_ns
    files[1].unlink()
    (tmp_path / "embeddings-00001.99.partial").write_bytes(b"half")
    cached = GuideEmbeddings.cached(tmp_path, guide, dataset())
    assert files[1].read_bytes()[8:] and len(files[1].read_bytes()) == len(kept)
    assert files[0].stat().st_mtime_ns == stamp
    torch.testing.assert_close(rows(cached, torch.tensor(cached.dataset["label"]))[0].shape, torch.Size([7, 16]))


def test_a_cache_of_something_else_is_refused(guide, tmp_path):
    GuideEmbeddings.cached(tmp_path, guide, dataset())
    other = embedder(tmp_path / "other", seed=1)
    changed = dataset().map(lambda row, k: {"anchor": row["anchor"] + " w1" * (k == 6)}, with_indices=True)
    for what, arguments, more in (
        ("guide", (other, dataset()), {}),
        ("data", (guide, changed), {}),
        ("data", (guide, dataset(2)), {}),
        ("precision", (guide, dataset()), {"precision": "float16"}),
        ("columns", (guide, dataset().rename_column("other", "negative_2")), {}),
    ):
        with pytest.raises(ValueError, match=f"are of another {what}, .* instead of .*: delete the folder or name"):
            GuideEmbeddings.cached(tmp_path, *arguments, **more)


def test_labels_of_other_data_are_refused(guide, tmp_path):
    one, other = (GuideEmbeddings.cached(tmp_path / str(k), guide, dataset(first=k)) for k in range(2))
    good = torch.tensor(one.dataset["label"])
    for labels in (None, torch.arange(7), good.double(), good[:, None], torch.tensor(other.dataset["label"])):
        with pytest.raises(ValueError, match=r"train on guide\.dataset"):
            rows(one, labels)
    with pytest.raises(ValueError, match="of the columns anchor, positive, negative, other, got 2"):
        one.embeddings([{"input_ids": good}] * 2, good)


def test_data_with_labels_or_without_text_are_refused(guide, tmp_path):
    with pytest.raises(ValueError, match="the dataset has the column 'label', which this loss does not use"):
        GuideEmbeddings.cached(tmp_path, guide, dataset().add_column("label", list(range(7))))
    with pytest.raises(ValueError, match="all columns must hold text, got int"):
        GuideEmbeddings.cached(tmp_path, guide, dataset().add_column("number", list(range(7))))
    with pytest.raises(ValueError, match="all datasets must have the columns"):
        GuideEmbeddings.cached(tmp_path, guide, {"a": dataset(), "b": dataset().remove_columns("other")})


def test_damaged_files_are_refused(guide, tmp_path):
    cached = GuideEmbeddings.cached(tmp_path, guide, dataset())
    labels = torch.tensor(cached.dataset["label"])
    path = tmp_path / "embeddings-00000.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-4], whole.replace(b'"F32"', b'"I32"')):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="are not as they were written: delete the file"):
            rows(GuideEmbeddings.cached(tmp_path, guide, dataset()), labels)
    for damaged in (b"", whole[:20], np.random.default_rng(0).bytes(300)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|of another guide"):
            GuideEmbeddings.cached(tmp_path, guide, dataset())


def test_a_guide_that_is_not_finite_is_refused(tmp_path):
    broken = embedder(tmp_path)
    next(broken.parameters()).data[:] = float("nan")
    with pytest.raises(ValueError, match="the guide's embeddings are not finite: check its weights"):
        GuideEmbeddings.cached(tmp_path / "cache", broken, dataset())
    assert list((tmp_path / "cache").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from integrations.embedders import embedder
from integrations.test_guide_embeddings import dataset
from drrho.integrations import guide_embeddings
guide_embeddings.ROWS = 3
write, seen = guide_embeddings._write, []
def killed(*arguments):
    if seen:
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(write(*arguments))
guide_embeddings._write = killed
guide_embeddings.GuideEmbeddings.cached(sys.argv[2], embedder(Path(sys.argv[1])), dataset())
"""


@pytest.mark.slow
def test_kill_minus_9_leaves_what_was_computed(tmp_path):
    tests = Path(__file__).parents[1]
    script = KILLED.format(paths=[str(tests), str(tests.parent)])
    done = subprocess.run([sys.executable, "-c", script, tmp_path, tmp_path / "cache"], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["embeddings-00000.safetensors"]
    cached = GuideEmbeddings.cached(tmp_path / "cache", embedder(tmp_path), dataset())
    assert rows(cached, torch.tensor(cached.dataset["label"]))[0].shape == (7, 16)
