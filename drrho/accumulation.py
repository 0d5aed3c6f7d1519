"""Steps of a batch whose graph does not fit in memory, for losses that compare all of its samples.

A contrastive loss is no sum over samples, so that gradients of parts of a batch do not add up to its own. GradCache
(Gao et al., 2021, arXiv:2101.06983) gets it from the chain rule instead: features of all chunks without a graph, one
loss over them, then each chunk's features once more, with a graph, and the loss's gradient in them as cotangent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn


class Valued(Protocol):
    """A loss with more to say than its value, such as a `drrho.contrastive.ContrastiveStep`."""

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
    gradient_scale: float = 1.0,
) -> Loss:
    """Add the gradient of ``loss(*features)``, features of all chunks together, to ``.grad``; return the loss's result.

    The gradient is that of one pass over the chunks, while at most one chunk's graph is held, beside features and
    their gradients. Chunks are encoded twice; one that is alone is encoded once, which is the usual step.

    Parameters
    ----------
    encode : callable
        From a chunk to a tuple of tensors: features ``[c, ...]``, which are joined along their first dimension in the
        order of chunks, and scalars that are the same for every chunk, such as CLIP's logit scale. open_clip's
        ``model(image, text)`` is one. Random numbers must come from torch's default generators.
    chunks : sequence
        At least one; they may differ in size.
    loss : callable
        From the joined features, and the scalars, to a scalar, or to anything with one as its ``value``. Called once.
    model : torch.nn.Module
        What ``encode`` runs. If it is wrapped in DistributedDataParallel or by ``fully_shard``, gradients are reduced
        over ranks once, with the last chunk.
    gradient_scale : float
        Multiplies every gradient. Wrappers average gradients over ranks, as if each rank had a loss of its own. The
        ranks' gradients of `drrho.contrastive.contrastive_risk` with a group are parts of one, to be summed: give the
        number of ranks. Parameters outside the model are yours to average.

    Returns
    -------
    Tensor or object
        What ``loss`` returned. No backward pass is left to do.

    Raises
    ------
    ValueError
        For no chunks, a scale out of range, outputs of ``encode`` that do not fit together, or a loss not a scalar.

    Notes
    -----
    Random numbers of both passes are equal, on the CPU and on the devices of the model; afterwards generators and
    buffers are as after one pass over the chunks and the loss. Batch normalization is over a chunk, not the batch, and
    its running statistics move once per chunk. Autocast of the caller holds in both passes and in the loss, not in
    backward passes.

    With DistributedDataParallel every parameter must be reached by outputs of ``encode``, as in any of its steps: the
    logit scale goes through them, not into ``loss`` from outside. Ranks may have different numbers of chunks, if all
    have one or all have more; with ``fully_shard``, whose forward passes communicate, they must have the same.

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
    >>> whole = torch.autograd.grad(loss(*encode(batch)).value, list(towers.parameters()))
    >>> all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(towers.parameters(), whole))
    True
    """
    if len(chunks) == 0:
        raise ValueError("chunks must hold at least one chunk, got none: cut the batch along its first dimension")
    if not 0 < gradient_scale < math.inf:
        raise ValueError(f"gradient_scale must be finite and > 0, got {gradient_scale}")
    if len(chunks) == 1:
        result = loss(*_encoded(encode, chunks[0]))
        _backward_of_loss(result, gradient_scale)
        return result

    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "cpu"}
    buffers, generators, outputs = _buffers(model), [], []
    with torch.no_grad():
        for chunk in chunks:
            generators.append(_generators(devices))
            outputs.append(_encoded(encode, chunk))
    features = _joined(outputs)
    sizes = [[len(part) if part.ndim else 0 for part in parts] for parts in zip(*outputs, strict=True)]
    del outputs
    torch.clear_autocast_cache()  # weights cast without a graph: torch before 2.10 would take them in the replay too
    result = loss(*features)
    _backward_of_loss(result, gradient_scale)

    after = _buffers(model), _generators(devices)
    cotangents = zip(*(_cut(feature, size) for feature, size in zip(features, sizes, strict=True)), strict=True)
    try:
        _set_buffers(model, buffers)
        for k, (chunk, state, parts) in enumerate(zip(chunks, generators, cotangents, strict=True)):
            _set_generators(state)
            with _reduction(model, wanted=k == len(chunks) - 1):
                outputs = zip(_encoded(encode, chunk), parts, strict=True)
                _backward([(out, part) for out, part in outputs if out.requires_grad and part is not None])
    finally:
        _set_buffers(model, after[0])
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
    """Return the outputs of all chunks together, as leaves of a new graph."""
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
                    f"output {i} of encode must have one shape for every chunk, but for the first dimension, "
                    f"got {list(one.shape)} for chunks[0] and {list(part.shape)} for chunks[{k}]"
                )
    joined = []
    for i, parts in enumerate(zip(*outputs, strict=True)):
        feature = torch.cat(parts) if parts[0].ndim else parts[-1].detach()
        if feature.ndim == 0 and not torch.allclose(torch.stack(parts), feature, rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"output {i} of encode is a scalar and must be the same for every chunk, got "
                f"{torch.stack(parts).tolist()}: return what depends on the chunk as features [c, ...]"
            )
        joined.append(feature.requires_grad_(feature.is_floating_point()))
    return joined


def _cut(feature: Tensor, sizes: list[int]) -> Sequence[Tensor | None]:
    """Return every chunk's part of the gradient; that of a scalar goes to the last chunk."""
    if feature.grad is None:
        return [None] * len(sizes)
    if feature.ndim == 0:
        return [None] * (len(sizes) - 1) + [feature.grad]
    return feature.grad.split(sizes)


def _backward_of_loss(result: Any, scale: float) -> None:
    value = result if isinstance(result, Tensor) else getattr(result, "value", None)
    if not isinstance(value, Tensor):
        raise ValueError(f"loss must return a scalar tensor, or have one as its value, got {type(result).__name__}")
    if value.numel() != 1:
        raise ValueError(f"loss must return a scalar, got shape {list(value.shape)}: take the mean over samples")
    _backward([(value, torch.full_like(value, scale))])


def _backward(cotangents: Sequence[tuple[Tensor, Tensor]]) -> None:
    if cotangents:
        tensors, gradients = zip(*cotangents, strict=True)
        # The caller's autocast must not reach into backward formulas: their types are those of the forward pass.
        with torch.autocast(tensors[0].device.type, enabled=False):
            torch.autograd.backward(tensors, gradients)


@contextmanager
def _reduction(model: Any, wanted: bool) -> Iterator[None]:
    """Reduce gradients over ranks in the backward passes inside, or not."""
    if wanted:
        yield
    elif hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def _buffers(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def _set_buffers(model: nn.Module, values: Sequence[Tensor]) -> None:
    """Set back the buffers that changed; a graph of the caller's may hold the others, which must not be written."""
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), values, strict=True):
            if not torch.equal(buffer, value):
                buffer.copy_(value)


_Generators = dict[torch.device, Tensor]


def _generators(devices: Iterable[torch.device]) -> _Generators:
    """Return the states of the default generators of the CPU and of other devices."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    return states | {device: torch.get_device_module(device).get_rng_state(device) for device in devices}


def _set_generators(states: _Generators) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
