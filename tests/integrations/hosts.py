"""Small models, tokenizers and data of the hosts, made in memory: nothing is downloaded."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = 40


def decoder(seed=0, vocabulary=WORDS, **more):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    return LlamaForCausalLM(config).double()


def classifier(seed=0, classes=3):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).double()


def tokenizer(side="right"):
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{k}": k for k in range(3, WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side=side
    )


def sentences(count=16, seed=0, masked=2):
    """Sequences of different lengths, whose first tokens are not to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    ids = [torch.randint(3, WORDS, (length,), generator=generator).tolist() for length in lengths]
    labels = [[-100] * len(row[:masked]) + row[masked:] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "number": list(range(count))})


def labeled(count=16, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    data = sentences(count, seed).remove_columns("labels")
    return data.add_column("labels", torch.randint(0, classes, (count,), generator=generator).tolist())
