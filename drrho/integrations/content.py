"""Reference losses that are found by what a sample holds: its tokens, and for classification its label.

A trainer shuffles, packs and pads samples and drops their numbers; their tokens stay. A sequence is what attends to
itself: a row of a batch without its padding, or where ``position_ids`` begin again at 0, one of the documents of a
packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drrho.integrations.reference_losses import ReferenceLosses
from drrho.integrations.reference_writing import HEADER

#: Under which key a batch has the reference's losses.
NAME = "drrho_reference_losses"
IGNORED = -100

Batch = Mapping[str, Any]
Collator = Callable[..., Batch]


class Sequence(NamedTuple):
    """Where a sequence stands in a batch, and its tokens ``[length]``."""

    row: int
    places: NDArray[np.int64]
    tokens: NDArray[np.int64]


def sequences_of(batch: Batch) -> Iterator[Sequence]:
    """Yield the sequences of a batch with ``input_ids`` ``[b, t]``, row by row.

    Raises
    ------
    ValueError
        If it has no ``input_ids``, or an ``attention_mask`` of another shape.
    """
    if (ids := batch.get("input_ids")) is None:
        raise ValueError(f"a batch must have input_ids to be found by its tokens, got {', '.join(batch)}")
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {list(ids.shape)}, got {list(mask.shape)}")
    positions = batch.get("position_ids")
    for row, tokens in enumerate(ids.cpu().numpy().astype("<i8")):
        places = np.arange(len(tokens)) if mask is None else np.flatnonzero(mask[row].cpu().numpy())
        starts = [] if positions is None else np.flatnonzero(positions[row].cpu().numpy()[places] == 0)
        for part in np.split(places, [start for start in starts if start > 0]):
            yield Sequence(row, part, tokens[part])


def key_of(tokens: NDArray[np.int64], label: int | None = None) -> NDArray[np.uint64]:
    """Return 128 bits of a hash of tokens and, if there is one, of a label."""
    content = np.ascontiguousarray(tokens, dtype="<i8").tobytes() + (b"" if label is None else b"label %d" % label)
    return np.frombuffer(blake2b(content, digest_size=16).digest(), "<u8")


class Tokens:
    """Every token of a sequence but the first has a loss."""

    name = "token"

    @staticmethod
    def pieces(batch: Batch) -> list[tuple[NDArray[np.uint64], int, Sequence]]:
        """Return key, number of losses and place of the sequences of a batch that have losses."""
        found = [sequence for sequence in sequences_of(batch) if len(sequence.tokens) > 1]
        return [(key_of(sequence.tokens), len(sequence.tokens) - 1, sequence) for sequence in found]

    @staticmethod
    def spread(batch: Batch, pieces: list[Sequence], losses: Tensor) -> Tensor:
        """Return the losses ``[b, t - 1]`` of the batch's next tokens, NaN where there is none."""
        spread, start = torch.full(batch["input_ids"].shape, torch.nan), 0
        for row, places, tokens in pieces:
            spread[row, places[1:]] = losses[start : start + len(tokens) - 1]
            start += len(tokens) - 1
        _refuse_labels(batch, spread)
        return spread[:, 1:]

    @staticmethod
    def gather(pieces: list[Sequence], losses: Tensor) -> Tensor:
        """Return the losses of sequences one after another, of losses ``[b, t - 1]`` of the batch's next tokens."""
        return torch.cat([losses[row, torch.from_numpy(places[1:] - 1)] for row, places, _ in pieces])


class Samples:
    """Every sample has one loss, of its label."""

    name = "sample"

    @staticmethod
    def pieces(batch: Batch) -> list[tuple[NDArray[np.uint64], int, Sequence]]:
        """Return key, number of losses and place of the samples of a batch."""
        rows = sequences_of({name: batch[name] for name in ("input_ids", "attention_mask") if name in batch})
        return [(key_of(row.tokens, label), 1, row) for row, label in zip(rows, batch["labels"].tolist(), strict=True)]

    @staticmethod
    def spread(batch: Batch, pieces: list[Sequence], losses: Tensor) -> Tensor:
        """Return the losses ``[b]``."""
        return losses

    @staticmethod
    def gather(pieces: list[Sequence], losses: Tensor) -> Tensor:
        """Return the losses ``[b]``."""
        return losses


Content = type[Tokens] | type[Samples]


def _refuse_labels(batch: Batch, spread: Tensor) -> None:
    """Raise if a label is not of its token: the losses are those of the tokens."""
    labels, ids = batch["labels"], batch["input_ids"]
    asked = labels != IGNORED
    asked[:, 0] = False
    for wrong, what in (
        (asked & (labels != ids), "is not that of its token; pass the reference as a model, without a cache"),
        (asked & spread.isnan(), f"is of the first token of a sequence, which nothing predicts: make it {IGNORED}"),
    ):
        if wrong.any():
            row, place = wrong.nonzero()[0].tolist()
            raise ValueError(f"label {int(labels[row, place])} at place {place} of row {row} {what}")


class ReferenceCollator:
    """Adds the reference's losses, looked up by content, to the batches of a data collator."""

    def __init__(self, collator: Collator, reference: ReferenceLosses, content: Content) -> None:
        self.collator, self.reference, self.content = collator, reference, content

    def __call__(self, *arguments: Any, **named: Any) -> Batch:
        """Return the batch with the reference's losses.

        Raises
        ------
        ValueError
            If a sample has no losses.
        """
        batch = self.collator(*arguments, **named)
        pieces = self.content.pieces(batch)
        keys = np.array([key for key, *_ in pieces], np.uint64).reshape(-1, 2)
        rows = self.reference.find(keys)
        if (absent := rows < 0).any():
            first = pieces[int(absent.argmax())][2].tokens
            raise ValueError(
                f"{int(absent.sum())} of {len(rows)} sequences of a batch have no losses in {self.reference.folder}, "
                f"one of {len(first)} tokens that begins with {first[:8].tolist()}: they are of other data, or of "
                "another tokenizer or truncation; choose another folder"
            )
        losses = self.content.spread(batch, [piece for *_, piece in pieces], self.reference.lookup(rows))
        return {**batch, NAME: losses}


def compute_by_content(
    folder: Any,
    losses_of: Callable[[Batch], Tensor],
    batches: Callable[[], Iterable[Batch]],
    content: Content,
    about: Mapping[str, Any],
) -> ReferenceLosses:
    """Compute the losses of what two passes over ``batches()`` hold; equal sequences are stored once.

    ``losses_of`` maps a batch to ``[b, t - 1]`` or ``[b]``. If the folder is complete, nothing is read.
    """
    if (Path(folder) / HEADER).exists():
        return ReferenceLosses(folder, about)
    pieces = [(*key.tolist(), length) for batch in batches() for key, length, _ in content.pieces(batch)]
    known = np.unique(np.array(pieces, np.uint64).reshape(-1, 3), axis=0)
    keys, lengths = known[:, :2], known[:, 2].astype(np.int64)
    rows = {tuple(key): row for row, key in enumerate(keys.tolist())}

    def numbered() -> Iterator[tuple[list[int], Batch]]:
        for batch in batches():
            yield [rows[tuple(key.tolist())] for key, *_ in content.pieces(batch)], batch

    def losses(batch: Batch) -> Tensor:
        return content.gather([piece for *_, piece in content.pieces(batch)], losses_of(batch).cpu())

    size = lengths if content is Tokens else len(lengths)
    return ReferenceLosses.compute(folder, losses, numbered(), size, about=about, keys=keys)
