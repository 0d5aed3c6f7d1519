"""Distillation against its definition and open_clip's loss, over ranks together with other losses of features."""

import math
from pathlib import Path

import open_clip
import pytest
import torch
import torch.distributed as dist
from problems import agree, features, leaves
from processes import start_ranks
from torch.nn.functional import normalize

from drrho import tiles
from drrho.coefficient import AdaptiveCoefficient
from drrho.contrastive import info_nce
from drrho.distillation import distillation_loss


@pytest.mark.parametrize("tile", [1, 40, 2**21])
def test_distillation_is_open_clip_s_loss(tile, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", tile)
    monkeypatch.setattr(tiles, "ROWS", 1)
    image, text, scale = leaves()
    guide = features(17, 5, 1)
    arguments = (image, text, scale, *guide, torch.tensor(30.0, dtype=torch.float64))
    contrastive, expected = open_clip.DistillClipLoss()(*arguments)
    ours = distillation_loss(image, text, 1 / scale, reference=guide, reference_temperature=1 / 30)
    assert abs(ours - expected) <= 1e-12 * expected
    agree(torch.autograd.grad(ours, parts := (image, text, scale)), torch.autograd.grad(expected, parts), 1e-12)
    # A sum with another loss, each with a weight of its own.
    both = info_nce(image, text, 1 / scale) + 2 * distillation_loss(
        image, text, 1 / scale, reference=guide, reference_temperature=1 / 30
    )
    contrastive, distilled = open_clip.DistillClipLoss()(*arguments)
    agree(torch.autograd.grad(both, parts), torch.autograd.grad(contrastive + 2 * distilled, parts), 1e-12)


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 10.0])
def test_distillation_of_the_target_itself_is_its_entropy_and_has_no_gradient(temperature):
    image, text = (part.requires_grad_() for part in features(12, 6, 2))
    loss = distillation_loss(image, text, temperature, reference=(image, text))
    logits = (image @ text.T / temperature).detach()
    entropy = -sum((x.softmax(1) * x.log_softmax(1)).sum(1).mean() for x in (logits, logits.T)) / 2
    assert abs(loss - entropy) <= 1e-14 / temperature + 1e-13  # exponents are of size 1 / tau
    assert all(part.abs().max() <= 1e-13 / temperature for part in torch.autograd.grad(loss, (image, text)))


def test_distillation_in_lower_precision():
    image, text = features(64, 32, 3)
    guide = features(64, 16, 4)
    exact = distillation_loss(image, text, 0.05, reference=guide)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        own = [part.to(dtype).requires_grad_() for part in (image, text)]
        loss = distillation_loss(*own, 0.05, reference=tuple(part.to(dtype) for part in guide))
        assert loss.dtype == torch.float32
        assert abs(loss - exact) <= tolerance * exact
        assert all(part.dtype == dtype for part in torch.autograd.grad(loss, own))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"temperature": torch.ones(6)}, "single numbers, got one per anchor"),
        ({"reference": features(5, 3, 1)}, "reference must hold 6 pairs like image and text, got 5"),
        ({"text": features(5, 4, 1)[1]}, "image and text must both have shape"),
        ({"image": features(6, 4, 1)[0] * math.nan}, "image and text must be finite"),
    ],
)
def test_refusals(change, message):
    image, text = features(6, 4, 0)
    arguments = {"image": image, "text": text, "temperature": 0.1, "reference": features(6, 3, 1)} | change
    with pytest.raises(ValueError, match=message):
        distillation_loss(**arguments)


# --- over ranks -------------------------------------------------------------------------------------------------------

SIZES = {2: (5, 8), 4: (3, 1, 7, 2)}


def answer(place, group):
    own = features(13, 6, 60)
    image, text = (part[place].clone().requires_grad_() for part in own)
    guide = tuple(normalize(part + own[side][:, :4], dim=1)[place] for side, part in enumerate(features(13, 4, 61)))
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    results = []
    for loss in (
        distillation_loss(image, text, tau, reference=guide, group=group),
        info_nce(image, text, tau, reference=guide, group=group),
    ):
        results += [loss.detach(), *torch.autograd.grad(loss, (image, text, tau))]
    c = AdaptiveCoefficient().update(image, text, reference=guide, group=group)
    return [*results, torch.tensor(c, dtype=torch.float64)]


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        first = sum(SIZES[world][:rank])
        tiles.TILE, tiles.ROWS = 20, 1
        torch.save(answer(slice(first, first + SIZES[world][rank]), dist.group.WORLD), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", SIZES)
def test_ranks_give_the_values_and_gradients_of_one_process(world, tmp_path):
    start_ranks(work, (world, str(tmp_path)), world)
    parts = list(zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(world)), strict=True))
    expected = answer(slice(0, 13), None)
    for number, alone in enumerate(expected):
        of_ranks = parts[number]
        if number in (0, 4, 8):
            agree(of_ranks, [alone] * world, 1e-12)
        elif number in (3, 7):
            agree([sum(of_ranks)], [alone], 1e-12)
        else:
            agree([torch.cat(of_ranks)], [alone], 1e-12)
