"""Trials in which files are changed after they were written: bits, ends, parts of two steps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experiments.benchmarks.chaos.ends import Verdict
from experiments.benchmarks.chaos.runs import Run
from experiments.benchmarks.chaos.trials import Trials, said_clearly
from experiments.clip.catalog.catalog import open_catalog
from experiments.clip.io.checksums import MANIFEST

PART = "part-0-of-1.safetensors"
_END = 4096  # bytes that a file system has not written


def last_checkpoint(trials: Trials, damage: Callable[[Trials, Path, Path], object]) -> Verdict:
    """Damage the last checkpoint of two; the run resumes from the one before, and sets the damaged one aside."""
    begun = trials.in_training(checkpoints=2)
    begun.kill()
    before, last = trials.last_two(begun.folder)
    damage(trials, before, last)
    (status,) = Run(begun.folder, trials.splits).finish()
    is_clear = status == 0 and last.with_name(f"damaged-{last.name}").is_dir()
    ended = "set aside, resumed from the one before" if is_clear else f"NOT CLEAR: {status}"
    return trials.compared(begun.folder, ended) if status == 0 else Verdict(ended, False, False, False)


def all_checkpoints(trials: Trials) -> Verdict:
    """Damage every checkpoint; the run is refused, and resumed when one of them is put back."""
    begun = trials.in_training(checkpoints=2)
    begun.kill()
    last, kept = trials.last_two(begun.folder)[1], trials.scratch / "kept"
    shutil.copytree(last, kept)
    for folder in last.parent.glob("step-*"):
        flip(trials, folder / PART)
    ended = said_clearly(Run(begun.folder, trials.splits), 2, "is damaged")
    shutil.rmtree(last.parent)
    last.parent.mkdir()
    kept.rename(last)
    return trials.resumed(begun.folder, ended.replace("one line", "refused by name"))


def refused(trials: Trials, choose: Callable[[Path], list[Path]], name: str) -> Verdict:
    """Change a bit of a file that training reads; the run is refused by name, and resumed with the file put back."""
    begun = trials.in_training()
    begun.kill()
    path = trials.random.choice(choose(begun.folder))
    content = path.read_bytes()
    path.unlink()  # it is the same file in the folders of other trials
    path.write_bytes(content)
    flip(trials, path)
    ended = said_clearly(Run(begun.folder, trials.splits), 2, name)
    path.write_bytes(content)
    return trials.resumed(begun.folder, ended.replace("one line", "refused by name"))


def indexes_of(folder: Path) -> list[Path]:
    """Return the indexes that the catalog of a run names."""
    catalog = open_catalog(folder / "catalog", verify=False)
    return [catalog.folder / shard.index for shard in catalog.shards]


def flip(trials: Trials, path: Path) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        place = trials.random.randrange(path.stat().st_size)
        (byte,) = os.pread(file.fileno(), 1, place)
        os.pwrite(file.fileno(), bytes([byte ^ 1 << trials.random.randrange(8)]), place)


def cut(trials: Trials, before: Path, last: Path) -> None:
    """Cut a file, as a file system that loses data does."""
    os.truncate(last / PART, trials.random.randrange((last / PART).stat().st_size))


def zeroed(trials: Trials, before: Path, last: Path) -> None:
    """Put zeros at the end of a file, as a file system does whose blocks were not written when power was lost."""
    path = last / PART
    size = path.stat().st_size
    with path.open("r+b") as file:
        length = trials.random.randrange(1, min(size, 16 * _END))
        os.pwrite(file.fileno(), bytes(length), size - length)


def mixed(trials: Trials, before: Path, last: Path) -> None:
    """Put half of the tensors of the step before into the file, which has the header of the last step."""
    with safe_open(last / PART, "pt") as file:
        metadata = file.metadata()
    tensors, earlier = load_file(last / PART), load_file(before / PART)
    names = sorted(tensors.keys() & earlier.keys())
    chosen = trials.random.sample(names, len(names) // 2)
    save_file(tensors | {name: earlier[name] for name in chosen}, last / PART, metadata)


#: What is done to the last checkpoint, given the one before.
STEPS_DAMAGED: dict[str, Callable[[Trials, Path, Path], object]] = {
    "last checkpoint cut off": cut,
    "a bit of the last checkpoint changed": lambda trials, before, last: flip(trials, last / PART),
    "end of the last checkpoint zeroed": zeroed,
    "last checkpoint with the file of the step before": lambda _, before, last: shutil.copy(before / PART, last / PART),
    "last checkpoint with tensors of the step before": mixed,
    "last checkpoint with the manifest of the step before": lambda _, before, last: shutil.copy(
        before / MANIFEST, last / MANIFEST
    ),
}

DAMAGES: dict[str, Callable[[Trials], Verdict]] = {
    name: lambda trials, damage=damage: last_checkpoint(trials, damage) for name, damage in STEPS_DAMAGED.items()
}
DAMAGES |= {
    "a bit of every checkpoint changed": all_checkpoints,
    "a bit of the cached features changed": lambda trials: refused(
        trials, lambda folder: sorted((folder / "features").glob("*.safetensors")), "reference features"
    ),
    "a bit of an index changed": lambda trials: refused(trials, indexes_of, "index/"),
}
