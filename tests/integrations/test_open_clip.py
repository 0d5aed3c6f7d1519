"""SteeredClipLoss: open_clip's interface and values, and open_clip_train's own loop with it, beside the core's."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from families import EVERY
from open_clip import create_loss
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from open_clip.model import CLIP
from open_clip_train.train import train_one_epoch
from processes import start_ranks
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from drrho import KL, ChiSquare, CVaR
from drrho.contrastive import contrastive_risk, info_nce
from drrho.integrations.open_clip import SteeredClipLoss, steer

SAMPLES, BATCH = 96, 8


class Table:
    """Features of a reference, by the number of the sample."""

    def __init__(self, samples=SAMPLES, seed=5):
        self._both = features(samples, 4, seed)

    def __len__(self):
        return len(self._both[0])

    def rows(self, index):
        return tuple(part[index] for part in self._both)


def features(count=BATCH, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2)]


def model(seed=0):
    torch.manual_seed(seed)
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text, output_dict=True).double()


def data(samples=SAMPLES, seed=0, **more):
    """What open_clip_train makes of a csv file, of images and texts in memory."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 16, 16, generator=generator, dtype=torch.float64)
    texts = torch.randint(1, 50, (samples, 8), generator=generator)
    loader = DataLoader(TensorDataset(images, texts), BATCH, shuffle=True, drop_last=True, **more)
    loader.num_samples, loader.num_batches = samples, samples // BATCH
    return SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)


def arguments(**more):
    """The options of open_clip_train that its loop and its losses read."""
    fixed = {"device": "cpu", "precision": "fp32", "distill": False, "accum_freq": 1, "skip_scheduler": True}
    loss = {"model": "tiny", "siglip": False, "local_loss": False, "gather_with_grad": False, "horovod": False}
    ranks = {"rank": 0, "world_size": 1, "local_rank": 0, "log_local": False}
    logs = {"grad_clip_norm": 1.0, "log_every_n_steps": 1, "batch_size": BATCH, "wandb": False}
    return SimpleNamespace(**fixed | loss | ranks | logs | more)


class Writer(list):
    """Keeps what open_clip_train writes to TensorBoard."""

    def add_scalar(self, name, value, step):
        if name == "train/loss":
            self.append(value)


def theirs(clip, info, loss, epochs, other=None, **more):
    """The losses of open_clip_train's loop."""
    writer, optimizer = Writer(), torch.optim.AdamW(clip.parameters(), 1e-3)
    torch.manual_seed(1)
    for epoch in range(epochs):
        train_one_epoch(
            clip, {"train": info}, loss, epoch, optimizer, None, None, other, arguments(**more), tb_writer=writer
        )
    return writer


def ours(clip, info, objective, epochs):
    """The same by a loop over the core: objective maps features, temperature and the batch's numbers to a loss."""
    optimizer, found = torch.optim.AdamW(clip.parameters(), 1e-3), []
    images, texts = info.dataloader.dataset.tensors
    places = DataLoader(range(len(images)), batch_sampler=info.dataloader.batch_sampler)
    torch.manual_seed(1)
    for _ in range(epochs):
        for index in places:
            out = clip(images[index], texts[index])
            value = objective(out["image_features"], out["text_features"], 1 / out["logit_scale"], index)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                clip.logit_scale.clamp_(0, math.log(100))
            found.append(value.item())
    return found


# --- its interface and values ---------------------------------------------------------------------------------


def values(loss, *, told=None, **more):
    own = [part.clone().requires_grad_() for part in features()]
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    if told is not None:
        loss.tell(told)
    value = loss(*own, scale, **more)
    return value.detach(), torch.autograd.grad(value, [*own, scale])


def test_without_a_reference_it_is_open_clips_loss():
    mine = SteeredClipLoss(coefficient=0.0)
    for one, other in zip(values(mine), values(ClipLoss()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    found = mine(*features(), torch.tensor(12.0), None, True)
    assert list(found) == ["contrastive_loss"]
    torch.testing.assert_close(found["contrastive_loss"], ClipLoss()(*features(), 12.0))


@pytest.mark.parametrize("divergence", EVERY.values(), ids=EVERY)
def test_it_is_the_core(divergence):
    told = features(width=4, seed=1)
    found = values(SteeredClipLoss(divergence=divergence, coefficient=0.7), told=told)
    own = [part.requires_grad_() for part in features()]
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    steer = {"reference": tuple(told), "coefficient": 0.7, "divergence": divergence, "include_positive": True}
    value = contrastive_risk(*own, 1 / scale, **steer).value * scale
    if divergence.has_exponential_weights:
        value = value + math.log(BATCH)
    expected = value.detach(), torch.autograd.grad(value, [*own, scale])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-9)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_reference_beside_the_model_comes_by_the_names_of_distillation():
    told = features(width=4, seed=1)
    beside = {"dist_image_features": told[0], "dist_text_features": told[1], "dist_logit_scale": torch.tensor(9.0)}
    for one, other in zip(values(SteeredClipLoss(), **beside), values(SteeredClipLoss(), told=told), strict=True):
        torch.testing.assert_close(one, other)


def test_the_features_of_accumulated_batches_are_joined():
    loss, told, own = SteeredClipLoss(), features(3 * BATCH, 4, 1), features(3 * BATCH)
    loss.tell(tuple(told))
    expected = loss(*own, 12.0)
    for _ in range(2):  # steps
        for part in range(3):
            loss.tell(tuple(each[part * BATCH : (part + 1) * BATCH] for each in told))
        for _ in range(3):
            torch.testing.assert_close(loss(*own, 12.0), expected)


# --- in open_clip_train's loop --------------------------------------------------------------------------------

CORE = {
    "KL": (KL(), lambda image, text, tau, **steer: info_nce(image, text, tau, **steer)),
    "chi-square": (
        ChiSquare(),
        lambda image, text, tau, **steer: (
            contrastive_risk(image, text, tau, divergence=ChiSquare(), include_positive=True, **steer).value / tau
        ),
    ),
    "CVaR": (
        CVaR(0.3),
        lambda image, text, tau, **steer: (
            contrastive_risk(image, text, tau, divergence=CVaR(0.3), include_positive=True, **steer).value / tau
        ),
    ),
}


@pytest.mark.parametrize("name", CORE)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
def test_fifty_steps_of_its_own_loop_equal_the_cores(name):
    divergence, core = CORE[name]
    table, clip = Table(), model()
    other, info = copy.deepcopy(clip), data()
    unchanged = copy.copy(info)
    loss = steer(create_loss(arguments()), info, table, divergence=divergence, coefficient=0.8)
    epochs = -(-50 // (SAMPLES // BATCH))
    found = theirs(clip, info, loss, epochs)

    def objective(image, text, tau, index):
        return core(image, text, tau, reference=table.rows(index), coefficient=0.8)

    expected = ours(other, unchanged, objective, epochs)
    assert len(found) == len(expected) >= 50
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    for one, two in zip(clip.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert expected[-1] < expected[0]


def test_without_a_reference_its_loop_is_unchanged():
    clip = model()
    other = copy.deepcopy(clip)
    found = theirs(clip, data(), SteeredClipLoss(coefficient=0.0), 2)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(theirs(other, data(), ClipLoss(), 2)))


def test_its_accumulation_is_the_loss_of_the_joined_batch():
    table, runs = Table(), []
    for accumulated in (1, 3):
        clip, info = model(), data()
        loss = steer(create_loss(arguments()), info, table)
        if accumulated == 1:
            info.dataloader._batches.batch_sampler.batch_size = 3 * BATCH  # the same samples in one batch
            info.dataloader._loader.num_batches = SAMPLES // (3 * BATCH)
        runs.append(theirs(clip, info, loss, 2, accum_freq=accumulated))
    assert len(runs[0]) == len(runs[1]) == 8
    torch.testing.assert_close(*map(torch.tensor, runs))


def test_worker_processes_and_pinned_order_change_nothing():
    runs = []
    for workers in (0, 1):
        clip, info = model(), data(num_workers=workers)
        runs.append(theirs(clip, info, steer(create_loss(arguments()), info, Table()), 1))
    assert runs[0] == runs[1]


def test_a_model_beside_it_is_the_reference():
    clip, beside = model(), model(seed=3)
    other, info = copy.deepcopy(clip), data()
    loss = steer(create_loss(arguments(distill=True)))
    found = theirs(clip, info, loss, 1, other=beside, distill=True)
    images, texts = info.dataloader.dataset.tensors

    @torch.no_grad()
    def reference(index):
        out = beside(images[index], texts[index])
        return out["image_features"], out["text_features"]

    expected = ours(
        other, info, lambda image, text, tau, index: info_nce(image, text, tau, reference=reference(index)), 1
    )
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)


# --- over ranks -----------------------------------------------------------------------------------------------


def averaged(rank, folder, divergence):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        table, whole = Table(), torch.arange(BATCH)
        clip = model()
        images, texts = data().dataloader.dataset.tensors
        loss = SteeredClipLoss(divergence=divergence, coefficient=0.7)
        loss.tell(table.rows(whole))
        expected = loss(**clip(images[whole], texts[whole]))
        gradients = torch.autograd.grad(expected, list(clip.parameters()))
        wrapped = torch.nn.parallel.DistributedDataParallel(clip)
        part = whole[:3] if rank == 0 else whole[3:]  # not the same number of pairs
        loss = SteeredClipLoss(divergence=divergence, coefficient=0.7, world_size=2)
        loss.tell(table.rows(part))
        value = loss(**wrapped(images[part], texts[part]))
        value.backward()
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
        for parameter, gradient in zip(clip.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=str)
def test_two_ranks_have_the_gradient_of_the_whole_batch(divergence, tmp_path):
    start_ranks(averaged, (tmp_path, divergence), 2)


# --- bad input ------------------------------------------------------------------------------------------------


def test_losses_that_cannot_be_steered_are_refused():
    with pytest.raises(TypeError, match="ClipLoss or DistillClipLoss, got SigLipLoss, which cannot be steered"):
        steer(SigLipLoss(), data(), Table())
    with pytest.raises(ValueError, match="--horovod cannot be steered"):
        steer(ClipLoss(use_horovod=True), data(), Table())
    with pytest.raises(ValueError, match="reference must be the cached features"):
        steer(ClipLoss(), data())
    with pytest.raises(ValueError, match="leave out --distill-model"):
        steer(DistillClipLoss(), data(), Table())
    with pytest.raises(ValueError, match=r"SigLIP cannot be steered"):
        SteeredClipLoss()(*features(), 12.0, logit_bias=torch.tensor(-10.0))


def test_features_of_other_data_are_refused():
    with pytest.raises(ValueError, match="features of 95 samples, the data set has 96: cache it again"):
        steer(ClipLoss(), data(), Table(95))
    loss = SteeredClipLoss()
    with pytest.raises(ValueError, match="the batch has 8 pairs, the reference 0: steer the loader"):
        loss(*features(), 12.0)
    loss.tell(features(5))
    with pytest.raises(ValueError, match="the batch has 8 pairs, the reference 5"):
        loss(*features(), 12.0)
    told = features()
    told[0][2, 1] = math.nan
    loss = SteeredClipLoss()
    loss.tell(told)
    with pytest.raises(ValueError, match=r"reference\[0\] and reference\[1\] must be finite"):
        loss(*features(), 12.0)
    loss.tell(features())
    with pytest.raises(ValueError, match="cached and beside the model: leave out"):
        loss(*features(), 12.0, dist_image_features=told[0], dist_text_features=told[1])


def test_a_batch_of_one_is_refused():
    loss = SteeredClipLoss()
    loss.tell(features(1))
    with pytest.raises(ValueError, match=r"b >= 2 \(an anchor needs a negative\)"):
        loss(*features(1), 12.0)
