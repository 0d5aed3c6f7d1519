"""Samples per second from shards behind a server that takes its time: read in blocks, and with one request a sample.

    python -m experiments.benchmarks.remote

The shards are on this machine, behind an HTTP server on loopback that waits 20 ms before it answers a request, as
object storage does. What is measured is reading alone, by 8 workers as the loader has them: decoding comes after it
and takes the same time in all cases. `blocks` and `random` are what `--reading` calls so; `a request each` is `random`
where neighbors that a batch happens to have in a shard are not read together, as in shards of large images.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.benchmarks.measure import provenance
from experiments.clip.catalog.catalog import Catalog, make_catalog
from experiments.clip.data.feed import BlockFeed
from experiments.clip.data.lanes import Lanes
from experiments.clip.data.order import Order, RankPart
from experiments.clip.data.reader import RawSample, Reader
from experiments.clip.io import storage
from experiments.clip.io.copies import LocalCopies
from experiments.clip.io.workers import Workers

SHARDS, PAIRS, BATCH = 48, 1024, 128
_RESULTS = Path(__file__).parent / "results" / "remote.md"


class Server(ThreadingHTTPServer):
    """Serves a folder, waiting before every answer; counts requests and bytes.

    Attributes
    ----------
    requests : list of (str, str, str)
        Method, path and range of every request.
    sent : int
        Bytes of all answers.
    """

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, folder: Path, latency: float = 0.0, ranges: bool = True) -> None:
        self.latency, self.ranges = latency, ranges
        self.requests: list[tuple[str, str, str]] = []
        self.sent = 0
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        """Where the folder is."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that go away."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        """Answer as `do_GET` would, without the content."""
        self._begin()
        super().do_HEAD()

    def do_GET(self) -> None:
        """Answer with the file, or the part of it that is asked for."""
        stated = self._begin()
        path = Path(self.translate_path(self.path))
        if not (self.server.ranges and stated) or not path.is_file():
            self.server.sent += path.stat().st_size if path.is_file() else 0
            super().do_GET()
            return
        first, _, last = stated.removeprefix("bytes=").partition("-")
        size = path.stat().st_size
        start, stop = int(first), min(int(last or size - 1), size - 1) + 1
        if start >= size:
            self.send_error(416)
            return
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        self.server.sent += len(data)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _begin(self) -> str:
        stated = self.headers.get("Range", "")
        self.server.requests.append((self.command, self.path, stated))
        time.sleep(self.server.latency)
        return stated


@contextmanager
def served(folder: Path, latency: float = 0.0, ranges: bool = True) -> Iterator[Server]:
    """Serve a folder while the block runs; with ``ranges`` False as `python -m http.server` does."""
    server = Server(folder, latency, ranges)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def in_a_process(folder: Path, latency: float) -> Iterator[tuple[str, Callable[[], tuple[int, int]]]]:
    """Serve a folder from another process while the block runs.

    Gives the URL, and a function that returns the numbers of requests and of bytes since it was called last.
    """
    theirs, ours = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(folder, latency, theirs), daemon=True)
    process.start()

    def counts() -> tuple[int, int]:
        ours.send(None)
        return ours.recv()

    try:
        yield ours.recv(), counts
    finally:
        process.kill()
        process.join()


def _serve(folder: Path, latency: float, pipe: Connection) -> None:
    with served(folder, latency) as server:
        pipe.send(server.url)
        while True:
            pipe.recv()
            pipe.send((len(server.requests), server.sent))
            server.requests.clear()
            server.sent = 0


def write_shards(folder: Path, shards: int, pairs: int) -> None:
    """Write shards of JPEG images and captions."""
    random = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for pair in range(pairs):
                stream = io.BytesIO()
                values = random.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(values).save(stream, "JPEG")
                for kind, data in (("jpg", stream.getvalue()), ("txt", b"noise number %d" % pair)):
                    info = tarfile.TarInfo(f"{pair:05d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


class _Reads:
    """Reads the samples of a step, and returns how many there were: what a worker does before it decodes them.

    Step -1 has none.
    """

    def __init__(self, catalog: Catalog, copies: LocalCopies | None) -> None:
        counts, sizes = ([getattr(shard, name) for shard in catalog.shards] for name in ("samples", "bytes"))
        order = Order(counts, seed=0) if copies is None else Lanes(counts, sizes, seed=0, batch_size=BATCH)
        self._part = RankPart(order, -(-order.samples // BATCH), 0, 1)
        self._reader = Reader(catalog, storage=copies)
        self._feed = None if copies is None else BlockFeed(self._part, self._reader, copies, are_whole=False)

    def __call__(self, step: int) -> int:
        if step < 0:
            return 0
        held = () if self._feed is None else self._feed.ready(0, step)
        raws = self._reader.read_many(self._part.visits(0, step).index.tolist(), held)
        return sum(isinstance(raw, RawSample) for raw in raws)


def samples_per_second(catalog: Catalog, in_blocks: bool, workers: int) -> float:
    """Return the rate of reading an epoch, from its first request on, by workers that have started."""
    copies = LocalCopies() if in_blocks else None
    pool: Workers[int, int] = Workers(_Reads(catalog, copies), workers)
    try:
        assert sum(pool.map([-1] * 2 * workers)) == 0
        started = time.perf_counter()
        seen = sum(pool.map(range(SHARDS * PAIRS // BATCH)))
        assert seen == SHARDS * PAIRS
        return seen / (time.perf_counter() - started)
    finally:
        pool.close()
        if copies is not None:
            copies.close()


def main() -> None:
    """Measure both ways of reading, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before each answer")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    record = provenance("python -m experiments.benchmarks.remote")
    lines = [
        "# Samples per second from a slow server",
        "",
        f"`python -m experiments.benchmarks.remote`, {record['date']}. {record['machine']}, load {record['load']} at "
        f"the start. {options.workers} workers, {1000 * options.latency:g} ms before every answer, {SHARDS} shards of "
        f"{PAIRS:,} pairs, batches of {BATCH}. Median of {options.rounds} rounds, which take turns. `requests` and "
        "`bytes` are per sample.",
        "",
        "| reading | samples/s | requests | bytes |",
        "|---|---:|---:|---:|",
    ]
    readings = {"blocks": (True, storage.MAX_GAP), "random": (False, storage.MAX_GAP), "a request each": (False, -1)}
    rates: dict[str, list[float]] = {reading: [] for reading in readings}
    costs: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name, "shards")
        shards.mkdir()
        write_shards(shards, SHARDS, PAIRS)
        with in_a_process(shards, options.latency) as (url, counts):
            catalog = make_catalog(f"{url}/{{00000..{SHARDS - 1:05d}}}.tar", Path(name, "catalog"))
            for _ in range(options.rounds):
                for name_of, (in_blocks, storage.MAX_GAP) in readings.items():
                    counts()
                    rates[name_of].append(samples_per_second(catalog, in_blocks, options.workers))
                    costs[name_of] = counts()
    for reading, found in rates.items():
        requests, sent = (count / (SHARDS * PAIRS) for count in costs[reading])
        lines.append(f"| {reading} | {np.median(found):,.0f} | {requests:.3f} | {sent:,.0f} |")
    ratio = np.median(rates["blocks"]) / np.median(rates["a request each"])
    lines += ["", f"Blocks to a request each: {ratio:.1f} times as many."]
    _RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
