"""The commands ``evaluate``, ``cache-reference`` and ``catalog``: each takes its options and carries them out."""

from __future__ import annotations

import os

from experiments.clip.cli.options import CacheReference, Evaluate, MakeCatalog
from experiments.clip.cli.sources import embedded_pairs, reference_features
from experiments.clip.cli.terminal import console, progress_bar
from experiments.clip.data.catalog import make_catalog, open_catalog
from experiments.clip.distributed import joined_ranks, launched
from experiments.clip.errors import UserError
from experiments.clip.evaluation.tasks import task_scores
from experiments.clip.io.workers import spare_cores
from experiments.clip.models.clip import load_model


def evaluate(options: Evaluate) -> None:
    """Print the scores of one model on the embedded held-out pairs, or on zero-shot tasks."""
    clip = load_model(options.model, options.weights)
    with joined_ranks(options.device) as ranks:
        clip.model.to(ranks.device)
        if not options.tasks:
            console.print(embedded_pairs().scores_table(options.data, options.split, clip))
        for name, value in task_scores(clip, options.tasks, ranks, spare_cores()):
            console.print(f"{name:<48} {value:.4f}")


def cache_reference(options: CacheReference) -> None:
    """Compute the reference's features: of the embedded pairs, or of a catalog, over ranks."""
    reference = load_model(options.reference, options.reference_weights)
    if options.catalog is None and launched(os.environ)[1] > 1:
        raise UserError("the embedded pairs take one process: start cache-reference without torchrun or srun")
    with joined_ranks(options.device, options.exchange_minutes) as ranks:
        console.quiet = not ranks.leads
        reference.model.to(ranks.device)
        if options.catalog is None:
            embedded_pairs().cache_features(options.data, reference)
            return
        reference_features(
            options.out,
            reference,
            open_catalog(options.catalog),
            ranks,
            views=options.views,
            precision=options.precision,
            towers=options.towers,
            batch_size=options.batch_size,
            workers=options.workers,
            skip_limit=options.skip_limit,
        )


def catalog(options: MakeCatalog) -> None:
    """Make a catalog, and say what it holds and what it left out."""
    with progress_bar("scanning") as advance:
        made = make_catalog(
            list(options.sources),
            options.out,
            caption_key=options.caption_key,
            workers=options.workers,
            progress=advance,
            run_pipe_commands=options.run_pipe_commands,
        )
    console.print(f"catalog    {len(made)} pairs in {len(made.shards)} shards: {made.folder}")
    for reason, count in made.left_out.items():
        console.print(f"left out   {count} for {reason}")
