"""What a run will take, before it is started: parameters, operations, memory of a rank by part, disk, time.

Nothing is trained and no weights are made: the model is built on torch's meta device, its operations are counted by
torch's own counter, and what the backward pass keeps is what autograd saves there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

from drrho.tiles import KERNEL_TILE, ROWS, TILE
from experiments.clip.cli.building import input_options
from experiments.clip.cli.options import Plan, Train
from experiments.clip.cli.terminal import console
from experiments.clip.io.workers import AHEAD, usual_workers
from experiments.clip.models.clip import new_model
from experiments.clip.training.options import Execution

_FLOAT = 4  # bytes


def run(options: Plan) -> None:
    """Print what a run would take."""
    train, loss = as_on_a_gpu(options.train), options.train.loss
    estimate = estimated(
        cost_of(train.model, checkpointing=train.execution.activation_checkpointing, **input_options(train.inputs)),
        samples=options.samples,
        samples_seen=(train.shards.epoch_samples or options.samples) * train.optimization.epochs,
        batch_size=train.optimization.batch_size,
        scored_per_pair=train.selection.scored_per_pair,
        accumulation=train.optimization.accumulation,
        ranks=options.ranks,
        execution=train.execution,
        teraflops=options.teraflops,
        utilization=options.utilization,
        reference_width=options.reference_width if train.needs_reference else 0,
        individual_temperatures=loss.temperature_scheme == "individual",
        running=loss.is_running,
        ema=train.optimization.ema is not None,
        workers=train.shards.workers or 0,
    )
    console.print(described(estimate))


def as_on_a_gpu(train: Train) -> Train:
    """Return options with what a GPU's rank takes, on a machine like this one, where they were not given."""
    shards, execution = train.shards, train.execution
    if shards.workers is None:
        shards = replace(shards, workers=usual_workers())
    if execution.precision is None:
        execution = replace(execution, precision="bfloat16")
    return replace(train, shards=shards, execution=execution)


class Cost(NamedTuple):
    """Cost of one pair through both towers: operations forward, bytes kept for backward; parameters of the model.

    ``pair_bytes`` is the size of its image in bytes and of its tokens and index, as workers give them.
    """

    parameters: int
    flops: int
    kept_bytes: int
    width: int
    pair_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a run takes; memory in bytes, of one rank.

    ``inputs`` is of the batch at hand, in bytes and normalized, and of the one that is copied meanwhile; ``shared`` is
    the most that batches of the workers take in the host's shared memory.
    """

    parameters: int
    flops_per_pair: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    inputs: int
    loss: int
    running_state: int
    memory: int
    shared: int
    reference_cache: int
    exported_model: int
    checkpoint: int
    steps: int
    pairs_per_second: float
    hours: float
    gpu_hours: float


def cost_of(name: str, *, checkpointing: bool = False, **options: Any) -> Cost:
    """Count one pair through a registered open_clip model.

    Parameters
    ----------
    name : str
        As open_clip registers it.
    checkpointing : bool
        Whether blocks keep their inputs alone.
    options
        As for `experiments.clip.models.clip.new_model`.
    """
    with torch.device("meta"):
        model = new_model(name, 0, device="meta", **options).model
    model.set_grad_checkpointing(checkpointing)
    config = open_clip.get_model_preprocess_cfg(model)
    height, width = config["size"] if isinstance(config["size"], (tuple, list)) else (config["size"],) * 2
    image = torch.empty(1, 3, height, width, device="meta")
    text = torch.zeros(1, model.context_length, dtype=torch.int64, device="meta")
    own = {id(parameter) for parameter in model.parameters()} | {id(buffer) for buffer in model.buffers()}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Views of a weight, such as its transpose, keep nothing new; one tensor saved twice is kept once.
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own and id(base) not in kept:
            held.append(base)  # so that no other tensor gets its id
            kept[id(base)] = base.numel() * base.element_size()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features = model(image, text)[0]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pair_bytes = image.numel() + 4 * text.numel() + 8
    return Cost(parameters, counter.get_total_flops(), sum(kept.values()), features.shape[1], pair_bytes)


def estimated(
    cost: Cost,
    *,
    samples: int,
    samples_seen: int,
    batch_size: int,
    scored_per_pair: int,
    accumulation: int,
    ranks: int,
    execution: Execution,
    teraflops: float,
    utilization: float,
    reference_width: int,
    individual_temperatures: bool,
    running: bool,
    ema: bool,
    workers: int,
) -> Estimate:
    """Add up what the run takes.

    ``teraflops`` is the peak rate of a rank's device in 10^12 operations per second, ``utilization`` the share of it
    that training reaches; ``reference_width`` is 0 without a reference. Of ``scored_per_pair`` pairs, all of which
    count as seen, one is trained on; if there are several, each goes through the towers once more to be scored.
    """
    shards = ranks if execution.parallel == "fsdp" else 1
    weights = _FLOAT * cost.parameters
    own = -(-batch_size // ranks)
    part = -(-own // accumulation)
    # Half of what is kept is in the autocast's type at most: bytes are those of float32, an upper bound otherwise.
    activations = part * cost.kept_bytes
    rows = -(-samples // ranks)
    state = rows * (8 * running + 28 * individual_temperatures)
    tile = max(2 * max(TILE, ROWS * batch_size), min(own * batch_size, KERNEL_TILE))  # CPU, GPU
    columns = batch_size * (cost.width * 2 + reference_width) + own * (cost.width * 4 + 2 * reference_width)
    loss = _FLOAT * (tile + columns)
    # With the reference's features as they are cached, of 16 bits.
    batch = -(-batch_size * scored_per_pair // ranks) * (cost.pair_bytes + 4 * reference_width)
    parts = {
        "weights": weights // shards * (1 + ema),
        "gradients": weights // shards,
        "optimizer": 2 * weights // shards,
        "activations": activations,
        "inputs": 2 * batch + part * cost.pair_bytes * (_FLOAT if execution.precision == "float32" else 2),
        "loss": loss,
        "running_state": state,
    }
    trained = 3 * cost.flops + (cost.flops if accumulation > 1 or execution.activation_checkpointing else 0)
    operations = trained if scored_per_pair == 1 else cost.flops + trained / scored_per_pair
    rate = ranks * teraflops * 1e12 * utilization / operations
    hours = samples_seen / rate / 3600
    return Estimate(
        parameters=cost.parameters,
        flops_per_pair=cost.flops,
        **parts,
        memory=sum(parts.values()),
        shared=workers * AHEAD * batch,
        reference_cache=samples * reference_width * 2 * 2,
        exported_model=weights,
        checkpoint=3 * weights + ema * weights + samples * (8 * running + 28 * individual_temperatures),
        steps=-(-samples_seen // (batch_size * scored_per_pair)),
        pairs_per_second=rate,
        hours=hours,
        gpu_hours=hours * ranks,
    )


def described(estimate: Estimate) -> str:
    """Return an estimate as lines of text."""
    memory: dict[str, Any] = {
        "weights": estimate.weights,
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer,
        "activations (at most)": estimate.activations,
        "inputs": estimate.inputs,
        "loss": estimate.loss,
        "running state": estimate.running_state,
        "together": estimate.memory,
    }
    lines = [
        f"parameters        {estimate.parameters / 1e6:.1f} million",
        f"operations        {estimate.flops_per_pair / 1e9:.2f} GFLOPs per pair, forward",
        f"steps             {estimate.steps:,}",
        f"expected          {estimate.pairs_per_second:,.0f} pairs/s; {estimate.hours:,.1f} hours, "
        f"times ranks {estimate.gpu_hours:,.0f}",
        "memory of a rank",
        *(f"  {name:<22}{size / 1e9:10.2f} GB" for name, size in memory.items()),
        f"shared memory     {estimate.shared / 1e9:.2f} GB of the host at most, for the batches of a rank's --workers",
        f"reference cache   {estimate.reference_cache / 1e9:.2f} GB on disk",
        f"exported model    {estimate.exported_model / 1e9:.2f} GB, checkpoint {estimate.checkpoint / 1e9:.2f} GB",
    ]
    return "\n".join(lines)
