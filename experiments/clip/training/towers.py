"""The model's towers as they run: on a device, in a precision, compiled, replicated or sharded over ranks."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from drrho.accumulation import accumulate
from drrho.routes import BatchIndex
from drrho.selection import PairFeatures

from ..data.batch import Batch, HeldOut
from ..distributed import Ranks
from ..errors import UserError
from ..models.clip import Clip
from .methods import Features, Head, Method, MethodLoss
from .options import Execution, TowerPrecision

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def precision_of(execution: Execution, device: torch.device) -> TowerPrecision:
    """Return the precision of the towers on a device: the one that was asked for, or the usual one there."""
    if execution.precision is not None:
        return execution.precision
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


class _Part(NamedTuple):
    """Images and tokens of some of a batch's pairs, and the number of rows to give to the towers."""

    image: Tensor
    text: Tensor
    rows: int


class Towers:
    """The model as it runs; every rank has one.

    ``learns`` is whether it is trained; a model that is not runs in evaluation mode.
    """

    def __init__(self, clip: Clip, execution: Execution, ranks: Ranks, *, learns: bool = True) -> None:
        model = clip.model.to(ranks.device)
        if execution.use_bn_sync and learns:
            synchronize_batch_norm(model, ranks)
        model.train(learns)
        self._clip, self._ranks, self._dtype = clip, ranks, _DTYPES[precision_of(execution, ranks.device)]
        # Statistics over a batch must not count rows that only fill it up.
        self._may_pad = not any(isinstance(module, _BatchNorm) for module in model.modules())
        if execution.activation_checkpointing and learns:
            model.set_grad_checkpointing()
        self._compiled, self._in_graphs = bool(execution.compile), execution.compile == "reduce-overhead"
        if execution.compile:
            # In place: names of parameters stay what they are.
            model.compile(mode="reduce-overhead" if self._in_graphs else None)
        self.model: torch.nn.Module = model
        if ranks.group is not None and execution.parallel == "fsdp":
            refuse_without_events(ranks.device)
            # Gradients of many ranks add up in float32, whatever the towers run in.
            policy = MixedPrecisionPolicy(None if self._dtype == torch.float32 else self._dtype, torch.float32)
            # Before the hooks of sharding, which free the memory of parameters after the forward pass.
            model.register_forward_hook(_without_parameters)
            for block in repeated_blocks(model):
                fully_shard(block, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
            for method in ("encode_image", "encode_text"):  # which evaluation calls instead of forward
                register_fsdp_forward_method(model, method)
        elif ranks.group is not None and learns:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            # Buffers that no checkpoint holds are constants, which would be broadcast in every forward pass.
            constants = [name for name, _ in model.named_buffers() if name not in model.state_dict()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, constants)
            self.model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def autocast(self) -> torch.autocast:
        """Return the context in which towers run."""
        return torch.autocast(self._ranks.device.type, self._dtype, enabled=self._dtype != torch.float32)

    def backward(
        self,
        method: Method,
        batch: Batch,
        samples: BatchIndex,
        reference: Features | None,
        parts: int,
        epoch: int,
        scale: float | Tensor,
    ) -> tuple[MethodLoss, Features]:
        """Return the batch's loss and features, after a backward pass of ``scale`` times the loss.

        The gradient is in the parameters; DistributedDataParallel and FSDP2 average it over ranks. ``samples`` are
        those of all ranks' batches.
        """
        kept: list[Tensor] = []

        def loss(image: Tensor, text: Tensor, *head: Tensor) -> MethodLoss:
            kept[:] = image.detach(), text.detach()
            return method.loss((image, text), samples, Head(*head), epoch, reference)

        with self.autocast():
            chunks = self._chunks(batch, samples, parts)
            found = accumulate(self._encode, chunks, loss, model=self.model, gradient_scale=scale)
        return found, (kept[0], kept[1])

    @torch.no_grad()
    def features(self, batch: Batch, samples: BatchIndex, parts: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the batch's features without a graph, of images and of texts, and the numbers of the model's head."""
        with self.autocast():
            encoded = [self._encode(chunk) for chunk in self._chunks(batch, samples, parts)]
        images, texts, *heads = zip(*encoded, strict=True)
        return torch.cat(images), torch.cat(texts), [numbers[-1] for numbers in heads]

    def features_as_evaluated(self, held_out: HeldOut) -> Features:
        """Return the features of held-out pairs in evaluation mode, in float32; every rank computes all of them."""
        clip, learns = self._clip, self._clip.model.training
        clip.model.eval()
        with self.autocast():
            found = clip.features_in_parts(held_out.image, held_out.text)
        clip.model.train(learns)
        return found

    def pairs(self, method: Method, batch: Batch, samples: BatchIndex, parts: int) -> tuple[PairFeatures, Tensor]:
        """Return the batch's features without a graph, as in training, and how the method compares them.

        Second comes how many ranks have features that are not finite, a scalar on the device.
        """
        image, text, head = self.features(batch, samples, parts)
        wrong = self._ranks.sum(are_not_finite(image, text, *head))
        return PairFeatures(image, text, *method.logits_at(Head(*head))), wrong

    def _chunks(self, batch: Batch, samples: BatchIndex, parts: int) -> list[_Part]:
        """Cut a batch into parts, as many on every rank, whose towers meet in each; some may be empty."""
        parts = min(parts, max(1, *samples.counts))
        rows = -(-batch.size // parts) if self._may_pad else 0
        pairs = zip(batch.image.tensor_split(parts), batch.text.tensor_split(parts), strict=True)
        # Statistics over one image are those over it twice, and where it is one pixel there are none without.
        least = 1 if self._may_pad else 2
        return [_Part(image, text, max(least, rows)) for image, text in pairs]

    def _encode(self, part: _Part) -> list[Tensor]:
        inputs = self._clip.prepared(part.image), self._clip.prepared_tokens(part.text)
        inputs = [_filled_up(each, part.rows) for each in inputs]
        if self._compiled and part.rows == 1:  # they may have any number of rows
            for each in inputs:
                torch._dynamo.maybe_mark_dynamic(each, 0)
        if self._in_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        image, text, *head = self.model(*inputs)
        count = len(part.image)  # 0 where a rank's samples were all skipped, or none chosen
        found = [image[:count], text[:count], *(number.reshape(()) for number in head)]
        # What a graph has returned is written over when it is replayed.
        return [each.clone() for each in found] if self._in_graphs else found


def are_not_finite(*features: Tensor) -> Tensor:
    """Return 1 if some of the features, or their sum, are not finite, else 0: a scalar on the device."""
    return (~torch.isfinite(torch.stack([part.sum() for part in features]))).any().double()


def _filled_up(inputs: Tensor, rows: int) -> Tensor:
    """Return inputs ``[b, ...]`` with the first repeated at their end, up to so many rows; zeros if there is none."""
    lacking = rows - len(inputs)
    if lacking <= 0:
        return inputs
    more = inputs[:1] if len(inputs) else inputs.new_zeros(1, *inputs.shape[1:])
    return torch.cat([inputs, more.expand(lacking, *inputs.shape[1:])])


def repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the blocks that a model repeats, each before the ones that it is part of; FSDP gathers one at a time.

    They are what its `ModuleList` and `Sequential` hold several of: modules of one class that consist of others and
    have at least a thousandth of the parameters.
    """
    least = sum(parameter.numel() for parameter in model.parameters()) / 1000
    found: set[torch.nn.Module] = set()
    for group in model.modules():
        if isinstance(group, torch.nn.ModuleList | torch.nn.Sequential):
            kinds = Counter(map(type, group))
            found |= {each for each in group if kinds[type(each)] > 1 and _is_composed(each, least)}
    return [module for module in reversed(list(model.modules())) if module in found]


def _is_composed(module: torch.nn.Module, least: float) -> bool:
    size = sum(parameter.numel() for parameter in module.parameters())
    return size >= least and next(module.children(), None) is not None


def _without_parameters(module: torch.nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a model's outputs with copies of those that are parameters, as open_clip's logit bias is."""
    return tuple(each.clone() if isinstance(each, torch.nn.Parameter) else each for each in outputs)


def synchronize_batch_norm(model: torch.nn.Module, ranks: Ranks) -> None:
    """Normalize batches over all ranks, in place; one rank stays as it is."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError("--use-bn-sync has no part in this run: the model has no batch normalization")
    if ranks.group is None:
        return
    if ranks.device.type != "cuda":
        raise UserError("--use-bn-sync needs a GPU for each rank: leave it out")
    # torch's own conversion would lose the activations in timm's normalizations.
    from timm.layers.norm_act import convert_sync_batchnorm

    convert_sync_batchnorm(model, ranks.group)


def refuse_without_events(device: torch.device) -> None:
    """Raise a `UserError` where torch shards nothing on the CPU: torch 2.6 lacks what FSDP2 waits by."""
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise UserError(
            f"--parallel fsdp needs a newer torch on the CPU than {torch.__version__}, whose CPU streams have no "
            "events: upgrade torch, or give --parallel ddp"
        )


def choose_head(model: torch.nn.Module, method: Method) -> None:
    """Let the logit scale and bias learn only where the loss depends on them: ranks wait for the gradient of each."""
    for name, parameter in model.named_parameters(recurse=False):
        if name in ("logit_scale", "logit_bias"):
            parameter.requires_grad_(method.learns_scale if name == "logit_scale" else method.learns_bias)


@torch.no_grad()
def hold_scale(model: torch.nn.Module, method: Method, wanted: Tensor) -> None:
    """Keep a learned logit scale in [1, 100], as open_clip does after each step; or set it to the method's own.

    It stays as it is unless ``wanted``, a boolean on the device: after a step that was not taken.
    """
    scale = model.get_parameter("logit_scale")
    scale = scale.to_local() if isinstance(scale, DTensor) else scale
    if method.learns_scale:
        scale.copy_(torch.where(wanted, scale.clamp(0, math.log(100)), scale))
    elif (temperature := method.learned_temperature()) is not None:
        scale.copy_(torch.where(wanted, -temperature.log().expand_as(scale), scale))


def clipped_norm(model: torch.nn.Module, limit: float | None) -> Tensor:
    """Return the gradient's norm, a scalar on the device; scale the gradient down to ``limit`` where it is larger."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # pyright: ignore[reportArgumentType]
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return full_tensor(norm)


def full_tensor(value: Tensor) -> Tensor:
    """Return a sharded tensor in full, on every rank."""
    return value.full_tensor() if isinstance(value, DTensor) else value
