"""Held-out pairs of a catalog: open_clip's own numbers, what cannot be used, several ranks."""

import argparse
import io
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from open_clip_train.train import evaluate as open_clip_evaluate
from PIL import Image
from task_folders import PAIRS, UNUSABLE, pair_caption, picture, write_catalog

from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.errors import UserError
from experiments.clip.evaluation.encoding import Encoder
from experiments.clip.evaluation.held_out import evaluate_pairs, pair_metrics
from experiments.clip.training.options import SHIPPED_REFERENCE
from tests.clip.tars import write_tar


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return write_catalog(tmp_path_factory.mktemp("pairs"))


def of_open_clip(clip, batch_size):
    """What open_clip's own validation says of the same pairs."""
    model = open_clip.create_model(f"local-dir:{SHIPPED_REFERENCE}", output_dict=True).eval()
    images = [clip.preprocess(Image.open(io.BytesIO(picture(number)))) for number in range(PAIRS)]
    text = clip.tokenize([pair_caption(number) for number in range(PAIRS)])
    batches = [
        (torch.stack(images[start : start + batch_size]), text[start : start + batch_size])
        for start in range(0, PAIRS, batch_size)
    ]

    class Batches(list):
        num_samples = PAIRS

    arguments = argparse.Namespace(
        **{"device": "cpu", "precision": "fp32", "val_frequency": 1, "save_logs": False, "wandb": False},
        **{"distributed": False, "horovod": False, "rank": 0, "local_rank": 0, "log_local": False},
    )
    return open_clip_evaluate(model, {"val": SimpleNamespace(dataloader=Batches(batches))}, 1, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size, workers", [(8, 0), (37, 1), (64, 0)])
def test_scores_are_open_clips(batch_size, workers, reference, catalog):
    found = evaluate_pairs(Encoder(reference, batch_size=batch_size, workers=workers), catalog)
    expected = of_open_clip(reference, batch_size)
    assert (found.samples, found.skipped) == (PAIRS, {})
    assert found.metrics["loss"] == pytest.approx(expected["clip_val_loss"], rel=1e-5)
    assert {name: value for name, value in found.metrics.items() if name != "loss"} == pytest.approx(
        {name: float(value) for name, value in expected.items() if "_to_" in name}
    )
    assert list(found.metrics) == pair_metrics(PAIRS)


def test_pairs_that_cannot_be_used_are_counted_and_left_out(reference, catalog, tmp_path):
    damaged = write_catalog(tmp_path, damaged=UNUSABLE)
    found = evaluate_pairs(Encoder(reference, batch_size=8), damaged)
    assert (found.samples, found.skipped) == (PAIRS - 3, {"unreadable image": 3})
    whole = evaluate_pairs(Encoder(reference, batch_size=8), catalog)
    assert found.metrics.keys() == whole.metrics.keys() and found.metrics != whole.metrics
    assert 1 <= found.metrics["image_to_text_mean_rank"] <= PAIRS - 3


def test_pairs_of_which_none_can_be_used_are_refused(reference, tmp_path):
    members = [(f"{k}.{suffix}", data) for k in range(3) for suffix, data in (("png", b"damaged"), ("txt", b"a"))]
    write_tar(tmp_path / "shards" / "0.tar", members)
    none = make_catalog(str(tmp_path / "shards" / "0.tar"), tmp_path / "catalog")
    with pytest.raises(UserError, match=r"3 of the 3 held-out pairs cannot be used \(unreadable image: 3\)"):
        evaluate_pairs(Encoder(reference, batch_size=2), none)


def test_progress_and_the_model_s_mode(reference, catalog):
    steps = []
    reference.model.train()
    evaluate_pairs(Encoder(reference, batch_size=8), catalog, progress=lambda done, total: steps.append((done, total)))
    assert reference.model.training
    reference.model.eval()
    assert steps == [(done, PAIRS) for done in (8, 16, 24, 32, 37)]


def test_recall_beyond_the_number_of_pairs_is_left_out(reference, tmp_path):
    few = make_catalog("synthetic:4:32", tmp_path / "catalog")
    found = evaluate_pairs(Encoder(reference), few).metrics
    assert list(found) == pair_metrics(4) and "image_to_text_R@5" not in found
    assert np.isfinite(list(found.values())).all()
