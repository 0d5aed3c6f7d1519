"""What a run leaves at its end, compared with one that was left alone: tensors, samples of every step, losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from experiments.benchmarks.chaos.runs import STEPS
from experiments.clip.errors import UserError
from experiments.clip.training.checkpoint import Checkpoint, latest_checkpoint

#: On another number of ranks, sums have another order: how far losses, and tensors relative to their norms, may differ.
LOSS_DIFFERENCE, TENSOR_DIFFERENCE = 1e-4, 0.02

Tensors = dict[str, torch.Tensor]
#: The samples of each step, as often as they were read differently.
Samples = dict[int, set[tuple[int, ...]]]


@dataclass
class Verdict:
    """What became of one trial."""

    ended_in: str
    weights: bool
    samples: bool
    checkpoint: bool


@dataclass(frozen=True)
class Row:
    """What became of the trials of one kind."""

    what: str
    trials: int
    ended_in: str
    identical_weights_and_state: str
    identical_samples: str
    last_checkpoint_loads: str


def row(what: str, verdicts: Sequence[Verdict]) -> Row:
    """Count the verdicts of one kind."""
    count = len(verdicts)
    endings = sorted({verdict.ended_in for verdict in verdicts})
    return Row(
        what,
        count,
        "; ".join(f"{e} ({sum(v.ended_in == e for v in verdicts)})" for e in endings),
        f"{sum(v.weights for v in verdicts)} of {count}",
        f"{sum(v.samples for v in verdicts)} of {count}",
        f"{sum(v.checkpoint for v in verdicts)} of {count}",
    )


def is_lost(found: Verdict) -> bool:
    """Whether something was lost in a trial, or not said clearly."""
    return "NOT" in found.ended_in or not (found.weights and found.samples and found.checkpoint)


@dataclass(frozen=True)
class End:
    """What a finished run leaves: tensors of exports and of the last checkpoint; the loss of every step."""

    tensors: Tensors
    exported: Tensors
    losses: dict[int, float]


def end_of(folder: Path) -> End:
    """Return what a finished run has left."""
    last = latest_checkpoint(folder / "out" / "checkpoints")
    assert last is not None
    files = [folder / "out" / name / "open_clip_model.safetensors" for name in ("model", "model-ema")]
    exported = {f"{path.parent.name}/{k}": v for path in files for k, v in load_file(path).items()}
    parts = {f"{path.name}/{k}": v for path in sorted(last.glob("*.safetensors")) for k, v in load_file(path).items()}
    lines = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    return End(exported | parts, exported, {line["step"]: line["loss"] for line in lines if "loss" in line})


def same(left: Tensors, right: Tensors) -> bool:
    """Whether the ends agree in every bit."""
    return left.keys() == right.keys() and all(
        value.dtype == right[key].dtype and value.numpy().tobytes() == right[key].numpy().tobytes()
        for key, value in left.items()
    )


def close(left: End, right: End) -> bool:
    """Whether the ends agree as those of runs on different numbers of ranks do."""
    if left.exported.keys() != right.exported.keys() or left.losses.keys() != right.losses.keys():
        return False
    if any(abs(loss - right.losses[step]) > LOSS_DIFFERENCE for step, loss in left.losses.items()):
        return False
    pairs = [(value, right.exported[key]) for key, value in left.exported.items()]
    return all(float((a - b).norm()) <= TENSOR_DIFFERENCE * float(b.norm()) for a, b in pairs)


def samples_of(folder: Path, rank: int = 0, ranks: int = 1) -> Samples:
    """Return the samples that a rank had in each step."""
    path = folder / f"samples-{rank}-of-{ranks}"
    seen: Samples = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        step, space, samples = line.partition(" ")
        if space and samples.endswith("]"):  # not the half of a line
            seen.setdefault(int(step), set()).add(tuple(json.loads(samples)))
    return seen


def same_samples(folder: Path, alone: Samples, counts: Sequence[int]) -> bool:
    """Whether every step had the samples of a run on one rank, each rank its part; ``counts`` are those of ranks."""
    covered: set[int] = set()
    for ranks in counts:
        parts = [samples_of(folder, rank, ranks) for rank in range(ranks)]
        for step in set.intersection(*map(set, parts)):
            if any(len(part[step]) > 1 for part in parts):
                return False
            together = tuple(sample for part in parts for sample in next(iter(part[step])))
            if {together} != alone[step]:
                return False
            covered.add(step)
    return covered == set(range(STEPS))


def loads(folder: Path) -> bool:
    """Whether all of the last checkpoint can be read, if there is one."""
    last = latest_checkpoint(folder / "out" / "checkpoints")
    try:
        return last is None or bool(Checkpoint(last).full_tensors(""))
    except UserError:
        return False
