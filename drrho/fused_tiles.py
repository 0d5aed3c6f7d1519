"""The similarity matrix on a GPU: products by cuBLAS, and all that is elementwise in one pass over each tile.

A tile holds up to 2^26 similarities of some rows and some columns, so that memory stays linear in the batch and the
products are large in both dimensions. The similarities of a reference enter through one product of joined features,
``[image, -c ref_image] [text, ref_text]^T``. Where the matrix is a single tile it is kept for the backward pass, which
then takes two products instead of three. Nothing waits for the device.

Products of float32 features are as precise as `torch.set_float32_matmul_precision` says. Features in bfloat16 are
multiplied as they are, with sums in float32, so that similarities are those in float32; for the gradients weights are
multiplied in two bfloat16 parts, which leaves out 2^-17 of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from drrho.ranks import sum_to_owners, terms_for_owners
from drrho.solvers.device.launch import launch
from drrho.tile_kernels import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    MERGED,
    PARTS,
    REGISTERS,
    WARPS,
    finish_totals,
    merge_parts,
    sum_tile,
    weigh_tile,
)
from drrho.tiles import ALIGNED, KERNEL_TILE, Pairs, SimilarityTiles, Totals

SIDE = 2**13  # rows of a tile at most; where a rank has fewer, there are more columns


class _Place(NamedTuple):
    """Rows and columns of a tile."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def pitch(self) -> int:
        """Entries from one row to the next."""
        return _ceil(self.shape[1], ALIGNED) * ALIGNED

    @property
    def blocks(self) -> tuple[int, int]:
        return _ceil(self.shape[1], BLOCK_COLUMNS), _ceil(self.shape[0], BLOCK_ROWS)


class FusedTiles(SimilarityTiles):
    """The similarities of this rank's images with all texts, in tiles of rows and columns, in float32."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__(pairs)
        self._kept: Tensor | None = None
        image, text, reference = pairs.image, pairs.text, pairs.reference
        #: Whether features in bfloat16 are multiplied as they are, with sums in float32.
        self.narrow = image.dtype == text.dtype == torch.bfloat16 and _multiplies_narrow(image.device)
        if self.narrow:
            self.image, self.text = image, self.text.to(text.dtype)
            if self.reference is not None and reference is not None and reference[0].dtype == image.dtype:
                self.reference = reference[0], self.reference[1].to(image.dtype)

    def sums(self, keep: bool = False) -> Totals:
        """Compute the sums of both directions in one pass over the matrix, which is kept if it is a single tile."""
        own, anchors = len(self.image), len(self.image) + self.count
        totals = self.image.new_zeros(3, anchors, dtype=torch.float64)
        totals[0].fill_(-torch.inf)
        positive = self._empty(own)
        places = self.places
        parts = self._empty(max((3 * _parts(place) for place in places), default=0))
        for place, x in self._tiles(places):
            height, width = place.shape
            across, down = place.blocks
            geometry = self._geometry(place)
            given = (x, parts, positive, self.image_rate, self.text_rate, *geometry)
            launch(sum_tile, across * down, given, (BLOCK_ROWS, BLOCK_COLUMNS), WARPS, REGISTERS)
            at = (height, width, across, down, place.rows.start, own + place.columns.start, anchors)
            programs = _ceil(height, MERGED) + _ceil(width, MERGED)
            launch(merge_parts, programs, (parts, totals, *at), (MERGED, PARTS), 4)
            if keep and len(places) == 1:
                self._kept = x
        self._sum_over_ranks(totals[:, own:])
        return self._finished(totals, positive)

    def gradients(self, log_sum: Tensor, by_log_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of images and texts in a second pass over the matrix."""
        by_log_mean = by_log_mean.contiguous()
        column_log, by_column = (part.contiguous() for part in self.gathered(log_sum[1], by_log_mean[1]))
        to_image, to_text = self._empty(*self.image.shape), self._empty(*self.text.shape)
        if len(self.image) == 0:
            to_text.zero_()
        places, kept = self.places, self._kept
        self._kept = None  # its similarities are replaced
        for place, x in self._tiles(places) if kept is None else [(places[0], kept)]:
            across, down = place.blocks
            rows, columns = place
            split = self._empty(2, x.shape[0], place.pitch, dtype=torch.bfloat16) if self.narrow else None
            given = (x, x if split is None else split, log_sum[0], column_log, by_log_mean[0], by_column)
            given += (self.image_rate, self.text_rate, *self._geometry(place))
            launch(weigh_tile, across * down, given, (BLOCK_ROWS, BLOCK_COLUMNS, self.narrow), WARPS, REGISTERS)
            for number, part in enumerate([x] if split is None else split[:, :, : x.shape[1]]):
                _add_product(part, self.text[columns], to_image[rows], first=number == columns.start == 0)
                _add_product(part.T, self.image[rows], to_text[columns], first=number == rows.start == 0)
        return to_image, sum_to_owners(to_text, self.counts, self.group)

    @cached_property
    def places(self) -> list[_Place]:
        """The places of the tiles, rows first; tiles are as equal as can be."""
        own = len(self.image)
        if own == 0:
            return []
        rows = _ranges(own, min(SIDE, KERNEL_TILE))
        height = rows[0].stop
        columns = _ranges(self.count, max(1, KERNEL_TILE // height))
        return [_Place(row, column) for column in columns for row in rows]

    def _tiles(self, places: list[_Place]) -> Iterator[tuple[_Place, Tensor]]:
        """Yield tiles of excess similarities, in one buffer."""
        buffer = self._empty(max((place.shape[0] * place.pitch for place in places), default=0))
        column, text = None, self.text
        is_joined = self.reference is not None and not self.narrow
        for place in places:
            if is_joined and place.columns != column:
                column, text = place.columns, self._joined(1, place.columns, 1.0)
            height, width = place.shape
            x = buffer[: height * place.pitch].view(height, place.pitch)[:, :width]
            if is_joined:
                _add_product(self._joined(0, place.rows, -self.coefficient), text.T, x, first=True)
            else:
                _add_product(self.image[place.rows], self.text[place.columns].T, x, first=True)
                if self.reference is not None:
                    images, texts = self.reference
                    _add_product(images[place.rows], texts[place.columns].T, x, first=False, factor=-self.coefficient)
            yield place, x

    def _joined(self, side: int, place: slice, scale: float) -> Tensor:
        """Return features of images or texts, followed by those of the reference, scaled."""
        assert self.reference is not None
        own, reference = (self.image, self.text)[side][place], self.reference[side][place]
        return torch.cat((own, reference if scale == 1 else reference * scale), 1)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a new tensor, of the type of the results unless another is given."""
        return self.image.new_empty(shape, dtype=dtype or self.dtype)

    def _geometry(self, place: _Place) -> tuple[int, ...]:
        """Return where a tile lies, as the kernels take it."""
        row, column = place.rows.start, place.columns.start
        strides = self.image_rate.stride(0), self.text_rate.stride(0)
        offset = self.first + row - column
        return place.blocks[0], place.pitch, *place.shape, row, column, offset, *strides, int(self.include_positive)

    def _sum_over_ranks(self, totals: Tensor) -> None:
        """Add up the totals ``[3, n]`` of columns that every rank has from its rows: for this rank's own columns."""
        if self.group is None:
            return
        tops, sums, means = terms_for_owners(totals.T.contiguous(), self.counts, self.group).unbind(2)
        top = tops.amax(0)
        moved = torch.where(tops == -torch.inf, 0.0, tops - top)
        share = torch.exp(moved)
        own = torch.stack([top, (share * sums).sum(0), (share * (means + moved * sums)).sum(0)])
        totals[:, self.first : self.first + len(self.image)] = own

    def _finished(self, totals: Tensor, positive: Tensor) -> Totals:
        """Return the results of this rank's anchors."""
        own, negatives = len(self.image), self.count if self.include_positive else self.count - 1
        out = self._empty(3, 2, own)
        if own:
            count, strides = math.log(negatives), (self.image_rate.stride(0), self.text_rate.stride(0))
            given = (totals, out, positive, self.image_rate, self.text_rate, own, self.first, totals.shape[1], count)
            launch(finish_totals, 2 * _ceil(own, MERGED), (*given, *strides), (MERGED,), 4)
        return Totals(*out.unbind())


def _add_product(left: Tensor, right: Tensor, total: Tensor, *, first: bool, factor: float = 1.0) -> None:
    """Add a product to a sum, or write it there as the first; products of narrow factors are added in float32."""
    wide: dict[str, Any] = {} if left.dtype == total.dtype else {"out_dtype": total.dtype}
    if first:
        torch.mm(left, right, **wide, out=total)
    else:
        torch.addmm(total, left, right, **wide, alpha=factor, out=total)


def _multiplies_narrow(device: torch.device) -> bool:
    """Whether bfloat16 is multiplied with sums in float32: not before torch 2.11 and Ampere (a CPU is one of tests)."""
    if TorchVersion(torch.__version__) < "2.11":
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _ranges(size: int, longest: int) -> list[slice]:
    """Return consecutive ranges of at most ``longest`` entries each, as equal as multiples of a block can be."""
    number = _ceil(size, longest)
    step = min(longest, _ceil(_ceil(size, number), BLOCK_COLUMNS) * BLOCK_COLUMNS)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _parts(place: _Place) -> int:
    """Return the number of parts of sums that the blocks of a tile write."""
    (height, width), (column_blocks, row_blocks) = place.shape, place.blocks
    return row_blocks * width + column_blocks * height


def _ceil(size: int, step: int) -> int:
    return -(-size // step)
