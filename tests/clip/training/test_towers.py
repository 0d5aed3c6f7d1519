"""The towers: parts of a batch, precisions, dropout."""

import dataclasses
from collections import Counter

import open_clip
import pytest
import torch
import torch.distributed as dist
from processes import needs_shards, start_ranks
from training_runs import SHORT, built, contrastive, run

from drrho.routes import BatchIndex
from experiments.clip.data.batch import Batch
from experiments.clip.distributed import Ranks
from experiments.clip.errors import Interrupted, UserError
from experiments.clip.models.clip import new_model
from experiments.clip.training.methods import OpenCLIP
from experiments.clip.training.options import Execution, Optimization
from experiments.clip.training.towers import (
    Towers,
    precision_of,
    refuse_without_events,
    repeated_blocks,
    synchronize_batch_norm,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drrho", "siglip", "drrho on rho top-k"])
def test_a_batch_in_parts_takes_the_same_steps(name, pairs, features, reference, tmp_path):
    ends = []
    for parts in (1, 3):
        optimization = Optimization(epochs=1, batch_size=32, lr=1e-3, warmup=2, accumulation=parts, adam_eps=1e-6)
        given = built(name, pairs, features, reference, optimization)
        clip, history, _ = run(pairs, checkpoints=tmp_path / f"{parts}", **given)
        ends.append((history[-1]["loss"], torch.cat([value.flatten() for value in clip.model.state_dict().values()])))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    assert (ends[0][1] - ends[1][1]).abs().max() <= 2e-4  # a fifth of one step of Adam


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"precision": "bfloat16"}, {"precision": "float16"}, {"activation_checkpointing": True}]
)
def test_towers_in_other_precisions_stay_near_float32(options, pairs, features, tmp_path):
    _, history, _ = run(pairs, contrastive(len(pairs)), tmp_path / "a", features)
    found, other, _ = run(pairs, contrastive(len(pairs)), tmp_path / "b", features, **options)
    tolerance = 0.05 if "precision" in options else 1e-5
    assert other[-1]["loss"] == pytest.approx(history[-1]["loss"], abs=tolerance * abs(history[0]["loss"]))
    assert all(value.dtype == torch.float32 for value in found.model.state_dict().values() if value.is_floating_point())


@pytest.mark.slow
def test_dropped_patches_of_candidates_and_parts_resume_at_the_same_bits(pairs, features, reference, tmp_path):
    options = {"patch_dropout": 0.5, "precision": "bfloat16", "activation_checkpointing": True}
    optimization = dataclasses.replace(SHORT, accumulation=2)
    given = ("openclip on jest", pairs, features, reference, optimization)
    whole, history, _ = run(pairs, checkpoints=tmp_path / "a" / "c", **built(*given), **options)
    left = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        run(pairs, checkpoints=tmp_path / "b" / "c", stop=lambda: next(left), **built(*given), **options)
    again, resumed, _ = run(pairs, checkpoints=tmp_path / "b" / "c", **built(*given), **options)
    assert resumed == history
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


def shapes_and_gradient(clip, batch, parts=1):
    """Return the shapes that the towers are given in a step, its loss, and its gradient."""
    towers, shapes = Towers(clip, Execution(), Ranks()), []
    clip.model.register_forward_pre_hook(lambda model, inputs: shapes.append([len(part) for part in inputs]))
    loss, (image, text) = towers.backward(OpenCLIP(), batch, BatchIndex.gathered(batch.index), None, parts, 0, 1.0)
    assert len(image) == len(text) == len(batch.index)
    return shapes, loss.value.item(), torch.cat([p.grad.flatten() for p in clip.model.parameters()])


@pytest.mark.parametrize("parts", [1, 2])
def test_rows_that_fill_a_batch_up_leave_loss_and_gradient_as_they_are(parts, pairs):
    batch = pairs.batch(torch.arange(11))
    plain = shapes_and_gradient(new_model("glyph-micro", 0), batch, parts)
    full = shapes_and_gradient(new_model("glyph-micro", 0), batch._replace(size=16), parts)
    assert plain[0] == ([[11, 11]] if parts == 1 else [[6, 6], [5, 5]] * 2)
    assert full[0] == ([[16, 16]] if parts == 1 else [[8, 8]] * 4)
    assert full[1] == pytest.approx(plain[1], rel=1e-6)
    assert (full[2] - plain[2]).abs().max() <= 1e-5 * plain[2].abs().max()
    assert full[2].abs().max() > 0


def test_a_batch_without_a_sample_is_filled_up_too(pairs):
    batch = pairs.batch(torch.arange(0))._replace(size=4)
    towers = Towers(new_model("glyph-micro", 0), Execution(), Ranks())
    found, wrong = towers.pairs(OpenCLIP(), batch, BatchIndex.gathered(batch.index), 1)
    assert not wrong
    assert found.image.shape == found.text.shape == (0, 32)


def with_batch_norm():
    """Return the smallest of open_clip's ResNets that takes the glyphs."""
    clip = new_model("glyph-micro", 0)
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 16}
    text = {"width": 16, "heads": 1, "layers": 1, "context_length": clip.model.context_length}
    torch.manual_seed(0)
    return dataclasses.replace(clip, model=open_clip.CLIP(64, vision, text))


def test_statistics_over_a_batch_count_no_row_that_fills_it_up(pairs):
    batch = pairs.batch(torch.arange(11))
    plain, full = (shapes_and_gradient(with_batch_norm(), batch._replace(size=size)) for size in (0, 16))
    assert plain[0] == full[0] == [[11, 11]]
    assert plain[1] == full[1] and torch.equal(plain[2], full[2])


def test_an_image_alone_is_normalized_over_itself(pairs):
    """Its last layer is of one pixel, whose statistics torch refuses for a batch of one."""
    shapes, loss, gradient = shapes_and_gradient(with_batch_norm(), pairs.batch(torch.arange(2)), parts=2)
    assert shapes == [[2, 2]] * 4 and loss > 0 and bool(gradient.isfinite().all()) and bool(gradient.any())


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 0])
@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_compiled_towers_are_not_compiled_again_for_batches_of_other_sizes(mode, size, pairs, monkeypatch):
    """With a size to fill up to, and without one. The graph is torch's own; no code is generated for it here."""
    torch.compiler.reset()
    given = []

    def compile_without_generating_code(model, mode):
        given.append(mode)
        model._compiled_call_impl = torch.compile(model._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_generating_code)
    plain = Towers(new_model("glyph-micro", 0), Execution(), Ranks())
    compiled = Towers(new_model("glyph-micro", 0), Execution(compile=mode), Ranks())
    assert given == [None if mode is True else mode]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (12, 16, 9, 11):
            batch = pairs.batch(torch.arange(count))._replace(size=size)
            found, expected = (
                each.backward(OpenCLIP(), batch, BatchIndex.gathered(batch.index), None, 1, 0, 1.0)[0]
                for each in (compiled, plain)
            )
            assert found.value.item() == pytest.approx(expected.value.item(), rel=1e-5)


def test_batch_normalization_over_ranks_keeps_the_names_of_weights_and_says_where_it_cannot_be():
    from timm.layers import BatchNormAct2d

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), BatchNormAct2d(4))
    names = list(model.state_dict())
    synchronize_batch_norm(model, Ranks())
    assert type(model[1]) is torch.nn.BatchNorm2d  # one process has the whole batch
    group = object()  # which no collective operation is given here
    with pytest.raises(UserError, match="--use-bn-sync needs a GPU for each rank"):
        synchronize_batch_norm(model, Ranks(0, 2, torch.device("cpu"), group))
    synchronize_batch_norm(model, Ranks(0, 2, torch.device("cuda"), group))
    assert type(model[1]) is torch.nn.SyncBatchNorm and list(model.state_dict()) == names
    assert isinstance(model[2].act, torch.nn.ReLU) and isinstance(model[2], torch.nn.SyncBatchNorm)
    with pytest.raises(UserError, match="--use-bn-sync has no part in this run"):
        synchronize_batch_norm(torch.nn.Linear(2, 2), Ranks())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, blocks",
    [
        ("RN50", {"Bottleneck": 13, "ResidualAttentionBlock": 12}),
        ("ViT-B-16-SigLIP", {"Block": 12, "ResidualAttentionBlock": 12}),
        ("convnext_base", {"ConvNeXtBlock": 33, "ConvNeXtStage": 4, "ResidualAttentionBlock": 12}),
        (
            "swin_base_patch4_window7_224",
            {"SwinTransformerBlock": 24, "SwinTransformerStage": 4, "ResidualAttentionBlock": 12},
        ),
    ],
)
def test_blocks_are_what_a_model_repeats(name, blocks):
    """Of any family: what is gathered at a time is a small part of it, and inner blocks come before outer ones."""
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
    found = repeated_blocks(model)
    assert Counter(type(block).__name__ for block in found) == blocks
    place = {block: number for number, block in enumerate(found)}
    assert all(place[inner] <= place[outer] for outer in found for inner in outer.modules() if inner in place)
    assert repeated_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))) == []


@needs_shards
def test_sharding_on_the_cpu_is_allowed():
    refuse_without_events(torch.device("cpu"))


def test_sharding_on_the_cpu_is_refused_by_a_torch_that_cannot(monkeypatch):
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    refuse_without_events(torch.device("cuda"))
    with pytest.raises(
        UserError, match=r"--parallel fsdp needs a newer torch on the CPU than .*, or give --parallel ddp"
    ):
        refuse_without_events(torch.device("cpu"))


def reduced_types(rank, folder):
    """Note in which types FSDP adds gradients up over two ranks, of towers in bfloat16."""
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    try:
        types = []

        def noting(reduce):
            def noted(*arguments, **options):
                types.append((options["input"] if "input" in options else arguments[1]).dtype)
                return reduce(*arguments, **options)

            return noted

        for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # the second from torch 2.14 on
            if hasattr(dist, name):
                setattr(dist, name, noting(getattr(dist, name)))
        clip, world = new_model("glyph-micro", 0, nonscalar_logit_scale=True), dist.group.WORLD
        ranks = Ranks(rank, 2, torch.device("cpu"), world, None, world)
        towers = Towers(clip, Execution(parallel="fsdp", precision="bfloat16"), ranks)
        size, length = clip.model.visual.image_size[0], clip.model.context_length
        images, texts = torch.zeros(4, 3, size, size, dtype=torch.uint8), torch.ones(4, length, dtype=torch.int32)
        batch = Batch(images, texts, torch.arange(4))
        towers.backward(OpenCLIP(world), batch, BatchIndex.gathered(batch.index, world), None, 1, 0, 1.0)
        assert set(types) == {torch.float32}
    finally:
        dist.destroy_process_group()


@needs_shards
@pytest.mark.slow
def test_gradients_of_sharded_towers_add_up_in_float32(tmp_path):
    start_ranks(reduced_types, (str(tmp_path),), 2)


@pytest.mark.parametrize("given", ["float32", "bfloat16", "float16"])
def test_the_precision_is_the_one_that_is_given_or_the_usual_one_of_the_device(given):
    for device in ("cpu", "cuda"):
        assert precision_of(Execution(precision=given), torch.device(device)) == given
    assert precision_of(Execution(), torch.device("cpu")) == "float32"


@pytest.mark.gpu
def test_the_usual_precision_of_a_gpu_has_sixteen_bits():
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert precision_of(Execution(), torch.device("cuda")) == ("bfloat16" if native else "float16")
