"""Gradients of a batch whose graph does not fit in memory, for losses that compare all of its samples.

A contrastive loss is not a sum over samples, so the gradients of parts of a batch do not add up to that of the batch.
GradCache (Gao et al., 2021, arXiv:2101.06983) uses the chain rule instead: it computes the features of all chunks
without a graph, one loss over all features, and then the features of each chunk again with a graph, through which it
propagates the loss's gradient with respect to these features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from drrho.validation import checks_are_deferred

__all__ = ["accumulate"]


class Valued(Protocol):
    """A loss that returns more than its value, such as a `drrho.contrastive.ContrastiveStep`."""

    @property
    def value(self) -> Tensor:
        """The scalar to minimize."""
        ...


Chunk = TypeVar("Chunk")
Loss = TypeVar("Loss", bound="Tensor | Valued")


def accumulate(
    encode: Callable[[Chunk], Sequence[Tensor]],
    chunks: Sequence[Chunk],
    loss: Callable[..., Loss],
    *,
    model: nn.Module,
    gradient_scale: float | Tensor = 1.0,
) -> Loss:
    """Add the gradient of ``loss(*features)`` over the features of all chunks to ``.grad``; return the loss's result.

    The gradient is that of one pass over the batch, but memory holds the graph of only one chunk at a time, besides
    the features and their gradients. Chunks are encoded twice; a single chunk is encoded once, as in a usual step.

    Parameters
    ----------
    encode : callable
        Maps a chunk to a tuple of tensors: features ``[c, ...]``, which are concatenated along their first dimension in
        the order of chunks, and scalars that are the same for every chunk, such as CLIP's logit scale. open_clip's
        ``model(image, text)`` is an example. Random numbers must come from torch's default generators.
    chunks : sequence
        At least one; they may differ in size.
    loss : callable
        Maps the concatenated features and the scalars to a scalar, or to an object whose ``value`` is one. It is
        called once.
    model : torch.nn.Module
        The model that ``encode`` runs. If it is wrapped in DistributedDataParallel or by ``fully_shard``, gradients are
        reduced over ranks once, with the last chunk.
    gradient_scale : float or scalar tensor
        Factor of every gradient. Wrappers average gradients over ranks, as if each rank had its own loss. The gradients
        of `drrho.contrastive.contrastive_risk` with a group have to be summed over ranks instead: pass the number of
        ranks. Gradients of parameters outside the model are not reduced.

    Returns
    -------
    Tensor or object
        The result of ``loss``, after its backward pass.

    Raises
    ------
    ValueError
        For no chunks, a scale out of range, outputs of ``encode`` that do not fit together, or a loss that is not a
        scalar.

    Notes
    -----
    Both passes use the same random numbers, on the CPU and on the devices of the model; afterwards generators and
    buffers are in the state that one pass over the chunks and the loss leaves. Batch normalization is over a chunk,
    not the batch, and its running statistics are updated once per chunk. The caller's autocast applies to both passes
    and to the loss, not to backward passes.

    With DistributedDataParallel the outputs of ``encode`` must depend on every parameter, as in any of its steps: the
    logit scale must be one of them, not an input of ``loss`` from outside. Ranks may have different numbers of chunks
    if all have one or all have more; with ``fully_shard``, whose forward passes communicate, the numbers must be equal.

    Examples
    --------
    >>> from torch.nn.functional import normalize
    >>> from drrho.contrastive import contrastive_risk
    >>> _ = torch.manual_seed(0)
    >>> towers = nn.ModuleList([nn.Linear(6, 3), nn.Linear(4, 3)])
    >>> batch = torch.randn(32, 6), torch.randn(32, 4)
    >>> def encode(chunk):
    ...     return tuple(normalize(tower(part), dim=-1) for tower, part in zip(towers, chunk))
    >>> def loss(image, text):
    ...     return contrastive_risk(image, text, 0.1)
    >>> chunks = list(zip(*(part.split(10) for part in batch)))
    >>> step = accumulate(encode, chunks, loss, model=towers)
    >>> expected = torch.autograd.grad(loss(*encode(batch)).value, list(towers.parameters()))
    >>> all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(towers.parameters(), expected))
    True
    """
    if len(chunks) == 0:
        raise ValueError("chunks must hold at least one chunk, got none: cut the batch along its first dimension")
    if not isinstance(gradient_scale, Tensor) and not 0 < gradient_scale < math.inf:
        raise ValueError(f"gradient_scale must be finite and > 0, got {gradient_scale}")
    if len(chunks) == 1:
        result = loss(*_encoded(encode, chunks[0]))
        _backward_of_loss(result, gradient_scale)
        return result

    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "cpu"}
    buffers, versions, generators, outputs = _buffers(model), _versions(model), [], []
    with torch.no_grad():
        for chunk in chunks:
            generators.append(_generators(devices))
            outputs.append(_encoded(encode, chunk))
    features = _joined(outputs)
    sizes = [[len(part) if part.ndim else 0 for part in parts] for parts in zip(*outputs, strict=True)]
    del outputs
    torch.clear_autocast_cache()  # torch before 2.10 would reuse weights that were cast without a graph
    result = loss(*features)
    _backward_of_loss(result, gradient_scale)

    after = _buffers(model), _generators(devices)
    changed = _changed(model, buffers, versions)
    cotangents = zip(*(_cut(feature, size) for feature, size in zip(features, sizes, strict=True)), strict=True)
    try:
        _set_buffers(changed, buffers)
        for k, (chunk, state, parts) in enumerate(zip(chunks, generators, cotangents, strict=True)):
            _set_generators(state)
            with _reduction(model, wanted=k == len(chunks) - 1):
                outputs = zip(_encoded(encode, chunk), parts, strict=True)
                _backward([(out, part) for out, part in outputs if out.requires_grad and part is not None])
    finally:
        _set_buffers(changed, after[0])
        _set_generators(after[1])
    return result


def _encoded(encode: Callable[[Chunk], Sequence[Tensor]], chunk: Chunk) -> tuple[Tensor, ...]:
    outputs = encode(chunk)
    if not isinstance(outputs, (tuple, list)):
        raise ValueError(f"encode must return a tuple of tensors, got {type(outputs).__name__}")
    if not outputs or not all(isinstance(output, Tensor) for output in outputs):
        kinds = ", ".join(type(output).__name__ for output in outputs)
        raise ValueError(f"encode must return a tuple of tensors, got ({kinds})")
    return tuple(outputs)


def _joined(outputs: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Concatenate the outputs of all chunks into leaves of a new graph."""
    first = outputs[0]
    for k, parts in enumerate(outputs):
        if len(parts) != len(first):
            raise ValueError(
                "encode must return the same number of tensors for every chunk, "
                f"got {len(first)} for chunks[0] and {len(parts)} for chunks[{k}]"
            )
        for i, (one, part) in enumerate(zip(first, parts, strict=True)):
            if part.ndim != one.ndim or part.shape[1:] != one.shape[1:]:
                raise ValueError(
                    f"output {i} of encode must have one shape for every chunk, except for the first dimension, "
                    f"got {list(one.shape)} for chunks[0] and {list(part.shape)} for chunks[{k}]"
                )
    joined = []
    for i, parts in enumerate(zip(*outputs, strict=True)):
        feature = torch.cat(parts) if parts[0].ndim else parts[-1].detach()
        if feature.ndim == 0 and not checks_are_deferred() and not _are_equal(parts):
            raise ValueError(
                f"output {i} of encode is a scalar and must be the same for every chunk, got "
                f"{torch.stack(parts).tolist()}: return what depends on the chunk as features [c, ...]"
            )
        joined.append(feature.requires_grad_(feature.is_floating_point()))
    return joined


def _are_equal(numbers: Sequence[Tensor]) -> bool:
    return torch.allclose(torch.stack(list(numbers)), numbers[-1].detach(), rtol=0, atol=0, equal_nan=True)


def _cut(feature: Tensor, sizes: list[int]) -> Sequence[Tensor | None]:
    """Split the gradient into those of the chunks; the gradient of a scalar goes to the last chunk."""
    if feature.grad is None:
        return [None] * len(sizes)
    if feature.ndim == 0:
        return [None] * (len(sizes) - 1) + [feature.grad]
    return feature.grad.split(sizes)


def _backward_of_loss(result: object, scale: float | Tensor) -> None:
    value = result if isinstance(result, Tensor) else getattr(result, "value", None)
    if not isinstance(value, Tensor):
        raise ValueError(f"loss must return a scalar tensor, or have one as its value, got {type(result).__name__}")
    if value.numel() != 1:
        raise ValueError(f"loss must return a scalar, got shape {list(value.shape)}: take the mean over samples")
    _backward([(value, torch.ones_like(value) * scale)])


def _backward(cotangents: Sequence[tuple[Tensor, Tensor]]) -> None:
    if cotangents:
        tensors, gradients = zip(*cotangents, strict=True)
        # The caller's autocast must not apply to backward formulas, whose types are those of the forward pass.
        with torch.autocast(tensors[0].device.type, enabled=False):
            torch.autograd.backward(tensors, gradients)


@runtime_checkable
class _WithoutSync(Protocol):
    """A wrapper such as DistributedDataParallel."""

    def no_sync(self) -> AbstractContextManager[None]: ...


@runtime_checkable
class _WithSyncSwitch(Protocol):
    """A module to which ``fully_shard`` was applied."""

    def set_requires_gradient_sync(self, requires_gradient_sync: bool) -> None: ...


@contextmanager
def _reduction(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let the backward passes inside reduce gradients over ranks only if ``wanted``."""
    if wanted:
        yield
    elif isinstance(model, _WithoutSync):
        with model.no_sync():
            yield
    elif isinstance(model, _WithSyncSwitch):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def _buffers(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def _versions(model: nn.Module) -> list[int]:
    return [_version(buffer) for buffer in model.buffers()]


def _version(buffer: Tensor) -> int:
    return -1 if buffer.is_inference() else buffer._version  # of tensors of inference mode, none is counted


def _changed(model: nn.Module, values: Sequence[Tensor], versions: Sequence[int]) -> list[Tensor | None]:
    """Return the buffers that differ from earlier values, None for others; values are read once, where they may differ.

    The others must not be written, since a graph of the caller may hold them. Masks and other constants, which are no
    part of a model's state, are compared only if an operation of Python's has written them: then a model that has
    nothing else does not wait for its device.
    """
    buffers = list(model.buffers())
    constant = {
        id(module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
    }
    found: list[Tensor | None] = [None] * len(buffers)
    doubtful = [
        k
        for k, (buffer, version) in enumerate(zip(buffers, versions, strict=True))
        if id(buffer) not in constant or version < 0 or buffer._version != version
    ]
    if doubtful:
        differ = [(buffers[k] != values[k]).any().to(buffers[doubtful[0]].device) for k in doubtful]
        for k, flag in zip(doubtful, torch.stack(differ).tolist(), strict=True):
            found[k] = buffers[k] if flag else None
    return found


@torch.no_grad()
def _set_buffers(changed: Sequence[Tensor | None], values: Sequence[Tensor]) -> None:
    for buffer, value in zip(changed, values, strict=True):
        if buffer is not None:
            buffer.copy_(value)


_Generators = dict[torch.device, Tensor]


def _generators(devices: Iterable[torch.device]) -> _Generators:
    """Return the states of the default generators of the CPU and of the given devices."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    return states | {device: torch.get_device_module(device).get_rng_state(device) for device in devices}


def _set_generators(states: _Generators) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
