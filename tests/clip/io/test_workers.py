"""Worker processes: results in order, errors and deaths that are reported, signals that are ignored."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments.clip.errors import UserError
from experiments.clip.io.workers import Workers, spare_cores, spread, usual_workers

ROOT = Path(__file__).parents[3]


@pytest.fixture
def start():
    """Workers that end after the test."""
    started = []

    def start(task, count, **options):
        started.append(Workers(task, count, **options))
        return started[-1]

    yield start
    for workers in started:
        workers.close()


def square(key):
    if key < 0:
        raise UserError(f"{key} is negative")
    if key == 0:
        raise ZeroDivisionError("a bug")
    if key == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return key**2, os.getpid()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_results_come_in_the_order_of_the_keys(start, count):
    workers = start(square, count)
    state = torch.random.get_rng_state()
    for keys in (range(1, 10), range(9, 0, -1), []):
        results = list(workers.map(keys))
        assert [value for value, _ in results] == [key**2 for key in keys]
        assert len({process for _, process in results}) <= max(1, count)
        assert (os.getpid() in {process for _, process in results}) == (count == 0 and len(keys) > 0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("keys", [[], [3], [5, 2, 9, 1]])
def test_work_is_spread_over_the_cores_and_comes_in_order(keys):
    found = list(spread(square, keys))
    assert [value for value, _ in found] == [key**2 for key in keys]
    cores = min(len(keys), spare_cores() + 1)
    assert len({process for _, process in found}) <= max(1, cores)
    assert (os.getpid() in {process for _, process in found}) == (cores == 1)
    with pytest.raises(UserError, match=r"^-1 is negative$"):
        list(spread(square, [1, -1]))


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"), [(1, None, 0), (2, None, 1), (8, "1", 7), (96, "8", 11), (128, "4", 16), (4, "8", 0)]
)
def test_ranks_of_a_machine_share_its_cores(cores, ranks, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    if ranks is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert usual_workers() == workers


@pytest.mark.parametrize("count", [0, 1])
def test_user_errors_come_as_one_line_and_others_as_they_are(start, count):
    workers = start(square, count)
    with pytest.raises(UserError, match=r"^-1 is negative$"):
        list(workers.map([1, -1]))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(workers.map([1, 0]))


def test_a_new_iteration_ends_the_one_before(start):
    workers = start(square, 0)
    first = workers.map([1, 2])
    assert next(first)[0] == 1
    assert [value for value, _ in workers.map([3])] == [9]
    with pytest.raises(RuntimeError, match="another iteration"):
        next(first)


@pytest.mark.slow
def test_a_dead_worker_is_reported(start):
    with pytest.raises(UserError, match=r"a data worker died \(DataLoader worker \(pid.*\): look for a lack of memory"):
        list(start(square, 2).map([1, 2, 13, 4]))


@pytest.mark.slow
def test_a_worker_that_dies_between_results_is_reported_by_the_next(start):
    workers = start(square, 1)
    results = workers.map(range(1, 10))
    next(results)
    [worker] = workers._loader._iterator._workers
    # Any other DataLoader of this process leaves torch's handler, which raises in the middle of whatever runs.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(10)
        with pytest.raises(UserError, match="a data worker died"):
            list(results)
    finally:
        signal.signal(signal.SIGCHLD, before)


SIGNALLED = """
import os, signal, time
from experiments.clip.io.workers import Workers
workers = Workers(abs, 2)
results = workers.map(range(8))
next(results), next(results)  # one of each worker, which then has its handlers
for worker in workers._loader._iterator._workers:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker.pid, number)
time.sleep(0.2)
print(len(list(results)))
next(workers.map([1]))
"""


@pytest.mark.slow
def test_signals_to_the_whole_job_leave_workers_alive():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SIGNALLED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("6\n", "", 0)
    assert time.monotonic() - started < 30
