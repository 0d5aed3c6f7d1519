"""What a run asks of storage and of the network, of all ranks and of one: requests, bytes, operations, seconds."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ..data.lanes import BLOCK_BYTES

_FLOAT, _INDEX, _DOUBLE = 4, 8, 8  # bytes
#: Numbers of a column of the matrix of similarities: its terms to the rank that has its text, and its totals to all.
_TERMS, _TOTALS = 3, 2
#: Numbers of a rank's message to the other hosts, beside the indices of its samples.
_WISHES = 3
#: What a shard's line in a catalog takes, its path of 60 letters included; and a sample's row in an index.
_LINE, _ROW = 420, 48


class Exchange(NamedTuple):
    """One kind of message between ranks: bytes that a rank receives in a step."""

    what: str
    bytes: int


def exchanges(
    *,
    parameters: int,
    width: int,
    reference_width: int,
    batch_size: int,
    ranks: int,
    parallel: Literal["ddp", "fsdp"],
    precision: str,
    contrastive: bool,
    running: bool,
    individual_temperatures: bool,
) -> list[Exchange]:
    """Return what a rank receives in every step, without the few numbers that are logged.

    Parameters
    ----------
    reference_width : int
        Of the reference's features that the loss compares; 0 without a reference.
    contrastive : bool
        Whether columns of the matrix of similarities are normalized, which the sigmoid loss leaves out.
    running, individual_temperatures : bool
        Whether estimates, or temperatures, of every sample are looked up at the ranks that keep them.
    """
    if ranks == 1:
        return []
    own = -(-batch_size // ranks)
    found = list(_of_weights(parameters, ranks, parallel, precision))
    sent = width + (reference_width if contrastive else 0) + individual_temperatures
    found.append(Exchange("text features of the batch, gathered", batch_size * sent * _FLOAT))
    found.append(Exchange("gradients of text features, to their ranks", ranks * own * width * _FLOAT))
    if contrastive:
        found.append(Exchange("sums of columns", ranks * own * _TERMS * _FLOAT + batch_size * _TOTALS * _FLOAT))
    kept = (running + individual_temperatures) * own * 2 * (_FLOAT + _DOUBLE)
    if kept:
        found.append(Exchange("rows of running state", kept))
    found.append(Exchange("indices of samples, between hosts", ranks * (_WISHES + own) * _INDEX))
    return found


def _of_weights(parameters: int, ranks: int, parallel: str, precision: str) -> list[Exchange]:
    others = (ranks - 1) / ranks
    if parallel == "ddp":
        return [Exchange("gradients of weights, summed (ring)", round(2 * others * parameters * _FLOAT))]
    size = parameters * (_FLOAT if precision == "float32" else 2)
    return [
        Exchange("weights of blocks, gathered twice", round(2 * others * size)),
        Exchange("gradients of weights, to their ranks", round(others * parameters * _FLOAT)),
    ]


class Reading(NamedTuple):
    """What training data ask of the storage, over all ranks: per second, and once at the start.

    ``single_requests_per_second`` are those where each pair is asked for on its own.
    """

    bytes_per_second: float
    requests_per_second: float
    single_requests_per_second: float
    catalog_bytes: int
    index_bytes: int
    checks: int
    checks_of_a_rank: int


def reading(
    *,
    pairs_per_second: float,
    samples: int,
    shards: int,
    sample_bytes: float,
    ranks: int,
    cached_features: bool,
) -> Reading:
    """Return what the data ask of the storage.

    Parameters
    ----------
    sample_bytes : float
        Of a pair in its shard.
    cached_features : bool
        Whether a file of features belongs to every shard.
    """
    rate = pairs_per_second * sample_bytes
    checks = shards * (2 + cached_features)
    return Reading(
        rate,
        rate / min(BLOCK_BYTES, sample_bytes * samples / shards),
        pairs_per_second,
        shards * _LINE,
        samples * _ROW,
        checks,
        -(-checks // ranks),
    )


class Saving(NamedTuple):
    """A checkpoint: bytes in all, of one rank, and seconds until a rank has written its part."""

    bytes: int
    of_a_rank: int
    seconds: float


def saving(total: int, ranks: int, bytes_per_second: float) -> Saving:
    """Return what a checkpoint takes, of which every rank writes a part, while training continues."""
    part = -(-total // ranks)
    return Saving(total, part, part / bytes_per_second)
