"""Ranks: the launcher's variables, collective operations, and errors that stop all."""

import os
import socket
import time

import pytest
import torch
from processes import start_ranks
from torch.distributed.run import get_args_parser

from experiments.clip.cli.options import Train
from experiments.clip.cli.parser import _flags
from experiments.clip.distributed import ONE_PROCESS, Ranks, _gpu_of, joined_ranks, launched, set_float32_products
from experiments.clip.errors import UserError


def test_the_launcher_s_variables():
    assert launched({}) == (0, 1, 0)
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launched(torchrun) == (3, 8, 1)
    srun = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launched(srun) == (5, 8, 2)
    with pytest.raises(UserError, match="8 ranks need MASTER_ADDR and MASTER_PORT"):
        launched({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2"})
    with pytest.raises(UserError, match="torchrun must set RANK, WORLD_SIZE, LOCAL_RANK to numbers, got RANK=x"):
        launched({"RANK": "x", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    with pytest.raises(UserError, match="LOCAL_RANK=None"):
        launched({"RANK": "1", "WORLD_SIZE": "8"})


def test_one_process_is_all_ranks():
    encode = torch.neg
    assert ONE_PROCESS.leads and ONE_PROCESS.split_over_ranks(encode) is encode
    assert ONE_PROCESS.max_over_ranks(3) == 3 and ONE_PROCESS.maxima_over_ranks(3, -1) == (3, -1)
    assert ONE_PROCESS.sum(torch.ones(2)).tolist() == [1, 1]
    assert ONE_PROCESS.run_on_all_or_fail(lambda: "done") == "done"
    with ONE_PROCESS.leader_first():
        ONE_PROCESS.wait()
    error = UserError("x")
    with pytest.raises(UserError) as raised:
        ONE_PROCESS.raise_on_all(error)
    assert raised.value is error
    ONE_PROCESS.raise_on_all(None)


@pytest.mark.parametrize(("number", "count"), [(0, 2), (1, 3), (7, 3), (9, 3), (4, 1)])
def test_every_index_is_the_work_of_one_rank(number, count):
    parts = [Ranks(rank, count).own_indices(number) for rank in range(count)]
    assert sorted(index for part in parts for index in part) == list(range(number))
    assert {Ranks(rank, count).rounds(number) for rank in range(count)} == {max(map(len, parts))}


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda needs a GPU"), joined_ranks("cuda", 1):
        pass
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with joined_ranks("auto", 1) as ranks:
        assert ranks == Ranks()


def test_a_rank_takes_its_own_gpu_or_the_one_that_its_launcher_shows_it(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [_gpu_of(rank, rank, 8) for rank in range(8)] == list(range(8))
    with pytest.raises(UserError, match="rank 3 is number 1 of its node, which has 1 GPUs"):
        _gpu_of(3, 1, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert _gpu_of(3, 1, 1) == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert [_gpu_of(rank, rank, 2) for rank in range(2)] == [0, 1]
    with pytest.raises(UserError, match="rank 2 is number 2 of its node, which has 2 GPUs"):
        _gpu_of(2, 2, 2)


def on_one_rank(rank, port, folder):
    """Return nothing if all that holds on a rank of two holds."""
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    with joined_ranks("cpu", 1) as ranks:
        assert (ranks.rank, ranks.count, ranks.leads) == (rank, 2, rank == 0)
        assert ranks.max_over_ranks(10 - rank) == 10 and ranks.maxima_over_ranks(rank, -rank) == (1, 0)
        assert ranks.sum(torch.tensor([1, rank])).tolist() == [2, 1]
        encoded = []

        def encode(items):
            encoded.append(len(items))
            return torch.tensor([[float(item), 0.0] for item in items])

        for size, own in ((5, (2, 3)[rank]), (2, 1), (1, 1)):
            assert ranks.split_over_ranks(encode)(range(size)).tolist() == [[k, 0.0] for k in range(size)]
            assert encoded.pop() == own
        with ranks.leader_first():
            assert (folder / "made").exists() == (rank == 1)
            (folder / "made").touch()
        assert ranks.run_on_all_or_fail(lambda: rank) == rank

        def fail():
            if rank == 1:
                raise UserError("only here")
            return rank

        with pytest.raises(UserError, match=("stopped because rank 1 did: see its message", "only here")[rank]):
            ranks.run_on_all_or_fail(fail)
        ranks.wait()


@pytest.mark.slow
def test_two_ranks_agree(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    start_ranks(on_one_rank, (port, tmp_path), 2)


def test_products_of_float32_are_changed_on_a_gpu_alone():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    set_float32_products(torch.device("cpu"), full=False)
    names = torch.backends.cuda.matmul, torch.backends.cudnn
    assert before == (*(each.allow_tf32 for each in names), torch.backends.cudnn.benchmark)
    try:
        for full in (False, True):
            set_float32_products(torch.device("cuda"), full=full)  # which touches no GPU
            assert [each.allow_tf32 for each in names] == [not full] * 2
            assert torch.backends.cudnn.benchmark is not full
    finally:
        names[0].allow_tf32, names[1].allow_tf32, torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"MASTER_PORT": "x"}, "MASTER_PORT must be a number from 1 to 65535, got 'x'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT must be a number from 1 to 65535"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT must be a number from 1 to 65535"),
        ({"MASTER_PORT": "9" * 5000}, "MASTER_PORT must be a number from 1 to 65535"),
        ({"RANK": "2"}, "torchrun set rank 2 of 2, number 0 of its node: ranks count from 0"),
        ({"RANK": "-1"}, "torchrun set rank -1 of 2"),
        ({"WORLD_SIZE": "0"}, "torchrun set rank 0 of 0"),
    ],
    ids=["word", "large", "negative", "long", "no such rank", "negative rank", "no rank"],
)
def test_variables_that_no_launcher_sets_are_one_line(changed, message):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    with pytest.raises(UserError, match=message):
        launched(variables | changed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("address", ["127.0.0.1", "nowhere.invalid"])
def test_a_rank_that_is_absent_is_one_line_within_the_time(rank, address, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": address, "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"rank {rank} of 2 has not met the others at {address}:{port} within") as said:
        with joined_ranks("cpu", 0.05):
            pass
    assert time.monotonic() - started < 60 and "\n" not in str(said.value)


def with_other_options(rank, port):
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    with joined_ranks("cpu", 1) as ranks:
        ranks.check_same_options({"seed": 1, "optimization": {"lr": 0.1, "betas": (0.9, 0.98)}})
        message = (
            "stopped because rank 1 did: see its message",
            r"rank 1 has other options: --seed is 2 here, 1 on rank 0; --weight-decay is 0\.2 here, 0\.1 on rank 0",
        )[rank]
        with pytest.raises(UserError, match=message):
            ranks.check_same_options({"seed": 1 + rank, "optimization": {"lr": 0.1, "weight_decay": (1 + rank) / 10}})


@pytest.mark.slow
def test_ranks_with_other_options_refuse_to_start():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    start_ranks(with_other_options, (port,), 2)


def test_torchrun_leaves_every_option_of_training_to_the_program():
    parser, words = get_args_parser(), list(_flags(Train))
    assert "--log-to" in words and "--logs" not in words
    for word in words:
        assert parser.parse_args(["run.py", "train", word, "x"]).training_script_args == ["train", word, "x"]
