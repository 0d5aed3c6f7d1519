"""Measure training beside open_clip_train's own main loop and data loader, and what a reference adds to a step.

``python experiments/benchmarks/throughput.py`` makes data and an environment for open_clip_train once, which takes some
minutes, then measures for about 8, prints two tables and writes them as Markdown.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from experiments.benchmarks.measure import ROOT, markdown, provenance, within
from experiments.clip.errors import UserError

RESULTS = Path(__file__).parent / "results" / "throughput.md"
REACH = 1.0  # images per second, as a multiple of open_clip_train's
STEERING_REACH = 1.05  # seconds of a steered step, as a multiple of an unsteered one's
TEMPERATURE = 0.138  # what "auto" is for the embedded pairs: both methods of the second table have one temperature
THREADS = 2
LOG_EVERY = 4  # steps
WARM_UP = 0.25  # share of a run that is left out: start of the workers, full queues, first use of every kernel

PINNED = ("torch", "torchvision", "open_clip_torch", "timm", "numpy", "pillow")
REQUIREMENTS = ("open_clip_torch[training]", "webdataset<=0.2.86")

GLYPHS = "glyphs-swapped-full"  # what `run.py prepare` calls the embedded pairs
SHARDS, SHARD_SIZE = 8, 256
SIDES = (256, 320)  # pixels of the photographs, as web data sets are stored for crops of 224
JPEG_QUALITY = 90
_TEXT = {"context_length": 24, "vocab_size": 49408}
MODELS = {
    "tiny-224": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 32, "patch_size": 56},
        "text_cfg": {**_TEXT, "width": 32, "heads": 1, "layers": 1},
    },
    "small-224": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 224, "layers": 6, "width": 192, "patch_size": 32},
        "text_cfg": {**_TEXT, "width": 128, "heads": 2, "layers": 4},
    },
}

# Runs a module as a program after making the models of a folder known to open_clip.
LAUNCH = (
    "import runpy, sys, open_clip; _, folder, name, *rest = sys.argv; open_clip.add_model_config(folder); "
    "sys.argv = [name, *rest]; runpy.run_module(name, run_name='__main__', alter_sys=True)"
)
LOG_LINE = re.compile(
    r"Train Epoch: \d+ \[ *(?P<samples>\d+)/\d+ [^]]*\] "
    r"Data \(t\): (?P<waited>[\d.]+) Batch \(t\): (?P<seconds>[\d.]+),"
)


class Options(NamedTuple):
    """The command line."""

    rounds: int
    workloads: list[str]
    steering: bool
    cache: Path
    environment: Path
    output: Path


class Workload(NamedTuple):
    """A model on a set of shards.

    Workers and threads are three at most: on two cores, more would spend their time waiting for each other.
    """

    model: str
    data: str
    shards: int
    batch_size: int
    workers: int
    threads: int


WORKLOADS = {
    "decoding": Workload("tiny-224", "photographs", shards=8, batch_size=64, workers=2, threads=1),
    "small images": Workload("glyph-small", "glyphs", shards=2, batch_size=256, workers=1, threads=1),
    "towers": Workload("small-224", "photographs", shards=3, batch_size=32, workers=1, threads=2),
}


# --- data and environment -------------------------------------------------------------------------------------


def photograph_shards(folder: Path) -> Path:
    """Write seeded JPEGs with captions as webdataset shards, unless they are there."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        for shard in range(SHARDS):
            photograph_shard(made, shard, SHARD_SIZE)
        made.rename(folder)
    return folder


def photograph_shard(folder: Path, shard: int, samples: int) -> None:
    """Write one shard, whose number is its seed.

    The images are crops of noise whose amplitude falls as 1 / frequency, as that of photographs does: they compress
    alike.
    """
    rng = np.random.default_rng(shard)
    scene = _scene(rng)
    with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
        for number in range(samples):
            key = f"{shard:05d}{number:04d}"
            _add(archive, f"{key}.jpg", _photograph(rng, scene))
            _add(archive, f"{key}.txt", _caption(rng).encode())


def _scene(rng: np.random.Generator, side: int = 1536) -> np.ndarray:
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    gray, *colors = (np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) / frequency) for _ in range(4))
    scene = np.stack([gray + color / 3 for color in colors], axis=-1)
    return np.clip(128 + 64 * (scene - scene.mean()) / scene.std(), 0, 255).astype(np.uint8)


def _photograph(rng: np.random.Generator, scene: np.ndarray) -> bytes:
    height, width = rng.integers(SIDES[0], SIDES[1], 2, endpoint=True)
    top, left = rng.integers(scene.shape[0] - height), rng.integers(scene.shape[1] - width)
    data = io.BytesIO()
    Image.fromarray(scene[top : top + height, left : left + width]).save(data, "JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


def _caption(rng: np.random.Generator) -> str:
    words = "a photo of the small large old red green dog house street river with near under two people".split()
    return " ".join(rng.choice(words, 10))


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def environment(folder: Path) -> Path:
    """Return the interpreter of an environment that holds open_clip_train, and of the rest the versions of this one."""
    python = folder / "bin" / "python"
    wanted = {name: version(name) for name in PINNED}
    if not python.exists():
        print(f"making {folder}", flush=True)
        venv.create(folder, with_pip=True)
    if _versions(python) != wanted:
        print("installing open_clip_train", flush=True)
        pins = [f"{name}=={number}" for name, number in wanted.items()]
        run([str(python), "-m", "pip", "install", "--quiet", *pins, *REQUIREMENTS])
        if (found := _versions(python)) != wanted:
            raise UserError(f"{folder} holds {found} in place of {wanted}: delete it")
    return python


def _versions(python: Path) -> dict[str, str] | None:
    """Return the versions that an environment has; None if one is missing."""
    code = "import json; from importlib.metadata import version as v; v('webdataset'); v('transformers'); "
    code += f"print(json.dumps({{name: v(name) for name in {PINNED}}}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return None if done.returncode else json.loads(done.stdout)


def model_configs(folder: Path) -> Path:
    """Write the models that open_clip has not: those above and those of the glyphs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    for path in (ROOT / "experiments" / "clip" / "models" / "configs").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def run(command: Sequence[str], threads: int = THREADS) -> tuple[str, float]:
    """Return what a program printed, errors included, and its seconds on the wall.

    Raises
    ------
    UserError
        With the last line that it printed, if it fails.
    """
    variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"`{shlex.join(command)}` ended with status {done.returncode}: {last}")
    return done.stdout, time.perf_counter() - start


# --- logs -----------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """What a line of a log tells of the steps since the line before."""

    samples: float
    seconds: float
    waited: float
    """Seconds of them waiting for data."""


def their_windows(log: str, batch_size: int) -> list[Window]:
    """Read what open_clip_train printed: times are means over the steps since the line before."""
    windows, seen = [], 0
    for line in LOG_LINE.finditer(log):
        samples = int(line["samples"]) - seen
        seen += samples
        steps = samples / batch_size
        windows.append(Window(samples, steps * float(line["seconds"]), steps * float(line["waited"])))
    return windows


def our_windows(log: str, samples: int) -> list[Window]:
    """Read a ``log.jsonl`` of one rank, of epochs of so many samples."""
    windows, epoch = [], 0.0
    for line in map(json.loads, log.splitlines()):
        if (rate := line.get("pairs_per_second_per_rank")) is not None:
            seen = (line["epoch"] - epoch) * samples
            epoch = line["epoch"]
            windows.append(Window(seen, seen / rate, seen / rate * line["share_of_time_waiting_for_data"]))
    return windows


def samples_of(folder: Path, split: str) -> int:
    """Return how many pairs of glyphs a split has."""
    shards = json.loads((folder / "manifest.json").read_text())["splits"][split]
    return sum(shard["samples"] for shard in shards)


def steady(windows: Sequence[Window]) -> list[Window]:
    """Leave out those that begin during the warm-up."""
    total, begun, kept = sum(window.samples for window in windows), 0.0, []
    for window in windows:
        if begun >= WARM_UP * total:
            kept.append(window)
        begun += window.samples
    return kept


# --- beside open_clip_train -----------------------------------------------------------------------------------


class Race(NamedTuple):
    """A workload made ready for both programs."""

    workload: Workload
    shards: str
    catalog: Path
    samples: int
    models: Path
    python: Path


class Finish(NamedTuple):
    """What a run came to."""

    rate: float
    waiting: float
    wall: float


@dataclass(frozen=True)
class Row:
    """One workload: images per second, share of time waiting for data, seconds of the program."""

    workload: str
    model: str
    images: str
    batch: int
    workers: int
    ours_per_s: float
    theirs_per_s: float
    ratio: float
    rounds: str
    reach: str
    met: str
    ours_waiting: float
    theirs_waiting: float
    ours_wall_s: float
    theirs_wall_s: float


def our_run(race: Race, scratch: Path) -> Finish:
    """Train with this program."""
    out = scratch / "ours"
    arguments = {
        "method": "openclip",
        "model": race.workload.model,
        "catalog": race.catalog,
        "workers": race.workload.workers,
        "batch-size": race.workload.batch_size,
        "epochs": 1,
        "warmup": 10,
        "lr": 5e-4,
        "device": "cpu",
        "validations": 1,
        "checkpoint-minutes": 1000,
        "log-every": LOG_EVERY,
        "out": out,
    }
    command = [sys.executable, "-c", LAUNCH, str(race.models), "experiments.clip.run", "train", *_flags(arguments)]
    _, wall = run(command, race.workload.threads)
    return _finish(our_windows((out / "log.jsonl").read_text(), race.samples), wall)


def their_run(race: Race, scratch: Path) -> Finish:
    """Train with open_clip_train, as configured above."""
    arguments = {
        "dataset-type": "webdataset",
        "train-data": race.shards,
        "train-num-samples": race.samples,
        "model": race.workload.model,
        "workers": race.workload.workers,
        "batch-size": race.workload.batch_size,
        "epochs": 1,
        "warmup": 10,
        "lr": 5e-4,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "wd": 0.2,
        "precision": "fp32",
        "device": "cpu",
        "log-every-n-steps": LOG_EVERY,
        "logs": scratch,
        "name": "theirs",
    }
    command = [str(race.python), "-c", LAUNCH, str(race.models), "open_clip_train.main", *_flags(arguments)]
    log, wall = run(command, race.workload.threads)
    return _finish(their_windows(log, race.workload.batch_size), wall)


def _flags(arguments: dict[str, Any]) -> list[str]:
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))]


def _finish(windows: Sequence[Window], wall: float) -> Finish:
    kept = steady(windows)
    if not kept:
        raise UserError(f"a log has no line after the first {WARM_UP:.0%} of the run: its format is another")
    total = Window(*map(sum, zip(*kept, strict=True)))
    return Finish(total.samples / total.seconds, total.waited / total.seconds, wall)


def races(options: Options, python: Path) -> dict[str, Race]:
    """Make everything that the workloads need."""
    chosen = {name: WORKLOADS[name] for name in options.workloads}
    folders: dict[str, Path] = {}
    if any(workload.data == "photographs" for workload in chosen.values()):
        folders["photographs"] = photograph_shards(options.cache / f"photographs-{SHARDS}-{SHARD_SIZE}")
    if any(workload.data == "glyphs" for workload in chosen.values()):
        run([*our_program(), "prepare", "--cache", str(options.cache)])
        folders["glyphs"] = options.cache / GLYPHS / "train"
    models = model_configs(options.cache / "models")
    ready = {}
    for name, workload in chosen.items():
        shards = str(folders[workload.data] / f"{{00000..{workload.shards - 1:05d}}}.tar")
        catalog = options.cache / f"catalog-{workload.data}-{workload.shards}"
        printed, _ = run([*our_program(), "catalog", shards, "--out", str(catalog)])
        count = re.search(r"catalog +(\d+) pairs", printed)
        assert count is not None, printed
        ready[name] = Race(workload, shards, catalog, int(count[1]), models, python)
    return ready


def our_program() -> list[str]:
    """Return how this program starts."""
    return [sys.executable, str(ROOT / "experiments" / "clip" / "run.py")]


def row(name: str, race: Race, rounds: int) -> Row:
    """Run both by turns, each first in every other round."""
    ours: list[Finish] = []
    theirs: list[Finish] = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            for runs in (ours, theirs) if number % 2 == 0 else (theirs, ours):
                runs.append((our_run if runs is ours else their_run)(race, Path(scratch)))
    ratios = [one.rate / other.rate for one, other in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    workload = race.workload
    return Row(
        workload=name,
        model=workload.model,
        images=f"{race.samples} {workload.data}",
        batch=workload.batch_size,
        workers=workload.workers,
        ours_per_s=statistics.median(each.rate for each in ours),
        theirs_per_s=statistics.median(each.rate for each in theirs),
        ratio=ratio,
        rounds=_listed(ratios),
        reach=f">= {REACH:g}",
        met=within(REACH, ratio),
        ours_waiting=statistics.median(each.waiting for each in ours),
        theirs_waiting=statistics.median(each.waiting for each in theirs),
        ours_wall_s=statistics.median(each.wall for each in ours),
        theirs_wall_s=statistics.median(each.wall for each in theirs),
    )


def _listed(ratios: Iterable[float]) -> str:
    return ", ".join(f"{ratio:.3f}" for ratio in ratios)


# --- steering -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SteeringRow:
    """A step with the reference's cached features, and one without."""

    model: str
    batch: int
    steered_s: float
    unsteered_s: float
    ratio: float
    rounds: str
    reach: str
    met: str


def steering_row(options: Options) -> SteeringRow:
    """Train on the embedded pairs by turns: the same model, batches and temperature, with and without reference."""
    run([*our_program(), "cache-reference", "--cache", str(options.cache)])
    forms = {"steered": [], "unsteered": ["--method", "fastclip", "--temperature", str(TEMPERATURE)]}
    samples, batch_size = samples_of(options.cache / GLYPHS, "train"), 512
    steps: dict[str, list[list[float]]] = {name: [] for name in forms}
    for number in range(options.rounds):
        for name in forms if number % 2 == 0 else reversed(forms):
            with tempfile.TemporaryDirectory() as out:
                arguments = {
                    "cache": options.cache,
                    "epochs": 1,
                    "batch-size": batch_size,
                    "device": "cpu",
                    "validations": 1,
                    "checkpoint-minutes": 1000,
                    "out": out,
                }
                command = [*our_program(), "train", "--preset", "glyph-steered", *_flags(arguments), *forms[name]]
                run(command)
                windows = steady(our_windows((Path(out) / "log.jsonl").read_text(), samples))
                steps[name].append([batch_size * window.seconds / window.samples for window in windows])
    medians = {name: [statistics.median(each) for each in found] for name, found in steps.items()}
    steered, unsteered = (
        statistics.median(second for each in steps[name] for second in each) for name in ("steered", "unsteered")
    )
    ratio = steered / unsteered
    return SteeringRow(
        model="glyph-small",
        batch=batch_size,
        steered_s=steered,
        unsteered_s=unsteered,
        ratio=ratio,
        rounds=_listed(one / other for one, other in zip(medians["steered"], medians["unsteered"], strict=True)),
        reach=f"<= {STEERING_REACH:g}",
        met=within(ratio, STEERING_REACH),
    )


# --- the command ----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(message)


def parse(arguments: Sequence[str]) -> Options:
    """Turn a command line into options."""
    cache = ROOT / "cache" / "throughput"
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program (default: 3)")
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS), choices=WORKLOADS, help="default: all")
    parser.add_argument("--skip-steering", action="store_true", help="leave the second table out")
    parser.add_argument("--cache", type=Path, default=cache, help="folder of shards (default: cache/throughput)")
    parser.add_argument("--environment", type=Path, help="folder of open_clip_train's (default: CACHE/venv)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Markdown file")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {given.rounds}")
    cache = given.cache.absolute()
    environment = cache / "venv" if given.environment is None else given.environment.absolute()
    return Options(given.rounds, given.workloads, not given.skip_steering, cache, environment, given.output)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write; return the exit status, 2 for what the user can correct."""
    try:
        measure(parse(arguments), arguments)
    except (UserError, OSError) as error:
        print(f"throughput.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def measure(options: Options, arguments: Sequence[str]) -> None:
    """Make what is missing, run everything by turns, print and write the tables."""
    options.cache.mkdir(parents=True, exist_ok=True)
    python = environment(options.environment)
    ready = races(options, python)
    record = provenance(shlex.join(["python", "experiments/benchmarks/throughput.py", *arguments]))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "open_clip_torch"))
    parts = [
        f"# Training throughput\n\n`{record['command']}`, {record['date']}. {record['machine']}, load at the start "
        f"{record['load']}; {versions}.\n"
    ]
    if ready:
        rows = []
        for name, race in ready.items():
            rows.append(row(name, race, options.rounds))
            print(rows[-1], flush=True)
        parts.append(
            "## Beside open_clip_train\n\n`run.py train --catalog ... --method openclip` (ours) and `python -m "
            f"open_clip_train.main` with webdataset <= 0.2.86 in an environment of its own (theirs): the same shards, "
            "model, augmentation, batch size, workers, threads, AdamW and schedule; float32, one epoch, no validation, "
            f"no checkpoint before the end. Medians of {options.rounds} runs of each, which take turns. Images per "
            "second and share of time waiting for data are by each program's own log, a line every "
            f"{LOG_EVERY} steps, without the first {WARM_UP:.0%} of a run; `wall` is from start to exit, the export of "
            "the model included. `ratio`: ours to theirs, median of the rounds.\n\n"
            f"{markdown(rows)}\n"
        )
    if options.steering:
        steering = steering_row(options)
        print(steering, flush=True)
        parts.append(
            "## Steering\n\n`run.py train --preset glyph-steered` with cached features, and the same with `--method "
            f"fastclip --temperature {TEMPERATURE}`: seconds of a step, medians over the lines of the log of "
            f"{options.rounds} runs of each, which take turns, without the first {WARM_UP:.0%}; {THREADS} threads.\n\n"
            f"{markdown([steering])}\n"
        )
    text = "\n".join(parts)
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
