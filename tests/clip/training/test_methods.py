"""What the methods compute, against the core."""

import math

import pytest
import torch
from open_clip.loss import SigLipLoss
from training_runs import HEAD, contrastive

from drrho import KL, penalized_risk
from drrho.gist import guided_info_nce
from drrho.routes import BatchIndex
from experiments.clip.glyphs.dataset import read_samples
from experiments.clip.models.clip import new_model
from experiments.clip.training.methods import GIST, METHODS, Context, Distilled, Head, OpenCLIP, Outcome, SigLIP
from experiments.clip.training.options import Loss
from experiments.clip.training.towers import choose_head, hold_scale


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
    rows = [features.rows(torch.tensor([k])) for k in index.tolist()]
    guided = features.features(features.rows(index), torch.device("cpu"))
    loss = contrastive(len(samples)).loss((image, text), BatchIndex.gathered(index), HEAD, 0, guided)

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


def test_estimates_belong_to_the_samples_of_the_batch():
    method = contrastive()
    image, text = torch.nn.functional.normalize(torch.randn(2, 3, 8), dim=-1)
    loss = method.loss((image, text), BatchIndex.gathered([7, 149, 20]), HEAD, 0, None)
    method.step(loss, 1.0, 1.0, Outcome(torch.tensor(True), torch.tensor(True)))
    visited = torch.isfinite(method.state_dict()["running.log_u"]).all(0).nonzero().flatten()
    assert visited.tolist() == [7, 20, 149]


def test_distillation_has_one_temperature_or_each_softmax_its_own():
    generator = torch.Generator().manual_seed(0)
    image, text, image_guide, text_guide = (
        torch.nn.functional.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64)) for _ in range(4)
    )
    head, guide_tau = Head(torch.tensor(8.0, dtype=torch.float64, requires_grad=True)), 0.3
    index = BatchIndex.gathered(torch.arange(6))

    def cross_entropy(tau):
        target, guide = image @ text.T / tau, image_guide @ text_guide.T / guide_tau
        return (
            -sum((b.softmax(1) * a.log_softmax(1)).sum(1).mean() for a, b in ((target, guide), (target.T, guide.T))) / 2
        )

    own = image, text
    for is_own, tau in ((False, guide_tau), (True, 1 / head.scale)):
        method = Distilled(OpenCLIP(), 2.0, guide_tau, own=is_own)
        loss = method.loss(own, index, head, 0, (image_guide, text_guide)).value
        expected = OpenCLIP().loss(own, index, head, 0, None).value + 2 * cross_entropy(tau)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        found, wanted = (torch.autograd.grad(value, head.scale)[0].item() for value in (loss, expected))
        assert found == pytest.approx(wanted, rel=1e-9)
    steered = contrastive(6)
    tau, _ = steered.logits_at(head)
    loss = Distilled(steered, 2.0, guide_tau, own=True).loss(own, index, head, 0, (image_guide, text_guide))
    assert loss.log["distillation"].item() == pytest.approx(cross_entropy(tau).item(), rel=1e-12)


def test_the_sigmoid_loss_has_the_bits_of_open_clips():
    image, text = torch.nn.functional.normalize(torch.randn(2, 7, 5), dim=-1)
    for bias in (torch.tensor(-3.0), None):
        head = Head(torch.tensor(11.0, requires_grad=True), bias)
        own, other = (image.clone().requires_grad_() for _ in range(2))
        ours = SigLIP().loss((own, text), BatchIndex.gathered(torch.arange(7)), head, 0, None).value
        theirs = SigLipLoss()(other, text, head.scale, bias)
        assert torch.equal(ours, theirs)
        assert torch.equal(torch.autograd.grad(ours, own)[0], torch.autograd.grad(theirs, other)[0])


@pytest.mark.parametrize("start, end", [(8.0, math.log(100)), (-0.5, 0.0), (2.5, 2.5)])
@pytest.mark.parametrize("method", [OpenCLIP(), SigLIP()], ids=["openclip", "siglip"])
def test_a_learned_scale_is_kept_as_open_clip_keeps_it(method, start, end):
    model = new_model("glyph-micro", 0).model
    with torch.no_grad():
        model.logit_scale.fill_(start)
    hold_scale(model, method, torch.tensor(True))
    assert model.logit_scale.item() == pytest.approx(end)
    with torch.no_grad():
        model.logit_scale.fill_(start)
    hold_scale(model, method, torch.tensor(False))
    assert model.logit_scale.item() == start


@pytest.mark.parametrize("scheme", ["global", "per-temperature", "individual", "constant"])
def test_a_learned_temperature_is_the_models_scale(scheme):
    options = Loss(method="fastclip", temperature=0.05, temperature_scheme=scheme)
    method = METHODS["fastclip"].from_options(options, Context(10, 1, 0.05))
    model = new_model("glyph-micro", 0).model
    before = model.logit_scale.item()
    hold_scale(model, Distilled(method, 1.0, 0.1), torch.tensor(True))
    one = scheme in ("global", "per-temperature")
    assert model.logit_scale.exp().item() == pytest.approx(20 if one else math.exp(before))


@pytest.mark.parametrize("name", METHODS)
def test_only_what_the_loss_depends_on_learns(name):
    method = METHODS[name].from_options(Loss(method=name, temperature=0.1), Context(10, 1, 0.1))
    model = new_model("glyph-micro", 0, sigmoid=True).model
    choose_head(model, method)
    assert model.logit_scale.requires_grad == (name in ("openclip", "siglip", "gist"))
    assert model.logit_bias.requires_grad == (name == "siglip")


@pytest.mark.parametrize("name", METHODS)
def test_no_loss_depends_on_autocast(name):
    """The towers run under it; similarities of bfloat16 would move every gradient by percents."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(4, 48, 16, generator=generator), dim=-1)
    found = []
    for on in (False, True):
        method = METHODS[name].from_options(Loss(method=name, temperature=0.05), Context(48, 1, 0.05))
        own, guide = [part.clone().requires_grad_() for part in features[:2]], tuple(features[2:])
        head = Head(torch.tensor(20.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = method.loss(tuple(own), BatchIndex.gathered(torch.arange(48)), head, 0, guide)
        loss.value.backward()
        found.append((loss.value.detach(), *(part.grad for part in own)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gist_learns_the_models_temperature_and_logs_the_share_that_is_left_out():
    own, guide = (
        tuple(torch.nn.functional.normalize(torch.randn(2, 6, 4, generator=generator, dtype=torch.float64), dim=-1))
        for generator in (torch.Generator().manual_seed(seed) for seed in (0, 1))
    )
    head = Head(torch.tensor(5.0, dtype=torch.float64, requires_grad=True))
    loss = GIST().loss(own, BatchIndex.gathered(torch.arange(6)), head, 0, guide)
    expected = guided_info_nce(own, guide, 0.2)
    assert loss.value.item() == pytest.approx(expected.part.item(), rel=1e-12)
    share = loss.log["negatives_left_out"]
    assert share.finish(share.part.item()) == pytest.approx(expected.left_out.item() / 60)
    loss.value.backward()
    assert head.scale.grad is not None and head.scale.grad.item() != 0
