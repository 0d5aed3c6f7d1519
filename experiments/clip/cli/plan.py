"""What a run will take, before it is started: parameters, operations, memory of a rank by part, disk, network, time.

Nothing is trained and no weights are made: `cli.cost` counts one pair, and the rest is arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from drrho.tiles import KERNEL_TILE, ROWS, TILE

from ..catalog.catalog import open_catalog
from ..io.workers import AHEAD, usual_workers
from ..training.options import Execution, TowerPrecision
from .building import input_options
from .cost import Cost, cost_of
from .options import Plan, Train
from .terminal import console
from .traffic import Exchange, Reading, Saving, exchanges, reading, saving

_FLOAT = 4  # bytes
_PAIRS_OF_A_SHARD = 10_000  # img2dataset's
_EMBEDDED_PAIRS = 23_635


class Planned(NamedTuple):
    """What a run takes: of its devices, of the network, and of the storage for data and for a checkpoint."""

    samples: int
    shards: int
    estimate: Estimate
    messages: list[Exchange]
    data: Reading
    checkpoint: Saving


def run(options: Plan) -> None:
    """Print what a run would take."""
    found = planned(options)
    size = f"pairs             {found.samples:,} in {found.shards:,} shards"
    traffic = described_traffic(found.messages, found.data, found.checkpoint)
    console.print("\n".join([size, *described(found.estimate), *traffic]))


def planned(options: Plan) -> Planned:
    """Return what a run would take."""
    samples, shards = _size_of_data(options)
    train, precision = as_on_a_gpu(options.train)
    loss, execution = train.loss, train.execution
    precision = execution.precision or "bfloat16"
    cost = cost_of(
        train.model,
        checkpointing=execution.activation_checkpointing,
        precision=precision,
        device="cpu" if execution.device == "cpu" else "cuda",
        **input_options(train.inputs),
    )
    state = {
        "individual_temperatures": loss.temperature_scheme == "individual",
        "running": loss.is_running and loss.normalizer is None,
    }
    references = 1 + len(loss.more_references) if train.needs_reference else 0
    reference_width = references * options.reference_width
    estimate = estimated(
        cost,
        samples=samples,
        samples_seen=(train.shards.epoch_samples or samples) * train.optimization.epochs,
        batch_size=train.optimization.batch_size,
        scored_per_pair=train.selection.scored_per_pair,
        accumulation=train.optimization.accumulation,
        ranks=options.ranks,
        execution=execution,
        teraflops=options.teraflops,
        utilization=options.utilization,
        reference_width=reference_width,
        ema=train.optimization.ema is not None,
        self_reference=loss.self_reference is not None,
        workers=train.shards.workers or 0,
        **state,
    )
    messages = exchanges(
        parameters=cost.parameters,
        width=cost.width,
        reference_width=reference_width,
        batch_size=train.optimization.batch_size,
        ranks=options.ranks,
        parallel=execution.parallel,
        precision=precision,
        contrastive=loss.method != "siglip",
        **state,
    )
    data = reading(
        pairs_per_second=estimate.pairs_per_second,
        samples=samples,
        shards=shards,
        sample_bytes=1e3 * options.pair_kilobytes,
        ranks=options.ranks,
        cached_features=train.needs_reference and train.shards.reference_features is not None,
    )
    checkpoint = saving(estimate.checkpoint, options.ranks, 1e9 * options.writing_gigabytes)
    return Planned(samples, shards, estimate, messages, data, checkpoint)


def _size_of_data(options: Plan) -> tuple[int, int]:
    """Return the numbers of pairs and of shards: those given, of the catalog, or of the embedded pairs."""
    samples, shards, catalog = options.samples, options.shards, options.train.shards.catalog
    if catalog is not None and samples is None:  # of one that is not made yet, --samples says how many
        found = open_catalog(catalog, verify=False)
        samples, shards = len(found), shards or len(found.shards)
    samples = samples or _EMBEDDED_PAIRS
    return samples, shards or -(-samples // _PAIRS_OF_A_SHARD)


def as_on_a_gpu(train: Train) -> tuple[Train, TowerPrecision]:
    """Return options with what a GPU's rank takes where they were not given, and the precision among them."""
    shards, execution = train.shards, train.execution
    if shards.workers is None:
        shards = replace(shards, workers=usual_workers())
    precision = execution.precision or ("float32" if execution.device == "cpu" else "bfloat16")
    execution = replace(execution, precision=precision)
    return replace(train, shards=shards, execution=execution), precision


@dataclass(frozen=True)
class Estimate:
    """What a run takes; memory in bytes, of one rank.

    ``casts`` are copies of the weights in the precision of the towers, of sharded ones those of two blocks and of what
    is in none; ``activations`` what is kept for the backward pass in that precision. ``inputs`` is of the batch at
    hand, in bytes and normalized, and of the one that is copied meanwhile; ``shared`` is the most that batches of the
    workers take in the host's shared memory.
    """

    parameters: int
    flops_per_pair: int
    weights: int
    gradients: int
    optimizer: int
    casts: int
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
    self_reference: bool,
    workers: int,
) -> Estimate:
    """Add up what the run takes.

    ``teraflops`` is the peak rate of a rank's device in 10^12 operations per second, ``utilization`` the share of it
    that training reaches; ``reference_width`` is 0 without a reference, and of several the sum. Of ``scored_per_pair``
    pairs, all of which count as seen, one is trained on; if there are several, each goes through the towers once more
    to be scored.
    """
    shards = ranks if execution.parallel == "fsdp" else 1
    weights = _FLOAT * cost.parameters
    size = _FLOAT if execution.precision == "float32" else 2
    gathered = cost.gathered_parameters if shards > 1 else 0
    own = -(-batch_size // ranks)
    part = -(-own // accumulation)
    activations = part * (cost.kept_bytes + cost.block_bytes)
    rows = -(-samples // ranks)
    state = rows * (8 * running + 28 * individual_temperatures)
    tile = max(2 * max(TILE, ROWS * batch_size), min(own * batch_size, KERNEL_TILE))  # CPU, GPU
    guide = cost.width if self_reference else reference_width
    columns = batch_size * (cost.width * 2 + guide) + own * (cost.width * 4 + 2 * guide)
    averages = ema + self_reference
    loss = _FLOAT * (tile + columns)
    # With the reference's features as they are cached, of 16 bits.
    batch = -(-batch_size * scored_per_pair // ranks) * (cost.pair_bytes + 4 * reference_width)
    parts = {
        "weights": weights // shards * (1 + averages),
        "gradients": weights // shards + gathered * _FLOAT,
        "optimizer": 2 * weights // shards,
        "casts": gathered * size if shards > 1 else cost.cast_bytes,
        "activations": activations,
        "inputs": 2 * batch + part * cost.pair_bytes * size,
        "loss": loss,
        "running_state": state,
    }
    trained = 3 * cost.flops + (cost.flops if accumulation > 1 or execution.activation_checkpointing else 0)
    operations = trained if scored_per_pair == 1 else cost.flops + trained / scored_per_pair
    operations += self_reference * cost.flops
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
        checkpoint=(3 + averages) * weights + samples * (8 * running + 28 * individual_temperatures),
        steps=-(-samples_seen // (batch_size * scored_per_pair)),
        pairs_per_second=rate,
        hours=hours,
        gpu_hours=hours * ranks,
    )


def described(estimate: Estimate) -> Iterator[str]:
    """Yield an estimate as lines of text."""
    memory = {
        "weights": estimate.weights,
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer,
        "weights in precision": estimate.casts,
        "activations": estimate.activations,
        "inputs": estimate.inputs,
        "loss": estimate.loss,
        "running state": estimate.running_state,
        "together": estimate.memory,
    }
    yield f"parameters        {estimate.parameters / 1e6:.1f} million"
    yield f"operations        {estimate.flops_per_pair / 1e9:.2f} GFLOPs per pair, forward"
    yield f"steps             {estimate.steps:,}"
    yield (
        f"expected          {estimate.pairs_per_second:,.0f} pairs/s; {estimate.hours:,.1f} hours, times ranks "
        f"{estimate.gpu_hours:,.0f}"
    )
    yield "memory of a rank"
    yield from (f"  {name:<22}{size / 1e9:10.2f} GB" for name, size in memory.items())
    yield f"shared memory     {estimate.shared / 1e9:.2f} GB of the host at most, for the batches of a rank's --workers"
    yield f"reference cache   {estimate.reference_cache / 1e9:.2f} GB on disk"
    yield f"exported model    {estimate.exported_model / 1e9:.2f} GB"


def described_traffic(messages: list[Exchange], data: Reading, checkpoint: Saving) -> Iterator[str]:
    """Yield what the network and the storage are asked for as lines of text."""
    if messages:
        yield "received by a rank in a step"
        yield from (f"  {what:<42}{size / 1e6:10.2f} MB" for what, size in messages)
    yield (
        f"data              {data.bytes_per_second / 1e9:,.2f} GB/s of all ranks, in {data.requests_per_second:,.0f} "
        f"requests/s where shards are streamed, {data.single_requests_per_second:,.0f} where each pair is asked for"
    )
    yield (
        f"start             {data.checks:,} files checked, {data.checks_of_a_rank:,} by a rank; catalog "
        f"{data.catalog_bytes / 1e6:,.1f} MB, indexes {data.index_bytes / 1e9:,.2f} GB"
    )
    yield (
        f"checkpoint        {checkpoint.bytes / 1e9:.2f} GB, {checkpoint.of_a_rank / 1e9:.3f} GB of a rank in "
        f"{checkpoint.seconds:.2f} s, while training continues"
    )
