"""The plan of a run against what a small run takes."""

import dataclasses
import re

import pytest
import torch

from drrho.running import RunningEstimates
from drrho.temperature import IndividualTemperatures
from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.cli.cost import cost_of
from experiments.clip.cli.plan import estimated
from experiments.clip.data.loader import Loader
from experiments.clip.models.clip import new_model
from experiments.clip.models.export import export_model
from experiments.clip.reference.cache import cache_features, open_features
from experiments.clip.run import main, parse
from experiments.clip.training.options import Execution

SMALL = {
    "samples": 1000,
    "samples_seen": 5000,
    "batch_size": 64,
    "scored_per_pair": 1,
    "accumulation": 1,
    "ranks": 1,
    "execution": Execution(precision="float32"),
    "teraflops": 0.1,
    "utilization": 0.5,
    "reference_width": 64,
    "individual_temperatures": False,
    "running": True,
    "ema": False,
    "self_reference": False,
    "workers": 0,
}


@pytest.fixture
def pairs_of_a_catalog(manifest, reference, tmp_path):
    """Return a loader of one batch of 150 pairs, and the reference's features of them."""
    shards = [str(manifest.folder / shard.name) for shard in manifest.splits["train"].shards]
    catalog = make_catalog(shards, tmp_path / "catalog")
    cache_features(reference, catalog, tmp_path / "features")
    clip = new_model("glyph-micro", 0)
    loader = Loader(catalog, clip.in_bytes(clip.augment), clip.tokenize, batch_size=150, seed=0)
    return loader, open_features(reference, catalog, tmp_path / "features")


@pytest.mark.slow
def test_sizes_are_those_of_a_real_run(tmp_path):
    clip = new_model("glyph-small", 0)
    plan = estimated(cost_of("glyph-small"), **SMALL)
    optimizer = torch.optim.AdamW(clip.model.parameters())
    images, texts = torch.rand(2, 3, 32, 32), clip.tokenize(["a", "b"])
    sum(part.sum() for part in clip.model(images, texts)).backward()
    optimizer.step()
    moments = [
        value for state in optimizer.state.values() for value in state.values() if value.ndim or value.numel() > 1
    ]
    scalars = 2 * 4  # moments of the logit scale, of no dimension
    assert plan.optimizer == sum(4 * value.numel() for value in moments) + scalars
    assert plan.gradients == sum(4 * parameter.grad.numel() for parameter in clip.model.parameters())
    state = RunningEstimates(1000).state_dict()["log_u"]
    assert plan.running_state == state.numel() * state.element_size()
    individual = estimated(cost_of("glyph-small"), **SMALL | {"individual_temperatures": True, "running": False})
    state = IndividualTemperatures(1000, 0.1, learning_rate=1.0, low=0.1, high=1.0).state_dict()["temperatures"]
    assert individual.running_state == state.numel() * state.element_size()
    export_model(clip, tmp_path)
    size = (tmp_path / "open_clip_model.safetensors").stat().st_size
    assert plan.exported_model == pytest.approx(size, rel=0.02)
    assert plan.reference_cache == 1000 * 2 * 64 * 2


def test_more_ranks_share_and_accumulation_divides():
    cost = cost_of("glyph-small")
    one = estimated(cost, **SMALL)
    eight = estimated(cost, **SMALL | {"ranks": 8, "execution": Execution(parallel="fsdp", precision="float32")})
    assert eight.optimizer == one.optimizer // 8
    assert eight.running_state == one.running_state // 8
    assert eight.activations == one.activations // 8
    assert eight.hours == pytest.approx(one.hours / 8)
    parts = estimated(cost, **SMALL | {"accumulation": 4})
    assert parts.activations == one.activations // 4
    assert parts.hours == pytest.approx(one.hours * 4 / 3)  # a second forward pass
    # JEST at its published ratio: of five pairs that are scored, one is trained on, with less than half the operations.
    chosen = estimated(cost, **SMALL | {"scored_per_pair": 5})
    assert chosen.steps == -(-one.steps // 5)
    assert chosen.hours == pytest.approx(one.hours * (1 + 3 / 5) / 3)
    beside_itself = estimated(cost, **SMALL | {"self_reference": True})
    assert beside_itself.hours == pytest.approx(one.hours * 4 / 3)  # a forward pass of the average
    assert beside_itself.weights == 2 * one.weights and beside_itself.checkpoint == one.checkpoint + one.weights
    assert one.memory == sum(
        getattr(one, name)
        for name in ("weights", "gradients", "optimizer", "casts", "activations", "inputs", "loss", "running_state")
    )
    assert one.pairs_per_second == pytest.approx(0.1e12 * 0.5 / (3 * cost.flops))


def test_memory_for_batches_is_that_of_the_batches_that_workers_make(pairs_of_a_catalog):
    """As many as there are, each with the images in bytes, tokens in 32 bits and the cached features."""
    loader, features = pairs_of_a_catalog
    [batch] = loader.batches(0)
    own = sum(part.nbytes for part in (batch.image, batch.text, batch.index))
    cached = sum(part.nbytes for part in features.rows(batch.index))
    plan = estimated(cost_of("glyph-micro"), **SMALL | {"batch_size": len(batch.index), "workers": 3})
    assert plan.shared == 3 * 2 * (own + cached)
    assert plan.inputs == 2 * (own + cached) + 4 * own
    half = estimated(cost_of("glyph-micro"), **SMALL | {"batch_size": len(batch.index), "workers": 3, "ranks": 2})
    assert half.shared == plan.shared // 2


@pytest.mark.slow
def test_the_command_prints_it_and_refuses(capsys):
    assert main(["plan", "--model", "ViT-B-32", "--samples", "1000000", "--ranks", "8", "--batch-size", "4096"]) == 0
    output = capsys.readouterr().out
    assert "151.3 million" in output
    assert "running state" in output
    assert main(["plan", "--teraflops", "-1"]) == 2
    assert "--teraflops must be positive, got -1.0" in capsys.readouterr().err
    options = parse(["plan", "--preset", "glyph-unsteered"])
    assert options.train.loss.method == "fastclip"
    assert dataclasses.is_dataclass(options.train)


def test_a_plan_of_a_catalog_has_its_pairs_and_shards(tmp_path, capsys):
    make_catalog(["synthetic:900:16", "synthetic:124:16"], tmp_path / "catalog")
    words = ["plan", "--catalog", str(tmp_path / "catalog"), "--model", "glyph-micro", "--method", "openclip"]
    words += ["--batch-size", "16", "--epochs", "2"]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "1,024 in 2 shards" in output and re.search(r"steps +128\n", output)
    assert main([*words, "--samples", "3200"]) == 0
    assert "3,200 in 1 shards" in capsys.readouterr().out
    words[2] = str(tmp_path / "absent")
    assert main(words) == 2
    assert "absent" in capsys.readouterr().err
    assert main([*words, "--samples", "3200"]) == 0  # of a catalog that is not made yet
