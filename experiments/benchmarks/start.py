"""Seconds until a rank has its data open, with many shards, of which each rank looks at its share.

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
from PIL import Image

from experiments.clip.catalog.catalog import Catalog, check_shards, make_catalog, open_catalog
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


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long an action takes, and its result."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def opened_catalog(folder: Path, ranks: int) -> Catalog:
    """Open a catalog as a rank does, which looks at its share of the shards."""
    catalog = open_catalog(folder, verify=False)
    check_shards(catalog, Ranks(0, ranks).own_indices(len(catalog.shards)))
    return catalog


def opened(folder: Path, reference: Clip, ranks: int) -> dict[str, float]:
    """Return how long the parts of the start of a rank take, until its first batch is there."""
    for_catalog, catalog = seconds(partial(opened_catalog, folder / "catalog", ranks))
    share = Ranks(0, ranks)
    for_features, beside = seconds(partial(open_features, reference, catalog, folder / "features", share))
    transform = reference.in_bytes(reference.augment)
    loader = Loader(catalog, transform, reference.tokenize, batch_size=64, seed=0, reference=beside)
    for_batch, _ = seconds(lambda: next(loader.batches(0)))
    return {"catalog": for_catalog, "cached features": for_features, "first batch of 64": for_batch}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    reference = load_model(SHIPPED_REFERENCE)
    files.os.fsync = lambda descriptor: None  # what is written here need not survive a loss of power
    rows: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        write_shards(folder / "shards", options.shards)
        made = make_catalog(str(folder / "shards/*.tar"), folder / "catalog")
        cache_features(reference, made, folder / "features")
        for _ in range(options.rounds):
            for ranks in _RANKS:
                for part, taken in opened(folder, reference, ranks).items():
                    rows.setdefault((part, ranks), []).append(taken)
    lines = [
        f"# Seconds until a rank has {options.shards:,} shards open",
        "",
        f"`python -m experiments.benchmarks.start`: local shards of one pair each, median of {options.rounds} rounds, "
        "one process. Each rank looks at its share of the shards, indexes and files of features.",
        "",
        f"| | {' | '.join('one rank' if ranks == 1 else f'a rank of {ranks}' for ranks in _RANKS)} |",
        f"|---|{'---:|' * len(_RANKS)}",
    ]
    parts = list(dict.fromkeys(part for part, _ in rows))
    medians = {key: float(np.median(values)) for key, values in rows.items()}
    lines += [f"| {part} | {' | '.join(f'{medians[part, ranks]:.2f}' for ranks in _RANKS)} |" for part in parts]
    totals = [sum(medians[part, ranks] for part in parts) for ranks in _RANKS]
    lines.append(f"| together | {' | '.join(f'{total:.2f}' for total in totals)} |")
    _RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
