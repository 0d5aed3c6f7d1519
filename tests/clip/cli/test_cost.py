"""What a pair costs a model, against operations and memory of the real one."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from training_runs import contrastive

from drrho.routes import BatchIndex
from experiments.clip.cli.cost import cost_of
from experiments.clip.data.batch import Batch
from experiments.clip.distributed import ONE_PROCESS
from experiments.clip.models.clip import new_model
from experiments.clip.training.options import Execution
from experiments.clip.training.towers import Towers


@pytest.mark.parametrize("name", ["glyph-small", pytest.param("RN50", marks=pytest.mark.slow)])
def test_counts_are_those_of_the_real_model(name):
    model = new_model(name, 0).model
    cost = cost_of(name, device="cpu")
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    size = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
    image, text = torch.rand(1, 3, size, size), torch.ones(1, model.context_length, dtype=torch.int64)
    # The fused kernel's operations are not in torch's counter on the CPU.
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        features = model(image, text)[0]
    assert cost.flops == counter.get_total_flops()
    assert cost.width == features.shape[1]


def peak_of_a_step(pairs, execution):
    """Return the most memory that a real step of the towers takes at a time, beyond what is there before and after."""
    clip = new_model("glyph-small", 0)
    towers, method = Towers(clip, execution, ONE_PROCESS), contrastive(samples=pairs)
    images = torch.randint(0, 255, (pairs, 3, 32, 32), dtype=torch.uint8)
    tokens = clip.tokenize(["a cat"] * pairs).to(torch.int32)
    batch = Batch(images, tokens, torch.arange(pairs), size=pairs)

    def step():
        towers.backward(method, batch, BatchIndex([batch.index.numpy()]), None, 1, 0, 1.0)

    step()  # the gradients' own memory is there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_that_of_a_real_step(precision, checkpointing):
    pairs, execution = 256, Execution(device="cpu", precision=precision, activation_checkpointing=checkpointing)
    cost = cost_of("glyph-small", precision=precision, checkpointing=checkpointing, device="cpu")
    inputs = pairs * cost.pair_bytes * (4 if precision == "float32" else 2)
    expected = pairs * (cost.kept_bytes + cost.block_bytes) + cost.cast_bytes + inputs
    assert peak_of_a_step(pairs, execution) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_a_gpu_keeps_less_in_half_precision_and_normalizes_in_full():
    """By hand, of a token in a block of width d: 2 d numbers before normalizations, which a GPU computes in float32,
    and 15 d more: 2 d normalized, 3 d of attention's inputs, its answer and a copy of it, 8 d of the layers between.
    """
    full, half, by_inputs = (
        cost_of("ViT-B-16", **options)
        for options in ({}, {"precision": "bfloat16"}, {"precision": "bfloat16", "checkpointing": True})
    )
    image, text = 12 * 197 * 768, 12 * 77 * 512  # numbers of the residual streams after all blocks
    assert half.kept_bytes == pytest.approx((2 * 4 + 15 * 2) * (image + text), rel=0.06)
    assert full.kept_bytes == pytest.approx(4 * (2 + 15) * (image + text), rel=0.06)
    assert by_inputs.kept_bytes == pytest.approx(2 * (image + text) + 2 * 4 * (197 * 768 + 77 * 512), rel=0.5)
    assert half.cast_bytes == pytest.approx(2 * (full.parameters - 49408 * 512), rel=0.01)  # no copy of embeddings
    assert by_inputs.cast_bytes == half.cast_bytes and full.cast_bytes < 1000


def test_sharded_weights_are_gathered_by_blocks():
    """By hand: two of the larger tower's blocks, and all that is in no block."""
    model = new_model("glyph-small", 0).model
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert cost_of("glyph-small").gathered_parameters == everything - sum(sizes) + 2 * max(sizes)


def test_counting_leaves_autocast_and_attention_as_they_were():
    attention = torch.nn.functional.scaled_dot_product_attention
    cost_of("glyph-micro", precision="bfloat16")
    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu")
