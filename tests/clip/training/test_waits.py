"""A step waits for nothing: what it reads of the device, what ranks exchange, and steps whose numbers come late."""

import dataclasses
import json
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from counting import Counting
from families import thorough
from processes import start_ranks
from training_runs import SETTINGS, SHORT, built, contrastive, run, trainer_of

from drrho.tiles import SimilarityTiles
from experiments.clip.cli.building import build_method
from experiments.clip.distributed import ONE_PROCESS, Ranks
from experiments.clip.errors import UserError
from experiments.clip.glyphs.source import glyph_features
from experiments.clip.glyphs.stream import PreparedPairs
from experiments.clip.models.clip import load_model, new_model
from experiments.clip.run import parse
from experiments.clip.training.checkpoint import latest_checkpoint, training_state
from experiments.clip.training.methods import GlobalContrastive
from experiments.clip.training.options import SHIPPED_REFERENCE, CheckpointPolicy

STEP = 5  # whose reads and exchanges are counted; no line of the log is due between its start and its numbers
#: A choice of pairs has to be known to the host, which has their images.
CHOICES = 1


def counted(name, given, folder, ranks=None):
    """Return the number of reads of the device and of exchanges in one step."""
    at, counting = [], Counting()
    ranks = {} if ranks is None else {"ranks": ranks}
    settings = built(name, *given, dataclasses.replace(SHORT, ema=0.9, clip_norm=1.0), **ranks)
    trainer = trainer_of(
        given[0],
        checkpoints=folder / "c",
        on_step=lambda step, total, log: at.append(counting.totals()),
        **settings,
        **ranks,
    )
    towers = trainer._towers.model
    if isinstance(towers, torch.nn.parallel.DistributedDataParallel):
        towers.register_comm_hook(counting, uncounted_mean)
    with pytest.MonkeyPatch.context() as patch, counting:
        patch.setattr(SimilarityTiles, "unshifted", False)  # it is asked of a CPU alone
        trainer.fit()
    return tuple(after - before for before, after in zip(at[STEP - 2], at[STEP - 1], strict=True))


def uncounted_mean(counting, bucket):
    """Average gradients over ranks, as DistributedDataParallel does, in as many messages as it takes."""
    with counting.paused():
        mean = bucket.buffer() / dist.get_world_size()
        return dist.all_reduce(mean, async_op=True).get_future().then(lambda done: done.value()[0])


@pytest.mark.parametrize("name", thorough(SETTINGS, ("drrho",)))
def test_a_step_reads_the_device_once(name, pairs, features, reference, tmp_path):
    reads, exchanges = counted(name, (pairs, features, reference), tmp_path)
    assert (reads, exchanges) == (1 + CHOICES * (" on " in name), 0)


#: Reads, and exchanges beside those of the model's gradients, in a step on two ranks.
EXCHANGES = {
    "openclip": (1, 7),
    "fastclip v0": (1, 10),
    "fastclip v1": (1, 9),
    "fastclip v2": (1, 12),
    "fastclip v3": (1, 10),
    "fastclip with chi-square": (1, 9),
    "drrho": (1, 9),
    "drrho, adaptive": (1, 11),
    "drrho, scheduled": (1, 11),
    "drrho and distillation": (1, 16),
    "drrho beside itself": (1, 9),
    "drrho by the worst of two": (1, 11),
    "drrho by a mixture of two": (1, 15),
    "fastclip with a network": (1, 8),
}


def count_on_ranks(rank, folder):
    folder = Path(folder)
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=patience)
    try:
        world = dist.group.WORLD
        ranks = Ranks(rank, 2, torch.device("cpu"), world, None, world)
        clip, reference = new_model("glyph-micro", 0), load_model(SHIPPED_REFERENCE)
        manifest = torch.load(folder / "manifest.pt", weights_only=False)
        given = PreparedPairs(manifest, "train", clip), glyph_features(reference, manifest, folder), reference
        found = {name: counted(name, given, folder / name, ranks) for name in EXCHANGES}
        torch.save(found, folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_exchange_few_messages_in_a_step(manifest, pairs, reference, tmp_path):
    glyph_features(reference, manifest, tmp_path)
    torch.save(manifest, tmp_path / "manifest.pt")
    start_ranks(count_on_ranks, (str(tmp_path),), 2)
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt") == EXCHANGES
    assert EXCHANGES["drrho"][1] <= 10


def lines(folder):
    """The lines of the log, without what depends on the time."""
    timed = ("pairs_per_second_per_rank", "share_of_time_waiting_for_data")
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in found]


class Spoiled(GlobalContrastive):
    """In some steps the loss, or its gradient alone, is not finite."""

    losses, gradients = (), ()

    def loss(self, own, batch, head, epoch, reference):
        found = super().loss(own, batch, head, epoch, reference)
        self.steps = getattr(self, "steps", -1) + 1
        value = found.value
        if self.steps in self.losses:
            value = value * math.inf
        if self.steps in self.gradients:
            value = value + (0 * own[0].sum()).sqrt()  # 0, with an infinite slope
        return found._replace(value=value)


def spoiled(**steps):
    method = contrastive()
    method.__class__ = type("Spoiled", (Spoiled,), steps)
    return method


@pytest.mark.parametrize("name", ["drrho, adaptive", "drrho, scheduled", "fastclip v2", "openclip on jest"])
def test_numbers_that_come_late_are_the_same_numbers(name, pairs, features, reference, tmp_path):
    ends = []
    for lag in (0, 1, 4):
        steps = []
        folder = tmp_path / str(lag)
        given = built(name, pairs, features, reference)
        _, history, _ = run(
            pairs, checkpoints=folder / "c", on_step=lambda *step, to=steps: to.append(step), lag=lag, **given
        )
        ends.append((history, lines(folder), steps))
    assert ends[0] == ends[1] == ends[2] and len(ends[0][2]) == 10
    assert [type(value) for _, _, log in ends[0][2] for value in log.values()].count(int) == 10 * (name[-2:] == "v2")


@pytest.mark.parametrize("lag", [0, 2])
def test_steps_that_are_not_finite_are_said_late_or_at_once(lag, pairs, tmp_path):
    _, history, _ = run(pairs, spoiled(losses=(1,), gradients=(3, 4)), tmp_path / "a" / "c", limit=3, lag=lag)
    found = [json.loads(line) for line in (tmp_path / "a" / "nonfinite.jsonl").read_text().splitlines()]
    said = [(line["step"], line["problem"].split()[-1], len(line["samples"])) for line in found]
    assert said == [(1, "inf", 30), (3, "nan", 30), (4, "nan", 30)]
    assert history[-1]["samples_scored"] == history[-1]["samples_trained"] == 300
    with pytest.raises(UserError, match="the gradient's norm is nan at step 3"):
        run(pairs, spoiled(losses=(1,), gradients=(3, 4)), tmp_path / "b" / "c", limit=1, lag=lag)
    assert len((tmp_path / "b" / "nonfinite.jsonl").read_text().splitlines()) == 2


def test_a_checkpoint_is_of_steps_that_are_known_to_be_right(pairs, tmp_path):
    """One is due after every step; the run ends for a step whose numbers would come later."""
    keeping = CheckpointPolicy(checkpoint_minutes=1e9, checkpoint_steps=1)
    with pytest.raises(UserError, match="at step 3"):
        run(pairs, spoiled(losses=(3,)), tmp_path / "c", keeping=keeping, lag=5)
    assert latest_checkpoint(tmp_path / "c").name == "step-00000003"  # after steps 0 to 2


def same_bits(one, other):
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def states(pairs, features, reference, folder, spoiling, **options):
    """Train four steps, the last of which is spoiled; return the state after the third and the fourth."""
    words = ("--temperature", "0.1", "--rho", "0.5", "--temperature-scheme", "individual", "--coefficient", "adaptive")
    method, _ = build_method(parse(["train", *words]).loss, 2, len(pairs), reference, features, ONE_PROCESS)
    method.__class__ = type("Spoiled", (Spoiled,), {spoiling: (3,)})
    kept = []

    def keep(step, total, log):
        state = trainer.state
        found = {**training_state(state.model, state.optimizer), **state.average.state_dict(), **method.state_dict()}
        kept.append({key: value.clone() for key, value in (found | state.scaler.state_dict()).items()})

    trainer = trainer_of(pairs, method, folder / "c", features, limit=1, on_step=keep, **options)
    trainer.fit()
    assert not same_bits(kept[1]["running.log_u"], kept[2]["running.log_u"])
    return kept[2], kept[3]


@pytest.mark.parametrize("spoiling", ["losses", "gradients"])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_step_that_is_not_taken_changes_no_bit(spoiling, optimizer, pairs, features, reference, tmp_path):
    """Of weights, moments, their average, running estimates, temperatures and the coefficient."""
    optimization = dataclasses.replace(SHORT, ema=0.9, optimizer=optimizer)
    before, after = states(pairs, features, reference, tmp_path, spoiling, optimization=optimization)
    assert (
        any("exp_avg" in key for key in before) and {"coefficient.moments", "running.log_u", "steps"} <= before.keys()
    )
    assert [key for key in before if not same_bits(before[key], after[key])] == []


def test_an_overflow_lowers_the_loss_scale_and_leaves_what_has_a_gradient(pairs, features, reference, tmp_path):
    optimization = dataclasses.replace(SHORT, ema=0.9)
    options = {"optimization": optimization, "precision": "float16"}
    before, after = states(pairs, features, reference, tmp_path, "gradients", **options)
    assert after["scale"] == before["scale"] / 2
    kept = [key for key in before if key.startswith(("model.", "optimizer.", "temperature."))]
    assert kept and all(same_bits(before[key], after[key]) for key in kept)
    assert not same_bits(before["running.log_u"], after["running.log_u"]) and after["steps"] == before["steps"] + 1
    assert not (tmp_path / "nonfinite.jsonl").exists()
