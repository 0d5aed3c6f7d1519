"""Measure the memory of validation on 1e4 and 1e5 samples: zero-shot tasks in CLIP_benchmark's layout, held-out pairs.

``python experiments/benchmarks/validation_memory.py`` prints a table and writes it as Markdown; about 10 minutes.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from experiments.benchmarks.measure import ROOT, markdown, provenance, seconds, within
from experiments.benchmarks.memory import forget_peak, peak
from experiments.clip.evaluation.encoding import Encoder
from experiments.clip.evaluation.tasks import evaluate_task, open_tasks
from experiments.clip.glyphs.evaluation import evaluate
from experiments.clip.models.clip import Clip, new_model

RESULTS = Path(__file__).parent / "results" / "validation_memory.md"
MODEL = "glyph-small"
WIDTH = 64  # of its features
PIXELS = 32
CLASSES = 1000
SHARD = 10_000
BATCH = 64
REACH = 1.1
HELD = {"classification": 0, "retrieval": 2, "pairs": 1}  # features per sample that the metric needs


def write_task(folder: Path, kind: str, samples: int) -> None:
    """Write a task of images of noise, which take up to 64 forms; captions are all different."""
    generator = np.random.default_rng(0)
    images = [_png(generator.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)) for _ in range(64)]
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text(f"{kind}\n")
    (folder / "classnames.txt").write_text("".join(f"class {number}\n" for number in range(CLASSES)))
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\na drawing of {c}\n")
    starts = range(0, samples, SHARD)
    (folder / "test" / "nshards.txt").write_text(f"{len(starts)}\n")
    for shard, start in enumerate(starts):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as archive:
            for number in range(start, min(start + SHARD, samples)):
                label = ("cls", str(number % CLASSES)) if kind == "classification" else ("txt", _caption(number))
                for suffix, data in (("png", images[number % len(images)]), (label[0], label[1].encode())):
                    info = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def _png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def _caption(number: int) -> str:
    return f"drawing {number}"


def pairs(clip: Clip, samples: int) -> None:
    """Score held-out pairs of `CLASSES` captions, the images drawn as they are asked for."""
    vocabulary = [_caption(number) for number in range(CLASSES)]
    captions = [vocabulary[number % CLASSES] for number in range(samples)]
    evaluate(clip.encode_image, clip.encode_text, _images(samples), captions, vocabulary)


def _images(samples: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, samples, BATCH):
        yield torch.randn(min(BATCH, samples - start), 3, PIXELS, PIXELS, generator=generator)


def measure_peak(kind: str, samples: int) -> tuple[float, float]:
    """Return the peak of a validation beyond what is there once the model is loaded, in megabytes, and its seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / kind
        if kind != "pairs":
            write_task(folder, kind, samples)
        clip = new_model(MODEL, 0)
        clip.model.eval()
        call: Callable[[], object] = lambda: evaluate_task(Encoder(clip, batch_size=BATCH), open_tasks([folder])[0])  # noqa: E731
        forget_peak()
        before = peak()
        taken = seconds((lambda: pairs(clip, samples)) if kind == "pairs" else call)
        return (peak() - before) / 1e6, taken


def in_own_process(kind: str, samples: int) -> tuple[float, float]:
    """Return the same from a fresh process."""
    # Fixed thresholds make glibc hand every freed array back: the high-water mark is that of live arrays.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**22), "MALLOC_TRIM_THRESHOLD_": str(2**26)}
    environment["OMP_NUM_THREADS"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, __file__, "--peak", kind, str(samples)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    megabytes, taken = map(float, done.stdout.split())
    return megabytes, taken


@dataclass(frozen=True)
class Row:
    """One validation at one size; megabytes beyond the loaded model."""

    validation: str
    samples: int
    seconds: float
    peak_mb: float
    features_mb: float
    beyond_mb: float
    ratio: float | None
    bytes_per_further_sample: float | None
    reach: float | None
    met: str


def rows(sizes: list[int]) -> Iterator[Row]:
    """Measure every validation at every size, each against the first size."""
    for kind, held in HELD.items():
        first: float | None = None
        for samples in sizes:
            megabytes, taken = in_own_process(kind, samples)
            features = held * WIDTH * 4 * samples / 1e6
            beyond = megabytes - features
            ratio = None if first is None else beyond / first
            further = None if first is None else (beyond - first) * 1e6 / (samples - sizes[0])
            first = beyond if first is None else first
            reach = None if ratio is None else REACH
            yield Row(kind, samples, taken, megabytes, features, beyond, ratio, further, reach, within(ratio, reach))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000], help="(default: 10000 100000)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Markdown file")
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "SAMPLES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(*measure_peak(options.peak[0], int(options.peak[1])))
        return
    record = provenance(" ".join(["python experiments/benchmarks/validation_memory.py", *sys.argv[1:]]))
    found = []
    for row in rows(options.samples):
        print(row, flush=True)
        found.append(row)
    text = (
        f"# Memory of validation\n\n`{record['command']}`, {record['date']}. {record['machine']}; one "
        f"thread, load at the start {record['load']}; torch {record['versions']['torch']}.\n\n"
        f"Megabytes of resident memory at the peak, beyond what is there once the model ({MODEL}, images of {PIXELS} "
        f"pixels, batches of {BATCH}) is loaded, each in a fresh process. `classification`: {CLASSES} classes, two "
        "prompts each; three numbers of each sample are kept, and no feature. `retrieval`: one caption per image; "
        f"exact recall needs every image's and every caption's feature, {WIDTH} floats each (`features mb`); "
        "`beyond mb` is what it takes besides them. `pairs`: naming and retrieval by `evaluate.evaluate` among "
        f"{CLASSES} captions, which keeps the images' features. `ratio` is that of `beyond mb` to the first size.\n\n"
        f"{markdown(found)}\n"
    )
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
