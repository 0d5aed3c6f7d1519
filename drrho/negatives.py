"""Risks of all anchors over their negatives for any divergence, from tiles of rows of the similarity matrix.

A tile of anchors is solved at a time by `penalized_risk`. Where all anchors of a direction fit into one tile, their
weights are kept for the backward pass; otherwise the tiles are solved again. With a group, every rank solves its own
anchors against all ranks' negatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drrho.divergences import Divergence
from drrho.ranks import first_row, gathered, gathered_together, gathered_with_gradient, row_counts
from drrho.reference import excess_losses
from drrho.risk import penalized_risk
from drrho.tiles import ALIGNED, Pairs, TensorPair, tile_rows, wide_dtype


class WorstCase(NamedTuple):
    """References' features of the pairs, ``[b, d_k]`` each; of a negative the largest of the excess losses counts."""

    references: Sequence[TensorPair]
    coefficient: float | Tensor


def robust_anchors(
    pairs: Pairs,
    taus: TensorPair,
    divergence: Divergence,
    thresholds: TensorPair | None,
    gamma: float,
    worst: WorstCase | None = None,
) -> tuple[TensorPair, TensorPair, TensorPair]:
    """Return risks, thresholds after the step and distances D of this rank's anchors, ``[b]`` each, for any divergence.

    Thresholds of earlier batches (NaN where there are none) move to ``(1 - gamma) threshold + gamma (that of the
    batch)``, or start anew from that of the batch where phi* is infinite at one of its losses. The anchor's risk is
    then its dual objective there, ``threshold + tau mean phi*((l - threshold) / tau)``. At the threshold held fixed its
    gradient is given by the ratios ``t = phi*'((l - threshold) / tau)``: the weights ``t / count`` for the losses, and
    ``-mean phi(t)`` for ``taus``, scalars or ``[b]``. References of a worst case take the place of that of the pairs.
    """
    counts = pairs.counts
    if counts is None:
        counts = row_counts(len(pairs.image), pairs.group, pairs.image.device)
    if sum(counts) < 2:
        raise ValueError(f"image and text must hold at least 2 pairs over all ranks, got {sum(counts)}")
    dtype, first = wide_dtype(pairs), first_row(counts, pairs.group)
    features = pairs.image.to(dtype), pairs.text.to(dtype)  # so that gradients add up in the wider type
    results = []
    for side, tau in enumerate(taus):
        anchor, other = features[side], gathered_with_gradient(features[1 - side], counts, pairs.group)
        joined = anchor.detach(), other.detach()
        if pairs.reference is not None and pairs.coefficient != 0:
            guide, guides = (pairs.reference[place].to(dtype) for place in (side, 1 - side))
            guides = gathered(guides, counts, pairs.group)
            joined = torch.cat((joined[0], -pairs.coefficient * guide), 1), torch.cat((joined[1], guides), 1)
        several: list[TensorPair] = []
        if worst is not None:
            own, others = ([each[k].to(dtype) for each in worst.references] for k in (side, 1 - side))
            several = list(zip(own, gathered_together(others, counts, pairs.group), strict=True))
        rate = pairs.rates[side].to(dtype).expand(len(anchor))
        before = None if thresholds is None or gamma == 1 else thresholds[side]
        factor = 1.0 if worst is None else worst.coefficient
        rows = _Rows(divergence, *joined, rate, pairs.include_positive, before, gamma, first, several, factor)
        risk, threshold, distance, cost = _Solved.apply(anchor, other, rows)  # pyright: ignore[reportGeneralTypeIssues]
        if tau.requires_grad:
            risk = risk - (tau - tau.detach()) * cost
        results.append((risk, threshold, distance))
    first, second = results
    return (first[0], second[0]), (first[1], second[1]), (first[2], second[2])


class _Rows(NamedTuple):
    """The anchors of one direction and how they are solved; ``start`` is the place of the first among all ranks'.

    Products of ``anchor`` and ``other`` are excess similarities: the features of the reference are joined to those of
    the target. Of several references, ``guides``, the smallest multiple of the margins by ``factor`` is subtracted.
    """

    divergence: Divergence
    anchor: Tensor
    other: Tensor
    rate: Tensor
    include_positive: bool
    before: Tensor | None
    gamma: float
    start: int
    guides: Sequence[TensorPair] = ()
    factor: float | Tensor = 1.0

    def tiles(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the rows of a tile, its losses, and a matrix of its shape that may be written to."""
        height = tile_rows(len(self.anchor), len(self.other), self.anchor.device)
        held = self.matrix(height)
        for first in range(0, len(self.anchor), height):
            rows = slice(first, min(first + height, len(self.anchor)))
            excess = held[: rows.stop - first]
            torch.mm(self.anchor[rows], self.other.T, out=excess)
            if self.guides:
                excess -= self.least_margins(rows)
            own = self.positives(excess, rows)
            at_positive = own.clone()
            if not self.include_positive:
                own.copy_(excess[:, -1].clone())  # the last column takes the place of the positives
            yield rows, self.negatives(excess) - at_positive[:, None], excess

    def least_margins(self, rows: slice) -> Tensor:
        """Return the smallest of the references' margins times ``factor`` of a tile's pairs; it is 0 at positives."""
        least: Tensor | None = None
        for own, others in self.guides:
            margins = own[rows] @ others.T
            margins = self.factor * (margins - self.positives(margins, rows).clone()[:, None])
            least = margins if least is None else torch.minimum(least, margins)
        assert least is not None
        return least

    def matrix(self, height: int) -> Tensor:
        """Return a new matrix of that many rows, for a tile."""
        count = len(self.other)
        return self.anchor.new_empty(height, -(-count // ALIGNED) * ALIGNED)[:, :count]

    def positives(self, matrix: Tensor, rows: slice) -> Tensor:
        """Return a view of the entries of a tile that belong to the anchors' positives."""
        return matrix.diagonal(self.start + rows.start)

    def negatives(self, matrix: Tensor) -> Tensor:
        """Return a view of a tile without its last column, unless positives are included."""
        return matrix if self.include_positive else matrix[:, :-1]

    def solved(self, rows: slice, losses: Tensor) -> _SolvedRows:
        """Solve the anchors of a tile."""
        tau = 1 / self.rate[rows]
        risk = penalized_risk(losses, self.divergence, tau)
        distance = ((risk.weights * losses).sum(1) - risk.value) / tau
        exact = _SolvedRows(risk.value, risk.threshold, distance, distance, risk.weights)
        if self.before is None:
            return exact
        old = self.before[rows].to(exact.threshold)
        threshold = old + self.gamma * (exact.threshold - old)
        s = (losses - threshold[:, None]) / tau[:, None]
        value = threshold + tau * self.divergence.conjugate(s).mean(1)
        cost, weights = self.divergence.cost(s).mean(1), self.divergence.conjugate_gradient(s) / losses.shape[1]
        lags = torch.isfinite(value)
        return _SolvedRows(
            torch.where(lags, value, exact.risk),
            torch.where(lags, threshold, exact.threshold),
            distance,
            torch.where(lags, cost, distance),
            torch.where(lags[:, None], weights, exact.weights),
        )

    def weighed(self, rows: slice, weights: Tensor, by_risk: Tensor, matrix: Tensor) -> Tensor:
        """Write the gradient with respect to a tile's excess similarities into a matrix of its shape."""
        torch.mul(weights, by_risk[:, None], out=self.negatives(matrix))
        own = self.positives(matrix, rows)
        at_positive = by_risk * weights.sum(1)
        if self.include_positive:
            own.sub_(at_positive)
        else:
            matrix[:, -1] = own.clone()
            own.copy_(-at_positive)
        return matrix


class _SolvedRows(NamedTuple):
    """The solution of a tile of anchors, with the threshold after the step.

    ``cost`` is the mean of phi at the ratios that the gradient uses: the distance D, unless the threshold lags.
    """

    risk: Tensor
    threshold: Tensor
    distance: Tensor
    cost: Tensor
    weights: Tensor


class _Solved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, other, rows):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return risks, thresholds, distances and costs of one direction."""
        ctx.save_for_backward(anchor, other)
        ctx.rows, ctx.kept = rows, None
        parts = []
        for place, losses, _ in rows.tiles():
            solved = rows.solved(place, losses)
            parts.append(solved[:4])
            if len(losses) == len(anchor) and any(ctx.needs_input_grad):
                ctx.kept = place, solved.weights
        value, threshold, distance, cost = map(torch.cat, zip(*parts or [(anchor.new_empty(0),) * 4], strict=True))
        ctx.mark_non_differentiable(threshold, distance, cost)
        return value, threshold, distance, cost

    @staticmethod
    @once_differentiable
    def backward(ctx, by_value, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Multiply the weights, kept or computed again, with the features."""
        (anchor, other), rows = ctx.saved_tensors, ctx.rows
        if ctx.kept is None:
            tiles = ((place, rows.solved(place, losses).weights, matrix) for place, losses, matrix in rows.tiles())
        else:
            tiles = [(*ctx.kept, rows.matrix(len(anchor)))]
        to_anchor, to_other = torch.empty_like(anchor), torch.zeros_like(other)
        for place, weights, matrix in tiles:
            matrix = rows.weighed(place, weights, by_value[place], matrix)
            torch.mm(matrix, other, out=to_anchor[place])
            to_other.addmm_(matrix.T, anchor[place])
        return to_anchor, to_other, None


def excess_pair_losses(
    image: Tensor, text: Tensor, references: Sequence[TensorPair], coefficient: float, include_positive: bool
) -> TensorPair:
    """Return the anchors' losses over their negatives, ``[b, b - 1]``: image to text, text to image.

    They are the largest of those in excess of each reference.
    """
    similarity = _similarity(image, text, torch.float32)
    others = [_similarity(*each, similarity.dtype).detach().to(similarity.dtype) for each in references]
    directions = []
    for transposed in (False, True):
        losses = _margins(similarity.T if transposed else similarity, include_positive)
        margins = [_margins(other.T if transposed else other, include_positive) for other in others]
        if margins:
            losses = torch.stack([excess_losses(losses, margin, coefficient) for margin in margins]).amax(0)
        directions.append(losses)
    return directions[0], directions[1]


def _similarity(image: Tensor, text: Tensor, narrowest: torch.dtype) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), narrowest)
    with torch.autocast(image.device.type, enabled=False):
        return image.to(dtype) @ text.to(dtype).T


def _margins(similarity: Tensor, include_positive: bool) -> Tensor:
    """Return ``s_ij - s_ii`` for ``j != i``, ``[b, b - 1]``, in the order of j; ``[b, b]`` with the positive."""
    b = len(similarity)
    losses = similarity - similarity.diagonal()[:, None]
    if include_positive:
        return losses
    # After the first entry, each run of b + 1 ends with a diagonal one.
    return losses.flatten()[1:].view(b - 1, b + 1)[:, :-1].reshape(b, b - 1)
