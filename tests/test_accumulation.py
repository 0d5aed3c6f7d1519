"""Accumulation against the one-pass step: the same gradient, random numbers, buffers and reductions, less memory."""

import weakref
from pathlib import Path

import open_clip
import pytest
import torch
import torch.distributed as dist
from processes import start_ranks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from drrho import ChiSquare
from drrho.accumulation import accumulate
from drrho.contrastive import contrastive_risk

SIDE = 32
SIZES = (5, 1, 4, 3)
B = sum(SIZES)
TEXT = {"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
TRANSFORMER = {"image_size": SIDE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
RESNET = {"image_size": SIDE, "layers": (1, 1, 1, 1), "width": 8, "head_width": 32}


def clip(vision=TRANSFORMER, *, dropout=0.0, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.CLIP(8, {**vision, "patch_dropout": dropout}, TEXT, **options).double()


def pairs():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(B, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return images, torch.randint(1, 50, (B, 6), generator=generator)


def cut(batch, sizes=SIZES):
    return list(zip(*(part.split(sizes) for part in batch), strict=True))


def unit(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    return tuple(normalize(draw, dim=-1))


def steered(image, text, scale, place=slice(0, B), group=None, tau=None):
    """A contrastive risk with everything: reference, running estimates, learned temperature."""
    return contrastive_risk(
        image,
        text,
        1 / scale if tau is None else tau,
        reference=tuple(part[place] for part in unit(B, 5, 7)),
        log_u=tuple(part[place] for part in torch.linspace(-2, 1, 2 * B, dtype=torch.float64).view(2, B)),
        gamma=0.4,
        eps=1e-6,
        rho=0.3,
        group=group,
    )


def siglip(image, text, scale, bias):
    return open_clip.loss.SigLipLoss()(image, text, scale, bias)


def value(result):
    return result if isinstance(result, torch.Tensor) else result.value


def taken(model, *others):
    """Take the gradients away from the parameters."""
    found = []
    for parameter in (*model.parameters(), *others):
        found.append(parameter.grad)
        parameter.grad = None
    return found


def close(ours, expected, tolerance=1e-10):
    scale = max(part.abs().max() for part in expected if part is not None)
    for one, other in zip(ours, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).abs().max() <= tolerance * scale


def one_pass(model, chunks, loss):
    """The step of a batch whose features come chunk by chunk, all with a graph."""
    outputs = [model(*chunk) for chunk in chunks]
    features = [parts[0] if parts[0].ndim == 0 else torch.cat(parts) for parts in zip(*outputs, strict=True)]
    result = loss(*features)
    value(result).backward()
    return result


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss, options",
    [
        (steered, {}),
        (lambda i, t, s: contrastive_risk(i, t, 1 / s, divergence=ChiSquare()), {}),
        (open_clip.ClipLoss(), {}),
        (siglip, {"init_logit_bias": -2.0}),
    ],
)
def test_gradient_is_that_of_the_whole_batch(loss, options):
    model = clip(**options)
    batch = pairs()
    expected = loss(*model(*batch))
    value(expected).backward()
    whole = taken(model)
    found = accumulate(lambda chunk: model(*chunk), cut(batch), loss, model=model)
    assert type(found) is type(expected)
    assert abs(value(found) - value(expected)) <= 1e-12
    close(taken(model), whole)


def test_the_whole_result_of_the_loss_comes_back():
    model = clip()
    batch = pairs()
    found = accumulate(lambda chunk: model(*chunk), cut(batch), steered, model=model)
    expected = steered(*model(*batch))
    assert torch.allclose(torch.cat(found.log_u), torch.cat(expected.log_u), rtol=1e-12)


def test_gradients_are_added_and_reach_what_the_loss_alone_depends_on():
    model = clip()
    batch = pairs()
    tau = torch.full((2, B), 0.1, dtype=torch.float64, requires_grad=True)
    scale = model.logit_scale

    def loss(image, text):
        return steered(image, text, None, tau=tau.unbind()).value * scale

    image, text, _ = model(*batch)
    loss(image, text).backward()
    whole = taken(model, tau)
    for _ in range(2):
        accumulate(lambda chunk: model(*chunk)[:2], cut(batch), loss, model=model)
    close(taken(model, tau), [2 * part for part in whole])


def test_gradient_scale_multiplies_every_gradient():
    model = clip()
    chunks = cut(pairs())
    for some in (chunks, chunks[:1]):
        one_pass(model, some, open_clip.ClipLoss())
        whole = taken(model)
        accumulate(lambda chunk: model(*chunk), some, open_clip.ClipLoss(), model=model, gradient_scale=3.0)
        close(taken(model), [3 * part for part in whole])


def test_parts_without_gradient():
    """A locked tower, then both; outputs that the loss does not use, and integers."""
    model = clip()
    batch = pairs()

    def encode(chunk):
        image, text, scale = model(*chunk)
        return image, text, scale, chunk[1][:, 0], image[:, :3]

    def loss(image, text, scale, first, unused):
        assert first.equal(batch[1][:, 0])
        return open_clip.ClipLoss()(image, text, scale)

    for locked in (model.visual, model):
        locked.requires_grad_(False)
        model.logit_scale.requires_grad_()
        loss(*encode(batch)).backward()
        whole = taken(model)
        assert whole[-1] is None or any(part is None for part in whole)
        accumulate(encode, cut(batch), loss, model=model)
        close(taken(model), whole)


def test_one_chunk_is_encoded_once():
    model = clip(dropout=0.5)
    chunks = cut(pairs())[:1]
    calls = []

    def encode(chunk):
        calls.append(chunk)
        return model(*chunk)

    torch.manual_seed(0)
    one_pass(model, chunks, open_clip.ClipLoss())
    whole, draw = taken(model), torch.rand(3)
    torch.manual_seed(0)
    accumulate(encode, chunks, open_clip.ClipLoss(), model=model)
    assert len(calls) == 1
    close(taken(model), whole, 0.0)
    assert torch.rand(3).equal(draw)


# --- random numbers, buffers, autocast --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("vision", [TRANSFORMER, RESNET])
def test_dropout_and_batch_norm_are_those_of_one_forward_pass(vision):
    def loss(image, text, scale):
        return open_clip.ClipLoss()(image, text, scale) + torch.rand(())  # draws between the two passes

    answers = []
    for step in (one_pass, lambda m, c, f: accumulate(lambda chunk: m(*chunk), c, f, model=m)):
        model = clip(vision, dropout=0.5)
        model.token_embedding.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out, 0.3))
        chunks = cut(pairs(), (5, 2, 6))  # a single sample has no variance
        torch.manual_seed(3)
        for _ in range(2):
            result = step(model, chunks, loss)
        answers.append((result.detach(), taken(model), list(model.buffers()), torch.rand(4)))
    (value, gradients, buffers, draw), (our_value, our_gradients, our_buffers, our_draw) = answers
    assert len(buffers) > (20 if vision is RESNET else 0)
    assert abs(our_value - value) <= 1e-12
    close(our_gradients, gradients)
    assert our_draw.equal(draw)
    for ours, other in zip(our_buffers, buffers, strict=True):
        assert torch.equal(ours, other)


def test_the_replay_sees_the_buffers_of_the_first_pass():
    """Spectral normalization moves buffers that its output depends on."""

    def build():
        torch.manual_seed(0)
        return torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 3)).double()

    data = torch.randn(6, 4, dtype=torch.float64).split(2)
    model = build()
    torch.cat([model(part) for part in data]).square().sum().backward()
    ours = build()
    accumulate(lambda part: (ours(part),), data, lambda x: x.square().sum(), model=ours)
    close(taken(ours), taken(model))
    for one, other in zip(ours.buffers(), model.buffers(), strict=True):
        assert torch.equal(one, other)


class Counting(torch.nn.Module):
    """A layer that depends on a buffer which is no part of its state, beside a constant, and writes the first."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(1.0, 5.0, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64), persistent=False)

    def forward(self, x):
        self.seen += len(x)
        return x * self.weight * self.mask * self.seen.clone()


def test_buffers_beside_the_state_are_compared_where_they_were_written():
    data, models = torch.rand(6, 4, dtype=torch.float64).split(2), (Counting(), Counting())
    with torch.inference_mode():  # a buffer of a part that is never trained; its writes are not counted
        frozen = torch.zeros(2)
    models[1].register_buffer("frozen", frozen, persistent=False)
    torch.cat([models[0](part) for part in data]).square().sum().backward()
    accumulate(lambda part: (models[1](part),), data, lambda x: x.square().sum(), model=models[1])
    close(taken(models[1]), taken(models[0]))
    assert models[1].seen == models[0].seen == 6


def test_graphs_of_the_caller_stay_whole():
    model = clip()
    batch = pairs()
    earlier = model(*batch)[1].sum()  # holds the attention mask, a buffer
    accumulate(lambda chunk: model(*chunk), cut(batch), open_clip.ClipLoss(), model=model)
    earlier.backward()


def test_a_failing_replay_leaves_random_numbers_and_buffers_of_one_pass():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    data = torch.randn(6, 3).split(3)

    def encode(chunk):
        if torch.is_grad_enabled():
            raise RuntimeError("no memory")
        return (model(chunk),)

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="no memory"):
        accumulate(encode, data, torch.sum, model=model)
    draw = torch.rand(2)
    assert model[0].num_batches_tracked == 2
    torch.manual_seed(0)
    for part in data:
        model(part)
    assert torch.rand(2).equal(draw)


def test_autocast_of_the_caller_holds_in_both_passes_and_not_in_backward():
    model = clip().float()
    images, texts = pairs()
    batch = images.float(), texts
    seen = []

    def encode(chunk):
        image, text, scale = model(*chunk)
        seen.append((torch.is_autocast_enabled("cpu"), model.visual(chunk[0]).dtype))
        return image, text, scale

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((torch.is_autocast_enabled("cpu"), "backward"))
            return grad

    def loss(image, text, scale):
        return contrastive_risk(Watched.apply(image), text, 1 / scale)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(*model(*batch))
    result.value.backward()
    whole = taken(model)
    for sizes in (SIZES, (B,)):
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            accumulate(encode, cut(batch, sizes), loss, model=model)
            assert torch.is_autocast_enabled("cpu")
        passes = 1 if len(sizes) == 1 else 2
        assert [entry for entry in seen if entry[1] != "backward"] == passes * len(sizes) * [(True, torch.bfloat16)]
        assert [entry for entry in seen if entry[1] == "backward"] == [(False, "backward")]
        close(taken(model), whole, 2e-2)


# --- memory -----------------------------------------------------------------------------------------------------------


class Held:
    """Counts the bytes that autograd holds for the backward pass."""

    def __init__(self):
        self.now = self.peak = 0

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box[0])
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def _pack(self, tensor):
        class Box(list):
            pass

        box = Box([tensor])
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(box, self._freed, size)
        return box

    def _freed(self, size):
        self.now -= size


def test_no_more_than_one_chunk_has_a_graph():
    model = clip()
    batch = pairs()
    loss = open_clip.ClipLoss()
    with Held() as largest:
        one_pass(model, cut(batch)[:1], loss)
    with Held() as whole:
        one_pass(model, cut(batch), loss)
    with Held() as ours:
        accumulate(lambda chunk: model(*chunk), cut(batch), loss, model=model)
    assert ours.peak <= largest.peak
    assert whole.peak > 2 * largest.peak


# --- errors -----------------------------------------------------------------------------------------------------------


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


@pytest.mark.parametrize(
    "encode, loss, message",
    [
        (lambda x: x, torch.sum, "encode must return a tuple of tensors, got Tensor"),
        (lambda x: {"image": x}, torch.sum, "encode must return a tuple of tensors, got dict"),
        (lambda x: (x, 1.0), torch.sum, r"encode must return a tuple of tensors, got \(Tensor, float\)"),
        (lambda x: (), torch.sum, r"encode must return a tuple of tensors, got \(\)"),
        (lambda x: (x,) * len(x), torch.sum, r"same number of tensors for every chunk, got 2 for chunks\[0\] and 1"),
        (lambda x: (x[:, : 1 + len(x)],), torch.sum, r"output 0 .* got \[2, 3\] for chunks\[0\] and \[1, 2\]"),
        (lambda x: (x.sum() if len(x) == 2 else x,), torch.sum, r"output 0 .* got \[\] for chunks\[0\] and \[1, 4\]"),
        (
            lambda x: (x, x.sum()),
            lambda x, s: x.sum(),
            r"output 1 of encode is a scalar .* the same for every chunk, got \[8.0, 4.0\]",
        ),
        (lambda x: (x,), lambda x: x.sum(0), r"loss must return a scalar, got shape \[4\]"),
        (lambda x: (x,), lambda x: {"loss": x.sum()}, "loss must return a scalar .* got dict"),
    ],
)
def test_errors_name_the_argument(encode, loss, message):
    data = [torch.ones(2, 4), torch.ones(1, 4)]
    with pytest.raises(ValueError, match=message):
        accumulate(encode, data, loss, model=linear())


def test_chunks_and_scale_out_of_range():
    with pytest.raises(ValueError, match="chunks must hold at least one"):
        accumulate(lambda x: (x,), [], torch.sum, model=linear())
    with pytest.raises(ValueError, match="gradient_scale must be finite and > 0, got 0"):
        accumulate(lambda x: (x,), [torch.ones(2)], torch.sum, model=linear(), gradient_scale=0.0)


# --- over ranks -------------------------------------------------------------------------------------------------------


def reductions(wrapped):
    """Count the all-reduces of DistributedDataParallel's buckets."""
    count = []

    def hook(state, bucket):
        count.append(bucket.is_last())
        summed = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
        return summed.then(lambda done: done.value()[0])

    wrapped.register_comm_hook(None, hook)
    return count


def resnet(seed=0):
    model = clip(RESNET, seed=seed)
    model.visual.eval()  # so that chunks are as one batch; DistributedDataParallel has its buffers to broadcast
    return model


def replicated(rank, world):
    """Wrapped in DistributedDataParallel, with different numbers of pairs and of chunks on the ranks."""
    place, sizes = [(slice(0, 8), (3, 5)), (slice(8, B), (2, 2, 1))][rank]
    model = resnet(seed=rank)  # rank 0's weights count
    wrapped = DistributedDataParallel(model)
    count = reductions(wrapped)
    batch = tuple(part[place] for part in pairs())

    def loss(image, text, scale):
        return steered(image, text, scale, place, dist.group.WORLD)

    answers = []
    for some in (sizes, (len(batch[0]),)):
        for _ in range(2):  # the second time in rebuilt buckets
            count.clear()
            step = accumulate(
                lambda chunk: wrapped(*chunk), cut(batch, some), loss, model=wrapped, gradient_scale=world
            )
            assert sum(count) == 1
            answers.append([step.value.detach(), *taken(model)])
    return answers


def sharded(rank, world):
    """Fully sharded, with the same number of chunks on both ranks."""
    place, sizes = [(slice(0, 8), (3, 5)), (slice(8, B), (2, 3))][rank]
    model = clip(nonscalar_logit_scale=True)
    batch = tuple(part[place] for part in pairs())
    blocks = *model.visual.transformer.resblocks, *model.transformer.resblocks
    for block in blocks:
        fully_shard(block)
    fully_shard(model)

    def encode(chunk):
        image, text, scale = model(*chunk)
        return image, text, scale.squeeze()

    def loss(image, text, scale):
        return steered(image, text, scale, place, dist.group.WORLD)

    answers = []
    for some in (sizes, sizes, (len(batch[0]),)):
        with CommDebugMode() as communication:
            step = accumulate(encode, cut(batch, some), loss, model=model, gradient_scale=world)
        counts = communication.get_comm_counts()
        assert sum(count for name, count in counts.items() if "reduce_scatter" in str(name)) == len(blocks) + 1
        answers.append([step.value.detach(), *(gradient.full_tensor() for gradient in taken(model))])
    return answers


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        torch.save((replicated(rank, world), sharded(rank, world)), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_get_the_gradient_of_one_process(tmp_path):
    start_ranks(work, (2, str(tmp_path)), 2)
    jobs = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    for model, answers in zip((resnet(), clip(nonscalar_logit_scale=True)), jobs, strict=True):
        image, text, scale = model(*pairs())
        step = steered(image, text, scale.squeeze())
        step.value.backward()
        expected = taken(model)
        for found, *gradients in (answer for rank in answers for answer in rank):
            assert abs(found - step.value) <= 1e-12
            close(gradients, expected)
