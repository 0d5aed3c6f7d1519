"""What public functions accept: conversion to tensors, and errors that name argument, value and remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from drrho.ranks import Group

__all__ = ["deferred_checks"]

#: What is accepted as losses: a tensor, an array, or numbers in nested sequences.
ArrayLike: TypeAlias = "Tensor | np.ndarray | float | Sequence[ArrayLike]"


_ROUNDING = 4 * torch.finfo(torch.float64).eps  # by which a sum may miss one
_NUMBER = float | int  # made once: it takes as long as what it is asked for


def as_numbers(values: ArrayLike, name: str) -> Tensor:
    """Return numbers as a tensor: a real tensor as it is, with its graph; all else as a new one, float64.

    Arrays may have any strides, byte order and real type.

    Raises
    ------
    TypeError
        For complex numbers, for a sparse or nested tensor, for a masked array that hides some of its entries, for text
        and times, and for what is not numbers.
    """
    if isinstance(values, Tensor):
        if values.is_complex():
            raise TypeError(f"{name} must be real, got {values.dtype}: pass .real, or a norm")
        if values.layout is not torch.strided:
            raise TypeError(f"{name} must be dense, got {values.layout}: pass .to_dense(), or .to_padded_tensor(...)")
        return values
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise TypeError(
            f"{name} must not be a masked array, got one that hides {np.ma.count_masked(values)} of {values.size} "
            "entries: pass .compressed(), or give what is hidden the base weight 0"
        )
    try:
        array = np.asarray(values)
        if np.iscomplexobj(array):
            raise TypeError(f"{name} must be real, got {array.dtype}: pass .real, or a norm")
        if array.dtype.kind in "USMm":  # NumPy would read numbers out of text and of times
            raise TypeError(f"{name} must be numbers, got {array.dtype}: convert it first")
        return torch.from_numpy(np.array(array, dtype=np.float64, order="C"))
    except (TypeError, ValueError, RuntimeError) as error:
        if str(error).startswith(name):
            raise
        raise TypeError(f"{name} must be a tensor, an array or a sequence of numbers, got {values!r}") from error


def as_index(values: ArrayLike, name: str) -> Tensor:
    """Return integers ``[b]`` as a tensor; an empty sequence is one of integers.

    Raises
    ------
    ValueError
        For another shape, or for what is not integers.
    """
    if not isinstance(values, Tensor):
        try:
            array = np.asarray(values)
            array = array.astype(np.int64) if array.shape == (0,) or array.dtype.kind in "iu" else array
            values = torch.from_numpy(np.array(array, order="C"))
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name} must have shape [b] and an integer dtype, got {values!r}") from None
    if values.ndim != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(
            f"{name} must have shape [b] and an integer dtype, got {list(values.shape)} and {values.dtype}"
        )
    return values


def entries(values: Tensor, index: ArrayLike, name: str) -> Tensor:
    """Return the entries ``index`` ``[b]`` of ``values`` ``[n]``, which are called ``name``.

    Raises
    ------
    ValueError
        For an index that is no integers ``[b]``, or outside ``[0, n)``: a negative one does not count from the end.
    """
    rows = as_index(index, "index").to(torch.int64)
    outside = (rows < 0) | (rows >= len(values))
    if outside.any():
        raise ValueError(f"index must lie in [0, {len(values)}), got {rows[outside][0]}: {name} is of other data")
    return values[rows.to(values.device)]


def as_losses(values: ArrayLike, name: str, *, finite: bool = True) -> Tensor:
    """Return ``values`` as a floating tensor ``[..., n]`` with ``n >= 1``; with ``finite``, check every entry.

    Tensors keep dtype, device and graph; NumPy arrays and sequences become float64.

    Raises
    ------
    TypeError
        For an integer or boolean tensor, as the caller decides which floating type to convert to; for complex numbers
        and masked arrays.
    ValueError
        For a scalar, an empty last dimension, or a NaN or infinite entry.
    """
    losses = as_numbers(values, name)
    if not losses.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {losses.dtype}: call .float() or .double()")
    if losses.ndim == 0 or losses.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., n] with n >= 1, got {list(losses.shape)}")
    if finite:
        refuse_not_finite(losses, name)
    return losses


def refuse_not_finite(losses: Tensor, name: str) -> None:
    """Raise a ``ValueError`` with the position of the first NaN or infinity, if the values may be read."""
    if losses.numel() > 0 and values_are_readable():
        low, high = (extreme.item() for extreme in torch.aminmax(losses.detach()))
        if not math.isfinite(low) or not math.isfinite(high):
            where = (~torch.isfinite(losses)).nonzero()[0].tolist()
            raise ValueError(f"{name} must be finite, got {losses[tuple(where)].item()} at index {where}")


_deferrals = 0  # how many `deferred_checks` are active; of all threads, as backward passes run on some of their own


@contextmanager
def deferred_checks() -> Iterator[None]:
    """Do not read values of tensors in the block: what is invalid gives NaN in the result instead of an exception.

    Reading a value waits for the device. In the block, `drrho.contrastive.contrastive_risk` and what else a training
    step calls put their work on the device and return; NaN or infinite features, or a temperature out of range, make
    the value and the fields that depend on it NaN, so that one check of the value serves for all. Shapes, dtypes and
    plain numbers, which the host knows, are checked as ever. The block counts for all threads of the process.

    Examples
    --------
    >>> import torch
    >>> from drrho.contrastive import contrastive_risk
    >>> with deferred_checks():
    ...     contrastive_risk(torch.eye(2), torch.eye(2), torch.tensor(-1.0)).value
    tensor(nan)
    """
    global _deferrals
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1


def checks_are_deferred() -> bool:
    """Whether what is invalid gives NaN: in a block of `deferred_checks`, and while a CUDA graph is captured."""
    return _deferrals > 0 or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def values_are_readable() -> bool:
    """Whether Python may read values.

    It may not while a graph is compiled, inside a ``torch.func`` transform, nor where `checks_are_deferred`.
    """
    return not torch.compiler.is_compiling() and not transforms_active() and not checks_are_deferred()


#: Whether a ``torch.func`` transform is running; torch has no public function for this.
transforms_active = torch._C._are_functorch_transforms_active  # pyright: ignore[reportAttributeAccessIssue]


def refuse(refused: Tensor, values: Tensor, message: str) -> None:
    """Raise ``ValueError(message)`` with the first refused value, if there is one.

    A compiled graph asserts instead. Where `checks_are_deferred` nothing happens: the caller makes the result NaN.
    """
    if torch.compiler.is_compiling():
        constant = message.partition(", got")[0]  # a graph cannot put the value in
        torch._assert_async(~refused.any(), constant)  # pyright: ignore[reportPrivateImportUsage]
    elif not checks_are_deferred() and bool(refused.any()):
        raise ValueError(message.format(values[refused].flatten()[0].item()))


class Checks:
    """Checks of values that are read together, so that a call waits for the device once.

    `refuse` notes a check; `close` raises the error of the first that failed, as one check after the other would.
    Where `checks_are_deferred` nothing is read: `close` makes NaN of the tensors that it is given, if a check failed.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, Tensor, str]] = []

    def refuse(self, refused: Tensor, values: Tensor, message: str) -> None:
        """Note that values are refused where a mask of their shape is true: ``{}`` in the message is the first."""
        self._noted.append((refused, values, message))

    def close(self, *results: Tensor) -> tuple[Tensor, ...]:
        """Return the results; if a check failed, raise a ``ValueError``, or where deferred, return NaN."""
        noted, self._noted = self._noted, []
        if not noted:
            return results
        failed = torch.stack([refused.any() for refused, *_ in noted])
        if checks_are_deferred():
            has_failed = failed.any()
            return tuple(torch.where(has_failed, torch.nan, result) for result in results)
        for has_failed, (refused, values, message) in zip(failed.tolist(), noted, strict=True):
            if has_failed:
                raise ValueError(message.format(values[refused].flatten()[0].item()))
        return results


def as_row(values: ArrayLike, name: str) -> Tensor:
    """Return losses ``[n]`` as `as_losses` does.

    Raises
    ------
    ValueError
        If they are not one row of finite numbers.
    """
    row = as_losses(values, name)
    if row.ndim != 1:
        raise ValueError(f"{name} must have shape [n], one loss per sample, got {list(row.shape)}")
    return row


def as_parameter(value: ArrayLike, name: str, meaning: str, losses: Tensor) -> Tensor:
    """Return a radius, strength or tail fraction as a float64 tensor, one number per row of ``losses``.

    A number or anything that broadcasts to ``losses.shape[:-1]`` is accepted; a tensor keeps its graph. The entries
    of an array or tensor are checked where they are used.

    Raises
    ------
    ValueError
        If the shape does not broadcast, or a plain number is negative, NaN or infinite.
    TypeError
        If it is not numeric.
    """
    rows = losses.shape[:-1]
    if isinstance(value, _NUMBER):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {value}: it {meaning}")
        if not rows and losses.is_cpu:
            return torch.scalar_tensor(value, dtype=torch.float64)
        return torch.full(rows, float(value), dtype=torch.float64, device=losses.device)
    parameter = as_numbers(value, name).to(losses.device, torch.float64)
    if checks_are_deferred():
        parameter = torch.where((parameter >= 0) & (parameter < math.inf), parameter, torch.nan)
    try:
        return parameter.expand(rows)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {list(parameter.shape)} does not broadcast to the rows {list(rows)} of the losses"
        ) from None


def as_base_weights(values: ArrayLike, losses: Tensor, group: Group) -> Tensor:
    """Return base weights q as a float64 tensor ``[..., n]`` that broadcasts to ``losses``.

    Raises
    ------
    ValueError
        If a weight is negative or not finite, a row does not sum to one, the shape does not broadcast, or they require
        a gradient.
    """
    base = as_numbers(values, "base_weights").to(losses.device, torch.float64)
    if base.requires_grad and torch.is_grad_enabled():
        raise ValueError("base_weights must not require a gradient, which the risk does not give: pass .detach()")
    fits = base.ndim >= 1 and base.shape[-1] == losses.shape[-1] and base.ndim <= losses.ndim
    if not fits or any(b not in (1, z) for b, z in zip(reversed(base.shape), reversed(losses.shape), strict=False)):
        raise ValueError(
            f"base_weights of shape {list(base.shape)} does not broadcast to the losses of shape {list(losses.shape)}"
        )
    total = base.sum(-1)
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    missed = (total - 1).abs()
    wrong = missed > 1e-6
    if values_are_readable():
        least = base.amin(-1) if base.shape[-1] else total
        refuse(~(least >= 0), least, "base_weights must be >= 0, got {}: they are a distribution over the samples")
        refuse(wrong, total, "base_weights must sum to 1, got {}: divide them by their sum")
        if bool((missed <= _ROUNDING).all()):
            return base
    else:  # the solver can read values and refuses NaN
        base = torch.where((~(base >= 0)).any(-1, keepdim=True) | wrong[..., None], torch.nan, base)
    return base / total[..., None]
