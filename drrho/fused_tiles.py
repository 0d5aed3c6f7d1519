"""The similarity matrix on a GPU: products by cuBLAS, and all that is elementwise in one pass over each tile.

A tile holds up to 2^26 similarities of some rows and some columns, so that memory stays linear in the batch and the
products are large in both dimensions. The similarities of a reference enter through one product of joined features,
``[s, -c r] = [image, -c ref_image] [text, ref_text]^T``. Where the matrix is a single tile it is kept for the backward
pass, which then takes two products instead of three. Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drrho import tile_kernels
from drrho.ranks import sum_to_owners, terms_for_owners
from drrho.tile_kernels import BLOCK_COLUMNS, BLOCK_ROWS, MERGED, PARTS
from drrho.tiles import ALIGNED, KERNEL_TILE, Pairs, SimilarityTiles, Totals

_KERNELS: Any = tile_kernels  # launches of Triton's kernels have no types
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

    def sums(self, keep: bool = False) -> Totals:
        """Compute the sums of both directions in one pass over the matrix, which is kept if it is a single tile."""
        own, anchors = len(self.image), len(self.image) + self.count
        totals = self.image.new_zeros(3, anchors, dtype=torch.float64)
        totals[0].fill_(-torch.inf)
        positive = self.image.new_empty(own)
        places = self._places()
        parts = self.image.new_empty(max((3 * _parts(place) for place in places), default=0))
        for place, x in self._tiles(places):
            height, width = place.shape
            _KERNELS.sum_tile[place.blocks](
                x,
                parts,
                positive,
                self.image_rate,
                self.text_rate,
                *self._geometry(place),
                ROWS=BLOCK_ROWS,
                COLUMNS=BLOCK_COLUMNS,
                num_warps=8,
            )
            _KERNELS.merge_parts[(_ceil(height, MERGED) + _ceil(width, MERGED),)](
                parts,
                totals,
                height,
                width,
                *place.blocks,
                place.rows.start,
                own + place.columns.start,
                anchors,
                MERGED=MERGED,
                PARTS=PARTS,
            )
            if keep and len(places) == 1:
                self._kept = x
        self._sum_over_ranks(totals[:, own:])
        return self._finished(totals, positive)

    def gradients(self, log_sum: Tensor, by_log_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of images and texts in a second pass over the matrix."""
        by_log_mean = by_log_mean.contiguous()
        column_log, by_column = (part.contiguous() for part in self.gathered(log_sum[1], by_log_mean[1]))
        to_image = torch.empty_like(self.image)
        to_text = torch.empty_like(self.text) if len(self.image) else torch.zeros_like(self.text)
        places, kept = self._places(), self._kept
        self._kept = None  # its similarities are replaced
        for place, x in self._tiles(places) if kept is None else [(places[0], kept)]:
            _KERNELS.weigh_tile[place.blocks](
                x,
                log_sum[0],
                column_log,
                by_log_mean[0],
                by_column,
                self.image_rate,
                self.text_rate,
                *self._geometry(place),
                ROWS=BLOCK_ROWS,
                COLUMNS=BLOCK_COLUMNS,
                num_warps=8,
            )
            rows, columns = place
            _add_product(x, self.text[columns], to_image[rows], first=columns.start == 0)
            _add_product(x.T, self.image[rows], to_text[columns], first=rows.start == 0)
        return to_image, sum_to_owners(to_text, self.counts, self.group)

    def _places(self) -> list[_Place]:
        """Return the places of the tiles, rows first; tiles are as equal as can be."""
        own = len(self.image)
        if own == 0:
            return []
        rows = _ranges(own, min(SIDE, KERNEL_TILE))
        height = rows[0].stop
        columns = _ranges(self.count, max(1, KERNEL_TILE // height))
        return [_Place(row, column) for column in columns for row in rows]

    def _tiles(self, places: list[_Place]) -> Iterator[tuple[_Place, Tensor]]:
        """Yield tiles of excess similarities, in one buffer."""
        buffer = self.image.new_empty(max((place.shape[0] * place.pitch for place in places), default=0))
        column, text = None, self.text
        for place in places:
            if place.columns != column:
                column, text = place.columns, self._joined(1, place.columns, 1.0)
            height, width = place.shape
            x = buffer[: height * place.pitch].view(height, place.pitch)[:, :width]
            torch.mm(self._joined(0, place.rows, -self.coefficient), text.T, out=x)
            yield place, x

    def _joined(self, side: int, place: slice, scale: float) -> Tensor:
        """Return features of images or texts, followed by those of the reference, scaled."""
        own = (self.image, self.text)[side][place]
        if self.reference is None:
            return own
        reference = self.reference[side][place]
        return torch.cat((own, reference if scale == 1 else reference * scale), 1)

    def _geometry(self, place: _Place) -> tuple[int, ...]:
        """Return where a tile lies, as the kernels take it."""
        row, column = place.rows.start, place.columns.start
        strides = self.image_rate.stride(0), self.text_rate.stride(0)
        return place.pitch, *place.shape, row, column, self.first + row - column, *strides, int(self.include_positive)

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
        out = self.image.new_empty(3, 2, own)
        if own:
            _KERNELS.finish_totals[(_ceil(own, MERGED), 2)](
                totals,
                out,
                positive,
                self.image_rate,
                self.text_rate,
                own,
                self.first,
                totals.shape[1],
                math.log(negatives),
                self.image_rate.stride(0),
                self.text_rate.stride(0),
                MERGED=MERGED,
            )
        return Totals(*out.unbind())


def _add_product(left: Tensor, right: Tensor, total: Tensor, *, first: bool) -> None:
    """Add a product to a sum, or write it there as the first."""
    if first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


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
