"""Computing reference losses: what a killed run has done is kept, and what does not fit is refused by sample."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from drrho.integrations import ReferenceLosses

N = 120
ABOUT = {"reference": "linear"}


class Reference:
    """Counts the samples that it is asked for."""

    def __init__(self, fails_at=None):
        self.seen, self.fails_at = [], -1 if fails_at is None else fails_at

    def __call__(self, index):
        assert not torch.is_grad_enabled()
        if self.fails_at in index:
            raise KeyboardInterrupt
        self.seen += index.tolist()
        return index.float() / 4


def batches(size, order=None):
    order = torch.arange(N) if order is None else order
    return ((index, index) for index in order.split(size))


def compute(folder, reference, size=16, order=None, rows=N, about=ABOUT, **more):
    return ReferenceLosses.compute(folder, reference, batches(size, order), rows, about=about, **more)


@pytest.mark.parametrize("size, again", [(16, 16), (16, 10), (7, 40)])
def test_an_interrupted_run_goes_on_with_batches_of_any_size_and_order(tmp_path, size, again):
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, Reference(fails_at=50), size)
    rest = Reference()
    losses = compute(tmp_path, rest, again, torch.arange(N).flip(0))
    assert losses.lookup(range(N)).equal(torch.arange(N) / 4)
    missing = set(range(50 // size * size, N))
    assert missing <= set(rest.seen) and len(rest.seen) < len(missing) + again
    unused = Reference()
    compute(tmp_path, unused)
    assert unused.seen == []


KILLED = """
import sys, time, torch
from drrho.integrations import ReferenceLosses
def reference(index):
    print(int(index[0]), flush=True)
    time.sleep(0.02)
    return torch.stack([index * 2.0, index * 2.0 + 1]).T.reshape(-1)
batches = ((index, index) for index in torch.arange(200).split(4))
ReferenceLosses.compute(sys.argv[1], reference, batches, [2] * 200, about={})
"""


@pytest.mark.slow  # a process that imports torch
def test_a_killed_process_loses_nothing(tmp_path):
    with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        while process.stdout.readline() != "40\n":
            pass
        os.kill(process.pid, signal.SIGKILL)
    seen = []

    def reference(index):
        seen.append(int(index[0]))
        return torch.stack([index * 2.0, index * 2.0 + 1]).T.reshape(-1)

    again = ((index, index) for index in torch.arange(200).split(4))
    losses = ReferenceLosses.compute(tmp_path, reference, again, [2] * 200, about={})
    assert seen[0] >= 40 and seen[-1] == 196
    assert losses.lookup(range(200)).equal(torch.arange(400.0))


def test_two_processes_do_not_compute_in_one_folder(tmp_path):
    def reference(index):
        compute(tmp_path, Reference())
        return index.float()

    with pytest.raises(OSError, match="another process is computing the losses of"):
        compute(tmp_path, reference)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_names_the_sample(tmp_path, wrong):
    def reference(index):
        return torch.where(index == 37, wrong, index.float())

    with pytest.raises(ValueError, match=f"reference losses must be finite, got {wrong} for sample 37"):
        compute(tmp_path, reference)
    with pytest.raises(ValueError, match="no complete losses"):
        ReferenceLosses(tmp_path)


def test_of_a_sequence_too(tmp_path):
    def reference(index):
        return torch.tensor([1.0, 2.0, np.nan, 4.0])

    with pytest.raises(ValueError, match="got nan for sample 1"):
        ReferenceLosses.compute(tmp_path, reference, [([0, 1], [0, 1])], [2, 2], about={})


def test_samples_in_no_batch_are_named_and_the_others_kept(tmp_path):
    with pytest.raises(ValueError, match="every sample of the 120 rows, but sample 100 was in none"):
        compute(tmp_path, Reference(), order=torch.arange(100))
    rest = Reference()
    compute(tmp_path, rest, 10)
    assert rest.seen == list(range(100, N))


@pytest.mark.parametrize(
    "losses, message",
    [
        (lambda index: index.float()[1:], "must return 16 losses for the 16 samples from number 0 on, got 15"),
        (lambda index: index.float()[:, None], r"floating losses \[b\].* got \[16, 1\]"),
        (lambda index: index, "floating losses .* torch.int64"),
        (lambda index: index.tolist(), "floating losses .* got list"),
    ],
)
def test_losses_that_do_not_fit_the_batch_are_refused(tmp_path, losses, message):
    with pytest.raises(ValueError, match=message):
        compute(tmp_path, losses)


@pytest.mark.parametrize("rows", [0, -1, [], [1.5], [2, -1], [[1]]])
def test_rows_are_a_count_or_lengths(tmp_path, rows):
    with pytest.raises(ValueError, match="rows must be a number of samples >= 1, or the lengths"):
        compute(tmp_path, Reference(), rows=rows)


def test_an_index_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"index must lie in \[0, rows = 100\), got 96 to 111"):
        compute(tmp_path, Reference(), rows=100)


def test_a_folder_is_about_one_thing_started_or_done(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, Reference(fails_at=0))
    with pytest.raises(ValueError, match="'reference' is 'linear' there and 'deep' here"):
        compute(tmp_path, Reference(), about={"reference": "deep"})
    with pytest.raises(ValueError, match="'rows' is 120 there and 130 here"):
        compute(tmp_path, Reference(), rows=130)
    compute(tmp_path, Reference())
    with pytest.raises(ValueError, match="'reference' is 'linear' there and 'deep' here"):
        compute(tmp_path, Reference(), about={"reference": "deep"})
    with pytest.raises(ValueError, match=r"rows must be the 120 that .* has, got 130"):
        compute(tmp_path, Reference(), rows=130)


def test_about_is_json(tmp_path):
    with pytest.raises(ValueError, match="about must be JSON"):
        compute(tmp_path, Reference(), about={"model": torch.nn.Linear})


@pytest.mark.parametrize("keys", [[[1, 2], [1, 2]], [[1, 3], [1, 2]], [[2, 0], [1, 5]]])
def test_keys_ascend(tmp_path, keys):
    with pytest.raises(ValueError, match="keys must ascend, but key 1 does not"):
        ReferenceLosses.compute(tmp_path, None, [], 2, about={}, keys=np.array(keys, np.uint64))


FULL = """
import resource, sys, torch
from drrho.integrations import ReferenceLosses
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    ReferenceLosses.compute(sys.argv[1], None, [], 5000, about={})
except OSError as error:
    print(error)
"""


@pytest.mark.slow  # a process that imports torch
def test_a_full_disk_is_noticed_before_the_reference_runs(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True)
    assert "cannot write 20000 bytes to" in done.stdout and "losses.f32 (File too large): free space" in done.stdout
