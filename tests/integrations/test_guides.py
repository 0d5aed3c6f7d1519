"""A guide that runs beside the model: the same tokens, or their text; see test_sentence_transformers.py for values."""

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra integrations (make test-integrations)")
pytestmark = pytest.mark.filterwarnings("default")

from integrations.embedders import COLUMNS, FOUR, WORDS, embedder, features, tokenizer  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import StaticEmbedding  # noqa: E402

from drrho.integrations.guides import LiveGuide, _token_rows, validate_minibatches  # noqa: E402


def static(words=WORDS):
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer(words), embedding_dim=4)], device="cpu")


@torch.no_grad()
def test_a_guide_embeds_what_the_model_reads(tmp_path):
    model, guide, other = (
        embedder(tmp_path, seed=k, words=words) for k, words in enumerate((WORDS, WORDS, WORDS[::-1]))
    )
    columns = features(model, FOUR)
    before = [dict(column) for column in columns]
    for each in (guide, other):
        expected = [torch.as_tensor(each.encode(list(texts))) for texts in FOUR]
        for size, tokens in ((None, None), (2, None), (7, None), (2, 5)):
            found = LiveGuide(model, each).embeddings(columns, None, size, tokens)
            for one, two in zip(found, expected, strict=True):
                torch.testing.assert_close(one, two.to(one), rtol=1e-6, atol=1e-6)
    assert [list(column) for column in columns] == [list(column) for column in before]


def test_texts_that_are_packed_into_one_row_are_told_apart():
    packed = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "cu_seq_lens_q": torch.tensor([0, 2, 5])}
    assert _token_rows(packed) == [[5, 6], [7, 8, 9]]


def test_guides_that_cannot_read_are_refused(tmp_path):
    model = embedder(tmp_path)
    with pytest.raises(ValueError, match="the guide has no tokenizer of transformers: cache the guide"):
        LiveGuide(model, static())
    with pytest.raises(ValueError, match="the model has no tokenizer of transformers: cache the guide"):
        LiveGuide(static(), model)
    assert not LiveGuide(model, embedder(tmp_path, seed=1)).retokenizes


def test_mini_batches_have_a_size():
    validate_minibatches(1, None)
    with pytest.raises(ValueError, match="mini_batch_size must be >= 1, got -1"):
        validate_minibatches(-1, None)
    assert len(COLUMNS["pairs"]) == 2
