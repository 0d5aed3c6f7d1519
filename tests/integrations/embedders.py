"""Small embedding models of sentence-transformers, made in memory, and columns of text for them."""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [f"w{k}" for k in range(40)]
ANCHORS = ["w1 w2 w3", "w4 w5", "w6", "w7 w8 w9 w10", "w11 w12", "w13 w14 w1", "w15"]
POSITIVES = ["w2 w3 w20", "w21 w5", "w6 w22", "w9 w8 w23", "w12", "w1 w24 w14", "w25 w15"]
NEGATIVES = ["w30", "w31 w4", "w32 w6", "w33 w7 w8", "w34", "w35 w1", "w36"]
COLUMNS = {"pairs": (ANCHORS, POSITIVES), "triplets": (ANCHORS, POSITIVES, NEGATIVES)}
FOUR = (*COLUMNS["triplets"], NEGATIVES[::-1])


def tokenizer(words=WORDS):
    vocabulary = {name: k for k, name in enumerate(["[PAD]", "[UNK]", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16)


def embedder(folder, seed=0, words=WORDS, length=16):
    """A model with random weights, without dropout, in float64."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(words) + 2, max_position_embeddings=32, initializer_range=0.3, **sizes, **off)
    path = folder / f"model-{seed}-{len(words)}-{length}"
    BertModel(config).save_pretrained(path)
    tokenizer(words).save_pretrained(path)
    module = Transformer(str(path), max_seq_length=length)
    return SentenceTransformer(modules=[module, Pooling(16)], device="cpu").double()


def features(model, columns):
    return [model.preprocess(list(column)) for column in columns]


def value_and_gradient(loss, columns, labels=None):
    loss.model.zero_grad()
    value = loss(features(loss.model, columns), labels)
    value.backward()
    gradient = torch.cat([each.grad.flatten() for each in loss.model.parameters() if each.grad is not None])
    return value.detach(), gradient


def assert_same(one, other, columns, labels=None, tolerance=1e-6):
    (value, gradient), (expected, its_gradient) = (value_and_gradient(loss, columns, labels) for loss in (one, other))
    assert abs(value - expected) <= tolerance * max(1.0, abs(expected))
    assert (gradient - its_gradient).norm() <= tolerance * its_gradient.norm()
    assert its_gradient.norm() > 0
