"""Seconds until a rank has its data open, with many shards, a share of which it looks at.

python -m experiments.benchmarks.start
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.benchmarks.measure import provenance
from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.cli.sources import open_shared_catalog
from experiments.clip.data.loader import Loader
from experiments.clip.distributed import Ranks
from experiments.clip.io import files
from experiments.clip.models.clip import Clip, load_model
from experiments.clip.reference.cache import cache_features, open_features
from experiments.clip.training.options import SHIPPED_REFERENCE

_RANKS = (1, 8, 64)
_RESULTS = Path(__file__).parent / "results" / "start.md"


def write_shards(folder: Path, count: int) -> None:
    """Write shards of one pair each."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "PNG")
    for number in range(count):
        with tarfile.open(folder / f"{number:06d}.tar", "w") as tar:
            for name, data in (("png", stream.getvalue()), ("txt", b"pair number %d" % number)):
                info = tarfile.TarInfo(f"{number}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


class _Quick(Clip):
    """Has features at once: that each shard has a file of them is what counts here."""

    def encode_image(self, images: Tensor) -> Tensor:
        return torch.ones(len(images), 64) / 8

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return torch.ones(len(tokens), 64) / 8


def seconds(action: Callable[[], Any]) -> tuple[np.ndarray, Any]:
    """Return how long an action takes, by the clock and of this process's time, and its result."""
    started = np.array([time.perf_counter(), time.process_time()])
    result = action()
    return np.array([time.perf_counter(), time.process_time()]) - started, result


def opened(folder: Path, reference: Clip, ranks: Ranks) -> dict[str, np.ndarray]:
    """Return how long the parts of a start take, until the first batch is there."""
    for_catalog, catalog = seconds(partial(open_shared_catalog, folder / "catalog", ranks))
    for_features, beside = seconds(partial(open_features, reference, catalog, folder / "features", ranks))
    transform = reference.in_bytes(reference.augment)
    loader = Loader(catalog, transform, reference.tokenize, batch_size=64, seed=0, reference=beside)
    for_batch, _ = seconds(lambda: next(loader.batches(0)))
    return {"catalog": for_catalog, "cached features": for_features, "first batch of 64": for_batch}


def _cell(taken: Any) -> str:
    return f"{taken[0]:.2f} ({taken[1]:.2f})"


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    record = provenance("python -m experiments.benchmarks.start")
    reference = _Quick(**vars(load_model(SHIPPED_REFERENCE)))
    files.os.fsync = lambda descriptor: None  # what is written here need not survive a loss of power
    rows: dict[tuple[str, int], list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        write_shards(folder / "shards", options.shards)
        made = make_catalog(str(folder / "shards/*.tar"), folder / "catalog")
        cache_features(reference, made, folder / "features")
        for _ in range(options.rounds):
            for count in _RANKS:
                for part, taken in opened(folder, reference, Ranks(1 % count, count)).items():
                    rows.setdefault((part, count), []).append(taken)
    lines = [
        f"# Seconds until a rank has {options.shards:,} shards open",
        "",
        f"`python -m experiments.benchmarks.start`, {record['date']}. {record['machine']}, load {record['load']} at "
        f"the start. Local shards of one pair each, median of {options.rounds} rounds, one process, as one of so many "
        "ranks, each of which looks at a share of shards, indexes and features. In brackets: processor time.",
        "",
        "| |" + "".join(f" of {count} |" for count in _RANKS),
        "|---|" + "---:|" * len(_RANKS),
    ]
    medians = {key: np.median(values, axis=0) for key, values in rows.items()}
    parts = list(dict.fromkeys(part for part, _ in rows))
    for part in parts:
        lines.append(f"| {part} |" + "".join(f" {_cell(medians[part, count])} |" for count in _RANKS))
    totals = [sum(medians[part, count] for part in parts) for count in _RANKS]
    lines.append("| together |" + "".join(f" {_cell(total)} |" for total in totals))
    _RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
