"""KL risks of all anchors in both directions from tiles of the similarity matrix, with memory linear in the batch.

The matrix of ``x_ij = (s_ij - c r_ij) / tau`` is computed twice, a few rows at a time. The forward pass sums
the normalizers of its rows (image anchors) and columns (text anchors); the backward pass computes the weights
``exp(x_ij - log row_i)`` and ``exp(x_ij - log column_j)``. This takes four matrix products, six with a reference;
keeping the matrix would take three and four. With a group, every rank computes the rows of its own images and all
columns; the normalizers of columns and the gradients of texts are reduced over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drrho.ranks import Group, first_row, gathered_together, row_counts, sum_to_owners, terms_for_owners

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: A tensor for the images and one for the texts.
TensorPair: TypeAlias = tuple[Tensor, Tensor]

TILE = 2**21  # similarities in a tile on the CPU
DEVICE_TILE = 2**25  # on other devices, whose products and solvers want many rows
KERNEL_TILE = 2**26  # where fused kernels compute it, on one buffer
ALIGNED = 16  # entries of which the distance of two rows is a multiple there: loads are wide, products fast
ROWS = 512  # rows of a tile, at least: products of flatter tiles are slower
KERNEL_DEVICES = frozenset({"cuda"})  # where Triton's kernels take the place of torch's operations
_HEADROOM = {torch.float32: 87.0, torch.float64: 700.0}  # exponents beyond which exp overflows


def tile_rows(own: int, count: int, device: torch.device) -> int:
    """Return the number of rows of a tile of ``own`` rows and ``count`` columns."""
    size = TILE if device.type == "cpu" else DEVICE_TILE
    return max(1, min(own, max(ROWS, size // count)))


def not_compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Exclude the function from torch.compile, which cannot trace its loops over tiles and checks of values."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


class Anchors(NamedTuple):
    """Results for this rank's anchors, ``[2, b]``: image anchors, then text anchors.

    ``log_g`` is ``log mean exp(l_ij / tau)`` over the negatives. ``mean_exponent`` is ``sum_j p_ij l_ij / tau`` under
    the weights of the anchor's risk, whose KL divergence is ``mean_exponent - log_g``.
    """

    log_g: Tensor
    mean_exponent: Tensor


class Pairs(NamedTuple):
    """Features of the pairs and how they are compared.

    ``reference`` holds the reference's features or None, and ``coefficient`` multiplies its similarities.
    ``rates`` are ``1 / tau`` of the image and of the text anchors, ``[b]`` each or scalars. ``counts`` are the numbers
    of pairs of all ranks; without them they are exchanged.
    """

    image: Tensor
    text: Tensor
    rates: TensorPair
    reference: TensorPair | None = None
    coefficient: float = 1.0
    include_positive: bool = False
    group: Group = None
    counts: Sequence[int] | None = None


def kl_anchors(pairs: Pairs) -> Anchors:
    """Return the `Anchors` of the pairs; ``log_g`` is differentiable once with respect to the features."""
    return Anchors(*_Tiled.apply(pairs.image, pairs.text, pairs))  # pyright: ignore[reportGeneralTypeIssues]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, pairs):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return normalizers and mean exponents of both directions."""
        # The gathered rows stay with the matrix; the features are saved so that autograd notices a change in place.
        ctx.matrix = _matrix(pairs._replace(image=image, text=text))
        totals = ctx.matrix.sums(keep=any(ctx.needs_input_grad[:2]))
        ctx.save_for_backward(image, text, totals.log_sum)
        ctx.mark_non_differentiable(totals.mean)
        ctx.set_materialize_grads(False)
        return totals.log_mean, totals.mean

    @staticmethod
    @once_differentiable
    def backward(ctx, by_log_mean, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compute the weights and multiply them with the features."""
        image, text, log_sum = ctx.saved_tensors
        if by_log_mean is None:
            return None, None, None
        to_image, to_text = ctx.matrix.gradients(log_sum, by_log_mean)
        return to_image.to(image.dtype), to_text.to(text.dtype), None


def _matrix(pairs: Pairs) -> SimilarityTiles:
    """Return the similarities as their device computes them: by fused kernels where there are such, or by torch."""
    if has_kernels(pairs.image.device) and wide_dtype(pairs) == torch.float32:
        from drrho.fused_tiles import FusedTiles  # Triton is loaded where it is used

        return FusedTiles(pairs)
    return SimilarityTiles(pairs)


def has_kernels(device: torch.device) -> bool:
    """Whether tiles on the device are computed by Triton's kernels."""
    return device.type in KERNEL_DEVICES and find_spec("triton") is not None


def wide_dtype(pairs: Pairs) -> torch.dtype:
    """Return the type in which the features are compared: their own, float32 at least."""
    return torch.promote_types(torch.promote_types(pairs.image.dtype, pairs.text.dtype), torch.float32)


class Totals(NamedTuple):
    """Log of the sum of exp(x_ij), log of the mean of exp(l_ij / tau), mean of l_ij / tau: ``[2, b]`` each."""

    log_sum: Tensor
    log_mean: Tensor
    mean: Tensor


class SimilarityTiles:
    """The similarities of this rank's images with all texts, in tiles of rows."""

    def __init__(self, pairs: Pairs) -> None:
        image, text, (image_rate, text_rate), reference, self.coefficient, self.include_positive, group, counts = pairs
        self.group, self.dtype = group, wide_dtype(pairs)
        self.image, self.own_text = image.to(self.dtype), text.to(self.dtype)
        self.counts = row_counts(len(image), group, image.device) if counts is None else counts
        self.first, self.count = first_row(self.counts, group), sum(self.counts)
        if self.count < 2:
            raise ValueError(f"image and text must hold at least 2 pairs over all ranks, got {self.count}")
        #: Whether all anchors of both directions share one rate, so that rows and columns use the same matrix x.
        self.shared = image_rate is text_rate and image_rate.ndim == 0
        self.image_rate, text_rate = image_rate.to(self.dtype).expand(len(image)), text_rate.to(self.dtype)
        self.reference, sent = None, [self.own_text]
        if reference is not None and self.coefficient != 0:
            self.own_reference = reference[0].to(self.dtype), reference[1].to(self.dtype)
            sent.append(self.own_reference[1])
        if text_rate.ndim:
            sent.append(text_rate)
        self.text, *others = self.gathered(*sent)
        self.text_rate = others.pop().contiguous() if text_rate.ndim else text_rate.expand(self.count)
        if others:
            self.reference = self.own_reference[0], others[0]

    @cached_property
    def positive(self) -> Tensor:
        """Excess similarities of this rank's pairs, ``[b]``."""
        positive = (self.image * self.own_text).sum(1)
        if self.reference is None:
            return positive
        return positive - self.coefficient * (self.own_reference[0] * self.own_reference[1]).sum(1)

    @cached_property
    def unshifted(self) -> bool:
        """Whether exponents are so small that their exponentials neither overflow nor vanish; not asked of a device."""
        if not self.shared or self.image.device.type != "cpu":
            return False
        return self._bound() <= _HEADROOM[self.dtype] - math.log(self.count)

    def _bound(self) -> float:
        """Return an upper bound on the exponents of this rank."""
        norms = [tensor.norm(dim=1) for tensor in (self.image, self.text, *(self.reference or ()))]
        largest = [norm.amax() if len(norm) else norm.sum() for norm in norms]  # a rank may have no pairs
        bound = largest[0] * largest[1]
        if self.reference is not None:
            bound = bound + abs(self.coefficient) * largest[2] * largest[3]
        return float(bound * self.text_rate[0])

    def gathered(self, *own: Tensor) -> list[Tensor]:
        """Return all ranks' rows of each tensor in the order of ranks, after one exchange."""
        return gathered_together(own, self.counts, self.group)

    def _own(self, entries: Tensor) -> Tensor:
        """Return this rank's part of entries of all ranks' pairs."""
        return entries[self.first : self.first + len(self.image)]

    def tiles(self, buffers: int) -> Iterator[tuple[slice, list[Tensor], TensorPair]]:
        """Yield the rows of a tile, buffers of its shape, and the indices of its positives.

        The first buffer holds the excess similarities; the contents of the others are undefined.
        """
        height = tile_rows(len(self.image), self.count, self.image.device)
        held = [self.image.new_empty(height, self.count) for _ in range(buffers)]
        for first in range(0, len(self.image), height):
            rows = slice(first, min(first + height, len(self.image)))
            parts = [buffer[: rows.stop - first] for buffer in held]
            torch.mm(self.image[rows], self.text.T, out=parts[0])
            if self.reference is not None:
                parts[0].addmm_(self.reference[0][rows], self.reference[1].T, alpha=-self.coefficient)
            place = torch.arange(rows.stop - first, device=self.image.device)
            yield rows, parts, (place, place + self.first + first)

    def sums(self, keep: bool = False) -> Totals:
        """Compute the sums of both directions in one pass over the matrix.

        ``keep``: they are followed by `gradients`, for which a form that can may keep what it has computed.
        """
        b, anchors = len(self.image), self.count
        row_sum, row_mean = self.image.new_empty(2, b).unbind()
        top = self.image.new_full((anchors,), 0.0 if self.unshifted else -torch.inf)
        column_sum, column_mean = self.image.new_zeros(2, anchors).unbind()
        for rows, (x, e), positives in self.tiles(2):
            if self.shared:
                x.mul_(self.image_rate[0])
            if not self.include_positive:
                x[positives] = -torch.inf
            if self.unshifted:
                torch.exp(x, out=e)
                row_sum[rows] = e.sum(1)
                column_sum += e.sum(0)
                row_sum[rows].log_()
                x.masked_fill_(x == -torch.inf, 0.0).mul_(e)
                row_mean[rows] = x.sum(1) / row_sum[rows].exp()
                column_mean += x.sum(0)
                continue
            rate = None if self.shared else self.image_rate[rows, None]
            by_row = x if rate is None else torch.mul(x, rate, out=e)
            highest = by_row.amax(1)
            by_row = torch.sub(by_row, highest[:, None], out=e).exp_()
            total = by_row.sum(1)
            row_sum[rows] = highest + total.log()
            row_mean[rows] = _weighted(by_row, x, 1) / total * (1.0 if rate is None else rate[:, 0])
            if not self.shared:
                x.mul_(self.text_rate)
            before, top = top, torch.maximum(top, x.amax(0))
            shrunk = torch.exp(before - top).nan_to_num_(nan=1.0)  # -inf - (-inf): the column has no entry yet
            torch.sub(x, top, out=e).exp_().nan_to_num_(nan=0.0)
            column_sum = column_sum * shrunk + e.sum(0)
            column_mean = column_mean * shrunk + _weighted(e, x, 0)
        if self.group is not None:
            terms = terms_for_owners(torch.stack([top, column_sum, column_mean], 1), self.counts, self.group)
            top = terms[..., 0].amax(0)
            shrunk = torch.exp(terms[..., 0] - top).nan_to_num_(nan=1.0)
            column_sum, column_mean = (terms[..., 1:] * shrunk[..., None]).sum(0).unbind(1)
        count = math.log(anchors if self.include_positive else anchors - 1)
        log_sum = torch.stack([row_sum, top + column_sum.log()])
        mean = torch.stack([row_mean, column_mean / column_sum])
        own = self.positive * torch.stack([self.image_rate, self._own(self.text_rate)])
        return Totals(log_sum, log_sum - own - count, mean - own)

    def gradients(self, log_sum: Tensor, by_log_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of images and texts in a second pass over the matrix.

        ``log_sum`` and ``by_log_mean`` are those of `Totals` and the gradient with respect to its log means.
        """
        to_image = torch.empty_like(self.image)
        to_text = self.image.new_zeros(self.count, self.image.shape[1])
        column_log, by_column = self.gathered(log_sum[1], by_log_mean[1])
        column_scale = by_column * self.text_rate
        row_scale = by_log_mean[0] * self.image_rate
        at_positive = -(row_scale + self._own(column_scale))
        for place, (x, e), positives in self.tiles(2):
            if self.shared:
                x.mul_(self.image_rate[0])
            scale, shift = row_scale[place, None], log_sum[0][place, None]
            own = x[positives] if self.include_positive else None
            if self.unshifted:
                torch.exp(x, out=e)
                torch.add(scale * torch.exp(-shift), column_scale * torch.exp(-column_log), out=x)
                weights = x.mul_(e)
            else:
                by_rows = x if self.shared else torch.mul(x, self.image_rate[place, None], out=e)
                torch.sub(by_rows, shift, out=e).exp_().mul_(scale)
                if not self.shared:
                    x.mul_(self.text_rate)
                weights = x.sub_(column_log).exp_().mul_(column_scale).add_(e)
            kept = 0.0 if own is None else weights[positives]
            weights[positives] = at_positive[place] + kept
            torch.mm(weights, self.text, out=to_image[place])
            to_text.addmm_(weights.T, self.image[place])
        return to_image, sum_to_owners(to_text, self.counts, self.group)


def _weighted(e: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return ``sum e x``, where ``0 * -inf`` counts as 0."""
    return torch.where(e > 0, e * x, 0.0).sum(dim)
