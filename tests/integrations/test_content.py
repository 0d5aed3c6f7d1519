"""Reference losses by content: padding, packing and order do not matter, and what differs is named."""

import numpy as np
import pytest
import torch

from drrho.integrations.content import (
    NAME,
    ReferenceCollator,
    Samples,
    Tokens,
    compute_by_content,
    key_of,
    sequences_of,
)

LEFT = {
    "input_ids": torch.tensor([[0, 5, 6, 7], [3, 4, 8, 9]]),
    "attention_mask": torch.tensor([[0, 1, 1, 1], [1] * 4]),
}
RIGHT = {
    "input_ids": torch.tensor([[5, 6, 7, 0], [3, 4, 8, 9]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1] * 4]),
}
PACKED = {"input_ids": torch.tensor([[3, 4, 8, 9, 5, 6, 7]]), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}


def with_labels(batch):
    """All tokens are to be predicted but the first of every sequence."""
    labels = torch.full_like(batch["input_ids"], -100)
    for row, places, tokens in sequences_of(batch):
        labels[row, places[1:]] = torch.from_numpy(tokens[1:])
    return {**batch, "labels": labels}


def loss_of(batch):
    """A loss of every next token that depends on the token alone."""
    return batch["input_ids"][:, 1:].float() / 8


def computed(folder, batch=RIGHT, content=Tokens, losses_of=loss_of):
    return compute_by_content(folder, losses_of, lambda: [with_labels(batch)], content, {"reference": "by hand"})


@pytest.mark.parametrize("batch", [LEFT, RIGHT, PACKED], ids=["left", "right", "packed"])
def test_sequences_are_rows_without_padding_or_documents_of_a_packed_row(batch):
    found = {tuple(sequence.tokens) for sequence in sequences_of(batch)}
    assert found == {(5, 6, 7), (3, 4, 8, 9)}
    for row, places, tokens in sequences_of(batch):
        assert batch["input_ids"][row, places].tolist() == tokens.tolist()


@pytest.mark.parametrize("batch", [LEFT, RIGHT, PACKED], ids=["left", "right", "packed"])
@pytest.mark.parametrize("source", [LEFT, RIGHT, PACKED], ids=["of left", "of right", "of packed"])
def test_losses_stand_at_their_tokens_however_they_are_padded_or_packed(tmp_path, source, batch):
    collator = ReferenceCollator(with_labels, computed(tmp_path, source), Tokens)
    found = collator(batch)
    labels = found["labels"][:, 1:]
    asked = labels != -100
    assert found[NAME][asked].equal(labels[asked].float() / 8)
    assert found[NAME].shape == labels.shape and found[NAME][:, -1].isfinite().any()


def test_equal_sequences_are_stored_once(tmp_path):
    twice = {name: torch.cat([part, part]) for name, part in RIGHT.items()}
    assert len(computed(tmp_path, twice)) == 2


def test_a_complete_folder_is_not_computed_again(tmp_path):
    computed(tmp_path)
    again = compute_by_content(tmp_path, None, None, Tokens, {"reference": "by hand"})
    assert len(again) == 2
    with pytest.raises(ValueError, match="'reference' is 'by hand' there and 'another' here"):
        compute_by_content(tmp_path, None, None, Tokens, {"reference": "another"})


def test_samples_are_found_by_tokens_and_label(tmp_path):
    batch = {**RIGHT, "labels": torch.tensor([1, 0])}
    losses = compute_by_content(tmp_path, lambda batch: torch.tensor([0.5, 0.25]), lambda: [batch], Samples, {})
    flipped = {name: part.flip(0) for name, part in batch.items()}
    assert ReferenceCollator(dict, losses, Samples)(flipped)[NAME].tolist() == [0.25, 0.5]
    with pytest.raises(ValueError, match="1 of 2 sequences of a batch have no losses"):
        ReferenceCollator(dict, losses, Samples)({**batch, "labels": torch.tensor([1, 2])})


def test_a_key_tells_tokens_and_labels_apart():
    keys = [
        key_of(np.array(tokens), label) for tokens, label in [([1, 2], None), ([2, 1], None), ([1, 2], 0), ([1], 2)]
    ]
    assert len({tuple(key) for key in keys}) == 4 and keys[0].dtype == np.uint64
    assert (key_of(np.array([1, 2], np.int32)) == keys[0]).all()


def test_other_data_is_named(tmp_path):
    collator = ReferenceCollator(with_labels, computed(tmp_path), Tokens)
    other = {**RIGHT, "input_ids": RIGHT["input_ids"] + 1}
    with pytest.raises(
        ValueError, match=r"2 of 2 sequences .* one of 3 tokens that begins with \[6, 7, 8\]: they are of"
    ):
        collator(other)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"labels": torch.tensor([[-100, 9, 7, -100], [-100] * 4])},
            "label 9 at place 1 of row 0 is not that of its token",
        ),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask must have the shape of input_ids, \[2, 4\], got"),
        ({"input_ids": None}, "a batch must have input_ids to be found by its tokens"),
    ],
)
def test_batches_that_are_not_of_next_tokens_are_refused(tmp_path, change, message):
    collator = ReferenceCollator(dict, computed(tmp_path), Tokens)
    with pytest.raises(ValueError, match=message):
        collator({**with_labels(RIGHT), **change})


@pytest.mark.parametrize("batch, place", [(PACKED, 4), (LEFT, 1)], ids=["packed", "left"])
def test_a_first_token_has_no_reference_loss(tmp_path, batch, place):
    labels = batch["input_ids"].where(batch["input_ids"] > 0, -100)
    with pytest.raises(ValueError, match=f"label 5 at place {place} of row 0 is of the first token of a sequence"):
        ReferenceCollator(dict, computed(tmp_path, batch), Tokens)({**batch, "labels": labels})
