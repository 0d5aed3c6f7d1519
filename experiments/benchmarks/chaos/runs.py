"""A run of all commands in processes that can be broken: shards, catalog, reference features, training."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import experiments.clip.cli.commands
import experiments.clip.cli.train  # noqa: F401
from experiments.clip.data.batch import Batch
from experiments.clip.data.loader import Loader
from experiments.clip.glyphs.dataset import GlyphPair, write_dataset
from experiments.clip.run import main as run
from experiments.clip.training.options import SHIPPED_REFERENCE

PAIRS, SHARD, BATCH, EPOCHS = 300, 60, 48, 4
STAGES = ("data", "catalog", "features", "train")
TRAIN = ("--method", "drrho", "--temperature", "0.1", "--temperature-scheme", "individual", "--rho", "0.1")
TRAIN = (*TRAIN, "--epochs", str(EPOCHS), "--batch-size", str(BATCH), "--warmup", "5", "--ema", "0.9")
TRAIN = (*TRAIN, "--validations", "2", "--log-to", "jsonl", "--log-every", "1", "--workers", "1")
TRAIN = (*TRAIN, "--block-shards", "2", "--model", "glyph-small", "--reference", str(SHIPPED_REFERENCE))
TRAIN = (*TRAIN, "--lr", "2e-3")
OFTEN = "0.002"  # minutes between checkpoints: 0.12 s
PATIENCE = 180.0  # seconds, after which a process counts as hung
STEPS = EPOCHS * -(-PAIRS // BATCH)

Splits = dict[str, list[GlyphPair]]


class Run:
    """A run of all commands in a folder, in a process of its own, or in one for each rank.

    The processes are forked from this one, which has loaded the modules and nothing else, so that a run takes seconds.
    """

    def __init__(
        self, folder: Path, splits: Splits, ranks: int = 1, sabotage: Callable[[], None] | None = None
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stage").unlink(missing_ok=True)
        port = _free_port()
        self.started = time.monotonic()
        self.pids = [self._forked(rank, ranks, port, splits, sabotage) for rank in range(ranks)]
        self.statuses: dict[int, int] = {}

    def _forked(self, rank: int, ranks: int, port: int, splits: Splits, sabotage: Callable[[], None] | None) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.setsid()
            with (self.folder / f"output-{rank}").open("ab", buffering=0) as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            torch.set_num_threads(1)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _note_samples(self.folder / f"samples-{rank}-of-{ranks}")
            if sabotage is not None:
                sabotage()
            status = _all_stages(self.folder, splits, ranks)
        except KeyboardInterrupt:
            status = 130
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def stage(self) -> str:
        """Return the stage that the first process has come to."""
        path = self.folder / "stage"
        return path.read_text() if path.exists() else ""

    def steps(self) -> int:
        """Return the number of lines in the log of the training."""
        path = self.folder / "out" / "log.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for(self, happened: Callable[[], bool]) -> bool:
        """Wait until something has happened; false if the run ended before."""
        while not happened():
            if self.ended():
                return False
            if time.monotonic() - self.started > PATIENCE:
                raise RuntimeError(f"{self.folder} hangs in the stage {self.stage()}")
            time.sleep(0.002)
        return True

    def ended(self) -> bool:
        """Whether all processes are gone."""
        for pid in self.pids:
            if pid not in self.statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) == len(self.pids)

    def finish(self) -> list[int]:
        """Wait for all; return their exit statuses, or minus the signal's number."""
        self.wait_for(self.ended)
        return [self.statuses[pid] for pid in self.pids]

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to the processes and their workers, of one rank or of all."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                continue

    def kill(self) -> list[int]:
        """End all processes as a loss of power does; return the exit statuses."""
        self.signal(signal.SIGKILL)
        return self.finish()

    def said(self, rank: int = 0) -> list[str]:
        """Return the lines of errors."""
        lines = (self.folder / f"output-{rank}").read_text(errors="replace").splitlines()
        return [line for line in lines if line.startswith("run.py: ") or "Traceback" in line]


def _all_stages(folder: Path, splits: Splits, ranks: int) -> int:
    """Do what a user does, command by command; return the status of the first that fails."""
    shards, catalog, features = folder / "data", folder / "catalog", folder / "features"

    def stage(name: str) -> None:
        (folder / "stage").write_text(name)

    if ranks == 1:
        stage("data")
        write_dataset(shards, splits, {"for": "chaos"}, shard_size=SHARD)
        stage("catalog")
        if status := run(["catalog", str(shards / "train" / "*.tar"), "--out", str(catalog), "--workers", "0"]):
            return status
        stage("features")
        words = ["--catalog", str(catalog), "--reference", str(SHIPPED_REFERENCE), "--out", str(features)]
        words += ["--batch-size", "16", "--workers", "0"]
        if status := run(["cache-reference", *words]):
            return status
    stage("train")
    words = ["--catalog", str(catalog), "--reference-features", str(features), "--out", str(folder / "out")]
    return run(["train", *TRAIN, *words, "--checkpoint-minutes", OFTEN, "--exchange-minutes", "0.1"])


def _note_samples(path: Path) -> None:
    """Have this process write down the samples of every batch that training gets."""
    batches = Loader.batches

    def noted(self: Loader, epoch: int, first: int = 0) -> Iterator[Batch]:
        with path.open("a", buffering=1) as file:
            for step, batch in enumerate(batches(self, epoch, first), start=first + epoch * self.steps_per_epoch):
                file.write(f"{step} {batch.index.tolist()}\n")
                yield batch

    Loader.batches = noted


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
