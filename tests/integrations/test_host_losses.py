"""Losses of what hosts' models return, and settings with which they would be wrong."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from drrho.integrations.host_losses import about, losses_of_outputs, outputs_of, refuse_outputs, rows_of

LABELS = torch.tensor([[-100, 1, 2, -100], [-100, 0, -100, 2]])


def logits(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("outputs", [lambda x: {"logits": x}, lambda x: (x,)], ids=["dict", "tuple"])
def test_losses_are_of_the_next_tokens(outputs):
    scores = logits(2, 4, 3)
    found = losses_of_outputs(outputs(scores), LABELS, "token")
    chances = scores.log_softmax(-1)
    expected = -torch.tensor([[chances[0, 0, 1], chances[0, 1, 2], 0], [chances[1, 0, 0], 0, chances[1, 2, 2]]])
    assert torch.allclose(found, expected)


def test_losses_of_samples():
    scores, labels = logits(4, 3), torch.tensor([0, 2, 1, 1])
    expected = -scores.log_softmax(-1)[range(4), labels]
    assert torch.allclose(losses_of_outputs((scores,), labels, "sample"), expected)


@pytest.mark.parametrize(
    "level, shape, labels",
    [
        ("token", (2, 3), torch.tensor([0, 1])),
        ("token", (2, 5, 3), LABELS),
        ("sample", (2, 4, 3), LABELS),
        ("sample", (2, 1), torch.rand(2)),
        ("sample", (2, 3), torch.rand(2, 3)),
    ],
)
def test_labels_that_do_not_fit_are_refused(level, shape, labels):
    with pytest.raises(ValueError, match=f"level='{level}' needs one label for each row of logits, got logits"):
        losses_of_outputs((logits(*shape),), labels, level)


def test_rows_of_tokens_and_of_sequences():
    losses, reference = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3) / 2
    tokens = rows_of(losses, reference, LABELS, None, "token")
    assert tokens.losses.tolist() == [0, 1, 3, 5] and tokens.reference.tolist() == [0, 0.5, 1.5, 2.5]
    assert tokens.tokens is None
    sequences = rows_of(losses, reference, LABELS, None, "sequence")
    assert sequences.losses.tolist() == [0.5, 4] and sequences.reference.tolist() == [0.25, 2]
    assert sequences.tokens.tolist() == [2, 2]


def test_documents_of_a_packed_row_are_sequences():
    labels = torch.tensor([[-100, 5, 6, -100, 7, -100, -100, 8, 9]])
    places = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    losses = torch.tensor([[1.0, 3, 0, 5, 0, 0, 2, 6]])
    rows = rows_of(losses, losses, labels, places, "sequence")
    assert rows.losses.tolist() == [2, 5, 4] and rows.tokens.tolist() == [2, 1, 2]


def test_rows_of_samples_are_as_they_are():
    losses = torch.rand(3)
    assert rows_of(losses, losses, torch.zeros(3), None, "sample") == (losses, losses, None)


def test_losses_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"those of the labels \[2, 3\] .* got \[2, 4\] and \[2, 3\]"):
        rows_of(torch.zeros(2, 4), torch.zeros(2, 3), LABELS, None, "token")


def model_of(**config):
    model = nn.Linear(3, 2)
    text = SimpleNamespace(**config)
    model.config = SimpleNamespace(**config, get_text_config=lambda: text)
    return model


def test_a_reference_is_known_by_its_weights():
    model = model_of(num_labels=2, vocab_size=7)
    before = about(model, "sample")
    assert before["outputs"] == 2 and before["dtype"] == "torch.float32" and about(model, "token")["outputs"] == 7
    with torch.no_grad():
        model.bias[1] += 1
    after = about(model, "sample")
    assert {key for key in before if before[key] != after[key]} == {"reference"}
    assert about(nn.Linear(1, 1), "sample")["outputs"] is None


def test_a_vocabulary_is_common():
    models = {size: model_of(vocab_size=size, num_labels=size) for size in (40, 48)}
    refuse_outputs(models[40], models[40], "token", False)
    refuse_outputs(models[40], nn.Linear(1, 1), "token", False)
    refuse_outputs(models[40], models[48], "token", True)
    message = r"must have the same vocabulary, got 48 and 40 outputs.*padded_vocabulary=True"
    with pytest.raises(ValueError, match=message):
        refuse_outputs(models[40], models[48], "token", False)
    with pytest.raises(ValueError, match="must have the same classes, got 40 and 48 outputs"):
        refuse_outputs(models[48], models[40], "sample", True)
    assert outputs_of(nn.Linear(1, 1), "token") is None
