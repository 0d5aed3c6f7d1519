"""What a step costs more when it is steered by stored reference losses.

    python -m experiments.benchmarks.steering_overhead

Each host trains the same small language model with and without steering, one step of each in turn: batch from the data
loader, forward and backward pass, update. What is measured is the processor's time of one thread, which other processes
do not change. It needs the extra ``integrations``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from drrho import KL, ChiSquare, CVaR
from drrho.integrations import ReferenceLosses, Steering
from drrho.integrations.trainer import steered
from experiments.benchmarks.measure import markdown, provenance

VOCABULARY, LENGTH, BATCH, SAMPLES = 4096, 128, 4, 64
OUTPUT = Path(__file__).parent / "results" / "steering_overhead.md"
RISKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "KL, strength 1": (KL(), {"strength": 1.0}),
    "chi-square, radius 0.5": (ChiSquare(), {"radius": 0.5}),
    "CVaR, half of the tokens": (CVaR(0.5), {}),
}


@dataclass
class Row:
    """Processor times of one host, in milliseconds, and the share that steering adds."""

    host: str
    steering: str
    plain_ms: str
    steered_ms: str
    overhead_median: str
    overhead_95: str


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="pairs of steps for each row")
    parser.add_argument("--write", action="store_true", help=f"write {OUTPUT.name}")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, risk in RISKS.items():
            for host, make in HOSTS.items():
                rows.append(compared_steps(host, name, make(Path(folder), None), make(Path(folder), risk), steps))
                print(rows[-1], flush=True)
    record = provenance("python -m experiments.benchmarks.steering_overhead --write", ("torch", "transformers", "trl"))
    text = "# Overhead of steering with stored reference losses\n\n" + markdown(rows)
    text += f"\n\nA decoder of {_parameters():,} parameters, {BATCH} x {LENGTH} tokens a step, float32, one thread.\n"
    text += "Processor time. Both kinds of step in turn; the interval is that of the median, by order statistics.\n\n"
    text += "\n".join(f"- {key}: {record[key]}" for key in ("command", "date", "machine", "load", "versions")) + "\n"
    print(text)
    if parser.parse_args().write:
        OUTPUT.write_text(text)


def compared_steps(host: str, name: str, plain: Callable[[], object], ours: Callable[[], object], steps: int) -> Row:
    """Return how long steps take plain and steered, each after the other, in turns of order."""
    times: list[list[float]] = [[], []]
    for k in range(steps + 2):
        for which in (0, 1) if k % 2 else (1, 0):
            start = time.process_time()
            (plain, ours)[which]()
            times[which].append(time.process_time() - start)
    before, after = (part[2:] for part in times)
    shares = sorted(b / a - 1 for a, b in zip(before, after, strict=True))
    half = int(0.98 * len(shares) ** 0.5)
    low, high = shares[max(len(shares) // 2 - half, 0)], shares[min(len(shares) // 2 + half, len(shares) - 1)]
    return Row(
        host,
        name,
        f"{1e3 * statistics.median(before):.0f}",
        f"{1e3 * statistics.median(after):.0f}",
        f"{statistics.median(shares):+.1%}",
        f"{low:+.1%} to {high:+.1%}",
    )


def _model(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    torch.manual_seed(seed)
    size = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **size))


def _parameters() -> int:
    return sum(weight.numel() for weight in _model().parameters())


def _data() -> Any:
    from datasets import Dataset  # pyright: ignore[reportMissingImports]

    ids = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def _arguments(kind: type, folder: Path, **more: Any) -> Any:
    plain = {"per_device_train_batch_size": BATCH, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    return kind(output_dir=str(folder / "outputs"), **plain, **more)


def _steps_of(trainer: Any) -> Callable[[], object]:
    trainer.create_optimizer()
    batches: Iterator[Any] = cycle([None])
    batches = (batch for _ in batches for batch in trainer.get_train_dataloader())
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        batch = next(batches)
        trainer.training_step(trainer.model, batch, torch.tensor(BATCH * (LENGTH - 1)))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def _trainer(folder: Path, risk: tuple[Any, dict[str, Any]] | None) -> Callable[[], object]:
    from transformers import Trainer, TrainingArguments, default_data_collator  # pyright: ignore[reportMissingImports]

    kind: Any = Trainer
    if risk is not None:
        kind = steered(Trainer, risk[0], reference=_model(1), cache=folder / "tokens", **risk[1])
    arguments = _arguments(TrainingArguments, folder)
    return _steps_of(kind(_model(), arguments, data_collator=default_data_collator, train_dataset=_data()))


def _sft(folder: Path, risk: tuple[Any, dict[str, Any]] | None) -> Callable[[], object]:
    from tokenizers import Tokenizer, models  # pyright: ignore[reportMissingImports]
    from transformers import PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    kind: Any = SFTTrainer
    if risk is not None:
        kind = steered(SFTTrainer, risk[0], reference=_model(1), cache=folder / "tokens", **risk[1])
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    arguments = _arguments(SFTConfig, folder, bf16=False, max_length=LENGTH)
    return _steps_of(kind(_model(), arguments, train_dataset=_data(), processing_class=tokenizer))


def _loop(folder: Path, risk: tuple[Any, dict[str, Any]] | None) -> Callable[[], object]:
    """A loop of one's own over sequences, whose stored losses are found by number."""
    model, ids = _model(), torch.tensor(_data()["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters())
    steering = None
    if risk is not None:
        whole = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(1))
        batches = [(range(SAMPLES), whole)]
        stored = ReferenceLosses.compute(folder / "rows", lambda batch: batch, batches, SAMPLES, about={})
        steering = Steering(risk[0], reference=stored, **risk[1])
    numbers = (index for _ in cycle([None]) for index in torch.randperm(SAMPLES).split(BATCH))

    def step() -> None:
        index = next(numbers)
        batch = ids[index]
        logits = model(batch).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)  # [b]
        loss = losses.mean() if steering is None else steering(losses, index=index).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


HOSTS = {"Trainer": _trainer, "SFTTrainer": _sft, "PyTorch": _loop}

if __name__ == "__main__":
    main()
