"""The loop and its methods on real pairs: what a step computes, and stopping without loss."""

import math

import pytest
import torch

from drrho import KL, penalized_risk
from experiments.clip.checkpoint import load_checkpoint
from experiments.clip.config import parse
from experiments.clip.errors import UserError
from experiments.clip.feature_cache import cache_features, open_features
from experiments.clip.methods import ConstantTemperature, GlobalContrastive, Head, OpenCLIP, SigLIP
from experiments.clip.models import export_model, load_model, new_model
from experiments.clip.run import build_method
from experiments.clip.shards import read_samples
from experiments.clip.stream import Pairs, epoch_order
from experiments.clip.train import Interrupted, Optimization, train

SHORT = Optimization(epochs=2, batch_size=32, lr=1e-3, warmup=2)


@pytest.fixture(scope="module")
def pairs(manifest):
    return Pairs(manifest, "train", new_model("glyph-small", 0))


@pytest.fixture(scope="module")
def features(manifest, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    cache_features(reference, manifest, "train", folder)
    return open_features(reference, manifest, "train", folder)


HEAD = Head(torch.tensor(1.0))


def contrastive(samples=150, epochs=2, features=None):
    return GlobalContrastive(samples, epochs, ConstantTemperature(0.1), features=features, final_gamma=0.6, eps=1e-8)


def run(pairs, method, checkpoint, stop=lambda: False, optimization=SHORT, seed=0):
    clip = new_model("glyph-small", seed, sigmoid=isinstance(method, SigLIP))
    history = train(
        clip,
        method,
        pairs,
        optimization,
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_seconds=1e9,
        settings={"method": type(method).__name__, "seed": seed},
        validate=lambda: {},
        validations=2,
        on_step=lambda step, total, log: None,
        stop=stop,
    )
    return clip, history


@torch.no_grad()
def test_steered_loss_is_the_penalized_risk_of_excess_losses_of_the_right_samples(manifest, reference, features):
    """The demo's loss, from model to reference to sample index, against the core: one anchor at a time, float64."""
    clip = new_model("glyph-small", 0)
    samples = list(read_samples(manifest, "train"))
    index = torch.tensor([5, 64, 149, 0, 63])
    images = torch.stack([clip.preprocess(samples[k].image) for k in index.tolist()])
    captions = [samples[k].caption for k in index.tolist()]
    image, text = clip.encode_image(images).double(), clip.encode_text(captions).double()
    tau = 0.1
    method = contrastive(len(samples), features=features)
    loss = method.loss(image, text, index, HEAD, epoch=0)

    rows = [features.rows(torch.tensor([k])) for k in index.tolist()]
    ref_image, ref_text = (torch.cat(part).double() for part in zip(*rows, strict=True))
    views = torch.stack([reference.preprocess(samples[k].image) for k in index.tolist()])
    assert torch.allclose(ref_image, reference.encode_image(views).double(), rtol=0, atol=1e-3)
    assert torch.allclose(ref_text, reference.encode_text(captions).double(), rtol=0, atol=1e-3)
    risks = []
    for a, b, ra, rb in ((image, text, ref_image, ref_text), (text, image, ref_text, ref_image)):
        for i in range(len(index)):
            others = [j for j in range(len(index)) if j != i]
            target = a[i] @ b[others].T - a[i] @ b[i]
            guide = ra[i] @ rb[others].T - ra[i] @ rb[i]
            risks.append(penalized_risk(target - guide, KL(), tau).value)
    assert abs(loss.value - torch.stack(risks).mean()) <= 1e-10


def test_estimates_belong_to_the_samples_of_the_batch(features):
    method = contrastive(features=features)
    image, text = torch.nn.functional.normalize(torch.randn(2, 3, 8), dim=-1)
    method.loss(image, text, torch.tensor([7, 149, 20]), HEAD, epoch=0)
    visited = torch.isfinite(method.state_dict()["running.log_u"]).all(0).nonzero().flatten()
    assert visited.tolist() == [7, 20, 149]


def test_every_sample_once_per_epoch_in_batches_of_even_size():
    order = epoch_order(150, 32, seed=1, epoch=3)
    assert sorted(torch.cat(order).tolist()) == list(range(150))
    assert {len(batch) for batch in order} == {30}
    assert {len(batch) for batch in epoch_order(151, 32, seed=1, epoch=3)} == {30, 31}
    again, later = epoch_order(150, 32, seed=1, epoch=3), epoch_order(150, 32, seed=1, epoch=4)
    assert all(torch.equal(a, b) for a, b in zip(order, again, strict=True))
    assert not torch.equal(order[0], later[0])


FASTCLIP = ("--method", "fastclip", "--temperature", "0.1")
SETTINGS = {
    "openclip": ("--method", "openclip"),
    "siglip": ("--method", "siglip"),
    "fastclip v1": FASTCLIP,
    "fastclip v0": (*FASTCLIP, "--temperature-scheme", "per-temperature"),
    "fastclip v2": (*FASTCLIP, "--temperature-scheme", "individual", "--rho", "0.5"),
    "fastclip v3": (*FASTCLIP, "--temperature-scheme", "global", "--rho", "0.5"),
    "fastclip with chi-square": (*FASTCLIP, "--divergence", "chi-square"),
    "fastclip with cvar": (*FASTCLIP, "--divergence", "cvar", "--level", "0.2"),
    "scent": (*FASTCLIP, "--log-step", "0.5"),
    "drrho": (),
    "drrho, adaptive": ("--coefficient", "adaptive"),
    "drrho and distillation": ("--distill", "0.5"),
    "openclip and distillation": ("--method", "openclip", "--distill", "1"),
    "two levels": ("--method", "two-level"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_anywhere_and_resumed_ends_at_the_same_bits(name, pairs, features, reference, tmp_path):
    """Every method, as the command line builds it."""
    options = parse(["train", *SETTINGS[name]]).loss

    def method():
        guide = (reference, features) if options.needs_reference else (None, None)
        return build_method(options, SHORT.epochs, len(pairs), *guide)[0]

    whole, history = run(pairs, method(), tmp_path / "whole")
    assert len(history) == 2
    checkpoint = tmp_path / "parts"
    for steps in (3, 4):
        left = iter([False] * (steps - 1) + [True])
        with pytest.raises(Interrupted, match="of 10"):
            run(pairs, method(), checkpoint, stop=lambda left=left: next(left))
    resumed, _ = run(pairs, method(), checkpoint)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert all(math.isfinite(value) for record in history for value in record.values())


@pytest.mark.parametrize("name", ["drrho", "siglip"])
def test_a_batch_in_parts_takes_the_same_steps(name, pairs, features, reference, tmp_path):
    options = parse(["train", *SETTINGS[name]]).loss
    ends = []
    for parts in (1, 3):
        guide = (reference, features) if options.needs_reference else (None, None)
        method, _ = build_method(options, 1, len(pairs), *guide)
        optimization = Optimization(epochs=1, batch_size=32, lr=1e-3, warmup=2, accumulation=parts)
        clip, history = run(pairs, method, tmp_path / f"{parts}", optimization=optimization)
        ends.append((history[-1]["loss"], torch.cat([value.flatten() for value in clip.model.state_dict().values()])))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    assert (ends[0][1] - ends[1][1]).abs().max() <= 2e-4  # a fifth of one step of Adam


def test_a_model_with_a_sigmoid_head_is_exported_with_it(pairs, tmp_path):
    clip, _ = run(pairs, SigLIP(), tmp_path / "c")
    export_model(clip, tmp_path / "model")
    again = load_model(tmp_path / "model").model
    assert torch.equal(again.logit_bias, clip.model.logit_bias)
    assert float(again.logit_bias.detach()) != -10.0


def test_training_lowers_the_loss(pairs, tmp_path):
    _, history = run(
        pairs, contrastive(len(pairs), 12), tmp_path / "c", optimization=Optimization(12, 32, 2e-3, 0.2, 5)
    )
    assert history[-1]["loss"] < history[0]["loss"] - 0.01


def test_checkpoint_of_other_settings_is_refused(pairs, tmp_path):
    run(pairs, OpenCLIP(), tmp_path / "c")
    with pytest.raises(UserError, match="method=OpenCLIP, now it is GlobalContrastive"):
        run(pairs, contrastive(len(pairs)), tmp_path / "c")
    with pytest.raises(UserError, match="seed=0, now it is 1"):
        run(pairs, OpenCLIP(), tmp_path / "c", seed=1)


def test_damaged_checkpoint_is_refused(pairs, tmp_path):
    clip, _ = run(pairs, OpenCLIP(), tmp_path / "c")
    data = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(data[: len(data) // 2])
    optimizer = torch.optim.AdamW(clip.model.parameters())
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path / "c", clip.model, optimizer, OpenCLIP(), {})
