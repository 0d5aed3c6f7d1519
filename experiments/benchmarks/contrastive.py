"""Measure the tiled contrastive risk against the same in straightforward torch, which keeps the similarity matrix.

``python experiments/benchmarks/contrastive.py`` prints a table and writes it as Markdown; about 20 minutes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drrho.contrastive import contrastive_risk
from experiments.benchmarks.measure import ROOT, markdown, median_seconds, provenance, seconds, within
from experiments.benchmarks.memory import forget_peak, peak

RESULTS = Path(__file__).parent / "results" / "contrastive.md"
WIDTH = 512
TEMPERATURE = 0.05
TIME_REACH = {(1024, False): 1.1, (1024, True): 1.3, (8192, False): 1.0, (8192, True): 1.3}
MEMORY_REACH = {8192: 1 / 10, 32768: 1 / 30}
GROWTH = 1.15


def plain_risk(image: Tensor, text: Tensor, reference: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the risk as one would write it: full matrices, logsumexp over rows and columns."""
    similarity = image @ text.T
    if reference is not None:
        similarity = similarity - reference[0] @ reference[1].T
    positive = similarity.diagonal()[:, None]
    own = torch.eye(len(image), dtype=torch.bool)
    total = similarity.new_zeros(())
    for matrix in (similarity, similarity.T):
        x = ((matrix - positive) / TEMPERATURE).masked_fill(own, -torch.inf)
        total = total + torch.logsumexp(x, 1).mean()
    return TEMPERATURE * total / 2


def tiled_risk(image: Tensor, text: Tensor, reference: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the same by the library, but for the constant ``tau log(b - 1)``."""
    return contrastive_risk(image, text, TEMPERATURE, reference=reference).value


FORMS = {"plain": plain_risk, "tiled": tiled_risk}


def batch(pairs: int, steered: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return seeded unit features, those of the target with gradients."""
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.nn.functional.normalize(torch.randn(pairs, WIDTH, generator=generator), dim=1)
        for _ in range(4 if steered else 2)
    ]
    image, text = (part.requires_grad_() for part in drawn[:2])
    return image, text, (drawn[2], drawn[3]) if steered else None


def step(form: str, image: Tensor, text: Tensor, reference: Any) -> None:
    """Forward and backward."""
    torch.autograd.grad(FORMS[form](image, text, reference), (image, text))


@dataclass(frozen=True)
class Row:
    """One batch size: time against the plain form, memory beyond the features against its matrices."""

    pairs: int
    steered: bool
    tiled_s: float
    plain_s: float | None
    ratio: float | None
    products: str
    reach: float | None
    met: str
    tiled_mb: float
    plain_mb: float | None
    memory_ratio: float | None
    memory_reach: float | None
    memory_met: str


def extra_megabytes(form: str, pairs: int, steered: bool) -> float:
    """Return the peak of one step beyond what is there before it, in a process of its own."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**22), "MALLOC_TRIM_THRESHOLD_": str(2**26)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, __file__, "--peak", form, str(pairs), str(int(steered))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure_peak(form: str, pairs: int, steered: bool) -> float:
    """Return the same of this process."""
    inputs = batch(pairs, steered)
    step(form, *batch(64, steered))
    forget_peak()
    before = peak()
    step(form, *inputs)
    return (peak() - before) / 1e6


def row(pairs: int, steered: bool, repeats: int, plain_per_square: dict[bool, float]) -> Row:
    """Measure one batch size; where the plain form would not fit, against the memory it takes for a square."""
    inputs = batch(pairs, steered)
    fits = pairs <= 8192
    if fits:
        tiled_s, plain_s = median_seconds([lambda: step("tiled", *inputs), lambda: step("plain", *inputs)], repeats)
        plain_mb = extra_megabytes("plain", pairs, steered)
        plain_per_square[steered] = plain_mb / pairs**2
    else:
        tiled_s = seconds(lambda: step("tiled", *inputs))
        plain_s, plain_mb = None, plain_per_square[steered] * pairs**2
    tiled_mb = extra_megabytes("tiled", pairs, steered)
    ratio = None if plain_s is None else tiled_s / plain_s
    reach, memory_reach = TIME_REACH.get((pairs, steered)), MEMORY_REACH.get(pairs)
    return Row(
        pairs=pairs,
        steered=steered,
        tiled_s=tiled_s,
        plain_s=plain_s,
        ratio=ratio,
        products="6 : 4" if steered else "4 : 3",
        reach=reach,
        met=within(ratio, reach),
        tiled_mb=tiled_mb,
        plain_mb=plain_mb,
        memory_ratio=tiled_mb / plain_mb,
        memory_reach=memory_reach,
        memory_met=within(tiled_mb / plain_mb, memory_reach),
    )


def growths(steered: bool, rounds: int) -> list[float]:
    """Return how the time grows from 8192 to 32768 pairs beyond 16 times, the small steps just before and after."""
    small, large = batch(8192, steered), batch(32768, steered)
    found = []
    for _ in range(rounds):
        around = [seconds(lambda: step("tiled", *small)) for _ in range(3)]
        slow = seconds(lambda: step("tiled", *large))
        around += [seconds(lambda: step("tiled", *small)) for _ in range(3)]
        found.append(slow / (16 * statistics.median(around)))
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timings per figure, of which the median (default: 3)")
    parser.add_argument("--largest", type=int, default=32768, help="largest batch (default: 32768)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Markdown file")
    parser.add_argument("--peak", nargs=3, metavar=("FORM", "PAIRS", "STEERED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        form, pairs, steered = options.peak
        print(measure_peak(form, int(pairs), steered == "1"))
        return
    record = provenance(" ".join(["python experiments/benchmarks/contrastive.py", *sys.argv[1:]]))
    plain_per_square: dict[bool, float] = {}
    rows = []
    for pairs in (1024, 8192, 32768):
        for steered in (False, True):
            if pairs <= options.largest:
                rows.append(row(pairs, steered, options.repeats, plain_per_square))
                print(rows[-1], flush=True)
    lines = [
        f"# Contrastive risk\n\n`{record['command']}`, {record['date']}. {record['machine']}; {record['threads']} "
        f"threads, load at the start {record['load']}; torch {record['versions']['torch']}.\n",
        f"One step, forward and backward, of b pairs with d = {WIDTH}, float32, tau = {TEMPERATURE}. `products`: "
        "matrix products of b x b x d, tiled against plain; time above that ratio would be overhead. Memory: the peak "
        "beyond the features; gradients of the features are part of it. At 32768 pairs the plain form's memory is that "
        "at 8192, times 16.\n",
        markdown(rows),
    ]
    if options.largest >= 32768:
        for steered in (False, True):
            rounds = growths(steered, options.repeats)
            growth = statistics.median(rounds)
            words = "steered" if steered else "unsteered"
            lines.append(
                f"\nFrom 8192 to 32768 pairs the {words} time grows {growth:.3f} times as "
                f"b^2 does, median of {', '.join(f'{each:.3f}' for each in rounds)} (aimed at: within {GROWTH}; "
                f"{within(max(growth, 1 / growth), GROWTH)})."
            )
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
