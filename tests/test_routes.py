"""The samples of a batch and the routes of their rows; ranks without processes, by the exchange that they would do."""

import numpy as np
import pytest
import torch

from drrho.routes import BatchIndex, Route, announced, refusal, uploaded

CPU = torch.device("cpu")


def test_one_process_has_all_rows_in_their_order():
    batch = BatchIndex.gathered(torch.tensor([3, 1, 3], dtype=torch.int32))
    assert batch.counts == [3] and batch.rank == 0 and batch.own.tolist() == [3, 1, 3]
    route = batch.route(5, CPU)
    assert route is batch.route(5, CPU)  # found once
    assert route.rows.tolist() == [3, 1, 3] and route.repeats
    assert (route.single.tolist(), route.place.tolist(), route.counts.tolist()) == ([1, 3], [1, 0, 1], [1, 2])
    values = torch.randn(3, 2)
    assert route.to_owners(values) is values and route.back(values) is values


def test_a_batch_without_samples():
    route = BatchIndex.gathered([]).route(5, CPU)
    assert len(route.rows) == len(route.single) == 0 and not route.repeats


@pytest.mark.parametrize("index", [[[1]], [0.5], [True], "ab"])
def test_what_is_no_index_is_refused(index):
    with pytest.raises(ValueError, match=r"index must have shape \[b\] and an integer dtype"):
        BatchIndex.gathered(index)


def test_every_row_goes_to_its_owner_and_back(monkeypatch):
    """Three ranks with blocks of four samples, each in this process; what they send is delivered by hand."""
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, 12, size) for size in (7, 0, 4)]
    routes, sent, answers = [], {}, {}
    monkeypatch.setattr("drrho.routes.dist.get_rank", lambda group: group)
    for rank in range(3):
        routes.append(Route(BatchIndex(parts, rank), 4, CPU))

    def outgoing(messages):
        def exchange(rows, give, take, group):
            messages[group] = rows.split(give)
            return rows.new_zeros(sum(take), *rows.shape[1:])

        return exchange

    def incoming(messages):
        return lambda rows, give, take, group: torch.cat([messages[k][group] for k in range(3)])

    for exchange in (outgoing(sent), incoming(sent)):
        monkeypatch.setattr("drrho.routes._exchange", exchange)
        received = [route.to_owners(torch.from_numpy(part)) for route, part in zip(routes, parts, strict=True)]
    for rank, (route, rows) in enumerate(zip(routes, received, strict=True)):
        assert torch.equal(rows - 4 * rank, route.rows) and torch.equal(route.single[route.place], route.rows)
    for exchange in (outgoing(answers), incoming(answers)):
        monkeypatch.setattr("drrho.routes._exchange", exchange)
        back = [route.back(10 * rows) for route, rows in zip(routes, received, strict=True)]
    for part, values in zip(parts, back, strict=True):
        assert values.tolist() == (10 * part).tolist()


def test_a_fault_is_raised_and_a_number_returned():
    assert announced(3, "", None) == [3]
    with pytest.raises(ValueError, match="what is wrong"):
        announced(3, "what is wrong", None)
    assert "those of rank 2 are refused" in refusal(2)


def test_numbers_on_the_host_are_uploaded():
    assert uploaded(np.arange(3), CPU).tolist() == [0, 1, 2]
