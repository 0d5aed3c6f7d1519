"""What a public function accepts: conversion to tensors, and refusals that name argument, value and remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_losses(values: Any, name: str) -> Tensor:
    """Return ``values`` as a floating tensor ``[..., n]``, ``n >= 1``, every entry finite.

    Tensors keep dtype, device and graph; NumPy arrays and sequences become float64.

    Raises
    ------
    TypeError
        For an integer, boolean or complex tensor: rounding losses is the caller's decision.
    ValueError
        For a scalar, an empty last dimension, or a NaN or infinite entry.
    """
    if isinstance(values, Tensor):
        if not values.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {values.dtype}: call .float() or .double()")
        losses = values
    else:
        try:
            losses = torch.tensor(np.asarray(values, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must be a tensor, an array or a sequence of numbers, got {values!r}") from error
    if losses.ndim == 0 or losses.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., n] with n >= 1, got {list(losses.shape)}")
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        where = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got {losses[tuple(where)].item()} at index {where}")
    return losses


def as_parameter(value: Any, name: str, meaning: str, losses: Tensor) -> Tensor:
    """Return a radius or strength as a float64 tensor, one number per row of ``losses``.

    Accepts a number or anything that broadcasts to ``losses.shape[:-1]``; a tensor keeps its graph.

    Raises
    ------
    ValueError
        If an entry is negative, NaN or infinite, or the shape does not broadcast.
    """
    rows = losses.shape[:-1]
    parameter = torch.as_tensor(value, device=losses.device, dtype=torch.float64)
    refused = ~(torch.isfinite(parameter) & (parameter >= 0))
    if bool(refused.any()):
        raise ValueError(f"{name} must be finite and >= 0, got {parameter[refused][0].item()}: it {meaning}")
    try:
        return parameter.expand(rows)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {list(parameter.shape)} does not broadcast to the rows {list(rows)} of the losses"
        ) from None
