"""What a run asks of storage and network, against what a real one sends."""

import dataclasses
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import start_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import SHORT, built, trainer_of

from experiments.clip.cli.traffic import exchanges, reading, saving
from experiments.clip.distributed import Ranks
from experiments.clip.glyphs.source import glyph_features
from experiments.clip.glyphs.stream import PreparedPairs
from experiments.clip.models.clip import load_model, new_model
from experiments.clip.training.options import SHIPPED_REFERENCE

BATCH, RANKS = 128, 2
DATACOMP = {"pairs_per_second": 91_113.0, "samples": 1_400_000_000, "shards": 140_000, "sample_bytes": 35e3}


def expected(name, parameters=0, **options):
    steered = {"reference_width": 64, "running": True} if name == "drrho" else {}
    defaults = {"width": 64, "reference_width": 0, "batch_size": BATCH, "ranks": RANKS, "parallel": "ddp"}
    defaults |= {"precision": "float32", "contrastive": True, "running": False, "individual_temperatures": False}
    return exchanges(parameters=parameters, **defaults | steered | options)


class Received(TorchDispatchMode):
    """Counts the bytes that this rank receives from all, its own included."""

    total = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation.name().startswith("c10d::"):
            name = operation.name().partition("::")[2].partition(".")[0]
            self.total += sum(each.nbytes for each in tensors_in(arguments[0] if name != "allreduce_" else ()))
        return operation(*arguments, **(options or {}))


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, list | tuple) else []


def received(name, given, folder, ranks):
    """Return the bytes that a rank receives in one step, beside the gradients of the weights."""
    at, counting = [], Received()
    optimization = dataclasses.replace(SHORT, batch_size=BATCH)
    trainer = trainer_of(
        given[0],
        checkpoints=folder / "c",
        on_step=lambda step, total, log: at.append(counting.total),
        **built(name, *given, optimization, ranks=ranks),
        ranks=ranks,
    )
    with counting:
        trainer.fit()
    return at[2] - at[1]


def count_on_ranks(rank, folder):
    folder = Path(folder)
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS, timeout=patience)
    try:
        world = dist.group.WORLD
        ranks = Ranks(rank, RANKS, torch.device("cpu"), world, None, world)
        clip, reference = new_model("glyph-micro", 0), load_model(SHIPPED_REFERENCE)
        manifest = torch.load(folder / "manifest.pt", weights_only=False)
        given = PreparedPairs(manifest, "train", clip), glyph_features(reference, manifest, folder), reference
        found = {name: received(name, given, folder / name, ranks) for name in ("openclip", "siglip", "drrho")}
        torch.save((clip.config.model["embed_dim"], reference.config.model["embed_dim"], found), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_messages_are_those_of_a_real_step(manifest, reference, tmp_path):
    glyph_features(reference, manifest, tmp_path)
    torch.save(manifest, tmp_path / "manifest.pt")
    start_ranks(count_on_ranks, (str(tmp_path),), RANKS)
    width, reference_width, found = torch.load(tmp_path / "0.pt")
    batch = 75  # of 150 pairs in two steps
    for name, size in found.items():
        options = {"width": width, "batch_size": batch, "contrastive": name != "siglip"}
        if name == "drrho":
            options["reference_width"] = reference_width
        assert size == pytest.approx(sum(each.bytes for each in expected(name, **options)), rel=0.05), name


def test_messages_of_a_recipe_by_hand():
    found = dict(expected("openclip", 427_616_513, width=768, batch_size=90_112, ranks=512))
    assert found["gradients of weights, summed (ring)"] == round(2 * 511 / 512 * 4 * 427_616_513)
    assert found["text features of the batch, gathered"] == 90_112 * 768 * 4
    sharded = dict(expected("openclip", 1000, ranks=4, parallel="fsdp", precision="bfloat16"))
    assert sharded["weights of blocks, gathered twice"] == 2 * 2 * 1000 * 3 // 4
    assert expected("openclip", ranks=1) == []


def test_reading_of_datacomp_by_hand():
    found = reading(**DATACOMP, ranks=512, cached_features=True)
    assert found.bytes_per_second == pytest.approx(3.19e9, rel=1e-3)
    assert found.requests_per_second == pytest.approx(380, rel=1e-2)
    assert found.single_requests_per_second == 91_113
    assert (found.checks, found.checks_of_a_rank) == (420_000, 821)
    small = reading(pairs_per_second=100, samples=1000, shards=10, sample_bytes=1e3, ranks=1, cached_features=False)
    assert small.requests_per_second == 1  # a shard is less than a block


def test_a_checkpoint_is_written_by_all_ranks():
    assert saving(5_130_000_000, 512, 1e9) == (5_130_000_000, 10_019_532, pytest.approx(0.01, rel=0.01))
