"""What a step costs more when embeddings, or a CLIP model, are steered by a reference's cached features.

    python -m experiments.benchmarks.embedding_overhead

As `experiments.benchmarks.steering_overhead` measures it: both kinds of step in turn, in one thread's processor time.
It needs the extra ``integrations``.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import normalize

from drrho import KL, ChiSquare, CVaR, Divergence
from drrho.integrations.open_clip import steer
from experiments.benchmarks.measure import markdown, provenance
from experiments.benchmarks.steering_overhead import compared_steps
from experiments.embeddings.run import load_guide

RISKS: dict[str, Divergence] = {"KL": KL(), "chi-square": ChiSquare(), "CVaR(0.1)": CVaR(0.1)}
OUTPUT = Path(__file__).parent / "results" / "embedding_overhead.md"
BATCH, SAMPLES, WIDTH = 64, 512, 384
_WORDS = "a the small large red old tool animal plant stone water house part kind of for with used in made from".split()


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="pairs of steps for each row")
    parser.add_argument("--write", action="store_true", help=f"write {OUTPUT.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for host, make in HOSTS.items():
            for name, divergence in RISKS.items():
                compared = make(Path(folder), None), make(Path(folder), divergence)
                rows.append(compared_steps(host, name, *compared, options.steps))
                print(rows[-1], flush=True)
    names = ("torch", "sentence-transformers", "open_clip_torch")
    record = provenance("python -m experiments.benchmarks.embedding_overhead --write", names)
    text = "# Overhead of steering with cached features\n\n" + markdown(rows)
    text += (
        f"\n\nBatches of {BATCH} pairs, float32, one thread. sentence-transformers: the first two layers"
        " of all-MiniLM-L6-v2 in its trainer, texts of 16 words. open_clip: towers of 4 layers and width 192, images of"
        " 64 x 64. Both kinds of step in turn; the interval is that of the median, by order statistics.\n\n"
    )
    text += "\n".join(f"- {key}: {value}" for key, value in record.items()) + "\n"
    print(text)
    if options.write:
        OUTPUT.write_text(text)


def _sentence_transformers(folder: Path, divergence: Divergence | None) -> Callable[[], object]:
    """Return a step of its trainer; texts are made up, and the guide is the model before training."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from sentence_transformers import (  # pyright: ignore[reportMissingImports]
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import (  # pyright: ignore[reportMissingImports]
        MultipleNegativesRankingLoss,
    )

    from drrho.integrations.guide_embeddings import GuideEmbeddings
    from drrho.integrations.sentence_transformers import SteeredMultipleNegativesRankingLoss

    chosen = torch.randint(len(_WORDS), (2, SAMPLES, 16), generator=torch.Generator().manual_seed(0))
    columns = [[" ".join(_WORDS[k] for k in row) for row in column.tolist()] for column in chosen]
    data, guide = Dataset.from_dict(dict(zip(("anchor", "positive"), columns, strict=True))), load_guide()
    model = copy.deepcopy(guide)
    model[0].auto_model.encoder.layer = model[0].auto_model.encoder.layer[:2]
    loss: Any = MultipleNegativesRankingLoss(model)
    if divergence is not None:
        cached = GuideEmbeddings.cached(folder / "guide", guide, data)
        loss, data = SteeredMultipleNegativesRankingLoss(model, cached, divergence=divergence), cached.dataset
    plain: Any = {"per_device_train_batch_size": BATCH, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = SentenceTransformerTrainingArguments(str(folder / "outputs"), **plain)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
    trainer.create_optimizer()
    batches = (batch for _ in cycle([None]) for batch in trainer.get_train_dataloader())
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        trainer.training_step(trainer.model, next(batches))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


class _Table:
    """Features of a reference, by number."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self._both = [normalize(torch.randn(SAMPLES, WIDTH, generator=generator), dim=-1).half() for _ in range(2)]

    def rows(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image and text features."""
        return self._both[0][index], self._both[1][index]


def _open_clip(folder: Path, divergence: Divergence | None) -> Callable[[], object]:
    """Return a step of open_clip's model and loss."""
    from open_clip.loss import ClipLoss  # pyright: ignore[reportMissingImports]
    from open_clip.model import CLIP  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    vision: Any = {"layers": 4, "width": 192, "head_width": 64, "patch_size": 16, "image_size": 64}
    text: Any = {"context_length": 32, "vocab_size": 8192, "width": 192, "heads": 3, "layers": 4}
    model = CLIP(128, vision, text)
    pairs = TensorDataset(torch.randn(SAMPLES, 3, 64, 64), torch.randint(1, 8192, (SAMPLES, 32)))
    data, loss = SimpleNamespace(dataloader=DataLoader(pairs, BATCH, shuffle=True)), ClipLoss()
    if divergence is not None:
        loss = steer(loss, data, _Table(), divergence=divergence)
    optimizer = torch.optim.AdamW(model.parameters())
    batches = (batch for _ in cycle([None]) for batch in data.dataloader)

    def step() -> None:
        loss(*model(*next(batches))[:3]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


HOSTS = {"sentence-transformers": _sentence_transformers, "open_clip": _open_clip}

if __name__ == "__main__":
    main()
