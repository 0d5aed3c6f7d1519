"""Which pairs of a larger batch to train on: those that the target can learn and the reference has learned.

Each step's candidates go through the target without a graph; the chosen ones, through the usual step. JEST (Evans et
al., NeurIPS 2024, arXiv 2406.17711) draws a batch that is learnable together; RHO-LOSS (Mindermann et al., ICML 2022)
takes the pairs with the largest excess losses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrho.selection import PairFeatures, joint_selection_from_features, pair_losses, top_k

from ..data.batch import Batch
from ..distributed import Ranks
from ..models.clip import Clip
from .methods import Features
from .options import Selection

_DRAWS = 1


class Chosen(NamedTuple):
    """What a step trains on, the reference's features of it, and a function that says how learnable it is.

    ``learnability`` is collective; it returns the mean excess losses of the chosen pairs and of all candidates, each
    pair's with all candidates as negatives.
    """

    batch: Batch
    reference: Features | None
    learnability: Callable[[], dict[str, float]]


class Selector:
    """Chooses one in ``selection.candidates`` pairs, rounded up: over ranks what one process would choose.

    Parameters
    ----------
    loss : "softmax" or "sigmoid"
        Whose excess over the reference's is the score, see `drrho.selection.pair_losses`.
    reference : Clip, optional
        Its logit scale and bias are the reference's in the scores; one without a bias has 0. Where the reference is the
        target's own average, they are the target's.
    seed : int
        Draws are a function of seed and step.
    """

    def __init__(
        self,
        selection: Selection,
        loss: Literal["softmax", "sigmoid"],
        reference: Clip | None,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self._selection, self._loss, self._seed, self._ranks = selection, loss, seed, ranks
        self._head: tuple[float, float] | None = None
        if reference is not None:
            bias = getattr(reference.model, "logit_bias", None)
            scale = reference.model.logit_scale.exp().item()
            self._head = 1 / scale, 0.0 if bias is None else bias.item()
        #: Pairs scored for each that is trained on.
        self.candidates = selection.candidates

    def size(self, total: int) -> int:
        """Return how many of ``total`` candidates are chosen."""
        return -(-total // self.candidates)

    def choose(
        self, step: int, candidates: Batch, total: int, target: PairFeatures, wrong: Tensor, reference: Features | None
    ) -> Chosen | None:
        """Choose among the candidates, of which both models' features are given; every rank calls.

        ``total`` is the number of all ranks' candidates. The result is None where ``wrong``, a scalar on the device, is
        not 0: the device is waited for once, for this and the choice.
        """
        if reference is None:
            raise ValueError(
                "reference must hold the reference's features of the candidates: give the trainer a reference"
            )
        of_reference = PairFeatures(*reference, *(self._head or (target.temperature, target.bias)))
        rows = self._rows(step, self.size(total), target, of_reference)
        is_wrong, on_host = torch.cat([wrong.reshape(1).to(rows.dtype), rows]).cpu().tensor_split([1])
        if is_wrong.numpy()[0]:
            return None
        learnability = partial(self._learnability, rows, target, of_reference)
        return Chosen(candidates.rows(rows, on_host), (reference[0][rows], reference[1][rows]), learnability)

    def _rows(self, step: int, size: int, target: PairFeatures, of_reference: PairFeatures) -> Tensor:
        """Return the chosen among this rank's rows."""
        if not self._selection.is_joint:
            return top_k(self._excess(target, of_reference), size, group=self._ranks.group)
        # Apart from the seed of dropout, which is of the same numbers.
        seed = np.random.SeedSequence([self._seed, step], spawn_key=(_DRAWS,)).generate_state(1, np.uint64)
        return joint_selection_from_features(
            target,
            of_reference,
            size,
            chunks=min(self._selection.select_chunks, size),
            seed=int(seed[0]),
            temperature=self._selection.select_temperature if self._selection.select == "jest" else 0.0,
            loss=self._loss,
            group=self._ranks.group,
        )

    def _excess(self, target: PairFeatures, of_reference: PairFeatures) -> Tensor:
        """Return the excess losses of this rank's candidates, all being each other's negatives."""
        own, other = (pair_losses(model, loss=self._loss, group=self._ranks.group) for model in (target, of_reference))
        return own - other

    def _learnability(self, rows: Tensor, target: PairFeatures, of_reference: PairFeatures) -> dict[str, float]:
        excess = self._excess(target, of_reference)
        sums = torch.stack([torch.stack([part.sum(), torch.ones_like(part).sum()]) for part in (excess[rows], excess)])
        chosen, candidates = (total / count for total, count in self._ranks.sum(sums).tolist())
        return {"learnability_chosen": chosen, "learnability_candidates": candidates}
