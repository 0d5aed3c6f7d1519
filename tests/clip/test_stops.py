"""Runs that are asked to stop while something hangs, twice, or before they have begun: status 75 and a checkpoint."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.clip.run import main
from experiments.clip.training.checkpoint import latest_checkpoint, step_number
from tests.clip.launched import PROGRAM, Launched
from tests.clip.tars import image_bytes, write_tar
from tests.clip.test_ranks import launch

pytestmark = pytest.mark.slow  # real processes
OPTIONS = ("--method", "openclip", "--model", "glyph-micro", "--batch-size", "16", "--epochs", "4000")
OPTIONS = (*OPTIONS, "--validations", "1", "--log-every", "1", "--log-to", "jsonl", "--warmup", "5", "--workers", "0")
STOPPED = os.EX_TEMPFAIL


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "catalog"
    assert main(["catalog", "synthetic:96:32", "--out", str(folder), "--workers", "0"]) == 0
    return folder


@pytest.fixture(scope="module")
def alone(catalog, tmp_path_factory):
    """Return the weights of a run that nothing stops."""
    out = tmp_path_factory.mktemp("alone")
    assert main(["train", *OPTIONS, "--epochs", "3", "--catalog", str(catalog), "--out", str(out)]) == 0
    return weights(out)


def weights(out):
    return load_file(out / "model" / "open_clip_model.safetensors")


def steps(out):
    path = out / "log.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def until(condition, processes, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(each.poll() is None for each in processes)
        time.sleep(0.01)


def worker_of(process):
    """Return the process that reads data for a run, wherever it stands below it."""
    parents, workers = {}, []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, (name, _, rest) = int(path.parent.name), path.read_text().partition("(")[2].rpartition(")")
            parents[pid] = int(rest.split()[1])
            workers += [pid] * (name == "pt_data_worker")
    for worker in workers:
        above = worker
        while above in parents:
            above = parents[above]
            if above == process.pid:
                return worker
    raise AssertionError(f"none of {workers} is of {process.pid}")


def stalled(out):
    """Return after how many steps a run goes no further, once what was read ahead is used up."""
    at, since = steps(out), time.monotonic()
    while time.monotonic() - since < 1.0:
        time.sleep(0.05)
        if steps(out) != at:
            at, since = steps(out), time.monotonic()
    return at


def last_step(processes, out):
    """Return the last step of a run that ends with its checkpoint, once its processes have said so."""
    statuses, errors = ends_in_time(processes)
    last = step_number(latest_checkpoint(out / "checkpoints"))
    assert statuses == [STOPPED] * len(processes), errors
    assert last == steps(out) and all(f"stopped after step {last} of " in error for error in errors), errors
    return last


def ends_in_time(processes, seconds=20):
    """Wait for the ends; return the statuses, and what was said."""
    started = time.monotonic()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert time.monotonic() - started < seconds
    assert not any("Traceback" in error for error in errors), errors
    return [process.returncode for process in processes], errors


def test_a_run_whose_worker_is_stopped_ends_with_its_last_step_and_resumes(catalog, alone, tmp_path):
    words = ("train", *OPTIONS, "--epochs", "3", "--catalog", catalog, "--out", tmp_path, "--workers", "1")
    process = Launched(*words)
    until(lambda: steps(tmp_path) >= 3, [process])
    worker = worker_of(process)
    os.kill(worker, signal.SIGSTOP)
    stalled(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert 3 <= last_step([process], tmp_path) < 18
    assert not os.path.exists(f"/proc/{worker}")
    assert main([str(word) for word in words]) == 0
    assert all(torch.equal(value, alone[key]) for key, value in weights(tmp_path).items())


@pytest.mark.parametrize("asked", [(0, 1), (0,), (1,)])
def test_ranks_end_with_their_last_step_where_the_worker_of_one_is_stopped(asked, catalog, tmp_path):
    """Also where the signal reaches one rank alone: the one that waits for its worker, or the one that waits for it."""
    words = ("train", *OPTIONS, "--catalog", catalog, "--out", tmp_path, "--workers", "1")
    ranks = launch(2, *words)
    until(lambda: steps(tmp_path) >= 3, ranks)
    os.kill(worker_of(ranks[1]), signal.SIGSTOP)
    stalled(tmp_path)
    for rank in asked:
        ranks[rank].send_signal(signal.SIGTERM)
    assert last_step(ranks, tmp_path) >= 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_whose_storage_hangs_ends_with_its_last_step(workers, tmp_path):
    """Opening a pipe waits for a writer, as a file of a network file system waits for its server."""
    shards = [tmp_path / f"{k}.tar" for k in range(3)]
    for path in shards:
        members = [(f"{k}.png", image_bytes(k, (32, 32))) for k in range(160)]
        write_tar(path, sorted([*members, *((f"{k}.txt", f"letter {k}".encode()) for k in range(160))]))
    assert main(["catalog", str(tmp_path / "{0..2}.tar"), "--out", str(tmp_path / "catalog"), "--workers", "0"]) == 0
    words = ("train", *OPTIONS, "--catalog", tmp_path / "catalog", "--block-shards", "1", "--out", tmp_path / "out")
    process = Launched(*words, "--workers", workers)
    until(lambda: steps(tmp_path / "out") >= 1, [process])
    for path in shards:
        path.unlink()
        os.mkfifo(path)
    stalled(tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    assert 1 <= last_step([process], tmp_path / "out") < 30


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGTERM)])
@pytest.mark.parametrize("count, pause", [(1, 0.0), (2, 0.05)])
def test_a_scheduler_may_repeat_its_signal(numbers, count, pause, catalog, tmp_path):
    ranks = launch(count, "train", *OPTIONS, "--catalog", catalog, "--out", tmp_path)
    until(lambda: steps(tmp_path) >= 3, ranks)
    for number in numbers:
        for rank in ranks:
            rank.send_signal(number)
        time.sleep(pause)
    assert last_step(ranks, tmp_path) >= 3


def handles(process, number):
    """Whether a process has a handler of its own for a signal."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("seconds", [0, 2])
def test_a_signal_before_the_first_step_asks_to_try_again(number, seconds, catalog, tmp_path):
    """From the first lines of the program on, while it imports, while the model is made."""
    command = [sys.executable, str(PROGRAM), "train", *OPTIONS, "--catalog", str(catalog), "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: handles(process, signal.SIGUSR1), [process])
    time.sleep(seconds)
    process.send_signal(number)
    (status,), (error,) = ends_in_time([process])
    assert status == (130 if number == signal.SIGINT else STOPPED)
    assert error == "" or error.startswith((f"run.py: stopped by {number.name}; what was", "run.py: stopped after"))


def test_ranks_that_are_asked_to_stop_while_they_meet_try_again(catalog, tmp_path):
    ranks = launch(3, "train", *OPTIONS, "--catalog", catalog, "--out", tmp_path)
    ranks[2].kill()
    ranks[2].communicate()
    for rank in ranks[:2]:
        until(lambda rank=rank: handles(rank, signal.SIGUSR1), [rank])
        rank.send_signal(signal.SIGTERM)
    assert ends_in_time(ranks[:2])[0] == [STOPPED, STOPPED]
