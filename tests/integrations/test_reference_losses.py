"""Reference losses in a folder: what is looked up is what was computed, in this process and in workers."""

import json
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from drrho.integrations import ReferenceLosses

N = 2500
LENGTHS = np.arange(40) % 7  # some of them empty
ABOUT = {"reference": "linear", "data": "rows 0 to 2499", "dtype": "float32"}


def loss_of(index):
    return torch.as_tensor(index).float().sqrt()


def scalars(folder, **more):
    batches = ((index, index) for index in torch.arange(N).split(300))
    return ReferenceLosses.compute(folder, loss_of, batches, N, about=ABOUT, **more)


def tokens_of(row):
    return row + torch.arange(LENGTHS[row]) / 8


def ragged(folder, order=range(40), **more):
    batches = (([row], row) for row in order)
    return ReferenceLosses.compute(folder, tokens_of, batches, LENGTHS, about=ABOUT, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scalars(tmp_path_factory.mktemp("scalars")).folder


def test_losses_are_looked_up_by_number(folder):
    losses = ReferenceLosses(folder, ABOUT)
    index = torch.tensor([2499, 0, 7, 7])
    assert len(losses) == N and not losses.is_ragged and not losses.is_keyed
    assert losses.lookup(index).equal(loss_of(index)) and losses.lookup(index).dtype == torch.float32
    assert losses.lookup([3]).equal(loss_of([3])) and losses.lookup([]).shape == (0,)
    assert losses.lengths(index).tolist() == [1, 1, 1, 1]


def test_losses_of_sequences_come_one_after_another(tmp_path):
    losses = ragged(tmp_path)
    assert losses.is_ragged and losses.lengths([0, 1, 13]).tolist() == [0, 1, 6]
    assert losses.lookup([13, 0, 2]).equal(torch.cat([tokens_of(13), tokens_of(2)]))
    assert losses.lookup([0]).shape == (0,)


def test_samples_are_found_by_key(tmp_path):
    keys = np.array([[5, 1], [5, 2], [5, 9], [8, 0]], dtype=np.uint64)
    batches = [([0, 1, 2, 3], None)]
    losses = ReferenceLosses.compute(tmp_path, lambda _: torch.arange(4.0), batches, 4, about={}, keys=keys)
    asked = np.array([[5, 9], [5, 3], [8, 0], [9, 9], [0, 0], [5, 1]], dtype=np.uint64)
    assert losses.find(asked).tolist() == [2, -1, 3, -1, -1, 0]
    assert losses.find(keys[:0]).tolist() == []


def test_losses_without_keys_say_so(folder):
    with pytest.raises(ValueError, match="finds samples by number, not by content"):
        ReferenceLosses(folder).find(np.zeros((1, 2), np.uint64))


class Samples(Dataset):
    def __init__(self, losses):
        self.losses = losses

    def __len__(self):
        return N

    def __getitem__(self, index):
        return index, self.losses.lookup([index])[0], multiprocessing.current_process().pid


@pytest.mark.slow  # workers import torch
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_open_the_folder_anew(folder, context):
    import os

    data = torch.utils.data.Subset(Samples(ReferenceLosses(folder)), range(0, N, 100))
    for index, losses, worker in DataLoader(data, 5, num_workers=2, multiprocessing_context=context):
        assert losses.equal(loss_of(index)) and os.getpid() not in worker


def test_a_copy_is_of_what_was_opened_or_an_error(tmp_path):
    losses = scalars(tmp_path)
    copy = pickle.dumps(losses)
    assert len(copy) < 500 and pickle.loads(copy).lookup([9]).item() == 3
    header = json.loads((tmp_path / "reference-losses.json").read_text())
    header["about"]["dtype"] = "bfloat16"
    (tmp_path / "reference-losses.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="has been written anew since it was opened"):
        pickle.loads(copy)


def test_another_reference_is_refused_by_key_and_both_values(folder):
    with pytest.raises(ValueError, match="about something else: 'dtype' is 'float32' there and 'bfloat16' here"):
        ReferenceLosses(folder, ABOUT | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="'seed' is None there and 3 here"):
        ReferenceLosses(folder, {"seed": 3})
    assert ReferenceLosses(folder, {"data": ABOUT["data"]}).about == ABOUT


@pytest.mark.parametrize(
    "index, message", [([N], f"lie in \\[0, {N}\\), got {N}"), ([-1], "got -1"), ([0.5], "integer")]
)
def test_a_sample_that_is_not_there_is_refused(folder, index, message):
    with pytest.raises(ValueError, match=message):
        ReferenceLosses(folder).lookup(index)


def test_a_folder_that_is_not_complete_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="no complete losses, there is no reference-losses"):
        ReferenceLosses(tmp_path)


@pytest.mark.parametrize(
    "name", ["losses.f32", "offsets.i64", "losses.f32.crc", "offsets.i64.crc", "reference-losses.json"]
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    ragged(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(bytes([content[0] ^ 8]) + content[1:])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        ReferenceLosses(tmp_path).lookup(range(40))


def test_no_file_holds_pickled_objects(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        *("lock", "losses.f32", "losses.f32.crc", "reference-losses.json")
    ]
    assert (folder / "losses.f32").stat().st_size == 4 * N
