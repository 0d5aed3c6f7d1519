"""Read a catalog of a billion pairs on 512 ranks, without images, and plan a training on it.

``python experiments/benchmarks/many_ranks.py`` makes the catalog of DataComp-1B's size (1.4e9 pairs in 140,000 shards
of an object store), starts ranks on it in processes of their own, walks through what ranks would ask for, checks that
each sample is visited once, also where the run resumes on 384 ranks in the middle of the epoch, and writes
results/many_ranks.md and the table of experiments/clip/README.md. It takes about ten minutes and 2 GB of memory on one
core. No image is made, and nothing is sent.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.benchmarks.measure import ROOT, markdown, provenance
from experiments.clip.catalog.catalog import IMAGE_KEYS, Catalog, open_catalog, write_catalog
from experiments.clip.catalog.scan import Shard, digest_of
from experiments.clip.catalog.sources import TarPattern
from experiments.clip.data.lanes import Block, Lanes
from experiments.clip.data.order import bounds

RESULTS = Path(__file__).parent / "results" / "many_ranks.md"
README = ROOT / "experiments" / "clip" / "README.md"
BEGIN, END = "<!-- many ranks: written by experiments/benchmarks/many_ranks.py -->", "<!-- end of many ranks -->"
PAIR_BYTES = 35_000
SEED = 0


@dataclass(frozen=True)
class Scale:
    """Sizes of the data and of the run."""

    samples: int = 1_400_000_000
    shards: int = 140_000
    batch_size: int = 90_112
    ranks: int = 512
    ranks_later: int = 384

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.samples // self.batch_size)


@dataclass(frozen=True)
class Row:
    """A figure of the table, and where it is from."""

    what: str
    figure: str
    by: str


# --- the catalog ----------------------------------------------------------------------------------------------


def shards_of(scale: Scale) -> list[Shard]:
    """Return shards of an object store, of different sizes, with the digests that their indexes would have."""
    draws = np.random.default_rng(SEED).uniform(0.9, 1.1, scale.shards)
    ends = np.round(np.cumsum(draws) / draws.sum() * scale.samples).astype(np.int64)
    counts = np.diff(ends, prepend=0).tolist()
    found: list[Shard] = []
    for number, count in enumerate(counts):
        digest = digest_of(str(number).encode())
        index = f"index/{digest[:24]}.npy"
        path = f"s3://pool/datacomp_1b/{number:08d}.tar"
        shard = Shard("tar", path, count * PAIR_BYTES, count, index, 44 * count + 256, digest, source=0)
        found.append(dataclasses.replace(shard, first_index=int(ends[number]) - count))
    return found


def order_of(catalog: Catalog, scale: Scale) -> Lanes:
    """Return the order in which a run reads remote shards in blocks."""
    shards = catalog.shards
    return Lanes(shards.samples.tolist(), shards.bytes.tolist(), seed=SEED, batch_size=scale.batch_size)


def part(order: Lanes, step: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the positions of the epoch that are a rank's part of a step."""
    begin, end = bounds(order.samples, order.steps, step)
    first, stop = order.part(end - begin, rank, ranks)
    return begin + first, begin + stop


# --- the start of a rank --------------------------------------------------------------------------------------


def started(folder: Path, scale: Scale, rank: int, ranks: int, step: int) -> dict[str, float]:
    """Open the catalog and lay out the blocks of a rank's first batch; return seconds of the processor, and memory."""
    before, began = _memory(), time.process_time()
    catalog = open_catalog(folder, verify=False)
    opened = time.process_time()
    order = order_of(catalog, scale)
    place = part(order, step, rank, ranks)
    blocks, visits = order.blocks(0, *place), order.visits(0, *place)
    sizes = [catalog.shards[block.shard].bytes for block in blocks]
    assert len(visits.index) and sizes
    return {"catalog": opened - began, "order": time.process_time() - opened, "bytes": _memory() - before}


def _memory() -> int:
    """Return the bytes of this process's own memory, without files that are mapped."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("the system does not say how much memory this process has")


def starts(folder: Path, scale: Scale, places: Iterable[tuple[int, int, int]]) -> list[dict[str, float]]:
    """Start ranks in processes of their own, each at rank, ranks and step; return what each measured."""
    found: list[dict[str, float]] = []
    for place in places:
        words = ["--start", *map(str, place), "--folder", str(folder), "--scale", json.dumps(dataclasses.asdict(scale))]
        command = [sys.executable, "-m", "experiments.benchmarks.many_ranks", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        found.append(json.loads(done.stdout))
    return found


# --- what the ranks ask for -----------------------------------------------------------------------------------


def visited_once(order: Lanes, samples: int, epoch: int = 0) -> bool:
    """Whether the lanes of an epoch, which all batches consist of, visit every sample once."""
    seen = np.zeros(samples, np.uint8)
    visits = 0
    for lane in range(order.lanes):
        index = order.lane_visits(epoch, lane).index
        seen[index] = 1
        visits += len(index)
    return visits == samples and bool(seen.all())


def batches_agree(order: Lanes, steps: Iterable[int], ranks: int) -> bool:
    """Whether the parts of all ranks together are the batch of one process, and lie in the blocks they ask for."""
    for step in steps:
        begin, end = bounds(order.samples, order.steps, step)
        places = [part(order, step, rank, ranks) for rank in range(ranks)]
        if [begin, *(stop for _, stop in places)] != [*(start for start, _ in places), end]:
            return False
        parts = [order.visits(0, *place).index for place in places]
        if not np.array_equal(np.concatenate(parts), order.visits(0, begin, end).index):
            return False
        for place, index in zip(places, parts, strict=True):
            held = np.concatenate([np.arange(block.first, block.stop) for block in order.blocks(0, *place)])
            if not np.isin(index, held).all():
                return False
    return True


@dataclass(frozen=True)
class Asked:
    """What a rank asks for in some steps: shards, blocks and their samples; the most samples held at a time."""

    shards: int
    blocks: int
    samples: int
    visits: int
    held: int
    seconds: float


def asked(order: Lanes, steps: range, rank: int, ranks: int) -> Asked:
    """Walk through steps of a rank, and return what it asks for; blocks that it still holds are not asked for again."""
    shards: set[int] = set()
    held: dict[Block, int] = {}
    blocks = samples = visits = most = 0
    began = time.process_time()
    for step in steps:
        place = part(order, step, rank, ranks)
        for block in order.blocks(0, *place):
            if block not in held:
                held[block] = block.stop - block.first
                shards.add(block.shard)
                blocks, samples = blocks + 1, samples + held[block]
        most = max(most, sum(held.values()))
        visits += place[1] - place[0]
        held = {block: size for block, size in held.items() if block.until > step}
    return Asked(len(shards), blocks, samples, visits, most, (time.process_time() - began) / max(1, len(steps)))


# --- the table ------------------------------------------------------------------------------------------------


def simulated(folder: Path, scale: Scale, walks: int, batches: int) -> Iterator[Row]:
    """Yield what the simulation measures."""
    draws = random.Random(SEED)
    catalog = write_catalog(folder, [TarPattern("s3://pool/datacomp_1b/*.tar")], IMAGE_KEYS, ("txt",), shards_of(scale))
    order, half = order_of(catalog, scale), scale.steps // 2
    ranks, later = scale.ranks, scale.ranks_later
    begun = starts(folder, scale, [(draws.randrange(ranks), ranks, 0) for _ in range(walks)])
    yield _start(f"start of a rank of {ranks}: catalog, order, its first batch", begun)
    resumed = starts(folder, scale, [(draws.randrange(later), later, half) for _ in range(walks)])
    yield _start(f"the same in the middle of the epoch, on {later} ranks", resumed)
    memory = max(each["bytes"] for each in (*begun, *resumed))
    yield Row("memory of that, of a rank", f"{memory / 1e6:.0f} MB", "simulated")
    for count, steps in ((ranks, range(half)), (later, range(half, scale.steps))):
        found = [asked(order, steps, draws.randrange(count), count) for _ in range(walks)]
        yield from _of_ranks(found, count, catalog, scale)
    chosen = [(ranks, draws.sample(range(half), batches)), (later, draws.sample(range(half, scale.steps), batches))]
    agree = all(batches_agree(order, steps, count) for count, steps in chosen)
    what = f"{batches} batches of {ranks} ranks before the middle and of {later} after it, against one process"
    yield Row(what, "equal" if agree else "NOT EQUAL", "simulated")
    once = visited_once(order, scale.samples)
    yield Row(f"every one of {scale.samples:,} samples visited once", "yes" if once else "NO", "simulated")


def _start(what: str, found: Sequence[dict[str, float]]) -> Row:
    seconds = max(each["catalog"] + each["order"] for each in found)
    return Row(what, f"{seconds:.2f} s of the processor", "simulated")


def _of_ranks(found: Sequence[Asked], ranks: int, catalog: Catalog, scale: Scale) -> Iterator[Row]:
    share = statistics.mean(each.shards for each in found) / len(catalog.shards)
    over = sum(each.samples for each in found) / sum(each.visits for each in found)
    held = max(each.held for each in found) * PAIR_BYTES
    per_step = statistics.mean(each.blocks for each in found) / (scale.steps / 2)
    half = f"a rank of {ranks} in half an epoch"
    yield Row(f"shards that {half} reads from", f"{100 * share:.2f} % of {len(catalog.shards):,}", "simulated")
    yield Row(
        f"requests of {half}, a step",
        f"{per_step:.2f} (one for each pair: {scale.batch_size / ranks:.0f})",
        "simulated",
    )
    yield Row(f"bytes that {half} asks for, over those of its pairs", f"{over:.2f}", "simulated")
    yield Row(f"copies of blocks that a rank of {ranks} holds", f"{held / 1e9:.2f} GB at most", "simulated")
    seconds = statistics.mean(each.seconds for each in found)
    yield Row(f"time of a rank of {ranks} for the order of a step", f"{1e3 * seconds:.2f} ms", "simulated")


def planned_rows(scale: Scale) -> Iterator[Row]:
    """Yield what `run.py plan` says of DataComp's largest recipe on these data."""
    from experiments.clip.cli.plan import planned
    from experiments.clip.run import parse

    words = ["plan", "--preset", "datacomp-xlarge", "--batch-size", str(scale.batch_size), "--ranks", str(scale.ranks)]
    words += ["--samples", str(scale.samples), "--shards", str(scale.shards)]
    found = planned(parse(words))
    yield Row("pairs per second", f"{found.estimate.pairs_per_second:,.0f}", "planned")
    data = found.data
    yield Row("read from the object store", f"{data.bytes_per_second / 1e9:.2f} GB/s", "planned")
    one, streamed = data.single_requests_per_second, data.requests_per_second
    yield Row("requests to it, in blocks", f"{streamed:,.0f}/s (one for each pair: {one:,.0f}/s)", "planned")
    yield Row("files checked at the start", f"{data.checks:,}, {data.checks_of_a_rank:,} of them by a rank", "planned")
    for what, size in found.messages:
        yield Row(f"received by a rank in a step: {what}", f"{size / 1e6:,.2f} MB", "planned")
    saved = found.checkpoint
    of_a_rank = f"{saved.of_a_rank / 1e6:.1f} MB of a rank in {1e3 * saved.seconds:.0f} ms at 1 GB/s"
    yield Row("checkpoint", f"{saved.bytes / 1e9:.2f} GB, {of_a_rank}", "planned")
    yield Row("memory of a rank, bfloat16", f"{found.estimate.memory / 1e9:.1f} GB", "planned")
    more = ["--method", "drrho", "--catalog", "catalog", "--reference", "reference", "--reference-features", "features"]
    steered = planned(parse([*words, *more]))
    state, cache = steered.estimate.running_state, steered.estimate.reference_cache
    yield Row("steered: running estimates of a rank", f"{state / 1e6:.1f} MB", "planned")
    yield Row("steered: reference features on disk", f"{cache / 1e12:.2f} TB", "planned")


def put_between(text: str, table: str) -> str:
    """Return a page with the table between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    """Print the table and write it; return 0 if every sample is visited once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=json.loads, default={}, metavar="JSON", help="other sizes than DataComp-1B's")
    parser.add_argument("--walks", type=int, default=4, help="ranks that are started, and walked through half an epoch")
    parser.add_argument("--batches", type=int, default=10, help="batches that are compared with those of one process")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table goes")
    parser.add_argument("--page", type=Path, default=README, help="page that has the table between its marks")
    parser.add_argument("--start", type=int, nargs=3, metavar=("RANK", "RANKS", "STEP"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    scale = Scale(**options.scale)
    if options.start:
        print(json.dumps(started(options.folder, scale, *options.start)))
        return 0
    data = f"{scale.samples:,} pairs of {PAIR_BYTES:,} bytes in {scale.shards:,} shards"
    record = provenance(shlex.join(["python", "experiments/benchmarks/many_ranks.py", *arguments]))
    with tempfile.TemporaryDirectory() as folder:
        rows = [*planned_rows(scale), *simulated(Path(folder), scale, options.walks, options.batches)]
    table = markdown(rows)
    text = (
        f"# Many ranks\n\n`{record['command']}`, {record['date']}. {record['machine']}, load {record['load']} at the "
        f"start. {data}, batch {scale.batch_size:,}: "
        f"planned for ViT-L/14 by DataComp's largest recipe on {scale.ranks} A100, simulated without images. Of "
        f"{options.walks} ranks drawn at random, the start and every step of half an epoch.\n\n{table}\n"
    )
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    options.page.write_text(put_between(options.page.read_text(), table))
    return int("NO" in table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
