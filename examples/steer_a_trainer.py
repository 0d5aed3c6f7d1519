"""How do I steer Hugging Face's Trainer?

    pip install ".[integrations]"
    python examples/steer_a_trainer.py

One line changes. The texts are sequences that count on, of which a third is shuffled; the reference has seen others.
`steer_your_trainer.py` beside this file measures the same on real text, with three seeds.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

from drrho import CVaR
from drrho.integrations.trainer import steered

logging.set_verbosity_error()
generator = torch.Generator().manual_seed(0)


def sequences(count: int, wrong: float) -> list[dict[str, list[int]]]:
    """Return rows of 16 tokens that count on from a random one; a share of them is shuffled."""
    rows = []
    for start in torch.randint(32, (count,), generator=generator).tolist():
        row = [(start + k) % 32 for k in range(16)]
        if torch.rand((), generator=generator) < wrong:
            row = [row[k] for k in torch.randperm(16, generator=generator).tolist()]
        rows.append({"input_ids": row, "labels": row})
    return rows


def loss_after_training(kind: type, rows: list[dict[str, list[int]]], folder: str) -> tuple[LlamaForCausalLM, float]:
    """Return a small model, trained for 150 steps, and its loss on right sequences."""
    torch.manual_seed(1)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **size))
    options = {
        "max_steps": 150,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    arguments = TrainingArguments(folder, use_cpu=True, disable_tqdm=False, per_device_train_batch_size=16, **options)
    trainer = kind(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return model, trainer.evaluate(held_out)["eval_loss"]


noisy, others, held_out = sequences(800, 1 / 3), sequences(800, 0.0), sequences(200, 0.0)
with tempfile.TemporaryDirectory() as folder:
    reference, _ = loss_after_training(Trainer, others, folder)
    _, plain = loss_after_training(Trainer, noisy, folder)
    _, ours = loss_after_training(steered(Trainer, CVaR(0.6), reference=reference), noisy, folder)  # the line
print(f"loss of held-out right sequences: {plain:.2f} without, {ours:.2f} with steering")
