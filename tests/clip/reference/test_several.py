"""Several references as one: whose inputs and features are whose, what their margins are together, and in a run."""

import json
import math
import pickle

import pytest
import torch

from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.data.draws import random_state_restored, visit_draws
from experiments.clip.data.loader import Loader
from experiments.clip.data.reader import first_pairs
from experiments.clip.errors import UserError
from experiments.clip.models.clip import load_model, new_model
from experiments.clip.models.export import export_model
from experiments.clip.reference.cache import cache_features, open_features
from experiments.clip.reference.live import LiveReference
from experiments.clip.reference.several import SeveralReferences
from experiments.clip.run import main
from experiments.clip.training.options import SHIPPED_REFERENCE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def catalog(manifest, tmp_path_factory):
    shards = [str(manifest.folder / shard.name) for shard in manifest.splits["train"].shards]
    return make_catalog(shards, tmp_path_factory.mktemp("catalog"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The folder of another model, of another width and logit scale."""
    clip = new_model("glyph-micro", 5)
    with torch.no_grad():
        clip.model.logit_scale.fill_(1.5)
    folder = tmp_path_factory.mktemp("other")
    export_model(clip, folder)
    return folder


@pytest.fixture(scope="module")
def cached(catalog, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    cache_features(reference, catalog, folder, batch_size=50)
    return open_features(reference, catalog, folder)


def live(clip, catalog):
    return LiveReference(clip, 1, lambda count: first_pairs(catalog, count))


@torch.no_grad()
def test_a_batch_has_the_inputs_of_each_and_its_features_have_the_mean_similarity(catalog, cached, other, reference):
    second = load_model(other)
    several = SeveralReferences([cached, live(second, catalog)], [reference, second], "mean")
    assert several.scales == pytest.approx([reference.model.logit_scale.exp().item(), torch.tensor(1.5).exp().item()])
    assert several.fingerprints == [reference.fingerprint, second.fingerprint]
    loader = Loader(catalog, second.augment, second.tokenize, batch_size=30, seed=0, reference=several)
    batch = next(iter(loader.batches(0)))
    assert len(batch.reference_inputs) == 4
    image, text = several.features(batch.reference_inputs, CPU)
    assert image.shape == text.shape == (30, sum(several.widths))
    firsts = [part.float() for part in cached.rows(batch.index)]
    seconds = second.encode_image(batch.image), second.encode_tokens(batch.text)
    expected = (firsts[0] @ firsts[1].T + seconds[0] @ seconds[1].T) / 2
    assert torch.allclose(image @ text.T, expected, rtol=0, atol=2e-3)
    rows = torch.tensor([3, 1])
    halves = batch.rows(rows, rows).reference_inputs
    assert all(torch.equal(part, whole[[3, 1]]) for part, whole in zip(halves, batch.reference_inputs, strict=True))
    assert [len(part) for part in several.empty_inputs()] == [0] * 4


def test_a_copy_in_another_process_prepares_the_same_inputs(catalog, cached, other, reference):
    second = load_model(other)
    several = SeveralReferences([cached, live(second, catalog)], [reference, second], "mean")
    again = pickle.loads(pickle.dumps(several))
    [(image, _)] = first_pairs(catalog, 1)
    draws = several.draws(0, visit_draws(0, 0, 0, 0))
    with random_state_restored():
        one, two = (each.image(image, draws) for each in (several, again))
    assert one[0] is two[0] is None and torch.equal(one[1], two[1])


def test_the_spread_is_that_of_the_combined_margins(catalog, cached, other, reference):
    second = load_model(other)
    parts, clips = [cached, live(second, catalog)], [reference, second]
    count = len(cached.first(1024)[0])  # of one file
    margins = []
    for image, text in (part.first(count) for part in parts):
        similarity = image @ text.T
        margins.append((similarity - similarity.diagonal()[:, None])[~torch.eye(count, dtype=torch.bool)])
    joint = torch.stack(margins)
    for combine, expected in (("mean", joint.mean(0)), ("learned", joint.mean(0)), ("worst", joint.amin(0))):
        several = SeveralReferences(parts, clips, combine)
        assert several.margin_spread(150) == pytest.approx(expected.std().item(), rel=1e-4)


def test_views_of_different_numbers_are_refused(catalog, cached, reference, tmp_path):
    cache_features(reference, catalog, tmp_path, views=2, batch_size=50)
    views = open_features(reference, catalog, tmp_path)
    with pytest.raises(
        UserError, match=r"cached features have 1 and 2 views of a sample.*cache the same number for all"
    ):
        SeveralReferences([cached, views], [reference, reference], "mean")
    assert SeveralReferences([views, views], [reference, reference], "mean").views == 2


def records(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line]


@pytest.mark.slow
def test_a_learned_mixture_starts_at_the_references_scales_and_moves(glyph_cache, other, reference, tmp_path):
    words = ("--model", "glyph-micro", "--size", "small", "--epochs", "3", "--batch-size", "32", "--warmup", "2")
    words = (*words, "--cache", glyph_cache, "--log-every", "1", "--validations", "1", "--more-references", other)
    assert main(["train", *map(str, words), "--out", str(tmp_path), "--combine", "learned"]) == 0
    steps = records(tmp_path)
    weights = [(line["reference_weight/0"], line["reference_weight/1"]) for line in steps]
    assert all(sum(pair) == pytest.approx(1) for pair in weights)
    first = reference.model.logit_scale.exp().item()
    assert weights[0][0] == pytest.approx(first / (first + math.exp(1.5)), rel=1e-6)
    assert len({pair[0] for pair in weights}) == len(steps) == 15


@pytest.mark.slow
def test_references_of_a_catalog_are_cached_or_run_beside_the_target(catalog, other, tmp_path):
    shipped = str(SHIPPED_REFERENCE)
    folders = [tmp_path / name for name in ("first", "second")]
    for model, folder in zip((shipped, other), folders, strict=True):
        words = ["cache-reference", "--catalog", str(catalog.folder), "--reference", str(model), "--out", str(folder)]
        assert main(words) == 0
    words = ["train", "--catalog", str(catalog.folder), "--model", "glyph-micro", "--reference", shipped]
    words += ["--epochs", "1", "--batch-size", "50", "--log-every", "1", "--workers", "0", "--combine", "worst"]
    words += ["--temperature", "0.1", "--more-references", str(other), "--warmup", "1"]
    cached = ["--reference-features", str(folders[0]), "--more-reference-features", str(folders[1]), "--in-memory"]
    assert main([*words, *cached, "--out", str(tmp_path / "cached")]) == 0
    assert main([*words, "--out", str(tmp_path / "live")]) == 0
    one, two = (records(tmp_path / name) for name in ("cached", "live"))
    assert len(one) == len(two) == 3
    settings = json.loads((tmp_path / "cached" / "run.json").read_text())["settings"]
    assert settings["more_references"] == [load_model(other).fingerprint] and settings["combine"] == "worst"
