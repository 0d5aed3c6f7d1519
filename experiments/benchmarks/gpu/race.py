"""The parts ``train-*``: the trainer beside open_clip_train, each in processes of its own that take turns."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.gpu.cases import Setting, missing_packages
from experiments.benchmarks.gpu.clock import ratio
from experiments.benchmarks.gpu.programs import call, flags, run_until
from experiments.benchmarks.gpu.record import Record
from experiments.benchmarks.throughput import (
    LAUNCH,
    Window,
    model_configs,
    our_program,
    our_windows,
    photograph_shard,
    their_windows,
)
from experiments.clip.training.options import SHIPPED_REFERENCE

LOG_EVERY = 4  # steps
TEMPERATURE = 0.05
THEIRS, OPENCLIP, DRRHO = "open_clip_train", "openclip", "drrho"
_LIMIT = 100.0  # seconds of a part, which ends before a run that would not fit
_PREPARING = 60.0  # seconds of a program that prepares the data
_SHARDS, _COPIES, _SHARD_SIZE = 16, 8, 256
_NEEDED = ("open_clip_train", "pandas", "webdataset")  # by open_clip_train
_NEWEST_WEBDATASET = (0, 2, 86)  # later ones yield records on which open_clip_train stops


class Plan(NamedTuple):
    """What is trained, and by whom.

    Attributes
    ----------
    steps : int
        Steps of a run; those of the first ``warm_up`` lines of its log are not counted.
    racers : tuple
        The programs, or methods of ours, in the order of a round.
    reach : dict
        By racer: whose rate is the yardstick, and the smallest multiple of it that is aimed at.
    """

    model: str
    batch: int
    steps: int
    racers: tuple[str, ...]
    reach: dict[str, tuple[str, float]]
    data: str = "made-up pairs"
    compile: bool = False
    warm_up: int = 3
    rounds: int = 2
    patience: float = 75.0


PLANS = {
    "train-b32": Plan("ViT-B-32", 1024, 40, (OPENCLIP, THEIRS), {OPENCLIP: (THEIRS, 1.03)}),
    "train-b16": Plan("ViT-B-16", 512, 40, (OPENCLIP, THEIRS), {OPENCLIP: (THEIRS, 1.03)}),
    "train-drrho": Plan("ViT-B-16", 512, 40, (DRRHO, OPENCLIP), {DRRHO: (OPENCLIP, 0.99)}),
    "train-compile": Plan(
        *("ViT-B-32", 1024, 24, (OPENCLIP, THEIRS), {OPENCLIP: (THEIRS, 1.0)}),
        **{"compile": True, "rounds": 1, "patience": 58.0},
    ),
    "train-jpeg": Plan(
        "ViT-B-32", 1024, 32, (OPENCLIP, THEIRS), {OPENCLIP: (THEIRS, 1.2)}, data="JPEG shards", rounds=1
    ),
}
_SMALL = {"model": "glyph-micro", "batch": 16, "steps": 16, "warm_up": 2, "rounds": 1, "compile": False}


class Track(NamedTuple):
    """A plan on a device, with its data made ready."""

    plan: Plan
    setting: Setting
    workers: int
    catalog: Path
    shards: str
    models: Path
    features: Path


class Finish(NamedTuple):
    """Images per second of each line of a run's log after the warm-up, and the run's seconds."""

    rates: list[float]
    waiting: float
    wall: float


def run(setting: Setting, record: Record) -> None:
    """Let the racers of a plan take turns, as often as there is time for."""
    plan, started = PLANS[record.kept["part"]], time.monotonic()
    if setting.small:
        plan = plan._replace(**_SMALL)
    record.text(
        "Races",
        "`run.py train` and `open_clip_train.main` in bfloat16 on one device, alike in model, batch, data, workers, "
        f"AdamW and schedule: images per second by each program's own log, a line every {LOG_EVERY} steps, median of "
        f"the lines after the first {plan.warm_up}; `drrho` with cached features. The runs take turns.",
    )
    racers = _racers(plan, record)
    track = _track(plan, setting, DRRHO in racers)
    finishes: defaultdict[str, list[Finish]] = defaultdict(list)
    longest = 0.0
    for number in range(plan.rounds):
        for racer in racers if number % 2 == 0 else racers[::-1]:
            begun = time.monotonic()
            if begun - started + longest > _LIMIT * (1 + 9 * setting.small):
                record.row("Races", racer=racer, round=number + 1, note="left out: no time left")
                continue
            record.attempt(f"{racer}, round {number + 1}", partial(_lap, racer, number, track, finishes, record))
            longest = max(longest, time.monotonic() - begun)
    medians = {
        racer: statistics.median(rate for each in found for rate in each.rates) for racer, found in finishes.items()
    }
    for racer, (yardstick, reach) in plan.reach.items():
        how = f"{plan.data}{', compiled' * plan.compile}"
        what = f"{plan.model} x {plan.batch}, {how}: {racer}, images per second against {yardstick}"
        measured = ratio(medians.get(racer), medians.get(yardstick))
        record.aim(what, measured, reach, at_least=True, unit="x")


def _racers(plan: Plan, record: Record) -> list[str]:
    """Return the racers of a plan that can run here."""
    reason = ""
    if THEIRS in plan.racers and (missing := missing_packages(*_NEEDED)):
        reason = f"it needs {missing[0]}: see --packages"
    elif THEIRS in plan.racers and plan.data == "JPEG shards":
        found, newest = version("webdataset"), ".".join(map(str, _NEWEST_WEBDATASET))
        if tuple(map(int, found.split(".")[:3])) > _NEWEST_WEBDATASET:
            reason = f"it needs webdataset <= {newest}, here is {found}: see --packages"
    if reason:
        record.row("Races", racer=THEIRS, note=f"left out: {reason}")
    return [racer for racer in plan.racers if racer != THEIRS or not reason]


def _lap(racer: str, number: int, track: Track, finishes: dict[str, list[Finish]], record: Record) -> None:
    finish = race(racer, number, track)
    finishes[racer].append(finish)
    plan = track.plan
    record.row(
        "Races",
        model=plan.model,
        batch=plan.batch,
        data=plan.data,
        compile="yes" if plan.compile else "",
        racer=racer,
        round=number + 1,
        **{"images per s": statistics.median(finish.rates)},
        lines=", ".join(f"{rate:.0f}" for rate in finish.rates),
        **{"waiting for data": finish.waiting, "wall s": finish.wall},
    )


def race(racer: str, number: int, track: Track) -> Finish:
    """Run one racer until its log has a line for every step that is wanted."""
    plan, out = track.plan, track.setting.scratch / f"{racer}-{number}"
    lines = plan.steps // LOG_EVERY
    samples = plan.batch * plan.steps
    if racer == THEIRS:
        log = out.with_suffix(".log")

        def is_long(text: str) -> bool:
            return len(their_windows(text, plan.batch)) > lines

        seconds = run_until(_their_command(track, out.name), log, is_long, plan.patience)
        windows = their_windows(log.read_text(), plan.batch)[1:]  # the first line is of one step
    else:
        path = out / "log.jsonl"

        def logged() -> list[Window]:
            return our_windows(path.read_text(), samples) if path.exists() else []

        command = _our_command(racer, track, out)
        seconds = run_until(command, out.with_suffix(".log"), lambda _: len(logged()) >= lines, plan.patience)
        windows = logged()
    shutil.rmtree(out, ignore_errors=True)
    kept = windows[plan.warm_up :]
    if not kept:
        raise RuntimeError(f"its log has {len(windows)} lines: its format is another, or it was too slow")
    waited = sum(window.waited for window in kept) / sum(window.seconds for window in kept)
    return Finish([window.samples / window.seconds for window in kept], waited, seconds)


def _common(track: Track) -> dict[str, Any]:
    plan = track.plan
    return {
        "model": plan.model,
        "batch-size": plan.batch,
        "workers": track.workers,
        "epochs": 1,
        "warmup": 10,
        "lr": 5e-4,
        "device": track.setting.device,
    }


def _our_command(method: str, track: Track, out: Path) -> list[str]:
    arguments = {
        **_common(track),
        "catalog": track.catalog,
        "method": method,
        "precision": "float32" if track.setting.small else "bfloat16",
        "validations": 1,
        "checkpoint-minutes": 1000,
        "log-every": LOG_EVERY,
        "logs": "jsonl",
        "out": out,
    }
    if method == DRRHO:
        arguments |= {"temperature": TEMPERATURE, "reference-features": track.features, "reference": SHIPPED_REFERENCE}
    return [*our_program(), "train", *flags(arguments), *["--compile"] * track.plan.compile]


def _their_command(track: Track, name: str) -> list[str]:
    plan = track.plan
    arguments = {
        **_common(track),
        "train-num-samples": plan.batch * (plan.steps + 1),
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "wd": 0.2,
        "precision": "fp32" if track.setting.small else "amp_bf16",
        "log-every-n-steps": LOG_EVERY,
        "save-frequency": 0,
        "logs": track.setting.scratch,
        "name": name,
    }
    data = {"dataset-type": "synthetic"}
    if track.shards:
        data = {"dataset-type": "webdataset", "train-data": track.shards}
    command = [sys.executable, "-c", LAUNCH, str(track.models), "open_clip_train.main"]
    return [*command, *flags(arguments | data), *["--torchcompile"] * plan.compile]


def _track(plan: Plan, setting: Setting, needs_features: bool) -> Track:
    """Make what the racers train on."""
    folder = setting.scratch
    workers = 1 if setting.small else max(1, min(16, os.cpu_count() or 1) - 2 * (plan.data != "JPEG shards"))
    shards, source = "", f"synthetic:{plan.batch * plan.steps}"
    if plan.data == "JPEG shards":
        shards = source = _photographs(folder / "shards", setting.small)
    models = model_configs(folder / "models")
    track = Track(plan, setting, workers, folder / "catalog", shards, models, folder / "features")
    call([*our_program(), "catalog", source, "--out", str(track.catalog)], folder / "catalog.log", _PREPARING)
    if needs_features:
        arguments = {"catalog": track.catalog, "out": track.features, "workers": workers, "device": setting.device}
        arguments["reference"] = SHIPPED_REFERENCE
        call([*our_program(), "cache-reference", *flags(arguments)], folder / "features.log", _PREPARING)
    return track


def _photographs(folder: Path, small: bool) -> str:
    """Write shards of JPEGs, by all cores, each under several names; return their pattern."""
    folder.mkdir()
    shards, size = (2, 64) if small else (_SHARDS, _SHARD_SIZE)
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(photograph_shard, folder, samples=size), range(shards)))
    for copy in range(1, 2 if small else _COPIES):
        for shard in range(shards):
            os.link(folder / f"{shard:05d}.tar", folder / f"{copy * shards + shard:05d}.tar")
    count = len(list(folder.iterdir()))
    return str(folder / f"{{00000..{count - 1:05d}}}.tar")
