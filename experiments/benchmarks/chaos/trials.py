"""Break small trainings at random moments, resume them, and compare their ends bit by bit with one left alone.

``python experiments/benchmarks/chaos.py --kills 50 --faults 20 --seed 0`` prints a line per trial and writes
results/chaos.md. Every trial is the program itself: shards are written, counted (`catalog`), the reference's features
are computed (`cache-reference`) and a model is trained (`train`), in processes forked from this one, which has loaded
the modules and nothing else, so that a trial takes seconds.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import experiments.clip.cli.commands
import experiments.clip.cli.train  # noqa: F401
from experiments.benchmarks.measure import markdown, provenance
from experiments.clip.data.batch import Batch
from experiments.clip.data.loader import Loader
from experiments.clip.errors import UserError
from experiments.clip.glyphs.dataset import GlyphPair, write_dataset
from experiments.clip.glyphs.drawing import glyph_splits
from experiments.clip.io import files
from experiments.clip.run import main as run
from experiments.clip.training.checkpoint import Checkpoint, latest_checkpoint, step_folders, step_number

RESULTS = Path(__file__).parent / "results" / "chaos.md"
PAIRS, SHARD = 300, 60
PART = "part-0-of-1.safetensors"
STAGES = ("data", "catalog", "features", "train")
TRAIN = ("--method", "drrho", "--temperature", "0.1", "--temperature-scheme", "individual", "--rho", "0.1")
TRAIN = (*TRAIN, "--epochs", "4", "--batch-size", "48", "--warmup", "5", "--ema", "0.9", "--validations", "2")
TRAIN = (*TRAIN, "--logs", "jsonl", "--log-every", "1", "--workers", "1", "--block-shards", "2")
OFTEN = "0.002"  # minutes between checkpoints: 0.12 s
PATIENCE = 180.0  # seconds, after which a process counts as hung
STEPS = 4 * -(-PAIRS // 48)

Splits = dict[str, list[GlyphPair]]


@dataclass(frozen=True)
class Row:
    """What became of the trials of one kind."""

    what: str
    trials: int
    ended_in: str
    identical_weights_and_state: str
    identical_samples: str
    last_checkpoint_loads: str


# --- one run --------------------------------------------------------------------------------------------------


class Run:
    """A run of all commands in a folder, in a process of its own, or in one for each rank."""

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
            _note_samples(self.folder / f"samples-{rank}")
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

    def wait_for(self, happened: Callable[[], bool]) -> bool:
        """Wait until something has happened; false if the run ended before."""
        while not happened():
            if self.ended():
                return False
            if time.monotonic() - self.started > PATIENCE:
                raise RuntimeError(f"{self.folder} hangs in the stage {self.stage()}")
            time.sleep(0.0005)
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

    def said(self, rank: int = 0) -> list[str]:
        """Return the lines of errors."""
        lines = (self.folder / f"output-{rank}").read_text(errors="replace").splitlines()
        return [line for line in lines if line.startswith("run.py: ") or "Traceback" in line]


def _all_stages(folder: Path, splits: Splits, ranks: int) -> int:
    """Do what a user does, command by command; return the status of the first that fails."""
    shards, catalog, features = folder / "data", folder / "catalog", folder / "features"
    leads = ranks == 1

    def stage(name: str) -> None:
        (folder / "stage").write_text(name)

    if leads:
        stage("data")
        write_dataset(shards, splits, {"for": "chaos"}, shard_size=SHARD)
        stage("catalog")
        if status := run(["catalog", str(shards / "train" / "*.tar"), "--out", str(catalog), "--workers", "0"]):
            return status
        stage("features")
        words = ["--catalog", str(catalog), "--out", str(features), "--batch-size", "16"]
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


# --- comparing ------------------------------------------------------------------------------------------------


def end_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors that a finished run leaves: exports, and the last checkpoint."""
    last = latest_checkpoint(folder / "out" / "checkpoints")
    assert last is not None
    files = [folder / "out" / name / "open_clip_model.safetensors" for name in ("model", "model-ema")]
    return {
        f"{path.name}/{k}": v
        for path in (*files, *sorted(last.glob("*.safetensors")))
        for k, v in load_file(path).items()
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether the ends agree in every bit."""
    return left.keys() == right.keys() and all(
        value.dtype == right[key].dtype and value.numpy().tobytes() == right[key].numpy().tobytes()
        for key, value in left.items()
    )


def samples_of(folder: Path, rank: int = 0) -> dict[str, set[str]]:
    """Return the samples of each step, as often as they were read differently."""
    seen: dict[str, set[str]] = {}
    for line in (folder / f"samples-{rank}").read_text().splitlines():
        step, space, samples = line.partition(" ")
        if space and samples.endswith("]"):  # not the half of a line
            seen.setdefault(step, set()).add(samples)
    return seen


def loads(folder: Path) -> bool:
    """Whether all of the last checkpoint can be read, if there is one."""
    last = latest_checkpoint(folder / "out" / "checkpoints")
    try:
        return last is None or bool(Checkpoint(last).full_tensors(""))
    except UserError:
        return False


@dataclass
class Verdict:
    """What became of one trial."""

    ended_in: str
    weights: bool
    samples: bool
    checkpoint: bool


class Trials:
    """Trials against a run that was left alone.

    Parameters
    ----------
    scratch : Path
        Where runs have their folders.
    seed : int
        Seed of the random moments.
    """

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch, self.random = scratch, random.Random(seed)
        records = {name: found[:PAIRS] for name, found in glyph_splits("swapped", 32, ("stixgeneral",)).items()}
        self.splits = {"train": records["train"]}
        self.number = 0
        self.alone: dict[int, tuple[dict[str, torch.Tensor], list[dict[str, set[str]]]]] = {}
        self.seconds: dict[str, float] = {}
        for ranks in (1, 2):
            self.alone[ranks] = self._left_alone(ranks)

    def _left_alone(self, ranks: int) -> tuple[dict[str, torch.Tensor], list[dict[str, set[str]]]]:
        folder = self.folder(ranks)
        begun = Run(folder, self.splits, ranks)
        starts: dict[str, float] = {}
        if ranks == 1:
            for name in STAGES:
                begun.wait_for(lambda name=name: begun.stage() == name)
                starts[name] = time.monotonic()
        statuses = begun.finish()
        if ranks == 1:
            times = [*starts.values(), time.monotonic()]
            self.seconds = {name: times[k + 1] - times[k] for k, name in enumerate(STAGES)}
        if any(statuses):
            raise RuntimeError(f"the run that was left alone ended with {statuses}: {begun.said()}")
        return end_of(folder), [samples_of(folder, rank) for rank in range(ranks)]

    def folder(self, ranks: int) -> Path:
        """Return a new folder; for several ranks, with the data and features of the run of one."""
        self.number += 1
        folder = self.scratch / f"{self.number:03d}"
        if ranks > 1:
            folder.mkdir()
            for name in ("data", "catalog", "features"):
                shutil.copytree(self.scratch / "001" / name, folder / name, copy_function=os.link)
        return folder

    def verdict(self, folder: Path, ended_in: str, ranks: int = 1) -> Verdict:
        """Resume a broken run, and compare its end."""
        good = loads(folder)
        statuses = Run(folder, self.splits, ranks).finish()
        if any(statuses):
            return Verdict(f"{ended_in}; resuming ended with {statuses}", False, False, good)
        return self.compared(folder, ended_in, ranks, good)

    def compared(self, folder: Path, ended_in: str, ranks: int, good: bool) -> Verdict:
        """Compare a run that has ended."""
        end, samples = self.alone[ranks]
        is_same = same(end, end_of(folder))
        are_same = all(samples_of(folder, rank) == samples[rank] for rank in range(ranks))
        if is_same and are_same:
            shutil.rmtree(folder) if folder.name != "001" else None
        return Verdict(ended_in, is_same, are_same, good)

    # --- kill -9 ----------------------------------------------------------------------------------------------

    def killed(self, stage: str) -> Verdict:
        """Kill all processes of a run at once, at a random moment of a stage, or of the writing of a checkpoint."""
        while True:
            begun = Run(self.folder(1), self.splits)
            self._wait_for_a_moment(begun, stage)
            begun.signal(signal.SIGKILL)
            if begun.finish() == [-signal.SIGKILL]:
                return self.verdict(begun.folder, "killed")
            shutil.rmtree(begun.folder)  # it had ended before: another moment is drawn

    def _wait_for_a_moment(self, begun: Run, stage: str) -> None:
        out = begun.folder / "out"
        if stage not in ("train", "checkpoint"):
            begun.wait_for(lambda: begun.stage() == stage)
            time.sleep(self.random.uniform(0, self.seconds[stage]))
            return
        step = self.random.randrange(STEPS - 2)
        begun.wait_for(lambda: (out / "log.jsonl").exists() and _lines(out / "log.jsonl") >= step)
        if stage == "checkpoint":
            begun.wait_for(lambda: any((out / "checkpoints").glob(".partial-*")))
        time.sleep(self.random.uniform(0, 0.02 if stage == "checkpoint" else 0.1))

    # --- faults -----------------------------------------------------------------------------------------------

    def in_training(self, ranks: int = 1, sabotage: Callable[[], None] | None = None) -> Run:
        """Return a run that is at a random step of its training, after its first checkpoint."""
        folder = self.folder(ranks)
        begun = Run(folder, self.splits, ranks, sabotage)
        step, out = self.random.randrange(3, STEPS // 2), folder / "out"
        begun.wait_for(
            lambda: (
                (out / "log.jsonl").exists()
                and _lines(out / "log.jsonl") >= step
                and latest_checkpoint(out / "checkpoints") is not None
            )
        )
        return begun

    def told(self, begun: Run, status: int, message: str, rank: int = 0, ranks: int = 1) -> Verdict:
        """Expect a broken run to end with this status and message, then resume it."""
        statuses = begun.finish()
        said = [line for line in begun.said(rank) if message in line]
        is_clear = statuses[rank] == status and len(said) == 1 and not any("Traceback" in x for x in begun.said(rank))
        ended = f"status {status}, one line" if is_clear else f"NOT CLEAR: {statuses} {begun.said(rank)[-1:]}"
        return self.verdict(begun.folder, ended, ranks)

    def signalled(self, number: int, status: int) -> Verdict:
        """A scheduler's signal, or Ctrl-C, to all processes."""
        begun = self.in_training()
        begun.signal(number)
        return self.told(begun, status, "stopped after step")

    def full_disk(self) -> Verdict:
        """No file may grow beyond a size, from a random step on."""
        begun = self.in_training()
        resource.prlimit(begun.pids[0], resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        return self.told(begun, 2, "cannot write")

    def lost_folder(self) -> Verdict:
        """The folder of checkpoints cannot be written into: a file is in its place."""
        begun = self.in_training()
        folder = begun.folder / "out" / "checkpoints"
        begun.signal(signal.SIGSTOP)
        folder.rename(folder.with_name("aside"))
        folder.write_text("")
        begun.signal(signal.SIGCONT)
        begun.wait_for(begun.ended)
        folder.unlink()
        folder.with_name("aside").rename(folder)
        return self.told(begun, 2, "cannot write")

    def dead_worker(self) -> Verdict:
        """A data worker is killed."""
        begun = self.in_training()
        (parent,) = begun.pids
        children = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split()
        os.kill(int(self.random.choice(children)), signal.SIGKILL)
        return self.told(begun, 2, "a data worker died")

    def failing_reads(self, failures: int) -> Verdict:
        """Every read of data fails with EIO, so many times; after all attempts the run stops."""
        begun = self.in_training(sabotage=lambda: _failing_reads(failures))
        if failures > 10**6:
            return self.told(begun, 2, "cannot read")
        (status,) = begun.finish()
        return self.compared(begun.folder, "went on" if status == 0 else f"NOT CLEAR: {begun.said()}", 1, True)

    def failing_writes(self, failures: int) -> Verdict:
        """Every write that is to be kept fails with EIO, so many times; after all attempts the run stops."""
        begun = self.in_training(sabotage=lambda: _failing_writes(failures))
        if failures > 10**6:
            return self.told(begun, 2, "cannot write")
        (status,) = begun.finish()
        return self.compared(begun.folder, "went on" if status == 0 else f"NOT CLEAR: {begun.said()}", 1, True)

    def damaged_checkpoint(self, damage: Callable[[Path, Path], object]) -> Verdict:
        """The last checkpoint of two is not as it was written; the run resumes from the one before, and says so."""
        begun = self.in_training()
        folder = begun.folder / "out" / "checkpoints"
        begun.wait_for(lambda: len(step_folders(folder)) > 1)
        begun.signal(signal.SIGKILL)
        begun.finish()
        before, last = sorted(step_folders(folder), key=step_number)[-2:]
        damage(before / PART, last / PART)
        (status,) = Run(begun.folder, self.splits).finish()
        is_clear = status == 0 and (folder / f"damaged-{last.name}").is_dir()
        return self.compared(begun.folder, "set aside, went on" if is_clear else f"NOT CLEAR: {status}", 1, True)

    def cut(self, before: Path, last: Path) -> None:
        """Cut a file, as a file system that loses data does."""
        os.truncate(last, self.random.randrange(last.stat().st_size))

    def flipped(self, before: Path, last: Path) -> None:
        """Change one bit of a file."""
        with last.open("r+b") as file:
            place = self.random.randrange(last.stat().st_size)
            (byte,) = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte ^ 1 << self.random.randrange(8)]), place)

    def lost_rank(self, number: int) -> Verdict:
        """One of two ranks is killed, or stopped so that it hangs."""
        begun = self.in_training(ranks=2)
        begun.signal(number, rank=1)
        begun.wait_for(lambda: (begun.ended(), begun.pids[0] in begun.statuses)[1])
        begun.signal(signal.SIGKILL, rank=1)
        return self.told(begun, 2, "rank 0 lost rank 1", ranks=2)


def _failing_reads(failures: int) -> None:
    """Have reads of data fail, after the first 200 of a process, with waits that suit a test."""
    read, calls, left = os.pread, [0], [failures]

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        calls[0] += 1
        if calls[0] > 200 and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, size, offset)

    os.pread = failing
    files.WAITS = (0.01,) * len(files.WAITS)


def _failing_writes(failures: int) -> None:
    """Have writes of checkpoints fail, after some that succeed, as on a file system that is away for a while."""
    keep, calls, left = os.fsync, [0], [failures]

    def failing(descriptor: int) -> None:
        calls[0] += "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}")
        if calls[0] > 30 and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        keep(descriptor)

    os.fsync = failing
    files.WAITS = (0.01,) * len(files.WAITS)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


# --- the table ------------------------------------------------------------------------------------------------


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


def main(arguments: Sequence[str]) -> int:
    """Run the trials; return 0 if nothing was lost in any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="trials with kill -9")
    parser.add_argument("--faults", type=int, default=20, help="trials with other faults")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table goes")
    options = parser.parse_args(arguments)
    record = provenance(shlex.join(["python", "experiments/benchmarks/chaos.py", *arguments]))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        trials = Trials(Path(scratch), options.seed)
        again = trials.folder(1)
        Run(again, trials.splits).finish()
        rows.append(row("the same seed again, unbroken", [trials.compared(again, "the end", 1, True)]))
        kinds: dict[str, Callable[[], Verdict]] = {
            "kill -9 in training": lambda: trials.killed("train"),
            "kill -9 while a checkpoint is written": lambda: trials.killed("checkpoint"),
            "kill -9 while features are cached": lambda: trials.killed("features"),
            "kill -9 in preparing and counting data": lambda: trials.killed(trials.random.choice(["data", "catalog"])),
        }
        faults: dict[str, Callable[[], Verdict]] = {
            "full disk": trials.full_disk,
            "folder that cannot be written": trials.lost_folder,
            "data worker killed": trials.dead_worker,
            "rank killed": lambda: trials.lost_rank(signal.SIGKILL),
            "rank that hangs": lambda: trials.lost_rank(signal.SIGSTOP),
            "reads that fail for a while": lambda: trials.failing_reads(4),
            "reads that fail for good": lambda: trials.failing_reads(10**9),
            "writes that fail for a while": lambda: trials.failing_writes(4),
            "writes that fail for good": lambda: trials.failing_writes(10**9),
            "last checkpoint cut off": lambda: trials.damaged_checkpoint(trials.cut),
            "a bit of the last checkpoint changed": lambda: trials.damaged_checkpoint(trials.flipped),
            "last checkpoint of two steps": lambda: trials.damaged_checkpoint(shutil.copy),
            "SIGTERM": lambda: trials.signalled(signal.SIGTERM, os.EX_TEMPFAIL),
            "SIGUSR1": lambda: trials.signalled(signal.SIGUSR1, os.EX_TEMPFAIL),
            "SIGINT": lambda: trials.signalled(signal.SIGINT, 130),
        }
        for wanted, group in ((options.kills, kinds), (options.faults, faults)):
            found: dict[str, list[Verdict]] = {name: [] for name in group}
            for number in range(wanted):
                name = list(group)[number % len(group)]
                found[name].append(group[name]())
                print(name, found[name][-1], flush=True)
            rows += [row(name, verdicts) for name, verdicts in found.items() if verdicts]
    text = (
        f"# Broken runs\n\n`{record['command']}`, {record['date']}. {record['machine']}, torch {torch.__version__}. "
        f"Each trial trains glyph-small on {PAIRS} pairs for {STEPS} steps, steered, with individual temperatures, a "
        "moving average of the weights, a data worker and a checkpoint every 0.12 s; it is broken at a moment drawn "
        "from the seed, and the same command is given again. Compared with a run that was left alone: every tensor of "
        "the exports and of the last checkpoint (weights, optimizer, running estimates, temperatures, averages), bit "
        "by bit, and the samples of every step. Kills and faults hit all processes of a run unless said.\n\n"
        f"{markdown(rows)}\n"
    )
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    lost = [r for r in rows if "NOT" in r.ended_in or f"{r.trials} of" not in r.identical_weights_and_state]
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
