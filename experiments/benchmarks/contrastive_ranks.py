"""Measure three ways to spread the contrastive risk over ranks: the library's, FastCLIP's reduction, a plain gather.

- **exchange** (the library): a rank holds its images against all texts; normalizers of text anchors are reduced over
  ranks, gradients of texts are sent home. Features travel once forward and once backward, those of the reference once.
- **reduction** (FastCLIP): a rank holds its images against all texts and its texts against all images; features of both
  travel forward without a gradient, then the normalizers, and each rank has all of its own gradients.
- **gather**: both sides travel forward and their gradients backward, through an automatic derivative.

``python experiments/benchmarks/contrastive_ranks.py`` checks that all three give one gradient, then times them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from drrho.contrastive import contrastive_risk
from drrho.ranks import gathered, gathered_with_gradient
from experiments.benchmarks.measure import provenance

RESULTS = Path(__file__).parent / "results" / "contrastive_ranks.md"
WIDTH = 512
TAU = 0.05
Pair = tuple[Tensor, Tensor]


def exchange(image: Tensor, text: Tensor, reference: Pair | None, group: Any) -> Pair:
    """The library's."""
    value = contrastive_risk(image, text, TAU, reference=reference, group=group).value
    return torch.autograd.grad(value, (image, text))  # pyright: ignore[reportReturnType]


def reduction(image: Tensor, text: Tensor, reference: Pair | None, group: Any) -> Pair:
    """FastCLIP's: own anchors of both sides against gathered features, normalizers exchanged, gradients by hand."""
    image, text = image.detach(), text.detach()
    counts = [len(image)] * dist.get_world_size(group)
    first = len(image) * dist.get_rank(group)
    everybody = gathered(image, counts, group), gathered(text, counts, group)
    references = None if reference is None else tuple(gathered(part, counts, group) for part in reference)
    place = torch.arange(len(image))
    positives = place, place + first
    logits, normalizers = [], []
    for side, own in enumerate((image, text)):
        x = own @ everybody[1 - side].T
        if reference is not None and references is not None:
            x.addmm_(reference[side], references[1 - side].T, alpha=-1)
        x.div_(TAU)
        x[positives] = -torch.inf
        logits.append(x)
        normalizers.append(torch.logsumexp(x, 1))
    gradients = []
    for side in (0, 1):
        others = gathered(normalizers[1 - side], counts, group)
        weights = torch.exp(logits[side] - normalizers[side][:, None]) + torch.exp(logits[side] - others)
        weights[positives] = -2.0
        gradients.append(weights @ everybody[1 - side] / (2 * sum(counts)))
    return gradients[0], gradients[1]


def gather(image: Tensor, text: Tensor, reference: Pair | None, group: Any) -> Pair:
    """Everything gathered with its gradient, own anchors' losses."""
    counts = [len(image)] * dist.get_world_size(group)
    place = torch.arange(len(image))
    positives = place, place + len(image) * dist.get_rank(group)
    total = image.new_zeros(())
    for side, own in enumerate((image, text)):
        x = own @ gathered_with_gradient((text, image)[side], counts, group).T
        if reference is not None:
            x = x - reference[side] @ gathered(reference[1 - side], counts, group).T
        own_pairs = x[positives]
        negatives = x.index_put(positives, torch.tensor(-torch.inf))
        total = total + (TAU * torch.logsumexp(negatives / TAU, 1) - own_pairs).sum()
    return torch.autograd.grad(total / (2 * sum(counts)), (image, text))  # pyright: ignore[reportReturnType]


FORMS = {"exchange": exchange, "reduction": reduction, "gather": gather}


def work(rank: int, world: int, folder: str, per_rank: int, repeats: int) -> None:
    """Time the forms on this rank; rank 0 writes the medians of the slowest rank's times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(rank)
    drawn = torch.nn.functional.normalize(torch.randn(4, per_rank, WIDTH, generator=generator), dim=-1)
    image, text = (part.clone().requires_grad_() for part in drawn[:2])
    times: dict[tuple[str, bool], list[float]] = {}
    for steered in (False, True):
        reference = (drawn[2], drawn[3]) if steered else None
        expected = FORMS["gather"](image, text, reference, group)
        for name, form in FORMS.items():
            for ours, theirs in zip(form(image, text, reference, group), expected, strict=True):
                worst = float((ours - theirs).abs().max() / theirs.abs().max())
                if worst > 1e-4:
                    raise RuntimeError(f"{name} differs from gather by {worst:.1e} of its largest gradient")
        for _ in range(repeats):
            for name, form in FORMS.items():
                dist.barrier()
                start = time.perf_counter()
                form(image, text, reference, group)
                taken = torch.tensor(time.perf_counter() - start)
                dist.all_reduce(taken, dist.ReduceOp.MAX)
                times.setdefault((name, steered), []).append(float(taken))
    if rank == 0:
        torch.save({key: statistics.median(values) for key, values in times.items()}, Path(folder) / "times.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timings per figure, of which the median (default: 7)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Markdown file")
    options = parser.parse_args()
    record = provenance(" ".join(["python experiments/benchmarks/contrastive_ranks.py", *sys.argv[1:]]))
    lines = [
        f"# The contrastive risk over ranks\n\n`{record['command']}`, {record['date']}. {record['machine']}; gloo, one "
        f"thread a rank, load at the start {record['load']}; torch {record['versions']['torch']}.\n",
        f"Forward and backward, d = {WIDTH}, float32, seconds of the slowest rank, median of {options.repeats}. All "
        "three forms give one gradient (checked). Four ranks share the cores.\n",
        "| ranks | pairs a rank | steered | exchange | reduction | gather | reduction / exchange | gather / exchange |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for world, per_rank in ((2, 512), (2, 2048), (4, 512), (4, 2048)):
        with tempfile.TemporaryDirectory() as folder:
            spawn(work, args=(world, folder, per_rank, options.repeats), nprocs=world)
            times = torch.load(Path(folder) / "times.pt")
        for steered in (False, True):
            found = [times[name, steered] for name in FORMS]
            ratios = [each / found[0] for each in found[1:]]
            cells = [*(f"{each:.4f}" for each in found), *(f"{each:.2f}" for each in ratios)]
            lines.append(" | ".join([f"| {world}", str(per_rank), "yes" if steered else "no", *cells]) + " |")
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
