"""Rows that are spread over ranks, in gloo processes, against all rows in one process."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import start_ranks

from drrho.ranks import (
    first_row,
    gathered,
    gathered_together,
    gathered_with_gradient,
    mean_over_ranks,
    row_counts,
    sum_to_owners,
    terms_for_owners,
)

COUNTS = (3, 0, 4)
ROWS = torch.randn(sum(COUNTS), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def weights_of(rank):
    """What a rank makes of all rows, in its own way."""
    return torch.arange(14.0, dtype=torch.float64).view(7, 2).cos() * (rank + 1)


def answers(own, rank, group):
    counts = row_counts(len(own), group, own.device)
    own = own.clone().requires_grad_()
    everything = gathered_with_gradient(own, counts, group)
    (everything * weights_of(rank)).sum().backward()
    terms = (own**2).sum(1)
    mean = mean_over_ranks(terms, group)
    return {
        "counts": counts,
        "first": first_row(counts, group),
        "gathered": gathered(own.detach(), counts, group),
        "gathered with gradient": everything.detach(),
        "gradient": own.grad,
        "together": gathered_together([own.detach(), terms.detach(), own.detach()[:, :, None]], counts, group),
        "terms": terms_for_owners(weights_of(rank), counts, group),
        "sum": sum_to_owners(weights_of(rank), counts, group),
        "mean": mean.detach(),
        "gradient of the mean": torch.autograd.grad(mean, own)[0],
    }


def work(rank, folder):
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=len(COUNTS), timeout=patience)
    try:
        torch.save(answers(ROWS.split(COUNTS)[rank], rank, dist.group.WORLD), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["gathered", "gathered with gradient"])
def test_one_process_has_all_rows(name):
    alone = answers(ROWS, 0, None)
    assert alone["counts"] == [7] and alone["first"] == 0
    assert torch.equal(alone[name], ROWS)
    assert torch.equal(alone["gradient"], weights_of(0)) and torch.equal(alone["sum"], weights_of(0))
    assert torch.equal(alone["mean"], (ROWS**2).sum(1).mean())


@pytest.mark.slow
def test_ranks_have_all_rows_and_their_own_sums(tmp_path):
    start_ranks(work, (str(tmp_path),), len(COUNTS))
    alone = answers(ROWS, 0, None)
    everybody = sum(weights_of(rank) for rank in range(len(COUNTS)))
    for rank in range(len(COUNTS)):
        found = torch.load(tmp_path / f"{rank}.pt")
        first = sum(COUNTS[:rank])
        own = slice(first, first + COUNTS[rank])
        assert found["counts"] == list(COUNTS) and found["first"] == first
        assert torch.equal(found["gathered"], ROWS) and torch.equal(found["gathered with gradient"], ROWS)
        assert torch.equal(found["gradient"], everybody[own]) and torch.equal(found["sum"], everybody[own])
        assert torch.equal(found["terms"], torch.stack([weights_of(each)[own] for each in range(len(COUNTS))]))
        for together, expected in zip(found["together"], (ROWS, (ROWS**2).sum(1), ROWS[:, :, None]), strict=True):
            assert torch.equal(together, expected)
        torch.testing.assert_close(found["mean"], alone["mean"], rtol=1e-15, atol=0)
        torch.testing.assert_close(
            found["gradient of the mean"], alone["gradient of the mean"][own], rtol=1e-15, atol=0
        )


def test_one_process_sends_nothing():
    columns, rows = torch.arange(7.0), ROWS
    assert gathered_together([columns, rows], [7], None) == [columns, rows]
    assert torch.equal(terms_for_owners(rows, [7], None), rows[None])
