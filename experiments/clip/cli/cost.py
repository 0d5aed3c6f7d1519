"""What one pair costs a model: operations, and bytes that are kept for the backward pass in the precision that is used.

Nothing is computed and no weights are made: the model runs on tensors without contents, as torch's own counter of
operations sees them, on a device that need not be there; what the backward pass keeps is what autograd saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ..models.clip import new_model
from ..training.options import TowerPrecision
from ..training.towers import repeated_blocks

_FEW, _MORE = 2, 4  # pairs, of which the difference is per pair and the rest is not
# Tensors without contents are said to be on the CPU: where CUDA has no driver, a torch that was built for it ends the
# process as soon as a tensor of a GPU takes part in autograd (2.6 to 2.9 do).
_DEVICE = "cpu"


class Cost(NamedTuple):
    """Cost of one pair through both towers, and of the model.

    Attributes
    ----------
    parameters : int
        Of the model.
    flops : int
        Operations of a forward pass.
    kept_bytes : int
        What is kept of a pair for the backward pass.
    block_bytes : int
        What is kept in addition of the block that is computed again, where blocks keep their inputs alone.
    cast_bytes : int
        Copies of the weights in the precision of the towers, which are kept during a step.
    gathered_parameters : int
        How many parameters a rank has in full at a time where they are sharded over ranks.
    width : int
        Of the features.
    pair_bytes : int
        Size of an image in bytes and of its tokens and index, as workers give them.
    """

    parameters: int
    flops: int
    kept_bytes: int
    block_bytes: int
    cast_bytes: int
    gathered_parameters: int
    width: int
    pair_bytes: int


def cost_of(
    name: str,
    *,
    checkpointing: bool = False,
    precision: TowerPrecision = "float32",
    device: str = "cuda",
    **options: Any,
) -> Cost:
    """Count one pair through a registered open_clip model.

    Parameters
    ----------
    name : str
        As open_clip registers it.
    checkpointing : bool
        Whether blocks keep their inputs alone.
    precision : str
        That of the towers, by autocast.
    device : "cuda" or "cpu"
        Where they run: autocast computes normalizations of a layer in float32 on a GPU. It need not be there.
    options
        As for `models.clip.new_model`.
    """
    with torch.device("meta"):
        model = new_model(name, 0, device="meta", **options).model
    run = _Run(model, device, precision)
    few, more = run.kept(_FEW), run.kept(_MORE)
    per_pair, block = ((b - a) // (_MORE - _FEW) for a, b in zip(few[:2], more[:2], strict=True))
    kept = per_pair
    if checkpointing:
        # The copies of weights stay in autocast's cache all the same.
        inputs, inputs_of_more = (run.kept(pairs, checkpointing=True).total for pairs in (_FEW, _MORE))
        kept = (inputs_of_more - inputs) // (_MORE - _FEW)
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=few.flops // _FEW,
        kept_bytes=kept,
        block_bytes=block if kept < per_pair else 0,
        cast_bytes=max(0, few.total - _FEW * per_pair),
        gathered_parameters=_gathered_parameters(model),
        width=few.width,
        pair_bytes=run.pair_bytes,
    )


class _Kept(NamedTuple):
    """Bytes that a forward pass keeps for the backward pass, in all and in the block that keeps most; operations."""

    total: int
    largest_block: int
    flops: int
    width: int


class _Run:
    """Runs a model on tensors without contents."""

    def __init__(self, model: torch.nn.Module, device: str, precision: TowerPrecision) -> None:
        self._model, self._as_on_gpu = model, device == "cuda"
        self._dtype: torch.dtype = getattr(torch, precision)
        size = open_clip.get_model_preprocess_cfg(model)["size"]  # pyright: ignore[reportArgumentType]
        height, width = size if isinstance(size, tuple | list) else (size, size)
        self._image, self._text = (3, height, width), (int(model.context_length),)  # pyright: ignore[reportArgumentType]
        self.pair_bytes = 3 * height * width + 4 * self._text[0] + 8
        self._mode = FakeTensorMode()
        with self._mode:
            for module in model.modules():
                for key, value in module._parameters.items():
                    if value is not None:
                        module._parameters[key] = torch.nn.Parameter(self._empty(value), value.requires_grad)
                for key, value in module._buffers.items():
                    if value is not None:
                        module._buffers[key] = self._empty(value)

    def _empty(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=_DEVICE)

    def kept(self, pairs: int, *, checkpointing: bool = False) -> _Kept:
        """Run so many pairs through both towers."""
        self._model.set_grad_checkpointing(checkpointing)  # pyright: ignore[reportCallIssue]
        saved = _Saved(self._model)
        counter = FlopCounterMode(display=False)
        with self._mode:
            image = torch.empty(pairs, *self._image, device=_DEVICE)
            text = torch.zeros(pairs, *self._text, dtype=torch.int64, device=_DEVICE)
            in_float32 = self._as_on_gpu and self._dtype != torch.float32
            with _autocast(self._dtype), _fused_attention(), _gpu_autocast(in_float32), counter, saved.counting():
                features = self._model(image, text)[0]
        return _Kept(saved.total, saved.largest_block, counter.get_total_flops(), features.shape[1])


class _Saved:
    """Counts the memory of tensors that autograd saves, each once, without the model's own."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.total = self.largest_block = 0
        self._model = model
        self._own = {_place(each) for each in (*model.parameters(), *model.buffers())}
        self._held: dict[int, Tensor] = {}  # so that no other tensor gets its place

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved in the block."""
        hooks = [hook for block in _blocks(self._model) for hook in self._around(block)]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _around(self, block: torch.nn.Module) -> list[Any]:
        entered: list[int] = []

        def leave(*_: object) -> None:
            self.largest_block = max(self.largest_block, self.total - entered.pop())

        before = block.register_forward_pre_hook(lambda *_: entered.append(self.total))
        return [before, block.register_forward_hook(leave)]

    def _pack(self, tensor: Tensor) -> Tensor:
        place = _place(tensor)
        if place not in self._own and place not in self._held:
            self._held[place] = tensor
            self.total += tensor.untyped_storage().nbytes()
        return tensor


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the model's repeated blocks that no other such block is part of."""
    blocks = repeated_blocks(model)
    return [block for block in blocks if sum(part in block.modules() for part in blocks) == 1]


def _gathered_parameters(model: torch.nn.Module) -> int:
    """Return how many parameters a rank has in full at a time where they are sharded.

    They are those of two blocks, since the next one is gathered while one runs, and what is in no block.
    """
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in _blocks(model)]
    in_blocks = {id(parameter) for block in _blocks(model) for parameter in block.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in in_blocks)
    return outside + sum(sorted(sizes)[-2:])


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocast to any type; `torch.autocast` has its own opinion of those of a CPU."""
    device = _DEVICE
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled(device, dtype != torch.float32)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.set_autocast_cache_enabled(before[2])


#: Of the functions that autocast computes in float32 on a GPU, and not on a CPU, those that towers use.
_IN_FLOAT32 = ("layer_norm", "group_norm", "softmax", "log_softmax")


@contextmanager
def _gpu_autocast(in_float32: bool) -> Iterator[None]:
    """Compute in float32 what autocast on a GPU does, if it is to be so."""
    plain = {name: getattr(functional, name) for name in _IN_FLOAT32 if in_float32}

    def widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda given, *others, **options: function(given.float(), *others, **options)

    for name, function in plain.items():
        setattr(functional, name, widened(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(functional, name, function)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Count attention by the kernel that devices use: without contents torch takes one that keeps the whole matrix."""
    plain = functional.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa or query.ndim != 4:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if torch.is_autocast_enabled(_DEVICE):
            query, key, value = (each.to(torch.get_autocast_dtype(_DEVICE)) for each in (query, key, value))
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )
        return found[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain
