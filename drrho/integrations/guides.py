"""Where a guide's embeddings of a batch come from: the guide itself, or `GuideEmbeddings`, which has them cached."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# (pyright takes this folder's file of the host's name for the host)

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.losses.gradcache import (
        _create_minibatch,
        _minibatch_ranges,
        _validate_mini_batch_num_tokens,
        has_static_embedding_input,
    )
    from sentence_transformers.util import batch_to_device
    from transformers import PreTrainedTokenizerBase
except ImportError as error:
    raise ImportError(f"{error}: pip install 'drrho[integrations]', for sentence-transformers 6") from error

#: The model's inputs for each column of a batch, as sentence-transformers' collator makes them.
Columns: TypeAlias = Sequence[dict[str, Any]]


class Guide(Protocol):
    """The reference model, as the losses see it."""

    def embeddings(self, columns: Columns, labels: Tensor | None, size: int | None, tokens: int | None) -> list[Tensor]:
        """Return the embeddings ``[b, d]`` of each column of a batch, on its device.

        Labels ``[b]`` are the samples' numbers; a guide that runs may read ``size`` texts or ``tokens`` at a time.
        """
        ...


class LiveGuide:
    """A guide that reads what the model reads: the same tokens, or their text, if its tokenizer is another.

    Raises
    ------
    ValueError
        If the text of the model's tokens is needed but cannot be had.
    """

    def __init__(self, model: SentenceTransformer, guide: SentenceTransformer) -> None:
        self._guide, self._tokenizer = guide, model.tokenizer
        for name, each in (("model", model), ("guide", guide)):
            if not isinstance(getattr(each, "tokenizer", None), PreTrainedTokenizerBase):
                raise ValueError(f"the {name} has no tokenizer of transformers: cache the guide by GuideEmbeddings")
        self.retokenizes = (
            model.tokenizer.get_vocab() != guide.tokenizer.get_vocab() or guide.max_seq_length < model.max_seq_length
        )
        if self.retokenizes and has_static_embedding_input(model):
            raise ValueError("the guide's tokenizer is another than a StaticEmbedding's: cache it by GuideEmbeddings")

    def embeddings(self, columns: Columns, labels: Tensor | None, size: int | None, tokens: int | None) -> list[Tensor]:
        """Return the guide's embeddings."""
        if size is None:
            return [self._embedded(column) for column in columns]
        return [
            torch.cat(
                [self._embedded(_create_minibatch(column, *part)) for part in _minibatch_ranges(column, size, tokens)]
            )
            for column in columns
        ]

    def _embedded(self, column: dict[str, Any]) -> Tensor:
        inputs = dict(column)  # a model writes its outputs into its inputs
        if self.retokenizes:
            texts = self._tokenizer.batch_decode(_token_rows(column), skip_special_tokens=True)
            inputs = batch_to_device(self._guide.preprocess(texts), self._guide.device)
        return self._guide(inputs)["sentence_embedding"]


def _token_rows(column: dict[str, Any]) -> Tensor | list[list[int]]:
    """Return the tokens of each text, also of texts that are packed into one row."""
    if "cu_seq_lens_q" not in column:
        return column["input_ids"]
    tokens, bounds = column["input_ids"][0].tolist(), column["cu_seq_lens_q"].tolist()
    return [tokens[first:end] for first, end in itertools.pairwise(bounds)]


def validate_minibatches(size: int, tokens: int | None) -> None:
    """Raise a ``ValueError`` for a size of mini-batches that is not positive."""
    if size < 1:
        raise ValueError(f"mini_batch_size must be >= 1, got {size}")
    _validate_mini_batch_num_tokens(tokens)
