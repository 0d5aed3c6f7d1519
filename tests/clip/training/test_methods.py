"""What the methods compute, against the core."""

import pytest
import torch
from training_runs import HEAD, contrastive

from drrho import KL, penalized_risk
from drrho.routes import BatchIndex
from experiments.clip.glyphs.dataset import read_samples
from experiments.clip.models.clip import new_model
from experiments.clip.training.methods import Distilled, Head, OpenCLIP, Outcome


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
