"""The part ``demo``: the whole of ``run.py demo`` from nothing, and a step of its targets."""

from __future__ import annotations

import statistics
from pathlib import Path

from experiments.benchmarks.gpu.cases import Setting
from experiments.benchmarks.gpu.programs import call, flags
from experiments.benchmarks.gpu.record import Record
from experiments.benchmarks.throughput import our_program, our_windows, samples_of

_PATIENCE = 115.0
_WARM_UP = 2  # lines of a log


def run(setting: Setting, record: Record) -> None:
    """Run it, and read the logs of both trainings."""
    cache, out = setting.scratch / "cache", setting.scratch / "demo"
    arguments = {"cache": cache, "out": out}
    command = [*our_program(), "demo", *flags(arguments)]
    if setting.small:  # the demo has no smaller form than --quick: one of its trainings, on few pairs
        arguments = {"preset": "glyph-steered", "cache": cache, "size": "small", "fraction": 0.02, "epochs": 1}
        arguments |= {"model": "glyph-micro", "batch-size": 8, "log-every": 1, "device": "cpu", "out": out / "steered"}
        command = [*our_program(), "train", *flags(arguments)]
    record.text(
        "Demo",
        "Seconds of the whole program, with an empty cache: drawing, reference features, two trainings, validations, "
        f"checkpoints, report; and ms of a step by the log of each training, without its first {_WARM_UP} lines.",
    )
    wall = call(command, setting.scratch / "demo.log", _PATIENCE * (1 + 4 * setting.small))
    record.row("Demo", what="whole program", seconds=wall)
    record.aim("whole demo", wall, 75.0, unit="s")
    for folder in sorted(path for path in out.iterdir() if (path / "log.jsonl").exists()):
        record.attempt(folder.name, lambda folder=folder: _steps(folder, cache, record))


def _steps(folder: Path, cache: Path, record: Record) -> None:
    """Say how long the steps of a training took: their medians over the lines of its log."""
    text = (folder / "log.jsonl").read_text()
    (data,) = cache.glob("glyphs-*")
    windows = our_windows(text, samples_of(data, "train"))[_WARM_UP:]
    batch = 512
    median = statistics.median(1e3 * window.seconds * batch / window.samples for window in windows)
    record.row(
        "Demo", what=folder.name, **{"ms a step": median, "waiting for data": windows[-1].waited / windows[-1].seconds}
    )
    record.aim(f"a step of the glyph target, {folder.name}", median, 12.0, unit="ms")
