"""The parts ``profile-*``: what device and host do in a steady step of training."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from experiments.benchmarks.gpu.cases import Setting
from experiments.benchmarks.gpu.clock import synchronize
from experiments.benchmarks.gpu.record import Record
from experiments.benchmarks.gpu.trace import Trace, Tracer
from experiments.clip.training.options import SHIPPED_REFERENCE


class Steps(NamedTuple):
    """The steps before which nothing is measured, those that are timed, and those that are traced."""

    warm_up: int
    timed: int
    traced: int

    @property
    def total(self) -> int:
        """All steps."""
        return self.warm_up + self.timed + self.traced


class Watch:
    """Times some steps, then traces some; called after every step with its number."""

    def __init__(self, steps: Steps) -> None:
        self._steps, self._tracer = steps, Tracer()
        self._start = 0.0
        self.timed = self.traced = 0.0
        self.trace: Trace | None = None

    def __call__(self, step: int) -> None:
        """Start and stop the clock and the trace; end the training."""
        from experiments.benchmarks.gpu.training import Enough

        steps = self._steps
        if step == steps.warm_up:
            self._start = _now()
        elif step == steps.warm_up + steps.timed:
            self.timed = (_now() - self._start) / steps.timed
            self._tracer.start()
            self._start = _now()
        elif step == steps.total:
            self.traced = (_now() - self._start) / steps.traced
            self.trace = self._tracer.stop()
            raise Enough


def _now() -> float:
    synchronize()
    return time.perf_counter()


def run_towers(setting: Setting, record: Record) -> None:
    """Profile ViT-B/32 on made-up pairs in bfloat16."""
    from experiments.benchmarks.gpu.training import made_up_catalog

    steps = Steps(3, 2, 1) if setting.small else Steps(12, 10, 5)
    batch, pixels = (8, 32) if setting.small else (1024, 224)
    # More than are taken: the loader is to be as busy as in the middle of an epoch.
    catalog = made_up_catalog(batch * (steps.total + 8), setting.scratch / "catalog", pixels)
    workers = 0 if setting.small else max(1, min(16, os.cpu_count() or 1) - 2)
    for method in ("openclip", "drrho"):
        words = ["--catalog", catalog, "--batch-size", batch, "--workers", workers, "--epochs", 1, "--method", method]
        words += ["--model", "glyph-micro" if setting.small else "ViT-B-32", "--log-every", 10]
        words += ["--precision", "float32" if setting.small else "bfloat16"]
        if method == "drrho":
            words += ["--temperature", 0.05, "--reference", SHIPPED_REFERENCE]
        name = f"ViT-B/32 x 1024, {method}{', reference beside it' * (method == 'drrho')}"
        aim = 0.98 if method == "openclip" else None
        record.attempt(name, lambda w=words, n=name, a=aim: profile(n, w, steps, setting, record, a))


def run_glyphs(setting: Setting, record: Record) -> None:
    """Profile the target of the demo, steered and unsteered."""
    steps = Steps(2, 1, 1) if setting.small else Steps(30, 40, 10)
    for preset in ("glyph-steered", "glyph-unsteered"):
        words: list[Any] = ["--preset", preset, "--cache", setting.scratch / "cache", "--size", "small"]
        if setting.small:
            words += ["--model", "glyph-micro", "--batch-size", 8, "--fraction", 0.02, "--epochs", 1]
        record.attempt(preset, lambda w=words, n=preset: profile(n, w, steps, setting, record, None))


def profile(
    name: str, words: Sequence[Any], steps: Steps, setting: Setting, record: Record, busy_reach: float | None
) -> None:
    """Train as the words say, and write down what is seen in the steps."""
    from experiments.benchmarks.gpu.training import train
    from experiments.clip.distributed import Ranks

    record.text(
        "Steps",
        "A step's time without the profiler, and what the profiler sees in a step: how long the device is busy "
        "(share: of the time without the profiler), kernels launched, waits of the host for the device and their time, "
        "reads of a value by the host, copies and their bytes. In the JSON file: the kernels that take longest.",
    )
    watch = Watch(steps)
    words = [*words, "--validations", 1, "--checkpoint-minutes", 1000, "--logs", "jsonl"]  # nothing but steps
    train(words, setting.scratch / name.replace("/", "-"), Ranks(device=torch.device(setting.device)), watch)
    assert watch.trace is not None, "the training ended before the steps that are traced"
    found = watch.trace.per(steps.traced)
    share = found["busy"] / 1e6 / watch.timed
    record.row(
        "Steps",
        training=name,
        **{"ms": 1e3 * watch.timed, "ms, profiled": 1e3 * watch.traced, "device busy ms": found["busy"] / 1e3},
        share=share,
        launches=found["launches"],
        waits=_listed(found["waits"], 1),
        items=found["items"],
        copies=_listed(found["copies"], 2),
    )
    record.kept.setdefault("kernels", {})[name] = found["kernels"]
    if busy_reach is not None:
        record.aim(f"{name}: share of a step in which the device is busy", share, busy_reach, at_least=True)


def _listed(found: dict[str, list[float]], place: int) -> str:
    """Return counts, and the time or the megabytes of each kind."""
    if place == 1:
        return ", ".join(f"{name} {count:.1f} ({time / 1e3:.2f} ms)" for name, (count, time) in found.items())
    return ", ".join(f"{name} {count:.1f} ({size / 1e6:.2f} MB)" for name, (count, size, _) in found.items())
