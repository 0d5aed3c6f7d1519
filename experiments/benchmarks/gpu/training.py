"""Trainings in this process, built as ``run.py train`` builds them, with a look at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.clip.cli.building import build_method, build_models, build_selector
from experiments.clip.cli.options import Train
from experiments.clip.cli.sources import open_training_data
from experiments.clip.cli.terminal import console
from experiments.clip.data.catalog import make_catalog
from experiments.clip.distributed import Ranks
from experiments.clip.models.clip import Clip
from experiments.clip.run import parse
from experiments.clip.training.logs import Logs
from experiments.clip.training.trainer import Trainer

OnStep = Callable[..., None]


class Enough(Exception):
    """Raised by a look at a step to end a training."""


class Training:
    """One training and what it needs.

    Parameters
    ----------
    words : sequence of str
        Options of ``run.py train``.
    on_step : callable
        Called after every step with its number.
    """

    def __init__(self, words: Sequence[str], out: Path, ranks: Ranks, on_step: Callable[[int], None]) -> None:
        options: Train = parse(["train", *words, "--out", str(out)])
        console.quiet = True
        models = build_models(options, ranks)
        out.mkdir(parents=True, exist_ok=True)
        data = open_training_data(options, models.clip, models.reference, ranks)
        reference, epochs = models.reference, options.optimization.epochs
        method, _ = build_method(options.loss, epochs, data.samples, reference, data.reference, ranks)
        self.clip: Clip = models.clip
        self._stream = data.stream

        def look(step: int, *rest: Any) -> None:
            on_step(step)

        self.trainer = Trainer(
            models.clip,
            method,
            data.stream,
            options.optimization,
            reference=data.reference,
            selector=build_selector(options, models.reference, ranks),
            ranks=ranks,
            execution=options.execution,
            policy=options.keeping,
            settings={},
            folder=out / "checkpoints",
            seed=options.seed,
            validate=dict,
            validations=1,
            logs=Logs(out, ("jsonl",), {}) if ranks.leads else None,
            log_every=options.log_every,
            on_step=look,
            stop=int,
        )

    def fit(self) -> None:
        """Train until the end, or until a look says that it is enough."""
        try:
            self.trainer.fit()
        except Enough:
            pass
        finally:
            self._stream.close()


def made_up_catalog(samples: int, folder: Path, pixels: int = 224) -> Path:
    """Write a catalog of made-up pairs, unless it is there."""
    if not folder.is_dir():
        make_catalog(f"synthetic:{samples}:{pixels}", folder)
    return folder
