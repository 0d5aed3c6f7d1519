"""One robust risk for each anchor over its candidates: positives and negatives of any number, of any direction.

It is `drrho.contrastive.contrastive_risk` for anchors and candidates that are not one square of pairs, from columns of
embeddings ``[b, d]``: anchors, positives, then any number of hard negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from drrho import KL, Divergence, excess_losses, penalized_risk

_KL = KL()
Similarity = Callable[[Tensor, Tensor], Tensor]
Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
_OF_ONE_KIND = {"query_to_query", "doc_to_doc"}  # in which an anchor's own texts are no candidates


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Return all cosines ``[m, n]`` of the vectors ``[m, d]`` and ``[n, d]``."""
    return normalize(left, dim=-1) @ normalize(right, dim=-1).T


@dataclass(frozen=True)
class Candidates:
    """How anchors are compared with their candidates.

    With similarities ``s`` of the model and ``r`` of a guide, candidate j of anchor i has the loss
    ``l_ij = (s_ij - s_ii) - c (r_ij - r_ii)``, and the anchor has the risk
    ``max_p <p, l_i> - D_phi(p || uniform) / scale``.

    Parameters
    ----------
    divergence : Divergence
        Divergence of the weights over candidates.
    coefficient : float
        Factor c of the guide's margins; infinite, with ``margin``, to leave out all candidates above the threshold.
    margin : float, optional
        Use ``max(0, r_ij - threshold_i)`` in place of the guide's margin ``r_ij - r_ii``.
    margin_strategy : "absolute" or "relative"
        The threshold: ``r_ii - margin``, or ``r_ii - margin |r_ii|``.
    scale : float
        1 / tau > 0.
    directions : sequence of str
        Which candidates there are, in the terms of sentence-transformers.
    per_direction : bool
        Take the mean of a risk for each direction, not one risk over all candidates.

    Raises
    ------
    ValueError
        For a parameter out of range.
    """

    divergence: Divergence = _KL
    coefficient: float = 1.0
    margin: float | None = None
    margin_strategy: Literal["absolute", "relative"] = "absolute"
    scale: float = 20.0
    directions: Sequence[Direction] = ("query_to_doc",)
    per_direction: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.divergence, Divergence):
            raise ValueError(f"divergence must be a Divergence such as KL() or ChiSquare(), got {self.divergence!r}")
        is_mask = self.coefficient == math.inf and self.margin is not None
        if not (math.isfinite(self.coefficient) or is_mask):
            raise ValueError(f"coefficient must be finite, or infinite with a margin, got {self.coefficient}")
        if self.margin is not None and not math.isfinite(self.margin):
            raise ValueError(f"margin must be finite, got {self.margin}")
        if self.margin_strategy not in ("absolute", "relative"):
            raise ValueError(f"margin_strategy must be 'absolute' or 'relative', got {self.margin_strategy!r}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be finite and > 0, got {self.scale}")

    def losses(
        self, own: Sequence[Tensor], guides: Sequence[Tensor], rows: Tensor, similarity: Similarity = cosine
    ) -> Tensor:
        """Return the risks of the anchors in ``rows`` ``[k]``, times the scale; for KL, the cross-entropy in nats.

        Parameters
        ----------
        own, guides : sequence of Tensor ``[b, d]``
            Embeddings of the columns by the model and by the guide; no guide, where there are none.
        rows : int64 tensor ``[k]``
            Anchors of the batch.
        similarity : callable
            Of the model's embeddings; those of the guide are compared by their cosines.

        Raises
        ------
        ValueError
            For a batch without negatives, or embeddings of the guide that do not fit or are not finite.
        """
        _refuse(own, guides)
        with torch.autocast(rows.device.type, enabled=False):
            excess, kept = self._excess(_wide(own), _wide(guides), rows, similarity)
            if not self.per_direction:
                return self._risks(torch.cat(excess, 1), torch.cat(kept, 1))
            return torch.stack([self._risks(*each) for each in zip(excess, kept, strict=True)]).mean(0)

    def _excess(
        self, own: Sequence[Tensor], guides: Sequence[Tensor], rows: Tensor, similarity: Similarity
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the losses over each direction's candidates ``[k, n]``, and which of the candidates are kept."""
        place = torch.arange(len(rows), device=rows.device)
        similar = self._similarities(own, rows, similarity)
        guided = self._similarities(guides, rows, cosine) if guides else {}
        losses, kept = [], []
        for name, matrix in similar.items():
            same = torch.zeros_like(matrix, dtype=torch.bool)
            for copy in range(len(own) - 1 if name == "doc_to_doc" else 1):
                same[place, rows + copy * len(own[0])] = True
            keep = ~same if name in _OF_ONE_KIND else torch.ones_like(same)
            loss = matrix - similar["query_to_doc"][place, rows, None]
            if guided:
                margins = self._margins(guided[name], guided["query_to_doc"][place, rows, None]).masked_fill(same, 0.0)
                if self.coefficient == math.inf:
                    keep &= margins <= 0
                else:
                    loss = excess_losses(loss, margins, self.coefficient)
            losses.append(loss)
            kept.append(keep)
        return losses, kept

    def _similarities(self, columns: Sequence[Tensor], rows: Tensor, similarity: Similarity) -> dict[str, Tensor]:
        """Return the similarities ``[k, n]`` of anchors, or their positives, with each direction's candidates."""
        anchors, *documents = columns
        every, positives = torch.cat(documents), documents[0][rows]
        compute: dict[str, Callable[[], Tensor]] = {
            "query_to_doc": lambda: similarity(anchors[rows], every),
            "query_to_query": lambda: similarity(anchors[rows], anchors),
            "doc_to_query": lambda: similarity(anchors, positives).T,
            "doc_to_doc": lambda: similarity(every, positives).T,
        }
        return {name: computed() for name, computed in compute.items() if name in self.directions}

    def _margins(self, guided: Tensor, positive: Tensor) -> Tensor:
        if self.margin is None:
            return guided - positive
        unit = positive.abs() if self.margin_strategy == "relative" else 1.0
        return (guided - (positive - unit * self.margin)).clamp(min=0)

    def _risks(self, losses: Tensor, kept: Tensor) -> Tensor:
        counts = kept.sum(1, dtype=losses.dtype)
        leaves_out = self.coefficient == math.inf or bool(_OF_ONE_KIND.intersection(self.directions))
        base = kept / counts[:, None] if leaves_out else None
        risks = penalized_risk(losses, self.divergence, 1 / self.scale, base_weights=base).value * self.scale
        return risks + counts.log() if self.divergence.has_exponential_weights else risks


def _wide(columns: Sequence[Tensor]) -> list[Tensor]:
    return [column.to(torch.promote_types(column.dtype, torch.float32)) for column in columns]


def _refuse(own: Sequence[Tensor], guides: Sequence[Tensor]) -> None:
    if len(own) < 2:
        raise ValueError(f"a batch needs an anchor, a positive and any number of negatives, got {len(own)} columns")
    if len(own) == 2 and len(own[0]) == 1:
        raise ValueError("a batch of one pair has no negatives: leave it out (dataloader_drop_last=True)")
    if guides and [len(each) for each in guides] != [len(each) for each in own]:
        shapes = [list(each.shape) for each in guides]
        raise ValueError(f"the guide must embed the {len(own)} columns of {len(own[0])} texts, got shapes {shapes}")
    if guides and not bool(torch.isfinite(torch.stack([each.sum() for each in guides])).all()):
        raise ValueError("the guide's embeddings are not finite: check its weights, or its cache")
