"""The parts of the measurement: what each measures, how long it may take, and the function that does it."""

from __future__ import annotations

import signal
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from experiments.benchmarks.gpu.cases import GLYPHS, TRAINER, Setting, missing_packages
from experiments.benchmarks.gpu.record import FINISHED, LEFT_OUT, Record
from experiments.benchmarks.measure import provenance

_PACKAGES = ("torch", "triton", "numpy", "open_clip_torch", "webdataset", "nvidia-nccl-cu13")


class Part(NamedTuple):
    """One part, in a process of its own.

    Attributes
    ----------
    seconds : int
        How long it may take.
    run : str
        ``module:function`` that measures it.
    needs : tuple
        Packages without which it is left out.
    at_once : bool
        Whether it may run beside others of its kind: nothing in it is timed.
    """

    title: str
    seconds: int
    run: str
    needs: tuple[str, ...] = ()
    at_once: bool = False


PARTS = {
    "correct": Part("Correct: the risks against the CPU in float64", 115, "correct:run_risks", at_once=True),
    "correct-losses": Part(
        "Correct: losses and methods against the CPU in float64", 115, "correct:run_losses", at_once=True
    ),
    "core": Part("The risks", 110, "core:run"),
    "calls": Part("A call of a risk", 115, "calls:run"),
    "contrastive": Part("The contrastive risk", 110, "contrastive:run"),
    "train-b32": Part("Training beside open_clip_train, ViT-B/32", 115, "race:run", TRAINER),
    "train-b16": Part("Training beside open_clip_train, ViT-B/16", 115, "race:run", TRAINER),
    "demo": Part("The demo", 118, "demo:run", GLYPHS),
    "profile-towers": Part("A step of ViT-B/32", 100, "profiling:run_towers", TRAINER),
    "profile-glyphs": Part("A step of the demo", 100, "profiling:run_glyphs", GLYPHS),
    "train-drrho": Part("Training with a reference's cached features", 115, "race:run", TRAINER),
    "train-jpeg": Part("Training from JPEG shards", 118, "race:run", TRAINER),
    "train-compile": Part("Training, compiled", 118, "race:run", TRAINER),
    "nccl": Part("A group of ranks", 110, "ranks:run", at_once=True),
    "tests": Part("The tests that need CUDA", 110, "suite:run", ("pytest", "hypothesis", "mpmath"), at_once=True),
}


def run_part(name: str, device: str, small: bool, out: Path) -> int:
    """Measure a part in this process; return 1 if something failed."""
    part = PARTS[name]
    words = f"python -m experiments.benchmarks.gpu --only {name}{' --device cpu' * (device == 'cpu')}"
    record = Record.new(out, name, provenance(words + " --small" * small, _PACKAGES))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that programs which the part has started end with it
    missing = missing_packages(*part.needs)
    if missing:
        record.end(LEFT_OUT, f"it needs {', '.join(missing)}: see --packages")
        return 0
    module, _, function = part.run.partition(":")
    with tempfile.TemporaryDirectory() as scratch:
        getattr(import_module(f"experiments.benchmarks.gpu.{module}"), function)(
            Setting(device, small, Path(scratch)), record
        )
    record.end(FINISHED)
    return int(not record.is_good)
