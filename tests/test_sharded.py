"""Rows per sample in one process; over ranks the tests of running estimates and temperatures use them."""

import math

import pytest
import torch

from drrho.routes import BatchIndex
from drrho.sharded import ShardedRows, fault_of_values, mean_over_repeats


def rows(samples=5):
    return ShardedRows(samples, (0.5, math.nan), "numbers", "numbers of samples")


def test_rows_start_at_their_fill_and_are_changed_in_place():
    shard = rows()
    assert len(shard) == 5 and shard.total(3) == 3
    assert torch.equal(shard.own[0], torch.full((5,), 0.5)) and shard.own[1].isnan().all()
    shard.own[0] = torch.arange(5.0)
    index = torch.tensor([4, 0, 4])
    assert shard.lookup(index, slice(1)).tolist() == [[4.0, 0.0, 4.0]]
    assert shard.lookup(index).shape == (2, 3)


def test_collected_values_keep_float64_and_their_rows():
    index, values = torch.tensor([3, 1, 3]), [torch.tensor([0.1, 0.2, 0.3]).double()]
    route, collected = rows().collect(index, values, "")
    assert route.rows.tolist() == [3, 1, 3] and route.single.tolist() == [1, 3] and route.place.tolist() == [1, 0, 1]
    assert route.counts.tolist() == [1, 2] and route.repeats and collected.dtype == torch.float64
    assert torch.equal(collected[0], values[0])
    with pytest.raises(ValueError, match="what is wrong"):
        rows().collect(index, values, "what is wrong")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([5]), r"index must lie in \[0, 5\), got 5"),
        (torch.tensor([-1]), r"index must lie in \[0, 5\), got -1"),
        (torch.tensor([[0]]), r"index must have shape \[b\] and an integer dtype, got \[1, 1\]"),
        (torch.tensor([True]), "integer dtype, got .* torch.bool"),
    ],
)
def test_a_wrong_index_is_refused(index, message):
    with pytest.raises(ValueError, match=message):
        rows().lookup(index)


def test_a_state_comes_back_from_parts_in_any_order():
    shard = rows()
    shard.own[:] = torch.arange(10.0).view(2, 5)
    state = shard.state_dict()
    parts = [
        {"numbers": state["numbers"][:, a:b], "offset": torch.tensor(a), "samples": torch.tensor(5)}
        for a, b in ((3, 5), (0, 3))
    ]
    again = rows()
    again.load_state_dict(parts, lambda columns: "")
    assert torch.equal(again.own, shard.own)
    for states, message in (
        (parts[:1], r"\[0, 3\) are missing"),
        ([*parts, parts[0]], "must not overlap"),
        ([{"numbers": torch.zeros(3, 5)}], r"numbers of shape \[2, rows\], got \[3, 5\]"),
        ([{"numbers": torch.zeros(2, 4)}], "numbers of samples for 5 samples, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            again.load_state_dict(states, lambda columns: "")
    with pytest.raises(ValueError, match="not these"):
        again.load_state_dict(parts, lambda columns: "not these")
    assert torch.equal(again.own, shard.own)


def test_faults_name_the_sample_and_repeats_are_averaged():
    batch = BatchIndex.gathered([7, 2])
    assert fault_of_values(batch, {"x": torch.tensor([1.0, 2.0])}, "finite") == ""
    wrong = {"y": torch.zeros(2), "x": torch.tensor([1.0, math.inf])}
    assert fault_of_values(batch, wrong, "finite") == "x must be finite, got inf for sample 2"
    assert "shape [2] like index, got [1]" in fault_of_values(batch, {"x": torch.ones(1)}, "finite")
    route = BatchIndex.gathered([2, 5, 2]).route(9, torch.device("cpu"))
    assert mean_over_repeats(torch.tensor([[1.0, 2.0, 6.0]]), route).tolist() == [[3.5, 2.0]]
